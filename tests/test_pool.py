"""Pools of texts, and what is known of them, on toy sources small enough to list."""

import json

import numpy as np

import data
from corpora.formats import text_hash
from curation.pool import Pool, Retriever, negatives, positives


def corpus(folder, fields=None, /, **sources):
    """Opens sources of rows [query, positive, negative ...]; fields: {source: what else its
    manifest entry says}."""
    manifest = []
    for name, rows in sources.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        more = (fields or {}).get(name, {})
        manifest.append({"name": name, "path": f"{name}.jsonl", **more})
    (folder / "m.json").write_text(json.dumps(manifest))
    return data.load_sources(folder / "m.json")


def texts(pool):
    return [pool.text(i) for i in range(len(pool))]


def test_a_pool_holds_every_text_once_by_hash_and_none_that_is_held_out(tmp_path):
    """p1 stands four times, once in capitals and twice as a negative. "out" is held out by b's eval
    file: as a negative of a it is no text of the pool. Texts are in the order of their hashes."""
    (tmp_path / "eval.jsonl").write_text('["e", "out"]\n')
    a, b = corpus(tmp_path, {"b": {"eval": "eval.jsonl"}},
                  a=[["q0", "p0", "p1", "n0", "OUT"], ["q1", "p1"], ["q2", "P1", "n0"]],
                  b=[["q3", "p3", " p1"], ["q4", "out"]])
    pool = Pool([positives(a, a.train), negatives(a, a.train), negatives(b, b.train)])
    hashes = [text_hash(text) for text in texts(pool)]
    assert hashes == sorted(text_hash(text) for text in ("p0", "p1", "n0")) == pool.hashes.tolist()
    wanted = np.array([text_hash(text) for text in ("none", "N0", "out", "p0")], "<u8")
    which, where = pool.find(wanted)
    assert which.tolist() == [1, 3] and [pool.text(i) for i in where] == ["n0", "p0"]


def test_so_many_texts_of_a_pool_are_drawn_at_random_by_the_seed(tmp_path):
    """Of 19 targets: 8 by two seeds differ, by one seed are the same; 19 and more are all. Drawn 40
    times, every text comes (the chance that one does not is below 19 (11/19)^40 = 6e-9)."""
    source, = corpus(tmp_path, a=[[f"q{i}", f"p{i}"] for i in range(19)])
    part = positives(source, source.train)
    drawn = [texts(Pool([part], 8, seed)) for seed in range(40)]
    assert all(len(set(some)) == 8 for some in drawn)
    assert set().union(*drawn) == {f"p{i}" for i in range(19)}
    assert drawn[0] != drawn[1] and drawn[0] == texts(Pool([part], 8, 0))
    assert [len(Pool([part], count)) for count in (19, 20, None)] == [19, 19, 19]


def test_excluded_are_a_query_s_own_text_and_its_positives_in_any_source_or_collection(tmp_path):
    """q has the positives p0 and p1 in a, x0 in b and y in a's collection; x0 and "q" itself are
    negatives of a's second row, whose query r has p2 alone. z of the collection is a text of the
    pool; "out", held out by a, is none."""
    (tmp_path / "more.jsonl").write_text('["q", "y"]\n["s", "z"]\n["t", "out"]\n')
    (tmp_path / "eval.jsonl").write_text('["e", "out"]\n')
    a, b = corpus(tmp_path, {"a": {"eval": "eval.jsonl", "collection": "more.jsonl"}},
                  a=[["q", "p0", "n0"], ["r", "p2", "X0", "q"], ["Q", "p1"]],
                  b=[["q", "x0"], ["s", "n0"]])
    retriever = Retriever(a, [a, b], None, None)
    assert sorted(texts(retriever.pool)) == ["X0", "n0", "p0", "p1", "p2", "q", "y", "z"]
    excluded = [set(), set(), set()]
    for i, position in zip(*retriever.excluded(np.arange(3))):
        excluded[i].add(retriever.pool.text(position))
    assert excluded == [{"q", "p0", "p1", "X0", "y"}, {"p2"}, {"q", "p0", "p1", "X0", "y"}]
