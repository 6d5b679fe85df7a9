"""What tiles do for the losses: time and memory, forward and backward, of losses.py's equations as printed and in tiles.

    python -m experiments.loss_memory
    python -m experiments.loss_memory --batch-size 32768 --negatives 15 --width 768

A process per cell takes the times, the two forms in turn, and prints their medians; two further ones take the memory. Memory
is the peak less what was there before and less the gradients of the embeddings: of the process on a CPU, of torch's
allocations on a GPU. Where three times the logits would not fit, only the tiled form runs, once.
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

FORMS = {"printed": (losses.equation_4, losses.equation_5), "tiles": (losses.pair_loss, losses.hard_negative_loss)}
CUDA = torch.cuda.is_available()
held = partial(plan.held, torch.device("cuda" if CUDA else "cpu"))


def seconds(form: str, texts: list[torch.Tensor]) -> float:
    """One forward and backward pass; equation (4) without negatives."""
    for x in texts:
        x.grad = None
    start = time.perf_counter()
    loss = FORMS[form][len(texts) - 2](*texts, 0.05)
    loss.backward()
    loss.item()  # a GPU's work is done
    return time.perf_counter() - start


def measure(what: str, batch_size: int, negatives: int, width: int, repeats: int) -> list[float]:
    """what "time": the median of each form; "printed" or "tiles": the seconds and bytes of one pass of it."""
    torch.manual_seed(0)
    few, texts = ([torch.randn(k, *rest, width, device="cuda" if CUDA else "cpu", requires_grad=True)
                   for rest in [(), (), (negatives,)][: 3 if negatives else 2]] for k in (8, batch_size))
    for form in FORMS:
        seconds(form, few)  # what a first call loads
    if what == "time":
        return [median(times) for times in zip(*([seconds(form, texts) for form in FORMS] for _ in range(repeats)))]
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    before = held(peak=False)
    took = seconds(what, texts)
    return [took, held(peak=True) - before - sum(x.grad.nbytes for x in texts)]


def fits(batch_size: int, negatives: int) -> bool:
    total = torch.cuda.mem_get_info()[1] if CUDA else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 3 * 4 * batch_size**2 * (1 + negatives) < total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[4096])
    parser.add_argument("--negatives", type=int, nargs="+", default=[0, 15])
    parser.add_argument("--width", type=int, nargs="+", default=[256, 768])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return print(json.dumps(measure(args.measure, *args.batch_size, *args.negatives, *args.width, args.repeats)))
    print("| B | N | D | s, as printed | s, in tiles | ratio | GB, as printed | GB, in tiles |\n" + "| ---: " * 8 + "|")
    for cell in product(args.batch_size, args.negatives, args.width):
        found = {}
        for what in ("time", *FORMS) if fits(*cell[:2]) else ["tiles"]:
            flags = zip(("--measure", "--batch-size", "--negatives", "--width", "--repeats"), (what, *cell, args.repeats))
            done = subprocess.run([sys.executable, "-m", "experiments.loss_memory", *(str(x) for pair in flags for x in pair)],
                                  stdout=subprocess.PIPE, check=True, text=True)
            found[what] = json.loads(done.stdout)
        printed, tiles = found.get("time", (None, found["tiles"][0]))
        row = ([f"{printed:.2f}", f"{tiles:.2f}", f"{tiles / printed:.2f}", f"{found['printed'][1] / 1e9:.2f}"] if printed else
               ["-", f"{tiles:.0f}", "-", "-"]) + [f"{found['tiles'][1] / 1e9:.2f}"]
        print("| " + " | ".join([*map(str, cell), *row]) + " |", flush=True)


if __name__ == "__main__":
    main()
