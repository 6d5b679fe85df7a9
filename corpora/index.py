"""An index on disk of a file of rows, so that a corpus may be larger than memory.

A file is read once. The index keeps of each row where it stands, and 8-byte hashes of its texts;
a text is read when it is asked for. Nothing here knows what rows are for.
"""

import gzip
import shutil
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from corpora.formats import read_lines, text_hash
from plumbing.files import publish

HASH = np.dtype("<u8")
# offset: the byte at which its line begins; item: which of the line's rows it is; negatives: how
# many it has, whose hashes are in a second array, from first_negative on; query, positive: hashes.
# A change here, or in what `records` makes of a line, wants another .cache/v1.
INDEX_ROW = np.dtype([("offset", "<u8"), ("item", "<u4"), ("negatives", "<u4"),
                      ("first_negative", "<u8"), ("query", HASH), ("positive", HASH)])
LARGE = 1 << 27  # bytes: takes so long to read that it is said


class Index(NamedTuple):
    rows: np.ndarray  # of INDEX_ROW
    negative_hashes: np.ndarray
    file: BinaryIO  # the lines, unpacked
    fingerprint: str  # of all hashes and offsets


def open_index(name: str, path: Path, cache: Path) -> Index:
    """The index of a .jsonl or .jsonl.gz file, written into a folder of `cache` unless it is there.
    name: of the source, for messages. Raises FileNotFoundError, and ValueError where the file holds
    no row, or a bad one."""
    if not path.is_file():
        raise FileNotFoundError(f"source {name}: {path}: no such file")
    stat = path.stat()  # a changed file is a new one
    version = hexdigest(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode())
    directory = cache / f"{path.name.split('.')[0]}-{version}"
    packed = path.suffix == ".gz"
    if not directory.is_dir():
        if packed or stat.st_size > LARGE:
            print(f"source {name}: indexing and unpacking {path} once, into {cache}", flush=True)
        publish(directory, lambda part: write_index(path, part), replace=False)
    rows = open_array(directory / "rows", INDEX_ROW)
    if not len(rows):
        raise ValueError(f"source {name}: {path} holds no pair")
    negative_hashes = open_array(directory / "negatives", HASH)
    file = open(directory / "unpacked.jsonl" if packed else path, "rb")
    return Index(rows, negative_hashes, file, hexdigest(rows, negative_hashes))


def write_index(path: Path, directory: Path) -> None:
    first = 0
    with open(directory / "rows", "wb") as rows, open(directory / "negatives", "wb") as negatives:
        for offset, line_rows in read_lines(path):
            for item, row in enumerate(line_rows):
                hashes = [text_hash(text) for text in row.negatives]
                index_row = (offset, item, len(hashes), first,
                             text_hash(row.query), text_hash(row.positive))
                rows.write(np.array(index_row, INDEX_ROW).tobytes())
                negatives.write(np.array(hashes, HASH).tobytes())
                first += len(hashes)
    if path.suffix == ".gz":  # in which one cannot begin in the middle
        with gzip.open(path) as packed, open(directory / "unpacked.jsonl", "wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 1 << 20)


def open_array(path: Path, dtype: np.dtype) -> np.ndarray:
    if not path.stat().st_size:  # there is no memory map of nothing
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r")


def hexdigest(*parts: bytes | np.ndarray) -> str:
    digest = blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def line_number(file: BinaryIO, offset: int) -> int:
    """Of the line in which this byte stands, from 1."""
    file.seek(0)
    return next(number for number, _ in enumerate(file, 1) if file.tell() > offset)


def is_among(hashes: np.ndarray, some: set[int]) -> np.ndarray:
    """For each hash, whether it is one of some. -> bool, of the same shape."""
    return np.isin(hashes, np.array(list(some), HASH))
