"""The cross-encoder of §5.2: reads a query and a passage together and judges how relevant the passage is.

Paper: a cross-encoder validates that a negative's relevance score is lower than the positive's; which one is not said. Ours:
any sequence-classification model with one logit, or one trained here from an encoder, for where none can be downloaded.
Nothing here knows where the pairs come from, or what is done with the scores.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import memory
from curation.pool import device


class Example(NamedTuple):
    query: str
    positive: str
    candidates: list[str]  # what a retriever found; one of them may be a false negative


class Reranker:
    """Relevance of a passage to a query, from 0 to 1. encoder: (input_ids, attention_mask[, token_type_ids]), (B, T) each, ->
    .logits (B, 1). In bf16 where that is fast."""

    def __init__(self, encoder: torch.nn.Module, tokenizer, max_length: int, micro_tokens: int):
        self.encoder, self.tokenizer = encoder.to(device()), tokenizer
        self.max_length, self.micro_tokens = min(max_length, tokenizer.model_max_length), micro_tokens
        # BERT is told which text a token is of, RoBERTa not
        self.typed = getattr(encoder.config, "type_vocab_size", 1) > 1 and tokenizer.sep_token is not None
        memory.mixed_precision(encoder, memory.choose_precision("auto", device())[0])

    def logits(self, pairs: list[tuple[str, str]]) -> Iterator[tuple[Tensor, Tensor]]:
        """(which pairs, their logits), pairs of similar length together."""
        if self.typed:  # a text that speaks of [SEP] would be split there
            pairs = [tuple(text.replace(self.tokenizer.sep_token, " ") for text in pair) for pair in pairs]
        for index, *inputs in data.make_micro_batches(self.tokenizer, pairs, self.max_length, self.micro_tokens):
            if self.typed:
                ends = (inputs[0] == self.tokenizer.sep_token_id).long()
                inputs.append((ends.cumsum(1) > ends).long())  # [CLS] query [SEP] are 0, passage [SEP] 1
            yield index, self.encoder(*(x.to(device()) for x in inputs)).logits[:, 0].float().cpu()

    @torch.no_grad()
    def __call__(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        scores = np.empty(len(pairs), "f4")
        for index, logits in self.logits(pairs):
            scores[index] = logits.sigmoid()
        return scores

    def train(self, batches: Iterable[list[Example]], steps: int, lr: float) -> Iterator[float]:
        """Binary cross-entropy of positives (1) and candidates (0), each side weighing a half; AdamW, a tenth of the steps to
        warm up and then linearly down. -> the loss of each step."""
        optimizer = torch.optim.AdamW(self.encoder.parameters(), lr=lr, weight_decay=0.01, fused=True)
        self.encoder.train()
        for step, batch in enumerate(batches, 1):
            pairs = [(e.query, text) for e in batch for text in (e.positive, *e.candidates)]
            labels = torch.tensor([x for e in batch for x in (1.0, *[0.0] * len(e.candidates))])
            weights = torch.tensor([x for e in batch for x in (1.0, *[1 / max(1, len(e.candidates))] * len(e.candidates))])
            weights /= 2 * len(batch)
            total = 0.0
            for index, logits in self.logits(pairs):
                loss = F.binary_cross_entropy_with_logits(logits, labels[index], weights[index], reduction="sum")
                loss.backward()  # a sum of parts: no factor for their number
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(self.encoder.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = lr * min(10 * step / steps, 1, (steps + 1 - step) / (0.9 * steps))
            optimizer.step()
            optimizer.zero_grad()
            yield total
        self.encoder.eval()
