"""installed_docs.py on a few lines of Python: which pairs come out, and that a build is repeatable and all or nothing."""

import json
import os
import subprocess
import sys

import pytest

from corpora import installed_docs

MODULE = '''#!/usr/bin/env python
# Copyright 2023 Nobody, under some licence.
"""Tools for kites. They fly where there is wind,
and only there.

See the manual of the kite before the first flight.
"""
import os


class KiteReel:
    """Winds the line of a kite.

    Args:
        drum_width (`int`, *optional*, defaults to 3): How wide the drum is,
            in millimetres.
        absent: Not in the signature of the class, hence no pair of it.
    """

    def __init__(self, drum_width=3):
        self.drum_width = drum_width

    def wind(self, turns, brake):
        """Wind the line by some turns.

        Parameters
        ----------
        turns : int
            Number of full turns of the drum.

        :param float brake: share of the force that is lost
        """
        if turns < 0:
            raise ValueError("turns must not be "
                             f"negative, got {turns}")
        assert brake < 1, "the brake would hold the kite: %s" % brake
        # -----------------------
        # Longer line, so the kite climbs
        # and the drum is lighter.
        self.length = turns * self.circumference
        # noqa: this is for a tool
        self.weight = self.weight - turns
        # self.weight = compute(turns)
        return self.report("""
            # no comment but a string here
            text of the string
        """)


class TestKiteReel:
    def test_wind_negative_turns(self):
        with pytest.raises(ValueError):
            KiteReel().wind(-1, brake=0)
'''


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "kites.py").write_text(MODULE, encoding="utf-8")
    return folder


def roots(tree):
    return {"toy==1": sorted(tree.glob("*.py"))}


def pairs_in(manifest):
    texts = {entry["name"]: (manifest.parent / entry["path"]).read_text(encoding="utf-8")
             for entry in json.loads(manifest.read_text())}
    return {name: [tuple(json.loads(line)) for line in text.split("\n")[:-1]] for name, text in texts.items()}


def test_every_source_of_a_small_module():
    """By hand. No pair from the licence, the rule, the noqa, the code commented out and the `#` inside the string."""
    pairs = installed_docs.pairs_of_file(MODULE)
    assert pairs["summary_body"][0] == (
        "Tools for kites.",
        "They fly where there is wind, and only there.\n\nSee the manual of the kite before the first flight.")
    assert [query for query, _ in pairs["summary_body"]] == [
        "Tools for kites.", "Winds the line of a kite.", "Wind the line by some turns."]
    assert [query for query, _ in pairs["summary_code"]] == ["Winds the line of a kite.", "Wind the line by some turns."]
    assert pairs["summary_code"][0][1].startswith("def __init__(self, drum_width=3):\n    self.drum_width")
    assert pairs["name_summary"] == [("kite reel", "Winds the line of a kite."),
                                     ("kite reel wind", "Wind the line by some turns.")]
    assert pairs["parameter_description"] == [
        ("kite reel: drum width", "How wide the drum is, in millimetres."),
        ("kite reel wind: turns", "Number of full turns of the drum."),
        ("kite reel wind: brake", "share of the force that is lost")]
    up_to_the_raise = "def wind(self, turns, brake):\n    if turns < 0:\n        raise ValueError(...)"
    assert pairs["error_raiser"] == [
        ("turns must not be negative, got {turns}", up_to_the_raise),
        ("the brake would hold the kite: %s", up_to_the_raise + "\n    assert brake < 1, ...")]
    assert pairs["comment_code"] == [("Longer line, so the kite climbs and the drum is lighter.",
                                      "self.length = turns * self.circumference")]
    assert pairs["testname_test"] == [("kite reel wind negative turns",
                                       "with pytest.raises(ValueError):\n    KiteReel().wind(-1, brake=0)")]


@pytest.mark.parametrize("name, words", [("HTTPServer_version", "http server version"), ("DTensor", "dtensor"),
                                         ("__len__", "len"), ("BertForMaskedLM", "bert for masked lm")])
def test_identifiers_in_words(name, words):
    assert installed_docs.in_words(name) == words


@pytest.mark.parametrize("comment", ["TODO: make this faster", "type: ignore because of mypy", "fmt: off for this table",
                                     "Copied from transformers.models.bert", "for row in table(a, b):", "=======", "two words"])
def test_comments_that_describe_nothing(comment):
    assert installed_docs.pairs_of_file(f"start = 1\n# {comment}\nvalue = compute(start, other)\n")["comment_code"] == []


@pytest.mark.parametrize("text", ["def f(:\n", "a = '\0'\n", "", "# only a comment\n",
                                  "# Automatically generated by a script\n" + MODULE])
def test_files_without_pairs(text):
    assert not any(installed_docs.pairs_of_file(text).values())


def test_copies_and_near_copies_are_dropped(tree):
    """The same module for another class and with other numbers is not new, save for a test too short to tell. Another
    subject is new."""
    (tree / "copy.py").write_text(MODULE.replace("Kite", "Glider").replace("= 3", "= 4"), encoding="utf-8")
    (tree / "egg.py").write_text('"""Boil an egg. It takes some minutes in hot water."""\n', encoding="utf-8")
    pairs = pairs_in(installed_docs.build(tree, {"toy==1": [tree / "kites.py", tree / "copy.py", tree / "egg.py"]}))
    new = {"summary_body": [("Boil an egg.", "It takes some minutes in hot water.")],
           "testname_test": [("glider reel wind negative turns",
                              "with pytest.raises(ValueError):\n    GliderReel().wind(-1, brake=0)")]}
    assert pairs == {source: rows + new.get(source, []) for source, rows in installed_docs.pairs_of_file(MODULE).items()}
    long = "the kite climbs when the wind is strong and falls when it is weak, so hold the line and look up"
    near = [installed_docs.keys(f"In {model} {number} {long}") for model, number in [("Kite", 1), ("Glider", 27)]]
    assert near[0][0] != near[1][0] and near[0][1] == near[1][1]


def test_two_builds_are_equal_byte_by_byte(tree, tmp_path):
    """In two processes with different hash seeds, so nothing may follow the order of a set."""
    call = "import sys, pathlib; from corpora import installed_docs as d; t = pathlib.Path(sys.argv[1]); " \
           "d.build(pathlib.Path(sys.argv[2]), {'toy==1': sorted(t.glob('*.py'))})"
    files = []
    for seed in ("1", "2"):
        subprocess.run([sys.executable, "-c", call, tree, tmp_path / seed], env={**os.environ, "PYTHONHASHSEED": seed},
                       cwd=installed_docs.HERE.parent, check=True)
        files.append({path.name: path.read_bytes() for path in sorted((tmp_path / seed).glob("installed_docs-*/*"))})
    assert files[0] == files[1] and len(files[0]) == 8


def test_lines_parse_and_rates_sum_to_one(tree):
    manifest = installed_docs.build(tree, roots(tree))
    assert sum(entry["rate"] for entry in json.loads(manifest.read_text())) == pytest.approx(1, abs=1e-5)
    for query, target in sum(pairs_in(manifest).values(), []):
        assert query.strip() and target.strip() and query != target


def test_files_are_read_as_text_and_bad_ones_skipped(tree):
    """effect.py would end the process, and leave a file, if it were imported."""
    (tree / "effect.py").write_text('"""Leave a file.\n\nNever run this from a test."""\n'
                                    f'open({str(tree / "ran")!r}, "w")\nraise SystemExit\n')
    latin = b'"""The caf\xe9 without a coding line.\n\nIt cannot be decoded as UTF-8."""\n'
    (tree / "latin.py").write_bytes(latin)
    (tree / "coded.py").write_bytes(b"# -*- coding: latin-1 -*-\n" + latin.replace(b"without", b"with"))
    (tree / "nul.py").write_bytes(b'"""A byte of zero.\n\nPython refuses such a file."""\n\0')
    bodies = dict(pairs_in(installed_docs.build(tree, roots(tree)))["summary_body"])
    assert not (tree / "ran").exists()
    assert set(bodies) == {"Leave a file.", "The café with a coding line.", "Tools for kites.", "Winds the line of a kite.",
                           "Wind the line by some turns."}


def test_an_interrupted_build_leaves_nothing(tree, monkeypatch):
    def interrupted(pairs, directory):
        (directory / "summary_body.jsonl").write_text("[")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(installed_docs, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            installed_docs.build(tree / "built", roots(tree))
    assert list((tree / "built").iterdir()) == []
    assert installed_docs.build(tree / "built", roots(tree)).exists()


def test_a_build_is_done_once_and_anew_for_other_versions(tree, monkeypatch):
    manifest = installed_docs.build(tree, roots(tree))
    monkeypatch.setattr(installed_docs, "unique", lambda files: {})
    assert installed_docs.build(tree, roots(tree)) == manifest
    assert installed_docs.build(tree, {"toy==2": []}) != manifest


def test_a_folder_that_cannot_be_written_is_an_oserror(tree):
    (tree / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        installed_docs.build(tree / "file", roots(tree))


def test_closure_follows_markers_and_extras_and_leaves_out_the_rest(monkeypatch):
    """a needs b on every system, c on none, d by its extra x; e is not installed, z is installed and not needed."""
    class Distribution:
        def __init__(self, *requires):
            self.requires = list(requires)

    there = {"a": Distribution("B>=1", "c; sys_platform == 'nowhere'", "d; extra == 'x'", "e"), "b": Distribution("a"),
             "c": Distribution(), "d": Distribution(), "z": Distribution()}

    def distribution(name):
        if name not in there:
            raise installed_docs.metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(installed_docs.metadata, "distribution", distribution)
    assert list(installed_docs.closure(["a"])) == ["a", "b"]
    assert list(installed_docs.closure(["a[x]==1; python_version > '3'"])) == ["a", "b", "d"]
