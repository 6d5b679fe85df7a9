"""Texts -> vectors, with any encoder that `model.load` opens. Nothing here knows what is done with
them."""

import torch
from torch import Tensor, nn

import data
from corpora.prompts import check_length, with_prompt

# Ours: the paper's pre-training length, and the most that an ordinary BERT takes; a JinaBERT takes
# any
MAX_LENGTH = 512
MICRO_TOKENS = 16384  # ours, for memory only


@torch.no_grad()
def embed(encoder: nn.Module, tokenizer, texts: list[str], max_length: int | None = None,
          micro_tokens: int = MICRO_TOKENS, prompt: str = "") -> Tensor:
    """The texts' embeddings in their order, without dropout: (M, D) float32 on the CPU, any length
    (cosine ignores it).

    max_length: tokens of a text with its prompt; what is longer is cut; unset: MAX_LENGTH, or what
    the model takes if that is less. micro_tokens: tokens of a forward pass. prompt: what is put
    before every text. Raises ValueError where a text begins with it already, or where a vector is
    not finite.
    """
    device, training = next(encoder.parameters()).device, encoder.training
    max_length = max_length or min(MAX_LENGTH, tokenizer.model_max_length)
    check_length(tokenizer, prompt, max_length)
    texts = [with_prompt(prompt, text) for text in texts]
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
