"""data.py against toy corpora: line formats, errors, source-wise batches, hold-out, resume, index, micro-batches.

Toy sources are called a and b; their rows are ["a0", "a0+"], ["a1", "a1+"] and so on: query, positive. A source of fewer
than 20 targets holds nothing out (19 // 20 = 0), so what is listed is what is trained on.
"""

import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from transformers import BertTokenizer

import data
from corpora import formats


def pairs(name, n):
    return [[f"{name}{i}", f"{name}{i}+"] for i in range(n)]


def write(path, lines):
    path.parent.mkdir(exist_ok=True)
    raw = lines if isinstance(lines, bytes) else "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def corpus(folder, fields=None, /, suffix=".jsonl", **lines):
    """Writes NAME.jsonl for every NAME=lines and opens them; fields: {NAME: what else its manifest entry says}."""
    paths = {name: write(folder / f"{name}{suffix}", rows) for name, rows in lines.items()}
    manifest = [{"name": name, "path": path.name, **(fields or {}).get(name, {})} for name, path in paths.items()]
    return data.load_sources(write(folder / "m.json", json.dumps(manifest).encode()))


def listed(batches, steps):
    return [" ".join(row.query for row in next(batches).rows) for _ in range(steps)]


def normal(text):
    return " ".join(text.split()).casefold()


def refusal(call, *args, **keywords):
    """The one line with which it refuses."""
    with pytest.raises((ValueError, OSError)) as caught:
        call(*args, **keywords)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# lines

PASSAGES = [{"title": "T", "text": "p"}, {"title": "", "text": "p2"}, {"title": None, "text": "p3"}, {"text": "p4"}]
FORMATS = {
    "pair": (["q", "p"], [("q", "p", [])]),
    "triplet": (["q", "p", "n"], [("q", "p", ["n"])]),
    "pos and neg": ({"query": "q", "pos": ["p", "r"], "neg": ["n", "m"]}, [("q", "p", ["n", "m"]), ("q", "r", ["n", "m"])]),
    "set": ({"set": ["s", "t", "u"]}, [("s", "t", []), ("s", "u", [])]),
    "ours": ({"query": "q", "positive": "p", "negatives": ["n", "m"]}, [("q", "p", ["n", "m"])]),
    "ours, no negatives": ({"query": " q ", "positive": "p\n"}, [("q", "p", [])]),
    "sentence-transformers": ({"anchor": "q", "positive": "p", "negative": "n"}, [("q", "p", ["n"])]),
    "Tevatron": ({"query_id": "1", "query": "q", "positive_passages": PASSAGES, "negative_passages": PASSAGES[:2]},
                 [("q", p, ["T p", "p2"]) for p in ("T p", "p2", "p3", "p4")]),
    "DPR": ({"dataset": "nq", "question": "q", "answers": ["x"], "positive_ctxs": PASSAGES[:1], "negative_ctxs": [],
             "hard_negative_ctxs": PASSAGES[1:3]}, [("q", "T p", ["p2", "p3"])]),
    **{f"SNLI, {label}": ({"sentence1": "q", "sentence2": "p", "gold_label": label}, [("q", "p", [])] * (label == "entailment"))
       for label in ("entailment", "neutral", "contradiction", "-")},
}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_every_line_format_gives_its_rows(tmp_path, suffix):
    """Each format once in one file. Read in order, and read by number, both give the concatenation of the table."""
    expected = [row for _, rows in FORMATS.values() for row in rows]
    source, = corpus(tmp_path, suffix=suffix, a=[line for line, _ in FORMATS.values()])
    assert [row[:3] for row in formats.read_rows(tmp_path / f"a{suffix}")] == expected
    assert [source.read(i) for i in range(len(expected))] == [(*row, i) for i, row in enumerate(expected)]


def test_the_data_config_of_sentence_transformers_is_a_manifest(tmp_path):
    """data_config.json has no path (the name is the file) and calls the rate "weight"."""
    write(tmp_path / "a.jsonl.gz", pairs("a", 3)), write(tmp_path / "b.jsonl", pairs("b", 2))
    config = b'[{"name": "a.jsonl.gz", "lines": 3, "weight": 30}, {"name": "b.jsonl", "lines": 2, "weight": 12}]'
    sources = data.load_sources(write(tmp_path / "data_config.json", config))
    assert [(s.name, s.rate, s.usable(s.train)) for s in sources] == [("a.jsonl.gz", 30, 3), ("b.jsonl", 12, 2)]


BAD_LINES = {
    "cut short": (b'{"query": "q", ', "not JSON"),
    "two values": (b'["q", "p"] ["q", "p"]', "not JSON"),
    "too deep": (b"[" * 100_000, ""),
    "a text": (b'"q"', "expected a list or an object"),
    "no target": (b'["q"]', '"positive"'),
    "no target field": (b'{"query": "q"}', '"positive"'),
    "no target in pos": (b'{"query": "q", "pos": []}', '"pos"'),
    "no query": (b'{"positive": "p"}', '"query"'),
    "empty": (b'["", "p"]', '"query": the text is empty'),
    "white space": (b'["q", " \\t\\u00a0\\u2003"]', '"positive": the text is empty'),
    "empty negative": (b'{"query": "q", "pos": ["p"], "neg": ["n", ""]}', '"neg": the text is empty'),
    "number": (b'["q", 7]', '"positive": found 7'),
    "null": (b'["q", "p", null]', '"negatives": found null'),
    "passage without text": (b'{"query": "q", "positive_passages": [{"title": "t"}]}', '"positive_passages"'),
    "latin-1": (b'["q", "\xe9"]', "UTF-8"),
    "half a surrogate pair": (b'["q", "\\ud800"]', '"positive"'),
}


@pytest.mark.parametrize("line, why", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_refused_by_file_line_and_field(tmp_path, line, why):
    """A good row is line 1 and an empty one line 2, so the bad one is line 3."""
    message = refusal(corpus, tmp_path, a=b'["a0", "a0+"]\n\n' + line + b'\n["a1", "a1+"]\n')
    assert f"{tmp_path}/a.jsonl, line 3: " in message and why in message


PACKED = gzip.compress(b"".join(json.dumps([str(i), str(i * i)]).encode() + b"\n" for i in range(2000)), mtime=0)
BROKEN = {"truncated": PACKED[:-50], "no gzip": b'["q", "p"]\n', "bad block": PACKED[:10] + b"\xff" * 9 + PACKED[19:],
          "bad checksum": PACKED[:-8] + b"\0" * 8}


@pytest.mark.parametrize("raw", BROKEN.values(), ids=BROKEN)
def test_a_broken_gzip_file_is_refused_by_name_and_leaves_nothing_behind(tmp_path, raw):
    (tmp_path / "a.jsonl.gz").write_bytes(raw)
    manifest = write(tmp_path / "m.json", b'[{"name": "a", "path": "a.jsonl.gz"}]')
    assert f"{tmp_path}/a.jsonl.gz, after line " in refusal(data.load_sources, manifest)
    assert not list((tmp_path / ".cache").glob("v1/*"))


BAD_MANIFESTS = {
    "no JSON": (b'[{"name": "a"', "not JSON"),
    "no UTF-8": (b'["\xff"]', "not JSON"),
    **{f"is {raw}": (raw.encode(), "expected a list") for raw in ('{"name": "a"}', "[]", '["a.jsonl"]')},
    **{f"with {field}": (b'[{"name": "b"}, {"name": "a", "path": "a.jsonl", %s}]' % field.encode(), f"source 2: {why}")
       for field, why in [('"name": null', 'field "name": found None'), ('"name": "b"', "field \"name\": found 'b'"),
                          ('"path": 5', 'field "path": found 5'), ('"weigth": 2', 'unknown field "weigth"'),
                          ('"kind": "nli"', "field \"kind\": found 'nli'"), ('"eval": 5', 'field "eval": found 5'),
                          *((f'"rate": {rate}', 'field "rate": found ')
                            for rate in ("0", "-1", '"1"', "true", "null", "NaN", "Infinity"))]},
    "no such file": (b'[{"name": "a", "path": "c.jsonl"}]', "source a: "),
    "no such eval file": (b'[{"name": "b", "eval": "c.jsonl"}]', "c.jsonl: no such file"),
}


@pytest.mark.parametrize("raw, why", BAD_MANIFESTS.values(), ids=BAD_MANIFESTS)
def test_a_bad_manifest_is_refused_by_file_source_and_field(tmp_path, raw, why):
    write(tmp_path / "a.jsonl", pairs("a", 3)), write(tmp_path / "b", pairs("b", 3))
    message = refusal(data.load_sources, write(tmp_path / "m.json", raw))
    assert why in message and str(tmp_path) in message


def test_what_cannot_give_batches_is_refused_with_both_numbers(tmp_path):
    """a: 5 rows, but only the queries x, y, z: 3 usable pairs. Of 4 rows, 3 ranks cannot have equal parts."""
    assert "no such manifest" in refusal(data.load_sources, tmp_path / "m.json")
    for empty in (b"", b"\n \n", b'{"sentence1": "q", "sentence2": "p", "gold_label": "neutral"}\n'):
        message = refusal(corpus, tmp_path, a=empty)
        assert "source a" in message and "a.jsonl" in message
    sources = corpus(tmp_path, a=[["x", "0"], ["X ", "1"], ["x", "2"], ["y", "3"], ["z", "4"]], b=pairs("b", 9))
    message = refusal(data.SourceBatches, sources, 4, seed=0)
    assert "source a: 3 usable" in message and "--batch-size 4" in message
    message = refusal(data.SourceBatches, sources[1:], 4, seed=0, rank=0, world_size=3)
    assert "--batch-size 4" in message and "3 ranks" in message


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_too_few_negatives_are_refused_by_file_and_line(tmp_path, suffix):
    """Line 1 gives two rows and has 2 negatives; line 2 is empty; line 3 has 1."""
    lines = b'{"query": "q", "pos": ["p", "r"], "neg": ["n", "m"]}\n\n["x", "y", "z"]\n'
    message = refusal(data.SourceBatches, corpus(tmp_path, suffix=suffix, a=lines), 1, seed=0, negatives=2)
    assert f"{tmp_path}/a{suffix}, line 3: 1 negatives, but --negatives 2" in message


# batches

SEQUENCE = ["a5 a3", "b4 b2", "a0 a2", "b3 b0", "b2 b0", "a1 a4", "a1 a2", "a4 a0", "b1 b4", "a5 a3", "a4 a5", "a0 a2"]


def toy(folder):
    return corpus(folder, {"a": {"rate": 3}}, a=pairs("a", 6), b=pairs("b", 5))


def test_the_sequence_of_a_seed(tmp_path):
    """Recorded once; whoever changes it breaks every `--resume`. Batches of 2: an epoch of a is 3 batches, 53 02 14 and
    12 40 53; one of b is 2, and the fifth row is left over: 42 30 without 1, then 20 14 without 3."""
    assert listed(data.SourceBatches(toy(tmp_path), 2, seed=0), 12) == SEQUENCE
    assert listed(data.SourceBatches(toy(tmp_path), 2, seed=1), 12) != SEQUENCE


def test_the_hash_seed_of_python_changes_nothing(tmp_path):
    toy(tmp_path)
    code = ("import data, sys; batches = data.SourceBatches(data.load_sources(sys.argv[1]), 2, seed=0)\n"
            "for _ in range(12): print(*[row.query for row in next(batches).rows])")
    child = subprocess.run([sys.executable, "-c", code, tmp_path / "m.json"], cwd=Path(data.__file__).parent, text=True,
                           capture_output=True, check=True, env=os.environ | {"PYTHONHASHSEED": "123"})
    assert child.stdout.splitlines() == SEQUENCE


def test_a_batch_is_of_one_source_and_an_epoch_gives_every_row_once(tmp_path):
    """11 rows, batches of 4: an epoch is 2 batches of 8 rows, and 3 are left over, counted where the next one begins."""
    batches = data.SourceBatches(corpus(tmp_path, a=pairs("a", 11), b=pairs("b", 4)), 4, seed=0)
    taken, dropped = {"a": [], "b": []}, {"a": [], "b": []}
    for batch in (next(batches) for _ in range(60)):
        assert all(row.query[0] == batch.source and row.positive == row.query + "+" for row in batch.rows)
        taken[batch.source].append([row.query for row in batch.rows])
        dropped[batch.source].append(batch.dropped)
    assert dropped["a"][:7] == [0, 0, 3, 0, 3, 0, 3] and not any(dropped["b"])
    epochs = [sum(taken["a"][i : i + 2], []) for i in range(0, 20, 2)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10  # shuffled anew: two equal among 11!/3! orders is no chance
    assert {query for epoch in epochs for query in epoch} == {f"a{i}" for i in range(11)}  # nor always the same 3 left over


def test_sources_are_drawn_by_their_rates(tmp_path):
    """Rates 1, 2, 5: p = 1/8, 1/4, 5/8. Of 10,000 draws 10,000 p, within 4.5 sigma of the binomial (once in 150,000)."""
    sources = corpus(tmp_path, {"b": {"rate": 2}, "c": {"rate": 5.0}}, a=pairs("a", 3), b=pairs("b", 3), c=pairs("c", 3))
    batches = data.SourceBatches(sources, 1, seed=0)
    drawn = [next(batches).source for _ in range(10_000)]
    for name, p in (("a", 1 / 8), ("b", 1 / 4), ("c", 5 / 8)):
        assert abs(drawn.count(name) - 10_000 * p) < 4.5 * (10_000 * p * (1 - p)) ** 0.5


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_slices_of_all_ranks_are_the_batch_of_one(tmp_path, world_size):
    sources = corpus(tmp_path, **{x: [[f"{x}{i % 9}", *(f"{x}{i + j}+" for j in range(3))] for i in range(18)] for x in "ab"})
    one = data.SourceBatches(sources, 4, seed=3, negatives=1)
    ranks = [data.SourceBatches(sources, 4, 3, rank, world_size, negatives=1) for rank in range(world_size)]
    for batch in (next(one) for _ in range(20)):
        parts = [next(rank) for rank in ranks]
        assert sum((part.rows for part in parts), []) == batch.rows and len(parts[0].rows) == 4 // world_size
        assert {(part.source, part.dropped) for part in parts} == {(batch.source, batch.dropped)}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("negatives", [0, 2, None])
def test_no_text_stands_twice_nor_among_the_negatives(tmp_path, seed, negatives):
    """150 rows over 90 texts, in three spellings of one normal form, each in any place. Whatever an epoch gives, it gives
    once, and what it gives and what it drops are its rows to train on: 150 less those with one of the held-out targets."""
    rng = np.random.default_rng(seed)
    spell = lambda i: [f"t {i}", f" T  {i}", f"t\t{i} "][rng.integers(3)]
    lines = [list(map(spell, rng.integers(90, size=rng.integers(6, 9)))) for _ in range(150)]
    source, = corpus(tmp_path, a=lines)
    batches, epoch, number = data.SourceBatches([source], 5, seed, negatives=negatives), [], 0
    for batch in (next(batches) for _ in range(80)):
        if batches.state_dict()["sources"]["a"]["epoch"] > number:
            assert len(epoch) == len(set(epoch)) and len(epoch) + batch.dropped == len(source.train)
            epoch, number = [], number + 1
        epoch += [row.id for row in batch.rows]
        texts = [{normal(row.query), normal(row.positive)} for row in batch.rows]
        assert len(set().union(*texts)) == sum(map(len, texts)) and len(texts) == 5
        assert all(negatives is None or len(row.negatives) == negatives for row in batch.rows)
        assert not {normal(text) for row in batch.rows for text in row.negatives} & set().union(*texts)
    assert number > 1


def test_a_row_that_collides_comes_in_the_next_batch_of_its_source(tmp_path):
    """x twice, batches of 2: when both x come up together, the second waits, and is the first row of a's next batch, whatever
    b gives in between."""
    sources, waited = corpus(tmp_path, a=[["x", "x0"], ["X", "x1"], ["y", "y0"], ["z", "z0"]], b=pairs("b", 2)), 0
    for seed in range(30):
        batches, expected = data.SourceBatches(sources, 2, seed), None
        for batch in (next(batches) for _ in range(8)):
            if batch.source == "a":
                assert expected is None or batch.rows[0].id == expected or batch.dropped
                waiting = batches.state_dict()["sources"]["a"]["waiting"]
                expected = waiting[0] if waiting else None
                waited += bool(waiting)
    assert waited > 10


def test_what_can_never_fill_a_batch_is_an_error_and_no_endless_loop(tmp_path):
    """Edges x-1 x-2 x-3 1-x 2-x 3-x: 4 distinct queries and 4 distinct targets, but x is in all of them: 1 row, not 4."""
    lines = [["x", "1"], ["x", "2"], ["x", "3"], ["1", "x"], ["2", "x"], ["3", "x"]]
    message = refusal(next, data.SourceBatches(corpus(tmp_path, a=lines), 4, seed=0))
    assert "source a" in message and "gives 1 rows" in message and "--batch-size 4" in message


def test_negatives_are_drawn_by_the_seed_and_anew_each_epoch(tmp_path):
    """6 rows of 8 negatives, 3 each. 3 of 8 are 56 draws: that all 6 rows draw alike in two epochs has p = 56^-6."""
    lines = [[f"a{i}", f"a{i}+", *(f"n{i}{j}" for j in range(8))] for i in range(6)]
    sources, drawn = corpus(tmp_path, a=lines), []
    for seed in (0, 0, 1):
        batches = data.SourceBatches(sources, 6, seed, negatives=3)
        drawn += [{row.query: row.negatives for row in next(batches).rows} for _ in range(2)]
    for draw in drawn:
        assert all(len(set(draw[q]) & set(negatives)) == 3 == len(draw[q]) for q, _, *negatives in lines)
    assert drawn[:2] == drawn[2:4] and drawn[0] != drawn[1] and drawn[0] != drawn[4]
    assert {row.query: row.negatives for row in next(data.SourceBatches(sources, 6, 0)).rows} == {q: n for q, _, *n in lines}
    assert not any(row.negatives for row in next(data.SourceBatches(sources, 6, 0, negatives=0)).rows)


def test_neither_a_held_out_target_nor_the_own_positive_is_a_negative(tmp_path, capsys):
    """b holds out h. Of a0's negatives {h, own positive, n, m} two are left; a1's {h, n} is one too few: the row is left
    out, which is said once, and no epoch drops anything."""
    write(tmp_path / "eval.jsonl", [["?", "h"]])
    sources = corpus(tmp_path, {"b": {"eval": "eval.jsonl"}}, b=pairs("b", 3),
                     a=[["a0", "a0+", " H", "A0+ ", "n", "m"], ["a1", "a1+", "h", "n"], ["a2", "a2+", "n", "k"]])
    batches = data.SourceBatches(sources[1:], 1, seed=0, negatives=2)
    seen = [next(batches) for _ in range(20)]
    assert {(batch.rows[0].query, *batch.rows[0].negatives) for batch in seen} == {("a0", "n", "m"), ("a2", "n", "k")}
    assert [batch.dropped for batch in seen] == [0] * 20
    assert capsys.readouterr().out == "source a: 1 of 3 rows are left out: fewer than 2 of their negatives are not held out\n"


def test_an_epoch_whose_order_does_not_fill_a_batch_is_passed_over(tmp_path):
    """Rows (x,1) (x,2) (y,2): a batch of 2 is x1 with y2; in an order that begins with x2 both others collide with it. An
    epoch gives one batch or none; the run goes on, and what it dropped is counted: 3 per epoch without a batch, else 1."""
    sources = corpus(tmp_path, a=[["x", "1"], ["x", "2"], ["y", "2"]])
    seen = [next(batches) for batches in [data.SourceBatches(sources, 2, seed=0)] for _ in range(30)]
    assert {frozenset(row[:2] for row in batch.rows) for batch in seen} == {frozenset([("x", "1"), ("y", "2")])}
    assert {batch.dropped % 3 for batch in seen[1:]} == {1} and max(batch.dropped for batch in seen) > 3


def test_rows_that_say_they_do_not_belong_together_are_refused(tmp_path):
    """Hugging Face's SNLI has `label` 2 for a contradiction, STS a `score`: neither is a pair to train on as it stands."""
    for label in ("label", "score"):
        write(tmp_path / "a.jsonl", [{"sentence1": "q", "sentence2": "p", label: 0}])
        assert f'line 1: field "{label}": only "gold_label"' in refusal(lambda: list(formats.read_rows(tmp_path / "a.jsonl")))


# hold-out

def trained_on(source):
    """The positives of one epoch, row by row: batches of 1 collide with nothing."""
    batches = data.SourceBatches([source], 1, seed=0)
    return [next(batches).rows[0].positive for _ in source.train]


def test_held_out_are_five_percent_of_the_targets_and_no_source_trains_on_them(tmp_path):
    """100 targets: 100 // 20 = 5. b spells the same 100 in capitals and with more space: the same hashes, the same 5. c is
    too small to hold out, and has 10 of the others and one held-out: 10 are left."""
    lines = [[f"q{i}", f"target {i}"] for i in range(100)]
    held_out = {row.positive for row in corpus(tmp_path, a=lines)[0].held_out}
    assert len(held_out) == 5
    c = [line for line in lines if line[1] not in held_out][:10] + [["x", f"  {held_out.copy().pop().upper()} "]]
    a, b, c = corpus(tmp_path, a=lines, b=[[q, t.upper().replace(" ", " \t")] for q, t in lines], c=c)
    assert {row.positive for row in a.held_out} == {normal(row.positive) for row in b.held_out} == held_out
    assert (*(s.usable(s.train) for s in (a, b, c)), c.held_out) == (95, 95, 10, [])
    for source in (a, b, c):
        assert len(trained_on(source)) == source.usable(source.train) and not held_out & set(map(normal, trained_on(source)))


def test_a_held_out_target_is_no_query_in_training_either(tmp_path):
    """Equation (4) is symmetric: to train on (b, a) is to train on the held-out (a, b). 40 targets, 2 held out, so 2 of the
    reversed rows go as well: 40 + 40 - 2 - 2 = 76 stay."""
    there = [[f"q{i}", f"t{i}"] for i in range(40)]
    write(tmp_path / "other.jsonl", [["x", "y"]])
    a, b = corpus(tmp_path, {"b": {"eval": "other.jsonl"}}, a=there, b=[pair[::-1] for pair in there])
    held = {row.positive for row in a.held_out}
    assert len(held) == 2 and len(a.train) + len(b.train) == 76
    assert held.isdisjoint(b.read(i).query for i in b.train)


def test_the_hold_out_does_not_depend_on_the_order_of_lines(tmp_path):
    """100 targets of 3 queries each: 300 lines, shuffled."""
    lines = [[f"q{i}", f"t{i % 100}"] for i in range(300)]
    one, = corpus(tmp_path / "1", a=lines)
    other, = corpus(tmp_path / "2", a=[lines[i] for i in np.random.default_rng(0).permutation(300)])
    assert {row.positive for row in one.held_out} == {row.positive for row in other.held_out} and len(one.held_out) == 5
    assert sorted(trained_on(one)) == sorted(trained_on(other))
    assert {row[:2] for row in one.held_out} == {row[:2] for row in other.held_out}  # also which of its queries asks


def test_an_eval_file_is_the_hold_out_of_its_source(tmp_path):
    """It has a3+ in another spelling: a loses 1 of 30 rows (and no 30 // 20 of its own); b loses 3, where a3+ is the target
    twice and the query once."""
    write(tmp_path / "eval.jsonl.gz", [["who?", " A3+"], ["what?", "of nobody"]])
    again = [["x", "a3+"], ["y", "A3+ "], [" A3+", "z"]]
    a, b = corpus(tmp_path, {"a": {"eval": "eval.jsonl.gz"}}, a=pairs("a", 30), b=pairs("b", 6) + again)
    assert [row[:2] for row in a.held_out] == [("who?", "A3+"), ("what?", "of nobody")]
    assert sorted(trained_on(a)) == sorted(f"a{i}+" for i in range(30) if i != 3)
    assert sorted(trained_on(b)) == [f"b{i}+" for i in range(6)]


# resume

def test_a_run_goes_on_from_any_step_as_if_it_had_not_stopped(tmp_path):
    """14 rows over 7 queries a source, batches of 3: rows wait, and 30 steps are several epochs. Stopped after every
    step k, through JSON, it goes on in one process or as the second of three ranks. A state once taken stays what it was."""
    sources = corpus(tmp_path, **{x: [[f"{x}{i % 7}", f"{x}{i}+", *"klmn"] for i in range(14)] for x in "ab"})
    batches, states, seen = data.SourceBatches(sources, 3, 3, negatives=2), [], []
    for _ in range(30):
        states.append((batches.state_dict(), json.dumps(batches.state_dict())))
        seen.append(next(batches))
    assert any(state["sources"]["a"]["waiting"] for state, _ in states) and states[-1][0]["sources"]["a"]["epoch"] > 2
    for k, (state, text) in enumerate(states):
        assert json.dumps(state) == text
        for rank, world_size in ((0, 1), (1, 3)):
            resumed = data.SourceBatches(sources, 3, 3, rank, world_size, negatives=2)
            next(resumed)
            resumed.load_state_dict(json.loads(text))
            goes_on = [next(resumed) for _ in seen[k:]]
            assert goes_on == [b if world_size == 1 else b._replace(rows=b.rows[1:2]) for b in seen[k:]]


def test_a_state_of_another_run_is_refused(tmp_path):
    """Another batch size, seed, number of negatives, set or order of sources (the draw counts them), rate, or text: a's file
    with other words is of the same size, but the rows that wait are numbers."""
    lines = {"a": [[*row, "n", "m"] for row in pairs("a", 6)], "b": [[*row, "n", "m"] for row in pairs("b", 6)]}
    sources = corpus(tmp_path, **lines)
    state = json.loads(json.dumps(data.SourceBatches(sources, 2, seed=0, negatives=1).state_dict()))
    rate = corpus(tmp_path / "rate", {"a": {"rate": 2}}, **lines)
    text = corpus(tmp_path / "text", **lines | {"a": [[*row, "n", "m"] for row in pairs("c", 6)]})
    for other in (dict(batch_size=3), dict(seed=1), dict(negatives=2), dict(sources=sources[:1]), dict(sources=sources[::-1]),
                  dict(sources=rate), dict(sources=text)):
        batches = data.SourceBatches(**dict(sources=sources, batch_size=2, seed=0, negatives=1) | other)
        assert "another" in refusal(batches.load_state_dict, state), other


# index

def test_rows_are_found_again_among_long_characters_and_windows_line_ends(tmp_path):
    """Offsets count bytes: é has 2, 語 3, 𝄞 4; U+2028 and an escaped \\n end no line; the last line has no end."""
    texts = ["é", "語\u2028語", "𝄞 clef", "a\nb", "e"]
    raw = b"\r\n".join(json.dumps([t, t + "+"], ensure_ascii=i % 2 == 1).encode() for i, t in enumerate(texts))
    source, = corpus(tmp_path, a=b"\r\n" + raw.replace(b"\r\n", b"\r\n \r\n", 1))
    assert [source.read(i)[:2] for i in (4, 0, 3, 1, 2)] == [(texts[i], texts[i] + "+") for i in (4, 0, 3, 1, 2)]


def test_a_file_is_indexed_once_and_anew_when_it_changed(tmp_path, capsys, monkeypatch):
    """a.jsonl.gz: unpacked in one line, then silent. Changed to rows of the same number and size, it is another file."""
    corpus(tmp_path, suffix=".jsonl.gz", a=pairs("a", 3))
    assert capsys.readouterr().out.count("\n") == 1
    with monkeypatch.context() as patch:
        patch.setattr(data, "read_lines", None)  # nothing is parsed the second time
        data.load_sources(tmp_path / "m.json")
    assert capsys.readouterr().out == ""
    sources = corpus(tmp_path, suffix=".jsonl.gz", a=pairs("b", 3))
    assert sorted(listed(data.SourceBatches(sources, 1, seed=0), 3)) == ["b0", "b1", "b2"]


def test_files_whose_paths_differ_by_case_are_two_files(tmp_path):
    """d/a.jsonl and D/a.jsonl, equal in size and time, as files out of an archive are."""
    for folder, query in (("d", "lower"), ("D", "UPPER")):
        os.utime(write(tmp_path / folder / "a.jsonl", [[query, query + "+"]]), (1, 1))
    if (tmp_path / "d").samefile(tmp_path / "D"):
        pytest.skip("this file system does not tell them apart")
    manifest = write(tmp_path / "m.json", b'[{"name": "l", "path": "d/a.jsonl"}, {"name": "u", "path": "D/a.jsonl"}]')
    assert [source.index["query"][0] for source in data.load_sources(manifest)] == [formats.text_hash("lower"), formats.text_hash("upper")]


def test_a_row_costs_a_few_bytes_of_memory_and_a_big_source_holds_out_a_thousand(tmp_path):
    """Its number among the rows to train on and its place in the epoch's order, 8 bytes each; the index stays on disk. The
    thousand rows held out are texts. 60,000 // 20 = 3,000 is above 1,000."""
    corpus(tmp_path, a=b"".join(b'["a%d", "a%d+"]\n' % (i, i) for i in range(60_000)))
    tracemalloc.start()
    sources = data.load_sources(tmp_path / "m.json")
    batches = data.SourceBatches(sources, 64, seed=0)
    next(batches)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 40 * 60_000
    assert len(sources[0].held_out) == 1000 and sources[0].usable(sources[0].train) == 59_000


# tokens

@pytest.fixture(scope="module")
def tokenizer():
    return BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "w": 5, "v": 6})


def test_micro_batches_by_hand(tokenizer):
    """w: 3 tokens with [CLS] and [SEP]; w v w: 5; six w: 8, cut to 5, the last of them [SEP]. Together 3 x 5 = 15 tokens: one
    micro-batch, longest first, equals in order. Of 14 the third does not fit. A bound of 1 still gives each text alone, unless
    they are to be whole. w v w and three w have 5 + 3 x 3 = 14 tokens, and 20 with padding: more than 4/3 of 14."""
    texts = ["w", "w v w", "w w w w w w"]
    whole, = data.make_micro_batches(tokenizer, texts, max_length=5, micro_tokens=15)
    assert whole.index.tolist() == [1, 2, 0]
    assert whole.input_ids.tolist() == [[2, 5, 6, 5, 3], [2, 5, 5, 5, 3], [2, 5, 3, 0, 0]]
    assert whole.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert [m.index.tolist() for m in data.make_micro_batches(tokenizer, texts, max_length=5, micro_tokens=14)] == [[1, 2], [0]]
    assert [m.index.tolist() for m in data.make_micro_batches(tokenizer, texts, max_length=5, micro_tokens=1)] == [[1], [2], [0]]
    assert [m.index.tolist() for m in data.make_micro_batches(tokenizer, texts, 5, 1, whole=True)] == [[1, 2, 0]]
    assert [m.index.tolist() for m in data.make_micro_batches(tokenizer, ["w", *texts[:2], "w"], 5, 99)] == [[2], [0, 1, 3]]


@pytest.mark.parametrize("seed", range(3))
def test_micro_batches_hold_every_text_once_within_the_bound_with_little_padding(tokenizer, seed):
    """600 texts of 1 to 120 words (+ 2 tokens), cut at 100: about 33,000 tokens, at most 1,024 at a time."""
    words = np.random.default_rng(seed).integers(1, 121, size=600)
    parts = data.make_micro_batches(tokenizer, [" ".join(["w"] * n) for n in words], max_length=100, micro_tokens=1024)
    assert sorted(i for part in parts for i in part.index.tolist()) == list(range(600))
    widths = [part.input_ids.shape[1] for part in parts]
    assert widths == sorted(widths, reverse=True) and widths[0] == 100
    for part in parts:
        assert part.input_ids.shape == part.attention_mask.shape and part.input_ids.numel() <= 1024
        assert part.attention_mask.sum(1).tolist() == [min(words[i] + 2, 100) for i in part.index]
        assert part.attention_mask.equal((part.input_ids != 0).long())
        assert part.attention_mask.float().mean() >= 0.95


def test_a_tokenizer_is_trained_once_and_kept(tmp_path, capsys):
    """The second call says nothing and reads what the first wrote; upper case is lower case to it."""
    sources = corpus(tmp_path, a=[["the cat sat on the mat", f"the dog sat on the log {i}"] for i in range(10)])
    first = data.train_tokenizer(sources, vocab_size=100)
    assert capsys.readouterr().out.count("\n") == 1 and len(first) <= 100
    second = data.train_tokenizer(sources, vocab_size=100)
    assert capsys.readouterr().out == "" and second.get_vocab() == first.get_vocab()
    ids = second(["The CAT", "the cat"])["input_ids"]
    assert ids[0] == ids[1] and (ids[0][0], ids[0][-1]) == (second.cls_token_id, second.sep_token_id)
    assert second.unk_token_id not in ids[0]
