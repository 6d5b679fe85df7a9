"""`curation mine` beside sentence-transformers' mine_hard_negatives: the same rows, bi-encoder and
cross-encoder.

    pip install -r experiments/requirements.txt datasets==5.2.0
    python -m experiments.miners [--rows 2000] [--turns 3]

2,000 rows of one source of the default corpus, all-MiniLM-L6-v2, and a cross-encoder trained from
it; of each row 20 candidates are scored, theirs and the positive itself as a 21st. Ours and theirs
take turns, a process each, timed from opening the models, without imports; ours also tries the
cross-encoder on held-out pairs, and writes files. Both in the precision that train.py takes; theirs
at the faster of its batch sizes. No time is reported where the two do not score alike.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

import data
import memory
from corpora import installed_docs, wheels
from curation import __main__ as curation
from curation import reranker
from curation.sources import draw
from experiments.bench import lines_of
from experiments.curation import lines, plain, rewrite
from plumbing.files import publish
from plumbing.plan import memory_held

SOURCE, CANDIDATES, MARGIN, LENGTH = "summary_body", 20, 0.2, 128
BATCH_SIZES = 32, 128  # theirs
NEAR = 0.02  # of two scores between 0 and 1; bf16 as train.py has it keeps more in fp32 than theirs


def make(folder: Path, rows: int) -> None:
    """Writes rows/manifest.json, of rows that are all to be mined, and cross-encoder/."""
    source, = [s for s in data.load_sources(installed_docs.build()) if s.name == SOURCE]
    rewrite([source], draw([source], rows, 0), folder / "rows", plain)
    curation.main(["cross-encoder", "--sources", str(folder / "rows/manifest.json"), "--model",
                   str(wheels.build_model()), "--steps", "60", "--candidates", str(CANDIDATES),
                   "--max-length", "64", "--out", str(folder / "cross-encoder")])


# a side in a process of its own -> {query: {text: score}} of what it has confirmed

def ours(folder: Path, out: Path, clock: dict) -> dict[str, dict[str, float]]:
    reranker.Reranker.__call__ = timed(reranker.Reranker.__call__, clock)
    curation.main([
        "mine", "--sources", str(folder / "rows/manifest.json"), "--retriever",
        str(wheels.build_model()), "--cross-encoder", str(folder / "cross-encoder"), "--candidates",
        str(CANDIDATES), "--negatives", str(CANDIDATES), "--margin", str(MARGIN), "--max-length",
        str(LENGTH), "--out", str(out)])
    return {row["query"]: {text: origin["score"]
                           for text, origin in zip(row["negatives"], row["mined"])
                           if origin["from"] == "retriever"}
            for row in lines(out / f"{SOURCE}.jsonl")}


def theirs(folder: Path, batch_size: int, clock: dict) -> dict[str, dict[str, float]]:
    from datasets import Dataset
    from sentence_transformers import CrossEncoder, SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives
    clock["began"] = time.perf_counter()
    dtype, _ = memory.choose_precision("auto", torch.device("cpu"))
    retriever = SentenceTransformer(str(wheels.build_model()), model_kwargs={"dtype": dtype})
    retriever.max_seq_length = LENGTH
    judge = CrossEncoder(str(folder / "cross-encoder"), max_length=LENGTH,
                         model_kwargs={"dtype": dtype})
    judge.predict = timed(judge.predict, clock)
    rows = lines(folder / f"rows/{SOURCE}.jsonl")
    dataset = Dataset.from_dict({name: [row[name] for row in rows]
                                 for name in ("query", "positive")})
    mined = mine_hard_negatives(
        dataset, retriever, cross_encoder=judge, range_max=CANDIDATES, num_negatives=CANDIDATES,
        absolute_margin=MARGIN, batch_size=batch_size, output_format="labeled-list",
        output_scores=True, verbose=False)
    return {row["query"]: dict(zip(row["positive"][1:], row["scores"][1:])) for row in mined}


def timed(call, clock: dict):
    """The same function, which adds its seconds to the clock's "cross-encoder"."""
    def wrapped(*args, **options):
        began = time.perf_counter()
        found = call(*args, **options)
        clock["cross-encoder"] = clock.get("cross-encoder", 0) + time.perf_counter() - began
        return found
    return wrapped


def measure(side: str, folder: Path, out: Path) -> None:
    """Writes what the side found into out.json."""
    clock = {"began": time.perf_counter()}
    found = (ours(folder, out, clock) if side == "ours"
             else theirs(folder, int(side.split(", ")[1]), clock))
    clock["all"] = time.perf_counter() - clock["began"]
    peak = memory_held(torch.device("cpu"), peak=True)
    out.with_suffix(".json").write_text(json.dumps({"found": found, "seconds": clock,
                                                    "peak": peak}))


# both

def agree(one: dict, other: dict) -> str:
    """In words. Raises SystemExit where a score differs, or more than one in ten of what one has
    confirmed the other has not: near the margin, candidates of equal cosines, theirs' 21st."""
    both, either, worst = 0, 0, 0.0
    for query in one.keys() | other.keys():
        ours, theirs = one.get(query, {}), other.get(query, {})
        shared = ours.keys() & theirs.keys()
        both += len(shared)
        either += len(ours.keys() | theirs.keys())
        worst = max([worst, *(abs(ours[text] - theirs[text]) for text in shared)])
    if worst > NEAR or both < 0.9 * either or not both:
        raise SystemExit(f"miners: scores differ by {worst:.1e}, and {both:,} of {either:,} "
                         f"negatives are both sides': no time is reported")
    return f"{both:,} of {either:,} negatives are both sides', scores within {worst:.0e}"


def row_of(side: str, rows: int, runs: list[dict], others: list[dict]) -> tuple[str, ...]:
    whole = [run["seconds"]["all"] for run in runs]
    ratio = median(a / b["seconds"]["all"] for a, b in zip(whole, others))
    share = median(run["seconds"]["cross-encoder"] / a for run, a in zip(runs, whole))
    return (side, f"{rows / median(whole):.1f}", f"{ratio:.2f}", f"{share:.0%}",
            f"{max(run['peak'] for run in runs) / 1e9:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/miners"))
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)  # of a child, and its out
    args = parser.parse_args()
    folder = args.out / str(args.rows)
    if args.side:
        return measure(args.side[0], folder, Path(args.side[1]))
    for package in ("sentence_transformers", "datasets"):
        if not importlib.util.find_spec(package):
            sys.exit(f"miners: needs {package}; --help says what to install")
    if not folder.is_dir():
        publish(folder, lambda part: make(part, args.rows), replace=False)
    sides = "ours", *(f"theirs, {size}" for size in BATCH_SIZES)
    runs = {side: [] for side in sides}
    for turn in range(args.turns):
        for side in sides:
            out = args.out / f"{side}-{turn}-{time.time_ns()}".replace(", ", "-")
            subprocess.run([sys.executable, "-m", "experiments.miners", "--rows", str(args.rows),
                            "--out", args.out, "--side", side, out], check=True)
            runs[side].append(json.loads(out.with_suffix(".json").read_text()))
    whole = {side: median(run["seconds"]["all"] for run in found) for side, found in runs.items()}
    best = min(sides[1:], key=whole.get)
    print(agree(runs["ours"][0]["found"], runs[best][0]["found"]))
    print(lines_of(("", "rows/s", "time, of theirs", "of it the cross-encoder", "GB"),
                   [row_of(side, args.rows, runs[side], runs[best]) for side in ("ours", best)]))


if __name__ == "__main__":
    main()
