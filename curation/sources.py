"""What goes into a command and comes out of it: sources of a manifest, rows drawn from them, and
sources written again, with a manifest for train.py and a report.

Nothing here knows how pairs are filtered or negatives found.
"""

import argparse
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from urllib.parse import quote

import numpy as np
from torch import nn
from tqdm import tqdm

import data
from corpora import installed_docs
from corpora.convert import read_rows
from corpora.formats import text_hash
from corpora.manifest import ROW_FIELDS
from curation.work import fingerprint

FOLDERS = {"path": "", "eval": "eval/", "collection": "dropped/"}  # of OUT, by a manifest's fields
# Flags on which no work depends that is kept: they may change when a command goes on.
FREE = ("sources", "out", "micro_tokens", "batch_size", "cross_encoder", "top_k", "margin",
        "negatives")


def open_sources(manifest: str | None) -> tuple[list[data.Source], list[dict]]:
    """The sources of a manifest, or of the default corpus, and its entries."""
    manifest = manifest or installed_docs.build()
    return data.load_sources(manifest), json.loads(Path(manifest).read_bytes())


@cache
def collection(source: data.Source) -> data.Source | None:
    """The source's collection, opened, where it has one."""
    if not source.collection:
        return None
    name = f"{source.name}, collection"
    return data.Source(name, source.collection, 1, source.kind, source.cache,
                       prompts=source.prompts, columns=source.columns)


def with_collections(sources: list[data.Source]) -> list[data.Source]:
    opened = map(collection, sources)
    return [*sources, *(more for more in opened if more)]


def identity(args: argparse.Namespace, sources: list[data.Source], *networks: nn.Module) -> dict:
    """What a command's work depends on: flags, texts and weights."""
    flags = {name: value for name, value in vars(args).items() if name not in FREE}
    corpus = [[s.name, s.rate, s.kind, s.fingerprint, list(s.prompts)]
              for s in with_collections(sources)]
    held_out = text_hash(str(sorted(sources[0].held_out_hashes)))
    weights = [fingerprint(network) for network in networks]
    return {**flags, "corpus": corpus, "hold-out": held_out, "model": weights}


def draw(
    sources: list[data.Source],
    count: int | None,
    seed: int,
    apart: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """{source: ids of the rows to work on}, none of `apart`: all that may be trained on, or `count`
    at random by the sources' rates; where a source has fewer than its share, others give more."""
    rows = {source.name: source.train for source in sources}
    if apart:
        rows = {name: np.setdiff1d(ids, apart.get(name, [])) for name, ids in rows.items()}
    if count is None:
        return rows
    left, waiting, drawn = count, list(sources), {}
    waiting.sort(key=lambda s: len(rows[s.name]) / s.rate)  # those that lack rows first
    while waiting:
        rates = sum(s.rate for s in sources if s in waiting)
        source = waiting.pop(0)
        ids = rows[source.name]
        share = min(len(ids), round(left * source.rate / rates))
        rng = np.random.default_rng([seed, text_hash(source.name)])
        drawn[source.name] = np.sort(rng.permutation(ids)[:share])
        left -= share
    return drawn


class Report:
    """A table of the sources and what else is to be said: printed line by line, and written beside
    the results."""

    def __init__(self):
        self.lines = []

    def line(self, text: str) -> None:
        tqdm.write(text)
        self.lines.append(text)

    def row(self, name: str, *values: int | str) -> None:
        cells = [f"{value:,}" if isinstance(value, int) else value for value in values]
        self.line(f"{name:26}" + "".join(f"{cell:>12}" for cell in cells))

    def few_rows(self, source: data.Source, ids: np.ndarray, batch_size: int, advice: str) -> None:
        """Says so where train.py would refuse these rows of a source."""
        if not len(ids):
            self.line(f"    {source.name} keeps no row and is left out; {advice}")
        elif source.usable(ids) < batch_size:
            self.line(f"    {source.name} keeps {source.usable(ids)} usable rows, fewer than "
                      f"--batch-size {batch_size}: train.py would refuse it; lower it there, or "
                      f"{advice}")


def write_sources(
    folder: Path,
    entries: list[dict],
    sources: list[data.Source],
    report: Report,
    files: dict[str, dict[str, Iterable[dict]]],
) -> None:
    """Writes a manifest, a report, and of every source what it holds out and files[its name]:
    {field of the manifest: lines}. A source without rows is not in the manifest. entries: the
    sources' old ones. Raises ValueError where no source has a row."""
    for name in FOLDERS.values():
        (folder / name).mkdir(exist_ok=True)
    manifest = []
    for entry, source in zip(entries, sources):
        held_out = source.held_out
        if source.eval:
            held_out = read_rows(source.eval, source.columns)
        held_out = ({"query": row.query, "positive": row.positive} for row in held_out)
        written = {}
        for field, lines in (files[source.name] | {"eval": held_out}).items():
            name = FOLDERS[field] + file_name(source)
            if write_lines(folder / name, lines):
                written[field] = name
        if "path" in written:
            others = {field: value for field, value in entry.items()
                      if field not in (*FOLDERS, *ROW_FIELDS)}
            manifest.append(others | written)
    if not manifest:
        raise ValueError("no source keeps a row: see the table")
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    (folder / "report.txt").write_text("\n".join(report.lines) + "\n")


def file_name(source: data.Source) -> str:
    return quote(source.name, "") + ".jsonl"


def write_lines(path: Path, values: Iterable[dict]) -> int:
    """-> how many."""
    count = 0
    with open(path, "w", encoding="utf-8") as file:
        for count, value in enumerate(values, 1):
            file.write(json.dumps(value, ensure_ascii=False) + "\n")
    return count
