"""The files that rows are in, as people have them, read as JSON values: JSON lines, Parquet, CSV,
TSV, a folder or a glob of such shards, a BEIR directory.

One row at a time is in memory, or one batch of a Parquet file. Nothing here knows what a row says.
"""

import codecs
import csv
import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Container, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO

from corpora.formats import (ARRAY, Columns, Row, UnexplainedField, as_text, records, shown,
                             text_of)

KINDS = ".jsonl", ".parquet", ".csv", ".tsv"  # of shards in a folder; .jsonl, .csv, .tsv also .gz
SPLITS = re.compile(r"(?<![a-z])(train|test|dev|validation|val)(?![a-z])")
BATCH = 1024  # rows of a Parquet file
LONGEST_LINE = 1 << 26  # bytes; a file of one line must not become as much memory
LONGEST_CELL = 1 << 24  # characters of a CSV file; more is a quote that was not closed
SAMPLE = 1000  # rows in which the values of a field are looked up, for a message
NO_PAIR = object()  # in place of a value: a judgement that makes no row
BROKEN_GZIP = EOFError, gzip.BadGzipFile, zlib.error

Values = Iterator[tuple[int, int, object]]  # line number, byte offset in JSON lines, JSON value


def read(path: Path, parse: Callable[[object], list]) -> Iterator[tuple[int, list]]:
    """(byte offset, what `parse` makes of the value) for each line, or row, of a file, a folder or
    a glob. Raises FileNotFoundError, and ValueError naming file, line and field."""
    for file, reader in readers_of(path):
        for number, offset, value in reader(file):
            try:
                parsed = parse(value) if value is not NO_PAIR else []
            except ValueError as error:
                if isinstance(error, UnexplainedField):
                    error = UnexplainedField(values_of(file, reader, error.found))
                what = "row" if reader is read_parquet else "line"
                raise ValueError(f"{file}, {what} {number}: {error}") from None
            yield offset, parsed


def read_rows(path: Path | str, columns: Columns = Columns()) -> Iterator[Row]:
    """The rows of a file, a folder or a glob, in order."""
    parsed = read(Path(path), lambda value: records(value, columns))
    return (row for _, rows in parsed for row in rows)


def values_of(file: Path, reader: Callable[[Path], Values], found: dict[str, list[str]]
              ) -> dict[str, list[str]]:
    """found: {field: values}. -> with those that a file begins with, at most five of each."""
    sample = [value for _, _, value in islice(reader(file), SAMPLE) if isinstance(value, dict)]
    more = {name: [shown(value[name]) for value in sample if name in value] for name in found}
    return {name: list(dict.fromkeys([*found[name], *more[name]]))[:5] for name in found}


def readers_of(path: Path) -> list[tuple[Path, Callable[[Path], Values]]]:
    """The files that a path stands for, and what reads each."""
    if is_beir(path):
        return [(beir_file(path, "corpus"), read_documents)]
    if is_judgements(path):
        check_split(path)
        return [(path, read_pairs)]
    readers = {".parquet": read_parquet, ".csv": read_csv, ".tsv": read_csv}
    return [(file, readers.get(kind(file), read_lines)) for file in shards(path)]


def shards(path: Path) -> list[Path]:
    """Of a folder, of a glob, or the file itself."""
    if path.is_file():
        return [path]
    if path.is_dir():
        there = sorted(file for file in path.iterdir() if not file.name.startswith("."))
        files = [file for file in there if file.is_file() and kind(file) in KINDS]
        if not files:
            names = ", ".join(file.name for file in there[:5]) or "nothing"
            raise ValueError(f"{path}: a folder without {', '.join(KINDS)}; found {names}")
        splits = {match[0] for file in files if (match := SPLITS.search(file.name))}
        if len(splits) > 1:
            raise ValueError(f"{path}: holds files of several splits, {', '.join(sorted(splits))}; "
                             f"name one by a glob")
        return files
    for part in filter(glob.has_magic, map(str, [*reversed(path.parents), path])):
        for folder in glob.glob(f"{Path(part).parent}/", recursive=True):
            os.scandir(folder).close()  # glob itself passes over what it may not open
    files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    files = [file for file in files if file.is_file()]
    if not files:
        raise FileNotFoundError(f"{path}: no such file")
    return files


def kind(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).suffix.lower()


def not_read(path: Path) -> list[str]:
    """What else is in a folder of shards."""
    if not path.is_dir() or is_beir(path):
        return []
    names = {file.name for file in path.iterdir() if not file.name.startswith(".")}
    return sorted(names - {file.name for file in shards(path)})


def is_plain(path: Path) -> bool:
    """Whether a line may be read where it stands in the file."""
    return readers_of(path) == [(path, read_lines)] and path.suffix != ".gz"


def inputs(path: Path) -> list[Path]:
    """All files on whose bytes it depends what `read` gives."""
    files = [file for file, _ in readers_of(path)]
    if is_judgements(path):
        files += [beir_file(path.parents[1], name) for name in ("queries", "corpus")]
    return files


# kinds of files

def check_names(names: list[str], where: Path | str) -> None:
    """Raises ValueError where a name stands twice, for one of the two values would be lost."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f'{where}: two fields are called "{name}"; rename one')


def json_object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        check_names([name for name, _ in pairs], "an object")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=json_object)


def lines_of(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Raises OSError for a line that memory should not hold."""
    lines = iter(lambda: file.readline(LONGEST_LINE + 1), b"")
    for number, line in enumerate(lines, 1):
        if len(line) > LONGEST_LINE:
            raise OSError(f"{path}, line {number}: longer than {LONGEST_LINE >> 20} MB; write one "
                          f"value a line, and a row's texts over several rows")
        yield line


def read_lines(path: Path) -> Values:
    """Of a .jsonl or .jsonl.gz file, for each line that is not empty. Raises ValueError naming file
    and line."""
    offset, number = 0, 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(lines_of(file, path), 1):
                text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if text.strip():
                    yield number, offset, DECODER.decode(text.decode())
                offset += len(line)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        if number == 1 and re.match(rb"\s*\[\s*([\[{]|$)", text):
            raise ValueError(f"{path}, line 1: {ARRAY}") from None
        raise ValueError(f"{path}, line {number}: not JSON in UTF-8 ({error}); write one value a "
                         f"line") from None
    except BROKEN_GZIP as error:
        raise ValueError(f"{path}, after line {number}: broken gzip file ({error})") from None
    except ValueError as error:  # json_object's
        raise ValueError(f"{path}, line {number}: {error}") from None


def read_csv(path: Path) -> Values:
    """Of a .csv or .tsv file with a header, quoted as RFC 4180 has it: {column: text}. The line
    number is that of a row's first line. Raises ValueError naming file and line."""
    csv.field_size_limit(LONGEST_CELL)
    number = 1
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            raw = lines_of(file, path)
            first = next(raw, b"").removeprefix(codecs.BOM_UTF8)
            lines = (line.decode() for line in chain([first], raw))
            rows = csv.reader(lines, delimiter="\t" if kind(path) == ".tsv" else ",", strict=True)
            header = next(rows, [])
            if len(header) == 1:
                raise ValueError(f"{path}, line 1: found one column, {shown(header[0])}; between "
                                 f"cells stands a comma, or a tab in .tsv")
            check_names(header, f"{path}, line 1")
            number = rows.line_num + 1
            for row in rows:
                if row and len(row) != len(header):
                    raise ValueError(f"{path}, line {number}: found {len(row)} cells, expected "
                                     f"{len(header)} as in the header; quote a text with a "
                                     f"separator in it")
                if row:
                    yield number, 0, dict(zip(header, row))
                number = rows.line_num + 1
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {rows.line_num + 1}: not UTF-8 ({error})") from None
    except csv.Error as error:
        raise ValueError(f"{path}, line {number}: {error}; a text with quotes in it is quoted, and "
                         f"they are doubled, as RFC 4180 says") from None
    except BROKEN_GZIP as error:
        raise ValueError(f"{path}, after line {number}: broken gzip file ({error})") from None


def read_parquet(path: Path) -> Values:
    """Numbers are those of rows, from 1."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{path}: Parquet files are read by pyarrow; python -m pip install "
                         f"pyarrow") from None
    number = 0
    try:
        with ParquetFile(path, memory_map=True, pre_buffer=False) as file:
            check_names(file.schema_arrow.names, path)
            for batch in file.iter_batches(BATCH):
                for number, value in enumerate(batch.to_pylist(), number + 1):
                    yield number, 0, value
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}, after row {number}: no Parquet ({reason})") from None


# BEIR (Thakur et al. 2021): corpus.jsonl and queries.jsonl, or .jsonl.gz, of {"_id", "title",
# "text"}, where a title may be missing; qrels/SPLIT.tsv. The pairs are in the file of judgements,
# and the directory itself stands for its documents.

HEADER = ["query-id", "corpus-id", "score"]


def beir_file(folder: Path, name: str) -> Path:
    plain, packed = folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"
    return packed if packed.is_file() and not plain.is_file() else plain


def is_beir(path: Path) -> bool:
    # asked for first, so that what may not be opened is refused by its own name
    return path.is_dir() and beir_file(path, "corpus").is_file() and (path / "qrels").is_dir()


def is_judgements(path: Path) -> bool:
    return path.parent.name == "qrels" and is_beir(path.parent.parent)


def judgements(path: Path, split: str) -> Path:
    """The file in which a BEIR directory has its pairs; another path as it is."""
    return path / "qrels" / f"{split}.tsv" if is_beir(path) else path


def check_split(path: Path) -> None:
    """Raises FileNotFoundError with the splits that there are."""
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in path.parent.glob("*.tsv"))) or "none"
        raise FileNotFoundError(f"{path}: no such file; splits there: {there}")


def read_documents(path: Path) -> Values:
    """The documents that are not empty, each with its id for a query, which nobody asks."""
    for number, (id, text) in enumerate(read_texts(path, may_be_empty=True), 1):
        if text:
            yield number, 0, {"query": id, "positive": text}


def read_pairs(path: Path) -> Values:
    """Each pair judged above 0, in the order of the documents; first, NO_PAIR for each other one.
    In memory: the judgements, the texts of all queries, the ids of all documents."""
    folder, judged = path.parents[1], {}
    queries = dict(read_texts(beir_file(folder, "queries"), may_be_empty=False))
    for (query, document), (number, grade) in read_judgements(path).items():
        if grade > 0:
            check_known(path, number, "query-id", query, queries)
            judged.setdefault(document, []).append((number, query))
        else:
            yield number, 0, NO_PAIR
    for document, text in read_texts(beir_file(folder, "corpus"), may_be_empty=True):
        for number, query in judged.pop(document, ()):
            yield number, 0, {"query": queries[query], "positive": text}
    for document, [(number, _), *_] in judged.items():
        check_known(path, number, "corpus-id", document, ())


def read_texts(path: Path, may_be_empty: bool) -> Iterator[tuple[str, str]]:
    """(id, text after its title) of each line. may_be_empty: collections have such documents.
    Raises OSError, and ValueError naming file, line and field."""
    ids = set()

    def parse(value: object) -> list[tuple[str, str]]:
        if not isinstance(value, dict):
            raise ValueError(f"found {shown(value)}, expected an object")
        id, text = value.get("_id"), value.get("text")
        id = text_of(str(id) if type(id) is int else id, "_id")
        if id in ids:
            raise ValueError(f'field "_id": found {json.dumps(id)} a second time; remove one of '
                             f'the two lines')
        ids.add(id)
        if isinstance(text, str):
            text = f"{value.get('title') or ''} {text}".strip()
        return [(id, text if text == "" and may_be_empty else text_of(text, "text"))]

    return (found for _, [found] in read(path, parse))


def read_judgements(path: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """{(id of a query, id of a document): (line number, grade)}. Raises OSError, and ValueError
    naming file, line and field."""
    check_split(path)
    judged = {}
    with open(path, "rb") as file:
        for number, line in enumerate(lines_of(file, path), 1):
            line = line.decode("utf-8-sig" if number == 1 else "utf-8", "replace")
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            fields = [field.strip() for field in line.split("\t")]
            if len(fields) != 3 or number == 1 and fields != HEADER:
                raise ValueError(f"{where}: found {json.dumps(line)[:60]}, expected three fields "
                                 f"with tabs between, and in line 1 {', '.join(HEADER)}")
            if number == 1:
                continue
            query, document, score = *fields[:2], as_text(fields[2])
            if not score.removeprefix("-").isdecimal():
                raise ValueError(f'{where}: field "score": found {json.dumps(score)}, expected a '
                                 f'whole number')
            _, grade = judged.setdefault((query, document), (number, int(score)))
            if grade != int(score):
                raise ValueError(f'{where}: field "score": found {score}, but an earlier line has '
                                 f'another for this query and document; remove one of them')
    return judged


def check_known(path: Path, number: int, field: str, id: str, known: Container[str]) -> None:
    """Raises ValueError where a judgement is of a text that is not in the collection."""
    if id not in known:
        raise ValueError(f'{path}, line {number}: field "{field}": found {json.dumps(id)}, which '
                         f'is not in the collection; add it or remove the line')
