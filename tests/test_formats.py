"""corpora/formats.py and index.py: which rows a line gives, what is refused and how it is named,
and that a row is found again in its file. Toy corpora as in test_sampler.py."""

import gzip
import json
import os
import tracemalloc

import pytest

import data
from corpora import formats
from corpora.convert import read_rows
from test_sampler import corpus, pairs, refusal, write

# lines

PASSAGES = [{"title": "T", "text": "p"}, {"title": "", "text": "p2"}, {"title": None, "text": "p3"},
            {"text": "p4"}]
TEVATRON = {"query_id": "1", "query": "q", "positive_passages": PASSAGES,
            "negative_passages": PASSAGES[:2]}
DPR = {"dataset": "nq", "question": "q", "answers": ["x"], "positive_ctxs": PASSAGES[:1],
       "negative_ctxs": [], "hard_negative_ctxs": PASSAGES[1:3]}
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
    "DPR": (DPR, [("q", "T p", ["p2", "p3"])]),
    "SNLI, entailment": (SNLI | {"gold_label": "entailment"}, [("q", "p", [])]),
    "SNLI, neutral": (SNLI | {"gold_label": "neutral"}, []),
    "SNLI, contradiction": (SNLI | {"gold_label": "contradiction"}, []),
    "SNLI, no label": (SNLI | {"gold_label": "-"}, []),
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


BAD_LINES = {  # a line, and what the message says of it
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
}


@pytest.mark.parametrize("line, why", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_refused_by_file_line_and_field(tmp_path, line, why):
    """A good row is line 1 and an empty one line 2, so the bad one is line 3. Labels and scores: in
    the SNLI of Hugging Face 2 is a contradiction; neither is a pair to train on as it stands."""
    message = refusal(corpus, tmp_path, a=b'["a0", "a0+"]\n\n' + line + b'\n["a1", "a1+"]\n')
    assert f"{tmp_path}/a.jsonl, line 3: " in message and why in message


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
    assert not list((tmp_path / ".cache").glob("v2/*"))


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
    """Offsets count bytes: é has 2, 語 3, 𝄞 4; U+2028 and an escaped \\n end no line; the last line
    has no end."""
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
        return {path: path.stat().st_mtime_ns for path in tmp_path.glob(".cache/v2/*/*")}

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


def test_hashes_are_blind_to_case_and_white_space_only():
    assert formats.text_hash(" Two\t words\n") == formats.text_hash("two WORDS")
    assert len({formats.text_hash(text) for text in ("two words", "twowords", "two words.")}) == 3
