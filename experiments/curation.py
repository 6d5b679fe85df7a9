"""Planted errors: does the filter find swapped targets (§5.1), and does the cross-encoder find false negatives (§5.2)?

    python -m experiments.curation swapped --model DIR [--sources MANIFEST] [--rows 20000] [--pool 20000]
    python -m experiments.curation copies --model DIR [--sources MANIFEST] [--rows 2000]

swapped: in a tenth of the rows of every source, targets change places at random; then curate.py filter. copies: a cross-encoder
is trained on other rows; then, for every row, three false negatives go among the candidates: its positive with an accent that
tokenizers strip, its positive with its sentences in another order, and that with every seventh word gone; then curate.py mine
at several margins, beside the 15 that the retriever finds without a cross-encoder.
"""

import argparse
import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import data
from corpora import formats
from curation import __main__ as curate
from curation import pool as search
from corpora import installed_docs


def rewritten(sources: list[data.Source], rows: dict[str, np.ndarray], directory: Path, change) -> Path:
    """A manifest in `directory` of these rows, as change(rows of a source, rng) makes them, with what is held out."""
    manifest = []
    for source in sources:
        (directory / "eval").mkdir(parents=True, exist_ok=True)
        made = change([source.read(i) for i in rows[source.name]], np.random.default_rng(len(manifest)))
        curate.write_lines(directory / f"{source.name}.jsonl", made)
        held_out = ({"query": row.query, "positive": row.positive} for row in source.held_out)
        curate.write_lines(directory / "eval" / f"{source.name}.jsonl", held_out)
        manifest.append({"name": source.name, "path": f"{source.name}.jsonl", "eval": f"eval/{source.name}.jsonl",
                         "rate": source.rate, "kind": source.kind})
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory / "manifest.json"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def swapped(args: argparse.Namespace, sources: list[data.Source], directory: Path) -> None:
    def swap(rows, rng):
        chosen = rng.permutation(len(rows))[: len(rows) // 10]
        target = {i: rows[j].positive for i, j in zip(chosen, np.roll(chosen, 1))
                  if formats.text_hash(rows[i].positive) != formats.text_hash(rows[j].positive)}
        return [{"query": row.query, "positive": target.get(i, row.positive), "negatives": [str(i in target)]}
                for i, row in enumerate(rows)]  # whether it was swapped goes along as a negative

    manifest, out = rewritten(sources, curate.draw(sources, args.rows, 0), directory, swap), directory / "out"
    curate.main(["filter", "--sources", str(manifest), "--model", args.model, "--pool", str(args.pool), "--out", str(out),
                 "--top-k", str(args.top_k), "--max-length", str(args.max_length)])
    print(f"{'':26}{'swapped':>10}{'dropped':>10}{'true':>10}{'kept':>10}")
    for source in sources:
        before, kept = (lines(folder / f"{source.name}.jsonl") for folder in (directory, out))
        (wrong, right), (wrong_kept, right_kept) = (
            [sum(row["negatives"] == [flag] for row in rows) for flag in ("True", "False")] for rows in (before, kept))
        print(f"{source.name:26}{wrong:10}{1 - wrong_kept / max(wrong, 1):10.1%}{right:10}{right_kept / right:10.1%}")


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

    rows = curate.draw(sources, args.rows, 0)
    others = curate.draw(sources, curate.JUDGE_STEPS * curate.JUDGE_QUERIES, 0, apart=rows)
    plain = rewritten(sources, others, directory / "others", lambda rows, _: [{"query": row.query, "positive": row.positive}
                                                                              for row in rows])
    run, judge = ["--candidates", "20", "--max-length", str(args.max_length)], str(directory / "judge")
    curate.main(["cross-encoder", "--sources", str(plain), "--model", args.model, "--out", judge, *run])
    manifest = rewritten(sources, rows, directory, plant)
    run += ["--sources", str(manifest), "--retriever", args.model, "--cross-encoder", judge]
    planted = data.load_sources(manifest)
    embed = search.Embedder(args.model, args.max_length, 16384, 8192)
    work, nearest = search.Work(str(directory / "nearest"), {}), []
    for source in planted:
        retriever = search.Retriever(source, planted, embed, work)
        nearest += [{retriever.pool.text(place) for place in places} for places in retriever(source.train, 15)[0]]
    mined = {"no judge": nearest}
    for margin in "0", "0.1", "0.2", "0.4":
        out = directory / f"mined-{margin}"
        curate.main(["mine", *run, "--margin", margin, "--out", str(out)])
        mined[margin] = [{n for n, origin in zip(row["negatives"], row["mined"]) if origin["from"] == "retriever"}
                         for source in sources for row in lines(out / f"{source.name}.jsonl")]
    rows = [row["negatives"] for source in sources for row in lines(directory / f"{source.name}.jsonl")]
    print(f"{f'mined as a negative, of {len(rows)} rows; margin':52}" + "".join(f"{margin:>10}" for margin in mined))
    for i, name in enumerate(CHANGES):
        shares = [np.mean([row[i] in negatives for row, negatives in zip(rows, found)]) for found in mined.values()]
        print(f"{name:52}" + "".join(f"{share:10.1%}" for share in shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for run, rows in (swapped, 20000), (copies, 2000):
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
