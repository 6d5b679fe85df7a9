"""What a long text costs: memory and time of one micro-batch, by the length of its texts.

    python -m experiments.long_texts
    python -m experiments.long_texts --model base --lengths 8192 --precision bf16
    python -m experiments.long_texts --lengths 2048 4096 --materialised

A micro-batch has max(8,192, T) tokens, in texts of T tokens without padding: forward and backward, with and without
checkpointed layers (§5.3), and embedding alone. A process per cell takes two passes: the seconds are those of the second,
the memory is the peak less what was there before, weights and gradients: of the process on a CPU, of torch's allocations
on a GPU. --materialised makes the attention bias a B x H x T x T tensor at every length, as up to model.LONG tokens.
"""

import argparse
import json
import subprocess
import sys
import time

import torch

import memory
import model
from experiments.loss_memory import CUDA, held

WAYS = {"train": "training", "checkpoint": "checkpointed layers", "embed": "embedding"}
TOKENS = 8192


def seconds(encoder: torch.nn.Module, ids: torch.Tensor, train: bool) -> float:
    start = time.perf_counter()
    with torch.set_grad_enabled(train):
        loss = encoder(ids, torch.ones_like(ids)).square().sum()
    if train:
        loss.backward()
    loss.item()
    if CUDA:
        torch.cuda.synchronize()  # the backward pass too
    return time.perf_counter() - start


def measure(way: str, size: str, length: int, precision: str, materialised: bool) -> tuple[float, int]:
    """Seconds and bytes of a pass."""
    torch.manual_seed(0)
    if materialised:
        model.LONG = length
    encoder = model.create(size).to("cuda" if CUDA else "cpu").train(way != "embed")
    memory.mixed_precision(encoder, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    if way == "checkpoint":
        memory.checkpoint_layers(encoder)
    few, ids = (torch.randint(5, encoder.backbone.config.vocab_size, shape, device="cuda" if CUDA else "cpu")
                for shape in [(1, 8), (max(1, TOKENS // length), length)])
    seconds(encoder, few, way != "embed")  # what a first call loads; the gradients are there from now on
    before = held(peak=False)
    took = [seconds(encoder, ids, way != "embed") for _ in range(2)]
    return took[1], held(peak=True) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=model.SIZES, default="small")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--materialised", action="store_true")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return print(json.dumps(measure(args.measure, args.model, *args.lengths, args.precision, args.materialised)))
    print("| T | texts |" + "".join(f" GB, {name} | s |" for name in WAYS.values()) + "\n" + "| ---: " * 8 + "|")
    for length in args.lengths:
        row = [length, max(1, TOKENS // length)]
        for way in WAYS:
            flags = ["--measure", way, "--model", args.model, "--lengths", str(length), "--precision", args.precision]
            done = subprocess.run([sys.executable, "-m", "experiments.long_texts", *flags,
                                   *["--materialised"] * args.materialised], stdout=subprocess.PIPE, check=True, text=True)
            took, size = json.loads(done.stdout)
            row += [f"{size / 1e9:.2f}", f"{took:.1f}"]
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
