"""The layouts that corpora of text pairs come in: a manifest of files, and their lines, as rows.

Files are .jsonl or .jsonl.gz, with one JSON value a line. What is wrong with one is said by file,
line and field. Nothing here knows what rows are for.
"""

import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

# The fields in which an object has its query, its positives and its negatives. A new layout is a
# new line here. They may be mixed: of the names in a column, the first that the object has counts.
LAYOUTS = {
    "ours": ("query", "positive", "negatives"),
    "sentence-transformers": ("anchor", "positive", "negative"),
    "FlagEmbedding": ("query", "pos", "neg"),
    "Tevatron": ("query", "positive_passages", "negative_passages"),
    "DPR": ("question", "positive_ctxs", "hard_negative_ctxs"),
    "SNLI, MultiNLI": ("sentence1", "sentence2", None),
}
SOURCE_FIELDS = "name", "path", "rate", "kind", "eval", "collection", "prompts"
# Names of a document's prompt, the first that is not empty. (sentence-transformers takes "document"
# even where it is empty, as it is in what version 6 saves of a model that says "passage".)
DOCUMENT = "document", "passage", "corpus"


class Row(NamedTuple):
    query: str
    positive: str
    negatives: list[str]
    id: int = -1  # its number in its source


class Prompts(NamedTuple):
    """What stands before a query and before a document when they are embedded, as "query: ". Texts
    are told apart, and kept, without it."""
    query: str = ""
    document: str = ""


def prompts_of(named: object, only: bool = False) -> Prompts:
    """Of {"query": ..., "document": ...} (or "passage", "corpus"); other names are for other tasks,
    and refused with `only`. Raises ValueError."""
    texts = isinstance(named, dict) and all(isinstance(x, str | None) for x in named.values())
    if not texts or only and set(named) - {"query", *DOCUMENT}:
        raise ValueError(f'found {json.dumps(named)[:60]}, expected {{"query": text, "document": '
                         f'text}}')
    document = next((named[name] for name in DOCUMENT if named.get(name)), "")
    return Prompts(named.get("query") or "", document)


def text_hash(text: str) -> int:
    """8-byte hash of a text, blind to case and white space. Among 100 million texts, two collide
    with p = 3e-4."""
    normal = " ".join(text.split()).casefold()
    return int.from_bytes(blake2b(normal.encode(), digest_size=8).digest(), "little")


# lines

def records(value: object) -> list[Row]:
    """The rows of one line's JSON value: [query, positive, negative ...]; {"set": [...]}, whose
    first text is the query of every other; or an object in one of LAYOUTS. Several positives are
    as many rows. Of labelled sentence pairs (SNLI, MultiNLI) only "entailment" makes a row.
    Raises ValueError naming the field."""
    if isinstance(value, list):
        value = {"query": value[:1], "positive": value[1:2], "negatives": value[2:]}
    elif isinstance(value, dict) and isinstance(value.get("set"), list):
        value = {"query": value["set"][:1], "positive": value["set"][1:]}
    elif not isinstance(value, dict):
        raise ValueError(f"found {json.dumps(value)[:40]}, expected a list or an object")
    if value.get("gold_label", "entailment") != "entailment":
        return []
    for label in ("label", "score"):
        if label in value and "sentence1" in value:
            raise ValueError(f'field "{label}": only "gold_label" is understood; keep the pairs '
                             f'that belong together, without it')
    query_names, positive_names, negative_names = zip(*LAYOUTS.values())
    queries = texts_of(value, query_names, required=True)
    positives = texts_of(value, positive_names, required=True)
    negatives = texts_of(value, negative_names, required=False)
    return [Row(queries[0], positive, negatives) for positive in positives]


def texts_of(value: dict, names: tuple[str | None, ...], required: bool) -> list[str]:
    name = next((name for name in names if name in value), names[0])
    parts = value.get(name, [])
    texts = [text_of(part, name) for part in (parts if isinstance(parts, list) else [parts])]
    if required and not texts:
        raise ValueError(f'field "{name}" is missing or empty; a row needs a query and a target')
    return texts


def text_of(part: object, name: str) -> str:
    """A text, or a passage of {"title", "text"}, without white space around it."""
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        part = f"{part.get('title') or ''} {part['text']}"
    if not isinstance(part, str):
        raise ValueError(f'field "{name}": found {json.dumps(part)[:40]}, expected text')
    if not part.strip():
        raise ValueError(f'field "{name}": the text is empty; fill it in or remove the line')
    try:
        part.encode()
    except UnicodeEncodeError:
        raise ValueError(f'field "{name}": an escape gives half of a surrogate pair, which is no '
                         f'text; repair it') from None
    return part.strip()


def read_lines(path: Path, parse: Callable[[object], list] = records) -> Iterator[tuple[int, list]]:
    """(byte offset, what `parse` makes of the JSON value) for each line that is not empty.
    Raises FileNotFoundError, and ValueError naming file, line and field."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    offset, number = 0, 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield offset, parse(json.loads(line.decode()))
                offset += len(line)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: not JSON in UTF-8 ({error}); write one value a "
                         f"line") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}, after line {number}: broken gzip file ({error})") from None
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from None


def read_rows(path: Path | str) -> Iterator[Row]:
    """The rows of a .jsonl or .jsonl.gz file, in order."""
    return (row for _, rows in read_lines(Path(path)) for row in rows)


# manifests

def read_manifest(path: Path) -> list[dict]:
    """{"name", "path", "rate", "kind", "eval", "collection"} for each source that a manifest names,
    checked and with defaults; files, which are relative to the manifest, as Path or None.

    A manifest is a JSON list of such objects, which may also have a "licence", or the
    data_config.json of sentence-transformers ({"name", "lines", "weight"}). Unless said, the path
    is the name, the rate is the weight or 1, and the kind is "retrieval"; "similarity" is for
    §5.2's random negatives. eval: a file of pairs to evaluate on; collection: a file whose
    positives may become negatives too; prompts: {"query", "document"}, Prompts or None.
    Raises FileNotFoundError, and ValueError naming file, source and field."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such manifest")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); a manifest is a JSON list of "
                         f"sources") from None
    objects = isinstance(values, list) and all(isinstance(value, dict) for value in values)
    if not objects or not values:
        raise ValueError(f"{path}: expected a list of sources, each an object with a name and a "
                         f"path")
    entries = []
    for number, value in enumerate(values, 1):
        entry = {"name": None, "path": value.get("name"), "rate": value.get("weight", 1),
                 "kind": "retrieval", "eval": None, "collection": None, "prompts": None} | value
        check_entry(entry, f"{path}, source {number}", [one["name"] for one in entries])
        entry["path"] = path.parent / entry["path"]
        for field in ("eval", "collection"):
            entry[field] = path.parent / entry[field] if entry[field] else None
        if entry["prompts"] is not None:
            try:
                entry["prompts"] = prompts_of(entry["prompts"], only=True)
            except ValueError as error:
                raise ValueError(f'{path}, source {number}: field "prompts": {error}') from None
        entries.append({field: entry[field] for field in SOURCE_FIELDS})
    return entries


def check_entry(entry: dict, where: str, names: list[str]) -> None:
    """Raises ValueError naming field, found and expected. names: of the sources before this one."""
    def check(field: str, good: bool, expected: str) -> None:
        if not good:
            raise ValueError(f'{where}: field "{field}": found {entry[field]!r}, expected '
                             f'{expected}')

    known = *SOURCE_FIELDS, "licence", "lines", "weight"
    for field in entry:
        if field not in known:
            raise ValueError(f'{where}: unknown field "{field}"; known are {", ".join(known)}')
    name, rate, kind = entry["name"], entry["rate"], entry["kind"]
    check("name", isinstance(name, str) and name not in names, "a text, each name once")
    check("path", isinstance(entry["path"], str), "a text")
    check("rate", type(rate) in (int, float) and 0 < rate < math.inf, "a number above 0")  # no bool
    check("kind", kind in ("retrieval", "similarity"), '"retrieval" or "similarity"')
    for field in ("eval", "collection"):
        check(field, entry[field] is None or isinstance(entry[field], str), "a text")
