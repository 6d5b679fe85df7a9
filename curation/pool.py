"""Texts to search among: the distinct texts of some sources, what a bi-encoder finds there for a
query, and which of them are known to answer it.

    Pool -> Embedder.chunks (unit vectors on disk) -> Retriever.nearest

Nothing here knows which pairs or negatives are good ones. Axis letters: M queries, C nearest texts,
D width.
"""

import argparse
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import memory
import model
from corpora.index import is_among
from corpora.prompts import check_prompts, choose_prompts, with_prompt
from curation.sources import collection, with_collections
from curation.work import Work
from data import MAX_LENGTH, Source
from evaluation import search
from evaluation.embed import embed
from evaluation.search import Cells
from plumbing import model_directory


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Part(NamedTuple):
    """Texts of a source, by row and by which of the row's texts."""

    source: Source
    rows: np.ndarray
    items: np.ndarray  # -1 is the row's positive, j its negative j
    hashes: np.ndarray


def positives(source: Source, rows: np.ndarray) -> Part:
    return Part(source, rows, np.full(len(rows), -1), source.index["positive"][rows])


def negatives(source: Source, rows: np.ndarray) -> Part:
    """Those that the rows come with."""
    counts = source.index["negatives"][rows].astype(int)
    items = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)  # 0, 1 .. of each
    first = np.repeat(source.index["first_negative"][rows].astype(int), counts)
    return Part(source, np.repeat(rows, counts), items, source.negative_hashes[first + items])


def searched(source: Source, rows: np.ndarray) -> list[Part]:
    """Where negatives of these rows may come from: targets, given negatives, and the targets of the
    source's collection."""
    parts = [positives(source, rows), negatives(source, rows)]
    if more := collection(source):
        parts.append(positives(more, np.arange(len(more.index))))
    return parts


class Pool:
    """The distinct texts of some parts that are not held out, in the order of their hashes; or
    `count` of them at random."""

    def __init__(self, parts: list[Part], count: int | None = None, seed: int = 0):
        hashes, first = np.unique(np.concatenate([p.hashes for p in parts]), return_index=True)
        chosen = np.flatnonzero(~is_among(hashes, parts[0].source.held_out_hashes))
        if count is not None and count < len(chosen):
            chosen = np.sort(np.random.default_rng(seed).permutation(chosen)[:count])
        self.hashes, first = hashes[chosen], first[chosen]
        self.parts = parts
        self.part = np.repeat(np.arange(len(parts)), [len(part.rows) for part in parts])[first]
        self.rows = np.concatenate([part.rows for part in parts])[first]
        self.items = np.concatenate([part.items for part in parts])[first]

    def __len__(self) -> int:
        return len(self.hashes)

    def text(self, index: int) -> str:
        row = self.parts[self.part[index]].source.read(self.rows[index])
        item = self.items[index]
        return row.positive if item < 0 else row.negatives[item]

    def document(self, index: int) -> str:
        """The text as it is embedded: with its source's prompt."""
        source = self.parts[self.part[index]].source
        return with_prompt(source.prompts.document, self.text(index))

    def find(self, hashes: np.ndarray) -> Cells:
        """Which of these hashes (M,) are in the pool, and at which indices."""
        index = np.searchsorted(self.hashes, hashes)
        there = np.flatnonzero(index < len(self))
        there = there[self.hashes[index[there]] == hashes[there]]
        return there, index[there]


class Embedder:
    """A bi-encoder, in bf16 where that is fast. args: a command's; the sources get their prompts,
    and an unset --max-length its value."""

    def __init__(self, name: str, sources: list[Source], args: argparse.Namespace):
        self.encoder, self.tokenizer = model.load(name)
        self.encoder.to(device())
        if args.max_length is None:
            args.max_length = min(MAX_LENGTH, self.tokenizer.model_max_length)
        self.max_length, self.micro_tokens = args.max_length, args.micro_tokens
        self.chunk = args.chunk  # texts embedded and searched at a time
        _, prompts_line = choose_prompts(
            with_collections(sources), args.prompts, self.encoder.prompts)
        check_prompts(with_collections(sources))
        print(f"{name}: {model_directory.describe(self.encoder)}; {prompts_line}")
        memory.mixed_precision(self.encoder, memory.choose_precision("auto", device())[0])

    def __call__(self, texts: list[str], prompt: str = "") -> Tensor:
        """-> (M, D) of length 1."""
        vectors = embed(
            self.encoder, self.tokenizer, texts, self.max_length, self.micro_tokens, prompt)
        return F.normalize(vectors, dim=-1).to(device())

    def chunks(self, work: Work, name: str, pool: Pool) -> list[Path]:
        """The vectors of a pool, in files of `chunk` rows."""
        def embed_from(first: int) -> np.ndarray:
            last = min(first + self.chunk, len(pool))
            return self([pool.document(index) for index in range(first, last)]).cpu().numpy()

        starts = range(0, len(pool), self.chunk)
        return [work.keep(f"{name}-{first}", partial(embed_from, first))
                for first in tqdm(starts, unit="chunk", desc=f"embedding {name}")]


class KnownPositives:
    """Which texts of a pool any of the sources has as a positive of a query."""

    def __init__(self, sources: list[Source], pool: Pool):
        queries, indices = [], []
        for source in sources:
            rows, index = pool.find(source.index["positive"])
            queries.append(source.index["query"][rows])
            indices.append(index)
        queries, indices = np.concatenate(queries), np.concatenate(indices)
        order = np.argsort(queries, kind="stable")
        self.pool, self.queries, self.indices = pool, queries[order], indices[order]

    def cells(self, queries: np.ndarray) -> Cells:
        """Where in the pool the positives of these queries (their hashes, (M,)) stand, and the
        queries' own texts."""
        first, last = (np.searchsorted(self.queries, queries, side) for side in ("left", "right"))
        known = [self.indices[a:b] for a, b in zip(first, last)]
        there, own = self.pool.find(queries)
        return (np.concatenate([there, np.repeat(np.arange(len(queries)), last - first)]),
                np.concatenate([own, *known]))


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
        """What is no negative of these rows: a known positive of the query, or its own text."""
        return self.known.cells(self.source.index["query"][rows])

    def nearest(self, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """-> indices in the pool (M, C) and cosines (M, C), as `search.nearest`."""
        if count > len(self.pool):
            tqdm.write(f"source {self.source.name}: --candidates {count}, but it has "
                       f"{len(self.pool)} texts to find: all are candidates")
            count = len(self.pool)
        q = self.embed([self.source.read(row).query for row in rows], self.source.prompts.query)
        return search.nearest(q, self.vectors, count, self.excluded(rows))
