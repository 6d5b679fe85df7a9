"""The consistency filter of §5.1: a pair stays if a model finds its target among many.

    draw -> random_targets -> find_targets -> is_consistent -> write (kept, dropped)

Paper: pairs are consistency-filtered (Dai et al. 2023, Wang et al. 2022); with which model, pool
and top k is not said. Ours: the model is a flag; --pool and --top-k default to those of Jina
Embeddings v1.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from textwrap import shorten

import numpy as np
from tqdm import tqdm

from corpora.convert import read_rows
from corpora.formats import Row, text_hash
from curation.pool import Embedder, KnownPositives, Pool, positives, searched
from curation.sources import (Report, draw, file_name, identity, open_sources, with_collections,
                              write_lines, write_sources)
from curation.work import Work
from data import Source
from evaluation import search


def filter_pairs(args: argparse.Namespace) -> None:
    """Keeps the pairs whose target is among their query's --top-k of --pool random targets and
    itself."""
    sources, entries = open_sources(args.sources)
    rows = draw(sources, args.rows, args.seed)
    pool = random_targets(sources, args.pool, args.top_k, args.seed)
    embed = Embedder(args.model, sources, args)
    work = Work(args.out, identity(args, sources, embed.encoder))
    vectors = embed.chunks(work, "pool", pool)
    known = KnownPositives(with_collections(sources), pool)
    report, positions = Report(), {}
    report.row("source", "rows", "kept", "", "dropped")
    report.line(f"    kept if among the first {args.top_k} of {len(pool):,} random targets and its "
                f"own")
    for source in sources:
        ids = rows[source.name]
        positions[source.name] = find_targets(source, ids, embed, vectors, known, work)
        report_source(report, source, ids, positions[source.name], args)
    work.finish(partial(write, entries=entries, sources=sources, rows=rows, positions=positions,
                        pool_size=len(pool), top_k=args.top_k, report=report))


def is_consistent(positions: np.ndarray, top_k: int) -> np.ndarray:
    """The decision: a pair is kept if its target is among the first `top_k`."""
    return positions <= top_k


def random_targets(sources: list[Source], count: int, top_k: int, seed: int) -> Pool:
    """What a pair's target has to stand out from."""
    pool = Pool([positives(source, source.train) for source in sources], count, seed)
    if len(pool) <= top_k:
        raise ValueError(f"--pool {count}: {len(pool)} targets and --top-k {top_k}: nearly every "
                         f"pair would stay; raise --pool, or lower --top-k")
    return pool


def find_targets(
    source: Source,
    ids: np.ndarray,
    embed: Embedder,
    vectors: list[Path],
    known: KnownPositives,
    work: Work,
) -> np.ndarray:
    """1-based position of each row's target among the pool and itself, chunk by chunk. ids (M,) ->
    (M,). The query's other positives and its own text do not count against it."""
    def positions(ids: np.ndarray) -> np.ndarray:
        read = [source.read(row) for row in ids]
        q = embed([row.query for row in read], source.prompts.query)
        p = embed([row.positive for row in read], source.prompts.document)
        return search.positions(q, p, vectors, known.cells(source.index["query"][ids]))

    found = [np.empty(0, int)]
    for start in tqdm(range(0, len(ids), embed.chunk), unit="chunk", desc=source.name):
        chunk = ids[start : start + embed.chunk]
        file = work.keep(f"positions-{source.name}-{start}", partial(positions, chunk))
        found.append(np.load(file))
    return np.concatenate(found)


def report_source(
    report: Report,
    source: Source,
    ids: np.ndarray,
    positions: np.ndarray,
    args: argparse.Namespace,
) -> None:
    """A row of the table, and two pairs of either kind to look at."""
    good = is_consistent(positions, args.top_k)
    share = good.mean() if len(ids) else 0
    report.row(source.name, len(ids), int(good.sum()), f"{share:.1%}", int((~good).sum()))
    report.few_rows(source, ids[good], args.batch_size, "raise --top-k, or lower --pool")
    for what, chosen in (("kept", good), ("dropped", ~good)):
        order = np.random.default_rng(args.seed).permutation(np.flatnonzero(chosen))
        for i in order[:2]:
            row = source.read(ids[i])
            query, positive = (shorten(text, 52, placeholder=" ...")
                               for text in (row.query, row.positive))
            report.line(f"    {what:8}position {positions[i]:6}    {query} -> {positive}")


def write(
    folder: Path,
    entries: list[dict],
    sources: list[Source],
    rows: dict[str, np.ndarray],
    positions: dict[str, np.ndarray],
    pool_size: int,
    top_k: int,
    report: Report,
) -> None:
    queries = np.concatenate([source.index["query"][rows[source.name]] for source in sources])
    texts = Pool([part for source in sources for part in searched(source, rows[source.name])])
    files = {}
    (folder / "held-out").mkdir()
    for source in sources:
        ids, found = rows[source.name], positions[source.name]
        reason = f"among {pool_size} random targets and its own, --top-k {top_k}"
        good = is_consistent(found, top_k)
        not_kept = chain(dropped(source, ids[~good], found[~good], reason),
                         not_drawn(source, ids, queries, texts.hashes),
                         of_the_collection(source))
        files[source.name] = {"path": kept(source, ids[good]), "collection": not_kept}
        write_lines(folder / "held-out" / file_name(source), held_out(source))
    write_sources(folder, entries, sources, report, files)


def kept(source: Source, ids: np.ndarray) -> Iterator[dict]:
    """The rows, with their negatives if they have some that are not held out."""
    for row in map(source.read, ids):
        line = {"query": row.query, "positive": row.positive}
        negatives = [text for text in row.negatives
                     if text_hash(text) not in source.held_out_hashes]
        yield line | {"negatives": negatives} if negatives else line


def dropped(source: Source, ids: np.ndarray, positions: np.ndarray, reason: str) -> Iterator[dict]:
    for row, position in zip(ids, positions):
        yield with_reason(source.read(row), f"position {position} {reason}")


def not_drawn(
    source: Source, ids: np.ndarray, queries: np.ndarray, targets: np.ndarray
) -> Iterator[dict]:
    """Rows that --rows left out, where both their texts are in others: `mine` must know that the
    two belong together. queries, targets: hashes in the rows that were drawn, of all sources."""
    ids = np.setdiff1d(source.train, ids)
    there = (np.isin(source.index["query"][ids], queries)
             & np.isin(source.index["positive"][ids], targets))
    for row in ids[there]:
        yield with_reason(source.read(row), "not drawn (--rows), but its texts are, in other rows")


def of_the_collection(source: Source) -> Iterator[dict]:
    if source.collection:
        for row in read_rows(source.collection, source.columns):
            if text_hash(row.positive) not in source.held_out_hashes:
                yield with_reason(row, "of the collection, not of the source")


def held_out(source: Source) -> Iterator[dict]:
    """Rows that may not be trained on."""
    for row in np.setdiff1d(np.arange(len(source.index)), source.train):
        yield with_reason(source.read(row), "a text of it is held out")


def with_reason(row: Row, reason: str) -> dict:
    return {"query": row.query, "positive": row.positive, "row": row.id, "reason": reason}
