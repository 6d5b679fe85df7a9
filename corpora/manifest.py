"""The manifest of a corpus: which sources it has, in which files, and what is said of their rows.

What is wrong with one is said by file, source and field. Nothing here knows what sources are for.
"""

import json
from pathlib import Path

from corpora.convert import is_beir, judgements
from corpora.formats import Columns, as_text, prompts_of

DEFAULTS = {"name": None, "path": None, "rate": 1, "kind": "retrieval", "eval": None,
            "collection": None, "prompts": None, "split": None, "query": None, "positive": None,
            "negatives": [], "where": {}, "ignore": [], "licence": ""}
SOURCE_FIELDS = ("name", "path", "rate", "kind", "eval", "collection", "prompts", "columns",
                 "licence")
ROW_FIELDS = "split", "query", "positive", "negatives", "where", "ignore"  # of the files' own rows


def read_manifest(path: Path) -> list[dict]:
    """SOURCE_FIELDS of each source of a manifest, checked and with defaults; files, relative to the
    manifest, as Path or None.

    A manifest is a JSON list of such objects, or the data_config.json of sentence-transformers
    ({"name", "lines", "weight"}). Unless said, the path is the name, the rate is the weight or 1,
    and the kind is "retrieval"; "similarity" is for §5.2's random negatives. eval: a file of pairs
    to evaluate on; collection: a file whose positives may become negatives too; prompts: {"query",
    "document"}, Prompts or None; columns: of "query", "positive", "negatives", "where" and
    "ignore". Of a BEIR directory the path is qrels/SPLIT.tsv ("split", or else train; for `eval`
    test), and the collection its documents. Raises FileNotFoundError, and ValueError naming file,
    source and field."""
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
        entry = {**DEFAULTS, "path": value.get("name"), "rate": value.get("weight", 1), **value}
        check_entry(entry, f"{path}, source {number}", [one["name"] for one in entries])
        for field in ("path", "eval", "collection"):
            entry[field] = path.parent / entry[field] if entry[field] else None
        if is_beir(entry["path"]):
            entry["collection"] = entry["collection"] or entry["path"]
            entry["path"] = judgements(entry["path"], entry["split"] or "train")
        elif entry["split"]:
            raise ValueError(f'{path}, source {number}: field "split": {entry["path"]} is no BEIR '
                             f'directory; name the files of the split')
        if entry["eval"]:
            entry["eval"] = judgements(entry["eval"], "test")
        entry["columns"] = columns_of(entry)
        if entry["prompts"] is not None:
            try:
                entry["prompts"] = prompts_of(entry["prompts"], only=True)
            except ValueError as error:
                raise ValueError(f'{path}, source {number}: field "prompts": {error}') from None
        entries.append({field: entry[field] for field in SOURCE_FIELDS})
    return entries


def columns_of(entry: dict) -> Columns:
    where = {field: tuple(map(as_text, as_list(values)))
             for field, values in entry["where"].items()}
    return Columns(entry["query"], entry["positive"], tuple(as_list(entry["negatives"])),
                   tuple(where.items()), tuple(as_list(entry["ignore"])))


def as_list(value: object) -> list:
    return value if isinstance(value, list) else [value]


def check_entry(entry: dict, where: str, names: list[str]) -> None:
    """Raises ValueError naming field, found and expected. names: of the sources before this one."""
    def check(field: str, good: bool, expected: str) -> None:
        if not good:
            raise ValueError(f'{where}: field "{field}": found {entry[field]!r}, expected '
                             f'{expected}')

    known = *DEFAULTS, "lines", "weight"
    for field in entry:
        if field not in known:
            raise ValueError(f'{where}: unknown field "{field}"; known are {", ".join(known)}')
    name, rate, kind = entry["name"], entry["rate"], entry["kind"]
    check("name", isinstance(name, str) and name not in names, "a text, each name once")
    check("path", isinstance(entry["path"], str), "a text")
    number = type(rate) in (int, float)  # no bool
    check("rate", number and 0 < rate <= 1e100, "a number above 0, 1e100 at most")
    check("kind", kind in ("retrieval", "similarity"), '"retrieval" or "similarity"')
    for field in ("eval", "collection", "split", "query", "positive"):
        check(field, entry[field] is None or isinstance(entry[field], str), "a text")
    for one, other in (("query", "positive"), ("positive", "query")):
        check(one, entry[one] is not None or entry[other] is None, f'a text, beside "{other}"')
    for field in ("negatives", "ignore"):
        texts = all(isinstance(name, str) for name in as_list(entry[field]))
        check(field, texts, "the name of a field, or a list of names")
    wanted = entry["where"].values() if isinstance(entry["where"], dict) else [{}]
    values = [value for one in wanted for value in as_list(one)]
    check("where", not any(isinstance(value, dict | list) for value in values),
          "{field: a value, or a list of values}")
