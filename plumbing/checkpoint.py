"""Checkpoints that are complete or absent, and what a resumed run finds in them.

    OUT/checkpoints/00000020/   model/ (what `model.load` opens), optimizer.safetensors (moments by
                                parameter name), random.safetensors, state.json (step, flags,
                                sampler), checksums.json (of the others)
    .../00000019.diverged/      what a run that diverged cannot go on from

Nothing here knows what is trained.
"""

import argparse
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from memory import LossScale
from plumbing.files import check_seal, lock, publish, read_json
from plumbing.moments import gather_moments, load_moments
from plumbing.ranks import Ranks
from plumbing.run import numbered

KEEP = 2  # the newest, and one more in case a disk lets the newest down


def save(run: Path, state: dict, write_model: Callable[[Path], None], engine, ranks: Ranks) -> None:
    """Writes run/checkpoints/STEP and removes all but the newest KEEP. state: JSON-able, with
    "step". engine: memory.py's. Every rank calls it; rank 0 writes. Raises FloatingPointError where
    a weight or a moment is not finite: nobody can go on from that."""
    moments, random_states = gather_moments(engine), ranks.gather_objects(torch.get_rng_state())
    with engine.whole():
        weights = dict(engine.encoder.named_parameters())
        ranks.on_rank_0(lambda: check_finite(run, state["step"], weights | moments))
        ranks.on_rank_0(lambda: write(run, state, write_model, moments, random_states))


def check_finite(run: Path, step: int, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.numel() and not torch.isfinite(torch.stack(tensor.aminmax())).all():
            raise FloatingPointError(f"step {step}: {name} is not finite; {set_aside(run, step)}")


def set_aside(run: Path, since: int) -> str:
    """Renames the checkpoints from step `since` on to STEP.diverged: the same weights and batches
    would give the same again, whatever the --lr. -> how to go on."""
    aside = [path for path in complete(run) if int(path.name) >= since]
    for path in aside:
        shutil.rmtree(path.with_suffix(".diverged"), ignore_errors=True)
        path.rename(path.with_suffix(".diverged"))
    said = f"{aside[0]} is now {aside[0].name}.diverged; " if aside else ""
    if found := complete(run):
        return (f"{said}--resume --out {run} with a lower --lr goes on from step "
                f"{int(found[-1].name)}")
    return f"{said}no checkpoint is left; begin with a lower --lr and another --out"


def write(run: Path, state: dict, write_model: Callable[[Path], None], moments: dict[str, Tensor],
          random_states: Sequence[Tensor]) -> None:
    """moments: the optimizer's state by "parameter/kind"; random_states: of every rank."""

    def fill(part: Path) -> None:
        write_model(part / "model")
        moments_in_order = {name: tensor.contiguous() for name, tensor in moments.items()}
        save_file(moments_in_order, part / "optimizer.safetensors")
        by_rank = {str(rank): tensor for rank, tensor in enumerate(random_states)}
        save_file(by_rank, part / "random.safetensors")
        (part / "state.json").write_text(json.dumps(state))

    publish(run / "checkpoints" / f"{state['step']:08d}", fill, sealed=True)
    for old in complete(run)[:-KEEP]:
        shutil.rmtree(old)


def complete(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in paths if path.name.isdigit())


class Checkpoint(NamedTuple):
    run: Path
    path: Path
    state: dict

    def flags(self) -> dict:
        """The run's flags, with the manifest and the tokens of a pass that were chosen where the
        flags left them open."""
        return self.state["args"] | self.state["chosen"]

    def check_flags(self, args: argparse.Namespace) -> None:
        """Raises ValueError where these flags cannot go on with the run."""
        then = self.state["args"]
        if self.state["step"] >= args.steps and (self.run / "model").is_dir():
            raise ValueError(
                f"--resume: {self.run} is finished with {self.state['step']} steps; a higher "
                f"--steps goes on from there, with the learning rate of the longer schedule")
        if (args.model, args.stage) != (then.get("model"), then.get("stage")):
            raise ValueError(
                f"--resume: {self.run} has another --model or --stage; --model "
                f"{self.run / 'model'} without --resume begins a new run with its model")


def newest(out: str | None, parser: argparse.ArgumentParser | None = None) -> Checkpoint:
    """The newest checkpoint of the run `out`, or without it of the newest runs/NNN, which is this
    process's alone from then on. Raises FileNotFoundError where there is none, OSError where
    another process is at work, ValueError where it is damaged: to go on from an older one is for
    the user to decide. parser: of the run's flags."""
    run = Path(out or Path("runs", max(numbered(), key=int, default="")))
    if not complete(run):
        raise FileNotFoundError(f"--resume: {run} holds no complete checkpoint; --out says which "
                                f"run is meant, and without --resume a new one begins")
    lock(run)
    *older, path = complete(run)
    then = f"--resume goes on from {older[-1].name}" if older else "begin anew with another --out"
    try:
        check_seal(path)
        state = read_json(path / "state.json") or {}
    except ValueError as error:
        raise ValueError(f"{error}; remove {path}, and {then}") from None
    if wrong := damage(state, int(path.name), parser):
        raise ValueError(f"{path / 'state.json'}: {wrong} is missing, or not what this version "
                         f"writes; go on with the version that wrote it, or put an edited file "
                         f"back")
    return Checkpoint(run, path, state)


def damage(state: dict, step: int, parser: argparse.ArgumentParser | None) -> str | None:
    """The first name whose value `save` cannot have written, or None. ("sampler" is data.py's.)"""
    for name in ("args", "chosen", "loss_scale", "sampler"):
        if not isinstance(state.get(name), dict):
            return name
    if not state.get("step") == state["sampler"].get("step") == step:
        return "step"
    like = vars(LossScale(torch.float32))
    for name, value in state["loss_scale"].items():
        if type(value) is not type(like.get(name)) or not 0 <= value < math.inf:
            return name
    if not parser:
        return None
    actions = {action.dest: action for action in parser._actions}
    for name, value in (state["args"] | state["chosen"]).items():
        if not (action := actions.get(name)):
            return name
        try:
            kind = bool if action.nargs == 0 else action.type or str
            if value != action.default and value not in (action.choices or [kind(str(value))]):
                return name
        except ValueError:  # not of its type
            return name
    return None


def restore(checkpoint: Checkpoint, engine, precision: str, ranks: Ranks) -> None:
    """Puts back the optimizer's moments, the loss scale and this rank's random state. (The weights
    come with `model.load`, the batches with their own `load_state_dict`.)"""
    moments, random_states = read(checkpoint.path)
    load_moments(engine, moments)
    if precision == checkpoint.state["args"].get("precision"):
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
    except SafetensorError as error:  # rank 0 has checked the files, as its host sees them
        raise ValueError(f"{path}: does not open ({error})") from None
    return moments, [random_states[rank] for rank in sorted(random_states, key=int)]
