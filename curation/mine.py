"""Negatives for every row, §5.2.

    retrieval    candidates -> score -> confirm -> top_up -> write
    similarity                                     top_up -> write        random_for_non_retrieval

Paper: each row has 15 negatives. For retrieval data they are passages that retrieval models find
similar, if a cross-encoder scores them lower than the positive; for non-retrieval data they are
random, for hard ones hurt there. Ours: --candidates and --margin, the nearest 15 of those, and
random ones where fewer are left. Axis letters: M rows, C candidates.
"""

import argparse
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from corpora.formats import text_hash
from curation.pool import Embedder, Retriever
from curation.reranker import Reranker, open_or_train
from curation.sources import Report, draw, identity, open_sources, write_sources
from curation.work import Work, fingerprint
from data import Source

ROWS_AT_ONCE = 1024  # are scored at a time, each with its candidates
EQUAL = 0.01  # Ours: scores as close count as equal; rounding in bf16 alone moves one by 0.0008


class Confirmed(NamedTuple):
    """A negative that the retriever has found and the cross-encoder has confirmed."""

    index: int  # in the retriever's pool
    position: int  # among what the retriever found, from 1
    cosine: float
    score: float


class Mined(NamedTuple):
    """What was mined for a row: as many negatives as --negatives."""

    row: int
    confirmed: list[Confirmed]
    random: list[int]  # indices in the pool
    candidates: int = 0
    rejected: int = 0  # candidates that were not confirmed
    positive_score: float | None = None  # None where no cross-encoder was asked


def mine(args: argparse.Namespace) -> None:
    """Gives every row --negatives: of what the retriever finds, the nearest that the cross-encoder
    scores below the positive by --margin; where there are fewer, and for sources of kind
    "similarity", random ones."""
    sources, entries = open_sources(args.sources)
    embed = Embedder(args.retriever, sources, args)
    work = Work(args.out, identity(args, sources, embed.encoder))
    rows = draw(sources, args.rows, args.seed)
    retrievers = {source.name: Retriever(source, sources, embed, work) for source in sources}
    report = Report()
    report.row("source", "rows", "candidates", "rejected", "", "topped up", "random")
    for source in sources:
        report.few_rows(source, rows[source.name], args.batch_size, "raise --rows")
    retrieval = [retrievers[source.name] for source in sources if source.kind == "retrieval"]
    reranker = None
    if retrieval:
        reranker = open_or_train(retrieval, rows, embed, work, report, args)
    # Called twice, for the table and for the files; what takes long is kept in `work`.
    mined = {name: partial(mine_source, retriever, rows[name], reranker, work, args)
             for name, retriever in retrievers.items()}
    for source in sources:
        report_source(report, source, len(rows[source.name]), mined[source.name]())
    work.finish(partial(write, entries=entries, sources=sources, retrievers=retrievers, mined=mined,
                        report=report, trained=work.directory / "cross-encoder", args=args))


def mine_source(
    retriever: Retriever,
    ids: np.ndarray,
    reranker: Reranker | None,
    work: Work,
    args: argparse.Namespace,
) -> Iterator[Mined]:
    """By kind. What takes long is kept in `work`; the same again costs little."""
    if retriever.source.kind == "similarity":
        return random_for_non_retrieval(retriever, ids, args)
    return hard_for_retrieval(retriever, ids, reranker, work, args)


def random_for_non_retrieval(
    retriever: Retriever, ids: np.ndarray, args: argparse.Namespace
) -> Iterator[Mined]:
    """Paper: the negatives of non-retrieval datasets are random, as hard ones made the models worse
    there. Ours: so are those of sources of kind "similarity"."""
    for row, excluded in zip(ids, excluded_texts(retriever, ids)):
        yield Mined(row, [], top_up(retriever, row, 0, excluded, args.negatives, args.seed))


def hard_for_retrieval(
    retriever: Retriever,
    ids: np.ndarray,
    reranker: Reranker,
    work: Work,
    args: argparse.Namespace,
) -> Iterator[Mined]:
    """The stages one after the other, some rows at a time."""
    name, version = retriever.source.name, fingerprint(reranker.encoder)
    for first in range(0, len(ids), args.chunk):
        chunk = ids[first : first + args.chunk]
        nearest = work.keep(f"nearest-{name}-{first}",
                            partial(candidates, retriever, chunk, args.candidates))
        indices, cosines = np.load(nearest)
        indices = indices.astype(int)
        for start in range(0, len(chunk), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            rows, found, near = chunk[part], indices[part], cosines[part]
            scores = work.keep(f"scores-{name}-{first + start}-{version}",
                               partial(score, reranker, retriever, rows, found, near))
            yield from confirm_and_top_up(retriever, rows, found, near, np.load(scores), args)


# the stages

def candidates(retriever: Retriever, ids: np.ndarray, count: int) -> np.ndarray:
    """Paper: hard negatives are passages that retrieval models find similar to the query. -> (2, M,
    C): indices in the pool, the nearest first, and cosines, -inf where the pool has no more."""
    return np.stack(retriever.nearest(ids, count))  # in float64, which holds both as they are


def score(
    reranker: Reranker,
    retriever: Retriever,
    ids: np.ndarray,
    indices: np.ndarray,
    cosines: np.ndarray,
) -> np.ndarray:
    """The cross-encoder's scores, (M, 1 + C): of each row's positive, and of its candidates."""
    rows, there = [retriever.source.read(row) for row in ids], np.isfinite(cosines)
    pairs = [(row.query, row.positive) for row in rows]
    pairs += [(rows[i].query, retriever.pool.text(indices[i, j])) for i, j in np.argwhere(there)]
    found = reranker(pairs)
    scores = np.full((len(ids), 1 + cosines.shape[1]), np.nan, "f4")
    scores[:, 0] = found[: len(ids)]
    scores[:, 1:][there] = found[len(ids) :]
    return scores


def confirm(positive: float, scores: np.ndarray, margin: float) -> np.ndarray:
    """Paper: a cross-encoder validates that a negative's relevance score is lower than the
    positive's. -> which candidates score lower by more than the margin; the others may be right
    answers. A score that is no number is not lower."""
    return np.flatnonzero(scores < positive - max(margin, EQUAL))


def top_up(
    retriever: Retriever, row: int, found: int, excluded: set[int], count: int, seed: int
) -> list[int]:
    """Random texts of the pool, none twice and none that is excluded, to the `found` negatives that
    a row has already: `count` in all. -> their indices. Raises ValueError where the pool has too
    few. A row has a seed of its own, so what it gets does not depend on the others."""
    source, size = retriever.source, len(retriever.pool)
    if size - len(excluded) < count - found:
        raise ValueError(f"source {source.name}, row {row}: {found} negatives found and "
                         f"{size - len(excluded)} texts to draw from; lower --negatives {count}")
    rng = np.random.default_rng([seed, text_hash(source.name), int(row)])
    drawn = []
    while found + len(drawn) < count:
        index = int(rng.integers(size))
        if index not in excluded and index not in drawn:
            drawn.append(index)
    return drawn


def confirm_and_top_up(
    retriever: Retriever,
    ids: np.ndarray,
    indices: np.ndarray,
    cosines: np.ndarray,
    scores: np.ndarray,
    args: argparse.Namespace,
) -> Iterator[Mined]:
    """Of each row's candidates the nearest that are confirmed, topped up with random texts that are
    neither candidates nor excluded."""
    excluded = excluded_texts(retriever, ids)
    for i, row in enumerate(ids):
        there = int(np.isfinite(cosines[i]).sum())  # these come first
        lower = confirm(scores[i, 0], scores[i, 1 : 1 + there], args.margin)
        confirmed = [Confirmed(indices[i, j], j + 1, cosines[i, j], scores[i, 1 + j])
                     for j in lower[: args.negatives]]
        random = top_up(retriever, row, len(confirmed), excluded[i] | {*indices[i, :there]},
                        args.negatives, args.seed)
        yield Mined(row, confirmed, random, there, there - len(lower), scores[i, 0])


def excluded_texts(retriever: Retriever, ids: np.ndarray) -> list[set[int]]:
    """For each row, the indices in the pool of what is no negative of it."""
    excluded = [set() for _ in ids]
    for i, index in zip(*retriever.excluded(ids)):
        excluded[i].add(index)
    return excluded


# what comes out

def report_source(report: Report, source: Source, rows: int, mined: Iterable[Mined]) -> None:
    found = rejected = topped_up = random = 0
    for row in tqdm(mined, total=rows, unit="row", desc=source.name):
        found += row.candidates
        rejected += row.rejected
        topped_up += len(row.random) > 0
        random += len(row.random)
    share = rejected / max(found, 1)
    report.row(source.name, rows, found, rejected, f"{share:.1%}", topped_up, random)


def write(
    folder: Path,
    entries: list[dict],
    sources: list[Source],
    retrievers: dict[str, Retriever],
    mined: dict[str, Callable[[], Iterator[Mined]]],
    report: Report,
    trained: Path,
    args: argparse.Namespace,
) -> None:
    files = {name: {"path": lines(retriever, mined[name]())}
             for name, retriever in retrievers.items()}
    write_sources(folder, entries, sources, report, files)
    if trained.is_dir() and not args.cross_encoder:
        shutil.copytree(trained, folder / "cross-encoder")


def lines(retriever: Retriever, mined: Iterable[Mined]) -> Iterator[dict]:
    """A row with its negatives, and where each comes from."""
    for found in mined:
        query, positive, *_ = retriever.source.read(found.row)
        line = {"query": query, "positive": positive}
        if found.positive_score is not None:
            line["positive_score"] = round(float(found.positive_score), 4)
        indices = [negative.index for negative in found.confirmed] + found.random
        line["negatives"] = [retriever.pool.text(index) for index in indices]
        line["mined"] = [{"from": "retriever", "position": int(negative.position),
                          "cosine": round(float(negative.cosine), 4),
                          "score": round(float(negative.score), 4)}
                         for negative in found.confirmed]
        line["mined"] += [{"from": "random"} for _ in found.random]
        yield line
