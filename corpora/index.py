"""An index on disk of a file of rows, so that a corpus may be larger than memory.

A file is read once. The index keeps of each row where it stands, and 8-byte hashes of its texts;
a text is read when it is asked for. Nothing here knows what rows are for.
"""

import json
import os
from hashlib import blake2b
from pathlib import Path
from struct import Struct
from typing import BinaryIO, NamedTuple
from zlib import crc32

import numpy as np

from corpora.convert import inputs, is_plain, not_read, read, readers_of, values_of
from corpora.formats import Columns, Row, layout_of, listed, records, text_hash
from plumbing.files import open_cache

HASH = np.dtype("<u8")
# offset: the byte at which its line begins; item: which of the line's rows it is; negatives: how
# many it has, whose hashes are in a second array, from first_negative on; query, positive: hashes;
# crc: of the line's bytes. A change here, or in what `records` makes of a line, wants another
# .cache/v3.
INDEX_ROW = np.dtype([("offset", "<u8"), ("item", "<u4"), ("negatives", "<u4"),
                      ("first_negative", "<u8"), ("query", HASH), ("positive", HASH),
                      ("crc", "<u4")])
PACKED = Struct("<QIIQQQI")  # the same
LARGE = 1 << 27  # bytes: takes so long to read that it is said
MANY = 100  # rows of a line: it takes so long to parse that the last such line is kept


class Lines:
    """The rows of a file, unpacked. directory: of its index."""

    def __init__(self, file: BinaryIO, columns: Columns, directory: Path):
        self.file, self.columns, self.directory = file, columns, directory
        self.kept = {}  # {offset: the rows of a line with MANY}

    def read(self, offset: int, item: int, crc: int) -> Row:
        """Raises ValueError where the line is no longer the one that was indexed."""
        rows = self.kept.get(offset)
        if rows is None:
            self.file.seek(offset)
            line = self.file.readline()
            if crc32(line) != crc:
                raise ValueError(f"{self.file.name}, line {self.number(offset)}: is not what was "
                                 f"indexed; put the file back as it was if it is yours, or remove "
                                 f"{self.directory} and begin anew")
            rows = records(json.loads(line), self.columns)
            if len(rows) > MANY:
                self.kept = {offset: rows}
        return rows[item]

    def number(self, offset: int) -> int:
        """Of the line that begins there, from 1 on."""
        self.file.seek(0)
        parts = (self.file.read(min(LARGE, offset - at)) for at in range(0, offset, LARGE))
        return 1 + sum(part.count(b"\n") for part in parts)


class Index(NamedTuple):
    rows: np.ndarray  # of INDEX_ROW
    negative_hashes: np.ndarray
    lines: Lines
    fingerprint: str  # of all hashes, offsets and checksums


def open_index(name: str, path: Path, columns: Columns, cache: Path) -> Index:
    """The index of a file, a folder or a glob of rows, written into a folder of `cache` unless it
    is there, with the rows themselves where they cannot be read at their place. name: of the
    source, for messages. Raises OSError, and ValueError where there is no row, or a bad
    one."""
    try:
        stats = [(str(file.resolve()), file.stat()) for file in inputs(path)]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"source {name}: {error}") from None
    # a changed file is a new one
    files = [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    version = hexdigest(repr((files, columns)).encode())
    directory = cache / f"{Path(files[0][0]).name.split('.')[0]}-{version}"
    plain = is_plain(path)
    if not directory.is_dir() and (not plain or sum(size for _, size, _ in files) > LARGE):
        print(f"source {name}: indexing and unpacking {path} once, into {cache}", flush=True)
    open_cache(directory, lambda part: write_index(name, path, columns, part))
    rows = open_array(directory / "rows", INDEX_ROW)
    if not len(rows):
        raise ValueError(f"source {name}: {path} holds no pair{why_none(path, columns)}")
    negative_hashes = open_array(directory / "negatives", HASH)
    file = open(path if plain else directory / "unpacked.jsonl", "rb")
    lines = Lines(file, columns if plain else Columns(), directory)
    return Index(rows, negative_hashes, lines, hexdigest(rows, negative_hashes))


def why_none(path: Path, columns: Columns) -> str:
    """The values among which "where" has found none that it asks for."""
    found = values_of(*readers_of(path)[0], {field: [] for field, _ in columns.where})
    values = "; ".join(f'"{field}": {", ".join(there)}' for field, there in found.items() if there)
    return f'; "where" leaves out every row, of which the first have {values}' if values else ""


def write_index(name: str, path: Path, columns: Columns, directory: Path) -> None:
    """Says how many lines give no row, in how many rows both texts are one, and which files and
    fields are not used."""
    lines, without, first, same, unused = 0, 0, 0, 0, {}

    def parse(value: object) -> list[Row]:
        rows = records(value, columns)
        if rows and isinstance(value, dict):
            unused.update(dict.fromkeys(layout_of(value, columns).unused))
        return rows

    plain = is_plain(path)
    with (open(directory / "rows", "wb") as index, open(directory / "negatives", "wb") as negatives,
          open(directory / "unpacked.jsonl", "wb") as unpacked,
          open(path if plain else os.devnull, "rb") as source):
        for offset, rows in read(path, parse):
            lines += 1
            without += not rows
            if plain:
                source.seek(offset)
                line = source.readline()
            elif rows:
                offset, line = unpacked.tell(), line_of(rows)
                unpacked.write(line)
            crc = crc32(line) if rows else 0
            for item, row in enumerate(rows):
                hashes = [text_hash(text) for text in row.negatives]
                index.write(PACKED.pack(offset, item, len(hashes), first,
                                        text_hash(row.query), text_hash(row.positive), crc))
                negatives.write(np.array(hashes, HASH).tobytes())
                first += len(hashes)
                same += row.query == row.positive
    if without:
        print(f'source {name}: {without} of {lines} lines of {path} are left out, as "where", '
              f'their gold_label or a judgement of 0 or less says')
    if same:
        print(f"source {name}: in {same} rows of {path} the query is the positive: without prompts "
              f"both are one vector, whatever the dropout")
    if others := not_read(path):
        print(f"source {name}: in {path} these are not read: {listed(others)}")
    if unused:
        print(f'source {name}: of {path} these fields are not used: {listed(unused)}; "ignore" in '
              f'the manifest says that they need not be')


def line_of(rows: list[Row]) -> bytes:
    """The rows of one line, as one line."""
    query, _, negatives, _ = rows[0]
    line = {"query": query, "positive": [row.positive for row in rows], "negatives": negatives}
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def open_array(path: Path, dtype: np.dtype) -> np.ndarray:
    if not path.stat().st_size:  # there is no memory map of nothing
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r")


def hexdigest(*parts: bytes | np.ndarray) -> str:
    digest = blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def is_among(hashes: np.ndarray, some: set[int]) -> np.ndarray:
    """For each hash, whether it is one of some. -> bool, of the same shape."""
    return np.isin(hashes, np.array(list(some), HASH))


def count_distinct(hashes: np.ndarray) -> int:
    """How many are distinct; by sorting, a quarter of np.unique's time for 3 million."""
    ordered = np.sort(hashes)
    return np.count_nonzero(ordered[1:] != ordered[:-1]) + min(len(ordered), 1)
