"""Texts -> vectors, with any encoder that `model.load` opens. Nothing here knows what is done with
them."""

import torch
from torch import Tensor, nn

import data

# Ours: the paper's pre-training length, and the most that an ordinary BERT takes; a JinaBERT takes
# any
MAX_LENGTH = 512
MICRO_TOKENS = 16384  # ours, for memory only


@torch.no_grad()
def embed(encoder: nn.Module, tokenizer, texts: list[str], max_length: int = MAX_LENGTH,
          micro_tokens: int = MICRO_TOKENS) -> Tensor:
    """The texts' embeddings in their order, without dropout: (M, D) float32 on the CPU, any length
    (cosine ignores it).

    max_length: tokens of a text; what is longer is cut. micro_tokens: tokens of a forward pass.
    Raises ValueError where a vector is not finite.
    """
    device, training = next(encoder.parameters()).device, encoder.training
    micro_batches = data.make_micro_batches(tokenizer, texts, max_length, micro_tokens)
    encoder.eval()
    try:
        vectors = [encoder(m.input_ids.to(device), m.attention_mask.to(device)).float().cpu()
                   for m in micro_batches]
    finally:
        encoder.train(training)
    by_length = torch.cat([m.index for m in micro_batches])  # the longest text first
    vectors = torch.cat(vectors)[by_length.argsort()]
    if not vectors.isfinite().all():
        raise ValueError("the encoder gives embeddings that are not finite: its weights are "
                         "broken, take an earlier save")
    return vectors
