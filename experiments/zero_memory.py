"""What one rank holds of parameters, gradients and optimizer moments under each ZeRO stage,
counted, beside the arithmetic.

    python -m experiments.zero_memory

Takes two steps of AdamW with `base` in fp32 on 1, 2 and 4 processes of this machine and sums the
storages of the tensors that live in each, between backward and step. The arithmetic is that of
Rajbhandari et al. 2020 (ZeRO), Figure 1. They count 2 + 2 + K bytes a parameter, K = 12, for fp16
with Adam; fp32 has 4 + 4 + 8: parameter, gradient, two moments.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

import memory
import model
from plumbing.ranks import Ranks

KINDS = "parameters", "copy", "gradients", "moments", "buckets"
NOTE = """
Bytes in MB (10^6), the largest of the ranks. `copy`: under ZeRO 1 to 3, DeepSpeed steps on a copy
of the rank's share of the parameters, also where they are fp32 already: 4/W a parameter more than
the arithmetic. The rest of the difference is padding, small parameters that ZeRO 3 leaves whole,
and under ZeRO 1 and 2 the gradient of a parameter that lies across the border of two ranks' shares:
both keep it whole. ZeRO 1 too drops the others' share of the gradients, but only when all are
there: `last gradient` has the gradients just after the last one has come in, outside of the bucket.
`bucket`: what DeepSpeed sets aside in backward (ZeRO 1, 2) or for good (ZeRO 3) to reduce gradients
in: `reduce_bucket_size` elements, which memory.py sets to 50 million, a tenth of DeepSpeed's
default whatever the model, and a --zero JSON to what it says. A CPU gives memory only to what is
written in it, a GPU all."""


def arithmetic(parameters: int, stage: int, world_size: int) -> float:
    """Bytes on a rank: each stage divides one more of the three by the number of ranks."""
    moments = 8 * parameters / (world_size if stage >= 1 else 1)
    gradients = 4 * parameters / (world_size if stage >= 2 else 1)
    weights = 4 * parameters / (world_size if stage >= 3 else 1)
    return moments + gradients + weights


def storages(values: Iterable) -> dict[int, int]:
    """{address: bytes} of those that are tensors: a tensor and the views of it are one."""
    found = {}
    for value in values:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def count(engine: memory.Engine) -> dict[str, int]:
    """Bytes of this process's tensors by what they are. What is nothing else is a gradient, from
    100 kB on: the texts are too short for larger activations."""
    parameters = list(engine.encoder.parameters())
    shares = [getattr(p, "ds_tensor", None) for p in parameters]
    states = engine.optimizer.state
    # type(): isinstance would ask every object for its __class__, which some compute
    alive = storages([x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
                     + [p.grad for p in parameters])
    bucket = engine.model.zero_reduce_bucket_size() * 4 if engine.stage else None
    found = {"parameters": storages(parameters + shares),
             "copy": storages(states),
             "moments": storages(value for state in states.values() for value in state.values()),
             "buckets": {at: size for at, size in alive.items() if size == bucket},
             "gradients": {at: size for at, size in alive.items() if size >= 1e5}}
    seen, sums = set(), {}
    for kind, sizes in found.items():  # what is of two kinds counts as the first
        sums[kind] = sum(size for at, size in sizes.items() if at not in seen)
        seen |= set(sizes)
    return sums


def rank(zero: str, size: str) -> None:
    """One process of a run; rank 0 prints what they hold."""
    ranks = Ranks()
    encoder = model.create(size)
    parameters = sum(p.numel() for p in encoder.parameters())
    optimizer = torch.optim.AdamW(encoder.parameters(), fused=True)
    engine = memory.make_engine(
        encoder, optimizer, 1.0, memory.LossScale(torch.float32), ranks, zero)
    ids, mask = torch.arange(1, 6)[None], torch.ones(1, 5, dtype=torch.long)
    micro_batches = [(torch.tensor([i]), ids, mask) for i in (0, 1)]

    found = {}
    comes_last = encoder.backbone.embeddings.word_embeddings.weight  # of all gradients
    comes_last.register_post_accumulate_grad_hook(lambda _: found.update(last=count(engine)))
    for _ in range(2):
        embeddings = engine.embed(micro_batches)
        embeddings.square().sum().backward()
        engine.backward(embeddings.grad)
        found["backward"] = count(engine)
        engine.step(1e-4)
    by_rank = ranks.gather_objects(found)
    largest = {moment: {kind: max(one[moment][kind] for one in by_rank) for kind in KINDS}
               for moment in found}
    ranks.print_rank0(json.dumps(largest | {"total": parameters, "stage": engine.stage}))
    ranks.leave()


def launch(world_size: int, zero: str, size: str) -> dict:
    """What `rank` prints, of so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node", str(world_size), "-m", "experiments.zero_memory",
               "--size", size, "--zero", zero]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], text=True, capture_output=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--zero", nargs="+", default=["0", "1", "2", "3"],
                        help="stages, or DeepSpeed JSON files")
    args = parser.parse_args(argv)
    if "RANK" in os.environ:
        return rank(args.zero[0], args.size)
    print("| processes | ZeRO | parameters | copy | gradients | moments | sum | arithmetic "
          "| last gradient | bucket |")
    print("| ---: " * 10 + "|")
    for world_size in args.ranks:
        for zero in args.zero:
            found = launch(world_size, zero, args.size)
            backward, last = found["backward"], found["last"]
            held = [backward[kind] for kind in ("parameters", "copy", "gradients", "moments")]
            row = [*held, sum(held), arithmetic(found["total"], found["stage"], world_size),
                   last["gradients"], max(last["buckets"], backward["buckets"])]
            cells = " | ".join(f"{size / 1e6:,.0f}" for size in row)
            print(f"| {world_size} | {zero} | {cells} |", flush=True)
    print(f"\n{args.size}: {found['total']:,} parameters.{NOTE}")


if __name__ == "__main__":
    main()
