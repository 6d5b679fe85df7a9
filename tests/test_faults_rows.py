"""Rows that change while a run reads them, lines too long to read, and a default corpus whose
building is cut short: a run ends, in one line, and leaves nothing behind."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data
from corpora import convert, index
from tests.conftest import FLAGS, ROOT
from train import main as train


def corpus(folder, rows, name="a.jsonl"):
    """A manifest of one source of these rows."""
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    (folder / "m.json").write_text(json.dumps([{"name": "a", "path": name}]))
    return folder / "m.json"


def pairs(count):
    return [[f"q{i:02}", f"p{i:02}"] for i in range(count)]


# what is changed while it is read

def edited(raw):
    return raw.replace(b"p07", b"p70")


def in_capitals(raw):
    return raw.replace(b"p07", b"P07")


def shuffled(raw):
    lines = raw.splitlines(keepends=True)
    return b"".join([lines[7], *lines[1:7], lines[0], *lines[8:]])


def cut(raw):
    return raw[: raw.index(b"p07")]


@pytest.mark.parametrize("change", [edited, in_capitals, shuffled, cut])
def test_a_line_that_is_not_what_was_indexed_ends_the_run_with_its_number(tmp_path, change):
    source, = data.load_sources(corpus(tmp_path, pairs(15)))
    file = tmp_path / "a.jsonl"
    changed = change(file.read_bytes())
    with open(file, "r+b") as there:  # in place: an editor that writes another file changes nothing
        there.write(changed)
        there.truncate()
    assert source.read(3)[:2] == ("q03", "p03")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 8: .*put the file back .*or remove"):
        source.read(7)


def test_a_changed_file_of_the_same_size_and_time_is_read_after_its_index_is_removed(tmp_path):
    manifest = corpus(tmp_path, pairs(15))
    data.load_sources(manifest)
    file = tmp_path / "a.jsonl"
    then = file.stat().st_mtime_ns
    file.write_bytes(edited(file.read_bytes()))
    os.utime(file, ns=(then, then))
    source, = data.load_sources(manifest)
    with pytest.raises(ValueError) as error:
        source.read(7)
    folder = Path(str(error.value).partition("remove ")[2].partition(" and begin")[0])
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    source, = data.load_sources(manifest)
    assert source.read(7).positive == "p70"


def test_a_damaged_copy_of_a_packed_file_is_noticed(tmp_path):
    manifest = corpus(tmp_path, pairs(15), "a.jsonl.gz")
    data.load_sources(manifest)
    copy, = tmp_path.glob(".cache/*/*/unpacked.jsonl")
    copy.write_bytes(edited(copy.read_bytes()))
    source, = data.load_sources(manifest)
    with pytest.raises(ValueError, match=r"unpacked\.jsonl, line 8: "):
        source.read(7)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_another_case_is_another_corpus(tmp_path, name):
    """Hashes are blind to it, but the model's tokenizer may not be."""
    rows = pairs(15)
    before, = data.load_sources(corpus(tmp_path, rows, name))
    same, = data.load_sources(corpus(tmp_path, rows, name))
    rows[7][1] = "P07"
    after, = data.load_sources(corpus(tmp_path, rows, name))
    assert before.fingerprint == same.fingerprint != after.fingerprint
    state = data.SourceBatches([before], 4, seed=0).state_dict()
    with pytest.raises(ValueError, match="another corpus"):
        data.SourceBatches([after], 4, seed=0).load_state_dict(state)


def test_a_run_says_which_line_was_changed(folder, capsys):
    def change(*_):
        text = Path("left.jsonl").read_text()
        Path("left.jsonl").write_text(text.upper())

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr("plumbing.run.begin", change)
        patch.setattr("plumbing.run.Metrics", lambda *_, **__: lambda **___: None)
        train([*FLAGS, "--steps", "4", "--out", "run"])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert stop.value.code == 2 and len(said) == 1 and "left.jsonl, line " in said[0]


# lines too long, or too full

@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv"])
def test_a_line_that_is_too_long_is_refused_with_its_number(tmp_path, name, monkeypatch):
    monkeypatch.setattr(convert, "LONGEST_LINE", 1000)
    manifest = corpus(tmp_path, [["query", "positive"], ["q", "p" * 1000]], name)
    with pytest.raises(ValueError, match=rf"{name}, line 2: longer than .*one value a line"):
        data.load_sources(manifest)


def test_a_long_line_takes_no_more_memory_than_its_bound(tmp_path):
    """A gzip file of 1 GB in one line."""
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(bytes(1 << 24))
    code = (f"import resource; from corpora.convert import read_lines; from pathlib import Path\n"
            f"try: next(read_lines(Path({str(tmp_path / 'a.jsonl.gz')!r})))\n"
            f"except OSError as error: print(error)\n"
            f"print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    line, megabytes = done.stdout.splitlines()
    assert "line 1: longer than 64 MB" in line and int(megabytes) < 500, done


def test_a_line_with_many_positives_is_parsed_once(tmp_path, monkeypatch):
    rows = [{"query": "q", "positive": [f"p{i}" for i in range(2000)]}, *pairs(100)]
    source, = data.load_sources(corpus(tmp_path, rows))
    parsed, records = [], index.records
    monkeypatch.setattr(index, "records", lambda *a: parsed.append(1) or records(*a))
    for i in range(100):
        assert source.read(20 * i).positive == f"p{20 * i}"
        assert source.read(2000 + i).positive == f"p{i:02}"
    assert len(parsed) <= 100
