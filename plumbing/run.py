"""The folder of a run, its metrics, and how a run ends: by a signal, with an error, or with a
report."""

import argparse
import importlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

from plumbing import refusals
from plumbing.files import lock, write_whole
from plumbing.plan import out_of_memory
from plumbing.ranks import Ranks

# the folder

def numbered() -> list[str]:
    """The names of the folders runs/NNN."""
    return [path.name for path in Path("runs").glob("*") if path.name.isdigit()]


def free_run(out: str | None) -> Path:
    """`out` if nothing is there, or without it the next free runs/NNN. Raises ValueError where a
    run would be written over."""
    if not out:
        return Path("runs") / f"{max(map(int, numbered()), default=0) + 1:03d}"
    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise ValueError(f"--out {out}: is not empty; --resume goes on with a run, another --out "
                         f"begins a new one")
    return Path(out)


def begin(run: Path, first: int) -> None:
    """Makes the folder and its metrics.jsonl. Of a resumed run it cuts off the lines from step
    `first` on, for those steps are taken again, and removes what a killed process was writing.
    Holds the folder from then on, together with the other ranks (Metrics)."""
    path = run / "metrics.jsonl"
    run.mkdir(parents=True, exist_ok=True)
    try:
        path.open("x" if first == 1 else "a").close()
    except FileExistsError:
        raise FileExistsError(f"{path}: another run has begun there in the meantime; start this "
                              f"one again") from None
    lock(run)
    kept = lines_before(path, first)
    for part in [*run.glob("*.part-*"), *run.glob("checkpoints/*.part-*")]:
        shutil.rmtree(part)
    write_whole(path, b"".join(kept))
    lock(run, shared=True)


def lines_before(path: Path, first: int) -> list[bytes]:
    """The lines of steps before `first`, without one that a killed process was writing. Raises
    ValueError for another that is damaged."""
    *lines, _ = path.read_bytes().split(b"\n")
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            held_out_table([value["evaluation"]] if "evaluation" in value else [])
            if value["step"] < first:
                kept.append(line + b"\n")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{path}, line {number}: is damaged; take the line out") from None
    return kept


def event_writer(run: Path, first: int):
    """What writes TensorBoard's event files, from step `first` on anew; None where neither
    TensorBoard nor tensorboardX is installed."""
    for module in ("torch.utils.tensorboard", "tensorboardX"):
        try:
            return importlib.import_module(module).SummaryWriter(str(run), purge_step=first)
        except ImportError:
            continue
    return None


class Metrics:
    """run/metrics.jsonl, one JSON object a line, and the same numbers as event files beside it,
    where `event_writer` can; nothing where another rank writes. first: the run's next step."""

    def __init__(self, run: Path, writes: bool = True, first: int = 1):
        if run.is_dir():  # every rank: one that outlives its launcher keeps others out
            lock(run, shared=True)
        self.path = run / "metrics.jsonl"
        self.file = open(self.path if writes else os.devnull, "a", buffering=1)
        self.events = event_writer(run, first) if writes else None

    def __call__(self, **values) -> None:
        with refusals.naming(self.path):
            self.file.write(json.dumps(values) + "\n")
            if self.events:
                numbers = values.get("evaluation", {}).get("mean", values)
                for name, value in numbers.items():
                    if isinstance(value, int | float) and name != "step":
                        self.events.add_scalar(name, value, values["step"])
                self.events.flush()

    def evaluations(self) -> list[dict]:
        lines = map(json.loads, self.path.read_text().splitlines())
        return [line["evaluation"] for line in lines if "evaluation" in line]


# its end

class StopSignal:
    """SIGTERM (a cluster's preemption) and Ctrl-C ask the run to end after the step at hand. They
    may come twice, from the system and from the launcher; a Ctrl-C two seconds later ends it at
    once."""

    def __init__(self):
        self.name = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _) -> None:
        if self.name is None:
            self.name, self.since = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() > self.since + 2:
            raise KeyboardInterrupt


def held_out_table(evaluations: list[dict]) -> str:
    """Before -> after, by source and in the mean."""
    if not evaluations or not evaluations[-1]["sources"]:
        return "held-out: nothing was evaluated"
    before, after = evaluations[0], evaluations[-1]
    # a source may have come to its eval file between a run and its resumption
    unknown = dict.fromkeys(after["mean"], math.nan)
    rows = [(label(name), before["sources"].get(name, unknown), new)
            for name, new in after["sources"].items()]
    rows.append(("mean", before["mean"] or unknown, after["mean"]))
    lines = [f"{'held-out: before -> after':30}{'targets':>8}{'recall@1':>18}{'nDCG@10':>18}"]
    for name, old, new in rows:
        lines.append(f"{name:30}{new['targets']:8.0f}"
                     f"{old['recall@1']:9.3f} -> {new['recall@1']:.3f}"
                     f"{old['ndcg@10']:9.3f} -> {new['ndcg@10']:.3f}")
    return "\n".join(lines)


def label(name: str) -> str:
    """In one line; of a path of this machine the last part."""
    return " ".join((Path(name).name if Path(name).is_absolute() else name).split())


def report(run: Path, evaluations: list[dict], needs_flag: bool) -> None:
    """Prints what the run has done, and how to use it. needs_flag: its model is a JinaBERT."""
    print(f"\n{held_out_table(evaluations)}")
    path, flag = run / "model", ", trust_remote_code=True" if needs_flag else ""
    line = f"{path} opens with model.load('{path}') and SentenceTransformer('{path}'{flag})"
    if needs_flag:
        line += "; without that flag other tools build a plain BERT with random weights"
    print(line)


def report_error(error: BaseException, args: argparse.Namespace | None, ranks: Ranks) -> int:
    """Says in one line what went wrong -> the exit status: 2 for bad input or a full disk, 1 for
    what happened to the run. Raises the error again where it does not know it."""
    if isinstance(error, KeyboardInterrupt):
        ranks.complain("train.py: stopped; what checkpoints there are stay as they were")
        return 130
    if isinstance(error, (FloatingPointError, OSError, ValueError)):
        ranks.complain(f"train.py: {refusals.line_of(error)}")
        return 1 if isinstance(error, FloatingPointError) else 2
    advice = args and out_of_memory(error, args, ranks.device)
    if advice:
        print(f"train.py: {advice}", file=sys.stderr)
        return 1
    lost = ranks.lost()
    if not lost:
        raise error
    if ranks.speaks(lost):
        names = ", ".join(f"{r} on {ranks.hosts[r]}" for r in lost)
        reason = str(error).partition("\n")[0].partition(". ")[0]  # then gloo guesses
        reason = re.sub(r"^\[\S+\] ", "", reason)  # a line of its source
        print(f"train.py: lost rank {names} ({reason}); the checkpoints are as they were, and "
              f"--resume goes on from the last", file=sys.stderr, flush=True)
    ranks.linger(lost)
    return 1
