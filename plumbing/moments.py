"""The optimizer's moments by parameter name, whole: a checkpoint of one ZeRO stage and number of
ranks opens with any other. (DeepSpeed's own checkpoints do not.)"""

import torch
from torch import Tensor, nn

from memory import Engine


def gather_moments(engine: Engine) -> dict[str, Tensor]:
    """{"parameter/kind": tensor}, on rank 0. Every rank calls it."""
    state = engine.optimizer.state
    if engine.stage == 0:
        return {f"{name}/{kind}": value for name, p in engine.parameters.items()
                for kind, value in state.get(p, {}).items()}
    from deepspeed.utils import safe_get_full_optimizer_state
    kinds, moments = next(iter(state.values()), {}), {}
    for name, p in engine.parameters.items():
        for kind, flat in kinds.items():
            # AdamW's step count has no dimension
            full = safe_get_full_optimizer_state(p, kind) if flat.dim() else flat
            if engine.ranks.rank == 0:
                moments[f"{name}/{kind}"] = full.to("cpu", copy=True)
    return moments


def load_moments(engine: Engine, moments: dict[str, Tensor]) -> None:
    """Puts back what `gather_moments` gave. Every rank calls it, before the first step."""
    if engine.stage > 0:
        make_moments(engine)
    for key, value in moments.items():
        name, kind = key.rsplit("/", 1)
        parameter = engine.parameters[name]
        if engine.stage == 0:
            engine.optimizer.state[parameter][kind] = value.to(parameter.device)
        elif value.dim():
            set_moment(engine, parameter, value.to(engine.ranks.device), kind)
        else:
            for state in engine.optimizer.state.values():
                state[kind].copy_(value)


def make_moments(engine: Engine) -> None:
    """All 0, by a step of a gradient of 0 that changes no weight."""
    token = torch.zeros(1, 1, dtype=torch.long, device=engine.ranks.device)
    embeddings = engine.embed([(torch.zeros(1, dtype=torch.long), token, token + 1)])
    engine.backward(torch.zeros_like(embeddings))
    engine.step(lr=0.0)


def set_moment(engine: Engine, parameter: Tensor, value: Tensor, kind: str) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state
    if engine.stage < 3:
        return safe_set_full_optimizer_state(parameter, value, kind)
    # the last rank's share is padded, which DeepSpeed's setter for whole tensors forgets
    share, ranks = parameter.ds_tensor.numel(), engine.ranks
    padding = share * ranks.world_size - value.numel()
    value = nn.functional.pad(value.flatten(), (0, padding))
    first = share * ranks.rank
    safe_set_local_optimizer_state(parameter, value[first : first + share], kind)
