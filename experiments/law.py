"""One update, however it is computed: the matrix behind §5.3's means.

    python -m experiments.law

trains a toy JinaBERT for 3 steps in every combination of 1, 2 and 4 processes; plain torch and
DeepSpeed ZeRO 0 to 3; layers checkpointed or not; one micro-batch, many, many of which some keep
their graph, or a number that differs from rank to rank; stage 2 and stage 3; fp32 and bf16. Every
update theta_after - theta_before is held against one that never heard of ranks or passes: plain
fp32 in one process, one forward and one backward pass, with losses.py's equation as printed over
the whole batch. The steps go through train.prepare and train.step_loss, as train.py's do.

The optimizer is plain SGD without clipping, whose update is -lr times the sum of the gradients;
AdamW's hardly depends on their scale: all of them times 8 give a norm ratio of 1.0004. `--planted`
puts the most common mistake, a factor W, into the gradient that comes back to the gathered columns:
every cell on more than one process must turn red.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import losses
import model
import train
from plumbing.plan import Plan
from plumbing.ranks import Gather, Ranks

# K rows over all ranks, N negatives a row
K, N, TAU, STEPS, LR = 8, 2, 0.05, 3, 0.1
ADAM_LR, CLIP = 1e-3, 0.1
FP32_ERROR, BF16_NORM, BF16_COSINE, ADAM_ERROR = 1e-4, 0.01, 0.999, 1e-3


class Cell(NamedTuple):
    zero: int | None  # None: plain torch
    checkpointed: bool
    micro: str  # one | many | kept: many, some keep their graph | unequal over the ranks, also kept
    stage: int
    precision: str
    optimizer: str = "sgd"


def cells(world_size: int, few: bool) -> list[Cell]:
    engines, micro = [0, 1, 2, 3], ["one", "many", "kept", "unequal"]
    if world_size == 1:
        engines, micro = [None, *engines], micro[:3]
    if few:
        engines = {1: [None, 2], 2: engines}.get(world_size, [2])
    found = []
    for zero in engines:
        if few:
            found += [Cell(zero, True, micro[-1], 3, "fp32"), Cell(zero, True, "many", 2, "bf16")]
        else:
            found += [Cell(zero, *way)
                      for way in product((False, True), micro, (2, 3), ("fp32", "bf16"))]
        found.append(Cell(zero, True, micro[-1], 3, "fp32", "adamw"))
    return found


# what every cell has in common

def toy() -> torch.nn.Module:
    """Weights of deviation 0.1, where every parameter has its share of the gradient, 0.4 % at
    least: at BERT's 0.02 and this width, the token embeddings have .99 of it and a query's bias
    1e-5, so that an error there would pass. Plain bf16 is within 0.1 % and 0.99998 of plain fp32;
    at a deviation of 0.3 it would itself be 2.6 % off."""
    torch.manual_seed(0)
    config = model.JinaBertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=48, hidden_dropout_prob=0.0, initializer_range=0.1)
    return model.PooledEncoder(model.JinaBertModel(config)).train()


def optimizer_of(name: str, encoder: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW's eps: a bias of the attention's keys shifts all logits of a query alike, so its
    gradient is 0 but for rounding, 1e-10 after clipping here, of which m / (sqrt(v) + eps) makes
    +-1 if eps is smaller. Other entries are 1e-5 to 1e-3."""
    if name == "sgd":
        return torch.optim.SGD(encoder.parameters(), lr=LR)
    return torch.optim.AdamW(encoder.parameters(), lr=ADAM_LR, weight_decay=0.01, eps=1e-6)


def texts_of(step: int, stage: int, rank: int = 0, world_size: int = 1) -> list[Tensor]:
    """Token ids of this rank's queries, positives and, in stage 3, negatives row by row; 3 to 12
    tokens each."""
    g, texts = torch.Generator().manual_seed(step), []
    for _ in range(K * (2 + N)):
        length = int(torch.randint(3, 13, (), generator=g))
        texts.append(torch.randint(1, 50, (length,), generator=g))
    first, last = rank * K // world_size, (rank + 1) * K // world_size
    q, p, n = texts[:K], texts[K : 2 * K], texts[2 * K :]
    pairs = q[first:last] + p[first:last]
    return pairs if stage == 2 else pairs + n[N * first : N * last]


def make_micro_batches(texts: list[Tensor], size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(index, input_ids, attention_mask) of `size` texts each, the longest first, as data.py orders
    them."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    micro_batches = []
    for start in range(0, len(order), size):
        chunk = order[start : start + size]
        input_ids = pad_sequence([texts[i] for i in chunk], batch_first=True)
        mask = pad_sequence([torch.ones_like(texts[i]) for i in chunk], batch_first=True)
        micro_batches.append((torch.tensor(chunk), input_ids, mask))
    return micro_batches


def split(embeddings: Tensor, stage: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """(M, D) of `texts_of` -> q, p, and n, which is None in stage 2."""
    B = len(embeddings) // (2 if stage == 2 else 2 + N)
    q, p, n = embeddings[:B], embeddings[B : 2 * B], embeddings[2 * B :]
    return q, p, None if stage == 2 else n.view(B, N, -1)


def vector(encoder: torch.nn.Module) -> Tensor:
    return parameters_to_vector(encoder.parameters()).detach().double().cpu()


def plain_update(stage: int, optimizer_name: str) -> Tensor:
    """The law: fp32, one process, one pass over the whole batch, no columns."""
    encoder = toy()
    before, optimizer = vector(encoder), optimizer_of(optimizer_name, encoder)
    for step in range(STEPS):
        (index, input_ids, mask), = make_micro_batches(texts_of(step, stage), K * (2 + N))
        q, p, n = split(encoder(input_ids, mask)[index.argsort()], stage)
        if stage == 2:
            loss = losses.pair_loss(q, p, TAU, form=losses.info_nce)
        else:
            loss = losses.hard_negative_loss(q, p, n, TAU, form=losses.info_nce)
        loss.backward()
        if optimizer_name == "adamw":
            norm = torch.nn.utils.clip_grad_norm_(encoder.parameters(), CLIP)
            assert norm > 2 * CLIP, "clipping really clips"
        optimizer.step()
        optimizer.zero_grad()
    return vector(encoder) - before


# in a process

def update(cell: Cell, ranks: Ranks, config: str) -> Tensor:
    """theta_after - theta_before of a cell."""
    encoder, sgd = toy().to(ranks.device), cell.optimizer == "sgd"
    before, optimizer = vector(encoder), optimizer_of(cell.optimizer, encoder)
    args = argparse.Namespace(
        batch_size=K, negatives=N, precision=cell.precision, checkpoint_layers=cell.checkpointed,
        zero=None if cell.zero is None else config, max_length=12, micro_tokens="auto", memory=None)
    engine, _ = train.prepare(encoder, optimizer, 0.0 if sgd else CLIP, args, ranks)
    size = {"one": K * (2 + N), "unequal": 3 * (1 + ranks.rank)}.get(cell.micro, 3)
    keep_tokens = K * (2 + N) * 4 // ranks.world_size if cell.micro in ("kept", "unequal") else 0
    engine.graphs_to_keep = Plan(size, keep_tokens, line="").graphs_to_keep
    for step in range(STEPS):
        texts = texts_of(step, cell.stage, ranks.rank, ranks.world_size)
        embeddings = engine.embed(make_micro_batches(texts, size))
        loss, _ = train.step_loss(*split(embeddings, cell.stage), TAU, ranks)
        loss.backward()
        engine.backward(embeddings.grad)
        engine.step(LR if sgd else ADAM_LR)
    with engine.whole():
        after = vector(encoder)
    if cell.zero is not None:
        engine.model.destroy()
    return after - before


def worker(args: argparse.Namespace) -> None:
    """All cells of one process group, one after the other. Rank 0 writes a list of (cell, worst
    measures over the ranks)."""
    ranks, alone = Ranks(), Ranks(alone=True)
    ranks.print_rank0 = alone.print_rank0 = lambda line: None
    calls = count_collectives()
    if args.planted:
        honest = Gather.backward
        Gather.backward = staticmethod(
            lambda ctx, gradient: (honest(ctx, gradient)[0] * ranks.world_size, None))

    # The plain updates first of all, as ZeRO-3 puts a linear layer of its own into torch and leaves
    # it there; for that too its cells come last.
    plain = {(stage, name): plain_update(stage, name)
             for stage, name in ((2, "sgd"), (3, "sgd"), (3, "adamw"))}
    bar = tqdm(cells(ranks.world_size, args.cells == "few"), f"{ranks.world_size} processes",
               disable=ranks.rank > 0)
    results = []
    for cell in bar:
        # Toy parameters are below the size up to which ZeRO-3 leaves them whole, and all fit in one
        # bucket: 0, and small.
        config = Path(args.worker).with_suffix(".config")
        zero = {"stage": cell.zero, "stage3_param_persistence_threshold": 0,
                "reduce_bucket_size": 2000}
        ranks.on_rank_0(lambda: config.write_text(json.dumps({"zero_optimization": zero})))
        calls.clear()
        found = update(cell, alone if cell.zero is None else ranks, str(config))
        counts = [calls.count(name) / STEPS for name in COLLECTIVES]
        own = compare(found, plain[cell.stage, cell.optimizer])
        error, norm, angle = map(max, zip(*ranks.gather_objects(own)))
        results.append((cell, dict(error=error, norm=norm, cosine=1 - angle, calls=counts)))
    if ranks.rank == 0:
        Path(args.worker).write_text(json.dumps(results))
    ranks.leave()


COLLECTIVES = "all_gather_single", "reduce_scatter_single"


def count_collectives() -> list[str]:
    """A list that gets the name of each of our collectives as it is called. (DeepSpeed calls its
    own by older names.)"""
    calls = []

    def counted(name, call):
        def count(*inputs, **more):
            calls.append(name)
            return call(*inputs, **more)
        return count

    for name in COLLECTIVES:
        setattr(dist, name, counted(name, getattr(dist, name)))
    return calls


def compare(found: Tensor, expected: Tensor) -> list[float]:
    """Relative error, how far the norms' ratio is from 1, 1 - cosine; infinite where not a
    number."""
    measures = [(found - expected).norm() / expected.norm(),
                (found.norm() / expected.norm() - 1).abs(),
                1 - torch.cosine_similarity(found, expected, dim=0)]
    return [float(x) if math.isfinite(x) else math.inf for x in measures]


# the table

def good(cell: Cell, measures: dict, world_size: int) -> bool:
    """A step gathers each of q, p and, in stage 3, n once, and hands each one's gradient back once,
    in however many passes."""
    columns = {2: 2, 3: 3}[cell.stage] if world_size > 1 else 0
    if measures["calls"] != [columns, columns]:
        return False
    if cell.precision == "bf16":
        return measures["norm"] <= BF16_NORM and measures["cosine"] >= BF16_COSINE
    return measures["error"] <= (FP32_ERROR if cell.optimizer == "sgd" else ADAM_ERROR)


def row(world_size: int, zero: int | None, results: list) -> str:
    def of(measure, precision, optimizer):
        return [measures[measure] for cell, measures in results
                if (cell.precision, cell.optimizer) == (precision, optimizer)]

    red = sum(not good(cell, measures, world_size) for cell, measures in results)
    calls = {cell.stage: measures["calls"] for cell, measures in results}
    return " | ".join([
        f"| {world_size}", "plain torch" if zero is None else f"ZeRO {zero}", f"{len(results)}",
        f"{max(of('error', 'fp32', 'sgd')):.1e}", f"{max(of('norm', 'bf16', 'sgd')):.2%}",
        f"{min(of('cosine', 'bf16', 'sgd')):.5f}", f"{max(of('error', 'fp32', 'adamw')):.1e}",
        f"{calls[2][0]:g}, {calls[3][0]:g}", f"FAIL ({red} cells) |" if red else "OK |"])


def launch(world_size: int, args: argparse.Namespace) -> list:
    """All cells on `world_size` processes -> [(cell, measures)]. Raises CalledProcessError, or
    TimeoutExpired where ranks wait for each other."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc_per_node", str(world_size), "-m", "experiments.law",
                   "--worker", str(out), "--cells", args.cells]
        if args.planted:
            command.append("--planted")
        process = subprocess.Popen(command, cwd=Path(__file__).parents[1],
                                   env=os.environ | {"OMP_NUM_THREADS": "1"},
                                   stdout=subprocess.DEVNULL)
        try:
            if process.wait(timeout=1800):
                raise subprocess.CalledProcessError(process.returncode, command)
        finally:
            process.terminate()  # the launcher takes its workers with it
        return [(Cell(*cell), measures) for cell, measures in json.loads(out.read_text())]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--processes", type=int, nargs="+", default=[1, 2, 4], metavar="W", help="divisors of 8")
    add("--cells", choices=("all", "few"), default="all", help="few: three for each of 7 engines")
    add("--planted", action="store_true",
        help="with a factor W in the gradient of the gathered columns")
    add("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    table = ["| processes | engine | cells | worst fp32 error | worst bf16 norm off by "
             "| worst bf16 cosine | AdamW, clipped: error | gathers a step, stage 2, 3 | |",
             "| --- " * 9 + "|"]
    for world_size in args.processes:
        results = launch(world_size, args)
        for zero in dict.fromkeys(cell.zero for cell, _ in results):
            table.append(row(world_size, zero, [r for r in results if r[0].zero == zero]))
    print("\n".join(table))
    sys.exit(any("FAIL" in line for line in table))


if __name__ == "__main__":
    main()
