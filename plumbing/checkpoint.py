"""A run that can stop: checkpoints that are complete or absent, the newest found by itself, signals that end a run cleanly.

    OUT/checkpoints/00000020/   model/ (what `model.load` opens), optimizer.safetensors (moments by parameter name),
                                random.safetensors, state.json (step, sampler, and the size of every file)

A checkpoint is written under another name and renamed when everything is on disk: after a crash it is there whole or not
at all. Nothing here knows what is trained.
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from plumbing.files import publish

KEEP = 2  # the newest, and one more in case a disk lets the newest down


def save(run: Path, state: dict, write_model: Callable[[Path], None], moments: dict[str, Tensor],
         random_states: Sequence[Tensor]) -> None:
    """Writes run/checkpoints/STEP and removes all but the newest KEEP. state: JSON-able, with "step"; moments: the optimizer's
    state by "parameter/kind"; random_states: of every rank."""

    def write(part: Path) -> None:
        write_model(part / "model")
        save_file({name: tensor.contiguous() for name, tensor in moments.items()}, part / "optimizer.safetensors")
        save_file({str(rank): tensor for rank, tensor in enumerate(random_states)}, part / "random.safetensors")
        sizes = {str(path.relative_to(part)): path.stat().st_size for path in part.rglob("*") if path.is_file()}
        (part / "state.json").write_text(json.dumps(state | {"files": sizes}))

    publish(run / "checkpoints" / f"{state['step']:08d}", write)
    for old in complete(run)[:-KEEP] + list((run / "checkpoints").glob("*.part-*")):  # the latter: killed while writing
        shutil.rmtree(old)


def complete(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("*") if path.name.isdigit())


def numbered() -> list[str]:
    """The names of the folders runs/NNN."""
    return [path.name for path in Path("runs").glob("*") if path.name.isdigit()]


def free_run(out: str | None) -> Path:
    """`out` if nothing is there, or without it the next free runs/NNN. Raises ValueError where a run would be written over."""
    if not out:
        return Path("runs") / f"{max(map(int, numbered()), default=0) + 1:03d}"
    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise ValueError(f"--out {out}: is not empty; --resume goes on with a run, another --out begins a new one")
    return Path(out)


class Checkpoint(NamedTuple):
    run: Path
    path: Path
    state: dict


def newest(out: str | None) -> Checkpoint:
    """The newest checkpoint of the run `out`, or without it of the newest runs/NNN. Raises FileNotFoundError where there is
    none, ValueError where it is damaged: to go on from an older one is for the user to decide."""
    run = Path(out or Path("runs", max(numbered(), key=int, default="")))
    found = complete(run)
    if not found:
        raise FileNotFoundError(f"--resume: {run} holds no complete checkpoint; --out says which run is meant, and without "
                                f"--resume a new one begins")
    path, advice = found[-1], "remove that folder to go on from the checkpoint before it"
    try:
        state = json.loads((path / "state.json").read_text())
        files = state["files"].items()
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / 'state.json'}: does not open ({error}); {advice}") from None
    for name, size in files:
        there = (path / name).stat().st_size if (path / name).is_file() else 0
        if there != size:
            raise ValueError(f"{path / name}: truncated, {there} of {size} bytes; {advice}")
    return Checkpoint(run, path, state)


def restore(path: Path) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The optimizer's moments and every rank's random state. (The weights come with `model.load(path / "model")`.)"""
    try:
        moments, random = load_file(path / "optimizer.safetensors"), load_file(path / "random.safetensors")
        return moments, [random[rank] for rank in sorted(random, key=int)]
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: does not open ({error})") from None


class StopSignal:
    """SIGTERM (a cluster's preemption) and Ctrl-C ask the run to end after the step at hand. They may come twice, from the
    system and from the launcher; a Ctrl-C two seconds later ends the run at once."""

    def __init__(self):
        self.name = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _) -> None:
        if self.name is None:
            self.name, self.since = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() > self.since + 2:
            raise KeyboardInterrupt


def begin_metrics(run: Path, first: int) -> None:
    """Makes run/metrics.jsonl, or cuts off its lines from step `first` on: a resumed run takes those steps again."""
    path = run / "metrics.jsonl"
    run.mkdir(parents=True, exist_ok=True)
    try:
        path.open("x" if first == 1 else "a").close()
    except FileExistsError:
        raise FileExistsError(f"{path}: another run has begun there in the meantime; start this one again") from None
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] < first]
    for part in [*run.glob("*.part-*"), *run.glob("checkpoints/*.part-*")]:  # what a killed process was writing
        shutil.rmtree(part)
    part = path.with_suffix(".part")
    part.write_text("".join(kept))
    os.replace(part, path)


class Metrics:
    """run/metrics.jsonl, one JSON object a line; nothing is written where another rank writes."""

    def __init__(self, run: Path, writes: bool = True):
        self.path = run / "metrics.jsonl"
        self.file = open(self.path if writes else os.devnull, "a", buffering=1)

    def __call__(self, **values) -> None:
        self.file.write(json.dumps(values) + "\n")

    def evaluations(self) -> list[dict]:
        return [line["evaluation"] for line in map(json.loads, self.path.read_text().splitlines()) if "evaluation" in line]
