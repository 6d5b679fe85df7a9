"""Large batches in little memory (§5.3): mixed precision, an activation checkpoint after each layer, the two-pass batch,
and DeepSpeed ZeRO on many ranks.

Nothing here knows what an embedding means or which loss is taken of it. Take these calls out of train.py, embed the whole
batch at once, and the same update comes out, but for rounding, in far more memory.

The two-pass batch (ours; the paper only says that the loss wants the largest batch that fits). The loss couples every text
of a batch with every other one, so a batch cannot be cut into independent pieces as in gradient accumulation. But given
the embeddings E = f(texts; theta), the chain rule splits dL/dtheta at E (Gao et al. 2021, GradCache):

    pass 1   E_c = f(texts_c; theta) for every micro-batch c                         memory: the embeddings, and the graphs
                                                                                     of the last micro-batches, if there is room
    loss     L(E), G = dL/dE                                                         memory: that, and the loss
    pass 2   for every c, the last first: back-propagate <E_c, G_c>; where no graph  memory: the kept graphs, which shrink, then
             was kept, embed again before                                            one micro-batch's graph

    dL/dtheta = sum_c (dE_c/dtheta)^T G_c = sum_c d<E_c, G_c>/dtheta  with G_c held constant: exact, no factor anywhere.

It costs one more forward pass of the micro-batches whose graph was not kept. Both passes must see the same dropout masks, so
each micro-batch has a seed of its own.

Ranks (the paper only names DeepSpeed). Rank r of W embeds its own rows and takes the mean loss L_r over them, against the
gathered columns of all ranks; the loss of the global batch is L = (1/W) sum_r L_r. `Ranks.gather` hands every rank's
gradient of a column back to the rank that embedded it, summed, so that G on a rank is d(sum_r L_r)/dE. DeepSpeed averages
the parameters' gradients over ranks: (1/W) sum_r (dE_r/dtheta)^T G_r = dL/dtheta. No other factor of W belongs anywhere.
"""

import contextlib
import io
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data import MicroBatch
from plumbing import allocator
from plumbing.ranks import Ranks


def choose_precision(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """`auto`, `fp32`, `bf16` or `fp16` -> the dtype of matrix products, and why, in a few words. Paper: mixed precision.
    Raises ValueError for fp16 on a CPU."""
    if name == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16: needs a GPU; a CPU takes bf16 or fp32")
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name], "as asked for"
    if device.type == "cuda":
        fast, unit = torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_name(device)
    else:
        units = [u for u in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16") if torch.cpu.get_capabilities().get(u)]
        fast, unit = bool(units), f"this CPU ({units[0] if units else 'without bf16 units'})"
    return (torch.bfloat16, f"{unit} multiplies bf16 fast") if fast else (torch.float32, f"{unit}: bf16 would gain nothing")


class LossScale:
    """The factor S on the gradients inside an encoder in fp16, whose smallest number, 6e-8, they would fall below; 1 in other
    precisions. Dynamic as torch's GradScaler: from 2^16 on, halved after an overflow, doubled after 2,000 steps without."""

    def __init__(self, dtype: torch.dtype):
        self.scale, self.good_steps, self.skipped = 2.0**16 if dtype == torch.float16 else 1.0, 0, 0

    def survives(self, grad_norm: float) -> bool:
        """Whether a step with this gradient norm may be taken. If not, the scale is lowered, where there is one to lower."""
        if not math.isfinite(grad_norm):
            self.skipped, self.scale, self.good_steps = self.skipped + 1, self.scale / 2, 0
            return False
        self.good_steps += 1
        if self.scale > 1 and self.good_steps % 2000 == 0:
            self.scale *= 2
        return True


def mixed_precision(encoder: nn.Module, dtype: torch.dtype) -> LossScale:
    """Matrix products inside `encoder` in `dtype`; parameters, gradients and optimizer stay fp32. A BERT's attention in bf16
    on a CPU becomes transformers' plain one.

    Autocast is entered inside the encoder's own forward, so that whatever wraps the encoder later cannot switch it off. In
    fp16 the gradient is multiplied by S where it enters the encoder and divided by S where it reaches a parameter: the
    loss, the cached gradients, clipping and the optimizer see no scale.
    """
    forward, scaling, device = encoder.forward, LossScale(dtype), next(encoder.parameters()).device
    config = getattr(getattr(encoder, "backbone", None), "config", None)
    if dtype == torch.bfloat16 and device.type == "cpu" and getattr(config, "_attn_implementation", None) == "sdpa" \
            and config.max_position_embeddings <= 1024:  # T x T logits that are small enough to be made
        # The fused kernel's bf16 backward is slow there: MiniLM takes 619 ms for 32 x 128 tokens with it, 343 without (AMX).
        encoder.backbone.set_attn_implementation("eager")

    def autocast_forward(*inputs: Tensor) -> Tensor:
        with torch.autocast(inputs[0].device.type, dtype=dtype, enabled=dtype != torch.float32):
            embeddings = forward(*inputs)
        if dtype == torch.float16 and embeddings.requires_grad:
            embeddings.register_hook(lambda gradient: gradient * scaling.scale)
        return embeddings

    encoder.forward = autocast_forward
    if dtype == torch.float16:
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: gradient / scaling.scale)
    return scaling


def checkpoint_layers(model: nn.Module) -> None:
    """§5.3: an activation checkpoint after each BERT layer, so that only the layers' inputs are kept for the backward pass
    and the rest is computed again: one more forward, activations of one layer instead of all.

    model: a transformers model with a list of `config.num_hidden_layers` layers (BERT, MiniLM, JinaBERT, ...), or a module
    with such a `backbone`. Raises ValueError where there is no such list.
    """
    backbone = getattr(model, "backbone", model)
    layers = backbone.config.num_hidden_layers
    lists = [m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    if not lists:
        raise ValueError(f"--checkpoint-layers: {type(backbone).__name__} has no list of its {layers} layers")
    for layer in lists[0]:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=True)


def equalise(micro_batches: Sequence[MicroBatch], count: int) -> list[MicroBatch]:
    """`count` micro-batches, by halving the largest: every pass is a collective under ZeRO-2 and 3, so that a rank with fewer
    than another would leave it waiting."""
    micro_batches = list(micro_batches)
    while len(micro_batches) < count:
        c = max(range(len(micro_batches)), key=lambda c: len(micro_batches[c].index))
        half = len(micro_batches[c].index) // 2
        micro_batches[c : c + 1] = [MicroBatch(*(x[part] for x in micro_batches[c]))
                                    for part in (slice(half), slice(half, None))]
    return micro_batches


def backward(encoder: nn.Module, micro_batches: Sequence[MicroBatch], loss_of: Callable[[Tensor], tuple],
             back: Callable[[Tensor, bool], None] = lambda scalar, last: scalar.backward(), keep: int = 1,
             tidy: Callable[[], None] = lambda: None) -> tuple:
    """Adds dL/dtheta to the parameters' .grad, where (L, ...) = loss_of(embeddings of all texts of the step).

    encoder: (input_ids, attention_mask) -> (b, D). loss_of: (M, D), in the order of the texts -> a scalar, and whatever
    else is wanted of the embeddings. back(scalar, last) back-propagates into the parameters. keep: of how many micro-batches,
    the last ones, the graph of pass 1 is kept. tidy() is called where much lies freed.
    -> what loss_of gave, L detached.
    """
    device = next(encoder.parameters()).device
    inputs = [(index.to(device), input_ids.to(device), mask.to(device)) for index, input_ids, mask in micro_batches]
    seeds = torch.randint(1 << 62, (len(inputs),)).tolist()  # a micro-batch's dropout is the same in both passes
    after, embeddings, graphs = torch.get_rng_state(), None, []
    for c, (index, *micro_batch) in enumerate(inputs):
        torch.manual_seed(seeds[c])
        with torch.set_grad_enabled(c >= len(inputs) - keep):
            part = encoder(*micro_batch)
        if embeddings is None:  # in one piece: many small ones would lie scattered over what the passes have freed
            embeddings = torch.empty(sum(len(x[0]) for x in inputs), part.shape[1], device=device)
        embeddings[index] = part.detach().float()
        graphs.append(part if part.requires_grad else None)
        del part

    if keep < len(inputs):
        allocator.give_back_freed_memory()  # also where it is kept for the passes: the loss wants other sizes
    loss, *more = loss_of(embeddings.requires_grad_())
    loss.backward()  # fills embeddings.grad, the cached gradient G, in fp32
    tidy()

    for c, (index, *micro_batch) in reversed([*enumerate(inputs)]):  # whatever was kept, the sum is the same to the last bit
        part = graphs.pop()
        if part is None:
            torch.manual_seed(seeds[c])
            part = encoder(*micro_batch)
        back((part * embeddings.grad[index]).sum(), c == 0)
        del part
        tidy()
    torch.set_rng_state(after)
    return loss.detach(), *more


# optimizer steps

class OneProcess:
    """Plain torch in one process."""

    def __init__(self, encoder: nn.Module, optimizer: torch.optim.Optimizer, clip: float, scaling: LossScale,
                 kept: Callable[[Sequence[MicroBatch]], int] = lambda micro_batches: 1,
                 tidy: Callable[[], None] = lambda: None):
        self.model, self.encoder, self.optimizer, self.clip, self.scaling = encoder, encoder, optimizer, clip, scaling
        self.kept, self.tidy = kept, tidy  # of how many micro-batches the graph is kept; see `backward`
        self.parameters = {name: p for name, p in encoder.named_parameters() if p.requires_grad}

    def __str__(self) -> str:
        return "one process"

    def backward(self, micro_batches: Sequence[MicroBatch], loss_of: Callable[[Tensor], tuple]) -> tuple:
        return backward(self.model, micro_batches, loss_of, keep=self.kept(micro_batches), tidy=self.tidy)

    def step(self, lr: float) -> float:
        """One optimizer step, if the gradient is finite -> the gradient's norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.clip or math.inf).item()
        self.optimizer.param_groups[0]["lr"] = lr
        if self.scaling.survives(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # sparse gradients need a dense one to be added to
        return norm

    def whole(self) -> contextlib.AbstractContextManager:
        """Inside, the encoder's parameters are whole on every rank."""
        return contextlib.nullcontext()

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's state as {"parameter/kind": tensor}, on rank 0."""
        return {f"{name}/{kind}": value for name, p in self.parameters.items()
                for kind, value in self.optimizer.state.get(p, {}).items()}

    def load_moments(self, moments: dict[str, Tensor]) -> None:
        for key, value in moments.items():
            name, kind = key.rsplit("/", 1)
            self.optimizer.state[self.parameters[name]][kind] = value.to(self.parameters[name].device)


class Zero(OneProcess):
    """DeepSpeed with ZeRO (Rajbhandari et al. 2020) on any number of ranks: stage 1 shards the optimizer's moments, 2 the
    gradients too, 3 the parameters too. Same verbs as OneProcess; every call is a collective."""

    def __init__(self, encoder: nn.Module, optimizer: torch.optim.Optimizer, clip: float, scaling: LossScale, ranks: Ranks,
                 config: dict, **passes):
        super().__init__(encoder, optimizer, clip, scaling, **passes)
        encoder.zero_grad()
        if not dist.is_initialized():  # one process without a launcher
            os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
            ranks.join(dist.HashStore())
        # What a user can't act on: which accelerator there is, calls of old names, which op was built. It is built by the
        # ninja that pip has put beside python.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        os.environ.setdefault("DS_ACCELERATOR", ranks.device.type)
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        try:
            import deepspeed
        except ImportError as error:
            raise ValueError(f"--zero, and a launcher, need DeepSpeed, which does not open here ({error}); one process without "
                             f"--zero does not") from None
        deepspeed.utils.logger.setLevel("ERROR")
        self.ranks, self.stage = ranks, config["zero_optimization"]["stage"]
        # gradient_accumulation_steps: the engine would divide by it, and our passes are parts of one sum. Precision is
        # autocast inside the encoder: DeepSpeed's own would keep parameters and reductions in 16 bits.
        config = config | {
            "train_batch_size": ranks.world_size, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
            "gradient_clipping": clip if self.stage else 0.0,
            "fp16": {"enabled": False}, "bf16": {"enabled": False}, "torch_autocast": {"enabled": False},
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        with contextlib.redirect_stdout(io.StringIO()):
            self.model = deepspeed.initialize(model=encoder, optimizer=optimizer, config=config, dist_init_required=False)[0]

    def __str__(self) -> str:
        return f"DeepSpeed ZeRO {self.stage} on {self.ranks.world_size} ranks"

    def backward(self, micro_batches: Sequence[MicroBatch], loss_of: Callable[[Tensor], tuple]) -> tuple:
        def back(scalar: Tensor, last: bool) -> None:
            self.model.set_gradient_accumulation_boundary(last)  # else stages 1 and 2 keep the last pass alone
            self.model.backward(scalar)

        micro_batches = equalise(micro_batches, max(self.ranks.all(len(micro_batches))))
        # As many passes on every rank. In stage 3 one graph at a time: of several, DeepSpeed would lose gradients.
        keep = 1 if self.stage == 3 else min(self.ranks.all(self.kept(micro_batches)))
        return backward(self.model, micro_batches, loss_of, back, keep, self.tidy)

    def step(self, lr: float) -> float:
        self.optimizer.param_groups[0]["lr"] = lr
        if self.stage == 0:  # DeepSpeed has averaged the gradients; the rest is as in one process
            return super().step(lr)
        self.model.step()  # leaves the weights as they are where the gradient is not finite
        norm = float(self.model.get_global_grad_norm())
        self.scaling.survives(norm)
        return norm

    def whole(self) -> contextlib.AbstractContextManager:
        import deepspeed
        return deepspeed.zero.GatheredParameters(list(self.encoder.parameters()), enabled=self.stage == 3)

    def moments(self) -> dict[str, Tensor]:
        if self.stage == 0:
            return super().moments()
        from deepspeed.utils import safe_get_full_optimizer_state
        kinds, moments = next(iter(self.optimizer.state.values()), {}), {}
        for name, p in self.parameters.items():
            for kind, flat in kinds.items():
                full = safe_get_full_optimizer_state(p, kind) if flat.dim() else flat  # AdamW's step count has no dimension
                if self.ranks.rank == 0:
                    moments[f"{name}/{kind}"] = full.to("cpu", copy=True)
        return moments

    def load_moments(self, moments: dict[str, Tensor]) -> None:
        if self.stage == 0:
            return super().load_moments(moments)
        token = torch.zeros(1, 1, dtype=torch.long, device=self.ranks.device)
        self.model.set_gradient_accumulation_boundary(True)
        self.model.backward(self.model(token, token + 1).sum() * 0)
        self.step(lr=0.0)  # makes the moments, all 0, and changes no weight
        for key, value in moments.items():
            name, kind = key.rsplit("/", 1)
            if value.dim():
                self._set_moment(self.parameters[name], value.to(self.ranks.device), kind)
            else:
                for state in self.optimizer.state.values():
                    state[kind].copy_(value)

    def _set_moment(self, parameter: Tensor, value: Tensor, kind: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state
        if self.stage < 3:
            return safe_set_full_optimizer_state(parameter, value, kind)
        share = parameter.ds_tensor.numel()  # the last rank's is padded, which DeepSpeed's setter for whole tensors forgets
        value = nn.functional.pad(value.flatten(), (0, share * self.ranks.world_size - value.numel()))
        safe_set_local_optimizer_state(parameter, value[share * self.ranks.rank :][:share], kind)


def read_zero(value: str) -> dict:
    """--zero 0 .. 3, or the path of a DeepSpeed JSON file with a zero_optimization.stage -> its configuration."""
    if value in ("0", "1", "2", "3"):
        # Ours: gradients are reduced in pieces of 0.2 GB. DeepSpeed's default sets 2 GB aside, whatever the model.
        return {"zero_optimization": {"stage": int(value), "reduce_bucket_size": 50_000_000}}
    try:
        config = json.loads(Path(value).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--zero {value}: neither 0, 1, 2, 3 nor a JSON file that opens ({error})") from None
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") not in (0, 1, 2, 3):
        raise ValueError(f'--zero {value}: expected {{"zero_optimization": {{"stage": 0 .. 3, ...}}, ...}}')
    for field, found in zero.items():
        if isinstance(found, str):
            raise ValueError(f'--zero {value}: field "{field}": found "{found}", expected a number, true or false ("auto" is for '
                             f"transformers' Trainer; leave it out)")
    return config


def engine(encoder: nn.Module, optimizer: torch.optim.Optimizer, clip: float, scaling: LossScale, ranks: Ranks,
           zero: str | None, **passes) -> OneProcess:
    """What takes the steps. zero unset: plain torch in one process, ZeRO stage 2 under a launcher; set: DeepSpeed. passes:
    OneProcess's kept and tidy."""
    if zero is None and not ranks.launched:
        return OneProcess(encoder, optimizer, clip, scaling, **passes)
    return Zero(encoder, optimizer, clip, scaling, ranks, read_zero(zero or "2"), **passes)
