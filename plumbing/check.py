"""--check: is the update of these flags, on these ranks, that of plain fp32 in one process?

One step of plain SGD is taken as train.py would take it, on a small batch in many micro-batches;
its update over the learning rate is held against the gradient of one forward and backward pass.
"""

import argparse
import copy
import math
from collections.abc import Callable

import torch

import data
from memory import choose_precision
from plumbing.ranks import Ranks

ROWS, TOKENS = 32, 16384  # few, for plain fp32 holds the graph of them all
LR = 1024.0  # a step beside which the weights' own rounding is nothing


def check_update(encoder: torch.nn.Module, tokenizer, sources: list[data.Source],
                 args: argparse.Namespace, ranks: Ranks, prepare: Callable, step_loss: Callable
                 ) -> bool:
    """Whether the two gradients agree, which is also printed. prepare, step_loss: train.py's."""
    rows = min(ROWS, max(2, TOKENS // (args.max_length * (2 + args.negatives))))
    rows = ranks.world_size * math.ceil(rows / ranks.world_size)
    args = argparse.Namespace(**{**vars(args), "batch_size": rows})
    encoder.eval()  # no dropout: its masks follow the micro-batches
    plain = copy.deepcopy(encoder)

    parameters = [p for p in encoder.parameters() if p.requires_grad]
    engine, _ = prepare(encoder, torch.optim.SGD(parameters, lr=0.0), 0.0, args, ranks)
    batch = next(data.SourceBatches(
        sources, rows, args.seed, ranks.rank, ranks.world_size, args.negatives))
    micro_batches = data.make_micro_batches(
        tokenizer, batch.texts, args.max_length, micro_tokens=args.max_length)
    norm = math.inf
    # fp16 may have to lower its scale first
    while not math.isfinite(norm) and not engine.scaling.exhausted():
        embeddings = engine.embed(micro_batches)
        loss, _ = step_loss(*batch.split(embeddings), args.tau, ranks)
        loss.backward()
        engine.backward(embeddings.grad)
        norm = engine.step(LR)

    alone = Ranks(alone=True)
    batch = next(data.SourceBatches(sources, rows, args.seed, negatives=args.negatives))
    (index, input_ids, mask), = data.make_micro_batches(
        tokenizer, batch.texts, args.max_length, micro_tokens=1, whole=True)
    embeddings = plain(input_ids.to(alone.device), mask.to(alone.device))[index.argsort()]
    step_loss(*batch.split(embeddings), args.tau, alone)[0].backward()

    expected, found = [], []
    with engine.whole():
        for before, after in zip(plain.parameters(), encoder.parameters()):
            if before.requires_grad:
                reached = before.grad if before.grad is not None else torch.zeros_like(before)
                expected.append(reached.flatten())
                found.append((before - after).detach().flatten() / LR)
    return compare(torch.cat(expected).double(), torch.cat(found).double(), args, ranks)


def compare(expected: torch.Tensor, found: torch.Tensor, args: argparse.Namespace, ranks: Ranks
            ) -> bool:
    ratio = (found.norm() / expected.norm()).item()
    cosine = torch.cosine_similarity(found, expected, dim=0).item()
    dtype, _ = choose_precision(args.precision, ranks.device)
    near, least = (1e-3, 0.9999) if dtype == torch.float32 else (0.02, 0.99)
    good = abs(ratio - 1) <= near and cosine >= least
    ranks.print_rank0(
        f"gradient of a batch of {args.batch_size} rows, here against one process in fp32: norm "
        f"ratio {ratio:.6f} (1 +- {near}), cosine {cosine:.6f} (at least {least}): "
        + ("they agree" if good else "THEY DIFFER"))
    return good
