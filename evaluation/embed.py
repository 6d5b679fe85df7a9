"""Texts -> vectors, with any encoder that `model.load` opens."""

import torch
from torch import Tensor, nn

import data


@torch.no_grad()
def embed(
    encoder: nn.Module,
    tokenizer,
    texts: list[str],
    max_length: int = 512,
    micro_tokens: int = 16384,
) -> Tensor:
    """The texts' embeddings in their order, without dropout: (M, D) float32 on the CPU, any length
    (cosine ignores it).

    max_length: tokens of a text; what is longer is cut (512 is ours: the paper's pre-training
    length, and the most that an ordinary BERT takes). micro_tokens: tokens of a forward pass, for
    memory only. Raises ValueError where a vector is not finite.
    """
    device, training = next(encoder.parameters()).device, encoder.training
    batches = data.make_micro_batches(tokenizer, texts, max_length, micro_tokens)
    encoder.eval()
    try:
        vectors = [
            encoder(b.input_ids.to(device), b.attention_mask.to(device)).float().cpu()
            for b in batches
        ]
    finally:
        encoder.train(training)
    by_length = torch.cat([b.index for b in batches])  # micro-batches come sorted by length
    vectors = torch.cat(vectors)[by_length.argsort()]
    if not vectors.isfinite().all():
        raise ValueError(
            "the encoder gives embeddings that are not finite: its weights are broken, take an earlier save"
        )
    return vectors
