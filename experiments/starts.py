"""How a run starts: what goes by before its first step, and what memory that is new to it costs.

    python -m experiments.starts --before
        in a new clone: seconds of the corpus, the tokenizer, the plan, the first evaluation
    python -m experiments.starts [--memory auto 2 ...] [--turns 3] [--steps 12]
        whole runs at each --memory in turn, relative to the first; auto: unset
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments.bench import lines_of

ROOT = Path(__file__).parents[1]
# what is printed when a part begins
PARTS = {"imports": "", "corpus, index, hold-out": "installed_docs: building",
         "tokenizer, model": "training a WordPiece", "memory plan": "tiny: ",
         "evaluation": "runs/"}


def steps_of(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


# before the first step

def before(clone: Path) -> dict[str, float]:
    """{part: seconds} of `train.py --batch-size 4096` there, to its first step."""
    command = [sys.executable, "-u", "train.py", "--stage", "2", "--batch-size", "4096",
               "--steps", "1", "--out", "runs/001"]
    process = subprocess.Popen(command, cwd=clone, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    began = {"imports": time.perf_counter()}
    for line in read_lines(process):
        for part, mark in PARTS.items():
            if mark and line.startswith(mark):
                began.setdefault(part, time.perf_counter())
        if "0/1 [" in line:  # the bar of steps
            began["first step"] = time.perf_counter()
            break
    process.kill()
    process.wait()
    return {part: began[after] - began[part] for part, after in zip(began, list(began)[1:])}


def read_lines(process: subprocess.Popen):
    """Bars end their lines with a carriage return, or not at all."""
    line = last = b""
    while byte := process.stdout.read(1):
        last, line = (line or last, b"") if byte in b"\r\n" else (last, line + byte)
        yield line.decode(errors="replace")
    raise SystemExit(f"starts: train.py ended with {process.wait()}: {last.decode()}")


# the first steps

def run(memory: str, args: argparse.Namespace, folder: Path) -> dict:
    """Of a whole run: seconds of its steps, tokens/s, and the most that it held."""
    flags = [] if memory == "auto" else ["--memory", memory]
    out = folder / "run"
    flags += ["--stage", 2, "--batch-size", args.batch_size, "--steps", args.steps, "--save-every",
              args.steps, "--eval-every", args.steps, "--out", out]
    done = subprocess.run([sys.executable, "-c", CHILD, *map(str, flags)], cwd=ROOT,
                          stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"starts: train.py ended with {done.returncode}")
    steps = steps_of(out)
    rates = [step["tokens"] / step["seconds"] for step in steps]
    return {"all": sum(step["seconds"] for step in steps), "first": rates[0],
            "later": statistics.median(rates[1:]), "peak": float(done.stdout.split()[-1])}


CHILD = """
import sys, torch, train
from plumbing.plan import memory_held
train.main(sys.argv[1:])
print(memory_held(torch.device("cpu"), peak=True))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", action="store_true")
    parser.add_argument("--memory", nargs="+", default=["auto", "2"], help="GB, or auto")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if args.before:
            subprocess.run(["git", "clone", "-q", ROOT, folder / "clone"], check=True)
            found = before(folder / "clone")
            return print(lines_of(tuple(found), [tuple(f"{s:.0f}" for s in found.values())]))
        runs = {memory: [] for memory in args.memory}
        for turn in range(args.turns):
            for memory in args.memory:
                part = folder / f"{memory}-{turn}"
                part.mkdir()
                runs[memory].append(run(memory, args, part))
    first, rows = runs[args.memory[0]], []
    for memory, found in runs.items():
        ratio = statistics.median(one["all"] / other["all"] for one, other in zip(found, first))
        later = statistics.median(one["later"] / other["later"] for one, other in zip(found, first))
        share = statistics.median(one["first"] / one["later"] for one in found)
        rows.append((memory, f"{ratio:.2f}", f"{later:.2f}", f"{share:.0%}",
                     f"{max(one['peak'] for one in found) / 1e9:.1f}"))
    print(lines_of(("--memory", f"time of {args.steps} steps", "tokens/s of a later step",
                    "the first step's, of that", "GB"), rows))


if __name__ == "__main__":
    main()
