"""corpora/formats.py, manifest.py and index.py: which rows a line gives, what is refused and how it
is named, and that a row is found again in its file. Toy corpora as in test_sampler.py. (Files that
are not JSON lines: test_convert.py.)"""

import gzip
import json
import os
import tracemalloc

import pytest

import data
from corpora import formats
from corpora.convert import read_rows
from corpora.manifest import read_manifest
from test_sampler import corpus, pairs, refusal, write

# lines

PASSAGES = [{"title": "T", "text": "p"}, {"title": "", "text": "p2"}, {"title": None, "text": "p3"},
            {"text": "p4"}]
TEVATRON = {"query_id": "1", "query": "q", "positive_passages": PASSAGES,
            "negative_passages": PASSAGES[:2]}
DPR = {"dataset": "nq", "question": "q", "answers": ["x"], "positive_ctxs": PASSAGES[:1],
       "negative_ctxs": PASSAGES[3:], "hard_negative_ctxs": PASSAGES[1:3]}
SNLI = {"sentence1": "q", "sentence2": "p"}
LINES = {  # a line, and its rows
    "pair": (["q", "p"], [("q", "p", [])]),
    "triplet": (["q", "p", "n"], [("q", "p", ["n"])]),
    "pos and neg": ({"query": "q", "pos": ["p", "r"], "neg": ["n", "m"]},
                    [("q", "p", ["n", "m"]), ("q", "r", ["n", "m"])]),
    "set": ({"set": ["s", "t", "u"]}, [("s", "t", []), ("s", "u", [])]),
    "ours": ({"query": "q", "positive": "p", "negatives": ["n", "m"]}, [("q", "p", ["n", "m"])]),
    "ours, no negatives": ({"query": " q ", "positive": "p\n"}, [("q", "p", [])]),
    "sentence-transformers": ({"anchor": "q", "positive": "p", "negative": "n"},
                              [("q", "p", ["n"])]),
    "Tevatron": (TEVATRON, [("q", p, ["T p", "p2"]) for p in ("T p", "p2", "p3", "p4")]),
    "DPR": (DPR, [("q", "T p", ["p2", "p3", "p4"])]),  # the hard ones first
    "SNLI, entailment": (SNLI | {"gold_label": "entailment"}, [("q", "p", [])]),
    "SNLI, neutral": (SNLI | {"gold_label": "neutral"}, []),
    "SNLI, contradiction": (SNLI | {"gold_label": "contradiction"}, []),
    "SNLI, no label": (SNLI | {"gold_label": "-"}, []),
    "NLI, named as others do": ({"premise": "q", "hypothesis": "p", "gold_label": "entailment"},
                                [("q", "p", [])]),
    "mined": ({"anchor": "q", "positive": "p", "negative_2": "m", "negative_10": "o",
               "negative_1": "n", "negative_3": None, "negative_4": ""},
              [("q", "p", ["n", "m", "o"])]),
    "all negatives": ({"query": "q", "pos": "p", "negatives": ["k", "l"], "negative": "m",
                       "negative_1": "n"}, [("q", "p", ["k", "l", "m", "n"])]),
    "negs": ({"query": "q", "passage": "p", "negs": ["n", "m"]}, [("q", "p", ["n", "m"])]),
    "neg null": ({"query": "q", "pos": ["p"], "neg": None}, [("q", "p", [])]),
    "neg empty text": ({"query": "q", "pos": ["p"], "neg": ""}, [("q", "p", [])]),
    "neg of an empty text": ({"query": "q", "pos": ["p"], "neg": [""]}, [("q", "p", [])]),
    "neg empty": ({"query": "q", "pos": ["p"], "neg": []}, [("q", "p", [])]),
    "a null column of another layout": ({"query": "q", "answer": None, "positive": "p"},
                                        [("q", "p", [])]),
    "fields that say nothing": ({"query": "q", "pos": ["p"], "label": None, "pos_scores": [],
                                 "prompt": "", "type": None}, [("q", "p", [])]),
    "harmless fields": ({"_id": "1", "query_id": 2, "pairID": "x", "metadata": {}, "lang": "en",
                         "query": "q", "positive": "p", "positive_score": 0.9, "mined": [{}],
                         "row": 3, "reason": "r"}, [("q", "p", [])]),
    **{f"{query}, {positive}": ({query: "q", positive: "p"}, [("q", "p", [])])
       for query, positive in formats.LAYOUTS[:-1]},
}
COLUMNS = {  # what the manifest says, a line, and its rows
    "named": ({"query": "title", "positive": "abstract", "negatives": ["n2", "n1"]},
              {"title": "q", "abstract": "p", "n1": "n", "n2": "m"}, [("q", "p", ["m", "n"])]),
    "named, one negative": ({"query": "a", "positive": "b", "negatives": "c"},
                            {"a": "q", "b": ["p", "r"], "c": None},
                            [("q", "p", []), ("q", "r", [])]),
    "named, known negatives": ({"query": "a", "positive": "b"},
                               {"a": "q", "b": "p", "negative_1": "n"}, [("q", "p", ["n"])]),
    "named, where two fit": ({"query": "query", "positive": "document"},
                             {"query": "q", "positive": "x", "document": "p"}, [("q", "p", [])]),
    "a prompt that is a query": ({"query": "prompt", "positive": "response"},
                                 {"prompt": "q", "response": "p"}, [("q", "p", [])]),
    "ignore": ({"ignore": ["label", "score"]}, {"anchor": "q", "positive": "p", "label": 0,
                                                "score": 0.5}, [("q", "p", [])]),
    "ignore one of two": ({"ignore": "answer"}, {"query": "q", "positive": "p", "answer": "x"},
                          [("q", "p", [])]),
    "ignore negatives": ({"ignore": ["neg"]}, {"query": "q", "pos": ["p"], "neg": ["n"]},
                         [("q", "p", [])]),
    "where": ({"where": {"label": 1}}, {"query": "q", "positive": "p", "label": 1},
              [("q", "p", [])]),
    "where not": ({"where": {"label": 1}}, {"query": "q", "positive": "p", "label": 0}, []),
    "where, by text": ({"where": {"label": 1}}, {"query": "q", "positive": "p", "label": "1"},
                       [("q", "p", [])]),
    "where, by fraction": ({"where": {"label": 1}}, {"query": "q", "positive": "p", "label": 1.0},
                           [("q", "p", [])]),
    "where, true is not 1": ({"where": {"label": 1}}, {"query": "q", "positive": "p",
                                                       "label": True}, []),
    "where, several": ({"where": {"label": [1, 2], "lang": "en"}},
                       {"query": "q", "positive": "p", "label": 2, "lang": "en"},
                       [("q", "p", [])]),
    "where, one of two": ({"where": {"label": [1, 2], "lang": "en"}},
                          {"query": "q", "positive": "p", "label": 2, "lang": "de"}, []),
    "where, null": ({"where": {"label": None}}, {"query": "q", "positive": "p", "label": None},
                    [("q", "p", [])]),
    "where before layout": ({"where": {"label": 1}}, {"query": "q", "positive": None, "label": 0},
                            []),
    "where, another gold_label": ({"where": {"gold_label": "neutral"}},
                                  SNLI | {"gold_label": "neutral"}, [("q", "p", [])]),
    "ignore gold_label": ({"ignore": "gold_label"}, SNLI | {"gold_label": "-"},
                          [("q", "p", [])]),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_every_line_format_gives_its_rows(tmp_path, suffix):
    """Each format once in one file. Read in order, and read by number, both give the concatenation
    of the table."""
    expected = [row for _, rows in LINES.values() for row in rows]
    source, = corpus(tmp_path, suffix=suffix, a=[line for line, _ in LINES.values()])
    assert [row[:3] for row in read_rows(tmp_path / f"a{suffix}")] == expected
    found = [source.read(i) for i in range(len(expected))]
    assert found == [(*row, i) for i, row in enumerate(expected)]


@pytest.mark.parametrize("entry, line, rows", COLUMNS.values(), ids=COLUMNS)
def test_a_row_is_what_the_manifest_says_of_its_fields(tmp_path, entry, line, rows):
    manifest = write(tmp_path / "m.json", json.dumps([{"name": "a", **entry}]).encode())
    columns = read_manifest(manifest)[0]["columns"]
    assert [row[:3] for row in formats.records(line, columns)] == rows


BAD_LINES = {  # a line, and what the message says of it
    "cut short": (b'{"query": "q", ', "not JSON"),
    "two values": (b'["q", "p"] ["q", "p"]', "not JSON"),
    "one field twice": (b'{"query": "q", "positive": "p", "positive": "r"}',
                        'two fields are called "positive"; rename one'),
    "a list as text": (b'{"query": "q", "positive": "p", "negatives": "[\'n\', \'m\']"}',
                       'field "negatives": found a list as text'),
    "whether it is a pair": (b'{"query": "q", "positive": "p", "is_relevant": 0}', '"is_relevant"'),
    "too deep": (b"[" * 100_000, ""),
    "a text": (b'"q"', "expected a list or an object"),
    "no target": (b'["q"]', '"positive"'),
    "no target field": (b'{"query": "q"}', '"positive"'),
    "no target in pos": (b'{"query": "q", "pos": []}', '"pos"'),
    "no query": (b'{"positive": "p"}', '"query"'),
    "empty": (b'["", "p"]', '"query": the text is empty'),
    "white space": (b'["q", " \\t\\u00a0\\u2003"]', '"positive": the text is empty'),
    "empty negative": (b'{"query": "q", "pos": ["p"], "neg": ["n", ""]}',
                       '"neg": the text is empty'),
    "number": (b'["q", 7]', '"positive": found 7'),
    "null": (b'["q", "p", null]', '"negatives": found null'),
    "passage without text": (b'{"query": "q", "positive_passages": [{"title": "t"}]}',
                             '"positive_passages"'),
    "latin-1": (b'["q", "\xe9"]', "UTF-8"),
    "half a surrogate pair": (b'["q", "\\ud800"]', '"positive"'),
    "SNLI's label": (b'{"sentence1": "q", "sentence2": "p", "label": 0}', '"label"'),
    "STS's score": (b'{"sentence1": "q", "sentence2": "p", "score": 4.5}', '"score"'),
    "a label beside a triplet": (b'{"anchor": "q", "positive": "p", "label": 0}',
                                 'field "label": found 0; what'),
    "FlagEmbedding's": (b'{"query": "q", "pos": ["p"], "pos_scores": [0.5], "prompt": "P"}',
                        'field "pos_scores": found [0.5]; "prompt": found "P"; what'),
    "a text of another name": (b'{"query": "q", "response": 5}', 'field "response": found 5'),
    "two positives": (b'{"query": "q", "positive": "p", "answer": "r"}',
                      'fits 2 layouts, "query" with "positive" and "query" with "answer"'),
    "two queries": (b'{"query": "q", "anchor": "r", "positive": "p"}', "fits 2 layouts"),
    "a list of queries": (b'{"query": ["q", "r"], "positive": "p"}',
                          'field "query": found 2 texts, expected one'),
    "no known field": (b'{"input": "q", "output": "p"}',
                       'found "input", "output"; known are "query", "anchor", "question" with'),
    "a null positive": (b'{"query": "q", "positive": null}', 'found "query"; known are'),
    "a set of one": (b'{"set": ["s"]}', 'field "set" is missing or empty'),
    "an array of rows on one line": (b'[{"query": "q", "positive": "p"}]', "jq -c '.[]'"),
    "an array of lists": (b'[["q", "p"], ["q", "p"]]', "jq -c '.[]'"),
}


@pytest.mark.parametrize("line, why", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_refused_by_file_line_and_field(tmp_path, line, why):
    """A good row is line 1 and an empty one line 2, so the bad one is line 3. Labels and scores: in
    the SNLI of Hugging Face 2 is a contradiction; neither is a pair to train on as it stands."""
    message = refusal(corpus, tmp_path, a=b'["a0", "a0+"]\n\n' + line + b'\n["a1", "a1+"]\n')
    assert f"{tmp_path}/a.jsonl, line 3: " in message and why in message


def test_the_message_of_a_label_has_the_values_that_the_file_begins_with(tmp_path):
    """Values in the order in which they come, each once, at most five; the first is the line's."""
    lines = [["x", "y"], *({"query": f"q{i}", "positive": f"p{i}", "label": label}
                           for i, label in enumerate([2, 0, 0, 1, "-"]))]
    message = refusal(corpus, tmp_path, a=lines)
    assert 'a.jsonl, line 2: field "label": found 2, 0, 1, "-"; ' in message
    assert '"where": {"label": VALUE or [VALUES]}' in message and '"ignore": ["label"]' in message


BAD_COLUMNS = {  # what the manifest says, and what the message says of the line of `LABELLED`
    "no such column": ({"query": "title", "positive": "positive"},
                       'field "title", which the manifest names, is missing; found "anchor", '
                       '"positive", "label"'),
    "no such negatives": ({"negatives": ["negative_1"]}, 'field "negative_1", which the manifest'),
    "no such label": ({"where": {"lable": 1}}, 'field "lable", which "where" asks for, is missing'),
    "no such value": ({"where": {"label": 2}}, 'holds no pair; "where" leaves out every row, of '
                                               'which the first have "label": 0, 1'),
}
LABELLED = [{"anchor": f"q{i}", "positive": f"p{i}", "label": i % 2} for i in range(4)]


@pytest.mark.parametrize("entry, why", BAD_COLUMNS.values(), ids=BAD_COLUMNS)
def test_what_the_manifest_says_and_the_file_has_not_is_refused(tmp_path, entry, why):
    message = refusal(corpus, tmp_path, {"a": entry}, a=LABELLED)
    assert str(tmp_path / "a.jsonl") in message and why in message


def test_rows_left_out_are_counted_and_unknown_fields_and_equal_texts_are_said_once(
        tmp_path, capsys):
    """Of 4 rows the two of label 0 are left out. In one that stays, the query is the positive; the
    summary and the stars are not known, ids are. The second opening says nothing."""
    more = {"summary": "s", "stars": 5, "doc_id": 7}
    lines = [row | more for row in LABELLED[:3]] + [LABELLED[3] | {"anchor": "p3"}]
    source, = corpus(tmp_path, {"a": {"where": {"label": 1}}}, a=lines)
    assert [source.read(i)[:2] for i in range(2)] == [("q1", "p1"), ("p3", "p3")]
    left_out, same, unused = capsys.readouterr().out.splitlines()
    assert left_out.startswith("source a: 2 of 4 lines") and "in 1 rows" in same
    assert '"summary", "stars";' in unused
    data.load_sources(tmp_path / "m.json")
    assert capsys.readouterr().out == ""


def test_two_readings_of_one_file_have_two_indices(tmp_path):
    """Kept by label, or read by other columns."""
    write(tmp_path / "a.jsonl", [row | {"title": "t", "abstract": "s"} for row in LABELLED])
    readings = {"zeros": {"where": {"label": 0}}, "ones": {"where": {"label": "1"}},
                "titles": {"query": "title", "positive": "abstract", "ignore": "label"}}
    manifest = [{"name": name, "path": "a.jsonl", "ignore": ["title", "abstract"], **reading}
                for name, reading in readings.items()]
    sources = data.load_sources(write(tmp_path / "m.json", json.dumps(manifest).encode()))
    found = [[source.read(i).query for i in range(len(source.index))] for source in sources]
    assert found == [["q0", "q2"], ["q1", "q3"], ["t"] * 4]


def test_eval_files_and_collections_have_the_columns_of_their_source(tmp_path):
    lines = [{"t": f"q{i}", "a": f"p{i}", "label": i % 2} for i in range(4)]
    write(tmp_path / "eval.jsonl", lines[:2])
    entry = {"query": "t", "positive": "a", "where": {"label": 1}, "eval": "eval.jsonl"}
    source, = corpus(tmp_path, {"a": entry}, a=lines)
    assert [row[:2] for row in source.held_out] == [("q1", "p1")]
    assert [source.read(i)[:2] for i in source.train] == [("q3", "p3")]


def test_a_byte_order_mark_is_no_text(tmp_path):
    source, = corpus(tmp_path, a=b'\xef\xbb\xbf["a0", "a0+"]\n["a1", "a1+"]\n')
    assert [source.read(i)[:2] for i in (1, 0)] == [("a1", "a1+"), ("a0", "a0+")]


@pytest.mark.parametrize("array", ['[\n["q", "p"]\n]', '[{"query": "q",\n "positive": "p"}]', "["])
def test_a_json_array_over_many_lines_is_named(tmp_path, array):
    message = refusal(corpus, tmp_path, a=array.encode())
    assert "a.jsonl, line 1: found a JSON array of rows" in message and "jq -c '.[]'" in message


LONG = b"".join(json.dumps([str(i), str(i * i)]).encode() + b"\n" for i in range(2000))
PACKED = gzip.compress(LONG, mtime=0)
BROKEN = {"truncated": PACKED[:-50], "no gzip": b'["q", "p"]\n',
          "bad block": PACKED[:10] + b"\xff" * 9 + PACKED[19:],
          "bad checksum": PACKED[:-8] + b"\0" * 8}


@pytest.mark.parametrize("raw", BROKEN.values(), ids=BROKEN)
def test_a_broken_gzip_file_is_refused_by_name_and_leaves_nothing_behind(tmp_path, raw):
    (tmp_path / "a.jsonl.gz").write_bytes(raw)
    manifest = write(tmp_path / "m.json", b'[{"name": "a", "path": "a.jsonl.gz"}]')
    assert f"{tmp_path}/a.jsonl.gz, after line " in refusal(data.load_sources, manifest)
    assert not list((tmp_path / ".cache").glob("v3/*"))


# manifests

def test_the_data_config_of_sentence_transformers_is_a_manifest(tmp_path):
    """data_config.json has no path (the name is the file) and calls the rate "weight"."""
    write(tmp_path / "a.jsonl.gz", pairs("a", 3))
    write(tmp_path / "b.jsonl", pairs("b", 2))
    config = (b'[{"name": "a.jsonl.gz", "lines": 3, "weight": 30},'
              b' {"name": "b.jsonl", "lines": 2, "weight": 12}]')
    sources = data.load_sources(write(tmp_path / "data_config.json", config))
    assert [(s.name, s.rate, len(s.train)) for s in sources] == [("a.jsonl.gz", 30, 3),
                                                                 ("b.jsonl", 12, 2)]


BAD_FIELDS = [  # what the second source says, and what the message says of it
    ('"name": null', 'field "name": found None'), ('"name": "b"', "field \"name\": found 'b'"),
    ('"path": 5', 'field "path": found 5'), ('"weigth": 2', 'unknown field "weigth"'),
    ('"kind": "nli"', "field \"kind\": found 'nli'"), ('"eval": 5', 'field "eval": found 5'),
    ('"rate": 0', 'field "rate": found 0'), ('"rate": -1', 'field "rate": found -1'),
    ('"rate": "1"', "field \"rate\": found '1'"), ('"rate": true', 'field "rate": found True'),
    ('"rate": null', 'field "rate": found None'), ('"rate": NaN', 'field "rate": found nan'),
    ('"rate": Infinity', 'field "rate": found inf'),
    ('"query": "q"', 'field "positive": found None, expected a text, beside "query"'),
    ('"positive": "p"', 'field "query": found None'), ('"negatives": [1]', 'field "negatives"'),
    ('"ignore": {"label": 1}', 'field "ignore"'), ('"where": ["label"]', 'field "where"'),
    ('"where": {"label": {"is": 1}}', 'field "where"'), ('"split": 5', 'field "split": found 5'),
    ('"split": "test"', 'field "split": '),
]
BAD_MANIFESTS = {
    "no JSON": ('[{"name": "a"', "not JSON"),
    "no list": ('{"name": "a"}', "expected a list"),
    "an empty list": ("[]", "expected a list"),
    "a list of texts": ('["a.jsonl"]', "expected a list"),
    "no such file": ('[{"name": "a", "path": "c.jsonl"}]', "source a: "),
    "no such eval file": ('[{"name": "b", "eval": "c.jsonl"}]', "c.jsonl: no such file"),
}
for field, why in BAD_FIELDS:
    BAD_MANIFESTS[field] = ('[{"name": "b"}, {"name": "a", "path": "a.jsonl", %s}]' % field,
                            f"source 2: {why}")


@pytest.mark.parametrize("text, why", BAD_MANIFESTS.values(), ids=BAD_MANIFESTS)
def test_a_bad_manifest_is_refused_by_file_source_and_field(tmp_path, text, why):
    write(tmp_path / "a.jsonl", pairs("a", 3))
    write(tmp_path / "b", pairs("b", 3))
    message = refusal(data.load_sources, write(tmp_path / "m.json", text.encode()))
    assert why in message and str(tmp_path) in message


def test_a_missing_manifest_and_one_that_is_no_utf_8_are_refused_by_name(tmp_path):
    assert f"{tmp_path}/m.json: no such" in refusal(data.load_sources, tmp_path / "m.json")
    write(tmp_path / "m.json", b'["\xff"]')
    assert f"{tmp_path}/m.json: not JSON" in refusal(data.load_sources, tmp_path / "m.json")


# index

def test_rows_are_found_again_among_long_characters_and_windows_line_ends(tmp_path):
    """Offsets count bytes: é has 2, 語 3, 𝄞 4; U+2028 and an escaped \\n end no line; the last
    line has no end."""
    texts = ["é", "語\u2028語", "𝄞 clef", "a\nb", "e"]
    lines = [json.dumps([text, text + "+"], ensure_ascii=i % 2 == 1).encode()
             for i, text in enumerate(texts)]
    source, = corpus(tmp_path, a=b"\r\n" + lines[0] + b"\r\n \r\n" + b"\r\n".join(lines[1:]))
    for i in (4, 0, 3, 1, 2):
        assert source.read(i)[:2] == (texts[i], texts[i] + "+")


def test_a_file_is_indexed_once_and_anew_when_it_changed(tmp_path, capsys):
    """a.jsonl.gz: unpacked, which one line says; then silent, with the files written before. When
    changed to rows of the same number and size, it is another file."""
    def written():
        return {path: path.stat().st_mtime_ns for path in tmp_path.glob(".cache/v3/*/*")}

    corpus(tmp_path, suffix=".jsonl.gz", a=pairs("a", 3))
    assert capsys.readouterr().out.count("\n") == 1
    before = written()
    data.load_sources(tmp_path / "m.json")
    assert capsys.readouterr().out == "" and written() == before != {}
    source, = corpus(tmp_path, suffix=".jsonl.gz", a=pairs("b", 3))
    assert [source.read(i).query for i in range(3)] == ["b0", "b1", "b2"]


def test_files_whose_paths_differ_by_case_are_two_files(tmp_path):
    """d/a.jsonl and D/a.jsonl, equal in size and time, as files out of an archive are."""
    for folder, query in (("d", "lower"), ("D", "UPPER")):
        os.utime(write(tmp_path / folder / "a.jsonl", [[query, query + "+"]]), (1, 1))
    if (tmp_path / "d").samefile(tmp_path / "D"):
        pytest.skip("this file system does not tell them apart")
    manifest = [{"name": "l", "path": "d/a.jsonl"}, {"name": "u", "path": "D/a.jsonl"}]
    lower, upper = data.load_sources(write(tmp_path / "m.json", json.dumps(manifest).encode()))
    assert lower.hashes(0)[0] == formats.text_hash("lower")
    assert upper.hashes(0)[0] == formats.text_hash("upper")


def test_a_row_costs_a_few_bytes_of_memory(tmp_path):
    """Its number among the rows to train on and its position in the epoch's order, 8 bytes each,
    for 60,000 rows; the index stays on disk. The thousand rows that are held out are texts, at less
    than 1,440 bytes each. One row as a Row of two short texts is about 250 bytes."""
    corpus(tmp_path, a=b"".join(b'["a%d", "a%d+"]\n' % (i, i) for i in range(60_000)))
    tracemalloc.start()
    batches = data.SourceBatches(data.load_sources(tmp_path / "m.json"), 64, seed=0)
    next(batches)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 40 * 60_000


SPELLINGS = [
    [" Two\t words\n", "two WORDS", "two\u00a0words", "two\u3000words", "tw\u200bo words\u200d",
     "\ufefftwo wo\u00adrds", "ｔｗｏ words", "two \u2060words"],
    ["twowords"], ["two words."], ["tẁo words"],
    ["é", "e\u0301", "É", "E\u0301"], ["e"], ["ﬁn", "fin"], ["x²", "x2"],
    ["straße", "STRASSE"],
    ["\u0390", "\u03aa\u0301", "\u0399\u0308\u0301"],  # case folding takes it apart
]


def test_a_text_is_one_text_however_it_is_spelled():
    """Blind to case, white space, what has no width, and composition; and to nothing else."""
    hashes = [{formats.text_hash(text) for text in spellings} for spellings in SPELLINGS]
    assert [len(found) for found in hashes] == [1] * len(SPELLINGS)
    assert len(set().union(*hashes)) == len(SPELLINGS)


def test_the_hash_of_an_ascii_text_stays():
    """blake2b, 8 bytes, of "two words"; computed with b2sum -l 64."""
    assert formats.text_hash("Two  words") == int.from_bytes(
        bytes.fromhex("b0ce94d70c1661cc"), "little")
