"""corpora/convert.py: files that are not JSON lines give the rows that JSON lines would, are
converted once, and are refused by file and line. Toy corpora as in test_sampler.py."""

import gzip
import json
import os
import sys

import pytest

import data
from corpora import index
from corpora.convert import read_rows
from curation.sources import collection
from test_sampler import corpus, pairs, refusal, write


def open_source(folder, path, **entry):
    entry = {"name": "a", "path": path, **entry}
    source, = data.load_sources(write(folder / "m.json", json.dumps([entry]).encode()))
    return source


def rows_of(source):
    return [source.read(i)[:3] for i in range(len(source.index))]


def write_parquet(path, columns, names=None, **options):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow
    parquet.write_table(pyarrow.table(columns, names), path, **options)


# CSV, TSV

TABLE = [["q", "p", []], ['a "b", c', "d\ne\r\nf", ["n"]], ["\tx", "é", ["n", "m"]]]
CSV = ('\ufeff,query,positive,negative_1,negative_2\r\n0,q,p,,\r\n'
       '1,"a ""b"", c","d\ne\r\nf",n,\r\n\r\n2,"\tx",é,n,m\r\n')


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv"])
def test_a_table_gives_its_rows(tmp_path, name):
    """RFC 4180: quotes doubled, separators and new lines inside quotes, line ends of either kind,
    an empty line, a byte order mark; a number of the row without a name, as pandas writes."""
    text = CSV
    if name == "a.tsv":
        text = CSV.replace('"\tx"', '"§x"').replace(",", "\t").replace('b""\t c', 'b"", c')
        text = text.replace("§", "\t")
    write(tmp_path / name, text.encode())
    expected = [(query.strip(), positive, negatives) for query, positive, negatives in TABLE]
    assert rows_of(open_source(tmp_path, name)) == expected
    assert [row[:3] for row in read_rows(tmp_path / name)] == expected


BAD_TABLES = {  # bytes, and what the message says
    "latin-1": (b'query,positive\na,"b\nc"\nd,\xe9\n', "line 4: not UTF-8"),
    "latin-1 inside quotes": (b'query,positive\na,"b\nc\xe9"\n', "line 3: not UTF-8"),
    "latin-1 in the header": (b"qu\xe9ry,positive\n", "line 1: not UTF-8"),
    "utf-16": ("query,positive\na,b\n".encode("utf-16"), "line 1: not UTF-8"),
    "a cell too many": (b'query,positive\na,"b\nc"\nd,e,f\n', "line 4: found 3 cells, expected 2"),
    "a cell too few": (b"query,positive\na\n", "line 2: found 1 cells, expected 2"),
    "an open quote": (b'query,positive\na,b\nc,"d\ne,f\n', "line 3: unexpected end of data"),
    "a quote inside": (b'query,positive\na,"b" c\n', "line 2: "),
    "one name twice": (b"query,positive,query\na,b,c\n", 'line 1: two fields are called "query"'),
    "semicolons": (b"query;positive\na, b;c\n", 'line 1: found one column, "query;positive"; '),
    "a list in a cell": (b"query,pos\na,\"['b', 'c']\"\n", 'line 2: field "pos": found a list as'),
    "no header": (b"who?,me\nwhat?,that\n", 'line 2: found "who?", "me"; known are'),
    "an empty text": (b'query,positive\na,"b\nc"\nd,\n', 'line 4: field "positive": the text is'),
    "a label": (b"query,positive,label\na,b,0\nc,d,1\n", 'line 2: field "label": found "0", "1"'),
    "nothing": (b"", "holds no pair"),
    "a header": (b"query,positive\n", "holds no pair"),
}


@pytest.mark.parametrize("raw, why", BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_bad_table_is_refused_by_file_and_line(tmp_path, raw, why):
    write(tmp_path / "a.csv", raw)
    message = refusal(open_source, tmp_path, "a.csv")
    assert f"{tmp_path}/a.csv" in message and why in message


def test_a_broken_table_leaves_nothing_behind(tmp_path):
    write(tmp_path / "a.csv", b"query,positive\na,b\nc\n")
    refusal(open_source, tmp_path, "a.csv")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(CSV.encode())[:-20])
    assert "a.csv.gz, after line " in refusal(open_source, tmp_path, "a.csv.gz")
    assert not list((tmp_path / ".cache").glob("v3/*"))


def test_where_compares_a_cell_by_its_text(tmp_path):
    write(tmp_path / "a.csv", b"query,positive,label,good\na,b,1,True\nc,d,0,False\ne,f,1.0,True\n")
    kept = [("a", "b", []), ("e", "f", [])]
    assert rows_of(open_source(tmp_path, "a.csv", where={"label": 1}, ignore="good")) == kept
    assert rows_of(open_source(tmp_path, "a.csv", where={"good": True}, ignore="label")) == kept


# Parquet

def test_a_parquet_file_gives_its_rows(tmp_path):
    """Texts, lists, nulls, passages; 3,000 rows are several batches."""
    passages = [[{"title": "T", "text": "p"}, {"title": None, "text": "r"}]]
    write_parquet(tmp_path / "a.parquet", {"query": ["q"], "positive_passages": passages,
                                           "negative_passages": [None]})
    assert rows_of(open_source(tmp_path, "a.parquet")) == [("q", "T p", []), ("q", "r", [])]
    numbers = range(3000)
    write_parquet(tmp_path / "b.parquet", {
        "anchor": [f"q{i}" for i in numbers], "positive": [f"p{i}" for i in numbers],
        "negative_1": [f"n{i}" for i in numbers], "negative_2": [None] * 3000,
        "label": [i % 3 / 1 for i in numbers]}, row_group_size=700)
    source = open_source(tmp_path, "b.parquet", where={"label": 1})
    assert rows_of(source) == [(f"q{i}", f"p{i}", [f"n{i}"]) for i in numbers if i % 3 == 1]


def test_a_bad_row_of_a_parquet_file_is_refused_by_its_number(tmp_path):
    texts = [f"q{i}" for i in range(2000)]
    write_parquet(tmp_path / "a.parquet", {"query": texts, "answer": texts[:-1] + [" "]})
    assert f'{tmp_path}/a.parquet, row 2000: field "answer"' in refusal(
        open_source, tmp_path, "a.parquet")
    write_parquet(tmp_path / "d.parquet", [["q"], ["p"], ["r"]], ["query", "answer", "answer"])
    assert 'd.parquet: two fields are called "answer"' in refusal(
        open_source, tmp_path, "d.parquet")
    write_parquet(tmp_path / "b.parquet", {"query": ["q"], "answer": [b"\xff"], "score": [0.5]})
    assert 'row 1: field "score": found 0.5; ' in refusal(open_source, tmp_path, "b.parquet")
    assert "row 1: field \"answer\": found \"b'" in refusal(
        open_source, tmp_path, "b.parquet", ignore="score")
    write(tmp_path / "c.parquet", b"query,answer\nq,a\n")
    assert "c.parquet, after row 0: no Parquet" in refusal(open_source, tmp_path, "c.parquet")
    assert not list((tmp_path / ".cache").glob("v3/*"))


def test_without_pyarrow_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    write(tmp_path / "a.parquet", b"")
    assert "python -m pip install pyarrow" in refusal(open_source, tmp_path, "a.parquet")


# folders and globs

def test_a_folder_or_a_glob_is_its_files_by_name(tmp_path, capsys):
    write(tmp_path / "d" / "part-2.jsonl", [["c", "c+"]])
    write(tmp_path / "d" / "part-1.jsonl.gz", [["b", "b+"]])
    write(tmp_path / "d" / "part-0.TSV", b"query\tpositive\na\ta+\n")
    write(tmp_path / "d" / "README.md", b"about\n")
    write(tmp_path / "d" / ".part-3.jsonl", b"\0")
    every = [(text, text + "+", []) for text in "abc"]
    assert rows_of(open_source(tmp_path, "d")) == every
    assert f'source a: in {tmp_path}/d these are not read: "README.md"\n' in capsys.readouterr().out
    assert rows_of(open_source(tmp_path, "d/part-[01]*")) == every[:2]
    assert rows_of(open_source(tmp_path, "*/part-2.jsonl")) == every[2:]
    assert [row[:3] for row in read_rows(tmp_path / "d")] == every


def test_a_bad_line_of_a_shard_is_refused_by_the_shard(tmp_path):
    write(tmp_path / "d" / "part-0.jsonl", pairs("a", 3))
    write(tmp_path / "d" / "part-1.jsonl", b'["q", "p"]\n["q"]\n')
    assert f"{tmp_path}/d/part-1.jsonl, line 2: " in refusal(open_source, tmp_path, "d")


def test_folders_that_cannot_be_meant_are_refused(tmp_path):
    """Of another kind; of several splits, of which one is to be tested on; a glob without a file"""
    write(tmp_path / "d" / "data-00000.arrow", b"")
    assert "found data-00000.arrow" in refusal(open_source, tmp_path, "d")
    write(tmp_path / "e" / "train-0.jsonl", pairs("a", 3))
    write(tmp_path / "e" / "my_test.jsonl", pairs("b", 3))
    message = refusal(open_source, tmp_path, "e")
    assert f"{tmp_path}/e: holds files of several splits, test, train; name one" in message
    assert rows_of(open_source(tmp_path, "e/train*"))[0] == ("a0", "a0+", [])
    assert "source a: " in refusal(open_source, tmp_path, "e/dev*")


# BEIR

DOCUMENTS = [{"_id": f"d{i}", "title": title, "text": text, "metadata": {}}
             for i, (title, text) in enumerate([("T", "x"), ("", "y"), ("U", ""), ("", ""),
                                                ("", "z")])]
QUERIES = [{"_id": f"q{i}", "text": f"what {i}?", "metadata": {}} for i in range(4)]
TRAIN = "query-id\tcorpus-id\tscore\nq0\td0\t1\nq0\td1\t2\nq1\td0\t1\nq2\td1\t0\n"
TEST = "query-id\tcorpus-id\tscore\nq3\td4\t1\n"


def beir(folder, corpus=DOCUMENTS, queries=QUERIES, train=TRAIN):
    write(folder / "corpus.jsonl", corpus)
    write(folder / "queries.jsonl", queries)
    write(folder / "qrels" / "train.tsv", train.encode())
    write(folder / "qrels" / "test.tsv", TEST.encode())


def test_a_beir_directory_gives_the_pairs_that_were_judged_right(tmp_path, capsys):
    """Three of five judgements are above 0; the others are counted, once. The title stands before
    the text. Other splits are other rows, and `eval` and `--pairs` take test."""
    beir(tmp_path / "b", train=TRAIN + "q3\td1\t-1\n")
    source = open_source(tmp_path, "b")
    assert f"source a: 2 of 5 lines of {tmp_path}/b/qrels/train.tsv" in capsys.readouterr().out
    open_source(tmp_path, "b")
    assert capsys.readouterr().out == ""
    assert sorted(rows_of(source)) == [("what 0?", "T x", []), ("what 0?", "y", []),
                                       ("what 1?", "T x", [])]
    test = [("what 3?", "z", [])]
    assert rows_of(open_source(tmp_path, "b", split="test")) == test
    assert [row[:3] for row in open_source(tmp_path, "b", eval="b").held_out] == test
    assert [row[:3] for row in read_rows(tmp_path / "b" / "qrels" / "test.tsv")] == test


def test_a_beir_directory_may_be_packed_and_have_numbers_for_ids(tmp_path):
    beir(tmp_path / "b", [{"_id": 7, "text": "x"}], [{"_id": 1, "text": "what?"}],
         "query-id\tcorpus-id\tscore\n1\t7\t1\n")
    for name in ("corpus", "queries"):
        plain = tmp_path / "b" / f"{name}.jsonl"
        plain.with_suffix(".jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    assert rows_of(open_source(tmp_path, "b")) == [("what?", "x", [])]


def test_the_documents_of_a_beir_directory_are_its_collection(tmp_path):
    """All but the one that is empty; or the manifest names another."""
    beir(tmp_path / "b")
    documents = collection(open_source(tmp_path, "b"))
    assert [row[1] for row in rows_of(documents)] == ["T x", "y", "U", "z"]
    write(tmp_path / "c.jsonl", pairs("c", 2))
    other = collection(open_source(tmp_path, "b", collection="c.jsonl"))
    assert [row[1] for row in rows_of(other)] == ["c0+", "c1+"]


BAD_BEIR = {  # the directory, and what the message says
    "split": ({}, {"split": "dev"}, "/qrels/dev.tsv: no such file; splits there: test, train"),
    "document": ({"corpus": DOCUMENTS[:1]}, {},
                 '/qrels/train.tsv, line 3: field "corpus-id": found "d1", which is not in the'),
    "query": ({"queries": QUERIES[1:]}, {},
              '/qrels/train.tsv, line 2: field "query-id": found "q0", which is not in the'),
    "empty": ({"train": TRAIN + "q0\td3\t1\n"}, {}, '/qrels/train.tsv, line 6: field "positive": '
                                                    'the text is empty'),
    "score": ({"train": TRAIN + "q0\td3\tyes\n"}, {},
              '/qrels/train.tsv, line 6: field "score": found "yes"'),
    "another score": ({"train": TRAIN + "q0\td0\t2\n"}, {},
                      '/qrels/train.tsv, line 6: field "score": found 2, but'),
    "header": ({"train": "q0\td0\t1\nq1\td0\t1\n"}, {}, "/qrels/train.tsv, line 1: found "),
    "no id": ({"corpus": [{"title": "T", "text": "x"}]}, {},
              '/corpus.jsonl, line 1: field "_id": found null'),
    "an id twice": ({"corpus": [*DOCUMENTS, DOCUMENTS[0]]}, {},
                    '/corpus.jsonl, line 6: field "_id": found "d0" a second time'),
}


@pytest.mark.parametrize("files, entry, why", BAD_BEIR.values(), ids=BAD_BEIR)
def test_a_bad_beir_directory_is_refused_by_file_and_line(tmp_path, files, entry, why):
    beir(tmp_path / "b", **files)
    assert f"{tmp_path}/b{why}" in refusal(open_source, tmp_path, "b", **entry)


# once

@pytest.mark.parametrize("name, changed", [("a.csv", "a.csv"), ("d", "d/b.csv"),
                                           ("b", "b/corpus.jsonl"), ("b", "b/queries.jsonl")])
def test_a_file_is_converted_once_and_anew_when_one_of_its_files_changed(
        tmp_path, capsys, name, changed):
    write(tmp_path / "a.csv", b"query,positive\na,b\n")
    for part in ("a", "b"):
        write(tmp_path / "d" / f"{part}.csv", b"query,positive\na,b\n")
    beir(tmp_path / "b")
    open_source(tmp_path, name)
    assert capsys.readouterr().out.count("indexing") == 1
    before = set((tmp_path / ".cache" / "v3").iterdir())
    open_source(tmp_path, name)
    assert capsys.readouterr().out == ""
    os.utime(tmp_path / changed, (1, 1))
    open_source(tmp_path, name)
    assert capsys.readouterr().out.count("indexing") == 1
    assert len(set((tmp_path / ".cache" / "v3").iterdir()) - before) == 1


def test_a_conversion_that_is_stopped_midway_leaves_nothing(tmp_path, monkeypatch):
    write(tmp_path / "a.csv", b"query,positive\n" + b"".join(b"a%d,b\n" % i for i in range(99)))

    def stop(text):
        if text == "a50":
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(index, "text_hash", stop)
    with pytest.raises(KeyboardInterrupt):
        open_source(tmp_path, "a.csv")
    assert not list((tmp_path / ".cache").glob("v3/*"))


def test_what_is_converted_is_batched_as_json_lines_are(tmp_path):
    """The same rows in both, and the same batches."""
    rows = [[f"q{i}", f"p{i}", f"n{i}"] for i in range(19)]
    table = "query,positive,negative_1\n" + "".join(",".join(row) + "\n" for row in rows)
    write(tmp_path / "a.csv", table.encode())
    plain, = corpus(tmp_path / "plain", a=rows)
    found = []
    for source in (open_source(tmp_path, "a.csv"), plain):
        batches = data.SourceBatches([source], 4, seed=0, negatives=1)
        found.append([next(batches).rows for _ in range(8)])
    assert found[0] == found[1]
