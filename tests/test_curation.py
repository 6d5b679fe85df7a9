"""curate.py run as a user runs it, on toy sources.

Two kinds of toy. In the plane, a text ends in the angle at which it lies ("p1 90 40" is at 40 degrees), the retriever is
told to read it, and the cross-encoder by hand gives a passage the percentage that stands in it for the query of its number
("q1 0" asks for "p1 90 40" with 0.9) or for every query ("n1 75 2": 0.75), else 0.05; one whose head has bias 1 gives the
square. Else a JinaBERT of one layer with random weights: its mean of word embeddings finds texts of the same words.
"""

import gzip
import json
import math
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

import data
import model
import train
from corpora import formats
from curation import __main__ as curate
from curation import pool as search
from curation import reranker as judge

STOP = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
WORDS = [f"w{i}" for i in range(60)]
CONFIG = dict(vocab_size=65, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
              hidden_dropout_prob=0.0, initializer_range=0.1)


@pytest.fixture(autouse=True)
def handlers():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    yield
    for number, handler in STOP.items():
        signal.signal(number, handler)


def write(name, lines):
    raw = "".join(json.dumps(line) + "\n" for line in lines).encode()
    Path(name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*"))
            if path.is_file() and ".cache" not in path.parts}  # load_sources' own


def sources(entries, **rows):
    """Writes NAME.jsonl for every NAME=rows, and m.json with {NAME: what else its entry says}."""
    for name, values in rows.items():
        write(f"{name}.jsonl", values)
    Path("m.json").write_text(json.dumps([{"name": name, "path": f"{name}.jsonl", **more} for name, more in entries.items()]))


def run(command, out, *flags):
    encoder = "--retriever" if command == "mine" else "--model"
    curate.main([command, "--sources", "m.json", encoder, "toy", "--out", out, *map(str, flags)])


def refused(capsys, *argv, status=2):
    """Runs it expecting this exit status -> the one line it said, progress bars aside."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("curate.py") or "Error" in line]
    assert stop.value.code == status and len(said) == 1, said
    return said[0]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """toy: an encoder. reranker: a cross-encoder that gives every pair 1/2. square: of bias 1. two: with two outputs."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate("[PAD] [UNK] [CLS] [SEP] [MASK]".split() + WORDS)}
    tokenizer = transformers.BertTokenizer(vocab=vocabulary, model_max_length=512)
    model.save(model.PooledEncoder(model.JinaBertModel(model.JinaBertConfig(**CONFIG))), tokenizer, folder / "toy")
    reranker = model.CrossEncoder(model.JinaBertConfig(**CONFIG))
    torch.nn.init.zeros_(reranker.classifier.weight), torch.nn.init.zeros_(reranker.classifier.bias)
    model.save(reranker, tokenizer, folder / "reranker")
    torch.nn.init.ones_(reranker.classifier.bias)
    model.save(reranker, tokenizer, folder / "square")
    two = transformers.BertForSequenceClassification(transformers.BertConfig(**CONFIG | {"num_labels": 2}))
    model.save(two, tokenizer, folder / "two")
    return folder


def enter(patch, folder, models):
    patch.chdir(folder)
    for path in models.iterdir():
        os.symlink(path, path.name)


@pytest.fixture
def folder(tmp_path, monkeypatch, models):
    """An empty folder, with the models at hand."""
    enter(monkeypatch, tmp_path, models)


def angle(text):
    return math.radians(float(text.split()[-1]))


def relevance(query, passage):
    name, percent = passage.split()[:2]
    return float(percent) / 100 if name[0] == "n" or name[1:] == query.split()[0][1:] else 0.05


@pytest.fixture
def plane(folder, monkeypatch):
    """The toy in the plane -> the texts of every call of the retriever."""
    calls = []

    def embed(self, texts):
        calls.append(list(texts))
        return torch.tensor([[math.cos(angle(text)), math.sin(angle(text))] for text in texts])

    monkeypatch.setattr(search.Embedder, "__call__", embed)
    monkeypatch.setattr(judge.Reranker, "__call__", lambda self, pairs: np.array(
        [relevance(*pair) ** (1 + self.encoder.classifier.bias.item()) for pair in pairs], "f4"))
    write("eval.jsonl", [[f"q{i} {i}", f"p{i} 90 {i}"] for i in range(901, 921)])  # 20, all ranked rightly
    return calls


# §5.1: the consistency filter

SIX = [["q0 0", "p0 1"], ["q1 10", "p1 14"], ["q2 20", "p2 29"], ["q3 30", "p3 90"], ["q4 200", "p4 210"], ["q5 190", "p5 190"]]


@pytest.mark.parametrize("top_k, kept", [(1, [0, 1, 5]), (2, [0, 1, 2, 4, 5]), (4, [0, 1, 2, 3, 4, 5])])
def test_filter_keeps_a_pair_whose_target_is_among_the_nearest(plane, capsys, top_k, kept):
    """Targets lie at 1, 14, 29, 90, 210 and 190 degrees. Distances to the own one, and how many others are as near or nearer:
    q0 1, none; q1 4, none; q2 9, the one at 14; q3 60, those at 1, 14 and 29; q4 10, the one at 190, a tie; q5 0, none.
    So the ranks are 1, 1, 2, 4, 2, 1."""
    sources({"a": {}}, a=SIX)
    run("filter", "out", "--top-k", top_k)
    assert [row["query"] for row in lines("out/a.jsonl")] == [SIX[i][0] for i in kept]
    assert lines("out/dropped/a.jsonl") == [
        {"query": SIX[i][0], "positive": SIX[i][1], "row": i,
         "reason": f"rank {[1, 1, 2, 4, 2, 1][i]} among 6 random targets and its own, --top-k {top_k}"}
        for i in range(6) if i not in kept]
    table = [line.split() for line in Path("out/report.txt").read_text().splitlines()]
    for what, chosen in ("kept", kept), ("dropped", set(range(6)) - set(kept)):  # two of each, where there are two
        shown = {" ".join(line[3:]) for line in table if line[0] == what and "->" in line}
        assert len(shown) == min(2, len(chosen)) and shown <= {" -> ".join(SIX[i]) for i in chosen}
    assert ["a", "6", str(len(kept)), f"{len(kept) / 6:.1%}", str(6 - len(kept))] in table
    assert Path("out/report.txt").read_text() in capsys.readouterr().out


def test_neither_a_query_s_other_positives_nor_its_own_text_count_against_it(plane):
    """q has five positives at 1 to 5 degrees, and its own text, at 0, is the target of x: each of the five would be behind that
    one, and four of them behind others of the five. x lies at 90, and its target at 0 is behind all ten others."""
    sources({"a": {}}, a=[{"query": "q 0", "pos": [f"p {i}" for i in range(1, 6)]}, ["x 90", "q 0"],
                          *([f"q{i} {i}", f"p{i} {i}"] for i in range(50, 55))])
    run("filter", "out", "--top-k", 1)
    assert [row["query"] for row in lines("out/a.jsonl")] == ["q 0"] * 5 + [f"q{i} {i}" for i in range(50, 55)]
    dropped, = lines("out/dropped/a.jsonl")
    assert dropped["reason"].startswith("rank 11 among 11 random targets")


@pytest.fixture(scope="module")
def filtered(models, tmp_path_factory):
    """A real filter run with the random JinaBERT; m.json and out/ are in the working folder. Source "s": 120 pairs of a query
    of four words and a target of the same in another order and one more, the targets of rows 0 to 19 swapped two by two, two
    negatives a row, 5 % held out. Source "eval/s": 60 such pairs, with an eval file of 9 (one target held by a row of "s" too)
    and a collection of 2."""
    rng = np.random.default_rng(0)

    def pair():
        words = rng.permutation(WORDS)[:5]
        return [" ".join(words[:4]), " ".join(rng.permutation(words))]

    rows, held_out = [pair() + pair() for _ in range(120)], [pair() for _ in range(9)]
    for i in range(0, 20, 2):
        rows[i][1], rows[i + 1][1] = rows[i + 1][1], rows[i][1]
    rows[40][1] = held_out[0][1]
    with pytest.MonkeyPatch.context() as patch:
        enter(patch, tmp_path_factory.mktemp("filtered"), models)
        sources({"s": {"rate": 3, "licence": "CC0"}, "eval/s": {"path": "same.jsonl", "rate": 1, "kind": "similarity",
                                                                "eval": "held.jsonl", "collection": "more.jsonl"}},
                s=rows, same=[pair() for _ in range(60)], held=held_out, more=[pair() for _ in range(2)])
        run("filter", "out", "--chunk", 50)
        yield


def test_planted_errors_are_dropped_and_every_row_is_kept_with_its_negatives_or_has_a_reason(filtered):
    """A swapped target shares one word or so with its query, and some other targets share more."""
    reasons, held_out = ({row["row"]: row["reason"] for row in lines(f"out/{folder}/s.jsonl")}
                         for folder in ("dropped", "held-out"))
    assert set(reasons) == set(range(20)) - set(held_out) and 40 in held_out
    assert all(reason.startswith("rank ") for reason in reasons.values())
    assert set(held_out.values()) == {"a text of it is held out"}
    for name, files in ("s", ["s"]), ("eval%2Fs", ["same", "more"]):
        given = [row for file in files for row in lines(f"{file}.jsonl")]
        kept, *others = (lines(f"out/{folder}{name}.jsonl") for folder in ("", "dropped/", "held-out/"))
        assert sorted([row["query"], row["positive"]] for row in sum(others, kept)) == sorted(row[:2] for row in given)
        negatives = {row[0]: row[2:] for row in given}
        assert all(row.get("negatives", []) == negatives[row["query"]] for row in kept)


def test_what_is_held_out_stays_held_out_and_the_manifest_says_all_it_said(filtered):
    """"s" holds out 120 // 20 = 6 targets, which become its eval file; "eval/s" has its 9, and drops its collection."""
    before, after = data.load_sources("m.json"), data.load_sources("out/manifest.json")
    assert json.loads(Path("out/manifest.json").read_text()) == [
        {"name": "s", "rate": 3, "licence": "CC0", "path": "s.jsonl", "eval": "eval/s.jsonl", "collection": "dropped/s.jsonl"},
        {"name": "eval/s", "rate": 1, "kind": "similarity", "path": "eval%2Fs.jsonl", "eval": "eval/eval%2Fs.jsonl",
         "collection": "dropped/eval%2Fs.jsonl"}]
    assert after[0].held_out_hashes == before[0].held_out_hashes and [len(s.held_out) for s in after] == [6, 9]
    assert [{row[:2] for row in s.held_out} for s in after] == [{row[:2] for row in s.held_out} for s in before]
    assert [len(s.train) for s in after] == [len(s.index) for s in after]  # nothing of it is in the rows
    next(data.SourceBatches(after, 32, seed=0))


def test_the_same_command_with_other_chunks_writes_the_same_bytes(filtered):
    """--chunk 7: other micro-batches, other blocks of cosines."""
    run("filter", "other", "--chunk", 7)
    assert tree("other") == tree("out")


def test_rows_are_drawn_by_the_sources_rates_and_a_small_source_gives_what_it_has(plane):
    """Rates 1 and 3: 12 rows are 3 and 9. 24 would be 6 and 18, but b has 10: 14 are a's; of 30, 20, but a has 19. Of so few
    targets none is held out, and the pool is drawn from all 29."""
    sources({"a": {}, "b": {"rate": 3}}, a=[[f"q{i} {i}", f"p{i} {i}"] for i in range(19)],
            b=[[f"r{i} {i + 40}", f"s{i} {i + 40}"] for i in range(10)])
    for rows, shares in (12, (3, 9)), (24, (14, 10)), (30, (19, 10)):
        run("filter", f"of{rows}", "--rows", rows)
        assert tuple(len(lines(f"of{rows}/{name}.jsonl")) for name in "ab") == shares
        assert "among the first 2 of 29 random targets" in Path(f"of{rows}/report.txt").read_text()
    few, more = ([row["query"] for row in lines(f"of{rows}/a.jsonl")] for rows in (12, 24))
    assert set(few) < set(more) and few != ["q0 0", "q1 1", "q2 2"]


def test_what_is_known_of_texts_in_rows_that_were_not_drawn_stays_known_to_mine(plane):
    """Query i has the positives i and i + 1 in a, and i + 3 in b; about half of the rows are drawn. Of the others those are named
    whose two texts are drawn in other rows, and mine gives no query such a text, for a query with its positive as its negative
    is a false negative."""
    rows = {"a": [(f"q{i // 2} {i // 2}", f"p{(i + 1) // 2} {(i + 1) // 2}") for i in range(18)],
            "b": [(f"q{i} {i}", f"p{i + 3} {i + 3}") for i in range(12)]}
    sources({name: {"kind": "similarity"} for name in rows}, **rows)
    run("filter", "filtered", "--rows", 16, "--top-k", 12)
    kept, dropped = ({name: {(row["query"], row["positive"]) for row in lines(f"filtered/{folder}{name}.jsonl")}
                      for name in rows} for folder in ("", "dropped/"))
    queries, positives = map(set, zip(*kept["a"], *kept["b"]))
    assert [len(pairs) for pairs in kept.values()] == [8, 8] and all(dropped.values())
    assert dropped == {name: {(q, p) for q, p in rows[name] if q in queries and p in positives} - kept[name] for name in rows}
    assert {row["reason"] for name in rows for row in lines(f"filtered/dropped/{name}.jsonl")} == {
        "not drawn (--rows), but its texts are, in other rows"}
    run("mine", "mined", "--sources", "filtered/manifest.json", "--negatives", 3)
    mined = {(row["query"], n) for name in rows for row in lines(f"mined/{name}.jsonl") for n in row["negatives"]}
    assert len(mined) > 16 and not mined & {*rows["a"], *rows["b"]}


# §5.2: negatives

@pytest.mark.parametrize("margin, count, chosen, rejected", [
    (0, 9, [0, 3, 4, 6], 4), (0, 2, [0, 3], 4), (0.25, 9, [3, 6], 6), (0.25, 1, [3], 6), (0.5, 9, [], 8)])
def test_negatives_are_the_nearest_that_score_lower_by_more_than_the_margin(margin, count, chosen, rejected):
    """The positive scores 1/2. Without a margin .495 and 1/2 are its equals, .75 is higher, and what is no number is not lower.
    1/4 is lower by 1/4, but not by more; 0 is lower by 1/2, but not by more."""
    scores = np.array([0.25, 0.495, 0.75, 0.125, 0.4875, 0.5, 0, np.nan], "f4")
    found, others = curate.choose(np.float32(0.5), scores, margin, count)
    assert (found.tolist(), others) == (chosen, rejected)
    assert curate.choose(0.5, scores[:0], margin, count)[1] == 0


N_OF_0 = ["n1 89.5 1", "n2 75 2", "n3 91 3", "n4 30 4", "n5 69 5", "n6 10 6"]
N_OF_1 = ["q0 0", "n99 1 0.5"] + [f"n{i} 50 {i + 170}" for i in range(12, 18)]
TWO = [["q0 0", "p0 90 40", *N_OF_0], ["q1 180", "p1 90 181", *N_OF_1]]


def mined_toy():
    """Two rows. What is known beside: b says that "n99 1 0.5" answers q0."""
    sources({"a": {"eval": "eval.jsonl"}, "b": {"kind": "similarity"}}, a=TWO,
            b=[["q0 0", "n99 1 0.5"], *([f"s{i} {i}", f"t{i} {i}"] for i in range(4))])


def test_a_negative_is_what_the_retriever_finds_and_the_cross_encoder_scores_lower(plane, capsys):
    """q0 lies at 0, so n1 to n6 (at 1 to 6 degrees) are its ranks 1 to 6; q0's own text and n99, a positive of it in b, are
    nearer and barred. Of the scores .895, .75, .91, .3, .69, .1 those of n4 and n6 are below .9 - .25, and a third is drawn
    from what is neither a candidate nor barred: p1 or N_OF_1. q1's six candidates (n12 to n17, at 182 to 187) all score .5 and
    none is rejected: 12 candidates for two rows, 4 of them rejected. The cosines are of 4 and 6 degrees."""
    mined_toy()
    run("mine", "out", "--cross-encoder", "reranker", "--negatives", 3, "--candidates", 6, "--margin", 0.25)
    first, second = lines("out/a.jsonl")
    assert (first["query"], first["positive_score"], first["negatives"][:2]) == ("q0 0", 0.9, [N_OF_0[3], N_OF_0[5]])
    assert first["mined"] == [{"from": "retriever", "rank": 4, "cosine": 0.9976, "score": 0.3},
                              {"from": "retriever", "rank": 6, "cosine": 0.9945, "score": 0.1}, {"from": "random"}]
    assert first["negatives"][2] in {"p1 90 181", *N_OF_1[2:]}
    assert second["negatives"] == N_OF_1[2:5] and [origin["rank"] for origin in second["mined"]] == [1, 2, 3]
    report = Path("out/report.txt").read_text()
    assert ["a", "2", "12", "4", "33.3%", "1", "1"] in [line.split() for line in report.splitlines()]
    assert "the cross-encoder ranks 20 of 20 rightly, the retriever 20\n" in report and report in capsys.readouterr().out


def test_sources_of_similarity_get_random_negatives_and_need_no_cross_encoder(plane, monkeypatch):
    """b alone: the retriever embeds nothing, no cross-encoder is opened. Its two positives of s0 are not drawn for it, so
    each draws the 3 others' targets; so does u, which itself is a target."""
    monkeypatch.setattr(model, "load_cross_encoder", None)
    sources({"b": {"kind": "similarity"}}, b=[["s0 0", "t0 0"], ["s0 0", "u 1"], ["u 1", "t2 2"],
                                              *([f"s{i} {i}", f"t{i} {i}"] for i in (3, 4))])
    run("mine", "out", "--negatives", 3)
    rows = lines("out/b.jsonl")
    assert plane == [] and not any("positive_score" in row for row in rows) and not Path("out/cross-encoder").exists()
    assert all(row["mined"] == [{"from": "random"}] * 3 and len(set(row["negatives"])) == 3 for row in rows)
    assert [sorted(row["negatives"]) for row in rows[:3]] == [["t2 2", "t3 3", "t4 4"]] * 2 + [["t0 0", "t3 3", "t4 4"]]


def test_no_known_positive_query_held_out_or_rejected_text_is_ever_a_negative(plane):
    """40 rows at random angles. Queries recur with other positives, are positives themselves, in capitals too; one row gives a
    held-out text as its negative; a third of the texts are "n" and score .95. Barred and candidates are recomputed densely."""
    rng = np.random.default_rng(0)
    targets = [f"{'n' if i % 3 == 0 else 'p'}{i} {95 if i % 3 == 0 else 90} {360 * rng.random():.3f}" for i in range(40)]
    queries = [f"q{i // 2} {i // 2}" for i in range(40)]
    rows = [[q, t] for q, t in zip(queries, targets)] + [["Q3 3", "p55 90 1", "p901 90 901"], [targets[4], "p56 90 2", "q3 3"]]
    others = [["q3 3", targets[20].upper()], *([f"r{i} {i}", f"s{i} {i}"] for i in range(7))]
    sources({"a": {"eval": "eval.jsonl"}, "b": {"kind": "similarity"}}, a=rows, b=others)
    run("mine", "out", "--cross-encoder", "reranker", "--negatives", 6, "--candidates", 5)
    pool = {formats.text_hash(text): text for text in (*targets, "p55 90 1", "p56 90 2", "q3 3")}
    known, hard = [(formats.text_hash(q), formats.text_hash(p)) for q, p, *_ in rows + [["q3 3", targets[20]]]], 0
    for row in lines("out/a.jsonl"):
        query, negatives = formats.text_hash(row["query"]), list(map(formats.key, row["negatives"]))
        barred = {query} | {p for q, p in known if q == query}
        near = sorted(set(pool) - barred, key=lambda text: -math.cos(angle(row["query"]) - angle(pool[text])))[:5]
        low = [text for text in near if relevance(row["query"], pool[text]) < row["positive_score"] - 0.01]
        assert len(set(negatives)) == 6 and set(negatives) <= set(pool) - barred
        assert set(negatives[: len(low)]) == set(low) and not set(negatives[len(low):]) & set(near)
        hard += len(low)
    assert 42 < hard < 4 * 42  # some candidates are negatives, and some are rejected


def test_what_a_source_without_a_kept_row_holds_out_is_no_negative_after_the_filter_either(plane):
    """a holds out all its rows, so the filter's manifest is without it. Two of the texts are a target and a negative of b."""
    pairs = lines("eval.jsonl")
    held_out = {pair[1] for pair in pairs}
    sources({"a": {"eval": "a.jsonl"}, "b": {"kind": "similarity"}}, a=pairs,
            b=[*SIX, ["x 5", pairs[0][1]], ["z 7", "y 7", pairs[1][1]]])
    run("filter", "filtered", "--top-k", 3)
    run("mine", "mined", "--sources", "filtered/manifest.json", "--negatives", 6)
    assert not held_out & {text for row in lines("mined/b.jsonl") for text in row["negatives"]}


def test_a_cross_encoder_is_tried_on_20_held_out_pairs_of_all_searched_sources(plane, capsys, monkeypatch):
    """a holds out 10 pairs, all it has, c 9 or 10; b is not searched, and its 4 do not count. a is left with no row to mine.
    Where they are too few, it is said before one is trained; nothing was done then, and the same --out may go another way."""
    monkeypatch.setattr(curate, "train_judge", None)
    pairs = lines("eval.jsonl")
    write("of_b.jsonl", [[f"r{i} {i}", f"s{i} {i}"] for i in range(4)])
    write("of_c.jsonl", pairs[10:19])
    sources({"a": {"eval": "a.jsonl"}, "b": {"kind": "similarity", "eval": "of_b.jsonl"}, "c": {"eval": "of_c.jsonl"}},
            a=pairs[:10], b=SIX, c=SIX)
    for command in ("mine", "few", "--cross-encoder", "reranker"), ("mine", "untrained"), ("cross-encoder", "judge"):
        said = refused(capsys, *command)
        assert "19 held-out pairs are too few" in said and "eval files with 20 or more" in said
    write("of_c.jsonl", pairs[10:20])
    run("mine", "few", "--cross-encoder", "reranker", "--negatives", 2, "--candidates", 3)
    said = capsys.readouterr().out
    assert "the cross-encoder ranks 20 of 20 rightly" in said and "a keeps no row and is left out; raise --rows" in said
    assert [entry["name"] for entry in json.loads(Path("few/manifest.json").read_text())] == ["b", "c"]


def test_a_held_out_positive_is_tried_against_a_near_target_and_so_is_the_retriever(plane):
    """20 targets at 4, 22, 40 ... degrees; the query of target i lies 4 degrees before it if i < 12, else 12. Target i - 1, 18
    degrees before target i, is the nearest other one: 14 or 6 degrees from the query. So 12 are ranked rightly."""
    rows = [formats.Row(f"q{i} {18 * i + (0 if i < 12 else -8)}", f"p{i} 90 {18 * i + 4}", []) for i in range(20)]
    pairs, right = curate.held_out_pairs([SimpleNamespace(held_out=rows)], partial(search.Embedder.__call__, None),
                                         SimpleNamespace(candidates=1, seed=0))
    assert pairs == [(rows[i].query, rows[j].positive) for i in range(20) for j in (i, i - 1)] and right == 12


# an interruption

@pytest.mark.parametrize("command, call, again", [
    ("filter", 2, [1, 2, 3, 4, 5, 6, 7, 8]), ("filter", 4, [3, 4, 5, 6, 7, 8]), ("filter", 5, [3, 4, 5, 6, 7, 8]),
    ("filter", 8, [7, 8]), ("mine", 5, [0, 1, 2, *range(4, 20)]), ("mine", 10, [0, 1, 2, *range(9, 20)]), ("mine", 20, [0, 1, 19])])
def test_a_command_that_was_stopped_goes_on_where_it_was(plane, monkeypatch, capsys, command, call, again):
    """The signal comes as the retriever is called for the time `call` (from 1); `again`: which calls (from 0) the second start
    makes. filter, 6 rows, chunks of 2: calls 0 to 2 for the pool, then queries and targets of three chunks; half a chunk is
    done again. mine, 2 rows, chunks of 1: 0 and 1 are the held-out pairs that every start tries the cross-encoder on, 2 is row
    0, 3 to 18 are the pool of 16, 19 is row 1. The second start finds the same texts elsewhere, with other --micro-tokens."""
    sources({"a": {}}, a=SIX) if command == "filter" else mined_toy()
    flags = ["--chunk", 2] if command == "filter" else [
        "--chunk", 1, "--cross-encoder", "reranker", "--negatives", 3, "--candidates", 6]
    run(command, "out", *flags)
    whole, every, embed = tree("out"), plane.copy(), search.Embedder.__call__
    shutil.rmtree("out"), plane.clear()
    with monkeypatch.context() as patch:
        patch.setattr(search.Embedder, "__call__", lambda self, texts: embed(self, texts) if len(plane) < call - 1 else
                      os.kill(os.getpid(), (signal.SIGTERM, signal.SIGINT)[call % 2]))
        assert "stopped; the same command goes on" in refused(capsys, command, "out", *flags, status=130)
    assert sorted(path for path in os.listdir() if path.startswith("out")) == ["out.work"]
    said = refused(capsys, command, "out", *flags, "--seed", 2)
    assert "out.work holds the work of another command, with another seed (0, now 2)" in said
    plane.clear(), shutil.copy("m.json", "n.json")
    run(command, "out", *flags, "--sources", "n.json", "--micro-tokens", 99)
    assert plane == [every[i] for i in again]
    assert tree("out") == whole and not Path("out.work").exists()


def test_after_an_interruption_another_cross_encoder_goes_on_with_what_the_retriever_found(plane, monkeypatch, capsys):
    """One row judged at a time: call 0 are the held-out pairs, 1 is row 0, 2 is row 1; stopped at 2. Another cross-encoder
    judges all three, and so does the same one at another margin, or for another number of negatives; with nothing changed it
    judges row 1 again. The retriever embeds the held-out pairs alone. With margin .2 row 0's n4, n5, n6 are below .7; of the
    squares .801, .5625, .828, .09, .476, .01 those of n2, n4, n5, n6 are below .81 - .2."""
    mined_toy()
    monkeypatch.setattr(curate, "JUDGED", 1)
    flags, judged, call = ("--negatives", 3, "--candidates", 6, "--margin", 0.2, "--cross-encoder"), [], judge.Reranker.__call__
    for name, hard in ("reranker", (4, 5, 6)), ("square", (2, 4, 5)):
        run("mine", f"with-{name}", *flags, name)
        assert lines(f"with-{name}/a.jsonl")[0]["negatives"] == [N_OF_0[i - 1] for i in hard]
    with monkeypatch.context() as patch:
        patch.setattr(judge.Reranker, "__call__", lambda self, pairs: judged.append(pairs) or (
            call(self, pairs) if len(judged) < 3 else os.kill(os.getpid(), signal.SIGINT)))
        refused(capsys, "mine", "out", *flags, "reranker", status=130)
    monkeypatch.setattr(judge.Reranker, "__call__", lambda self, pairs: judged.append(pairs) or call(self, pairs))
    for out in "same", "margin", "fewer":
        shutil.copytree("out.work", f"{out}.work")
    for out, name, again in ("out", "square", 3), ("same", "reranker", 2):
        judged.clear(), plane.clear()
        run("mine", out, *flags, name)
        assert len(judged) == again and len(plane) == 2 and tree(out) == tree(f"with-{name}")
    for out, *other in ("margin", "--margin", 0.4), ("fewer", "--negatives", 1):
        judged.clear()
        run("mine", out, *flags, "reranker", *other)
        run("mine", f"new-{out}", *flags, "reranker", *other)
        assert len(judged) == 3 + 3 and tree(out) == tree(f"new-{out}") != tree("same")


@pytest.mark.parametrize("what", ["corpus", "hold-out", "model"])
def test_work_of_other_texts_or_models_under_the_same_names_is_not_gone_on_with(plane, capsys, what):
    """Another collection, as many other held-out pairs, another retriever. The first start ends for want of texts: a's pool is
    17, p0, p1, p2, N_OF_0, N_OF_1. For q0 its text and p0 are barred, n99 and n1 to n5 are candidates, of which n1 and n3 are
    rejected; 9 are left."""
    sources({"a": {"eval": "eval.jsonl", "collection": "more.jsonl"}}, a=TWO, more=[["q2 2", "p2 90 2"]])
    shutil.copytree("toy", "own")
    command = "mine", "out", "--retriever", "own", "--cross-encoder", "reranker", "--candidates", 6, "--negatives", 14
    said = refused(capsys, *command)
    assert "row 0: 4 negatives found and 9 texts to draw from; lower --negatives 14" in said
    if what == "corpus":
        write("more.jsonl", [["q2 2", "p2 90 3"]])
    elif what == "hold-out":
        write("eval.jsonl", [*lines("eval.jsonl")[1:], ["q921 921", "p921 90 921"]])
    else:
        encoder, tokenizer = model.load("own")
        next(encoder.parameters()).data += 1
        model.save(encoder, tokenizer, "own")
    assert f"out.work holds the work of another command, with another {what}" in refused(capsys, *command)


def test_what_a_small_top_k_has_embedded_serves_a_larger_one(plane, capsys):
    """Queries stand at 0, 60 .. 300 degrees, and each one's target 60 further: another's lies at its own place, and a third's 60
    before, a tie. All ranks are 3."""
    sources({"a": {}}, a=[[f"q{i} {60 * i}", f"p{i} {60 * i + 60}"] for i in range(6)])
    assert "no source keeps a row: see the table" in refused(capsys, "filter", "out", "--top-k", 2)
    plane.clear()
    run("filter", "out", "--top-k", 3)
    assert plane == [] and len(lines("out/a.jsonl")) == 6


def test_a_folder_that_is_not_ours_is_not_taken_for_the_work_of_a_command(plane, capsys):
    sources({"a": {}}, a=SIX)
    Path("out.work").mkdir()
    Path("out.work/thesis").write_text("mine")
    assert "out.work: holds something else, and would be removed at the end" in refused(capsys, "filter", "out")
    assert os.listdir("out.work") == ["thesis"]


def test_a_file_that_has_come_into_out_meanwhile_is_not_deleted(plane, monkeypatch, capsys):
    sources({"a": {}}, a=SIX)
    Path("out").mkdir()
    monkeypatch.setattr(search, "ranks", lambda q, *_: Path("out/notes").write_text("mine") and np.ones(len(q), int))
    assert "out: is not empty; choose another" in refused(capsys, "filter", "out")
    assert Path("out/notes").read_text() == "mine"


# the cross-encoder

@pytest.fixture(scope="module")
def topics(models, tmp_path_factory):
    """A folder with a source of ten topics, each a word that a query and its targets share among words that mean nothing;
    120 pairs, and 60 held out. A pair is right if the topics agree, so a cross-encoder can learn it. similar.json is a manifest
    without a source to search, bad.json one of a file whose line 5 is no pair."""
    folder, rng = tmp_path_factory.mktemp("topics"), np.random.default_rng(0)

    def pair(i):
        a, b = rng.permutation(WORDS[20:])[:2]
        return [f"{WORDS[i % 10]} {WORDS[20 + i // 10]}", f"{a} {WORDS[i % 10]} {b}"]

    with pytest.MonkeyPatch.context() as patch:
        enter(patch, folder, models)
        sources({"bad": {}}, bad=[pair(i) for i in range(4)] + [{"query": "w1", "pos": "w2", "neg": 7}])
        os.rename("m.json", "bad.json")
        sources({"b": {"kind": "similarity"}}, b=[pair(i) for i in range(200, 219)])
        os.rename("m.json", "similar.json")
        sources({"a": {"eval": "eval.jsonl"}, "b": {"kind": "similarity"}}, a=[pair(i) for i in range(120)],
                eval=[pair(i) for i in range(120, 180)])
    return folder


def test_training_a_cross_encoder_lowers_its_loss_below_ln_2(models):
    """Scores of 1/2 cost ln 2 = 0.693, whatever the number of candidates: each side weighs a half. Learnt: the topics of
    `topics`, by numbers of words."""
    rng = np.random.default_rng(0)

    def example(count):
        topic, others = rng.integers(10), rng.integers(10, size=count)
        noise = rng.integers(20, 60, size=(count + 2, 2))
        query, *passages = (f"w{a} w{t} w{b}" for t, (a, b) in zip([topic, topic, *others], noise))
        return judge.Example(query, passages[0], passages[1:])

    for count in 1, 4:
        halves = judge.Reranker(*model.load_cross_encoder(models / "reranker"), 32, 256)
        assert list(halves.train([[example(count) for _ in range(16)]], 1, 0.01)) == pytest.approx([math.log(2)], abs=1e-6)
    torch.manual_seed(0)
    learner = judge.Reranker(*model.load_cross_encoder(models / "toy", new_head=True), 32, 256)
    losses = list(learner.train([[example(4) for _ in range(16)] for _ in range(80)], 80, 0.01))
    assert np.mean(losses[-10:]) < 0.55 < math.log(2) < losses[0]


def test_a_judge_reads_a_pair_up_to_max_length_and_a_separator_in_a_text_does_not_split_it(models):
    """[CLS] w1 [SEP] w2 w3 w4 [SEP] are 7 tokens: at 7, what follows w4 is cut off. The toy reads 512. w1 [SEP] w2 and w3 w4
    are the texts w1 w2 and w3 w4, not w1 and w2 w3 w4. A model without token types needs no separator."""
    for max_length, same in (7, True), (8, False), (9999, False):
        reads = judge.Reranker(*model.load_cross_encoder(models / "toy", new_head=True), max_length, 64)
        short, long = reads([("w1", "w2 w3 w4"), ("w1", "w2 w3 w4 w5")])
        assert (abs(short - long) < 1e-6) == same
    found = reads([("w1 w2", "w3 w4"), ("w1 [SEP] w2", "w3 w4"), ("w1 w2", "w3[SEP]w4"), ("w1", "w2 w3 w4")])
    assert found[:3] == pytest.approx(found[0], abs=1e-6) and abs(found[3] - found[0]) > 1e-4
    untyped = transformers.BertForSequenceClassification(transformers.BertConfig(**CONFIG, num_labels=1, type_vocab_size=1))
    reads.tokenizer.sep_token = None
    assert np.isfinite(judge.Reranker(untyped.eval(), reads.tokenizer, 32, 64)([("w1", "w2")])).all()


def test_mine_trains_a_cross_encoder_where_none_is_given_and_leaves_it_beside(topics, monkeypatch, capsys):
    """As `curate.py cross-encoder` trains it from the same encoder, rows, steps and seed, at the rate for widths up to 256;
    given that by name, mine writes the same rows. The bytes of two runs are the same, and so are those of a run that was
    stopped when the cross-encoder was trained; the second start does not train."""
    monkeypatch.chdir(topics)
    monkeypatch.setattr(curate, "JUDGE_STEPS", 80), monkeypatch.setattr(curate, "JUDGE_QUERIES", 16)
    flags = "--candidates", 60, "--negatives", 5, "--batch-size", 16
    run("mine", "mined", *flags)
    head, first, accuracy, *table = Path("mined/report.txt").read_text().splitlines()
    right = int(accuracy.split("the cross-encoder ranks ")[1].split(" of 60 rightly")[0])
    assert "training one from toy on rows that it will judge: --rows leaves too few others" in first and right > 0.75 * 60
    run("cross-encoder", "judge", *flags[:2], "--lr", 1e-3)
    assert accuracy in capsys.readouterr().out
    assert tree("judge") == tree("mined/cross-encoder")
    run("mine", "given", *flags, "--cross-encoder", "judge")
    assert tree("given") == {path: text.replace(f"{first}\n".encode(), b"") for path, text in tree("mined").items()
                             if not path.startswith("cross-encoder")}
    with monkeypatch.context() as patch:
        patch.setattr(judge.Reranker, "__call__", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        refused(capsys, "mine", "again", *flags, status=130)
    monkeypatch.setattr(curate, "train_judge", None)
    shutil.copytree("again.work", "other.work")
    run("mine", "other", *flags, "--cross-encoder", "judge")
    assert tree("other") == tree("given")
    run("mine", "again", *flags)
    assert tree("again") == tree("mined")


@pytest.mark.parametrize("rows, trained_on", [(19, 5), (20, 20)])
def test_a_cross_encoder_is_trained_on_rows_that_are_not_mined_or_says_so(plane, monkeypatch, rows, trained_on):
    """A tenth of 5 steps of 10 queries are 5 rows. Of 19 rows b gives its 4, and a 15 of its 20: 5 others. Of 20 rows a gives
    16, and 4 others are too few: all 20 are trained on."""
    seen = []
    monkeypatch.setattr(curate, "JUDGE_STEPS", 5), monkeypatch.setattr(curate, "JUDGE_QUERIES", 10)
    monkeypatch.setattr(curate, "train_judge", lambda name, retrievers, rows, *args:
                        seen.extend(rows["a"].tolist()) or shutil.copytree("reranker", args[-1]))
    sources({"a": {"eval": "eval.jsonl"}, "b": {"kind": "similarity"}}, a=[[f"q{i} {i}", f"p{i} 90 {i}"] for i in range(20)],
            b=SIX[:4])
    run("mine", "out", "--rows", rows, "--candidates", 5, "--negatives", 3)
    mined = {int(row["query"].split()[1]) for row in lines("out/a.jsonl")}
    assert len(mined) == rows - 4 and len(set(seen)) == len(seen) == trained_on
    shared = "on rows that it will judge" in Path("out/report.txt").read_text()
    assert bool(mined & set(seen)) == shared == (rows == 20)


@pytest.mark.parametrize("command, flags, said", [
    ("cross-encoder", ["--steps", 2, "--lr", 1e9], "of 60 held-out pairs rightly, no better than chance; `curate.py cross-en"),
    ("mine", ["--cross-encoder", "reranker"], "cross-encoder reranker: ranks 0 of 60 held-out pairs rightly"),
    ("mine", ["--cross-encoder", "two"], "model two: its classification head has 2 outputs; one logit is needed"),
    ("mine", ["--cross-encoder", "toy"], "model toy: is an encoder without a classification head; `python curate.py"),
    *(("mine", [flag, "./none"], "model ./none: neither a directory") for flag in ("--cross-encoder", "--retriever")),
    ("mine", ["--retriever", "reranker"], "model reranker: has a classification head"),
    ("cross-encoder", ["--sources", "similar.json"], 'no source is of kind "retrieval": a cross-encoder'),
    ("mine", ["--sources", "none.json"], "none.json: no such manifest"),
    *((command, ["--sources", "bad.json"], 'bad.jsonl, line 5: field "neg": found 7, expected text')
      for command in ("filter", "mine", "cross-encoder")),
    *(("filter", ["--out", name], f"{name}: is not empty; choose another") for name in ("m.json", "toy")),
    ("filter", ["--pool", 2], "--pool 2: 2 targets and --top-k 2: nearly every pair would stay; raise --pool, or lower"),
    *(("filter", [flag, 0], f"{flag} 0: expected 1 or more") for flag in ("--top-k", "--chunk", "--micro-tokens", "--rows")),
    ("mine", ["--candidates", 0], "--candidates 0: expected 1 or more"),
    *(("mine", ["--margin", value], f"--margin {value}: expected at least 0 and less than 1") for value in ("nan", -0.1, 1.0)),
    ("cross-encoder", ["--lr", "nan"], "--lr nan: expected a number above 0"),
    ("filter", ["--seed", -1], "--seed -1: expected 0 or more"),
    ("mine", ["--max-length", 2], "--max-length 2: expected 3 to 512 tokens"),
])
def test_what_cannot_be_used_is_one_line_and_writes_no_result(topics, monkeypatch, capsys, command, flags, said):
    monkeypatch.chdir(topics)
    assert said in refused(capsys, command, "bad", *flags)
    assert not Path("bad").exists()
    shutil.rmtree("bad.work", ignore_errors=True)


# from files as they are found to a trained model

ANIMALS = "fox owl hare mole toad crow wren newt lynx boar swan moth crab seal".split()
COLOURS = "red blue grey black white brown green golden spotted striped sleepy hungry young old tiny huge".split()


LAYOUTS = {  # (query, positive, another positive, a negative) -> lines
    "tevatron.jsonl.gz": lambda q, p, r, n: [{"query": q, "positive_passages": [{"docid": "1", "title": "", "text": p}],
                                              "negative_passages": [{"docid": "2", "title": "nobody", "text": n[7:]}]}],
    "dpr.jsonl": lambda q, p, r, n: [{"question": q, "answers": [], "positive_ctxs": [{"title": p[:3], "text": p[4:]}],
                                      "negative_ctxs": [], "hard_negative_ctxs": [{"title": "", "text": n, "score": 1.5}]}],
    "snli.jsonl": lambda q, p, r, n: [{"gold_label": label, "sentence1": q, "sentence2": text, "pairID": "1"}
                                      for label, text in (("entailment", p), ("contradiction", r), ("-", n))],
    "multinli.jsonl.gz": lambda q, p, r, n: [{"genre": "fiction", "gold_label": label, "sentence1": q, "sentence2": text}
                                             for label, text in (("neutral", n), ("entailment", p))],
    "set.jsonl": lambda q, p, r, n: [{"set": [q, p, r]}],
    "pos-neg.jsonl.gz": lambda q, p, r, n: [{"query": q, "pos": [p, r], "neg": [n]}],
    "pairs.jsonl": lambda q, p, r, n: [[q, p]], "triplets.jsonl.gz": lambda q, p, r, n: [[q, p, n]],
}
NO_NEGATIVES, KINDS = ("snli.jsonl", "multinli.jsonl.gz", "set.jsonl", "pairs.jsonl"), ("retrieval", "similarity")


def test_collections_in_their_own_layouts_go_through_every_command_and_train(folder, monkeypatch):
    """Eight sources of 25 queries, two of them with two positives; 20 pairs, and 25 // 20 = 1 or 50 // 20 = 2 of a source, are
    held out. Of SNLI's three lines and MultiNLI's two a query, one is a row. A target names its query's colour and animal."""
    entries, given, order = [], {}, np.random.default_rng(0).permutation(len(COLOURS) * len(ANIMALS))

    def texts(i):
        colour, animal = COLOURS[order[i] % 16], ANIMALS[order[i] // 16]
        return (f"where does the {colour} {animal} sleep", f"the {colour} {animal} sleeps in a cave",
                f"a barn is where the {colour} {animal} sleeps", f"nobody feeds the {COLOURS[i % 16]} {animal}")

    vocabulary = "[PAD] [UNK] [CLS] [SEP] [MASK] where does the sleep sleeps in a cave barn is nobody feeds".split()
    vocabulary = {word: i for i, word in enumerate([*vocabulary, *ANIMALS, *COLOURS])}
    torch.manual_seed(0)
    model.save(model.PooledEncoder(model.JinaBertModel(model.JinaBertConfig(**CONFIG))),
               transformers.BertTokenizer(vocab=vocabulary, model_max_length=512), "animals")
    for number, (name, layout) in enumerate(LAYOUTS.items()):
        rows = [texts(i) for i in range(25 * number, 25 * number + 25)]
        write(name, [line for row in rows for line in layout(*row)])
        given |= {(name, row[0]): [] if name in NO_NEGATIVES else [row[3]] for row in rows}
        entries.append({"name": name, "lines": len(rows), "weight": 1, "kind": KINDS[name in NO_NEGATIVES[:3]]})
    write("eval.jsonl", [texts(i)[:2] for i in range(200, 220)])
    entries[0]["eval"] = "eval.jsonl"
    Path("m.json").write_text(json.dumps(entries))
    monkeypatch.setattr(curate, "JUDGE_QUERIES", 8)
    run("filter", "filtered", "--model", "animals", "--top-k", 50)
    filtered = "--sources", "filtered/manifest.json", "--candidates", 6
    run("cross-encoder", "judge", *filtered, "--model", "animals", "--steps", 40, "--lr", 0.01)
    run("mine", "mined", *filtered, "--retriever", "animals", "--cross-encoder", "judge", "--negatives", 2)
    train.main(["--stage", "3", "--sources", "mined/manifest.json", "--model", "animals", "--batch-size", "4",
                "--negatives", "2", "--steps", "2", "--out", "run"])
    manifest = json.loads(Path("mined/manifest.json").read_text())
    assert [entry["name"] for entry in manifest] == list(LAYOUTS)
    for entry in manifest:
        kept, rows = (lines(f"{folder}/{entry['path']}") for folder in ("filtered", "mined"))
        assert all(row.get("negatives", []) == given[entry["name"], row["query"]] for row in kept)
        assert len(rows) == len(kept) >= 15 and all(len(row["negatives"]) == 2 for row in rows)
        assert any("rank" in origin for row in rows for origin in row["mined"]) == (entry["kind"] == "retrieval")
    assert sum(math.isfinite(line["loss"]) for line in lines("run/metrics.jsonl") if "loss" in line) == 2


# stage III embeds a text once

def test_a_text_that_stands_several_times_in_a_step_is_embedded_once(folder, monkeypatch):
    """8 queries, 8 positives, 16 negatives: 8 copies of one text and 8 of another. 18 texts of 32."""
    sources({"a": {}}, a=[[f"w{i} w{i + 9}", f"w{i + 9} w{i + 1}", "w1 w2 w3", "w4 w5 w6"] for i in range(8)])
    calls, cut = [], data.micro_batches
    monkeypatch.setattr(data, "micro_batches", lambda *args, **flags: calls.append(args[1]) or cut(*args, **flags))
    train.main(["--stage", "3", "--sources", "m.json", "--model", "toy", "--batch-size", "8", "--negatives", "2",
                "--steps", "1", "--out", "run"])
    step, = [texts for texts in calls if len(texts) > 1]
    assert len(step) == len(set(step)) == 18
    batch = next(data.SourceBatches(data.load_sources("m.json"), 8, 0, negatives=2))
    texts, place = batch.texts()
    every = [row[side] for side in (0, 1) for row in batch.rows] + [text for row in batch.rows for text in row.negatives]
    assert texts == step and [texts[i] for i in place] == every
