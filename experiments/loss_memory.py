"""What tiles do for the losses: time and memory, forward and backward, of losses.py's equations as
printed and in tiles.

    python -m experiments.loss_memory
    python -m experiments.loss_memory --batch-size 32768 --negatives 15 --width 768

A process per cell takes the times, the two forms in turn, and prints their medians; two further
ones take the memory: the peak less what was there before and less the gradients of the embeddings,
of the process on a CPU, of torch's allocations on a GPU. Where three times the logits would not
fit, only the tiled form runs, once.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from itertools import product
from statistics import median

import torch

import losses
from plumbing import plan

FORMS = {"printed": losses.info_nce, "tiles": losses.info_nce_tiled}
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
held = partial(plan.memory_held, DEVICE)


def embeddings(rows: int, negatives: int, width: int) -> list[torch.Tensor]:
    """q, p and, with negatives, n."""
    shapes = [(rows, width), (rows, width)]
    if negatives:
        shapes.append((rows, negatives, width))
    return [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]


def seconds(form: str, texts: list[torch.Tensor]) -> float:
    """One forward and backward pass of equation (4), or of (5) with negatives."""
    for x in texts:
        x.grad = None
    equation = losses.hard_negative_loss if len(texts) == 3 else losses.pair_loss
    start = time.perf_counter()
    loss = equation(*texts, 0.05, form=FORMS[form])
    loss.backward()
    loss.item()  # a GPU's work is done
    return time.perf_counter() - start


def measure(what: str, rows: int, negatives: int, width: int, repeats: int) -> list[float]:
    """what "time": the median of each form; "printed" or "tiles": the seconds and bytes of one pass
    of it."""
    torch.manual_seed(0)
    few, texts = embeddings(8, negatives, width), embeddings(rows, negatives, width)
    for form in FORMS:
        seconds(form, few)  # what a first call loads
    if what == "time":
        turns = [[seconds(form, texts) for form in FORMS] for _ in range(repeats)]
        return [median(times) for times in zip(*turns)]
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    before = held(peak=False)
    took = seconds(what, texts)
    return [took, held(peak=True) - before - sum(x.grad.nbytes for x in texts)]


def in_a_process(what: str, cell: tuple[int, int, int], repeats: int) -> list[float]:
    """`measure` in a process of its own."""
    rows, negatives, width = map(str, cell)
    command = [sys.executable, "-m", "experiments.loss_memory", "--measure", what,
               "--batch-size", rows, "--negatives", negatives, "--width", width,
               "--repeats", str(repeats)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def fits(rows: int, negatives: int) -> bool:
    if CUDA:
        total = torch.cuda.mem_get_info()[1]
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 3 * 4 * rows**2 * (1 + negatives) < total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[4096])
    parser.add_argument("--negatives", type=int, nargs="+", default=[0, 15])
    parser.add_argument("--width", type=int, nargs="+", default=[256, 768])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        found = measure(
            args.measure, *args.batch_size, *args.negatives, *args.width, args.repeats)
        return print(json.dumps(found))
    print("| B | N | D | s, as printed | s, in tiles | ratio | GB, as printed | GB, in tiles |")
    print("| ---: " * 8 + "|")
    for cell in product(args.batch_size, args.negatives, args.width):
        took, memory = in_a_process("tiles", cell, args.repeats)
        row = [*cell, "-", f"{took:.0f}", "-", "-", f"{memory / 1e9:.2f}"]
        if fits(*cell[:2]):
            printed, tiles = in_a_process("time", cell, args.repeats)
            _, memory_printed = in_a_process("printed", cell, args.repeats)
            row[3:7] = [f"{printed:.2f}", f"{tiles:.2f}", f"{tiles / printed:.2f}",
                        f"{memory_printed / 1e9:.2f}"]
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
