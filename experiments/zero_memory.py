"""What one rank holds of parameters, gradients and optimizer moments under each ZeRO stage, counted, beside the arithmetic.

    python -m experiments.zero_memory

Takes two steps of AdamW with `base` in fp32 on 1, 2 and 4 processes of this machine and sums the storages of the tensors that
live in each, between backward and step. The arithmetic is that of Rajbhandari et al. 2020 (ZeRO), Figure 1. They count
2 + 2 + K bytes a parameter, K = 12, for fp16 with Adam; fp32 has 4 + 4 + 8: parameter, gradient, two moments.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import memory
import model
from data import MicroBatch
from plumbing.ranks import Ranks

KINDS = "parameters", "copy", "gradients", "moments", "buckets"
NOTE = """
Bytes in MB (10^6), the largest of the ranks. `copy`: under ZeRO 1 to 3, DeepSpeed steps on a copy of the rank's share of
the parameters, also where they are fp32 already: 4/W a parameter more than the arithmetic. The rest of the difference is
padding, small parameters that ZeRO 3 leaves whole, and under ZeRO 1 and 2 the gradient of a parameter that lies across the
border of two ranks' shares: both keep it whole. ZeRO 1 too drops the others' share of the gradients, but only when all are
there: `last gradient` has the gradients just after the last one has come in, outside of the bucket. `bucket`: what
DeepSpeed sets aside in backward (ZeRO 1, 2) or for good (ZeRO 3) to reduce gradients in: `reduce_bucket_size` elements,
which memory.py sets to 50 million, a tenth of DeepSpeed's default whatever the model, and a --zero JSON to what it says. A
CPU gives memory only to what is written in it, a GPU all."""


def arithmetic(theta: int, stage: int, world_size: int) -> float:
    """Bytes of theta parameters, their gradients and moments on a rank: each stage divides one more of the three."""
    return sum(part * theta / (world_size if stage >= least else 1) for part, least in ((4, 3), (4, 2), (8, 1)))


def storages(tensors) -> dict[int, int]:
    """{address: bytes}: a tensor and the views of it are one."""
    return {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor))}


def count(engine: memory.OneProcess) -> dict[str, int]:
    """Bytes of this process's tensors by what they are. What is nothing else is a gradient, from 100 kB on: the texts are
    too short for larger activations."""
    theta = list(engine.encoder.parameters())
    found = {"parameters": storages([*theta, *[getattr(p, "ds_tensor", None) for p in theta]]),
             "copy": storages(engine.optimizer.state),
             "moments": storages(value for state in engine.optimizer.state.values() for value in state.values())}
    alive = storages([*[x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)], *[p.grad for p in theta]])
    bucket = engine.model.zero_reduce_bucket_size() * 4 if engine.stage else None
    found["buckets"] = {at: size for at, size in alive.items() if size == bucket}
    found["gradients"] = {at: size for at, size in alive.items() if size >= 1e5}
    seen, sums = set(), {}
    for kind in ("parameters", "copy", "moments", "buckets", "gradients"):  # the first that has it
        sums[kind] = sum(size for at, size in found[kind].items() if at not in seen)
        seen |= set(found[kind])
    return sums


def rank(zero: str, size: str) -> None:
    """One process of a run; rank 0 prints what they hold."""
    ranks = Ranks()
    encoder = model.create(size)
    theta, last = sum(p.numel() for p in encoder.parameters()), encoder.backbone.embeddings.word_embeddings.weight
    optimizer = torch.optim.AdamW(encoder.parameters(), fused=True)
    engine = memory.engine(encoder, optimizer, 1.0, memory.LossScale(torch.float32), ranks, zero)
    texts = [MicroBatch(torch.tensor([i]), torch.arange(1, 6)[None], torch.ones(1, 5, dtype=torch.long)) for i in (0, 1)]
    found = {}
    last.register_post_accumulate_grad_hook(lambda _: found.update(last=count(engine)))  # of all gradients it comes last
    for _ in range(2):
        engine.backward(texts, lambda e: (e.square().sum(),))
        found["backward"] = count(engine)
        engine.step(1e-4)
    found = {moment: {kind: max(of[moment][kind] for of in ranks.all(found)) for kind in KINDS} for moment in found}
    ranks.say(json.dumps(found | {"theta": theta, "stage": engine.stage}))
    ranks.leave()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--zero", nargs="+", default=["0", "1", "2", "3"], help="stages, or DeepSpeed JSON files")
    args = parser.parse_args(argv)
    if "RANK" in os.environ:
        return rank(args.zero[0], args.size)
    print("| processes | ZeRO | parameters | copy | gradients | moments | sum | arithmetic | last gradient | bucket |\n"
          "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for world_size in args.ranks:
        for zero in args.zero:
            done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                                   str(world_size), "-m", "experiments.zero_memory", "--size", args.size, "--zero", zero],
                                  cwd=Path(__file__).parents[1], text=True, capture_output=True,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"})
            if done.returncode:
                sys.exit(done.stderr)
            found = json.loads(done.stdout)
            held = [found["backward"][kind] for kind in KINDS[:4]]
            row = [*held, sum(held), arithmetic(found["theta"], found["stage"], world_size), found["last"]["gradients"],
                   max(found["last"]["buckets"], found["backward"]["buckets"])]
            print(f"| {world_size} | {zero} | " + " | ".join(f"{x / 1e6:,.0f}" for x in row) + " |", flush=True)
    print(f"\n{args.size}: {found['theta']:,} parameters.{NOTE}")


if __name__ == "__main__":
    main()
