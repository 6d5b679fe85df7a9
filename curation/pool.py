"""Exact search among more texts than fit in memory: vectors in chunks on disk, cosines block by block, no index.

    Pool (distinct texts of sources) -> Embedder.chunks (unit vectors on disk) -> ranks, nearest

What is done is kept, chunk by chunk, so that a command that was interrupted goes on (`Work`). Nothing here knows which pairs
or negatives are good ones. Axis letters: M queries, K texts of a pool, C nearest ones, D width.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import memory
import model
from data import Source
from evaluation import search
from evaluation.embed import embed
from evaluation.search import Cells
from plumbing.files import publish, sync


class Work:
    """What a command has done so far: arrays by name in OUT.work, each complete or absent, until `finish` publishes OUT.

    identity: JSON-able, what must be the same for another start to go on. Raises ValueError where it is not, and where OUT is
    not empty. For one process at a time.
    """

    def __init__(self, out: str, identity: dict):
        self.out = Path(out).resolve()
        self.directory = self.out.with_name(f"{self.out.name}.work")
        self._check_out()
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / "identity.json"
        work = {file.name for file in self.directory.iterdir()} - {path.name, "part.json"}
        if work and not path.is_file():
            raise ValueError(f"{self.directory}: holds something else, and would be removed at the end; choose another --out")
        try:
            then = json.loads(path.read_text()) if work else identity
        except ValueError as error:
            raise ValueError(f"{path}: does not open ({error}); remove {self.directory}") from None
        for what in identity:
            if then.get(what) != identity[what]:
                values = f" ({then.get(what)}, now {identity[what]})" if len(str(identity[what])) < 60 else ""
                raise ValueError(f"{self.directory} holds the work of another command, with another {what}{values}; remove "
                                 f"that folder, or choose another --out")
        self._write(path, lambda part: part.write_text(json.dumps(identity)))

    def _check_out(self) -> None:
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ValueError(f"--out {self.out}: is not empty; choose another")

    def _write(self, path: Path, write: Callable[[Path], None]) -> None:
        part = path.with_name(f"part{path.suffix}")
        write(part)
        sync(part)
        os.replace(part, path)

    def keep(self, name: str, compute: Callable[[], np.ndarray]) -> Path:
        """The file of the array of that name, computed unless an earlier start did."""
        path = self.directory / f"{quote(name, '')}.npy"
        if not path.is_file():
            self._write(path, lambda part: np.save(part, compute()))
        return path

    def finish(self, write: Callable[[Path], None]) -> None:
        publish(self.out, lambda part: (write(part), self._check_out()))
        shutil.rmtree(self.directory)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fingerprint(module: nn.Module) -> str:
    weights = blake2b(digest_size=8)
    for parameter in module.parameters():
        weights.update(parameter.detach().cpu().numpy().tobytes())
    return weights.hexdigest()


class Part(NamedTuple):
    """Texts of a source, by row and by which of the row's texts: -1 its positive, j its negative j."""

    source: Source
    rows: np.ndarray
    items: np.ndarray
    hashes: np.ndarray


def positives(source: Source, rows: np.ndarray) -> Part:
    return Part(source, rows, np.full(len(rows), -1), source.index["positive"][rows])


def negatives(source: Source, rows: np.ndarray) -> Part:
    count = source.index["negatives"][rows].astype(int)
    items = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
    first = np.repeat(source.index["first_negative"][rows].astype(int), count)
    return Part(source, np.repeat(rows, count), items, source.negative_hashes[first + items])


class Pool:
    """The distinct texts of some parts that are not held out, in the order of their hashes; or `count` of them at random."""

    def __init__(self, parts: list[Part], count: int | None = None, seed: int = 0):
        sources, rows, items, hashes = zip(*parts)
        self.hashes, first = np.unique(np.concatenate(hashes), return_index=True)
        free = np.flatnonzero(~np.isin(self.hashes, np.array(list(sources[0].held_out_hashes), "<u8")))
        if count is not None and count < len(free):
            free = np.sort(np.random.default_rng(seed).permutation(free)[:count])
        self.hashes, first = self.hashes[free], first[free]
        self.sources, self.source = sources, np.repeat(np.arange(len(parts)), [len(r) for r in rows])[first]
        self.rows, self.items = np.concatenate(rows)[first], np.concatenate(items)[first]

    def __len__(self) -> int:
        return len(self.hashes)

    def text(self, position: int) -> str:
        row = self.sources[self.source[position]].read(self.rows[position])
        return row.positive if self.items[position] < 0 else row.negatives[self.items[position]]

    def find(self, hashes: np.ndarray) -> Cells:
        """Which of these hashes (M,) are in the pool, and at which positions."""
        position = np.searchsorted(self.hashes, hashes)
        there = np.flatnonzero(position < len(self))
        there = there[self.hashes[position[there]] == hashes[there]]
        return there, position[there]


class Embedder:
    """A bi-encoder, in bf16 where that is fast. chunk: texts embedded and searched at a time."""

    def __init__(self, name: str, max_length: int, micro_tokens: int, chunk: int):
        self.encoder, self.tokenizer = model.load(name)
        self.encoder.to(device())
        self.max_length, self.micro_tokens, self.chunk = max_length, micro_tokens, chunk
        memory.mixed_precision(self.encoder, memory.choose_precision("auto", device())[0])

    def __call__(self, texts: list[str]) -> Tensor:
        """-> (M, D) of length 1."""
        vectors = embed(self.encoder, self.tokenizer, texts, self.max_length, self.micro_tokens)
        return F.normalize(vectors, dim=-1).to(device())

    def chunks(self, work: Work, name: str, pool: Pool) -> list[Path]:
        """The vectors of a pool, in files of `chunk` rows."""
        starts = tqdm(range(0, len(pool), self.chunk), unit="chunk", desc=f"embedding {name}")
        return [work.keep(f"{name}-{start}", lambda: self([pool.text(i) for i in positions]).cpu().numpy())
                for start in starts for positions in [range(start, min(start + self.chunk, len(pool)))]]


class KnownPositives:
    """Which texts of a pool any of the sources has as a positive of a query."""

    def __init__(self, sources: list[Source], pool: Pool):
        found = [(s, *pool.find(s.index["positive"])) for s in sources]
        queries = np.concatenate([s.index["query"][there] for s, there, _ in found])
        order = np.argsort(queries, kind="stable")
        self.pool, self.queries, self.positions = pool, queries[order], np.concatenate([position for *_, position in found])[order]

    def cells(self, queries: np.ndarray) -> Cells:
        """Where in the pool the positives of these queries (their hashes, (M,)) stand, and the queries' own texts."""
        first, last = (np.searchsorted(self.queries, queries, side) for side in ("left", "right"))
        there, own = self.pool.find(queries)
        return (np.concatenate([there, np.repeat(np.arange(len(queries)), last - first)]),
                np.concatenate([own, *(self.positions[a:b] for a, b in zip(first, last))]))


@cache
def collection(source: Source) -> list[Source]:
    """The source's collection, opened, where it has one."""
    return [Source(f"{source.name}, collection", source.collection, 1, source.kind, source.cache)] if source.collection else []


def searched(source: Source, rows: np.ndarray) -> list[Part]:
    """Where negatives of these rows may come from: targets, given negatives, and the targets of the source's collection."""
    return [positives(source, rows), negatives(source, rows),
            *(positives(more, np.arange(len(more.index))) for more in collection(source))]


def with_collections(sources: list[Source]) -> list[Source]:
    return [*sources, *(more for source in sources for more in collection(source))]


class Retriever:
    """What a bi-encoder finds for the queries of a source among what is `searched` for it."""

    def __init__(self, source: Source, sources: list[Source], embed: Embedder, work: Work):
        self.source, self.embed, self.work = source, embed, work
        self.pool = Pool(searched(source, source.train))
        self.known = KnownPositives(with_collections(sources), self.pool)

    @cached_property
    def vectors(self) -> list[Path]:
        return self.embed.chunks(self.work, f"pool-{self.source.name}", self.pool)

    def excluded(self, rows: np.ndarray) -> Cells:
        """What is no negative of these rows."""
        return self.known.cells(self.source.index["query"][rows])

    def __call__(self, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """-> positions in the pool (M, C) and cosines (M, C), as `nearest`."""
        q = self.embed([self.source.read(row).query for row in rows])
        return search.nearest(q, self.vectors, count, self.excluded(rows))
