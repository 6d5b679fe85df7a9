"""What a long text costs: memory and time of one micro-batch, by the length of its texts.

    python -m experiments.long_texts
    python -m experiments.long_texts --model base --lengths 8192 --precision bf16
    python -m experiments.long_texts --lengths 2048 4096 --materialised

A micro-batch has max(8,192, T) tokens, in texts of T tokens without padding: forward and backward,
with and without checkpointed layers (§5.3), and embedding alone. A process per cell takes two
passes: the seconds are those of the second, the memory is the peak less what was there before,
weights and gradients: of the process on a CPU, of torch's allocations on a GPU. --materialised
makes the attention bias a B x H x T x T tensor at every length, as up to model.LONG tokens.
"""

import argparse
import json
import subprocess
import sys
import time

import torch

import memory
import model
from experiments.loss_memory import CUDA, DEVICE, held

WAYS = {"train": "training", "checkpoint": "checkpointed layers", "embed": "embedding"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
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


def measure(way: str, size: str, length: int, precision: str, materialised: bool
            ) -> tuple[float, int]:
    """Seconds and bytes of a pass."""
    torch.manual_seed(0)
    if materialised:
        model.LONG = length
    train = way != "embed"
    encoder = model.create(size).to(DEVICE).train(train)
    memory.mixed_precision(encoder, DTYPES[precision])
    if way == "checkpoint":
        memory.checkpoint_layers(encoder)
    vocabulary = encoder.backbone.config.vocab_size
    few = torch.randint(5, vocabulary, (1, 8), device=DEVICE)
    ids = torch.randint(5, vocabulary, (max(1, TOKENS // length), length), device=DEVICE)
    seconds(encoder, few, train)  # what a first call loads; from now on the gradients are there
    before = held(peak=False)
    seconds(encoder, ids, train)
    took = seconds(encoder, ids, train)
    return took, held(peak=True) - before


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=model.SIZES, default="small")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--materialised", action="store_true")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        found = measure(args.measure, args.model, *args.lengths, args.precision, args.materialised)
        return print(json.dumps(found))
    print("| T | texts |" + "".join(f" GB, {name} | s |" for name in WAYS.values()))
    print("| ---: " * 8 + "|")
    for length in args.lengths:
        row = [length, max(1, TOKENS // length)]
        for way in WAYS:
            command = [sys.executable, "-m", "experiments.long_texts", "--measure", way, "--model",
                       args.model, "--lengths", str(length), "--precision", args.precision]
            if args.materialised:
                command.append("--materialised")
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            took, size = json.loads(done.stdout)
            row += [f"{size / 1e9:.2f}", f"{took:.1f}"]
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
