"""curation run as a user runs it, on toy sources.

Two kinds of toy. In the plane, a text ends in the angle at which it lies ("p1 90 40" is at 40
degrees), the retriever is told to read it, and the cross-encoder by hand gives a passage the
percentage that stands in it for the query of its number ("q1 0" asks for "p1 90 40" with 0.9) or
for every query ("n1 75 2": 0.75), else 0.05; the one named "square" gives the square. Else a
JinaBERT of one layer with random weights: its mean of word embeddings finds texts of the same
words.
"""

import gzip
import json
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

import data
import model
import train
from corpora.formats import Prompts, Row, text_hash
from curation import cross_encoder, mine, reranker
from curation.__main__ import main
from curation.pool import Embedder
from curation.reranker import Example, Reranker

WORDS = [f"w{i}" for i in range(60)]
CONFIG = dict(vocab_size=65, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
              intermediate_size=64, hidden_dropout_prob=0.0, initializer_range=0.1)


@pytest.fixture(autouse=True)
def interrupts():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it


# files

def write(name, lines):
    raw = "".join(json.dumps(line) + "\n" for line in lines).encode()
    Path(name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def manifest(folder):
    return json.loads(Path(folder, "manifest.json").read_text())


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file() and ".cache" not in path.parts}  # load_sources' own


def sources(entries, **rows):
    """Writes NAME.jsonl for every NAME=rows, and m.json with {NAME: what else its entry says}."""
    for name, values in rows.items():
        write(f"{name}.jsonl", values)
    listed = [{"name": name, "path": f"{name}.jsonl", **more} for name, more in entries.items()]
    Path("m.json").write_text(json.dumps(listed))


# commands

def run(command, out, *flags):
    encoder = "--retriever" if command == "mine" else "--model"
    main([command, "--sources", "m.json", encoder, "toy", "--out", out, *map(str, flags)])


def refused(capsys, *argv, status=2):
    """Runs it expecting this exit status -> the one line it said, progress bars aside."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    said = [line for line in capsys.readouterr().err.splitlines()
            if line.startswith("curation: ") or "Error" in line]
    assert stop.value.code == status and len(said) == 1, said
    return said[0]


def stop(number=signal.SIGINT):
    os.kill(os.getpid(), number)


def tokenizer(words):
    vocabulary = "[PAD] [UNK] [CLS] [SEP] [MASK]".split() + words
    return transformers.BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)},
                                      model_max_length=512)


def save_encoder(directory, tokens):
    torch.manual_seed(0)
    backbone = model.JinaBertModel(model.JinaBertConfig(**CONFIG))
    model.save(model.PooledEncoder(backbone), tokens, directory)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """toy: an encoder. reranker: a cross-encoder that gives every pair 1/2; square: another, of
    bias 1. two: with two outputs."""
    folder, tokens = tmp_path_factory.mktemp("models"), tokenizer(WORDS)
    save_encoder(folder / "toy", tokens)
    network = cross_encoder.CrossEncoder(model.JinaBertConfig(**CONFIG))
    for name, bias in (("reranker", 0.0), ("square", 1.0)):
        torch.nn.init.zeros_(network.classifier.weight)
        torch.nn.init.constant_(network.classifier.bias, bias)
        cross_encoder.save(network, tokens, folder / name)
    two = transformers.BertConfig(**CONFIG, num_labels=2)
    cross_encoder.save(transformers.BertForSequenceClassification(two), tokens, folder / "two")
    return folder


def enter(patch, folder, models):
    patch.chdir(folder)
    for path in models.iterdir():
        os.symlink(path, path.name)


@pytest.fixture
def folder(tmp_path, monkeypatch, models):
    """An empty folder, with the models at hand."""
    enter(monkeypatch, tmp_path, models)


# the plane

def angle(text):
    return math.radians(float(text.split()[-1]))


def in_the_plane(texts):
    points = [[math.cos(angle(text)), math.sin(angle(text))] for text in texts]
    return torch.tensor(points)


def relevance(query, passage):
    name, percent = passage.split()[:2]
    answers = name[0] == "n" or name[1:] == query.split()[0][1:]
    return float(percent) / 100 if answers else 0.05


@pytest.fixture
def plane(folder, monkeypatch):
    """The toy in the plane -> .embedded, the texts of every call of the retriever, .scored, the
    pairs of every call of the cross-encoder, and .meanwhile(), what happens during each."""
    calls = SimpleNamespace(embedded=[], scored=[], meanwhile=lambda: None)

    def embed(self, texts, prompt=""):
        calls.embedded.append(texts)
        calls.meanwhile()
        return in_the_plane(texts)

    def score(self, pairs):
        calls.scored.append(pairs)
        calls.meanwhile()
        power = 2 if self.encoder.classifier.bias.item() == 1 else 1
        return np.array([relevance(*pair) ** power for pair in pairs], "f4")

    monkeypatch.setattr(Embedder, "__call__", embed)
    monkeypatch.setattr(Reranker, "__call__", score)
    # 20 held-out pairs, all ranked rightly
    write("eval.jsonl", [[f"q{i} {i}", f"p{i} 90 {i}"] for i in range(901, 921)])
    return calls


# §5.1: the consistency filter

SIX = [["q0 0", "p0 1"], ["q1 10", "p1 14"], ["q2 20", "p2 29"], ["q3 30", "p3 90"],
       ["q4 200", "p4 210"], ["q5 190", "p5 190"]]


@pytest.mark.parametrize("top_k, kept", [
    (1, [0, 1, 5]), (2, [0, 1, 2, 4, 5]), (4, [0, 1, 2, 3, 4, 5])])
def test_filter_keeps_a_pair_whose_target_is_among_the_nearest(plane, capsys, top_k, kept):
    """Targets lie at 1, 14, 29, 90, 210 and 190 degrees. Distances to the own one, and how many
    others are as near or nearer: q0 1, none; q1 4, none; q2 9, the one at 14; q3 60, those at 1, 14
    and 29; q4 10, the one at 190, a tie; q5 0, none. So the positions are 1, 1, 2, 4, 2, 1."""
    sources({"a": {}}, a=SIX)
    run("filter", "out", "--top-k", top_k)
    dropped = [i for i in range(6) if i not in kept]
    assert [row["query"] for row in lines("out/a.jsonl")] == [SIX[i][0] for i in kept]
    for row, i in zip(lines("out/dropped/a.jsonl"), dropped, strict=True):
        assert (row["query"], row["positive"], row["row"]) == (*SIX[i], i)
        assert row["reason"].startswith(f"position {[1, 1, 2, 4, 2, 1][i]} among 6 ")
    report = Path("out/report.txt").read_text()
    table = [line.split() for line in report.splitlines()]
    assert ["a", "6", str(len(kept)), f"{len(kept) / 6:.1%}", str(len(dropped))] in table
    for what, chosen in (("kept", kept), ("dropped", dropped)):  # two of each, where there are two
        shown = {" ".join(line[3:]) for line in table if line[0] == what and "->" in line}
        assert len(shown) == min(2, len(chosen))
        assert shown <= {" -> ".join(SIX[i]) for i in chosen}
    assert report in capsys.readouterr().out


def test_neither_a_query_s_other_positives_nor_its_own_text_count_against_it(plane):
    """q has five positives at 1 to 5 degrees, and its own text, at 0, is the target of x: each of
    the five would be behind that one, and four of them behind others of the five. r, at 20, has a
    positive at 30, and the one at 25 by a's collection. x lies at 90, and its target at 0 is behind
    all seven others."""
    positives = {"query": "q 0", "pos": [f"p {i}" for i in range(1, 6)]}
    sources({"a": {"collection": "more.jsonl"}}, more=[["r 20", "s 25"]],
            a=[positives, ["x 90", "q 0"], ["r 20", "r 30"], ["s 25", "s 25"]])
    run("filter", "out", "--top-k", 1)
    assert [row["query"] for row in lines("out/a.jsonl")] == ["q 0"] * 5 + ["r 20", "s 25"]
    dropped, of_the_collection = lines("out/dropped/a.jsonl")
    assert dropped["reason"].startswith("position 8 among 8 ")
    assert of_the_collection["positive"] == "s 25"


@pytest.fixture(scope="module")
def filtered(models, tmp_path_factory):
    """A real filter run with the random JinaBERT; m.json and out/ are in the working folder. Source
    "s": 120 pairs of a query of four words and a target of the same in another order and one more,
    the targets of rows 0 to 19 swapped two by two, two negatives a row, 5 % held out. Source
    "eval/s": 60 such pairs, with an eval file of 9 (one target held by a row of "s" too) and a
    collection of 2."""
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
        same = {"path": "same.jsonl", "rate": 1, "kind": "similarity", "eval": "held.jsonl",
                "collection": "more.jsonl"}
        sources({"s": {"rate": 3, "licence": "CC0"}, "eval/s": same}, s=rows, held=held_out,
                same=[pair() for _ in range(60)], more=[pair() for _ in range(2)])
        run("filter", "out", "--chunk", 50)
        yield


def test_planted_errors_are_dropped(filtered):
    """A swapped target shares one word or so with its query, and some other targets share more."""
    dropped = {row["row"] for row in lines("out/dropped/s.jsonl")}
    held_out = {row["row"] for row in lines("out/held-out/s.jsonl")}
    assert dropped == set(range(20)) - held_out and 40 in held_out


@pytest.mark.parametrize("name, files", [("s", ["s"]), ("eval%2Fs", ["same", "more"])])
def test_every_row_is_kept_with_its_negatives_or_has_a_reason(filtered, name, files):
    given = [row for file in files for row in lines(f"{file}.jsonl")]
    negatives = {row[0]: row[2:] for row in given}
    kept = lines(f"out/{name}.jsonl")
    others = [*lines(f"out/dropped/{name}.jsonl"), *lines(f"out/held-out/{name}.jsonl")]
    found = sorted([row["query"], row["positive"]] for row in kept + others)
    assert found == sorted(row[:2] for row in given)
    assert all(row.get("negatives", []) == negatives[row["query"]] for row in kept)
    assert all(row["reason"] for row in others)


def test_what_is_held_out_stays_held_out_and_the_manifest_says_all_it_said(filtered):
    """"s" holds out 120 // 20 = 6 targets, which become its eval file; "eval/s" has its 9, and
    drops its collection."""
    before, after = data.load_sources("m.json"), data.load_sources("out/manifest.json")
    assert manifest("out") == [
        {"name": "s", "rate": 3, "licence": "CC0", "path": "s.jsonl", "eval": "eval/s.jsonl",
         "collection": "dropped/s.jsonl"},
        {"name": "eval/s", "rate": 1, "kind": "similarity", "path": "eval%2Fs.jsonl",
         "eval": "eval/eval%2Fs.jsonl", "collection": "dropped/eval%2Fs.jsonl"}]
    assert after[0].held_out_hashes == before[0].held_out_hashes
    held_out = [[{row[:2] for row in source.held_out} for source in opened]
                for opened in (before, after)]
    assert held_out[0] == held_out[1] and [len(rows) for rows in held_out[1]] == [6, 9]
    assert all(len(s.train) == len(s.index) for s in after)  # nothing of it is in the rows
    next(data.SourceBatches(after, 32, seed=0))


def test_the_same_command_with_other_chunks_writes_the_same_bytes(filtered):
    """--chunk 7: other micro-batches, other blocks of cosines."""
    run("filter", "other", "--chunk", 7)
    assert tree("other") == tree("out")


@pytest.mark.parametrize("rows, shares", [(12, (3, 9)), (24, (14, 10)), (30, (19, 10))])
def test_rows_are_drawn_by_the_sources_rates_and_a_small_source_gives_what_it_has(
        plane, rows, shares):
    """Rates 1 and 3: 12 rows are 3 and 9. 24 would be 6 and 18, but b has 10: 14 are a's; of 30,
    20, but a has 19. Of so few targets none is held out, and the pool is drawn from all 29."""
    sources({"a": {}, "b": {"rate": 3}}, a=[[f"q{i} {i}", f"p{i} {i}"] for i in range(19)],
            b=[[f"r{i} {i + 40}", f"s{i} {i + 40}"] for i in range(10)])
    run("filter", "out", "--rows", rows)
    assert (len(lines("out/a.jsonl")), len(lines("out/b.jsonl"))) == shares
    assert "among the first 2 of 29 random targets" in Path("out/report.txt").read_text()


def test_more_rows_are_drawn_than_before_and_not_the_first_ones(plane):
    """So what fewer --rows gave stays in what more give."""
    sources({"a": {}}, a=[[f"q{i} {i}", f"p{i} {i}"] for i in range(19)])
    for rows in (3, 14):
        run("filter", f"of{rows}", "--rows", rows)
    few, more = ([row["query"] for row in lines(f"of{rows}/a.jsonl")] for rows in (3, 14))
    assert set(few) < set(more) and few != ["q0 0", "q1 1", "q2 2"]


def test_what_is_known_of_texts_in_rows_that_were_not_drawn_stays_known_to_mine(plane):
    """Query i has the positives i and i + 1 in a, and i + 3 in b; about half of the rows are drawn.
    Of the others those are named whose two texts are drawn in other rows, and mine gives no query
    such a text, for a query with its positive as its negative is a false negative."""
    rows = {"a": [(f"q{i // 2} {i // 2}", f"p{(i + 1) // 2} {(i + 1) // 2}") for i in range(18)],
            "b": [(f"q{i} {i}", f"p{i + 3} {i + 3}") for i in range(12)]}
    sources({name: {"kind": "similarity"} for name in rows}, **rows)
    run("filter", "filtered", "--rows", 16, "--top-k", 12)

    def pairs(name):
        return {(row["query"], row["positive"]) for row in lines(f"filtered/{name}.jsonl")}

    kept = pairs("a") | pairs("b")
    queries, positives = map(set, zip(*kept))
    assert len(pairs("a")) == len(pairs("b")) == 8
    for name in rows:
        both = {(q, p) for q, p in rows[name] if q in queries and p in positives}
        assert pairs(f"dropped/{name}") == both - pairs(name) != set()
    run("mine", "mined", "--sources", "filtered/manifest.json", "--negatives", 3)
    mined = {(row["query"], negative) for name in rows for row in lines(f"mined/{name}.jsonl")
             for negative in row["negatives"]}
    assert len(mined) > 16 and not mined & {*rows["a"], *rows["b"]}


# §5.2: negatives

@pytest.mark.parametrize("margin, lower", [
    (0, [0, 3, 4, 6]), (0.25, [3, 6]), (0.375, [6]), (0.5, [])])
def test_confirmed_is_what_scores_lower_than_the_positive_by_more_than_the_margin(margin, lower):
    """The positive scores 1/2. Without a margin .495 and 1/2 are its equals, .75 is higher, and
    what is no number is not lower. 1/4 is lower by 1/4, but not by more; so are 1/8 and 0 by 3/8
    and 1/2."""
    scores = np.array([0.25, 0.495, 0.75, 0.125, 0.4875, 0.5, 0, np.nan], "f4")
    assert mine.confirm(np.float32(0.5), scores, margin).tolist() == lower
    assert mine.confirm(np.float32(0.5), scores[:0], margin).tolist() == []


N_OF_0 = ["n1 89.5 1", "n2 75 2", "n3 91 3", "n4 30 4", "n5 69 5", "n6 10 6"]
N_OF_1 = ["q0 0", "n99 1 0.5"] + [f"n{i} 50 {i + 170}" for i in range(12, 18)]
TWO = [["q0 0", "p0 90 40", *N_OF_0], ["q1 180", "p1 90 181", *N_OF_1]]
MINE_TWO = "--negatives", 3, "--candidates", 6, "--cross-encoder"


def two_rows():
    """What is known beside: b says that "n99 1 0.5" answers q0."""
    others = [[f"s{i} {i}", f"t{i} {i}"] for i in range(4)]
    sources({"a": {"eval": "eval.jsonl"}, "b": {"kind": "similarity"}}, a=TWO,
            b=[["q0 0", "n99 1 0.5"], *others])


def test_more_candidates_than_there_are_texts_are_all_that_there_are(plane, capsys):
    two_rows()
    run("mine", "out", *MINE_TWO, "reranker", "--candidates", 10**12)
    said = capsys.readouterr().out
    assert "source a: --candidates 1000000000000, but it has 16 texts" in said
    run("mine", "all", *MINE_TWO, "reranker", "--candidates", 16)
    assert tree("out") == tree("all")


def test_a_negative_is_what_the_retriever_finds_and_the_cross_encoder_scores_lower(plane, capsys):
    """q0 lies at 0, so n1 to n6 (at 1 to 6 degrees) are found at positions 1 to 6; q0's own text
    and n99, a positive of it in b, are nearer and excluded. Of the scores .895, .75, .91, .3, .69,
    .1 those of n4 and n6 are below .9 - .25, and a third negative is drawn from what is neither a
    candidate nor excluded: p1 or N_OF_1. q1's six candidates (n12 to n17, at 182 to 187) all score
    .5 and none is rejected: 12 candidates for two rows, 4 of them rejected. The cosines are of 4
    and 6 degrees."""
    two_rows()
    run("mine", "out", *MINE_TWO, "reranker", "--margin", 0.25)
    first, second = lines("out/a.jsonl")
    assert (first["query"], first["positive_score"]) == ("q0 0", 0.9)
    assert first["negatives"][:2] == [N_OF_0[3], N_OF_0[5]]
    assert first["mined"] == [
        {"from": "retriever", "position": 4, "cosine": 0.9976, "score": 0.3},
        {"from": "retriever", "position": 6, "cosine": 0.9945, "score": 0.1}, {"from": "random"}]
    assert first["negatives"][2] in {"p1 90 181", *N_OF_1[2:]}
    assert second["negatives"] == N_OF_1[2:5]
    assert [origin["position"] for origin in second["mined"]] == [1, 2, 3]
    report = Path("out/report.txt").read_text()
    table = [line.split() for line in report.splitlines()]
    assert ["a", "2", "12", "4", "33.3%", "1", "1"] in table
    assert "20 of 20 rightly, the retriever 20\n" in report and report in capsys.readouterr().out


def test_rows_found_and_scored_some_at_a_time_get_the_same_negatives(plane, monkeypatch):
    two_rows()
    run("mine", "out", *MINE_TWO, "reranker")
    run("mine", "chunks", *MINE_TWO, "reranker", "--chunk", 1)
    monkeypatch.setattr(mine, "ROWS_AT_ONCE", 1)
    run("mine", "one", *MINE_TWO, "reranker")
    assert tree("out") == tree("chunks") == tree("one")


@pytest.mark.parametrize("name, found", [("reranker", (4, 5, 6)), ("square", (2, 4, 5))])
def test_of_the_confirmed_the_nearest_become_negatives(plane, name, found):
    """Margin .2, three negatives: of q0's candidates n4, n5 and n6 are below .7. Of the squares
    .801, .5625, .828, .09, .476, .01 those of n2, n4, n5 and n6 are below .81 - .2."""
    two_rows()
    run("mine", "out", *MINE_TWO, name, "--margin", 0.2)
    assert lines("out/a.jsonl")[0]["negatives"] == [N_OF_0[i - 1] for i in found]


def test_sources_of_similarity_get_random_negatives_and_need_no_cross_encoder(plane):
    """b alone: the retriever embeds nothing, no cross-encoder is trained or asked. The two
    positives of s0 are not drawn for it, so each of its rows draws the 3 others' targets; so does
    u, which itself is a target."""
    others = [[f"s{i} {i}", f"t{i} {i}"] for i in (3, 4)]
    sources({"b": {"kind": "similarity"}},
            b=[["s0 0", "t0 0"], ["s0 0", "u 1"], ["u 1", "t2 2"], *others])
    run("mine", "out", "--negatives", 3)
    rows = lines("out/b.jsonl")
    assert plane.embedded == plane.scored == [] and not Path("out/cross-encoder").exists()
    assert not any("positive_score" in row for row in rows)
    assert all(row["mined"] == [{"from": "random"}] * 3 for row in rows)
    drawn = [sorted(row["negatives"]) for row in rows]
    assert drawn[:3] == [["t2 2", "t3 3", "t4 4"]] * 2 + [["t0 0", "t3 3", "t4 4"]]
    assert all(len(set(negatives)) == 3 for negatives in drawn)


def test_no_known_positive_query_held_out_or_rejected_text_is_ever_a_negative(plane):
    """40 rows at random angles. Queries recur with other positives, are positives themselves, in
    capitals too; one row gives a held-out text as its negative; a third of the texts are "n" and
    score .95. What is excluded and what is found are recomputed densely."""
    rng = np.random.default_rng(0)
    targets = [f"{'p' if i % 3 else 'n'}{i} {90 if i % 3 else 95} {360 * rng.random():.3f}"
               for i in range(40)]
    rows = [[f"q{i // 2} {i // 2}", target] for i, target in enumerate(targets)]
    rows += [["Q3 3", "p55 90 1", "p901 90 901"], [targets[4], "p56 90 2", "q3 3"]]
    others = [["q3 3", targets[20].upper()], *([f"r{i} {i}", f"s{i} {i}"] for i in range(7))]
    sources({"a": {"eval": "eval.jsonl"}, "b": {"kind": "similarity"}}, a=rows, b=others)
    run("mine", "out", "--cross-encoder", "reranker", "--negatives", 6, "--candidates", 5)
    pool = {text_hash(text): text for text in (*targets, "p55 90 1", "p56 90 2", "q3 3")}
    known = [(text_hash(query), text_hash(positive))
             for query, positive, *_ in [*rows, ["q3 3", targets[20]]]]
    hard = 0
    for row in lines("out/a.jsonl"):
        query, negatives = text_hash(row["query"]), list(map(text_hash, row["negatives"]))
        allowed = set(pool) - {query} - {p for q, p in known if q == query}
        near = sorted(allowed, key=lambda h: -math.cos(angle(row["query"]) - angle(pool[h])))[:5]
        low = [h for h in near if relevance(row["query"], pool[h]) < row["positive_score"] - 0.01]
        assert len(set(negatives)) == 6 and set(negatives) <= allowed
        assert set(negatives[: len(low)]) == set(low) and not set(negatives[len(low):]) & set(near)
        hard += len(low)
    assert 42 < hard < 4 * 42  # some candidates are negatives, and some are rejected


def test_what_a_source_without_a_kept_row_holds_out_is_no_negative_after_the_filter_either(plane):
    """a holds out all its rows, so the filter's manifest is without it. Three of the texts are a
    target, a negative and a text of the collection of b."""
    pairs = lines("eval.jsonl")
    sources({"a": {"eval": "a.jsonl"}, "b": {"kind": "similarity", "collection": "more.jsonl"}},
            a=pairs, b=[*SIX, ["x 5", pairs[0][1]], ["z 7", "y 7", pairs[1][1]]],
            more=[["w 9", pairs[2][1]]])
    run("filter", "filtered", "--top-k", 3)
    run("mine", "mined", "--sources", "filtered/manifest.json", "--negatives", 6)
    negatives = {text for row in lines("mined/b.jsonl") for text in row["negatives"]}
    assert len(negatives) > 6 and not negatives & {positive for _, positive in pairs}


# §5.2: what a cross-encoder is tried on

def test_a_cross_encoder_is_tried_on_20_held_out_pairs_of_all_searched_sources(plane, capsys):
    """a holds out 10 pairs, all it has, c 9 or 10; b is not searched, and its 4 do not count. a is
    left with no row to mine. Where they are too few, it is said before one is trained; nothing was
    done then, and the same --out may go another way."""
    pairs = lines("eval.jsonl")
    write("of_b.jsonl", [[f"r{i} {i}", f"s{i} {i}"] for i in range(4)])
    write("of_c.jsonl", pairs[10:19])
    sources({"a": {"eval": "a.jsonl"}, "b": {"kind": "similarity", "eval": "of_b.jsonl"},
             "c": {"eval": "of_c.jsonl"}}, a=pairs[:10], b=SIX, c=SIX)
    for command in (("mine", "few"), ("mine", "few", "--cross-encoder", "reranker"),
                    ("cross-encoder", "untrained")):
        said = refused(capsys, *command)
        assert "19 held-out pairs are too few" in said and "with 20 or more" in said
        assert sorted(os.listdir(f"{command[1]}.work")) == [".lock", "identity.json"]
    write("of_c.jsonl", pairs[10:20])
    run("mine", "few", "--cross-encoder", "reranker", "--negatives", 2, "--candidates", 3)
    said = capsys.readouterr().out
    assert "20 of 20 rightly" in said and "a keeps no row and is left out" in said
    assert [entry["name"] for entry in manifest("few")] == ["b", "c"]


def test_a_held_out_positive_is_tried_against_a_near_target_and_so_is_the_retriever():
    """20 targets at 4, 22, 40 ... degrees; the query of target i lies 4 degrees before it if i < 12
    and 12 else. Target i - 1, 18 degrees before target i, is the nearest other one: 14 or 6 degrees
    from the query. So 12 are ranked rightly."""
    rows = [Row(f"q{i} {18 * i - (8 if i >= 12 else 0)}", f"p{i} {18 * i + 4}", [])
            for i in range(20)]
    source = SimpleNamespace(held_out=rows, prompts=Prompts())
    pairs, right = reranker.held_out_pairs(
        [source], lambda texts, prompt: in_the_plane(texts), candidates=1, seed=0)
    assert pairs == [(rows[i].query, rows[j].positive) for i in range(20) for j in (i, i - 1)]
    assert right == 12


# an interruption

@pytest.mark.parametrize("command, flags, twice", [
    ("filter", ["--chunk", 2], 2), ("mine", ["--chunk", 1, *MINE_TWO, "reranker"], 41)])
def test_a_command_that_was_stopped_goes_on_where_it_was(plane, capsys, command, flags, twice):
    """At each call of the retriever in turn, by SIGTERM or SIGINT; the second start finds the same
    texts elsewhere. So many texts are embedded twice at most: of filter, the 2 queries of a chunk
    whose targets were not reached; of mine, a query, and the 40 texts of the held-out pairs, which
    every start tries the cross-encoder on."""
    sources({"a": {}}, a=SIX) if command == "filter" else two_rows()
    shutil.copy("m.json", "n.json")
    run(command, "whole", *flags)
    calls, texts = len(plane.embedded), sum(map(len, plane.embedded))
    for call in range(1, calls + 1):
        out, plane.embedded = f"out{call}", []
        plane.meanwhile = lambda: len(plane.embedded) == call and stop(
            (signal.SIGTERM, signal.SIGINT)[call % 2])
        said = refused(capsys, command, out, *flags, status=130)
        assert "stopped; the same command goes on" in said
        assert [path for path in os.listdir() if path.startswith(out)] == [f"{out}.work"]
        plane.embedded.pop()  # not embedded
        plane.meanwhile = lambda: None
        run(command, out, *flags, "--sources", "n.json", "--micro-tokens", 99)
        assert tree(out) == tree("whole") and not Path(f"{out}.work").exists()
        assert sum(map(len, plane.embedded)) - texts <= twice


@pytest.mark.parametrize("name, flags, scored", [
    ("reranker", [], 2), ("reranker", ["--margin", 0.4], 2), ("reranker", ["--negatives", 1], 2),
    ("square", [], 3)])
def test_after_an_interruption_other_flags_go_on_with_what_was_found_and_scored(
        plane, monkeypatch, capsys, name, flags, scored):
    """The held-out pairs are scored, then row 0, then row 1, where it is stopped. The same
    cross-encoder scores the held-out pairs and row 1 then, at another margin and for another number
    of negatives too; another scores all three. The retriever embeds the 40 held-out texts alone."""
    two_rows()
    monkeypatch.setattr(mine, "ROWS_AT_ONCE", 1)
    plane.meanwhile = lambda: len(plane.scored) == 3 and stop()
    refused(capsys, "mine", "out", *MINE_TWO, "reranker", status=130)
    plane.meanwhile = lambda: None
    run("mine", "new", *MINE_TWO, name, *flags)
    plane.embedded, plane.scored = [], []
    run("mine", "out", *MINE_TWO, name, *flags)
    assert len(plane.scored) == scored and sum(map(len, plane.embedded)) == 40
    assert tree("out") == tree("new")


@pytest.mark.parametrize("what", ["corpus", "hold-out", "model", "seed"])
def test_work_of_other_texts_models_or_draws_is_not_gone_on_with(plane, capsys, what):
    """Another collection, as many other held-out pairs, another retriever under the same name,
    another seed. The first start ends for want of texts: a's pool is 17, p0, p1, p2, N_OF_0,
    N_OF_1. For q0 its text and p0 are excluded, n99 and n1 to n5 are candidates, of which n1 and n3
    are rejected; 9 are left."""
    sources({"a": {"eval": "eval.jsonl", "collection": "more.jsonl"}}, a=TWO,
            more=[["q2 2", "p2 90 2"]])
    shutil.copytree("toy", "own")
    command = ["mine", "out", "--retriever", "own", "--cross-encoder", "reranker",
               "--candidates", 6, "--negatives", 14]
    said = refused(capsys, *command)
    assert "row 0: 4 negatives found and 9 texts to draw from; lower --negatives 14" in said
    if what == "corpus":
        write("more.jsonl", [["q2 2", "p2 90 3"]])
    elif what == "hold-out":
        write("eval.jsonl", [*lines("eval.jsonl")[1:], ["q921 921", "p921 90 921"]])
    elif what == "model":
        encoder, tokens = model.load("own")
        next(encoder.parameters()).data += 1
        model.save(encoder, tokens, "own")
    else:
        command += ["--seed", 2]
    assert f"the work of another command, with another {what}" in refused(capsys, *command)


def test_what_a_small_top_k_has_embedded_serves_a_larger_one(plane, capsys):
    """Queries stand at 0, 60 .. 300 degrees, and each one's target 60 further: another's lies at
    its own place, and a third's 60 before, a tie. All positions are 3."""
    sources({"a": {}}, a=[[f"q{i} {60 * i}", f"p{i} {60 * i + 60}"] for i in range(6)])
    assert "no source keeps a row" in refused(capsys, "filter", "out", "--top-k", 2)
    plane.embedded = []
    run("filter", "out", "--top-k", 3)
    assert plane.embedded == [] and len(lines("out/a.jsonl")) == 6


def test_a_folder_that_is_not_ours_is_not_taken_for_the_work_of_a_command(plane, capsys):
    sources({"a": {}}, a=SIX)
    Path("out.work").mkdir()
    Path("out.work/thesis").write_text("mine")
    assert "out.work: holds something else" in refused(capsys, "filter", "out")
    assert os.listdir("out.work") == ["thesis"]


def test_a_file_that_has_come_into_out_meanwhile_is_not_deleted(plane, capsys):
    sources({"a": {}}, a=SIX)
    Path("out").mkdir()
    plane.meanwhile = lambda: Path("out/notes").write_text("mine")
    assert "out: is not empty" in refused(capsys, "filter", "out")
    assert Path("out/notes").read_text() == "mine"


# training a cross-encoder

@pytest.fixture(scope="module")
def topics(models, tmp_path_factory):
    """A folder with a source of ten topics, each a word that a query and its targets share among
    words that mean nothing; 120 pairs, and 60 held out. A pair is right if the topics agree, so a
    cross-encoder can learn it. similar.json is a manifest without a source to search, bad.json one
    of a file whose line 5 is no pair."""
    folder, rng = tmp_path_factory.mktemp("topics"), np.random.default_rng(0)

    def pairs(*numbers):
        for i in range(*numbers):
            a, b = rng.permutation(WORDS[20:])[:2]
            yield [f"{WORDS[i % 10]} {WORDS[20 + i // 10]}", f"{a} {WORDS[i % 10]} {b}"]

    with pytest.MonkeyPatch.context() as patch:
        enter(patch, folder, models)
        sources({"bad": {}}, bad=[*pairs(4), {"query": "w1", "pos": "w2", "neg": 7}])
        os.rename("m.json", "bad.json")
        sources({"b": {"kind": "similarity"}}, b=pairs(200, 219))
        os.rename("m.json", "similar.json")
        sources({"a": {"eval": "eval.jsonl"}, "b": {"kind": "similarity"}}, a=pairs(120),
                eval=pairs(120, 180))
    return folder


def random_example(rng, count):
    """The topics, by numbers of words."""
    topic, others = rng.integers(10), rng.integers(10, size=count)
    noise = rng.integers(20, 60, size=(count + 2, 2))
    query, *passages = (f"w{a} w{t} w{b}" for t, (a, b) in zip([topic, topic, *others], noise))
    return Example(query, passages[0], passages[1:])


@pytest.mark.parametrize("candidates", [1, 4])
def test_scores_of_1_2_cost_ln_2_whatever_the_number_of_candidates(models, candidates):
    """Each side weighs a half: -(ln 1/2) / 2 - (ln 1/2) / 2 = ln 2 = 0.693."""
    rng = np.random.default_rng(0)
    halves = Reranker(*cross_encoder.load(models / "reranker"), 32, 256)
    batch = [random_example(rng, candidates) for _ in range(16)]
    assert list(halves.train([batch], 1, 0.01)) == pytest.approx([0.693147], abs=1e-6)


def test_training_a_cross_encoder_lowers_its_loss_below_ln_2(models):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    learner = Reranker(*cross_encoder.load(models / "toy", new_head=True), 32, 256)
    batches = [[random_example(rng, 4) for _ in range(16)] for _ in range(80)]
    losses = list(learner.train(batches, 80, 0.01))
    assert np.mean(losses[-10:]) < 0.55 < 0.693 < losses[0]


@pytest.mark.parametrize("max_length, same", [(7, True), (8, False), (9999, False)])
def test_a_reranker_reads_a_pair_up_to_max_length(models, max_length, same):
    """[CLS] w1 [SEP] w2 w3 w4 [SEP] are 7 tokens: at 7, what follows w4 is cut off. The toy reads
    512."""
    reads = Reranker(*cross_encoder.load(models / "toy", new_head=True), max_length, 64)
    short, long = reads([("w1", "w2 w3 w4"), ("w1", "w2 w3 w4 w5")])
    assert (abs(short - long) < 1e-6) == same


def test_a_separator_in_a_text_does_not_split_it(models):
    """w1 [SEP] w2 and w3 w4 are the texts w1 w2 and w3 w4, not w1 and w2 w3 w4."""
    network, tokens = cross_encoder.load(models / "toy", new_head=True)
    scores = Reranker(network, tokens, 32, 64)([
        ("w1 w2", "w3 w4"), ("w1 [SEP] w2", "w3 w4"), ("w1 w2", "w3[SEP]w4"), ("w1", "w2 w3 w4")])
    assert scores[:3] == pytest.approx(scores[0], abs=1e-6) and abs(scores[3] - scores[0]) > 1e-4


def test_a_bert_is_told_which_text_a_token_is_of_and_a_model_without_types_is_not(models):
    """[CLS] w1 w2 [SEP] w3 [SEP]: 4 tokens of the query, 2 of the passage."""
    network, tokens = cross_encoder.load(models / "toy", new_head=True)
    seen = []
    network.register_forward_pre_hook(lambda network, inputs: seen.extend(inputs))
    Reranker(network, tokens, 32, 64)([("w1 w2", "w3")])
    assert seen[2].tolist() == [[0, 0, 0, 0, 1, 1]]
    untyped = transformers.BertForSequenceClassification(
        transformers.BertConfig(**CONFIG, num_labels=1, type_vocab_size=1))
    tokens.sep_token = None
    assert np.isfinite(Reranker(untyped.eval(), tokens, 32, 64)([("w1", "w2")])).all()


def test_mine_trains_a_cross_encoder_where_none_is_given_and_leaves_it_beside(
        topics, monkeypatch, capsys):
    """As `cross-encoder` trains it from the same encoder, rows, steps and seed, at the rate for
    widths up to 256; given that by name, mine writes the same rows. A run that was stopped when the
    cross-encoder was trained writes the same bytes, and does not train again."""
    monkeypatch.chdir(topics)
    monkeypatch.setattr(reranker, "STEPS", 80), monkeypatch.setattr(reranker, "QUERIES", 16)
    flags = "--candidates", 60, "--negatives", 5, "--batch-size", 16
    run("mine", "mined", *flags)
    _, first, accuracy, *_ = Path("mined/report.txt").read_text().splitlines()
    right = int(accuracy.split("the cross-encoder ranks ")[1].split(" of 60 rightly")[0])
    assert "training one from toy" in first and right > 0.75 * 60
    run("cross-encoder", "trained", *flags[:2], "--lr", 1e-3)
    assert accuracy in capsys.readouterr().out
    assert tree("trained") == tree("mined/cross-encoder")
    run("mine", "given", *flags, "--cross-encoder", "trained")
    assert tree("given") == {path: raw.replace(f"{first}\n".encode(), b"")
                             for path, raw in tree("mined").items()
                             if not path.startswith("cross-encoder")}
    with monkeypatch.context() as patch:
        patch.setattr(Reranker, "__call__", lambda *_: stop())
        refused(capsys, "mine", "again", *flags, status=130)
    made = Path("again.work/cross-encoder/model.safetensors").stat().st_mtime_ns
    shutil.copytree("again.work", "other.work")
    run("mine", "other", *flags, "--cross-encoder", "trained")
    assert tree("other") == tree("given")
    run("mine", "again", *flags)
    assert tree("again") == tree("mined")
    assert Path("again/cross-encoder/model.safetensors").stat().st_mtime_ns == made


@pytest.mark.parametrize("rows, trained_on", [(19, 5), (20, 20)])
def test_a_cross_encoder_is_trained_on_rows_that_are_not_mined_or_says_so(
        plane, monkeypatch, rows, trained_on):
    """A tenth of 5 steps of 10 queries are 5 rows. Of 19 rows b gives its 4, and a 15 of its 20: 5
    others. Of 20 rows a gives 16, and 4 others are too few: all 20 are trained on."""
    monkeypatch.setattr(reranker, "STEPS", 5), monkeypatch.setattr(reranker, "QUERIES", 10)
    seen = set()

    def train(self, batches, steps, lr):
        for batch in batches:
            seen.update(example.query for example in batch)
            yield 0.0

    monkeypatch.setattr(Reranker, "train", train)
    sources({"a": {"eval": "eval.jsonl"}, "b": {"kind": "similarity"}},
            a=[[f"q{i} {i}", f"p{i} 90 {i}"] for i in range(20)], b=SIX[:4])
    run("mine", "out", "--rows", rows, "--candidates", 5, "--negatives", 3)
    mined = {row["query"] for row in lines("out/a.jsonl")}
    assert len(mined) == rows - 4 and len(seen) == trained_on
    said = "too few others" in Path("out/report.txt").read_text()
    assert bool(mined & seen) == said == (rows == 20)


# what cannot be used

@pytest.mark.parametrize("command, flags, said", [
    ("cross-encoder", ["--steps", 2, "--lr", 1e9], "of 60 held-out pairs rightly, no better than"),
    ("mine", ["--cross-encoder", "reranker"], "reranker: ranks 0 of 60 held-out pairs rightly"),
    ("mine", ["--cross-encoder", "two"], "model two: its classification head has 2 outputs"),
    ("mine", ["--cross-encoder", "toy"], "model toy: is an encoder without a classification head"),
    ("mine", ["--cross-encoder", "./none"], "model ./none: neither a directory"),
    ("mine", ["--retriever", "./none"], "model ./none: neither a directory"),
    ("mine", ["--retriever", "reranker"], "model reranker: 2 weights are unknown here"),
    ("cross-encoder", ["--sources", "similar.json"], 'no source is of kind "retrieval"'),
    ("mine", ["--sources", "none.json"], "none.json: no such manifest"),
    ("filter", ["--sources", "bad.json"], 'bad.jsonl, line 5: field "neg": found 7'),
    ("mine", ["--sources", "bad.json"], 'bad.jsonl, line 5: field "neg": found 7'),
    ("cross-encoder", ["--sources", "bad.json"], 'bad.jsonl, line 5: field "neg": found 7'),
    ("filter", ["--out", "m.json"], "m.json: is not empty; choose another"),
    ("filter", ["--out", "toy"], "toy: is not empty; choose another"),
    ("filter", ["--pool", 2], "--pool 2: 2 targets and --top-k 2"),
    ("filter", ["--top-k", 0], "--top-k 0: expected 1 or more"),
    ("filter", ["--chunk", 0], "--chunk 0: expected 1 or more"),
    ("filter", ["--micro-tokens", 0], "--micro-tokens 0: expected 1 or more"),
    ("filter", ["--rows", 0], "--rows 0: expected 1 or more"),
    ("mine", ["--candidates", 0], "--candidates 0: expected 1 or more"),
    ("mine", ["--margin", "nan"], "--margin nan: expected at least 0 and less than 1"),
    ("mine", ["--margin", -0.1], "--margin -0.1: expected at least 0 and less than 1"),
    ("mine", ["--margin", 1.0], "--margin 1.0: expected at least 0 and less than 1"),
    ("cross-encoder", ["--lr", "nan"], "--lr nan: expected a number above 0"),
    ("cross-encoder", ["--lr", "inf"], "--lr inf: expected a number above 0"),
    ("filter", ["--seed", -1], "--seed -1: expected 0 or more"),
    ("mine", ["--max-length", 2], "--max-length 2: expected 3 to 512 tokens"),
])
def test_what_cannot_be_used_is_one_line_and_writes_no_result(
        topics, monkeypatch, capsys, command, flags, said):
    monkeypatch.chdir(topics)
    assert said in refused(capsys, command, "bad", *flags)
    assert not Path("bad").exists()
    shutil.rmtree("bad.work", ignore_errors=True)


# from files as they are found to a trained model

ANIMALS = "fox owl hare mole toad crow wren newt lynx boar swan moth crab seal".split()
COLOURS = ("red blue grey black white brown green golden spotted striped sleepy hungry young old "
           "tiny huge").split()
FRAME = "where does the sleep sleeps in a cave barn is nobody feeds".split()
LAYOUTS = {  # (query, positive, another positive, a negative) -> lines
    "tevatron.jsonl.gz": lambda q, p, r, n: [
        {"query": q, "positive_passages": [{"docid": "1", "title": "", "text": p}],
         "negative_passages": [{"docid": "2", "title": "nobody", "text": n[7:]}]}],
    "dpr.jsonl": lambda q, p, r, n: [
        {"question": q, "answers": [], "positive_ctxs": [{"title": p[:3], "text": p[4:]}],
         "negative_ctxs": [], "hard_negative_ctxs": [{"title": "", "text": n, "score": 1.5}]}],
    "snli.jsonl": lambda q, p, r, n: [
        {"gold_label": label, "sentence1": q, "sentence2": text, "pairID": "1"}
        for label, text in (("entailment", p), ("contradiction", r), ("-", n))],
    "multinli.jsonl.gz": lambda q, p, r, n: [
        {"genre": "fiction", "gold_label": label, "sentence1": q, "sentence2": text}
        for label, text in (("neutral", n), ("entailment", p))],
    "set.jsonl": lambda q, p, r, n: [{"set": [q, p, r]}],
    "pos-neg.jsonl.gz": lambda q, p, r, n: [{"query": q, "pos": [p, r], "neg": [n]}],
    "pairs.jsonl": lambda q, p, r, n: [[q, p]],
    "triplets.jsonl.gz": lambda q, p, r, n: [[q, p, n]],
}
SIMILARITY = ("snli.jsonl", "multinli.jsonl.gz", "set.jsonl")
NO_NEGATIVES = (*SIMILARITY, "pairs.jsonl")


def test_what_a_manifest_says_of_rows_is_done_and_not_said_again_of_what_comes_out(plane):
    """a is a table with labels and columns of its own, with an eval table and a collection alike;
    b is a BEIR directory, of which two documents are judged and three are not. What the filter
    writes is in our layout; b's queries get unjudged documents as negatives."""
    def table(name, rows):
        cells = [",".join(map(str, row)) for row in [("label", "who", "what"), *rows]]
        Path(name).write_text("\n".join(cells) + "\n")

    table("a.csv", [(int(i < 6), *SIX[i % 6]) for i in range(12)])
    table("eval.csv", [(1, "q9 9", "p9 9"), (0, "q8 8", "p8 8")])
    table("more.csv", [(1, "r 1", "s 1"), (0, "t 2", "u 2")])
    Path("b/qrels").mkdir(parents=True)
    write("b/corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": f"p{i} 90 {i}"}
                             for i in range(30, 35)])
    write("b/queries.jsonl", [{"_id": f"q{i}", "text": f"q{i} {i}"} for i in (30, 31)])
    judged = "query-id\tcorpus-id\tscore\nq30\td30\t1\nq31\td31\t1\n"
    Path("b/qrels/dev.tsv").write_text(judged)
    said = {"query": "who", "positive": "what", "where": {"label": 1}, "eval": "eval.csv",
            "collection": "more.csv"}
    sources({"a": {"path": "a.csv", **said},
             "b": {"path": "b", "split": "dev", "kind": "similarity"}})
    run("filter", "filtered", "--top-k", 7)
    assert [(row["query"], row["positive"]) for row in lines("filtered/a.jsonl")] == [
        tuple(row) for row in SIX]
    assert [row["query"] for row in lines("filtered/eval/a.jsonl")] == ["q9 9"]
    assert [row["positive"] for row in lines("filtered/dropped/a.jsonl")] == ["s 1"]
    assert [sorted(entry) for entry in manifest("filtered")] == [
        ["collection", "eval", "name", "path"], ["collection", "kind", "name", "path"]]
    data.load_sources("filtered/manifest.json")
    sources({"b": {"path": "b", "split": "dev", "kind": "similarity"}})
    run("mine", "mined", "--negatives", 4)
    assert [sorted(row["negatives"]) for row in lines("mined/b.jsonl")] == [
        [f"p{i} 90 {i}" for i in (31, 32, 33, 34)], [f"p{i} 90 {i}" for i in (30, 32, 33, 34)]]


def test_collections_in_their_own_layouts_go_through_every_command_and_train(folder, monkeypatch):
    """Eight sources of 25 queries, two of them with two positives; 20 pairs, and 25 // 20 = 1 or
    50 // 20 = 2 of a source, are held out. Of SNLI's three lines and MultiNLI's two a query, one is
    a row. A target names its query's colour and animal."""
    order = np.random.default_rng(0).permutation(len(COLOURS) * len(ANIMALS))

    def texts(i):
        name = f"{COLOURS[order[i] % 16]} {ANIMALS[order[i] // 16]}"
        other = f"{COLOURS[i % 16]} {ANIMALS[order[i] // 16]}"
        return (f"where does the {name} sleep", f"the {name} sleeps in a cave",
                f"a barn is where the {name} sleeps", f"nobody feeds the {other}")

    save_encoder("animals", tokenizer([*FRAME, *ANIMALS, *COLOURS]))
    entries, given = [], {}
    for number, (name, layout) in enumerate(LAYOUTS.items()):
        rows = [texts(i) for i in range(25 * number, 25 * number + 25)]
        write(name, [line for row in rows for line in layout(*row)])
        for row in rows:
            given[name, row[0]] = [] if name in NO_NEGATIVES else [row[3]]
        entries.append({"name": name, "lines": len(rows), "weight": 1,
                        "kind": "similarity" if name in SIMILARITY else "retrieval"})
    write("eval.jsonl", [texts(i)[:2] for i in range(200, 220)])
    entries[0]["eval"] = "eval.jsonl"
    Path("m.json").write_text(json.dumps(entries))
    monkeypatch.setattr(reranker, "QUERIES", 8)
    run("filter", "filtered", "--model", "animals", "--top-k", 50)
    flags = "--sources", "filtered/manifest.json", "--candidates", 6
    run("cross-encoder", "ce", *flags, "--model", "animals", "--steps", 40, "--lr", 0.01)
    run("mine", "mined", *flags, "--retriever", "animals", "--cross-encoder", "ce",
        "--negatives", 2)
    train.main(["--stage", "3", "--sources", "mined/manifest.json", "--model", "animals",
                "--batch-size", "4", "--negatives", "2", "--steps", "2", "--out", "run"])
    assert [entry["name"] for entry in manifest("mined")] == list(LAYOUTS)
    for entry in manifest("mined"):
        kept, rows = (lines(f"{folder}/{entry['path']}") for folder in ("filtered", "mined"))
        for row in kept:
            assert row.get("negatives", []) == given[entry["name"], row["query"]]
        assert len(rows) == len(kept) >= 15 and all(len(row["negatives"]) == 2 for row in rows)
        origins = {origin["from"] for row in rows for origin in row["mined"]}
        assert ("retriever" in origins) == (entry["kind"] == "retrieval")
    losses = [line["loss"] for line in lines("run/metrics.jsonl") if "loss" in line]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
