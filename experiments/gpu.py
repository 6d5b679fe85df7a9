"""On one GPU: is it right, is it fast, is it small?

    python -m experiments.gpu --cut texts.jsonl.gz      where the default corpus is
    python -m experiments.gpu --texts texts.jsonl.gz --out runs/gpu
    python -m experiments.gpu --texts texts.jsonl.gz --out runs/gpu --only fast --minutes 4
    python -m experiments.gpu --dry --out runs/gpu-dry  on a CPU, at toy sizes: does it run at all?

right: --check in every precision, skipped steps, the law's cells of one process, dropout in two
passes and under checkpoints, a resumed run, flex_attention beside the masked branch (gpu_right.py).
fast: beside sentence-transformers, and what makes it so; small: peak memory (gpu_speed.py).

A cell's result is one line of OUT/PART.jsonl as soon as it is known, a failed one's too. A cell
that is there is not run again (`--again`: but failed ones are), so a killed run goes on; the cell
in which it was killed then comes last. Cells come in the order of what they tell; after --minutes
none is begun (with 0 the tables are printed and that is all). Exit status 1 if a cell has failed.
DeepSpeed and a network are not needed.
"""

import argparse
import gc
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from experiments import gpu_right, gpu_speed
from experiments.bench import lines_of
from experiments.gpu_lab import Lab, cut, folder_of
from corpora import installed_docs

PARTS = {"right": gpu_right.cells, "fast": gpu_speed.fast, "small": gpu_speed.small}
LIMIT = 150  # seconds of a cell


def card() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}"


# a cell

def out_of_time(*_) -> None:
    raise TimeoutError(f"more than {LIMIT} s")


def measure(call: Callable[[], dict]) -> dict:
    """What a cell found, with a status: ok, fail, or no room (memory ran out where it may)."""
    signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(LIMIT)
    began = time.perf_counter()
    try:
        found = call()
        found["status"] = "fail" if found.get("wrong") else found.get("status", "ok")
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # SystemExit too
        traceback.print_exc()
        lines = [line for line in str(error).splitlines() if line.strip()]
        found = {"status": "fail", "wrong": f"{type(error).__name__}: {lines[-1] if lines else ''}",
                 "error": str(error)[:2000]}
    finally:
        signal.alarm(0)
    return {**found, "took": round(time.perf_counter() - began, 2)}


def clean() -> bool:
    """Frees what a cell left -> whether the GPU still works."""
    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        except RuntimeError as error:
            print(f"the GPU is lost to this process: {error}", file=sys.stderr)
            return False
    return True


# a part

def read(path: Path) -> dict[str, dict]:
    """The last line of every cell; a line that a killed process has not finished is none."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return {line["cell"]: line for line in found}


def run(part: str, lab: Lab, args: argparse.Namespace) -> bool:
    """-> whether no cell failed, now or before."""
    path, left = args.out / f"{part}.jsonl", []
    there = read(path)
    if args.again:
        there = {name: line for name, line in there.items() if line["status"] != "fail"}
    lab.results = there
    begun = args.out / "begun"
    died_in = begun.read_text() if begun.exists() else ""
    cells = PARTS[part](lab)
    for name in sorted(cells, key=lambda cell: cell == died_in):
        if name in there or args.cells not in name:
            continue
        if time.time() > args.began + 60 * args.minutes:
            left.append(name)
            continue
        print(f"\n=== {part}: {name}", flush=True)
        begun.write_text(name)
        found = {"cell": name, **measure(cells[name]), "card": card()}
        with path.open("a") as file:
            file.write(json.dumps(found) + "\n")
            file.flush()
            os.fsync(file.fileno())
        there[name] = found
        print(f"=== {found['status']}, {found['took']} s: {found.get('wrong') or found['says']}",
              flush=True)
        del found
        if not clean():  # a new process goes on behind this cell
            again = [arg for arg in sys.argv[1:] if arg != "--again"]
            os.execv(sys.executable, [sys.executable, "-m", "experiments.gpu", *again,
                                      "--began", str(args.began)])
    begun.unlink(missing_ok=True)
    report(part, list(there.values()), left)
    if not lab.cuda and args.minutes > 0:
        modules = {"right": gpu_right, "fast": gpu_speed, "small": gpu_speed}
        print(f"no GPU, so not run: {'; '.join(modules[part].GPU_ONLY)}", flush=True)
    return all(line["status"] != "fail" for line in there.values())


def report(part: str, lines: list[dict], left: list[str]) -> None:
    print(f"\n## {part}: {lines[-1]['card'] if lines else card()}\n")
    if part == "fast":
        print(gpu_speed.table(lines), end="\n\n")
    rows = [(line["cell"], line["status"], line["took"], line.get("wrong") or line["says"])
            for line in lines]
    print(lines_of(("cell", "", "s", "found"), rows))
    for name in left:
        print(f"not run: {name}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", choices=PARTS, nargs="+", default=list(PARTS))
    add("--out", type=Path, default=Path("runs/gpu"))
    add("--texts", type=Path, help="of --cut; unset: cut now from the default corpus")
    add("--cut", type=Path, metavar="FILE", help="write the texts, .jsonl.gz, and end")
    add("--dry", action="store_true", help="toy sizes")
    add("--minutes", type=float, default=9, help="after which no cell is begun")
    add("--again", action="store_true", help="run failed cells again")
    add("--cells", default="", metavar="TEXT", help="only those with this in their names")
    add("--began", type=float, default=time.time(), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cut:
        return cut(args.cut)
    if not torch.cuda.is_available() and not args.dry and args.minutes > 0:
        parser.error("there is no GPU here; --dry tries the code without one")
    if args.dry:
        torch.set_num_threads(1)  # the toys are too small for more
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.texts:
        built = Path(installed_docs.build())
        args.texts = built.parent / "gpu-texts.jsonl.gz"
        if not args.texts.exists():
            cut(args.texts)
    lab = Lab(args.texts, folder_of(args.texts, args.dry, Path(tempfile.gettempdir())), args.dry)
    good = [run(part, lab, args) for part in args.only]
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
