"""data.py (§5.1) against toy corpora small enough to list: batches from one source at a time, no
text twice, hold-out, resume, micro-batches. (What files may look like: tests/test_formats.py.)

Toy sources are called a and b; their rows are ["a0", "a0+"], ["a1", "a1+"] and so on: query,
positive. A source of fewer than 20 targets holds nothing out (19 // 20 = 0), so what is listed is
what is trained on.
"""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertTokenizer

import data
from corpora.formats import Row


def pairs(name, n):
    return [[f"{name}{i}", f"{name}{i}+"] for i in range(n)]


def write(path, lines):
    """Lines as JSON, or bytes as they are; packed where the name says so."""
    path.parent.mkdir(exist_ok=True)
    if not isinstance(lines, bytes):
        lines = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def corpus(folder, fields=None, /, suffix=".jsonl", **lines):
    """Writes NAME.jsonl for every NAME=lines and opens them; fields: {NAME: what else its manifest
    entry says}."""
    manifest = []
    for name, rows in lines.items():
        path = write(folder / f"{name}{suffix}", rows)
        manifest.append({"name": name, "path": path.name, **(fields or {}).get(name, {})})
    return data.load_sources(write(folder / "m.json", json.dumps(manifest).encode()))


def take(batches, steps):
    return [next(batches) for _ in range(steps)]


def queries(batch):
    return " ".join(row.query for row in batch.rows)


def normal(text):
    return " ".join(text.split()).casefold()


def refusal(call, *args, **keywords):
    """The one line with which it refuses."""
    with pytest.raises((ValueError, OSError)) as caught:
        call(*args, **keywords)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# a batch

def test_a_batch_gives_every_text_once_and_its_vectors_row_by_row():
    """B = 2, N = 2. In order: x y | p r | r n, n m: 8 texts, of which x y p r n m are distinct.
    Vectors (i, 10 i) for text i: q = x y = 0 1, p = p r = 2 3, n = r n, n m = 3 4, 4 5."""
    batch = data.Batch("a", [Row("x", "p", ["r", "n"]), Row("y", "r", ["n", "m"])], 0, "")
    assert batch.texts == ["x", "y", "p", "r", "n", "m"]
    assert batch.inverse.tolist() == [0, 1, 2, 3, 3, 4, 4, 5]
    q, p, n = batch.split(torch.tensor([[i, 10 * i] for i in range(6)]))
    assert q.tolist() == [[0, 0], [1, 10]] and p.tolist() == [[2, 20], [3, 30]]
    assert n.tolist() == [[[3, 30], [4, 40]], [[4, 40], [5, 50]]]


def test_a_batch_of_pairs_has_no_negatives():
    q, p, n = data.Batch("a", [Row("x", "p", [])], 0, "").split(torch.eye(2))
    assert q.tolist() == [[1, 0]] and p.tolist() == [[0, 1]] and n is None


# sources and rates

SEQUENCE = ["a5 a3", "b4 b2", "a0 a2", "b3 b0", "b2 b0", "a1 a4",
            "a1 a2", "a4 a0", "b1 b4", "a5 a3", "a4 a5", "a0 a2"]


def toy(folder):
    return corpus(folder, {"a": {"rate": 3}}, a=pairs("a", 6), b=pairs("b", 5))


def test_the_sequence_of_a_seed(tmp_path):
    """Recorded once; whoever changes it breaks every `--resume`. Batches of 2: an epoch of a is 3
    batches, 53 02 14 and 12 40 53; one of b is 2, and the fifth row is left over: 42 30 without 1,
    then 20 14 without 3."""
    sources = toy(tmp_path)
    seed_0, seed_1 = (take(data.SourceBatches(sources, 2, seed), 12) for seed in (0, 1))
    assert list(map(queries, seed_0)) == SEQUENCE != list(map(queries, seed_1))


def test_the_hash_seed_of_python_changes_nothing(tmp_path):
    toy(tmp_path)
    code = """if True:
        import data, sys
        batches = data.SourceBatches(data.load_sources(sys.argv[1]), 2, seed=0)
        for _ in range(12):
            print(*[row.query for row in next(batches).rows])"""
    child = subprocess.run([sys.executable, "-c", code, tmp_path / "m.json"], text=True, check=True,
                           capture_output=True, cwd=Path(data.__file__).parent,
                           env=os.environ | {"PYTHONHASHSEED": "123"})
    assert child.stdout.splitlines() == SEQUENCE


def test_a_batch_is_of_one_source_and_an_epoch_gives_every_row_once(tmp_path):
    """11 rows, batches of 4: an epoch is 2 batches of 8 rows, and 3 are left over, counted where
    the next one begins; of 4 rows none. Ten epochs are shuffled anew: two equal ones among 11! / 3!
    orders are no chance. Nor is it always the same 3 that are left over."""
    sources = corpus(tmp_path, a=pairs("a", 11), b=pairs("b", 4))
    batches = take(data.SourceBatches(sources, 4, seed=0), 60)
    for batch in batches:
        assert all(row.query[0] == batch.source for row in batch.rows)
        assert all(row.positive == row.query + "+" for row in batch.rows)
    a, b = ([batch for batch in batches if batch.source == name] for name in "ab")
    assert [batch.dropped for batch in a[:7]] == [0, 0, 3, 0, 3, 0, 3]
    assert not any(batch.dropped for batch in b)
    epochs = [(queries(a[i]) + " " + queries(a[i + 1])).split() for i in range(0, 20, 2)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 10
    assert set().union(*epochs) == {f"a{i}" for i in range(11)}


def test_sources_are_drawn_by_their_rates(tmp_path):
    """Rates 1, 2, 5: p = 1/8, 1/4, 5/8. Of 10,000 draws 10,000 p, within 4.5 sigma of the binomial
    (once in 150,000): 1,250 +- 149, 2,500 +- 195, 6,250 +- 218."""
    sources = corpus(tmp_path, {"b": {"rate": 2}, "c": {"rate": 5.0}},
                     a=pairs("a", 3), b=pairs("b", 3), c=pairs("c", 3))
    drawn = [batch.source for batch in take(data.SourceBatches(sources, 1, seed=0), 10_000)]
    assert abs(drawn.count("a") - 1250) < 149
    assert abs(drawn.count("b") - 2500) < 195
    assert abs(drawn.count("c") - 6250) < 218


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_slices_of_all_ranks_are_the_batch_of_one(tmp_path, world_size):
    def rows(name):
        return [[f"{name}{i % 9}", *(f"{name}{i + j}+" for j in range(3))] for i in range(18)]

    sources = corpus(tmp_path, a=rows("a"), b=rows("b"))
    one = data.SourceBatches(sources, 4, seed=3, negatives=1)
    ranks = [data.SourceBatches(sources, 4, 3, rank, world_size, negatives=1)
             for rank in range(world_size)]
    batches = take(one, 20)
    assert len({batch.digest for batch in batches}) == len(set(map(queries, batches))) > 4
    for batch in batches:
        parts = [next(rank) for rank in ranks]
        assert all(len(part.rows) == 4 // world_size for part in parts)
        assert [row for part in parts for row in part.rows] == batch.rows
        for part in parts:
            assert (part.source, part.dropped, part.digest) == (batch.source, batch.dropped,
                                                                batch.digest)


# no text twice

def tangled(folder, seed):
    """150 rows over 90 texts, in three spellings of one normal form, each in any position."""
    rng, spellings = np.random.default_rng(seed), ("t {}", " T  {}", "t\t{} ")
    lines = [[spellings[rng.integers(3)].format(i) for i in rng.integers(90, size=size)]
             for size in rng.integers(6, 9, size=150)]
    return corpus(folder, a=lines)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("negatives", [0, 2, None])
def test_no_text_stands_twice_nor_among_the_negatives(tmp_path, seed, negatives):
    """5 rows are 5 queries and 5 positives, fewer texts only where a row asks for itself."""
    batches = data.SourceBatches(tangled(tmp_path, seed), 5, seed, negatives=negatives)
    for batch in take(batches, 80):
        texts = [{normal(row.query), normal(row.positive)} for row in batch.rows]
        distinct = set().union(*texts)
        assert len(texts) == 5 and len(distinct) == sum(map(len, texts))
        for row in batch.rows:
            assert negatives is None or len(row.negatives) == negatives
            assert distinct.isdisjoint(map(normal, row.negatives))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("negatives", [0, 2, None])
def test_what_an_epoch_gives_and_what_it_drops_are_its_rows(tmp_path, seed, negatives):
    """Rows collide and wait, but none is given twice, and none is lost."""
    source, = tangled(tmp_path, seed)
    batches = data.SourceBatches([source], 5, seed, negatives=negatives)
    epochs, given = 0, []
    for _ in range(80):
        batch = next(batches)
        if batches.state_dict()["sources"]["a"]["epoch"] > epochs:
            assert len(given) == len(set(given)) == len(source.train) - batch.dropped
            epochs, given = epochs + 1, []
        given += [row.id for row in batch.rows]
    assert epochs > 1


def test_a_row_that_collides_comes_in_the_next_batch_of_its_source(tmp_path):
    """x twice, batches of 2: when both x come up together, the second waits, and is the first row
    of a's next batch, whatever b gives in between."""
    sources = corpus(tmp_path, a=[["x", "x0"], ["X", "x1"], ["y", "y0"], ["z", "z0"]],
                     b=pairs("b", 2))
    waited = 0
    for seed in range(30):
        batches, waiting = data.SourceBatches(sources, 2, seed), []
        for _ in range(8):
            batch = next(batches)
            if batch.source == "a":
                assert not waiting or batch.dropped or batch.rows[0].id == waiting[0]
                waiting = batches.state_dict()["sources"]["a"]["waiting"]
                waited += len(waiting)
    assert waited > 10


def test_rows_wait_in_the_order_in_which_they_came(tmp_path):
    """Rows x X y Y all wait, batches of 2: x, then y, since X collides; X and Y go on waiting."""
    source, = corpus(tmp_path, a=[["x", "0"], ["X", "1"], ["y", "2"], ["Y", "3"], ["z", "4"]])
    batches = data.SourceBatches([source], 2, seed=0)
    state = batches.state_dict()
    batches.load_state_dict(state | {"sources": {"a": {"epoch": 0, "cursor": 5,
                                                       "waiting": [0, 1, 2, 3]}}})
    assert queries(next(batches)) == "x y"
    assert batches.state_dict()["sources"]["a"]["waiting"] == [1, 3]
    assert queries(next(batches)) == "X Y"


def test_an_epoch_whose_order_does_not_fill_a_batch_is_passed_over(tmp_path):
    """Rows (x,1) (x,2) (y,2): a batch of 2 is x1 with y2; in an order that begins with x2 both
    others collide with it. An epoch gives one batch or none; the run goes on, and what it dropped
    is counted: 3 per epoch without a batch, else 1."""
    sources = corpus(tmp_path, a=[["x", "1"], ["x", "2"], ["y", "2"]])
    batches = take(data.SourceBatches(sources, 2, seed=0), 30)
    for batch in batches:
        assert sorted(row[:2] for row in batch.rows) == [("x", "1"), ("y", "2")]
    assert {batch.dropped % 3 for batch in batches[1:]} == {1}
    assert max(batch.dropped for batch in batches) > 3


def test_what_can_never_fill_a_batch_is_an_error_and_no_endless_loop(tmp_path):
    """Edges x-1 x-2 x-3 1-x 2-x 3-x: 4 distinct queries and 4 distinct targets, but x is in all of
    them: 1 row, not 4."""
    lines = [["x", "1"], ["x", "2"], ["x", "3"], ["1", "x"], ["2", "x"], ["3", "x"]]
    message = refusal(next, data.SourceBatches(corpus(tmp_path, a=lines), 4, seed=0))
    assert "source a" in message and "gives 1 rows" in message and "--batch-size 4" in message


def test_a_source_with_fewer_usable_pairs_than_a_batch_is_refused_with_both_numbers(tmp_path):
    """a: 5 rows, but only the queries x, y, z: 3 usable pairs."""
    lines = [["x", "0"], ["X ", "1"], ["x", "2"], ["y", "3"], ["z", "4"]]
    message = refusal(data.SourceBatches, corpus(tmp_path, a=lines), 4, seed=0)
    assert "source a: 3 usable" in message and "--batch-size 4" in message


def test_ranks_that_cannot_have_equal_parts_are_refused_with_both_numbers(tmp_path):
    """4 rows for 3 ranks."""
    message = refusal(data.SourceBatches, corpus(tmp_path, a=pairs("a", 9)), 4, 0, 0, world_size=3)
    assert "--batch-size 4" in message and "3 ranks" in message


@pytest.mark.parametrize("nothing", [
    b"", b"\n \n", b'{"sentence1": "q", "sentence2": "p", "gold_label": "neutral"}\n'])
def test_a_source_without_a_row_is_refused_by_name(tmp_path, nothing):
    message = refusal(corpus, tmp_path, a=nothing)
    assert "source a" in message and "a.jsonl" in message


# negatives (§5.2)

def test_negatives_are_drawn_by_the_seed_and_anew_each_epoch(tmp_path):
    """6 rows of 8 negatives, 3 each, all 6 rows a batch: every batch is an epoch. 3 of 8 are 56
    draws: that all 6 rows draw alike in two epochs has p = 56^-6, and in one epoch 56^-5."""
    there = {f"a{i}": [f"n{i}{j}" for j in range(8)] for i in range(6)}
    sources = corpus(tmp_path, a=[[query, query + "+", *there[query]] for query in there])

    def drawn(seed, negatives, epochs):
        batches = take(data.SourceBatches(sources, 6, seed, negatives=negatives), epochs)
        return [{row.query: row.negatives for row in batch.rows} for batch in batches]

    first, second = drawn(0, 3, epochs=2)
    for query, negatives in [*first.items(), *second.items()]:
        assert len(negatives) == len(set(negatives) & set(there[query])) == 3
    assert len({tuple(text[2:] for text in negatives) for negatives in first.values()}) > 1
    assert first != second and drawn(0, 3, epochs=2) == [first, second] != drawn(1, 3, epochs=2)
    assert drawn(0, None, epochs=1) == [there]
    assert drawn(0, 0, epochs=1) == [{query: [] for query in there}]


def test_neither_a_held_out_target_nor_the_own_positive_is_a_negative(tmp_path, capsys):
    """b holds out h. Of a0's negatives {h, own positive, n, m} two are left; a1's {h, n} is one too
    few: the row is left out, which one line says, on rank 0, and no epoch drops anything."""
    write(tmp_path / "eval.jsonl", [["?", "h"]])
    a = [["a0", "a0+", " H", "A0+ ", "n", "m"], ["a1", "a1+", "h", "n"], ["a2", "a2+", "n", "k"]]
    sources = corpus(tmp_path, {"b": {"eval": "eval.jsonl"}}, b=pairs("b", 3), a=a)
    batches = take(data.SourceBatches(sources[1:], 1, seed=0, negatives=2), 20)
    found = {(batch.rows[0].query, *batch.rows[0].negatives) for batch in batches}
    assert found == {("a0", "n", "m"), ("a2", "n", "k")}
    assert [batch.dropped for batch in batches] == [0] * 20
    printed = capsys.readouterr().out
    assert printed.startswith("source a: 1 of 3 rows") and printed.count("\n") == 1
    data.SourceBatches(sources[1:], 2, seed=0, rank=1, world_size=2, negatives=2)
    assert capsys.readouterr().out == ""


def test_a_row_whose_own_positive_leaves_it_too_few_negatives_is_dropped_every_epoch(tmp_path):
    """Of a0's two negatives one is a0+; a1 is all of an epoch. a0 waits, and is counted where the
    next epoch begins."""
    sources = corpus(tmp_path, a=[["a0", "a0+", "A0+", "n"], ["a1", "a1+", "n", "m"]])
    batches = take(data.SourceBatches(sources, 1, seed=0, negatives=2), 5)
    assert [queries(batch) for batch in batches] == ["a1"] * 5
    assert [batch.dropped for batch in batches] == [0, 1, 1, 1, 1]


def test_rows_that_came_with_too_few_negatives_are_left_out_and_counted(tmp_path, capsys):
    """2 of 5 rows have 2 negatives; the others 1, and none."""
    rows = [["a0", "a0+", "n", "m"], ["a1", "a1+"], ["a2", "a2+", "n"], ["a3", "a3+", "k", "l"],
            ["a4", "a4+"]]
    batches = take(data.SourceBatches(corpus(tmp_path, a=rows), 2, seed=0, negatives=2), 3)
    assert all(sorted(queries(batch).split()) == ["a0", "a3"] for batch in batches)
    printed = capsys.readouterr().out
    assert printed.startswith("source a: 3 of 5 rows") and printed.count("\n") == 1


def test_a_source_none_of_whose_rows_has_enough_negatives_is_refused_with_both_numbers(tmp_path):
    """Two at most, of which h is held out by b."""
    write(tmp_path / "eval.jsonl", [["?", "h"]])
    sources = corpus(tmp_path, {"b": {"eval": "eval.jsonl"}}, b=pairs("b", 3),
                     a=[["x", "y", "z"], ["q", "p", "n", "h"], ["r", "s"]])
    message = refusal(data.SourceBatches, sources[1:], 1, seed=0, negatives=2)
    assert "a.jsonl: its rows have at most 1 negatives" in message and "--negatives 2" in message


# hold-out

def trained_on(source):
    """The positives of one epoch, row by row: batches of 1 collide with nothing."""
    batches = take(data.SourceBatches([source], 1, seed=0), len(source.train))
    return [batch.rows[0].positive for batch in batches]


def test_held_out_are_five_percent_of_the_targets_and_no_source_trains_on_them(tmp_path):
    """100 targets: 100 // 20 = 5. b spells the same 100 in capitals and with more space: the same
    hashes, the same 5. c is too small to hold out, and has 10 of the others and one held-out: 10
    are left."""
    lines = [[f"q{i}", f"target {i}"] for i in range(100)]
    held_out = {row.positive for row in corpus(tmp_path, a=lines)[0].held_out}
    assert len(held_out) == 5
    others = [line for line in lines if line[1] not in held_out][:10]
    a, b, c = corpus(tmp_path, a=lines, b=[[q, t.upper().replace(" ", " \t")] for q, t in lines],
                     c=others + [["x", f"  {min(held_out).upper()} "]])
    assert {row.positive for row in a.held_out} == held_out
    assert {normal(row.positive) for row in b.held_out} == held_out and c.held_out == []
    for source, rows in ((a, 95), (b, 95), (c, 10)):
        assert len(source.train) == source.usable(source.train) == rows
        assert held_out.isdisjoint(map(normal, trained_on(source)))


def test_a_thousand_are_held_out_at_most_or_evaluated_of_an_eval_file(tmp_path):
    """a: 21,000 // 20 = 1,050 is above 1,000. b: none of the 1,050 targets of its file is trained
    on, and 1,000 are evaluated on."""
    write(tmp_path / "eval.jsonl", pairs("b", 1_050))
    a, b = corpus(tmp_path, {"b": {"eval": "eval.jsonl"}},
                  a=pairs("a", 21_000), b=pairs("b", 1_060))
    assert len(a.held_out) == 1000 and len(a.train) == 20_000
    assert len(b.held_out) == 1000 and len(b.train) == 10


def test_a_held_out_target_is_no_query_in_training_either(tmp_path):
    """Equation (4) is symmetric: to train on (b, a) is to train on the held-out (a, b). 40 targets,
    2 held out, so 2 of the reversed rows go as well: 40 + 40 - 2 - 2 = 76 stay."""
    there = [[f"q{i}", f"t{i}"] for i in range(40)]
    write(tmp_path / "other.jsonl", [["x", "y"]])
    a, b = corpus(tmp_path, {"b": {"eval": "other.jsonl"}}, a=there, b=[[p, q] for q, p in there])
    held_out = {row.positive for row in a.held_out}
    assert len(held_out) == 2 and len(a.train) + len(b.train) == 76
    assert held_out.isdisjoint(b.read(row).query for row in b.train)


def test_the_hold_out_does_not_depend_on_the_order_of_lines(tmp_path):
    """100 targets of 3 queries each: 300 lines, shuffled; 5 targets, each asked for by the same."""
    lines = [[f"q{i}", f"t{i % 100}"] for i in range(300)]
    one, = corpus(tmp_path / "1", a=lines)
    other, = corpus(tmp_path / "2", a=[lines[i] for i in np.random.default_rng(0).permutation(300)])
    assert len(one.held_out) == 5
    assert {row[:2] for row in one.held_out} == {row[:2] for row in other.held_out}
    assert sorted(trained_on(one)) == sorted(trained_on(other))


def test_an_eval_file_is_the_hold_out_of_its_source(tmp_path):
    """It has a3+ in another spelling: a loses 1 of 30 rows (and no 30 // 20 of its own); b loses 3,
    where a3+ is the target twice and the query once. A query that has two targets is asked once."""
    write(tmp_path / "eval.jsonl.gz", [["who?", " A3+"], ["What?", "none"], ["what?", "of nobody"]])
    again = [["x", "a3+"], ["y", "A3+ "], [" A3+", "z"]]
    a, b = corpus(tmp_path, {"a": {"eval": "eval.jsonl.gz"}}, a=pairs("a", 30),
                  b=pairs("b", 6) + again)
    assert [row[:2] for row in a.held_out] == [("who?", "A3+"), ("what?", "of nobody")]
    assert sorted(trained_on(a)) == sorted(f"a{i}+" for i in range(30) if i != 3)
    assert sorted(trained_on(b)) == [f"b{i}+" for i in range(6)]


# resume

def test_a_run_goes_on_from_any_step_as_if_it_had_not_stopped(tmp_path):
    """14 rows over 7 queries a source, batches of 3: rows wait, and 30 steps are several epochs.
    Stopped after every step k, through JSON, it goes on in one process or as the second of three
    ranks. A state once taken, and gone on from, stays what it was."""
    def rows(name):
        return [[f"{name}{i % 7}", f"{name}{i}+", *"klmn"] for i in range(14)]

    def same(batches, others, slice):
        return all((x.source, x.rows, x.digest) == (y.source, y.rows[slice], y.digest)
                   for x, y in zip(batches, others, strict=True))

    sources = corpus(tmp_path, a=rows("a"), b=rows("b"))
    batches, states, seen = data.SourceBatches(sources, 3, 3, negatives=2), [], []
    for _ in range(30):
        states.append((batches.state_dict(), json.dumps(batches.state_dict())))
        seen.append(next(batches))
    assert any(state["sources"]["a"]["waiting"] for state, _ in states)
    assert states[-1][0]["sources"]["a"]["epoch"] > 2
    for k, (state, text) in enumerate(states):
        for rank, world_size, slice in ((0, 1, np.s_[:]), (1, 3, np.s_[1:2])):
            resumed = data.SourceBatches(sources, 3, 3, rank, world_size, negatives=2)
            next(resumed)
            resumed.load_state_dict(json.loads(text) if rank else state)
            assert same(take(resumed, 30 - k), seen[k:], slice)
        assert json.dumps(state) == text


def test_a_state_in_which_a_row_waits_twice_or_before_its_turn_is_refused(tmp_path):
    sources = corpus(tmp_path, a=pairs("a", 9))
    batches = data.SourceBatches(sources, 2, seed=0)
    first, second = (batch.rows[0].id for batch in take(batches, 2))
    state = data.SourceBatches(sources, 2, seed=0).state_dict()

    def refused(waiting):
        place = {"epoch": 0, "cursor": 2, "waiting": waiting}  # the first batch has come up
        return refusal(batches.load_state_dict, state | {"sources": {"a": place}})

    assert "no run reaches this" in refused([first, first])
    assert "no run reaches this" in refused([second])


def test_a_state_of_another_run_is_refused(tmp_path):
    """Another batch size, seed, number of negatives, set or order of sources (the draw counts
    them), rate, or text: a's file with other words is of the same size, but the rows that wait are
    numbers."""
    def rows(name):
        return [[*row, "n", "m"] for row in pairs(name, 6)]

    sources = corpus(tmp_path, a=rows("a"), b=rows("b"))
    same = dict(sources=sources, batch_size=2, seed=0, negatives=1)
    state = json.loads(json.dumps(data.SourceBatches(**same).state_dict()))
    data.SourceBatches(**same).load_state_dict(state)
    rate = corpus(tmp_path / "rate", {"a": {"rate": 2}}, a=rows("a"), b=rows("b"))
    text = corpus(tmp_path / "text", a=rows("c"), b=rows("b"))
    for other in (dict(batch_size=3), dict(seed=1), dict(negatives=2), dict(sources=sources[:1]),
                  dict(sources=sources[::-1]), dict(sources=rate), dict(sources=text)):
        batches = data.SourceBatches(**same | other)
        assert "another" in refusal(batches.load_state_dict, state), other


# tokens

@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "w", "v"]
    return BertTokenizer(vocab={token: i for i, token in enumerate(vocabulary)})


def test_a_micro_batch_by_hand(tokenizer):
    """w: 3 tokens with [CLS] and [SEP]; w v w: 5; six w: 8, cut to 5, the last of them [SEP]. The
    longest first, equals in order, 15 tokens with padding."""
    texts = ["w", "w v w", "w w w w w w"]
    batch, = data.make_micro_batches(tokenizer, texts, max_length=5, micro_tokens=15)
    assert batch.index.tolist() == [1, 2, 0]
    assert batch.input_ids.tolist() == [[2, 5, 6, 5, 3], [2, 5, 5, 5, 3], [2, 5, 3, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


@pytest.mark.parametrize("texts, micro_tokens, whole, expected", [
    (["w", "w v w", "w v w"], 15, False, [[1, 2, 0]]),
    (["w", "w v w", "w v w"], 14, False, [[1, 2], [0]]),
    (["w", "w v w", "w v w"], 1, False, [[1], [2], [0]]),
    (["w", "w v w", "w v w"], 1, True, [[1, 2, 0]]),
    (["w", "w", "w v w", "w"], 99, False, [[2], [0, 1, 3]]),
])
def test_micro_batches_by_hand(tokenizer, texts, micro_tokens, whole, expected):
    """Texts of 3, 5 and 5 tokens are 15 with padding. Of 14 the third does not fit. A bound of 1
    still gives each text alone, unless they are to be whole. w v w and three w have 5 + 3 x 3 = 14
    tokens, and 20 with padding: more than 4/3 of 14, so not in one."""
    batches = data.make_micro_batches(tokenizer, texts, 5, micro_tokens, whole)
    assert [batch.index.tolist() for batch in batches] == expected


@pytest.mark.parametrize("seed", range(3))
def test_micro_batches_hold_every_text_once_within_the_bound_with_little_padding(tokenizer, seed):
    """600 texts of 1 to 120 words (+ 2 tokens), cut at 100: about 33,000 tokens, at most 1,024 at a
    time."""
    words = np.random.default_rng(seed).integers(1, 121, size=600)
    texts = [" ".join(["w"] * n) for n in words]
    batches = data.make_micro_batches(tokenizer, texts, max_length=100, micro_tokens=1024)
    assert sorted(i for batch in batches for i in batch.index.tolist()) == list(range(600))
    widths = [batch.input_ids.shape[1] for batch in batches]
    assert widths == sorted(widths, reverse=True) and widths[0] == 100
    for batch in batches:
        lengths = [min(words[i] + 2, 100) for i in batch.index]
        assert batch.input_ids.numel() <= 1024
        assert batch.attention_mask.sum(1).tolist() == lengths
        assert batch.attention_mask.equal((batch.input_ids != 0).long())
        assert batch.attention_mask.float().mean() >= 0.95


def test_a_length_that_the_model_cannot_take_is_refused(tokenizer):
    """[CLS] and [SEP] alone are no text: at least 3."""
    assert "--max-length 2" in refusal(data.make_micro_batches, tokenizer, ["w"], 2, 9)


def test_a_tokenizer_is_trained_once_and_kept(tmp_path, capsys):
    """The second call says nothing and reads what the first wrote; upper case is lower case to
    it."""
    lines = [["the cat sat on the mat", f"the dog sat on the log {i}"] for i in range(10)]
    sources = corpus(tmp_path, a=lines)
    first = data.train_tokenizer(sources, vocab_size=100)
    assert capsys.readouterr().out.count("\n") == 1 and len(first) <= 100
    second = data.train_tokenizer(sources, vocab_size=100)
    assert capsys.readouterr().out == "" and second.get_vocab() == first.get_vocab()
    upper, lower = second(["The CAT", "the cat"])["input_ids"]
    assert upper == lower and second.unk_token_id not in upper
    assert (upper[0], upper[-1]) == (second.cls_token_id, second.sep_token_id)
