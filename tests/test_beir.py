"""Retrieval in a collection of BEIR's: the figures worked out by hand and beside trec_eval's, and
the command on good and bad directories.

Texts are read by the Compass of conftest.py, for which cosines are those of directions.
"""

import gzip
import json
import random
import tracemalloc
from math import log2

import pytest

from evaluation import beir, metrics
from evaluation.embed import embed
from tests import zoo
from tests.conftest import Compass
from tests.test_evaluation import lines, printed, refused

SIZES = dict(max_length=16, micro_tokens=4096)
DOCUMENTS = {"a": "north", "b": "north", "c": "north east", "d": "east", "e": ""}
QUERIES = {"q": "north"}
JUDGED = [("q", "a", "2.0"), ("q", "c", 1), ("q", "d", 0)]


def write(folder, documents=DOCUMENTS, queries=QUERIES, judged=JUDGED, split="test"):
    """-> the directory of a collection: {id: text} and (query, document, score)."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, texts in (("corpus", documents), ("queries", queries)):
        lines(folder / f"{name}.jsonl", *({"_id": id, "text": text} for id, text in texts.items()))
    rows = [("query-id", "corpus-id", "score"), *judged]
    (folder / "qrels" / f"{split}.tsv").write_text(
        "".join("\t".join(map(str, row)) + "\n" for row in rows))
    return folder


@pytest.fixture
def figures(tokenizer, tmp_path):
    """What `write` takes -> nDCG@10, recall@100, MRR@10 of a Compass."""
    def measure(*collection, prompts=None):
        read = beir.read(write(tmp_path, *collection), "test")
        found = beir.retrieval(Compass(), tokenizer, read, prompts=prompts, **SIZES)
        return found["ndcg@10"], found["recall@100"], found["mrr@10"]
    return measure


# the figures

def test_graded_ndcg_gains_the_grade_and_knows_what_was_not_found():
    """Results of grades 0, 2, 0, 1; a document of grade 3 was not found. Gains are grades, not 2^g
    - 1, and those below 1 are nothing: (2 / log2 3 + 1 / log2 5) / (3 + 2 / log2 3 + 1 / log2 4) =
    (1.261860 + 0.430677) / (3 + 1.261860 + 0.5) = 0.355436."""
    found, judged = [0, 2, 0, 1], [0, 1, 2, 3, -1]
    assert metrics.graded_ndcg(found, judged, 10) == pytest.approx(0.355436, abs=1e-6)


def test_graded_ndcg_is_cut_on_both_sides():
    """Of the first 2 results, and of the best 2: 1 / log2 3 over 3 + 2 / log2 3 = 0.630930 /
    4.261860. Results of negative grade lose nothing."""
    assert metrics.graded_ndcg([-1, 1, 3], [1, 2, 3, -1], 2) == pytest.approx(0.148041, abs=1e-6)


def test_graded_recall_counts_all_relevant_documents():
    """Four are relevant; two of them are among the first three results, whatever their grades."""
    assert metrics.graded_recall([3, 0, 1, 1], [3, 1, 1, 2, 0, -1], 3) == 0.5


@pytest.mark.parametrize("found, value", [
    ([2, 1], 1.0), ([0, -1, 1, 1], 1 / 3), ([0] * 9 + [1], 0.1), ([0] * 10 + [1], 0.0), ([], 0.0)])
def test_reciprocal_rank_is_of_the_first_relevant_result(found, value):
    """1 / position, 0 beyond 10."""
    assert metrics.reciprocal_rank(found, 10) == pytest.approx(value)


def test_of_equal_documents_the_last_id_comes_first(figures):
    """Cosines of a, b: 1, of c: 1 / sqrt(2), of d and the empty e: 0. In order: b a c e d, of
    grades 0 2 1 0 0, for b and e are not judged. nDCG = (2 / log2 3 + 1 / 2) / (2 + 1 / log2 3) =
    1.761860 / 2.630930 = 0.669672."""
    assert figures() == pytest.approx((0.669672, 1.0, 0.5), abs=1e-6)


def test_ids_are_sorted_as_text(figures):
    """Nine, then ten: "9" is after "10" as text, so it comes first."""
    documents = {"9": "north", "10": "north"}
    assert figures(documents, QUERIES, [("q", "9", 1)])[2] == 1.0
    assert figures(documents, QUERIES, [("q", "10", 1)])[2] == 0.5


def test_100_results_count(figures):
    """120 equal documents, of which the 100 with the last ids are results: 020 .. 119. Of the four
    that are relevant these are three, and 119 is first: nDCG = 1 / (1 + 1 / log2 3 + 1 / 2 + 1 /
    log2 5) = 1 / 2.561606."""
    documents = {f"{i:03}": "north" for i in range(120)}
    judged = [("q", f"{i:03}", 1) for i in (19, 20, 60, 119)]
    assert figures(documents, QUERIES, judged) == pytest.approx((1 / 2.561606, 0.75, 1.0))


def test_a_document_with_the_querys_id_is_no_result(figures, capsys):
    """Without it b is first; the other query still finds it, on its first place, for "q" is after
    "b". Both have MRR 1."""
    documents, queries = {"q": "north", "b": "north"}, {"q": "north", "r": "north"}
    assert figures(documents, queries, [("q", "b", 1), ("r", "q", 1)])[2] == 1.0
    assert "results of 1 queries are without a document" in capsys.readouterr().err


def test_queries_without_a_relevant_document_are_left_out(figures, capsys):
    """Two of the three: one of which nothing is judged, one whose judgements are 0 and -1. The mean
    is that of the third."""
    queries = QUERIES | {"r": "east", "s": "south"}
    judged = [*JUDGED, ("s", "a", 0), ("s", "b", -1)]
    assert figures(DOCUMENTS, queries, judged) == pytest.approx((0.669672, 1.0, 0.5), abs=1e-6)
    assert "2 of 3 queries have no relevant document" in capsys.readouterr().err


def test_prompts_are_put_before_texts(figures):
    """A query of "west" finds y, "west west", before the relevant x, "north": MRR 1/2. Three easts
    before documents make x (3, 1) and y (1, 0): x is nearer. Two norths before the query make it
    (-1, 2), nearer to x."""
    collection = {"x": "north", "y": "west west"}, {"q": "west"}, [("q", "x", 1)]
    assert figures(*collection)[2] == 0.5
    assert figures(*collection, prompts=("", "east east east "))[2] == 1.0
    assert figures(*collection, prompts=("north north ", ""))[2] == 1.0


def random_collection(seed, K=400, M=40):
    """Documents and queries in eight directions, and empty ones: many ties, and more than 100
    documents that are as near. Grades -1 .. 3; some ids are both a query's and a document's."""
    rng = random.Random(seed)

    def text():
        sides = rng.choice(["", "north", "south"]), rng.choice(["", "east", "west"])
        return " ".join(sides).strip()

    documents = {id: text() for id in rng.sample([f"{i:x}" for i in range(10 * K)], K)}
    names = rng.sample(list(documents), M // 4) + [f"query {i}" for i in range(M)]
    queries = {id: text() or "west" for id in names}
    judged = [(query, id, rng.randint(-1, 3))
              for query in queries for id in rng.sample(list(documents), 60)]
    return documents, queries, judged


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_trec_evals(seed, tmp_path, tokenizer, monkeypatch):
    """All cosines, as trec_eval takes them, of 100 documents at most; its recip_rank below 1/10 is
    beyond position 10."""
    pytrec_eval = pytest.importorskip("pytrec_eval")
    documents, queries, judged = random_collection(seed)
    q, d = (embed(Compass(), tokenizer, list(x.values()), **SIZES).double()
            for x in (queries, documents))
    norms = q.norm(dim=1)[:, None] * d.norm(dim=1)
    cosines = (q @ d.T / norms.clamp(min=1)).numpy().round(6).tolist()
    run = {query: {id: x for id, x in zip(documents, row) if id != query}
           for query, row in zip(queries, cosines)}
    qrels = {query: {} for query in queries}
    for query, id, score in judged:
        qrels[query][id] = score
    each = pytrec_eval.RelevanceEvaluator(
        qrels, {"ndcg_cut.10", "recall.100", "recip_rank"}).evaluate(run).values()
    reciprocal = [x["recip_rank"] if x["recip_rank"] > 0.099 else 0.0 for x in each]
    expected = [sum(values) / len(queries) for values in (
        [x["ndcg_cut_10"] for x in each], [x["recall_100"] for x in each], reciprocal)]

    monkeypatch.setattr(beir, "CHUNK", 150)
    collection = beir.read(write(tmp_path, documents, queries, judged), "test")
    found = beir.retrieval(Compass(), tokenizer, collection, **SIZES)
    assert [found[name] for name in ("ndcg@10", "recall@100", "mrr@10")] == pytest.approx(
        expected, abs=1e-6)


@pytest.mark.parametrize("size", [1, 7, 399])
def test_chunks_change_no_figure(figures, monkeypatch, size):
    """400 documents at once, or in chunks, also where equal ones are cut apart."""
    whole = figures(*random_collection(0))
    monkeypatch.setattr(beir, "CHUNK", size)
    assert figures(*random_collection(0)) == whole


def test_texts_are_not_all_held(tmp_path, tokenizer, monkeypatch):
    """10 MB of texts, 4 of 200 at a time, in less than 2 MB."""
    documents = {str(i): "north east " * 4500 for i in range(200)}
    folder = write(tmp_path, documents, QUERIES, [("q", "7", 1)])
    monkeypatch.setattr(beir, "CHUNK", 4)
    tracemalloc.start()
    beir.retrieval(Compass(), tokenizer, beir.read(folder, "test"), **SIZES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6


# the command

def test_the_command_prints_one_line(compass, tmp_path, capsys):
    """The collection of the figures above, in its `dev` split, whose lines end in CRLF, the
    last of them blank, with a packed corpus in which first words are titles. c alone is judged: it
    is third, nDCG 1 / log2 4."""
    folder = write(tmp_path, judged=[("q", "c", 1)], split="dev")
    with gzip.open(folder / "corpus.jsonl.gz", "wt") as packed:
        for id, text in DOCUMENTS.items():
            title, _, rest = text.partition(" ")
            value = {"_id": id, "title": title, "text": rest, "metadata": {}}
            packed.write(json.dumps(value) + "\n")
    (folder / "corpus.jsonl").unlink()
    judged = folder / "qrels" / "dev.tsv"
    judged.write_bytes(judged.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert printed(capsys, "M", "--beir", str(folder), "--split", "dev") == {
        "model": "M", "file": str(folder), "split": "dev", "ndcg@10": 1 / log2(4),
        "recall@100": 1.0, "mrr@10": pytest.approx(1 / 3), "queries": 1, "documents": 5}


def test_a_model_measures_with_its_own_prompts(tmp_path, capsys):
    """A BERT with prompts for queries and documents; the same texts with the prompts written into
    them, and without its prompts, have the same figures."""
    prompts = {"query": "find ", "document": "page "}
    bert = str(zoo.make_sentence_transformer(tmp_path / "bert", prompts=prompts))
    rng = random.Random(0)
    documents, queries = ({f"{kind}{i}": " ".join(rng.sample(zoo.LETTERS, 5)) for i in range(30)}
                          for kind in "dq")
    judged = [(f"q{i}", f"d{j}", rng.randint(0, 2)) for i in range(30) for j in range(0, 30, 3)]
    plain = write(tmp_path / "plain", documents, queries, judged)
    written = write(tmp_path / "written", {id: f"page {x}" for id, x in documents.items()},
                    {id: f"find {x}" for id, x in queries.items()}, judged)
    found = printed(capsys, bert, "--beir", str(plain))
    same = printed(capsys, bert, "--beir", str(written), "--prompts", "{}")
    without = printed(capsys, bert, "--beir", str(plain), "--prompts", "{}")
    assert found["queries"] == found["documents"] == 30
    assert found == same | {"file": str(plain)} != without


@pytest.mark.parametrize("name, content, expected", [
    ("corpus.jsonl", '["a", "north"]', 'line 1: found ["a", "north"], expected an object'),
    ("corpus.jsonl", '{"_id": "a"}', 'line 1: field "text": found null, expected text'),
    ("corpus.jsonl", '{"text": "x"}', 'line 1: field "_id": found null, expected text'),
    ("corpus.jsonl", '{"_id": "a", "text": "x"}\n\n{"_id": "a", "text": "y"}',
     'line 3: field "_id": found "a" a second time'),
    ("queries.jsonl", '{"_id": "q", "text": "x"}\n{"_id": "q", "text": "y"}',
     'line 2: field "_id": found "q" a second time'),
    ("queries.jsonl", '{"_id": "q", "text": " "}', 'line 1: field "text": the text is empty'),
    ("qrels/test.tsv", "q\ta\t1", "line 1: found"),
    ("qrels/test.tsv", "HEADER\nq a 1", 'line 2: found "q a 1", expected three fields'),
    ("qrels/test.tsv", "HEADER\nr\ta\t1", 'line 2: field "query-id": found "r"'),
    ("qrels/test.tsv", "HEADER\nq\ta\t1\nq\tf\t1", 'line 3: field "corpus-id": found "f"'),
    ("qrels/test.tsv", "HEADER\nq\ta\t0.5", 'line 2: field "score": found "0.5"'),
    ("qrels/test.tsv", "HEADER\nq\ta\t1\nq\ta\t2", 'line 3: field "score": found 2, but'),
    ("qrels/test.tsv", "HEADER\nq\ta\t0", "no query has a relevant document"),
    ("qrels/test.tsv", "", "no query has a relevant document")])
def test_a_bad_collection_ends_in_one_line_and_status_2(
        compass, tmp_path, capsys, name, content, expected):
    """The line names the file, and the line and field where there is one."""
    write(tmp_path)
    (tmp_path / name).write_text(content.replace("HEADER", "query-id\tcorpus-id\tscore"))
    said = refused(capsys, "M", "--beir", str(tmp_path))
    assert said.startswith(f"evaluation: {tmp_path / name}") and expected in said


def test_what_is_not_there_is_named(compass, tmp_path, capsys):
    """A split, with those that are there; the file of documents; the directory."""
    write(tmp_path, split="dev")
    write(tmp_path, split="train")
    said = refused(capsys, "M", "--beir", str(tmp_path))
    assert "test.tsv" in said and "dev, train" in said
    (tmp_path / "corpus.jsonl").unlink()
    assert "corpus.jsonl: no such file" in refused(
        capsys, "M", "--beir", str(tmp_path), "--split", "dev")
    assert "nowhere" in refused(capsys, "M", "--beir", str(tmp_path / "nowhere"))
