"""search.py against dense computations: every query against every text at once, in slow loops. Vectors lie in the plane, at
multiples of 30 degrees, so that many cosines are equal."""

import json

import numpy as np
import pytest
import torch

import data
from corpora import formats
from curation import pool as pools
from evaluation import search


def plane(degrees):
    """-> (M, 2), unit vectors."""
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angle.cos(), angle.sin()], 1).float()


RNG = np.random.default_rng(0)
QUERIES, OWN, TEXTS = (RNG.integers(12, size=size) * 30.0 for size in (9, 9, 40))
BARRED = RNG.integers(9, size=60), RNG.integers(40, size=60)  # some cells twice


def corpus(folder, fields=None, /, **sources):
    """Opens sources of rows [query, positive, negative ...]; fields: {source: what else its manifest entry says}."""
    manifest = [{"name": name, "path": f"{name}.jsonl", **(fields or {}).get(name, {})} for name in sources]
    for name, rows in sources.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "m.json").write_text(json.dumps(manifest))
    return data.load_sources(folder / "m.json")


def texts(pool):
    return [pool.text(i) for i in range(len(pool))]


@pytest.mark.parametrize("size", [1, 7, 40, 100])
@pytest.mark.parametrize("at_once", [1, 30, 10_000])
def test_ranks_and_nearest_are_those_of_all_cosines_at_once_however_they_are_cut(size, at_once, monkeypatch):
    """A rank is 1 + the texts as near or nearer that are not barred: exact in whole angles, the smaller of d and 360 - d. The
    nearest are the first of the sorted cosines, each of the place it is said to be of, no place twice; 45 of 40 texts, some of
    them barred, are all the others and then minus infinity."""
    def distance(a, b):
        return min((a - b) % 360, (b - a) % 360)

    monkeypatch.setattr(search, "SCORES_AT_ONCE", at_once)
    out, chunks = set(zip(*BARRED)), [chunk.numpy() for chunk in plane(TEXTS).split(size)]
    expected = [1 + sum(distance(q, text) <= distance(q, own) for j, text in enumerate(TEXTS) if (i, j) not in out)
                for i, (q, own) in enumerate(zip(QUERIES, OWN))]
    assert search.positions(plane(QUERIES), plane(OWN), chunks, BARRED).tolist() == expected
    dense = (plane(QUERIES) @ plane(TEXTS).T).numpy()
    dense[BARRED] = -np.inf
    for count in 15, 45:
        places, cosines = search.nearest(plane(QUERIES), chunks, count, BARRED)
        assert cosines[:, :40] == pytest.approx(-np.sort(-dense)[:, :count], abs=1e-6) and (cosines[:, 40:] == -np.inf).all()
        for i, there in enumerate(np.isfinite(cosines)):
            assert cosines[i, there] == pytest.approx(dense[i, places[i, there]], abs=1e-6)
            assert len(set(places[i, there])) == there.sum()


# pools of texts

def test_a_pool_holds_every_text_once_by_key_and_none_that_is_held_out(tmp_path):
    """p1 stands four times, once in capitals and twice as a negative. "out" is held out by b's eval file: as a negative of a it
    is no text of the pool. Texts are in the order of their keys."""
    (tmp_path / "eval.jsonl").write_text('["e", "out"]\n')
    a, b = corpus(tmp_path, {"b": {"eval": "eval.jsonl"}},
                  a=[["q0", "p0", "p1", "n0", "OUT"], ["q1", "p1"], ["q2", "P1", "n0"]],
                  b=[["q3", "p3", " p1"], ["q4", "out"]])
    pool = pools.Pool([pools.positives(a, a.train), pools.negatives(a, a.train), pools.negatives(b, b.train)])
    assert sorted(formats.text_hash(text) for text in texts(pool)) == sorted(map(formats.text_hash, ["p0", "p1", "n0"]))
    assert pool.hashes.tolist() == sorted(pool.hashes.tolist()) == [formats.text_hash(text) for text in texts(pool)]
    there, places = pool.find(np.array([formats.text_hash(text) for text in ("none", "N0", "out", "p0")], "<u8"))
    assert there.tolist() == [1, 3] and [pool.text(place) for place in places] == ["n0", "p0"]


def test_so_many_texts_of_a_pool_are_drawn_at_random_by_the_seed(tmp_path):
    """Of 19 targets: 8 by two seeds differ, by one seed are the same; 19 and more are all. Drawn 40 times, every text comes
    (the chance that one does not is below 19 (11/19)^40 = 6e-9)."""
    source, = corpus(tmp_path, a=[[f"q{i}", f"p{i}"] for i in range(19)])
    drawn = [texts(pools.Pool([pools.positives(source, source.train)], 8, seed)) for seed in range(40)]
    assert all(len(set(some)) == 8 for some in drawn) and set().union(*drawn) == {f"p{i}" for i in range(19)}
    assert drawn[0] != drawn[1] and drawn[0] == texts(pools.Pool([pools.positives(source, source.train)], 8, 0))
    assert all(len(pools.Pool([pools.positives(source, source.train)], count)) == 19 for count in (19, 20, None))


def test_barred_are_the_query_s_own_text_and_its_positives_in_any_source_or_collection(tmp_path):
    """q has the positives p0 and p1 in a, x0 in b and y in a's collection; x0 and "q" itself are negatives of a's second row,
    whose query r has p2 alone. z of the collection is a text of the pool, "out", held out by a, is none."""
    for name, rows in ("more", '["q", "y"]\n["s", "z"]\n["t", "out"]\n'), ("eval", '["e", "out"]\n'):
        (tmp_path / f"{name}.jsonl").write_text(rows)
    a, b = corpus(tmp_path, {"a": {"eval": "eval.jsonl", "collection": "more.jsonl"}},
                  a=[["q", "p0", "n0"], ["r", "p2", "X0", "q"], ["Q", "p1"]], b=[["q", "x0"], ["s", "n0"]])
    retriever = pools.Retriever(a, [a, b], None, None)
    assert sorted(texts(retriever.pool)) == ["X0", "n0", "p0", "p1", "p2", "q", "y", "z"] and len(a.train) == 3
    barred = [set() for _ in range(3)]
    for i, place in zip(*retriever.excluded(np.arange(3))):
        barred[i].add(retriever.pool.text(place))
    assert barred == [{"q", "p0", "p1", "X0", "y"}, {"p2"}, {"q", "p0", "p1", "X0", "y"}]
