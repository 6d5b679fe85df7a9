"""Planted errors: does the filter find swapped targets (§5.1), and does the cross-encoder find false negatives (§5.2)?

    python -m experiments.curation swapped --model DIR [--sources MANIFEST] [--rows 20000] [--pool 20000]
    python -m experiments.curation copies --retriever DIR [--sources MANIFEST] [--cross-encoder DIR] [--rows 2000]

swapped: in a tenth of the rows of every source, targets change places at random; then curate.py filter. copies: for every row
three false negatives go among the candidates: its positive with an accent that tokenizers strip, its positive with its
sentences in another order, and the same with every seventh word gone; then curate.py mine, at several margins.
"""

import argparse
import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import curate
import data
from corpora import installed_docs


def rewritten(sources: list[data.Source], count: int, directory: Path, change) -> Path:
    """A manifest of `count` rows of the sources, as change(rows of a source, rng) makes them."""
    manifest, drawn = [], curate.draw(sources, count, seed=1)
    for source in sources:
        rows = [source.read(i) for i in drawn[source.name]]
        curate.write_lines(directory / f"{source.name}.jsonl", change(rows, np.random.default_rng(len(rows))))
        curate.write_lines(directory / f"{source.name}.eval.jsonl", ({"query": row.query, "positive": row.positive}
                                                                     for row in source.held_out))
        manifest.append({"name": source.name, "path": f"{source.name}.jsonl", "eval": f"{source.name}.eval.jsonl",
                         "rate": source.rate})
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory / "manifest.json"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def swapped(args: argparse.Namespace, sources: list[data.Source], directory: Path) -> None:
    def swap(rows, rng):
        chosen = rng.permutation(len(rows))[: len(rows) // 10]
        target = {i: rows[j].positive for i, j in zip(chosen, np.roll(chosen, 1))}
        return [{"query": row.query, "positive": target.get(i, row.positive), "negatives": [str(i in target)]}
                for i, row in enumerate(rows)]  # whether it was swapped goes along as a negative

    manifest, out = rewritten(sources, args.rows, directory, swap), directory / "out"
    curate.main(["filter", "--sources", str(manifest), "--model", args.model, "--pool", str(args.pool), "--out", str(out),
                 "--max-length", str(args.max_length)])
    print(f"{'':26}{'swapped':>10}{'dropped':>10}{'true':>10}{'kept':>10}")
    for source in sources:
        before, kept = (lines(folder / f"{source.name}.jsonl") for folder in (directory, out))
        (wrong, right), (wrong_kept, right_kept) = (
            [sum(row["negatives"] == [flag] for row in rows) for flag in ("True", "False")] for rows in (before, kept))
        print(f"{source.name:26}{wrong:10}{1 - wrong_kept / wrong:10.1%}{right:10}{right_kept / right:10.1%}")


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


def copies(args: argparse.Namespace, sources: list[data.Source], directory: Path) -> None:
    def plant(rows, rng):
        return [{"query": row.query, "positive": row.positive,
                 "negatives": [change(row.positive) for change in CHANGES.values()]} for row in rows]

    manifest, judge = rewritten(sources, args.rows, directory, plant), args.cross_encoder
    run = ["--sources", str(manifest), "--retriever", args.model, "--candidates", "20", "--max-length", str(args.max_length)]
    if not judge:
        judge = str(directory / "judge")
        curate.main(["cross-encoder", *run, "--model", args.model, "--out", judge])
    mined = {}
    for margin in "0", "0.1", "0.2", "0.4":
        out = directory / f"mined-{margin}"
        curate.main(["mine", *run, "--cross-encoder", judge, "--margin", margin, "--out", str(out)])
        mined[margin] = [{n for n, origin in zip(row["negatives"], row["mined"]) if origin["from"] == "retriever"}
                         for source in sources for row in lines(out / f"{source.name}.jsonl")]
    rows = [row["negatives"] for source in sources for row in lines(directory / f"{source.name}.jsonl")]
    print(f"{f'mined as a negative, of {len(rows)} rows; margin':52}" + "".join(f"{margin:>8}" for margin in mined))
    for i, name in enumerate(CHANGES):
        shares = [np.mean([row[i] in negatives for row, negatives in zip(rows, found)]) for found in mined.values()]
        print(f"{name:52}" + "".join(f"{share:8.1%}" for share in shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("swapped", "copies"))
    parser.add_argument("--sources")
    parser.add_argument("--model", "--retriever", dest="model", required=True)
    parser.add_argument("--cross-encoder")
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--pool", type=int, default=20000)
    parser.add_argument("--max-length", type=int, default=128)
    args = parser.parse_args()
    sources = data.load_sources(args.sources or installed_docs.build())
    with TemporaryDirectory() as directory:
        {"swapped": swapped, "copies": copies}[args.what](args, sources, Path(directory))


if __name__ == "__main__":
    main()
