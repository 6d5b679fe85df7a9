"""Equations (3), (4) and (5) against values worked out by hand; the tiled form against the printed
one. In every docstring k pairs, N negatives, temperature tau.
"""

import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from losses import hard_negative_loss, info_nce, info_nce_tiled, pair_loss

FORMS = [info_nce, info_nce_tiled]


def in_tiles(tile):
    return partial(info_nce_tiled, tile=tile)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_texts(k, N, D, seed=0, dtype=torch.float64):
    """q (k, D), p (k, D), n (k, N, D)"""
    shapes = (k, D), (k, D), (k, N, D)
    return [random(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes)]


def cosine(a, b):
    product = sum(x * y for x, y in zip(a, b))
    return product / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def printed_3(anchors, candidates, more, tau):
    """(3) as printed, over lists of floats; more: what the sum goes over besides the candidates."""
    total = 0.0
    for anchor, own in zip(anchors, candidates):
        denominator = sum(math.exp(cosine(anchor, x) / tau) for x in candidates + more)
        total += -math.log(math.exp(cosine(anchor, own) / tau) / denominator)
    return total / len(anchors)


def printed_4(q, p, tau):
    return printed_3(q, p, [], tau) + printed_3(p, q, [], tau)


def printed_5(q, p, n, tau):
    """n[i][j] is the j-th negative of record i."""
    return printed_3(q, p, [x for row in n for x in row], tau) + printed_3(p, q, [], tau)


def value_and_gradients(loss, texts, tau, columns=(), first_row=0, form=info_nce_tiled):
    """texts: q, p or q, p, n. The loss, and its gradients with respect to texts and columns, in
    float64."""
    leaves = [x.detach().clone().requires_grad_() for x in (*texts, *columns)]
    own, gathered = leaves[: len(texts)], tuple(leaves[len(texts) :])
    value = loss(*own, tau, columns=gathered or None, first_row=first_row, form=form)
    gradients = torch.autograd.grad(value, leaves, materialize_grads=True)
    return value.item(), [x.double() for x in gradients]


# by hand

@pytest.mark.parametrize("form", FORMS)
def test_info_nce_in_the_plane_by_hand(form):
    """q = (1,0), (0,1); p = (1,0), (1,0): s(q1,p) = 1, 1 and s(q2,p) = 0, 0. tau = 1.
    Queries among positives: both see two equal similarities: ln 2 = 0.6931.
    Positives among queries: p1 sees q1 at 1 and q2 at 0: ln(1 + e^-1) = 0.3133; p2 (own query q2
    at 0): ln(1 + e) = 1.3133; mean 0.8133."""
    q, p = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert form(q, [p], tau=1.0).item() == pytest.approx(0.6931, abs=1e-4)
    assert form(p, [q], tau=1.0).item() == pytest.approx(0.8133, abs=1e-4)


def test_pair_loss_is_the_sum_of_both_directions():
    """The two of the test above: 0.6931 + 0.8133 = 1.5064. Their mean would be 0.7532."""
    q, p = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert pair_loss(q, p, tau=1.0).item() == pytest.approx(1.5064, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_paper_s_temperature_divides_the_cosine(dtype):
    """k = 2, orthonormal q = p, tau = 0.05: 2 ln(1 + e^-20) = 2 * 2.0612e-9 = 4.1223e-9. In fp32,
    1 + e^-20 is 1."""
    q = torch.eye(2, dtype=dtype)
    assert pair_loss(q, q, tau=0.05).item() == pytest.approx(4.1223e-9, rel=1e-4)


@pytest.mark.parametrize("k, expected", [(2, 1.3863), (3, 2.1972), (8, 4.1589)])
def test_equal_similarities_count_the_pairs_a_text_is_contrasted_with(k, expected):
    """All similarities equal: every text is one of k, in both directions: 2 ln k."""
    loss = pair_loss(torch.ones(k, 4), torch.ones(k, 4), tau=0.05)
    assert loss.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("k, N, expected", [
    (1, 15, 2.7726), (2, 15, 4.1589), (4, 15, 5.5452), (3, 2, 3.2958)])
def test_equal_similarities_count_all_negatives_of_the_batch(k, N, expected):
    """A query is contrasted with k positives and all N k negatives: ln((N+1) k); a positive with k
    queries: ln k. k = 2, N = 15: ln 32 + ln 2 = 4.1589; with its own 15 negatives alone it would be
    ln 17 + ln 2 = 3.5264."""
    q, n = torch.ones(k, 4), torch.ones(k, N, 4)
    assert hard_negative_loss(q, q, n, tau=0.05).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("k, tau, expected", [(3, 1.0, 1.1029), (4, 0.5, 0.6815)])
def test_orthonormal_pairs(k, tau, expected):
    """q = p orthonormal: 1 for the own text, 0 for k-1 others: 2 ln(1 + (k-1) e^(-1/tau)).
    k = 3, tau = 1: 2 ln(1.7358) = 1.1029. k = 4, tau = 0.5: 2 ln(1.4060) = 0.6815."""
    loss = pair_loss(torch.eye(k), torch.eye(k), tau)
    assert loss.item() == pytest.approx(expected, abs=1e-4)


def test_hard_negative_loss_in_the_plane_by_hand():
    """k = 2, N = 1, tau = 1. q = p = (1,0), (0,1); n1 = (0,1), n2 = (-1,0).
    q1 sees p at 1, 0 and n at 0, -1: ln((e + 1 + 1 + e^-1) / e) = ln(1 + 2 e^-1 + e^-2) = 0.6265.
    q2 sees p at 0, 1 and n at 1, 0: ln(2 + 2 e^-1) = 1.0064. Mean 0.8165.
    p1, p2 see queries at 1, 0: ln(1 + e^-1) = 0.3133. Sum 1.1297: n1, the negative of record 1,
    hurts q2 most."""
    q, n = torch.eye(2), torch.tensor([[[0.0, 1.0]], [[-1.0, 0.0]]])
    assert hard_negative_loss(q, q, n, tau=1.0).item() == pytest.approx(1.1297, abs=1e-4)


def test_a_positive_is_contrasted_with_queries_only_and_a_negative_is_never_an_anchor():
    """q = p = e1, e2; both negatives (-1,-1), cosine -0.7071 with everything; tau = 1.
    Queries: ln(1 + e^-1 + 2 e^-1.7071) = ln 1.7307 = 0.5486. Positives: ln(1 + e^-1) = 0.3133. Sum
    0.8618. With the negatives in the positives' sums as well it would be 2 * 0.5486 = 1.0971."""
    q, n = torch.eye(2), -torch.ones(2, 1, 2)
    assert hard_negative_loss(q, q, n, tau=1.0).item() == pytest.approx(0.8618, abs=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_of_a_temperature_by_hand(form):
    """q = p = e1, e2, so L = 2 ln(1 + e^(-1/tau)), and with x = e^(-1/tau), dx/dtau = x / tau^2:
    dL/dtau = 2 x / (1 + x) / tau^2. tau = 1: 2 * 0.36788 / 1.36788 = 0.53788."""
    tau = torch.tensor(1.0, requires_grad=True)
    pair_loss(torch.eye(2), torch.eye(2), tau, form=form).backward()
    assert tau.grad.item() == pytest.approx(0.53788, abs=1e-5)


# as printed

@pytest.mark.parametrize("tau", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("form", FORMS)
def test_pair_loss_is_equation_4_as_printed(form, tau):
    q, p, _ = random_texts(5, 0, 3)
    expected = printed_4(q.tolist(), p.tolist(), tau)
    assert pair_loss(q, p, tau, form=form).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("tau", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("form", FORMS)
def test_hard_negative_loss_is_equation_5_as_printed(form, tau):
    q, p, n = random_texts(4, 2, 3)
    expected = printed_5(q.tolist(), p.tolist(), n.tolist(), tau)
    assert hard_negative_loss(q, p, n, tau, form=form).item() == pytest.approx(expected, rel=1e-12)


def test_without_negatives_equation_5_is_equation_4():
    q, p, n = random_texts(5, 0, 3)
    four = pair_loss(q, p, 0.05).item()
    assert hard_negative_loss(q, p, n, 0.05).item() == pytest.approx(four, rel=1e-12)


def test_length_does_not_matter():
    """Cosine is inside: texts of any length and scale give the loss of their directions."""
    q, p, n = random_texts(4, 2, 3)
    scale = torch.tensor([[0.1], [1], [7], [300]])
    four, five = pair_loss(q, p, 0.05).item(), hard_negative_loss(q, p, n, 0.05).item()
    assert pair_loss(q * scale, p * 5, 0.05).item() == pytest.approx(four, rel=1e-9)
    scaled = hard_negative_loss(q * scale, p / scale, n * 9, 0.05)
    assert scaled.item() == pytest.approx(five, rel=1e-9)


def test_the_order_of_pairs_and_negatives_does_not_matter():
    q, p, n = random_texts(6, 3, 4)
    rows, columns = torch.tensor([3, 0, 5, 1, 2, 4]), torch.tensor([2, 0, 1])
    four, five = pair_loss(q, p, 0.05).item(), hard_negative_loss(q, p, n, 0.05).item()
    assert pair_loss(q[rows], p[rows], 0.05).item() == pytest.approx(four, rel=1e-12)
    shuffled = hard_negative_loss(q[rows], p[rows], n[rows][:, columns], 0.05)
    assert shuffled.item() == pytest.approx(five, rel=1e-12)


def test_swapping_queries_and_positives_swaps_the_two_directions_of_equation_4():
    q, p, _ = random_texts(5, 0, 3)
    swapped = pair_loss(p, q, 0.05).item()
    assert pair_loss(q, p, 0.05).item() == pytest.approx(swapped, rel=1e-12)


def test_gradients_are_those_of_the_function():
    """By differences, for texts, columns and temperature."""
    q, p, n = (x.requires_grad_() for x in random_texts(4, 1, 2))
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    own, form = slice(1, 3), in_tiles(3)

    def four(q, p, tau):
        return pair_loss(q, p, tau, form=form)

    def five(q, p, n, tau):
        return hard_negative_loss(q, p, n, tau, form=form)

    def five_on_a_rank(q, p, n, tau):
        return hard_negative_loss(q[own], p[own], n[own], tau, (q, p, n), own.start, form)

    assert torch.autograd.gradcheck(four, (q, p, tau))
    assert torch.autograd.gradcheck(five, (q, p, n, tau))
    assert torch.autograd.gradcheck(five_on_a_rank, (q, p, n, tau))


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_mean_over_ranks_of_own_rows_against_all_columns_is_the_global_loss(world_size):
    """6 rows, W ranks with 6 / W rows each: (1/W) sum_r (mean over the rows of r) = mean over all
    rows. The same holds for the gradient with respect to every embedding, columns included: no
    factor W."""
    texts = [x.requires_grad_() for x in random_texts(6, 3, 4)]
    size = 6 // world_size
    for loss, inputs in (pair_loss, texts[:2]), (hard_negative_loss, texts):
        whole, mean = loss(*inputs, 0.05), 0
        for first in range(0, 6, size):
            own = [x[first : first + size] for x in inputs]
            mean += loss(*own, 0.05, columns=tuple(inputs), first_row=first) / world_size
        assert mean.item() == pytest.approx(whole.item(), rel=1e-12)
        expected = torch.autograd.grad(whole, inputs)
        for a, b in zip(torch.autograd.grad(mean, inputs), expected):
            assert torch.allclose(a, b, atol=1e-12)


# precision

@pytest.mark.parametrize("form", FORMS)
def test_bf16_embeddings_do_not_make_bf16_logits(form):
    """q1 = p1 = (1, 0); p2 at 45 degrees: logits 20 and 14.142 at tau = 0.05, which bf16 (spacing
    0.0625 at 14) would store as 14.125. L = mean over two queries and two positives of the same two
    numbers: 2 ln(1 + e^-5.858) = 5.707e-3. With bf16 logits it would be 2 ln(1 + e^-5.875) =
    5.610e-3."""
    q = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.bfloat16)
    loss = pair_loss(q, q, tau=0.05, form=form)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(5.7065e-3, rel=1e-3)


def test_autocast_around_the_loss_changes_nothing():
    """Orthonormal pairs, k = 512: 2 ln(1 + 511 e^-20) = 2.1065e-6, which bf16 logits would round to
    0. In fp32 a CPU's vector lane that holds the 1 loses what is added to it, with 8 lanes an
    eighth. In tiles the backward pass may be inside as well."""
    texts, identity = random_texts(8, 2, 16, dtype=torch.float32), torch.eye(512)
    outside, gradients = value_and_gradients(hard_negative_loss, texts, 0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [pair_loss(identity, identity, tau=0.05, form=form).item() for form in FORMS]
        inside, found = value_and_gradients(hard_negative_loss, texts, 0.05)
    assert losses == pytest.approx([2.1065e-6, 2.1065e-6], rel=0.2)
    assert inside == outside and all(map(torch.equal, found, gradients))


def test_bf16_embeddings_get_bf16_gradients_of_an_fp32_loss():
    texts = [x.requires_grad_() for x in random_texts(9, 2, 16, dtype=torch.bfloat16)]
    hard_negative_loss(*texts, 0.05, form=in_tiles(4)).backward()
    in_fp32 = [x.float() for x in texts]
    _, wanted = value_and_gradients(hard_negative_loss, in_fp32, 0.05, form=info_nce)
    for x, y in zip(texts, wanted):
        assert x.grad.dtype == torch.bfloat16 and (x.grad - y).norm() < 4e-3 * y.norm()


# tiles

@pytest.mark.parametrize("gathered", [0, 5], ids=["own rows", "gathered columns"])
@pytest.mark.parametrize("tau", [0.005, 0.02, 0.05, 1.0])
@pytest.mark.parametrize("k, N, D, tile", [
    (1, 0, 3, 2), (1, 15, 3, 4), (5, 1, 1, 1), (7, 0, 8, 3), (10, 15, 16, 4), (6, 1, 1024, 4),
    (6, 2, 8, 100)])
def test_tiles_change_neither_values_nor_gradients(k, N, D, tile, tau, gathered):
    """k own rows and G = k + 5 gathered ones, of which the own are those from row 2 on; neither a
    multiple of the tile. The gradient of an own pair's logit belongs to the column: as printed, it
    is the column that is looked up."""
    for loss, count in (pair_loss, 2), (hard_negative_loss, 3):
        texts, columns, first_row = random_texts(k, N, D)[:count], (), 0
        if gathered:
            columns, first_row = random_texts(k + gathered, N, D, seed=3)[:count], 2
        inputs = loss, texts, tau, columns, first_row
        expected, wanted = value_and_gradients(*inputs, form=info_nce)
        value, found = value_and_gradients(*inputs, form=in_tiles(tile))
        assert value == pytest.approx(expected, abs=1e-10)
        for x, y in zip(found, wanted):
            assert torch.allclose(x, y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("likeness", [0, 2], ids=["random pairs", "pairs alike"])
@pytest.mark.parametrize("tau", [0.02, 0.05, 1.0])
def test_fp32_tiles_are_within_rounding_of_fp64_as_printed(tau, likeness):
    """Values to 1e-7 / tau, what the rounding of a cosine makes of a logit, and the rounding of the
    loss; gradients to 1e-5."""
    q, p, n = random_texts(150, 3, 64, dtype=torch.float32)
    texts = q, p + likeness * q, n
    in_fp64 = [x.double() for x in texts]
    expected, wanted = value_and_gradients(hard_negative_loss, in_fp64, tau, form=info_nce)
    value, found = value_and_gradients(hard_negative_loss, texts, tau, form=in_tiles(64))
    assert value == pytest.approx(expected, rel=2e-7, abs=1e-7 / tau)
    for x, y in zip(found, wanted):
        assert (x - y).norm() < 1e-5 * y.norm()


def test_no_tensor_is_larger_than_a_tile_or_the_texts():
    """k = 256, N = 7, D = 4, tile 32: q has 1,024 elements and so has a tile; n and its gradient
    have 7,168, and may. The logits are 256 x 2,048 = 524,288."""
    q, p, n = (x.requires_grad_() for x in random_texts(256, 7, 4))
    large = set()

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            for x in tree_leaves(made):
                if isinstance(x, torch.Tensor) and x.numel() > 1024:
                    large.add(tuple(x.shape))
            return made

    with Shapes():
        pair_loss(q, p, 0.05, form=in_tiles(32)).backward()
        hard_negative_loss(q, p, n, 0.05, form=in_tiles(32)).backward()
    assert large == {(256, 7, 4), (256 * 7, 4)}


@pytest.mark.parametrize("scale", [0.0, 1e-13])
def test_zeros_have_cosine_0_and_finite_gradients(scale):
    """A row shorter than 1e-12 counts as x / 1e-12, as in torch's normalize: for zeros 0 to
    everything."""
    q, p, n = random_texts(5, 2, 3)
    q[1], p[2], n[3, 1] = q[1] * scale, p[2] * scale, n[3, 1] * scale
    expected, wanted = value_and_gradients(hard_negative_loss, (q, p, n), 0.5, form=info_nce)
    value, found = value_and_gradients(hard_negative_loss, (q, p, n), 0.5, form=in_tiles(2))
    assert value == pytest.approx(expected, abs=1e-10)
    for x, y in zip(found, wanted):
        assert x.isfinite().all() and torch.allclose(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_rows_in_any_order_in_memory_and_texts_that_take_no_gradient(frozen):
    whole = [random(3, 7, 2, seed=i) for i in range(3)]  # (D, k, N)
    texts = [whole[0][:, :, 0].T, whole[1][:, :, 1].T, whole[2].permute(1, 2, 0)]
    _, wanted = value_and_gradients(hard_negative_loss, texts, 0.05, form=info_nce)
    for i, x in enumerate(texts):
        x.requires_grad_(i != frozen)
    hard_negative_loss(*texts, 0.05, form=in_tiles(3)).backward()
    for i, (x, y) in enumerate(zip(texts, wanted)):
        assert x.grad is None if i == frozen else torch.allclose(x.grad, y, rtol=0, atol=1e-10)


def test_a_second_derivative_is_taken_as_printed_and_refused_in_tiles():
    q, p, _ = (x.requires_grad_() for x in random_texts(3, 0, 2))
    assert torch.autograd.gradgradcheck(partial(pair_loss, tau=0.2, form=info_nce), (q, p))
    with pytest.raises(NotImplementedError, match="info_nce has one"):
        torch.autograd.grad(pair_loss(q, p, 0.05), q, create_graph=True)
