"""Tries whether texts go through an encoder. Names do not tell: other people's models have
positions that begin late, tokenizers with too many entries, parts that no loss reaches.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerBase

import data
from corpora.prompts import check_length


def try_texts(encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Passes four tokens forward and back, and freezes the parameters that no gradient reaches,
    BERT's own pooler for one: they stay as they came. Leaves no gradient and no random state
    behind. Raises ValueError where the tokens do not come through."""
    largest = max(tokenizer.get_vocab().values())
    rows = encoder.backbone.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise ValueError(f"model {name}: its tokenizer has an entry of number {largest}, but its "
                         f"embeddings have {rows} rows")
    tokens = tokenizer("a text")
    if any(tokens.get("token_type_ids", [])):
        raise ValueError(f"model {name}: its tokenizer gives a text token types that are not 0, "
                         f"which are not passed on here")
    input_ids = torch.tensor([tokens["input_ids"][:3]])
    input_ids = F.pad(input_ids, (0, 4 - input_ids.shape[1]), value=largest)
    reached = set()

    def note(parameter: nn.Parameter) -> None:
        reached.add(parameter)
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(note) for p in encoder.parameters()]
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            encoder(input_ids, torch.ones_like(input_ids)).sum().backward()
    except Exception as error:  # no vectors per token, a decoder that wants its own input ...
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"model {name}: {type(encoder.backbone).__name__} is no encoder of texts "
                         f"that can be pooled here ({reason})") from error
    for hook in hooks:
        hook.remove()
    for parameter in encoder.parameters():
        parameter.requires_grad_(parameter in reached)


def try_length(encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, max_length: int,
               prompts: Iterable[str]) -> None:
    """Passes one text of max_length tokens forward. Raises ValueError where that is more than the
    model takes, or leaves no token beside one of the prompts."""
    data.make_micro_batches(tokenizer, ["a text"], max_length, max_length)  # raises
    for prompt in prompts:
        check_length(tokenizer, prompt, max_length)
    device = next(encoder.parameters()).device
    input_ids = tokenizer("a text", return_tensors="pt")["input_ids"].to(device)
    input_ids = input_ids.repeat(1, max_length)[:, :max_length]
    try:
        with torch.no_grad():
            encoder(input_ids, torch.ones_like(input_ids))
    except (IndexError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        if "memory" in reason:
            raise
        raise ValueError(f"--max-length {max_length}: a text of so many tokens does not go through "
                         f"this model ({reason})") from error
