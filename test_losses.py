"""Equations (4) and (5) against values worked out by hand, and in tiles against as printed. In every docstring k pairs, N
negatives, temperature tau."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from losses import equation_4, equation_5, hard_negative_loss, pair_loss


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def loops_4(q, p, tau):
    """§5.1 as printed, over lists of floats."""
    k, s = len(q), cosine
    forward = sum(-math.log(math.exp(s(q[r], p[r]) / tau) / sum(math.exp(s(q[r], p[i]) / tau) for i in range(k)))
                  for r in range(k)) / k
    reverse = sum(-math.log(math.exp(s(p[r], q[r]) / tau) / sum(math.exp(s(p[r], q[i]) / tau) for i in range(k)))
                  for r in range(k)) / k
    return forward + reverse


def loops_5(q, p, n, tau):
    """§5.2 as printed: n[i][j] is the j-th negative of record i."""
    k, s = len(q), cosine
    total = 0.0
    for r in range(k):
        denominator = sum(math.exp(s(q[r], p[i]) / tau) + sum(math.exp(s(q[r], n_ji) / tau) for n_ji in n[i])
                          for i in range(k))
        total += -math.log(math.exp(s(q[r], p[r]) / tau) / denominator) / k
        total += -math.log(math.exp(s(p[r], q[r]) / tau) / sum(math.exp(s(p[r], q[i]) / tau) for i in range(k))) / k
    return total


def value_and_gradients(loss, texts, tau, columns=(), row=0, **keyword):
    """texts: q, p or q, p, n. The loss, and its gradients with respect to them and the columns, in float64."""
    leaves = [x.detach().clone().requires_grad_() for x in (*texts, *columns)]
    value = loss(*leaves[: len(texts)], tau, columns=tuple(leaves[len(texts) :]) or None, row=row, **keyword)
    return value.item(), [x.double() for x in torch.autograd.grad(value, leaves, materialize_grads=True)]


def test_pair_loss_in_the_plane_by_hand():
    """q = (1,0), (0,1); p = (1,0), (1,0): s(q1,p) = 1, 1 and s(q2,p) = 0, 0. tau = 1.
    Queries: both see two equal similarities: ln 2 each, mean ln 2 = 0.6931.
    Positives: p1 sees q1 at 1 and q2 at 0: ln(1 + e^-1) = 0.3133; p2 (own query q2 at 0): ln(1 + e) = 1.3133; mean 0.8133.
    Sum 1.5064; the mean of the two directions would be 0.7532."""
    q, p = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert pair_loss(q, p, tau=1.0).item() == pytest.approx(1.5064, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_paper_s_temperature_divides_the_cosine(dtype):
    """k = 2, orthonormal q = p, tau = 0.05: 2 ln(1 + e^-20) = 2 * 2.0612e-9 = 4.1223e-9. In fp32, 1 + e^-20 is 1."""
    q = torch.eye(2, dtype=dtype)
    assert pair_loss(q, q, tau=0.05).item() == pytest.approx(4.1223e-9, rel=1e-4)


@pytest.mark.parametrize("k, expected", [(2, 1.3863), (3, 2.1972), (8, 4.1589)])
def test_equal_similarities_count_the_pairs_a_text_is_contrasted_with(k, expected):
    """All similarities equal: every text is one of k, in both directions: 2 ln k."""
    assert pair_loss(torch.ones(k, 4), torch.ones(k, 4), tau=0.05).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("k, N, expected", [(1, 15, 2.7726), (2, 15, 4.1589), (4, 15, 5.5452), (3, 2, 3.2958)])
def test_equal_similarities_count_all_negatives_of_the_batch(k, N, expected):
    """A query is contrasted with k positives and all N k negatives: ln((N+1) k); a positive with k queries: ln k.
    k = 2, N = 15: ln 32 + ln 2 = 4.1589; with its own 15 negatives alone it would be ln 17 + ln 2 = 3.5264."""
    loss = hard_negative_loss(torch.ones(k, 4), torch.ones(k, 4), torch.ones(k, N, 4), tau=0.05)
    assert loss.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("k, tau, expected", [(3, 1.0, 1.1029), (4, 0.5, 0.6815)])
def test_orthonormal_pairs(k, tau, expected):
    """q = p orthonormal: 1 for the own text, 0 for k-1 others: 2 ln(1 + (k-1) e^(-1/tau)).
    k = 3, tau = 1: 2 ln(1.7358) = 1.1029. k = 4, tau = 0.5: 2 ln(1.4060) = 0.6815."""
    assert pair_loss(torch.eye(k), torch.eye(k), tau).item() == pytest.approx(expected, abs=1e-4)


def test_hard_negative_loss_in_the_plane_by_hand():
    """k = 2, N = 1, tau = 1. q = p = (1,0), (0,1); n1 = (0,1), n2 = (-1,0).
    q1 sees p at 1, 0 and n at 0, -1: ln((e + 1 + 1 + e^-1) / e) = ln(1 + 2 e^-1 + e^-2) = 0.6265.
    q2 sees p at 0, 1 and n at 1, 0: ln(2 + 2 e^-1) = 1.0064. Mean 0.8165.
    p1, p2 see queries at 1, 0: ln(1 + e^-1) = 0.3133. Sum 1.1297: n1, the negative of record 1, hurts q2 most."""
    q, n = torch.eye(2), torch.tensor([[[0.0, 1.0]], [[-1.0, 0.0]]])
    assert hard_negative_loss(q, q, n, tau=1.0).item() == pytest.approx(1.1297, abs=1e-4)


@pytest.mark.parametrize("tau", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("loss", [pair_loss, equation_4])
def test_pair_loss_is_equation_4_as_printed(loss, tau):
    q, p = random(5, 3, seed=1), random(5, 3, seed=2)
    assert loss(q, p, tau).item() == pytest.approx(loops_4(q.tolist(), p.tolist(), tau), rel=1e-12)


@pytest.mark.parametrize("tau", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("loss", [hard_negative_loss, equation_5])
def test_hard_negative_loss_is_equation_5_as_printed(loss, tau):
    q, p, n = random(4, 3, seed=1), random(4, 3, seed=2), random(4, 2, 3, seed=3)
    assert loss(q, p, n, tau).item() == pytest.approx(loops_5(q.tolist(), p.tolist(), n.tolist(), tau), rel=1e-12)


def test_without_negatives_equation_5_is_equation_4():
    q, p = random(5, 3, seed=1), random(5, 3, seed=2)
    assert hard_negative_loss(q, p, random(5, 0, 3), 0.05).item() == pytest.approx(pair_loss(q, p, 0.05).item(), rel=1e-12)


def test_a_positive_is_contrasted_with_queries_only_and_a_negative_is_never_an_anchor():
    """q = p = e1, e2; both negatives (-1,-1), cosine -0.7071 with everything; tau = 1.
    Queries: ln(1 + e^-1 + 2 e^-1.7071) = ln 1.7307 = 0.5486. Positives: ln(1 + e^-1) = 0.3133. Sum 0.8618.
    With the negatives in the positives' sums as well it would be 2 * 0.5486 = 1.0971."""
    q, n = torch.eye(2), -torch.ones(2, 1, 2)
    assert hard_negative_loss(q, q, n, tau=1.0).item() == pytest.approx(0.8618, abs=1e-4)


def test_length_does_not_matter():
    """Cosine is inside: texts of any length and scale give the loss of their directions."""
    q, p, n, scale = random(4, 3), random(4, 3, seed=1), random(4, 2, 3, seed=2), torch.tensor([[0.1], [1], [7], [300]])
    assert pair_loss(q * scale, p * 5, 0.05).item() == pytest.approx(pair_loss(q, p, 0.05).item(), rel=1e-9)
    scaled = hard_negative_loss(q * scale, p / scale, n * 9, 0.05)
    assert scaled.item() == pytest.approx(hard_negative_loss(q, p, n, 0.05).item(), rel=1e-9)


def test_the_order_of_pairs_and_negatives_does_not_matter():
    q, p, n = random(6, 4), random(6, 4, seed=1), random(6, 3, 4, seed=2)
    rows, columns = torch.tensor([3, 0, 5, 1, 2, 4]), torch.tensor([2, 0, 1])
    assert pair_loss(q[rows], p[rows], 0.05).item() == pytest.approx(pair_loss(q, p, 0.05).item(), rel=1e-12)
    shuffled = hard_negative_loss(q[rows], p[rows], n[rows][:, columns], 0.05)
    assert shuffled.item() == pytest.approx(hard_negative_loss(q, p, n, 0.05).item(), rel=1e-12)


def test_swapping_queries_and_positives_swaps_the_two_directions_of_equation_4():
    q, p = random(5, 3, seed=1), random(5, 3, seed=2)
    assert pair_loss(q, p, 0.05).item() == pytest.approx(pair_loss(p, q, 0.05).item(), rel=1e-12)


def test_gradients_are_those_of_the_function():
    q, p, n = (random(*shape, seed=i).requires_grad_() for i, shape in enumerate([(4, 2), (4, 2), (4, 1, 2)]))
    assert torch.autograd.gradcheck(lambda q, p: pair_loss(q, p, 0.2, tile=3), (q, p))
    assert torch.autograd.gradcheck(lambda q, p, n: hard_negative_loss(q, p, n, 0.2, tile=3), (q, p, n))
    own = slice(1, 3)
    assert torch.autograd.gradcheck(
        lambda q, p, n: hard_negative_loss(q[own], p[own], n[own], 0.2, (q, p, n), own.start, tile=3), (q, p, n))


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_mean_over_ranks_of_own_rows_against_all_columns_is_the_global_loss(world_size):
    """6 rows, W ranks with 6 / W rows each: (1/W) sum_r (mean over the rows of r) = mean over all rows. The same holds for
    the gradient with respect to every embedding, columns included: no factor W."""
    q, p, n = (random(6, *rest, seed=i).requires_grad_() for i, rest in enumerate([(4,), (4,), (3, 4)]))
    parts = [slice(r * 6 // world_size, (r + 1) * 6 // world_size) for r in range(world_size)]
    for whole, by_rank in [
        (pair_loss(q, p, 0.05), [pair_loss(q[i], p[i], 0.05, columns=(q, p), row=i.start) for i in parts]),
        (hard_negative_loss(q, p, n, 0.05),
         [hard_negative_loss(q[i], p[i], n[i], 0.05, columns=(q, p, n), row=i.start) for i in parts]),
    ]:
        mean = sum(by_rank) / world_size
        assert mean.item() == pytest.approx(whole.item(), rel=1e-12)
        for a, b in zip(*(torch.autograd.grad(x, (q, p, n), retain_graph=True, allow_unused=True) for x in (mean, whole))):
            assert a is b is None or torch.allclose(a, b, atol=1e-12)


def test_bf16_embeddings_do_not_make_bf16_logits():
    """q1 = p1 = (1, 0); p2 at 45 degrees: logits 20 and 14.142 at tau = 0.05, which bf16 (spacing 0.0625 at 14) would store
    as 14.125. L = mean over two queries and two positives of the same two numbers: 2 ln(1 + e^-5.858) = 5.707e-3. With bf16
    logits it would be 2 ln(1 + e^-5.875) = 5.610e-3."""
    q = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.bfloat16)
    loss = pair_loss(q, q, tau=0.05)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(5.7065e-3, rel=1e-3)


def test_autocast_around_the_loss_changes_nothing():
    """Orthonormal pairs, k = 512: 2 ln(1 + 511 e^-20) = 2.1065e-6, which bf16 logits would round to 0."""
    texts = [random(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate([(8, 16), (8, 16), (8, 2, 16)])]
    outside, gradients = value_and_gradients(hard_negative_loss, texts, 0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pair_loss(torch.eye(512), torch.eye(512), tau=0.05).item() == pytest.approx(2.1065e-6, abs=3e-7)
        inside, found = value_and_gradients(hard_negative_loss, texts, 0.05)
    assert inside == outside and all(map(torch.equal, found, gradients))


@pytest.mark.parametrize("gathered", [0, 5], ids=["own rows", "gathered columns"])
@pytest.mark.parametrize("tau", [0.005, 0.02, 0.05, 1.0])
@pytest.mark.parametrize("k, N, D, tile", [(1, 0, 3, 2), (1, 15, 3, 4), (5, 1, 1, 1), (7, 0, 8, 3), (10, 15, 16, 4),
                                           (6, 1, 1024, 4), (6, 2, 8, 100)])
def test_tiles_change_neither_values_nor_gradients(k, N, D, tile, tau, gathered):
    """k own rows and G = k + 5 gathered ones, of which the own are those from row 2 on; neither a multiple of the tile. The
    gradient of an own pair's logit belongs to the column: as printed, it is the column that is looked up."""
    shapes = [(D,), (D,), (N, D)]
    for printed, tiled, count in [(equation_4, pair_loss, 2), (equation_5, hard_negative_loss, 3)]:
        texts = [random(k, *shape, seed=i) for i, shape in enumerate(shapes[:count])]
        columns = [random(k + gathered, *shape, seed=i + 3) for i, shape in enumerate(shapes[:count])] if gathered else ()
        arguments = texts, tau, columns, 2 if gathered else 0
        expected, wanted = value_and_gradients(printed, *arguments)
        value, found = value_and_gradients(tiled, *arguments, tile=tile)
        assert value == pytest.approx(expected, abs=1e-10)
        for x, y in zip(found, wanted):
            assert torch.allclose(x, y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("likeness", [0, 2], ids=["random pairs", "pairs alike"])
@pytest.mark.parametrize("tau", [0.02, 0.05, 1.0])
def test_fp32_tiles_are_within_rounding_of_fp64_as_printed(tau, likeness):
    """Values to 1e-7 / tau, what the rounding of a cosine makes of a logit, and the rounding of the loss; gradients to 1e-5."""
    q, p, n = (random(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate([(150, 64), (150, 64), (150, 3, 64)]))
    texts = q, p + likeness * q, n
    expected, wanted = value_and_gradients(equation_5, [x.double() for x in texts], tau)
    value, found = value_and_gradients(hard_negative_loss, texts, tau, tile=64)
    assert value == pytest.approx(expected, rel=2e-7, abs=1e-7 / tau)
    for x, y in zip(found, wanted):
        assert (x - y).norm() < 1e-5 * y.norm()


def test_no_tensor_is_larger_than_a_tile_or_the_texts():
    """k = 256, N = 7, D = 4, tile 32: q has 1,024 elements and so has a tile; n and its gradient have 7,168, and may. The
    logits are 256 x 2,048 = 524,288."""
    q, p, n = (random(256, *rest, seed=i).requires_grad_() for i, rest in enumerate([(4,), (4,), (7, 4)]))
    large = set()

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            large.update(tuple(x.shape) for x in tree_leaves(made) if isinstance(x, torch.Tensor) and x.numel() > 1024)
            return made

    with Shapes():
        (pair_loss(q, p, 0.05, tile=32) + hard_negative_loss(q, p, n, 0.05, tile=32)).backward()
    assert large == {(256, 7, 4), (256 * 7, 4)}


def test_zeros_have_cosine_0_and_finite_gradients():
    """A row shorter than 1e-12 counts as x / 1e-12, as in torch's normalize: for zeros 0 to everything."""
    for scale in (0.0, 1e-13):
        q, p, n = random(5, 3), random(5, 3, seed=1), random(5, 2, 3, seed=2)
        q[1], p[2], n[3, 1] = q[1] * scale, p[2] * scale, n[3, 1] * scale
        expected, wanted = value_and_gradients(equation_5, (q, p, n), 0.5)
        value, found = value_and_gradients(hard_negative_loss, (q, p, n), 0.5, tile=2)
        assert value == pytest.approx(expected, abs=1e-10)
        for x, y in zip(found, wanted):
            assert x.isfinite().all() and torch.allclose(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_rows_in_any_order_in_memory_and_texts_that_take_no_gradient(frozen):
    whole = [random(3, 7, 2, seed=i) for i in range(3)]  # (D, k, N)
    texts = [whole[0][:, :, 0].T, whole[1][:, :, 1].T, whole[2].permute(1, 2, 0)]
    wanted = value_and_gradients(equation_5, texts, 0.05)[1]
    for i, x in enumerate(texts):
        x.requires_grad_(i != frozen)
    hard_negative_loss(*texts, 0.05, tile=3).backward()
    for i, (x, y) in enumerate(zip(texts, wanted)):
        assert x.grad is None if i == frozen else torch.allclose(x.grad, y, rtol=0, atol=1e-10)


def test_bf16_embeddings_get_bf16_gradients_of_an_fp32_loss():
    shapes = (9, 16), (9, 16), (9, 2, 16)
    texts = [random(*shape, seed=i, dtype=torch.bfloat16).requires_grad_() for i, shape in enumerate(shapes)]
    hard_negative_loss(*texts, 0.05, tile=4).backward()
    for x, y in zip(texts, value_and_gradients(equation_5, [x.float() for x in texts], 0.05)[1]):
        assert x.grad.dtype == torch.bfloat16 and (x.grad - y).norm() < 4e-3 * y.norm()


def test_a_second_derivative_is_refused():
    q = random(3, 2).requires_grad_()
    with pytest.raises(NotImplementedError, match="equation_4"):
        torch.autograd.grad(pair_loss(q, random(3, 2, seed=1), 0.05), q, create_graph=True)
