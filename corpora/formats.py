"""The layouts that corpora of text pairs come in: lines of .jsonl and .jsonl.gz files, read as rows.

Every line holds one JSON value, and bad ones are named by file, line and field. Nothing here knows what rows are for.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

QUERY = ("query", "anchor", "question", "sentence1")
POSITIVE = ("positive", "pos", "positive_passages", "positive_ctxs", "sentence2")
NEGATIVES = ("negatives", "negative", "neg", "negative_passages", "hard_negative_ctxs")


class Row(NamedTuple):
    query: str
    positive: str
    negatives: list[str]
    id: int = -1  # its number in its source


def text_hash(text: str) -> int:
    """8-byte hash of a text, blind to case and white space. Among 100 million texts, two collide with p = 3e-4."""
    return int.from_bytes(blake2b(" ".join(text.split()).casefold().encode(), digest_size=8).digest(), "little")


def text_of(part: object, name: str) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str):  # a passage
        part = f"{part.get('title') or ''} {part['text']}"
    if not isinstance(part, str):
        raise ValueError(f'field "{name}": found {json.dumps(part)[:40]}, expected text')
    if not part.strip():
        raise ValueError(f'field "{name}": the text is empty; fill it in or remove the line')
    try:
        part.encode()
    except UnicodeEncodeError:
        raise ValueError(f'field "{name}": an escape gives half of a surrogate pair, which is no text; repair it') from None
    return part.strip()


def records(value: object) -> list[Row]:
    """The rows of one line's JSON value: [query, positive, negative ...]; {"set": [...]}, whose first text is the query of
    every other; or an object with a field of QUERY, one of POSITIVE and perhaps one of NEGATIVES (sentence-transformers,
    FlagEmbedding, Tevatron, DPR). Several positives are as many rows. Of labelled sentence pairs (SNLI, MultiNLI) only
    "entailment" makes a row. Raises ValueError naming the field."""
    if isinstance(value, list):
        value = {"query": value[:1], "positive": value[1:2], "negatives": value[2:]}
    elif isinstance(value, dict) and isinstance(value.get("set"), list):
        value = {"query": value["set"][:1], "positive": value["set"][1:]}
    elif not isinstance(value, dict):
        raise ValueError(f"found {json.dumps(value)[:40]}, expected a list or an object")
    if value.get("gold_label", "entailment") != "entailment":
        return []
    for label in {"label", "score"} & value.keys() if "sentence1" in value else ():
        raise ValueError(f'field "{label}": only "gold_label" is understood; keep the pairs that belong together, without it')
    columns = []
    for names in (QUERY, POSITIVE, NEGATIVES):
        name = next((name for name in names if name in value), names[0])
        parts = value.get(name, [])
        columns.append([text_of(part, name) for part in (parts if isinstance(parts, list) else [parts])])
        if names is not NEGATIVES and not columns[-1]:
            raise ValueError(f'field "{name}" is missing or empty; a row needs a query and a target')
    return [Row(columns[0][0], positive, columns[2]) for positive in columns[1]]


def read_lines(path: Path, parse: Callable[[object], list] = records) -> Iterator[tuple[int, list]]:
    """(byte offset, what `parse` makes of the JSON value) for each line of a .jsonl or .jsonl.gz file that is not empty.
    Raises ValueError naming file, line and field."""
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
        raise ValueError(f"{path}, line {number}: not JSON in UTF-8 ({error}); write one value a line") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}, after line {number}: broken gzip file ({error})") from None
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from None


def read_rows(path: Path | str) -> Iterator[Row]:
    """The rows of a .jsonl or .jsonl.gz file, in order."""
    return (row for _, rows in read_lines(Path(path)) for row in rows)
