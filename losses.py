"""The loss functions of §5: InfoNCE, equation (3); both directions of it for pairs, equation (4);
and for pairs with negatives, equation (5).

Letters are the paper's: q queries, p positives, n negatives, k pairs in the batch, s cosine
similarity, tau temperature, L(B) the loss of a batch B. Axis letters, of shapes: B own rows, G
gathered rows (G = B in one process), N negatives per row, D width. Nothing here knows about models
or text. Of ranks it knows only where its own rows begin among the gathered ones: with `columns`, a
rank computes the mean over its *own* rows against *everybody's* columns. The mean of that over
ranks of equal size is the loss of the global batch, so no factor of the number of ranks belongs
anywhere, here or in the caller.

Equation (3) has two forms. `info_nce` is it as printed, and holds all its logits: (5) has B x G (N
+ 1) of them, 69 GB at B = G = 32,768, N = 15, several times over. `info_nce_tiled`, which trains,
is the same function of the same arguments, a tile of the logits at a time. (4) and (5) are sums of
two of either.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import reduce, wraps

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows and columns. On a CPU 512 is as fast, 2048 up to a fifth slower; on an H200 32,768 pairs take
# 2.7 times as long at 1024 as at 4096.
TILE = {"cpu": 1024, "cuda": 4096}


def no_autocast(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An autocast around the call would make bf16 logits of the fp32 vectors: see `unit`."""
    @wraps(loss)
    def without(anchors: Tensor, *others, **more) -> Tensor:
        with torch.autocast(anchors.device.type, enabled=False):
            return loss(anchors, *others, **more)
    return without


def unit(x: Tensor) -> Tensor:
    """Rows of length 1, so that a product of two is their cosine; at least fp32. At tau = 0.05 a
    bf16 logit is off by up to 0.06 (logits reach 20, where bf16's numbers are 0.125 apart): enough
    to turn a loss of 5e-5 into 0."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


# the equations

@no_autocast
def info_nce(anchors: Tensor, candidates: Sequence[Tensor], tau: float | Tensor,
             first_row: int = 0) -> Tensor:
    """Equation (3), §5.1, as printed.

        L_pairs(B) = E[ -ln  exp(s(q,p)/tau) / sum_{i=1..k} exp(s(q,p_i)/tau) ]

    anchors: the q, (B, D), any length. candidates: blocks, (G, D) and whatever else an anchor is
    contrasted with, (C, D); the sum goes over them all. The p of anchor i is row first_row + i of
    the first block. -> scalar, fp32 (float64 for float64 input).
    """
    u = unit(anchors)
    logits = torch.cat([u @ unit(block).T for block in candidates], dim=1) / tau  # (B, G + ...)
    own = torch.arange(first_row, first_row + len(anchors), device=anchors.device)
    return F.cross_entropy(logits, own)


@no_autocast
def info_nce_tiled(anchors: Tensor, candidates: Sequence[Tensor], tau: float | Tensor,
                   first_row: int = 0, tile: int | None = None) -> Tensor:
    """Equation (3), `info_nce` with the same arguments, tile by tile; tile: rows and columns of
    one, by default TILE's.

        -ln  e^own / (e^own + e^others)  =  ln(1 + e^(others - own))

    with others = ln sum of e^logit over all other candidates: this form keeps its digits where
    others << own. It has no second derivative.
    """
    u, first_block = unit(anchors) / tau, candidates[0]
    tile = tile or TILE[anchors.device.type]
    own = (u * unit(first_block[first_row : first_row + len(anchors)])).sum(1)
    others = [LogSumExp.apply(u, first_block, first_row, tile)]
    others += [LogSumExp.apply(u, block, len(block), tile) for block in candidates[1:]]
    return torch.logaddexp(reduce(torch.logaddexp, others) - own, torch.zeros_like(own)).mean()


def pair_loss(q: Tensor, p: Tensor, tau: float | Tensor,
              columns: tuple[Tensor, Tensor] | None = None, first_row: int = 0,
              form: Callable[..., Tensor] = info_nce_tiled) -> Tensor:
    """Equation (4), §5.1: the *sum* of both directions.

        L(B) = E[ -ln  exp(s(q,p)/tau) / sum_{i=1..k} exp(s(q,p_i)/tau) ]   a query among positives
             + E[ -ln  exp(s(p,q)/tau) / sum_{i=1..k} exp(s(p,q_i)/tau) ]   a positive among queries

    q, p: (B, D), any length. columns: (all_q, all_p), (G, D) each, when the batch is larger than
    the own rows; first_row: where the own rows begin in them. form: info_nce_tiled or info_nce. ->
    scalar.
    """
    all_q, all_p = columns or (q, p)
    return form(q, [all_p], tau, first_row) + form(p, [all_q], tau, first_row)


def hard_negative_loss(q: Tensor, p: Tensor, n: Tensor, tau: float | Tensor,
                       columns: tuple[Tensor, Tensor, Tensor] | None = None, first_row: int = 0,
                       form: Callable[..., Tensor] = info_nce_tiled) -> Tensor:
    """Equation (5), §5.2: L_NCE+ for records (q, p, n_1 .. n_N), N = 15 in the paper.

        L(B) = E[ -ln  exp(s(q,p)/tau)
                     / sum_{i=1..k} ( exp(s(q,p_i)/tau) + sum_{j=1..N} exp(s(q,n_{j,i})/tau) ) ]
             + E[ -ln  exp(s(p,q)/tau) / sum_{i=1..k} exp(s(p,q_i)/tau) ]

    A query sees the k positives and all N k negatives of the batch, not only its own; a positive
    sees the k queries; a negative is never an anchor. q, p: (B, D); n: (B, N, D); columns: (all_q,
    all_p, all_n), (G, D), (G, D), (G, N, D); first_row, form: as in `pair_loss`. -> scalar.
    """
    all_q, all_p, all_n = columns or (q, p, n)
    all_n = all_n.flatten(0, 1)  # (G N, D)
    return form(q, [all_p, all_n], tau, first_row) + form(p, [all_q], tau, first_row)


# tiles

class LogSumExp(torch.autograd.Function):
    """u (B, D); v (C, D), any length -> (B,): ln sum_j exp(u_i . v_j / |v_j|) for every i, without
    the own pair j = i + first_row; with first_row = C there is none.

    Only these sums are kept between forward and backward; both make the logits, tile by tile."""

    @staticmethod
    def forward(ctx, u: Tensor, v: Tensor, first_row: int, tile: int) -> Tensor:
        sums = u.new_full(u.shape[:1], torch.finfo(u.dtype).min)  # finite: -inf - -inf is no number
        for columns in tiles(len(v), tile):
            w = unit(v[columns])
            for rows, logits in logit_tiles(u, w, first_row - columns.start, tile):
                sums[rows] = torch.logaddexp(sums[rows], logits.logsumexp(1))
        ctx.save_for_backward(u, v, sums)
        ctx.numbers = first_row, tile
        return sums

    @staticmethod
    def backward(ctx, g: Tensor):
        """With w_j = v_j / |v_j| and d_ij = g_i exp(u_i . w_j - sums_i), as d ln sum_j e^(x_j) / d
        x_j = e^(x_j - ln sum_j e^(x_j)):

            du_i = sum_j d_ij w_j,   dw_j = sum_i d_ij u_i,   dv_j = dw_j through w_j's own gradient
        """
        if torch.is_grad_enabled():  # once_differentiable lets autograd.grad pass, a term short
            raise NotImplementedError("info_nce_tiled has no second derivative; info_nce has one")
        u, v, sums = ctx.saved_tensors
        first_row, tile = ctx.numbers
        needs_u, needs_v, *_ = ctx.needs_input_grad
        du = torch.zeros_like(u) if needs_u else None
        dv = torch.zeros_like(v) if needs_v else None
        with torch.autocast(u.device.type, enabled=False):
            for columns in tiles(len(v), tile):
                w, gradient_through_unit = torch.func.vjp(unit, v[columns])
                dw = torch.zeros_like(w)
                for rows, logits in logit_tiles(u, w, first_row - columns.start, tile):
                    d = (logits - sums[rows, None]).exp_().mul_(g[rows, None])
                    if needs_u:
                        du[rows].addmm_(d, w)
                    if needs_v:
                        dw.addmm_(d.T, u[rows])
                if needs_v:
                    dv[columns], = gradient_through_unit(dw)
        return du, dv, None, None


def tiles(count: int, tile: int) -> Iterator[slice]:
    return (slice(start, start + tile) for start in range(0, count, tile))


def logit_tiles(u: Tensor, w: Tensor, first_row: int, tile: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows of u and their products with w; that of an own pair, j = i + first_row, is -inf."""
    for rows in tiles(len(u), tile):
        logits = u[rows] @ w.T
        # empty where the own pairs are in another tile
        logits.diagonal(rows.start + first_row).fill_(-torch.inf)
        yield rows, logits
