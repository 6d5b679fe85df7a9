"""The loss functions of §5: equation (4) for pairs, equation (5) for pairs with negatives, as printed.

Letters are the paper's: q queries, p positives, n negatives, k pairs in the batch, s cosine similarity, tau temperature.
Axis letters: B own rows, G gathered rows (G = B in one process), N negatives per row, D width. Nothing here knows about
models or text. Of ranks it knows only where its own rows stand among the gathered ones: with `columns`, a rank computes
the mean over its *own* rows against *everybody's* columns. The mean of that over ranks of equal size is the loss of the
global batch, so no factor of the number of ranks belongs anywhere, here or in the caller.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    """Rows of length 1, so that a product of two is their cosine; at least fp32. At tau = 0.05 a bf16 logit is off by up
    to 0.06 (logits reach 20, where bf16's numbers are 0.125 apart): enough to turn a loss of 5e-5 into 0."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def pair_loss(q: Tensor, p: Tensor, tau: float, columns: tuple[Tensor, Tensor] | None = None, row: int = 0) -> Tensor:
    """Equation (4), §5.1: the *sum* of both directions of the bidirectional InfoNCE loss, equation (3).

        L(B) = E[ -ln  exp(s(q,p)/tau) / sum_{i=1..k} exp(s(q,p_i)/tau) ]      a query among all positives
             + E[ -ln  exp(s(p,q)/tau) / sum_{i=1..k} exp(s(p,q_i)/tau) ]      a positive among all queries

    q, p: (B, D), any length. columns: (all_q, all_p), (G, D) each, when the batch is larger than the own rows;
    row: where the own rows begin in them. -> scalar, fp32 (float64 for float64 input).
    """
    all_q, all_p = columns or (q, p)
    with torch.autocast(q.device.type, enabled=False):
        q, p, all_q, all_p = map(unit, (q, p, all_q, all_p))
        own = torch.arange(row, row + len(q), device=q.device)
        return F.cross_entropy(q @ all_p.T / tau, own) + F.cross_entropy(p @ all_q.T / tau, own)


def hard_negative_loss(q: Tensor, p: Tensor, n: Tensor, tau: float,
                       columns: tuple[Tensor, Tensor, Tensor] | None = None, row: int = 0) -> Tensor:
    """Equation (5), §5.2: L_NCE+ for records (q, p, n_1 .. n_N), N = 15 in the paper.

        L(B) = E[ -ln  exp(s(q,p)/tau) / sum_{i=1..k} ( exp(s(q,p_i)/tau) + sum_{j=1..N} exp(s(q,n_{j,i})/tau) ) ]
             + E[ -ln  exp(s(p,q)/tau) / sum_{i=1..k} exp(s(p,q_i)/tau) ]

    A query sees the k positives and all N k negatives of the batch, not only its own; a positive sees the k queries; a
    negative is never an anchor. q, p: (B, D); n: (B, N, D); columns: (all_q, all_p, all_n), (G, D), (G, D), (G, N, D);
    row: where the own rows begin in them. -> scalar, as `pair_loss`.
    """
    all_q, all_p, all_n = columns or (q, p, n)
    with torch.autocast(q.device.type, enabled=False):
        q, p, all_q, all_p, all_n = map(unit, (q, p, all_q, all_p, all_n))
        own = torch.arange(row, row + len(q), device=q.device)
        passages = torch.cat([all_p, all_n.flatten(0, 1)])  # (G + G N, D): the positives first, so `own` stays
        return F.cross_entropy(q @ passages.T / tau, own) + F.cross_entropy(p @ all_q.T / tau, own)
