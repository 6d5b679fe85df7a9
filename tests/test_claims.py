"""What experiments/claims.py replaces in train, scores, decides and draws; nothing is trained."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
from corpora.formats import Row
from experiments import claims, verdicts


# what is replaced

# all queries point east; of the positives the first does, the others point north
Q, P = torch.tensor([[1.0, 0], [2, 0], [1, 0]]), torch.tensor([[2.0, 0], [0, 1], [0, 3]])


def test_from_queries_is_equation_3_with_queries_as_anchors():
    """tau = 1. What points the same way counts e, any other 1. Every query sees e + 1 + 1, and its
    own is e, 1, 1:

        ln(e + 2) - 1,  ln(e + 2),  ln(e + 2)
    """
    loss, accuracy = claims.from_queries(Q, P, None, 1.0, None)
    assert loss.item() == pytest.approx(math.log(math.e + 2) - 1 / 3)
    assert accuracy == pytest.approx(1 / 3)


def test_from_positives_is_equation_3_with_positives_as_anchors():
    """The first sees e + e + e, its own is e; the others see 1 + 1 + 1: always ln 3."""
    loss, _ = claims.from_positives(Q, P, None, 0.5, None)
    assert loss.item() == pytest.approx(math.log(3))


def test_own_negatives_are_all_that_a_query_sees():
    """tau = .5: e^2 instead of e. The rows' negatives point east, north, north: to the e^2 + 2 of
    above the first query adds e^2, the others 1. Of the positives ln 3."""
    loss, _ = claims.own_negatives(Q, P, P[:, None], 0.5, None)
    e2 = math.e ** 2
    there = (math.log(2 * e2 + 2) - 2 + 2 * math.log(e2 + 3)) / 3
    assert loss.item() == pytest.approx(there + math.log(3))


@pytest.fixture
def corpus(tmp_path):
    """Opens sources of these [query, positive] rows; fewer than 20 targets hold nothing out."""
    def open_sources(**rows):
        for name, values in rows.items():
            text = "".join(json.dumps(value) + "\n" for value in values)
            (tmp_path / f"{name}.jsonl").write_text(text)
        entries = [{"name": name, "path": f"{name}.jsonl"} for name in rows]
        (tmp_path / "m.json").write_text(json.dumps(entries))
        return data.load_sources(tmp_path / "m.json")
    return open_sources


def test_mixed_batches_have_the_same_rows_and_in_each_batch_several_sources(corpus):
    sources = corpus(**{name: [[f"{name}{i}", f"{name}{i}+"] for i in range(19)] for name in "ab"})
    apart = data.SourceBatches(sources, 8, seed=2)
    rows = [row for _ in range(4) for row in next(apart).rows]
    claims.MixedBatches.ahead = 4
    mixed = claims.MixedBatches(sources, 8, seed=2)
    batches = [next(mixed) for _ in range(4)]
    assert sorted(rows) == sorted(row for batch in batches for row in batch.rows)
    assert {row.query[0] for row in rows} == {"a", "b"}
    assert all({row.query[0] for row in batch.rows} == {"a", "b"} and len(batch.rows) == 8
               for batch in batches)
    assert mixed.state_dict() == apart.state_dict()


def test_in_a_mixed_batch_no_text_stands_twice(corpus):
    """Every text is in both sources, and so twice among their 32 rows."""
    rows = [[f"{i}", f"{i}+"] for i in range(16)]
    sources = corpus(a=rows, b=rows)
    claims.MixedBatches.ahead = 8
    for seed in (1, 4):
        mixed = claims.MixedBatches(sources, 4, seed)
        for batch in (next(mixed) for _ in range(8)):
            assert len({row.query for row in batch.rows}) == 4


def test_repeating_batches_take_rows_as_they_come(corpus):
    """All rows have one positive, of which SourceBatches lets one into a batch."""
    sources = corpus(a=[[f"{i}", "same"] for i in range(16)] + [["x", "y"], ["z", "w"]])
    batch = next(claims.RepeatingBatches(sources, 2, seed=0))
    order = data.SourceBatches(sources, 2, seed=0)._order(sources[0])
    assert [row.id for row in batch.rows] == order[:2].tolist()


# scores

def test_scores_are_of_search_among_held_out_and_other_targets():
    """A text's vector is that of its angle in degrees. Queries of a: 0, whose target is at 10, and
    90, whose target is at 60.

        0:  10 is its own; others at 5 (of a), 20 and 80 (of b)    position 2
        90: 60 is its own; 80 is nearer, and it is b's             position 2

    nDCG@10 is 1 / log2(3) for both. Back, 10 finds 0 before 30, and 60 finds 30 and 90 at equal
    distance, which counts against us: position 2."""
    def vectors(texts):
        angle = torch.tensor([float(text) for text in texts]).deg2rad()
        return torch.stack([angle.cos(), angle.sin()], 1)

    rows = [Row("0", "10", []), Row("90", "60", [])]
    a = SimpleNamespace(name="a", held_out=rows, read=lambda i: Row("200", "5", []))
    b = SimpleNamespace(name="b", held_out=[Row("0", "1", [])],
                        read=lambda i: [Row("30", "20", []), Row("200", "80", [])][i])
    found = claims.among(vectors, [a, b], {"a": np.array([0]), "b": np.array([0, 1])}, back=True)
    assert found["ndcg@10"]["a"] == pytest.approx(1 / math.log2(3), abs=1e-4)
    assert found["recall@1"] == {"a": 0.0, "b": 1.0, "mean": 0.5}
    assert found["other source"]["a"] == 0.5
    assert found["back"]["recall@1"]["a"] == 0.5


# what was seen

@pytest.mark.parametrize("differences, word, bound", [
    ([1, 2, 3], "seen", 2 / math.sqrt(3)),  # mean 2, deviation 1
    ([-1, -2, -3], "the opposite", 2 / math.sqrt(3)),
    ([1, 1, 7], "not told apart", 4),  # mean 3, deviation sqrt((4 + 4 + 16) / 2) = sqrt(12)
    ([-1] + [10] * 8, "not told apart", 22 / 9),  # mean 8.8, deviation 11/3: two signs
    ([0, 0], "not told apart", 0),
])
def test_a_verdict_needs_one_sign_and_twice_the_standard_error(differences, word, bound):
    assert verdicts.verdict(differences) == (word, pytest.approx(bound))


def result(ndcg, back=0.5, nearer=0.5, **more):
    scores = {"ndcg@10": {"mean": ndcg}, "back": {"ndcg@10": {"mean": back}}, "v_measure": 0.5,
              "other source": {"mean": nearer}, "held-out": {"mean": ndcg},
              "many": {"ndcg@10": {"mean": ndcg}, "held-out": {"mean": ndcg}}}
    return {"scores": scores, "seconds": 100, **more}


RESULTS = {
    "setting": {"steps": 40},
    "base/0": result(0.5, nearer=0.2), "base/1": result(0.6, nearer=0.3),
    "tau-0.02/0": result(0.4), "tau-0.02/1": result(0.49),
    "tau-0.1/0": result(0.5), "tau-0.1/1": result(0.62), "tau-0.1/2": result(0.9),
    "mixed/0": result(0.3, nearer=0.4), "mixed/1": result(0.4, nearer=0.5, wrong=0.2),
    "swapped/0": result(0.1), "swapped/1": result(0.2), "filtered/0": result(0.3),
    "filtered/1": result(0.4),
    "memory fp32/1024": {"scores": {"plan": 6.5, "measured": 6.24}},
    "memory fp32/4096": {"scores": {"plan": 26.4}},
    "memory bf16/4096": {"scores": {"plan": 12.6}},
}

SEEN = RESULTS, list(claims.CLAIMS.values()), claims.rooms(RESULTS)


def test_the_table_has_a_line_a_claim_with_arms_spread_and_verdict():
    """tau .05 less .02: .1 and .11, seen; less .1: 0 and -.02, mean -.01, s.e. .01. Fewer queries
    with another source's text nearer are better. Seed 2 has tau .1 alone: it does not count."""
    table = verdicts.table(*SEEN).splitlines()
    tau, = [line for line in table if "tau" in line]
    assert ".02: 0.445 ± 0.064<br>**.05**: 0.550 ± 0.071<br>.1: 0.560 ± 0.085 |" in tau
    assert tau.endswith(
        "| **seen**: better than .02; **not told apart** from .1 (0.020 would have been seen) |")
    nearer, = [line for line in table if "other sources' texts" in line]
    assert "mixed: 0.450 ± 0.071 (20.0% wrong)" in nearer
    assert nearer.endswith("| **seen**: better than mixed |")
    filtering, = [line for line in table if "consistency" in line]
    assert "as it is: 0.550" in filtering
    assert filtering.endswith("| **seen**: better than 20 % wrong |")
    assert "| fp32 | 6.2 | *26.4* |" in table and "| bf16 |  | *12.6* |" in table


def test_the_figure_has_a_panel_a_claim_and_is_small(tmp_path):
    pytest.importorskip("matplotlib")
    verdicts.draw(*SEEN, tmp_path / "claims.svg")
    svg = (tmp_path / "claims.svg").read_text()
    assert len(svg) < 100_000 and "<dc:date>" not in svg
    for says in ("tau = .05 is effective", "a batch from one source", "room for large batches"):
        assert f">{says}" in svg


def test_without_matplotlib_a_line_says_so_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(claims, "run_all", lambda *_: pytest.fail("it ran"))
    with pytest.raises(SystemExit, match="pip install -r experiments/requirements.txt"):
        claims.main(["--figure", str(tmp_path / "claims.svg")])


# running

def test_what_is_there_is_not_run_again(monkeypatch, tmp_path, capsys):
    """Two seeds of two arms: base/0 is there. Two took 100 s, so three take 300 s, .1 hours."""
    out, ran = tmp_path / "claims.json", []
    setting = {"steps": 160, "batch": 256, "length": 32, "precision": str(claims.precision()),
               "distractors": [30_000, 100_000], "corpus": "corpus"}
    claims.write_results(out, {"setting": setting, "base/0": result(0.5), "cls/7": result(0.5)})

    def child(args, arm, seed):
        ran.append(f"{arm}/{seed}")
        return result(0.25)

    monkeypatch.setattr(claims, "child", child)
    monkeypatch.setattr(claims, "docs", lambda args: tmp_path / "corpus" / "manifest.json")
    command = ["--only", "source-wise", "--seeds", "2", "--out", str(out), "--runs", str(tmp_path)]
    claims.main(command)
    assert sorted(ran) == ["base/1", "mixed/0", "mixed/1"]
    assert "3 arms to run, 1 are there: about 0.1 hours" in capsys.readouterr().out
    kept = json.loads(out.read_text())
    assert kept["base/0"] == result(0.5) and kept["mixed/1"] == result(0.25)
    claims.main(command)
    assert len(ran) == 3
    with pytest.raises(SystemExit, match="choose another --out"):
        claims.main([*command, "--seeds", "3", "--steps", "2"])


def test_every_claim_is_of_arms_that_there_are():
    for claim in claims.CLAIMS.values():
        assert claim.choice in claim.arms and set(claim.arms.values()) <= set(claims.ARMS)
