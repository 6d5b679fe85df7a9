"""The loss functions of §5: equation (4) for pairs, equation (5) for pairs with negatives; as printed, and in tiles.

Letters are the paper's: q queries, p positives, n negatives, k pairs in the batch, s cosine similarity, tau temperature.
Axis letters: B own rows, G gathered rows (G = B in one process), N negatives per row, D width. Nothing here knows about
models or text. Of ranks it knows only where its own rows stand among the gathered ones: with `columns`, a rank computes
the mean over its *own* rows against *everybody's* columns. The mean of that over ranks of equal size is the loss of the
global batch, so no factor of the number of ranks belongs anywhere, here or in the caller.

`equation_4` and `equation_5` are the paper's and hold all B x G (N + 1) logits: 69 GB at B = G = 32,768, N = 15, several times
over. `pair_loss` and `hard_negative_loss` are the same functions to train with: they hold a tile of the logits at a time.
"""

from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 1024  # rows and columns; on a CPU 512 is as fast, 2048 up to a fifth slower


def no_autocast(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An autocast around the call would make bf16 logits of the fp32 vectors: see `unit`."""
    @wraps(loss)
    def of(q: Tensor, *others, **more) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            return loss(q, *others, **more)
    return of


def unit(x: Tensor) -> Tensor:
    """Rows of length 1, so that a product of two is their cosine; at least fp32. At tau = 0.05 a bf16 logit is off by up
    to 0.06 (logits reach 20, where bf16's numbers are 0.125 apart): enough to turn a loss of 5e-5 into 0."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


@no_autocast
def equation_4(q: Tensor, p: Tensor, tau: float, columns: tuple[Tensor, Tensor] | None = None, row: int = 0) -> Tensor:
    """Equation (4), §5.1: the *sum* of both directions of the bidirectional InfoNCE loss, equation (3).

        L(B) = E[ -ln  exp(s(q,p)/tau) / sum_{i=1..k} exp(s(q,p_i)/tau) ]      a query among all positives
             + E[ -ln  exp(s(p,q)/tau) / sum_{i=1..k} exp(s(p,q_i)/tau) ]      a positive among all queries

    q, p: (B, D), any length. columns: (all_q, all_p), (G, D) each, when the batch is larger than the own rows;
    row: where the own rows begin in them. -> scalar, fp32 (float64 for float64 input).
    """
    all_q, all_p = columns or (q, p)
    q, p, all_q, all_p = map(unit, (q, p, all_q, all_p))
    own = torch.arange(row, row + len(q), device=q.device)
    return F.cross_entropy(q @ all_p.T / tau, own) + F.cross_entropy(p @ all_q.T / tau, own)


@no_autocast
def equation_5(q: Tensor, p: Tensor, n: Tensor, tau: float,
               columns: tuple[Tensor, Tensor, Tensor] | None = None, row: int = 0) -> Tensor:
    """Equation (5), §5.2: L_NCE+ for records (q, p, n_1 .. n_N), N = 15 in the paper.

        L(B) = E[ -ln  exp(s(q,p)/tau) / sum_{i=1..k} ( exp(s(q,p_i)/tau) + sum_{j=1..N} exp(s(q,n_{j,i})/tau) ) ]
             + E[ -ln  exp(s(p,q)/tau) / sum_{i=1..k} exp(s(p,q_i)/tau) ]

    A query sees the k positives and all N k negatives of the batch, not only its own; a positive sees the k queries; a
    negative is never an anchor. q, p: (B, D); n: (B, N, D); columns: (all_q, all_p, all_n), (G, D), (G, D), (G, N, D);
    row: where the own rows begin in them. -> scalar, as `equation_4`.
    """
    all_q, all_p, all_n = columns or (q, p, n)
    q, p, all_q, all_p, all_n = map(unit, (q, p, all_q, all_p, all_n))
    own = torch.arange(row, row + len(q), device=q.device)
    passages = torch.cat([all_p, all_n.flatten(0, 1)])  # (G + G N, D): the positives first, so `own` stays
    return F.cross_entropy(q @ passages.T / tau, own) + F.cross_entropy(p @ all_q.T / tau, own)


class LogSumExp(torch.autograd.Function):
    """u (B, D), rows of length 1; v (C, D), any length -> (B,): ln sum_j exp(s(u_i, v_j) / tau) for every i; and if `both`,
    (C,): ln sum_i for every j. Neither sum counts the own pairs j = i + row; with row = C there are none.

    Only these sums are kept between forward and backward; both make the logits, tile by tile."""

    @staticmethod
    def forward(ctx, u: Tensor, v: Tensor, tau: float, row: int, both: bool, tile: int) -> tuple[Tensor, Tensor | None]:
        ln_0 = torch.finfo(u.dtype).min  # finite, for -inf - -inf is no number
        over_v, over_u = u.new_full(u.shape[:1], ln_0), u.new_full(v.shape[:1], ln_0) if both else None
        for j in (slice(start, start + tile) for start in range(0, len(v), tile)):
            for i, logits in logit_tiles(u, unit(v[j]) / tau, row - j.start, tile):
                over_v[i] = torch.logaddexp(over_v[i], logits.logsumexp(1))
                if both:
                    over_u[j] = torch.logaddexp(over_u[j], logits.logsumexp(0))
        ctx.save_for_backward(u, v, over_v, over_u)
        ctx.numbers = tau, row, tile
        return over_v, over_u

    @staticmethod
    def backward(ctx, g: Tensor, h: Tensor | None):
        """logit_ij = u_i . w_j with w_j = v_j / |v_j| / tau. As d ln sum_j exp(x_j) / d x_j = exp(x_j - ln sum_j exp(x_j)),
            d_ij = g_i exp(logit_ij - over_v_i) + h_j exp(logit_ij - over_u_j)
            du_i = sum_j d_ij w_j,   dw_j = sum_i d_ij u_i,   dv_j = dw_j through w_j's own gradient, `back`."""
        if torch.is_grad_enabled():  # once_differentiable would let autograd.grad pass, and leave out a term
            raise NotImplementedError("pair_loss and hard_negative_loss have no second derivative; equation_4 and _5 have one")
        u, v, over_v, over_u = ctx.saved_tensors
        tau, row, tile = ctx.numbers
        du, dv = (torch.zeros_like(x) if needed else None for x, needed in zip((u, v), ctx.needs_input_grad))
        with torch.autocast(u.device.type, enabled=False):
            for j in (slice(start, start + tile) for start in range(0, len(v), tile)):
                w, back = torch.func.vjp(lambda v: unit(v) / tau, v[j])
                dw = torch.zeros_like(w)
                for i, logits in logit_tiles(u, w, row - j.start, tile):
                    d = (logits - over_v[i, None]).exp_().mul_(g[i, None])
                    if over_u is not None:
                        d.add_(logits.sub_(over_u[j]).exp_().mul_(h[j]))
                    if du is not None:
                        du[i].addmm_(d, w)
                    if dv is not None:
                        dw.addmm_(d.T, u[i])
                if dv is not None:
                    dv[j], = back(dw)
        return du, dv, None, None, None, None


def logit_tiles(u: Tensor, w: Tensor, row: int, tile: int):
    """Rows i of u and their products with w; that of an own pair, j = i + row, is -inf."""
    for i in range(0, len(u), tile):
        logits = u[i : i + tile] @ w.T
        logits.diagonal(i + row).fill_(-torch.inf)  # empty where the own pairs are in another tile
        yield slice(i, i + tile), logits


def nll(own: Tensor, others: Tensor) -> Tensor:
    """E[ -ln e^own / (e^own + e^others) ] = E[ ln(1 + e^(others - own)) ], which keeps its digits where others << own."""
    return torch.logaddexp(others - own, torch.zeros_like(own)).mean()


def both_directions(u_q: Tensor, q: Tensor, p: Tensor, all_q: Tensor, all_p: Tensor, tau: float, row: int, tile: int):
    """For queries and for positives the logit of their own pair and the log-sum-exp over the others: own_q, over_p, own_p,
    over_q (B,). u_q: q's unit rows. Where own rows are all there are, the two directions share one pass over the logits; with
    other ranks' columns they are two products, for own rows are queries in one and positives in the other."""
    if all_q is q and all_p is p:
        own = (u_q * unit(p)).sum(1) / tau
        over_p, over_q = LogSumExp.apply(u_q, p, tau, 0, True, tile)
        return own, over_p, own, over_q
    u_p, rows = unit(p), slice(row, row + len(q))
    return ((u_q * unit(all_p[rows])).sum(1) / tau, LogSumExp.apply(u_q, all_p, tau, row, False, tile)[0],
            (u_p * unit(all_q[rows])).sum(1) / tau, LogSumExp.apply(u_p, all_q, tau, row, False, tile)[0])


@no_autocast
def pair_loss(q: Tensor, p: Tensor, tau: float, columns: tuple[Tensor, Tensor] | None = None, row: int = 0,
              tile: int = TILE) -> Tensor:
    """Equation (4), `equation_4` with the same arguments; tile: rows and columns whose logits are held at a time."""
    own_q, over_p, own_p, over_q = both_directions(unit(q), q, p, *(columns or (q, p)), tau, row, tile)
    return nll(own_q, over_p) + nll(own_p, over_q)


@no_autocast
def hard_negative_loss(q: Tensor, p: Tensor, n: Tensor, tau: float, columns: tuple[Tensor, Tensor, Tensor] | None = None,
                       row: int = 0, tile: int = TILE) -> Tensor:
    """Equation (5), `equation_5` with the same arguments; tile as in `pair_loss`."""
    all_q, all_p, all_n = columns or (q, p, n)
    u_q, all_n = unit(q), all_n.flatten(0, 1)
    own_q, over_p, own_p, over_q = both_directions(u_q, q, p, all_q, all_p, tau, row, tile)
    over_n, _ = LogSumExp.apply(u_q, all_n, tau, len(all_n), False, tile)
    return nll(own_q, torch.logaddexp(over_p, over_n)) + nll(own_p, over_q)
