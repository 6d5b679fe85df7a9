"""Exact search among more vectors than fit in memory: cosines block by block, no index.

A pool's vectors come in chunks, arrays (k, D) or files of them, of length 1. An index is one in a
pool, from 0 on; a position is one among search results, from 1 on. Axis letters: M queries, K texts
of a pool, k of a chunk, C nearest ones, D width. Nothing here knows what the texts are.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluation.metrics import SCORES_AT_ONCE, TIE

Chunks = Iterable[Path | np.ndarray]  # taken once, one at a time: they may be made on the way
Cells = tuple[np.ndarray, np.ndarray]  # (which queries, which indices in a pool), a cell each


def blocks(q: Tensor, chunks: Chunks, excluded: Cells) -> Iterator[tuple[slice, int, Tensor]]:
    """Cosines of queries q (M, D) and a pool, -inf where excluded, some queries and a chunk at a
    time. -> which queries (m), the index of the first column, cosines (m, k)."""
    order = np.argsort(excluded[1])
    query, index = excluded[0][order], excluded[1][order].astype(int)
    first = 0
    for chunk in chunks:
        vectors = np.load(chunk) if isinstance(chunk, Path) else chunk
        vectors = torch.from_numpy(vectors).to(q.device)
        size = max(1, SCORES_AT_ONCE // len(vectors))
        begin, end = np.searchsorted(index, (first, first + len(vectors)))  # in this chunk
        for start in range(0, len(q), size):
            cosine = q[start : start + size] @ vectors.T
            i, j = query[begin:end] - start, index[begin:end] - first
            inside = (i >= 0) & (i < len(cosine))
            cosine[torch.from_numpy(i[inside]), torch.from_numpy(j[inside])] = -torch.inf
            yield slice(start, start + size), first, cosine
        first += len(vectors)


def positions(q: Tensor, own: Tensor, chunks: Chunks, excluded: Cells) -> np.ndarray:
    """1-based position of each query's own target among itself and a pool, in which it is excluded:
    1 + the number of texts as near to the query, or nearer. Ties count against us, as in
    `metrics.positions`. q, own (M, D) -> (M,)."""
    cosine = (q * own).sum(1)
    found = torch.ones(len(q), dtype=torch.long, device=q.device)
    for rows, _, block in blocks(q, chunks, excluded):
        found[rows] += (block >= cosine[rows, None] - TIE).sum(1)
    return found.cpu().numpy()


def nearest(
    q: Tensor, chunks: Chunks, count: int, excluded: Cells, order: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest texts of a pool, the nearest first. -> indices (M, C), cosines (M, C), -inf where
    a pool has no more.

    order: unset, torch.topk chooses among equal cosines. Or (K,), the numbers 0 .. K - 1: cosines
    are rounded to TIE, and of equal ones the text with the higher number comes first."""
    dtype = torch.float32 if order is None else torch.float64
    best = torch.full((len(q), count), -torch.inf, dtype=dtype, device=q.device)
    index = torch.zeros_like(best, dtype=torch.long)
    for rows, first, block in blocks(q, chunks, excluded):
        if order is not None:  # whole TIEs, and fractions that order equal ones
            fraction = torch.from_numpy(order[first : first + block.shape[1]] / len(order))
            block = block.double().div_(TIE).round_().add_(fraction.to(q.device))
        top = block.topk(min(count, block.shape[1]))
        best[rows], column = torch.cat([best[rows], top.values], 1).topk(count)
        index[rows] = torch.cat([index[rows], top.indices + first], 1).gather(1, column)
    if order is not None:
        best = best.floor().mul_(TIE)
    return index.cpu().numpy(), best.cpu().numpy()
