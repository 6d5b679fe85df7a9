"""Large batches in little memory (§5.3): mixed precision, an activation checkpoint after each
layer, the two-pass batch, and DeepSpeed ZeRO on many ranks.

Nothing here knows what an embedding means, which loss is taken of it, or how texts are tokenised.
Take these calls out of train.py, embed the whole batch at once, and the same update comes out, but
for rounding, in far more memory.

The two-pass batch (ours; the paper only says that the loss wants the largest batch that fits). The
loss couples every text of a batch with every other one, so a batch cannot be cut into independent
pieces as in gradient accumulation. But given the embeddings E = f(texts; theta), the chain rule
splits dL/dtheta at E (Gao et al. 2021, GradCache). train.py's step, and what is in memory
meanwhile:

    E = engine.embed(...)   pass 1: E_c = f(texts_c; theta) for every micro-batch c. In memory: E,
                            and the graphs of the last micro-batches, if there is room
    L(E).backward()         G = dL/dE. In memory: that, and the loss
    engine.backward(G)      pass 2: for every c, the last first, back-propagate <E_c, G_c>, after
                            embedding again where no graph was kept. In memory: the kept graphs,
                            which shrink, then one micro-batch's graph

    dL/dtheta = sum_c (dE_c/dtheta)^T G_c = sum_c d<E_c, G_c>/dtheta  with G_c held constant:
    exact, no factor anywhere.

It costs one more forward pass of the micro-batches whose graph was not kept. Both passes must see
the same dropout masks, so each micro-batch has a seed of its own.

Ranks (the paper only names DeepSpeed). Rank r of W embeds its own rows and takes the mean loss L_r
over them, against the gathered columns of all ranks; the loss of the global batch is L = (1/W)
sum_r L_r. `Ranks.gather` hands every rank's gradient of a column back to the rank that embedded it,
summed, so that G on a rank is d(sum_r L_r)/dE. DeepSpeed averages the parameters' gradients over
ranks: (1/W) sum_r (dE_r/dtheta)^T G_r = dL/dtheta. No other factor of W belongs anywhere.
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
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from plumbing.allocator import give_back_freed_memory
from plumbing.ranks import Ranks

# What data.MicroBatch is, without its names: which of the step's texts these are (b,), their
# input_ids (b, T), their attention_mask (b, T).
MicroBatch = tuple[Tensor, Tensor, Tensor]


# mixed precision

def choose_precision(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """`auto`, `fp32`, `bf16` or `fp16` -> the dtype of matrix products, and why, in a few words.
    Paper: mixed precision. Raises ValueError for fp16 on a CPU."""
    if name == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16: needs a GPU; a CPU takes bf16 or fp32")
    if name != "auto":
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        return dtypes[name], "as asked for"
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        unit = torch.cuda.get_device_name(device)
    else:
        able = torch.cpu.get_capabilities()
        units = [u for u in ("amx_bf16", "bf16", "sve_bf16") if able.get(u)]
        # Measured: with AMD's avx512_bf16 a step is 1.6 to 2.1 times as fast as in fp32, with
        # Intel's it took 1.4 to 1.9 times as long.
        if able.get("avx512_bf16") and "AMD" in able.get("cpu_name", ""):
            units.append("avx512_bf16")
        fast, unit = bool(units), f"this CPU ({units[0] if units else 'no bf16 matrix unit'})"
    if fast:
        return torch.bfloat16, f"{unit} multiplies bf16 fast"
    return torch.float32, f"{unit}: bf16 would gain nothing"


class LossScale:
    """The factor S on the gradients inside an encoder in fp16, whose smallest number, 6e-8, they
    would fall below; 1 in other precisions. Dynamic as torch's GradScaler: from 2^16 on, halved
    after an overflow, doubled after 2,000 steps without."""

    def __init__(self, dtype: torch.dtype):
        self.scale = 2.0**16 if dtype == torch.float16 else 1.0
        self.good_steps = self.bad_steps = 0  # in a row
        self.skipped = 0

    def survives(self, grad_norm: float) -> bool:
        """Whether a step with this gradient norm may be taken. If not, the scale is halved, and
        where that makes it `exhausted`, a lower one will not help."""
        if not math.isfinite(grad_norm):
            self.skipped += 1
            self.bad_steps += 1
            self.scale /= 2
            self.good_steps = 0
            return False
        self.good_steps += 1
        self.bad_steps = 0
        if self.scale > 1 and self.good_steps % 2000 == 0:
            self.scale *= 2
        return True

    def exhausted(self) -> bool:
        """Whether a gradient was not finite though nothing, or nothing any more, scaled it up."""
        return self.scale < 1


def mixed_precision(encoder: nn.Module, dtype: torch.dtype) -> LossScale:
    """Matrix products inside `encoder` in `dtype`; parameters, gradients and optimizer stay fp32. A
    BERT's attention in bf16 on a CPU becomes transformers' plain one.

    Autocast is entered inside the encoder's own forward, so that whatever wraps the encoder later
    cannot switch it off. In fp16 the gradient is multiplied by S where it enters the encoder and
    divided by S where it reaches a parameter: the loss, the cached gradients, clipping and the
    optimizer see no scale. cuDNN's attention is switched off for the process. -> S.
    """
    forward, scaling = encoder.forward, LossScale(dtype)
    # cuDNN plans for every new shape, on an H200 some 40 ms each for forward and backward pass, and
    # nearly every micro-batch has a new one
    torch.backends.cuda.enable_cudnn_sdp(False)
    if dtype == torch.bfloat16 and next(encoder.parameters()).device.type == "cpu":
        use_plain_attention(encoder)

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


def use_plain_attention(encoder: nn.Module) -> None:
    """The fused kernel's bf16 backward is slow on a CPU: MiniLM takes 619 ms for 32 x 128 tokens
    with it, 343 without (AMX). Only where the T x T logits are small enough to be made."""
    config = getattr(getattr(encoder, "backbone", None), "config", None)
    fused = getattr(config, "_attn_implementation", None) == "sdpa"
    if fused and getattr(config, "max_position_embeddings", math.inf) <= 1024:
        encoder.backbone.set_attn_implementation("eager")


# checkpoints of activations

def checkpoint_layers(model: nn.Module) -> None:
    """§5.3: an activation checkpoint after each BERT layer, so that only the layers' inputs are
    kept for the backward pass and the rest is computed again: one more forward, activations of one
    layer instead of all.

    model: a transformers model with a list of `config.num_hidden_layers` layers (BERT, MiniLM,
    JinaBERT, ...; an encoder-decoder has two), or a module with such a `backbone`. Raises
    ValueError where there is no such list.
    """
    backbone = getattr(model, "backbone", model)
    count = backbone.config.num_hidden_layers
    lists = [m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise ValueError(
            f"--checkpoint-layers: {type(backbone).__name__} has no list of its {count} layers")
    for layer in chain.from_iterable(lists):
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=True)


# the two passes, and the optimizer's step

class Engine:
    """Plain torch in one process.

    encoder: (input_ids, attention_mask) -> (b, D). graphs_to_keep(micro_batches): of how many, the
    last ones, the graph of pass 1 is kept. release_memory(): called where much lies freed.
    """

    stage = 0  # ZeRO's; here nothing is sharded

    def __init__(self, encoder: nn.Module, optimizer: torch.optim.Optimizer, clip: float,
                 scaling: LossScale,
                 graphs_to_keep: Callable[[Sequence[MicroBatch]], int] = lambda micro_batches: 1,
                 release_memory: Callable[[], None] = lambda: None):
        self.encoder = encoder
        self.model = encoder  # what is called: ZeRO wraps it
        self.optimizer, self.clip, self.scaling = optimizer, clip, scaling
        self.graphs_to_keep, self.release_memory = graphs_to_keep, release_memory
        named = encoder.named_parameters()
        self.parameters = {name: p for name, p in named if p.requires_grad}

    def __str__(self) -> str:
        return "one process"

    def embed(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Pass 1 -> (M, D), fp32, the step's M texts in their order: a leaf whose .grad the loss
        fills."""
        device = next(self.encoder.parameters()).device
        self.micro_batches = [[x.to(device) for x in m] for m in micro_batches]
        self.seeds = torch.randint(1 << 62, (len(micro_batches),)).tolist()
        self.graphs = {}
        first_kept = len(micro_batches) - self._count_kept_graphs(micro_batches)
        embeddings = None
        with torch.random.fork_rng(devices=[]):
            for c, (index, input_ids, mask) in enumerate(self.micro_batches):
                torch.manual_seed(self.seeds[c])  # the same dropout in both passes
                with torch.set_grad_enabled(c >= first_kept):
                    part = self.model(input_ids, mask)[: len(index)]
                if embeddings is None:  # in one piece: many small ones would scatter the heap
                    texts = sum(len(m[0]) for m in self.micro_batches)
                    embeddings = torch.empty(texts, part.shape[1], device=device)
                embeddings[index] = part.detach().float()
                if c >= first_kept:
                    self.graphs[c] = part
                    self.release_memory()  # of checkpointed layers much lies freed between
        if first_kept > 0:
            give_back_freed_memory()  # what was freed lies in pieces; the loss wants large ones
        return embeddings.requires_grad_()

    def backward(self, gradient: Tensor) -> None:
        """Pass 2: adds (dE/dtheta)^T G to the parameters' .grad, for G = `gradient`, (M, D).
        Whatever was kept, the sum is the same to the last bit."""
        self.release_memory()
        with torch.random.fork_rng(devices=[]):
            for c in reversed(range(len(self.micro_batches))):
                self._backward_micro_batch(c, gradient)
                self.release_memory()

    def _backward_micro_batch(self, c: int, gradient: Tensor) -> None:
        index, input_ids, mask = self.micro_batches[c]
        part = self.graphs.pop(c, None)
        if part is None:
            torch.manual_seed(self.seeds[c])
            part = self.model(input_ids, mask)[: len(index)]
        self._back_propagate((part * gradient[index]).sum(), last=c == 0)

    def _count_kept_graphs(self, micro_batches: Sequence[MicroBatch]) -> int:
        return self.graphs_to_keep(micro_batches)

    def _back_propagate(self, scalar: Tensor, last: bool) -> None:
        scalar.backward()

    def step(self, lr: float) -> float:
        """One optimizer step, if the gradient is finite -> the gradient's norm before clipping."""
        parameters = self.parameters.values()
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip or math.inf).item()
        self._set_learning_rate(lr)
        if self.scaling.survives(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # sparse gradients need one to be added to
        return norm

    def _set_learning_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def whole(self) -> contextlib.AbstractContextManager:
        """Inside, the encoder's parameters are whole on every rank."""
        return contextlib.nullcontext()


class ZeroEngine(Engine):
    """DeepSpeed with ZeRO (Rajbhandari et al. 2020) on any number of ranks: stage 1 shards the
    optimizer's moments, 2 the gradients too, 3 the parameters too. Every method is a collective:
    all ranks call it."""

    def __init__(self, encoder: nn.Module, optimizer: torch.optim.Optimizer, clip: float,
                 scaling: LossScale, ranks: Ranks, config: dict, **passes):
        super().__init__(encoder, optimizer, clip, scaling, **passes)
        encoder.zero_grad()
        self.ranks, self.stage = ranks, config["zero_optimization"]["stage"]
        if not dist.is_initialized():  # one process without a launcher
            os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
            ranks.join(dist.HashStore())
        deepspeed = import_deepspeed(ranks.device)
        # gradient_accumulation_steps: the engine would divide by it, and our passes are parts of
        # one sum. Precision is autocast inside the encoder: DeepSpeed's own would keep parameters
        # and reductions in 16 bits.
        config = config | {
            "train_batch_size": ranks.world_size, "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1, "gradient_clipping": clip if self.stage else 0.0,
            "fp16": {"enabled": False}, "bf16": {"enabled": False},
            "torch_autocast": {"enabled": False},
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        with contextlib.redirect_stdout(io.StringIO()):
            self.model, *_ = deepspeed.initialize(
                model=encoder, optimizer=optimizer, config=config, dist_init_required=False)

    def __str__(self) -> str:
        return f"DeepSpeed ZeRO {self.stage} on {self.ranks.world_size} ranks"

    def embed(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        passes = max(self.ranks.gather_objects(len(micro_batches)))
        return super().embed(equalise(micro_batches, passes))

    def _count_kept_graphs(self, micro_batches: Sequence[MicroBatch]) -> int:
        if self.stage == 3:
            return 1  # of several graphs at a time, DeepSpeed would lose gradients
        return min(self.ranks.gather_objects(self.graphs_to_keep(micro_batches)))

    def _back_propagate(self, scalar: Tensor, last: bool) -> None:
        self.model.set_gradient_accumulation_boundary(last)  # else 1 and 2 keep the last pass alone
        self.model.backward(scalar)

    def step(self, lr: float) -> float:
        if self.stage == 0:  # DeepSpeed has averaged the gradients; the rest is as in one process
            return super().step(lr)
        self._set_learning_rate(lr)
        self.model.step()  # leaves the weights as they are where the gradient is not finite
        norm = float(self.model.get_global_grad_norm())
        self.scaling.survives(norm)
        return norm

    def whole(self) -> contextlib.AbstractContextManager:
        import deepspeed
        parameters = list(self.encoder.parameters())
        return deepspeed.zero.GatheredParameters(parameters, enabled=self.stage == 3)


def import_deepspeed(device: torch.device):
    """DeepSpeed without what a user can't act on: which accelerator there is, calls of old names.
    What a file of --zero makes it compile is built by the ninja that pip has put beside python."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(f"--zero, and a launcher, need DeepSpeed, which does not open here "
                         f"({error}); one process without --zero does not") from None
    deepspeed.utils.logger.setLevel("ERROR")
    # Else it compiles an all-reduce that is for inference alone; for the lock of such a compiler,
    # where that was killed, every later run would wait without end.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def equalise(micro_batches: Sequence[MicroBatch], count: int) -> list[MicroBatch]:
    """`count` micro-batches, by halving the largest. Every pass is a collective under ZeRO-2 and 3:
    a rank with fewer would keep others waiting. Where texts run out, one goes through again with an
    empty index: its gradient is 0, and few backbones take an empty batch."""
    micro_batches = list(micro_batches)
    while len(micro_batches) < count:
        sizes = [len(index) for index, _, _ in micro_batches]
        largest = sizes.index(max(sizes))
        index, input_ids, mask = micro_batches[largest]
        if len(index) < 2:
            micro_batches.insert(0, (index[:0], input_ids[:1], mask[:1]))
            continue
        half = len(index) // 2
        micro_batches[largest : largest + 1] = [
            (index[:half], input_ids[:half], mask[:half]),
            (index[half:], input_ids[half:], mask[half:])]
    return micro_batches


def read_zero(value: str) -> dict:
    """--zero 0 .. 3, or the path of a DeepSpeed JSON file with a zero_optimization.stage -> its
    configuration."""
    if value in ("0", "1", "2", "3"):
        # Ours: gradients are reduced in pieces of 0.2 GB. DeepSpeed's default sets 2 GB aside.
        return {"zero_optimization": {"stage": int(value), "reduce_bucket_size": 50_000_000}}
    try:
        config = json.loads(Path(value).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--zero {value}: neither 0, 1, 2, 3 nor a JSON file that opens "
                         f"({error})") from None
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") not in (0, 1, 2, 3):
        raise ValueError(
            f'--zero {value}: expected {{"zero_optimization": {{"stage": 0 .. 3, ...}}, ...}}')
    for field, found in zero.items():
        if isinstance(found, str):
            raise ValueError(
                f'--zero {value}: field "{field}": found "{found}", expected a number, true or '
                f'false ("auto" is for transformers\' Trainer; leave it out)')
    return config


def make_engine(encoder: nn.Module, optimizer: torch.optim.Optimizer, clip: float,
                scaling: LossScale, ranks: Ranks, zero: str | None, **passes) -> Engine:
    """What takes the steps. zero unset: plain torch in one process, ZeRO stage 2 under a launcher;
    set: DeepSpeed. passes: graphs_to_keep and release_memory, as of Engine."""
    if zero is None and not ranks.launched:
        return Engine(encoder, optimizer, clip, scaling, **passes)
    return ZeroEngine(encoder, optimizer, clip, scaling, ranks, read_zero(zero or "2"), **passes)
