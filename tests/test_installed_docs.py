"""installed_docs.py on a few lines of Python: which pairs come out, and that a build is repeatable
and all or nothing."""

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext

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
    pairs = {}
    for entry in json.loads(manifest.read_text()):
        lines = (manifest.parent / entry["path"]).read_text(encoding="utf-8").split("\n")
        pairs[entry["name"]] = [tuple(json.loads(line)) for line in lines[:-1]]
    return pairs


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.glob("installed_docs-*/*")}


def test_every_source_of_a_small_module():
    """By hand. No pair from the licence, the rule, the noqa, the code commented out and the `#`
    inside the string."""
    up_to_the_raise = ("def wind(self, turns, brake):\n"
                       "    if turns < 0:\n"
                       "        raise ValueError(...)")
    pairs = installed_docs.pairs_of_file(MODULE)
    assert pairs["summary_body"][0] == (
        "Tools for kites.", "They fly where there is wind, and only there.\n\n"
                            "See the manual of the kite before the first flight.")
    assert [query for query, _ in pairs["summary_body"]] == [
        "Tools for kites.", "Winds the line of a kite.", "Wind the line by some turns."]
    assert [query for query, _ in pairs["summary_code"]] == [
        "Winds the line of a kite.", "Wind the line by some turns."]
    assert pairs["summary_code"][0][1].startswith("def __init__(self, drum_width=3):\n    self.dr")
    assert pairs["name_summary"] == [
        ("kite reel", "Winds the line of a kite."),
        ("kite reel wind", "Wind the line by some turns.")]
    assert pairs["parameter_description"] == [
        ("kite reel: drum width", "How wide the drum is, in millimetres."),
        ("kite reel wind: turns", "Number of full turns of the drum."),
        ("kite reel wind: brake", "share of the force that is lost")]
    assert pairs["error_raiser"] == [
        ("turns must not be negative, got {turns}", up_to_the_raise),
        ("the brake would hold the kite: %s", up_to_the_raise + "\n    assert brake < 1, ...")]
    assert pairs["comment_code"] == [
        ("Longer line, so the kite climbs and the drum is lighter.",
         "self.length = turns * self.circumference")]
    assert pairs["testname_test"] == [
        ("kite reel wind negative turns",
         "with pytest.raises(ValueError):\n    KiteReel().wind(-1, brake=0)")]


@pytest.mark.parametrize("name, words", [
    ("HTTPServer_version", "http server version"), ("DTensor", "dtensor"), ("__len__", "len"),
    ("BertForMaskedLM", "bert for masked lm")])
def test_identifiers_in_words(name, words):
    assert installed_docs.in_words(name) == words


@pytest.mark.parametrize("comment", [
    "TODO: make this faster", "type: ignore because of mypy", "fmt: off for this table",
    "Copied from transformers.models.bert", "for row in table(a, b):", "=======", "two words"])
def test_comments_that_describe_nothing(comment):
    text = f"start = 1\n# {comment}\nvalue = compute(start, other)\n"
    assert installed_docs.pairs_of_file(text)["comment_code"] == []


@pytest.mark.parametrize("text", ["def f(:\n", "a = '\0'\n", "", "# only a comment\n",
                                  "# Automatically generated by a script\n" + MODULE])
def test_files_without_pairs(text):
    assert not any(installed_docs.pairs_of_file(text).values())


def test_copies_and_near_copies_are_dropped(tree):
    """The same module for another class and with other numbers is not new, save for a test too
    short to tell. Another subject is new."""
    copy = MODULE.replace("Kite", "Glider").replace("= 3", "= 4")
    (tree / "copy.py").write_text(copy, encoding="utf-8")
    (tree / "egg.py").write_text('"""Boil an egg. It takes some minutes in hot water."""\n')
    files = [tree / "kites.py", tree / "copy.py", tree / "egg.py"]
    expected = installed_docs.pairs_of_file(MODULE)
    expected["summary_body"].append(("Boil an egg.", "It takes some minutes in hot water."))
    expected["testname_test"].append((
        "glider reel wind negative turns",
        "with pytest.raises(ValueError):\n    GliderReel().wind(-1, brake=0)"))
    assert pairs_in(installed_docs.build(tree, {"toy==1": files})) == expected


def test_texts_that_differ_by_a_name_and_a_number_are_near_copies():
    """Of 18 words in small letters there are 16 shingles, from 8 on they count."""
    text = ("In {} {} the kite climbs when the wind is strong and falls when it is weak, so hold "
            "the line")
    (kite, near_kite), (glider, near_glider) = (
        installed_docs.hashes(text.format(*names)) for names in (("Kite", 1), ("Glider", 27)))
    assert kite != glider and near_kite == near_glider


def test_two_builds_are_equal_byte_by_byte(tree, tmp_path):
    """In two processes with different hash seeds, so nothing may follow the order of a set. Seven
    sources and a manifest."""
    code = """if True:
        import pathlib, sys
        from corpora import installed_docs
        tree, directory = map(pathlib.Path, sys.argv[1:])
        installed_docs.build(directory, {"toy==1": sorted(tree.glob("*.py"))})"""
    for seed in ("1", "2"):
        subprocess.run([sys.executable, "-c", code, tree, tmp_path / seed], check=True,
                       cwd=installed_docs.HERE.parent, env=os.environ | {"PYTHONHASHSEED": seed})
    first, second = files_in(tmp_path / "1"), files_in(tmp_path / "2")
    assert first == second and len(first) == 8


def test_lines_parse_and_rates_sum_to_one(tree):
    manifest = installed_docs.build(tree, roots(tree))
    rates = [entry["rate"] for entry in json.loads(manifest.read_text())]
    assert sum(rates) == pytest.approx(1, abs=1e-5)
    for pairs in pairs_in(manifest).values():
        for query, target in pairs:
            assert query.strip() and target.strip() and query != target


def test_files_are_read_as_text_and_bad_ones_skipped(tree):
    """effect.py would end the process, and leave a file, if it were imported."""
    (tree / "effect.py").write_text('"""Leave a file.\n\nNever run this from a test."""\n'
                                    f'open({str(tree / "ran")!r}, "w")\nraise SystemExit\n')
    latin = b'"""The caf\xe9 without a coding line.\n\nIt cannot be decoded as UTF-8."""\n'
    coded = b"# -*- coding: latin-1 -*-\n" + latin.replace(b"without", b"with")
    (tree / "latin.py").write_bytes(latin)
    (tree / "coded.py").write_bytes(coded)
    (tree / "nul.py").write_bytes(b'"""A byte of zero.\n\nPython refuses such a file."""\n\0')
    pairs = pairs_in(installed_docs.build(tree, roots(tree)))["summary_body"]
    assert {query for query, _ in pairs} == {
        "Leave a file.", "The café with a coding line.", "Tools for kites.",
        "Winds the line of a kite.", "Wind the line by some turns."}
    assert not (tree / "ran").exists()


def test_an_interrupted_build_leaves_nothing(tree, monkeypatch):
    """Ctrl-C after the first bytes of the first source."""
    def interrupted(pairs, directory):
        (directory / "summary_body.jsonl").write_text("[")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(installed_docs, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            installed_docs.build(tree / "built", roots(tree))
    assert list((tree / "built").iterdir()) == []
    assert installed_docs.build(tree / "built", roots(tree)).exists()


@pytest.mark.parametrize("starts", [True, False])
def test_ctrl_c_is_blocked_only_while_those_that_read_start(monkeypatch, starts):
    class Pool:
        def __init__(self, *_):
            pass

        def map(self, *_, **__):
            masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, []))
            if not starts:
                raise BlockingIOError("no more processes")
            return []

        def shutdown(self, **_):
            pass

    masks = []
    monkeypatch.setattr(installed_docs, "ProcessPoolExecutor", Pool)
    with nullcontext() if starts else pytest.raises(BlockingIOError):
        list(installed_docs.read_all([]))
    masks.append(signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT]))
    assert [signal.SIGINT in mask for mask in masks] == [True, False]


def test_those_that_read_are_ended_before_an_error_is_said(monkeypatch):
    def read_all(files):
        try:
            yield {"no such source": []}
        finally:
            ended.append(files)

    ended = []
    monkeypatch.setattr(installed_docs, "read_all", read_all)
    with pytest.raises(KeyError) as error:  # its traceback holds what was at work
        installed_docs.unique([])
    assert ended and error


def test_a_build_is_done_once_and_anew_for_other_versions(tree):
    """The versions say what there is to read: what changes under the same ones is not read."""
    manifest = installed_docs.build(tree, roots(tree))
    before = files_in(tree)
    (tree / "kites.py").write_text("")
    assert installed_docs.build(tree, roots(tree)) == manifest and files_in(tree) == before
    assert installed_docs.build(tree, {"toy==2": []}) != manifest


def test_a_folder_that_cannot_be_written_is_an_oserror_that_names_it(tree):
    (tree / "file").write_text("")
    with pytest.raises(OSError, match=f"{tree}/file"):
        installed_docs.build(tree / "file", roots(tree))


def test_closure_follows_markers_and_extras_and_leaves_out_the_rest(tmp_path, monkeypatch):
    """a needs b on every system, c on none, d by its extra x, and e, which is not installed; z is
    installed and not needed. b needs a, which is no endless loop."""
    needs = {"a": ["B>=1", "c; sys_platform == 'nowhere'", "d; extra == 'x'", "e"], "b": ["a"],
             "c": [], "d": [], "z": []}
    for name, requirements in needs.items():
        folder = tmp_path / f"{name}-1.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1",
                 *(f"Requires-Dist: {requirement}" for requirement in requirements)]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert list(installed_docs.closure(["a"])) == ["a", "b"]
    assert list(installed_docs.closure(["a[x]==1; python_version > '3'"])) == ["a", "b", "d"]
