"""Planted errors: does the filter find swapped targets (§5.1), does the cross-encoder find false
negatives (§5.2)?

    python -m experiments.curation swapped --model DIR [--sources MANIFEST] [--rows 20000]
    python -m experiments.curation copies --model DIR [--sources MANIFEST] [--rows 2000]

swapped: in a tenth of the rows of every source, targets change places at random; then the filter.
copies: a cross-encoder is trained on other rows; then, for every row, three false negatives go
among the candidates: its positive with an accent that tokenizers strip, its positive with its
sentences in another order, and that with every seventh word gone; then negatives are mined at
several margins, beside the 15 that the retriever finds without a cross-encoder.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import data
from corpora import installed_docs
from corpora.formats import Row, text_hash
from curation import __main__ as curation
from curation import reranker
from curation.pool import Embedder, Retriever
from curation.sources import draw, write_lines
from curation.work import Work

CANDIDATES = "20"


def rewrite(
    sources: list[data.Source], rows: dict[str, np.ndarray], directory: Path, change: Callable
) -> Path:
    """A manifest in `directory` of these rows, as change(rows of a source, seed) makes them, with
    what is held out."""
    (directory / "eval").mkdir(parents=True)
    manifest = []
    for number, source in enumerate(sources):
        name = f"{source.name}.jsonl"
        write_lines(directory / name, change([source.read(i) for i in rows[source.name]], number))
        held_out = ({"query": row.query, "positive": row.positive} for row in source.held_out)
        write_lines(directory / "eval" / name, held_out)
        manifest.append({"name": source.name, "path": name, "eval": f"eval/{name}",
                         "rate": source.rate, "kind": source.kind})
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory / "manifest.json"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


# §5.1: swapped targets

def swap(rows: list[Row], seed: int, share: float = 0.1) -> list[dict]:
    """A share of the rows with each other's targets. Whether a row's was swapped goes along as its
    negative."""
    chosen = np.random.default_rng(seed).permutation(len(rows))[: int(share * len(rows))]
    targets = {}
    for i, j in zip(chosen, np.roll(chosen, 1)):
        if text_hash(rows[i].positive) != text_hash(rows[j].positive):
            targets[i] = rows[j].positive
    return [{"query": row.query, "positive": targets.get(i, row.positive),
             "negatives": [str(i in targets)]} for i, row in enumerate(rows)]


def count_swapped(path: Path) -> tuple[int, int]:
    """-> swapped rows of a file, others."""
    flags = [row["negatives"] for row in lines(path)]
    return flags.count(["True"]), flags.count(["False"])


def swapped(args: argparse.Namespace, sources: list[data.Source], directory: Path) -> None:
    out = directory / "out"
    manifest = rewrite(sources, draw(sources, args.rows, 0), directory, swap)
    curation.main(["filter", "--sources", str(manifest), "--model", args.model, "--out", str(out),
                   "--pool", str(args.pool), "--top-k", str(args.top_k),
                   "--max-length", str(args.max_length)])
    print(f"{'':26}{'swapped':>10}{'dropped':>10}{'true':>10}{'kept':>10}")
    for source in sources:
        wrong, right = count_swapped(directory / f"{source.name}.jsonl")
        wrong_kept, right_kept = count_swapped(out / f"{source.name}.jsonl")
        print(f"{source.name:26}{wrong:10}{1 - wrong_kept / max(wrong, 1):10.1%}"
              f"{right:10}{right_kept / right:10.1%}")


# §5.2: false negatives

def copy(text: str) -> str:
    return text[0] + "\u0301" + text[1:]


def reordered(text: str) -> str:
    """Sentences, or else lines, or else halves, the last first."""
    for pattern, glue in ((r"(?<=[.!?;:])\s+", " "), (r"\n", "\n"), (r",\s+", ", ")):
        if len(parts := re.split(pattern, text)) > 1:
            return glue.join(reversed(parts))
    words = text.split()
    return " ".join(words[len(words) // 2 :] + words[: len(words) // 2])


def shortened(text: str) -> str:
    return " ".join(word for i, word in enumerate(reordered(text).split(), 1) if i % 7)


CHANGES = {"copy": copy, "reordered": reordered, "reordered, words gone": shortened}


def plant(rows: list[Row], seed: int) -> list[dict]:
    return [{"query": row.query, "positive": row.positive,
             "negatives": [change(row.positive) for change in CHANGES.values()]} for row in rows]


def plain(rows: list[Row], seed: int) -> list[dict]:
    return [{"query": row.query, "positive": row.positive} for row in rows]


def copies(args: argparse.Namespace, sources: list[data.Source], directory: Path) -> None:
    rows = draw(sources, args.rows, 0)
    others = draw(sources, reranker.STEPS * reranker.QUERIES, 0, apart=rows)
    trained = str(directory / "cross-encoder")
    flags = ["--candidates", CANDIDATES, "--max-length", str(args.max_length)]
    curation.main(["cross-encoder", *flags, "--model", args.model, "--out", trained, "--sources",
                   str(rewrite(sources, others, directory / "others", plain))])
    manifest = rewrite(sources, rows, directory, plant)
    mined = {"unscored": nearest(manifest, args, directory)}
    for margin in ("0", "0.1", "0.2", "0.4"):
        out = directory / f"mined-{margin}"
        curation.main(["mine", *flags, "--sources", str(manifest), "--retriever", args.model,
                       "--cross-encoder", trained, "--margin", margin, "--out", str(out)])
        mined[margin] = [{negative for negative, origin in zip(row["negatives"], row["mined"])
                          if origin["from"] == "retriever"}
                         for source in sources for row in lines(out / f"{source.name}.jsonl")]
    planted = [row["negatives"] for source in sources
               for row in lines(directory / f"{source.name}.jsonl")]
    title = f"mined as a negative, of {len(planted)} rows; margin"
    print(f"{title:52}" + "".join(f"{margin:>10}" for margin in mined))
    for i, name in enumerate(CHANGES):
        shares = [np.mean([row[i] in negatives for row, negatives in zip(planted, found)])
                  for found in mined.values()]
        print(f"{name:52}" + "".join(f"{share:10.1%}" for share in shares))


def nearest(manifest: Path, args: argparse.Namespace, directory: Path) -> list[set[str]]:
    """The 15 that the retriever finds for each row: what there would be without a cross-encoder."""
    sources = data.load_sources(manifest)
    flags = argparse.Namespace(
        max_length=args.max_length, micro_tokens=16384, chunk=8192, prompts=None)
    embed = Embedder(args.model, sources, flags)
    work, found = Work(str(directory / "nearest"), {}), []
    for source in sources:
        retriever = Retriever(source, sources, embed, work)
        positions, _ = retriever.nearest(source.train, 15)
        found += [{retriever.pool.text(i) for i in row} for row in positions]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for run, rows in ((swapped, 20000), (copies, 2000)):
        command = commands.add_parser(run.__name__)
        command.set_defaults(run=run)
        command.add_argument("--model", required=True)
        command.add_argument("--sources")
        command.add_argument("--rows", type=int, default=rows)
        command.add_argument("--max-length", type=int, default=128)
        if run is swapped:
            command.add_argument("--pool", type=int, default=20000)
            command.add_argument("--top-k", type=int, default=2)
    args = parser.parse_args()
    sources = data.load_sources(args.sources or installed_docs.build())
    with TemporaryDirectory() as directory:
        args.run(args, sources, Path(directory))


if __name__ == "__main__":
    main()
