"""Large batches in little memory (§5.3): mixed precision, an activation checkpoint after each layer, the two-pass batch.

Nothing here knows what an embedding means or which loss is taken of it. Take these calls out of train.py, embed the whole
batch at once, and the same update comes out, but for rounding, in far more memory.

The two-pass batch (ours; the paper only says that the loss wants the largest batch that fits). The loss couples every text
of a batch with every other one, so a batch cannot be cut into independent pieces as in gradient accumulation. But given
the embeddings E = f(texts; theta), the chain rule splits dL/dtheta at E (Gao et al. 2021, GradCache):

    pass 1   E_c = f(texts_c; theta) for every micro-batch c, no graph kept          memory: the embeddings alone
    loss     L(E), G = dL/dE                                                         memory: the loss alone
    pass 2   for every c: embed again, and back-propagate <E_c, G_c>                 memory: one micro-batch's graph

    dL/dtheta = sum_c (dE_c/dtheta)^T G_c = sum_c d<E_c, G_c>/dtheta  with G_c held constant: exact, no factor anywhere.

It costs one more forward pass. Both passes must see the same dropout masks, so the random state of each micro-batch is
kept and restored.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

class MicroBatch(NamedTuple):
    index: Tensor  # (b,) which of the step's texts these are
    input_ids: Tensor  # (b, T)
    attention_mask: Tensor  # (b, T)


def choose_precision(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """`auto`, `fp32` or `bf16` -> the dtype of matrix products, and why, in a few words. Paper: mixed precision."""
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[name], "as asked for"
    if device.type == "cuda":
        fast, unit = torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_name(device)
    else:
        units = [u for u in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16") if torch.cpu.get_capabilities().get(u)]
        fast, unit = bool(units), f"this CPU ({units[0] if units else 'without bf16 units'})"
    return (torch.bfloat16, f"{unit} multiplies bf16 fast") if fast else (torch.float32, f"{unit}: bf16 would gain nothing")


def mixed_precision(encoder: nn.Module, dtype: torch.dtype) -> None:
    """Matrix products inside `encoder` in `dtype`; parameters, gradients and optimizer stay fp32.

    Autocast is entered inside the encoder's own forward, so that whatever wraps the encoder later cannot switch it off.
    """
    forward = encoder.forward

    def autocast_forward(*inputs: Tensor) -> Tensor:
        with torch.autocast(inputs[0].device.type, dtype=dtype, enabled=dtype != torch.float32):
            return forward(*inputs)

    encoder.forward = autocast_forward


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
        layer.forward = checkpointed(layer.forward)


def checkpointed(forward: Callable) -> Callable:
    def checkpointed_forward(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)

    return checkpointed_forward


def random_state(device: torch.device) -> list[Tensor]:
    """What dropout draws from: the CPU's generator and the device's."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_random_state(state: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda" and len(state) > 1:  # a checkpoint made on a CPU has none: dropout goes on with other masks
        torch.cuda.set_rng_state(state[1], device)


def micro_batches(tokenizer, texts: list[str], max_length: int, micro_tokens: int) -> list[MicroBatch]:
    """Cuts a step's texts into micro-batches of at most `micro_tokens` tokens, padding included; all in one if that fits.

    Ours: sorted by length (their order is free), the longest first so that memory peaks at once, and cut early where
    more than 1/20 of a micro-batch would be padding. A single text may exceed the bound.
    """
    if not 3 <= max_length <= tokenizer.model_max_length:  # [CLS], one token, [SEP]
        raise ValueError(f"--max-length {max_length}: expected 3 to {tokenizer.model_max_length} tokens for this model")
    ids = tokenizer(texts, truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]
    lengths = [len(x) for x in ids]
    everything_fits = len(ids) * max(lengths) <= micro_tokens
    chunks, width, tokens = [], 0, 0
    for i in sorted(range(len(ids)), key=lambda i: -lengths[i]):
        size = width * (len(chunks[-1]) + 1) if chunks else 0
        if not chunks or not everything_fits and (size > micro_tokens or tokens + lengths[i] < 0.95 * size):
            chunks.append([])
            width, tokens = lengths[i], 0
        chunks[-1].append(i)
        tokens += lengths[i]
    return [MicroBatch(torch.tensor(chunk),
                       pad_sequence([torch.tensor(ids[i]) for i in chunk], True, tokenizer.pad_token_id),
                       pad_sequence([torch.ones(lengths[i], dtype=torch.long) for i in chunk], True)) for chunk in chunks]


def backward(encoder: nn.Module, micro_batches: Sequence[MicroBatch],
             loss_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Adds dL/dtheta of L = loss_of(embeddings of all texts of the step) to the parameters' .grad.

    encoder: (input_ids, attention_mask) -> (b, D). loss_of: (M, D), in the order of the texts -> scalar.
    -> the loss, and the embeddings (M, D), fp32, both detached. One micro-batch takes one pass, several take two.
    """
    device = next(encoder.parameters()).device
    inputs = [(input_ids.to(device), mask.to(device)) for _, input_ids, mask in micro_batches]
    place = torch.cat([index for index, _, _ in micro_batches]).argsort().to(device)
    if len(inputs) == 1:
        embeddings = encoder(*inputs[0])[place]
        loss = loss_of(embeddings)
        loss.backward()
        return loss.detach(), embeddings.detach()

    states, embeddings = [], []
    with torch.no_grad():
        for micro_batch in inputs:
            states.append(random_state(device))
            embeddings.append(encoder(*micro_batch).float())
    embeddings = torch.cat(embeddings)[place].requires_grad_()

    loss = loss_of(embeddings)
    loss.backward()  # fills embeddings.grad, the cached gradient G, in fp32

    for (index, _, _), micro_batch, state in zip(micro_batches, inputs, states):
        set_random_state(state, device)
        (encoder(*micro_batch) * embeddings.grad[index.to(device)]).sum().backward()
    return loss.detach(), embeddings.detach()
