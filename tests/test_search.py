"""Exact search against dense computations: every query against every text at once, in slow loops.
Vectors lie in the plane, at multiples of 30 degrees, so that many cosines are equal.
"""

import numpy as np
import pytest
import torch

from evaluation import search

RNG = np.random.default_rng(0)
QUERIES, OWN, TEXTS = (RNG.integers(12, size=size) * 30.0 for size in (9, 9, 40))
EXCLUDED = RNG.integers(9, size=60), RNG.integers(40, size=60)  # some cells twice


def plane(degrees):
    """-> (M, 2), unit vectors."""
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angle.cos(), angle.sin()], 1).float()


def chunks(size):
    return [chunk.numpy() for chunk in plane(TEXTS).split(size)]


@pytest.fixture(params=[1, 30, 10_000])
def at_once(request, monkeypatch):
    """So many cosines are there at a time."""
    monkeypatch.setattr(search, "SCORES_AT_ONCE", request.param)


@pytest.mark.parametrize("size", [1, 7, 40, 100])
def test_a_position_is_1_and_the_texts_as_near_or_nearer_however_they_are_cut(size, at_once):
    """Those that are not excluded; exact in whole angles, the smaller of d and 360 - d."""
    def distance(a, b):
        return min((a - b) % 360, (b - a) % 360)

    excluded = set(zip(*EXCLUDED))
    expected = [1 + sum(distance(q, text) <= distance(q, own)
                        for j, text in enumerate(TEXTS) if (i, j) not in excluded)
                for i, (q, own) in enumerate(zip(QUERIES, OWN))]
    found = search.positions(plane(QUERIES), plane(OWN), chunks(size), EXCLUDED)
    assert found.tolist() == expected


@pytest.mark.parametrize("size", [1, 7, 40, 100])
@pytest.mark.parametrize("count", [15, 45])
def test_the_nearest_are_the_first_of_all_sorted_cosines_however_they_are_cut(size, count, at_once):
    """Each at the position that it is said to be at, no position twice. 45 of 40 texts, some of
    them excluded, are all the others and then minus infinity."""
    dense = (plane(QUERIES) @ plane(TEXTS).T).numpy()
    dense[EXCLUDED] = -np.inf
    positions, cosines = search.nearest(plane(QUERIES), chunks(size), count, EXCLUDED)
    assert cosines[:, :40] == pytest.approx(-np.sort(-dense)[:, :count], abs=1e-6)
    assert (cosines[:, 40:] == -np.inf).all()
    for i, there in enumerate(np.isfinite(cosines)):
        assert cosines[i, there] == pytest.approx(dense[i, positions[i, there]], abs=1e-6)
        assert len(set(positions[i, there])) == there.sum()


@pytest.mark.parametrize("size", [1, 2, 50])
def test_an_order_decides_between_equal_cosines_however_they_are_cut(size):
    """The third text is the query; the cosines of the first two, 0.6 and 0.6 + 6e-8, are equal to
    TIE, and those of fifty others 0. Of two results, the second is the one of the first two with
    the higher number, next to each other though these are."""
    texts = np.float32([[0.6, 0.8], [0.60000006, 0.8], [1, 0], *[[0, 1]] * 50])
    pieces = [texts[i : i + size] for i in range(0, 53, size)]
    nothing = np.empty(0, int), np.empty(0, int)
    for order, expected in ([1, 0], [2, 0]), ([0, 1], [2, 1]):
        order = np.array([*order, *range(2, 53)])
        index, cosines = search.nearest(plane([0.0]), iter(pieces), 2, nothing, order)
        assert index.tolist() == [expected]
        assert cosines.tolist() == [pytest.approx([1, 0.6], abs=1e-9)]


def test_chunks_may_be_files(tmp_path):
    """As `curation` keeps them."""
    files = [tmp_path / f"{i}.npy" for i in range(6)]
    for file, chunk in zip(files, chunks(7)):
        np.save(file, chunk)
    for found, want in zip(search.nearest(plane(QUERIES), files, 15, EXCLUDED),
                           search.nearest(plane(QUERIES), chunks(7), 15, EXCLUDED)):
        assert (found == want).all()
