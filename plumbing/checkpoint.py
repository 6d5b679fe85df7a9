"""Checkpoints that are complete or absent, and what a resumed run finds in them.

    OUT/checkpoints/00000020/   model/ (what `model.load` opens), optimizer.safetensors (moments by
                                parameter name), random.safetensors, state.json (step, flags,
                                sampler, and the size of every file)

Nothing here knows what is trained.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from plumbing.files import publish
from plumbing.moments import gather_moments, load_moments
from plumbing.ranks import Ranks
from plumbing.run import numbered

KEEP = 2  # the newest, and one more in case a disk lets the newest down


def save(run: Path, state: dict, write_model: Callable[[Path], None], engine, ranks: Ranks) -> None:
    """Writes run/checkpoints/STEP and removes all but the newest KEEP. state: JSON-able, with
    "step". engine: memory.py's. Every rank calls it; rank 0 writes."""
    moments, random_states = gather_moments(engine), ranks.gather_objects(torch.get_rng_state())
    with engine.whole():
        ranks.on_rank_0(lambda: write(run, state, write_model, moments, random_states))


def write(run: Path, state: dict, write_model: Callable[[Path], None], moments: dict[str, Tensor],
          random_states: Sequence[Tensor]) -> None:
    """moments: the optimizer's state by "parameter/kind"; random_states: of every rank."""

    def fill(part: Path) -> None:
        write_model(part / "model")
        moments_in_order = {name: tensor.contiguous() for name, tensor in moments.items()}
        save_file(moments_in_order, part / "optimizer.safetensors")
        by_rank = {str(rank): tensor for rank, tensor in enumerate(random_states)}
        save_file(by_rank, part / "random.safetensors")
        files = [path for path in part.rglob("*") if path.is_file()]
        sizes = {str(path.relative_to(part)): path.stat().st_size for path in files}
        (part / "state.json").write_text(json.dumps(state | {"files": sizes}))

    publish(run / "checkpoints" / f"{state['step']:08d}", fill)
    killed_while_writing = list((run / "checkpoints").glob("*.part-*"))
    for old in complete(run)[:-KEEP] + killed_while_writing:
        shutil.rmtree(old)


def complete(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("*") if path.name.isdigit())


class Checkpoint(NamedTuple):
    run: Path
    path: Path
    state: dict

    def flags(self) -> dict:
        """The run's flags, with the manifest and the tokens of a pass that were chosen where the
        flags left them open. (Earlier versions saved these among "args", and no "chosen".)"""
        return self.state["args"] | self.state.get("chosen", {})

    def check_flags(self, args: argparse.Namespace) -> None:
        """Raises ValueError where these flags cannot go on with the run."""
        then = self.state["args"]
        if self.state["step"] >= args.steps and (self.run / "model").is_dir():
            raise ValueError(
                f"--resume: {self.run} is finished with {self.state['step']} steps; a higher "
                f"--steps goes on from there, with the learning rate of the longer schedule")
        if (args.model, args.stage) != (then["model"], then["stage"]):
            raise ValueError(
                f"--resume: {self.run} has another --model or --stage; --model "
                f"{self.run / 'model'} without --resume begins a new run with its model")


def newest(out: str | None) -> Checkpoint:
    """The newest checkpoint of the run `out`, or without it of the newest runs/NNN. Raises
    FileNotFoundError where there is none, ValueError where it is damaged: to go on from an older
    one is for the user to decide."""
    run = Path(out or Path("runs", max(numbered(), key=int, default="")))
    found = complete(run)
    if not found:
        raise FileNotFoundError(f"--resume: {run} holds no complete checkpoint; --out says which "
                                f"run is meant, and without --resume a new one begins")
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


def restore(checkpoint: Checkpoint, engine, precision: str, ranks: Ranks) -> None:
    """Puts back the optimizer's moments, the loss scale and this rank's random state. (The weights
    come with `model.load`, the batches with their own `load_state_dict`.)"""
    moments, random_states = read(checkpoint.path)
    load_moments(engine, moments)
    if precision == checkpoint.state["args"]["precision"]:
        vars(engine.scaling).update(checkpoint.state["loss_scale"])
    if len(random_states) == ranks.world_size:
        torch.set_rng_state(random_states[ranks.rank])
    else:
        ranks.print_rank0(f"{checkpoint.run} had {len(random_states)} ranks, now "
                          f"{ranks.world_size}: all goes on but the dropout masks")


def read(path: Path) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The optimizer's moments and every rank's random state."""
    try:
        moments = load_file(path / "optimizer.safetensors")
        random_states = load_file(path / "random.safetensors")
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: does not open ({error})") from None
    return moments, [random_states[rank] for rank in sorted(random_states, key=int)]
