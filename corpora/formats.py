"""What a row of a corpus says: the layouts that rows come in.

A row is read as it means, or refused by field; nothing that it says is passed over. Nothing here
knows in which files rows are (corpora/convert.py), or what they are for.
"""

import json
import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b
from itertools import product
from typing import NamedTuple

# The fields in which an object has its query and its positives. A new layout is a new line here.
# An object has the fields of one pair, or is refused.
QUERIES = "query", "anchor", "question"
POSITIVES = ("positive", "positives", "pos", "positive_passages", "positive_ctxs", "passage",
             "document", "answer", "response")
LAYOUTS = [
    *product(QUERIES, POSITIVES),
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("text1", "text2"),
    ("title", "abstract"), ("comment", "code"),
    ("set", "set"),  # its first text is the query of every other
]
# All that an object has are read, in this order; then negative_1, negative_2 and so on.
NEGATIVES = ("negatives", "negative", "negs", "neg", "negative_passages", "hard_negative_ctxs",
             "negative_ctxs", "hard_negatives")
# Fields that have lists: what pandas writes of one into a CSV file is no text.
LISTS = {"set", "positives", "pos", "positive_passages", "positive_ctxs", *NEGATIVES} - {"negative"}
LIST_AS_TEXT = re.compile(r"""\[\s*["'{].*\]""", re.DOTALL)
NUMBERED = re.compile(r"negative_(\d+)")
# These may change what a row means, and only the manifest can say how. "prompt", "pos_scores",
# "neg_scores" and "type" are FlagEmbedding's.
MEANINGFUL = {"label", "labels", "score", "scores", "prompt", "pos_scores", "neg_scores", "type",
              "is_duplicate", "similarity", "relevance", "label_id", "is_relevant", "is_positive",
              "relevant", "similarity_score", "relatedness_score", "rating"}
# These change nothing, and neither do ids; the last line is what curation writes.
HARMLESS = {"", "id", "qid", "pid", "did", "docid", "uid", "uuid", "guid", "idx", "index",
            "__index_level_0__", "metadata", "meta", "source", "url", "task", "dataset", "lang",
            "language", "split", "genre", "licence", "license", "date", "timestamp",
            "annotator_labels", "sentence1_parse", "sentence2_parse", "sentence1_binary_parse",
            "sentence2_binary_parse", "gold_label",
            "positive_score", "mined", "row", "reason"}
ID = re.compile(r".*([_-]ids?|I[dD]s?)")
# Names of a document's prompt, the first that is not empty. (sentence-transformers takes "document"
# even where it is empty, as it is in what version 6 saves of a model that says "passage".)
DOCUMENT = "document", "passage", "corpus"
ARRAY = "found a JSON array of rows; write one value a line, as jq -c '.[]' FILE does"
INVISIBLE = re.compile("[\u00ad\u180e\u200b-\u200f\u2060\ufeff]")  # soft hyphens, zero-width


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
    """8-byte hash of a text, blind to case, white space, zero-width characters, soft hyphens, and
    how a character is put together (NFKC). Among 100 million texts, two collide with p = 3e-4."""
    if text.isascii():
        text = text.casefold()
    else:  # case folding may take a character apart again
        text = unicodedata.normalize("NFKC", INVISIBLE.sub("", text)).casefold()
        text = unicodedata.normalize("NFKC", text)
    normal = " ".join(text.split())
    return int.from_bytes(blake2b(normal.encode(), digest_size=8).digest(), "little")


# lines

class Columns(NamedTuple):
    """What the manifest says of a source's rows: the fields of their texts, if they are not of
    LAYOUTS; where: which rows to keep, (field, the values it may have, as texts); ignore: the
    fields that change nothing, as if they were not there."""
    query: str | None = None
    positive: str | None = None
    negatives: tuple[str, ...] = ()
    where: tuple[tuple[str, tuple[str, ...]], ...] = ()
    ignore: tuple[str, ...] = ()


class Layout(NamedTuple):
    """What the fields of an object are."""
    query: str
    positive: str
    negatives: list[str]
    meaningful: list[str]  # that the manifest does not explain
    unused: list[str]  # not understood


class UnexplainedField(ValueError):
    """found: {field: values, as JSON}."""

    def __init__(self, found: dict[str, Iterable[str]]):
        self.found = found
        names = ", ".join(f'"{name}"' for name in found)
        values = "; ".join(f'"{name}": found {", ".join(found[name])}' for name in found)
        example = next(iter(found))
        super().__init__(
            f'field {values}; what a row means may depend on it: in the manifest, "where": '
            f'{{"{example}": VALUE or [VALUES]}} keeps the rows that have them, or "ignore": '
            f'[{names}] says that it changes nothing; without a manifest, take it out')


def records(value: object, columns: Columns = Columns()) -> list[Row]:
    """The rows of one line's JSON value: [query, positive, negative ...], or an object in one of
    LAYOUTS or with these columns. Several positives are as many rows. Of labelled sentence pairs
    (SNLI, MultiNLI) only the gold_label "entailment" makes a row. Raises ValueError naming the
    field."""
    if isinstance(value, list):
        if value and (isinstance(value[0], list)
                      or isinstance(value[0], dict) and "text" not in value[0]):
            raise ValueError(ARRAY)
        value = {"query": value[:1], "positive": value[1:2], "negatives": value[2:]}
    elif not isinstance(value, dict):
        raise ValueError(f"found {shown(value)}, expected a list or an object")
    if not is_kept(value, columns):
        return []
    layout = layout_of(value, columns)
    found = {name: [shown(value[name])] for name in layout.meaningful
             if value[name] not in ("", [])}
    if found:
        raise UnexplainedField(found)
    queries, positives = texts_of(value, layout.query), texts_of(value, layout.positive)
    if layout.query == layout.positive:
        queries, positives = queries[:1], positives[1:]
    if len(queries) > 1:
        raise ValueError(f'field "{layout.query}": found {len(queries)} texts, expected one')
    for name, texts in ((layout.query, queries), (layout.positive, positives)):
        if not texts:
            raise ValueError(f'field "{name}" is missing or empty; a row needs a query and a '
                             f'target')
    negatives = [text for name in layout.negatives if not is_blank(value[name])
                 for text in texts_of(value, name)]
    return [Row(queries[0], positive, negatives) for positive in positives]


def is_kept(value: dict, columns: Columns) -> bool:
    """Whether the row is one of those that the manifest asks for."""
    for field, wanted in columns.where:
        if field not in value:
            raise ValueError(f'field "{field}", which "where" asks for, is missing; found '
                             f'{listed(value)}')
        if as_text(value[field]) not in wanted:
            return False
    if "gold_label" not in value or "gold_label" in (*dict(columns.where), *columns.ignore):
        return True
    return value["gold_label"] == "entailment"


def as_text(value: object) -> str:
    """As a CSV file has it: 1, 1.0, "1" and "1.0" are one, and so are true and "True"."""
    text = "null" if value is None else str(value)
    if text in ("True", "False"):
        return text.lower()
    return text.partition(".")[0] if re.fullmatch(r"-?\d+\.0+", text) else text


def layout_of(value: dict, columns: Columns) -> Layout:
    """Raises ValueError where the object fits none, or two."""
    nulls = tuple(name for name in value if value[name] is None)
    return layout_of_names(tuple(value), nulls, columns)


@lru_cache(1024)
def layout_of_names(names: tuple[str, ...], nulls: tuple[str, ...], columns: Columns) -> Layout:
    """nulls: those of the names whose value is null, which is as if the field were not there."""
    for name in (columns.query, columns.positive, *columns.negatives):
        if name and name not in names:
            raise ValueError(f'field "{name}", which the manifest names, is missing; found '
                             f'{listed(names)}')
    there = [name for name in names if name not in nulls and name not in columns.ignore]
    pairs = [pair for pair in LAYOUTS if set(pair) <= set(there)]
    if columns.query:
        pairs = [(columns.query, columns.positive)]
    if len(pairs) > 1:
        fits = " and ".join(f'"{query}" with "{positive}"' for query, positive in pairs)
        raise ValueError(f'fits {len(pairs)} layouts, {fits}: name its "query" and "positive" in '
                         f'the manifest, or "ignore" a field')
    if not pairs:
        others = "; ".join(f'"{a}" with "{b}"' for a, b in LAYOUTS if a not in (*QUERIES, "set"))
        raise ValueError(
            f'found {listed(there)}; known are {listed(QUERIES)} with one of {listed(POSITIVES)}; '
            f'{others}; or name "query" and "positive" in the manifest')
    numbered = sorted((name for name in there if NUMBERED.fullmatch(name)),
                      key=lambda name: int(NUMBERED.fullmatch(name)[1]))
    negatives = [name for name in (*NEGATIVES, *numbered) if name in there]
    if columns.negatives:
        negatives = [name for name in columns.negatives if name in there]
    used = {*pairs[0], *negatives, *dict(columns.where)}
    others = [name for name in there if name not in used]
    unused = [name for name in others
              if name not in HARMLESS | MEANINGFUL and not ID.fullmatch(name)]
    return Layout(*pairs[0], negatives, [name for name in others if name in MEANINGFUL], unused)


def listed(names: Iterable[str]) -> str:
    """At most twelve of them."""
    names = [f'"{name[:40]}"' for name in names]
    return ", ".join(names[:12]) + (" ..." if len(names) > 12 else "") if names else "no field"


def shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)[:40]


def is_blank(value: object) -> bool:
    """Null, "" or [""]: no negatives."""
    return value is None or value == [""] or isinstance(value, str) and not value.strip()


def texts_of(value: dict, name: str) -> list[str]:
    parts = value[name]
    if name in LISTS and isinstance(parts, str) and LIST_AS_TEXT.fullmatch(parts.strip()):
        raise ValueError(f'field "{name}": found a list as text, {shown(parts)}; write a list, in '
                         f'JSON lines or Parquet')
    return [text_of(part, name) for part in (parts if isinstance(parts, list) else [parts])]


def text_of(part: object, name: str) -> str:
    """A text, or a passage of {"title", "text"}, without white space around it."""
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        part = f"{part.get('title') or ''} {part['text']}"
    if not isinstance(part, str):
        raise ValueError(f'field "{name}": found {shown(part)}, expected text')
    if not part.strip():
        raise ValueError(f'field "{name}": the text is empty; fill it in or remove the line')
    try:
        part.encode()
    except UnicodeEncodeError:
        raise ValueError(f'field "{name}": an escape gives half of a surrogate pair, which is no '
                         f'text; repair it') from None
    return part.strip()
