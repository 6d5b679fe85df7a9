"""Arms of training from one model, over seeds: held-out nDCG@10 before and after (§5.2).

    python -m experiments.stage_3 --model DIR "stage II=2:FILTERED/manifest.json" "stage III=3:MINED/manifest.json" [flags]

An arm is NAME=STAGE:MANIFEST, or NAME=STAGE:MANIFEST:BATCH_SIZE where it differs; the flags after the arms (--steps, --lr, ...)
go to train.py as they are. Every arm holds out the same pairs of the same sources. A run that is there, with the same flags,
model and manifest, is not run again. A second table has the same queries among many more texts: their targets and all that
`curate.py mine` would search for the first arm's sources.
"""

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import data
import evaluate
import search


def ndcg(run: Path) -> list[dict]:
    """Before and after: {source: nDCG@10, "mean": ...}."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line["evaluation"] for line in lines if "evaluation" in line]
    return [{name: scores["ndcg@10"] for name, scores in [*e["sources"].items(), ("mean", e["mean"])]}
            for e in (found[0], found[-1])]


def train(stage: str, sources: str, batch_size: str, seed: int, model: str, flags: list[str]) -> Path:
    command = ["--stage", stage, "--sources", sources, "--model", model, "--batch-size", batch_size, "--seed", str(seed),
               *flags]
    versions = [str(path.stat().st_mtime_ns) for path in (Path(sources), Path(model, "config.json"))]
    run = Path("runs/stage_3") / hashlib.sha256(" ".join(command + versions).encode()).hexdigest()[:12]
    if not (run / "model").is_dir():
        shutil.rmtree(run, ignore_errors=True)
        subprocess.run([sys.executable, "train.py", *command, "--out", str(run)], check=True)
    return run


def ndcg_among_all(model: Path | str, sources: list[data.Source]) -> dict:
    """{source: nDCG@10, "mean": ...} of the held-out queries among their target and all texts that are searched for negatives."""
    embed, scores = search.Embedder(str(model), max_length=128, micro_tokens=16384, chunk=8192), {}
    for source in sources:
        pool = search.Pool(search.searched(source, source.train))
        vectors = [embed([pool.text(i) for i in range(start, min(start + embed.chunk, len(pool)))]).cpu().numpy()
                   for start in range(0, len(pool), embed.chunk)]
        q, own = embed([row.query for row in source.held_out]), embed([row.positive for row in source.held_out])
        known = search.Known(search.with_collections(sources), pool)
        ranks = search.ranks(q, own, vectors, known.cells(np.array([data.key(row.query) for row in source.held_out], "<u8")))
        scores[source.name] = evaluate.ndcg_at_10(torch.from_numpy(ranks))
    return scores | {"mean": statistics.mean(scores.values())}


def table(title: str, before: dict, after: dict[str, list[dict]]) -> None:
    show = "{:14.3f} ({:.3f}-{:.3f})".format
    print(f"\n{title:34}{'before':>8}" + "".join(f"{name:>28}" for name in after))
    for source in before:
        values = [[scores[source] for scores in arm] for arm in after.values()]
        print(f"{source:34}{before[source]:8.3f}" + "".join(f"{show(statistics.mean(v), min(v), max(v)):>28}" for v in values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("arms", nargs="+", metavar="NAME=STAGE:MANIFEST[:BATCH_SIZE]")
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch-size", default="256")
    parser.add_argument("--seeds", type=int, default=3)
    args, flags = parser.parse_known_args()
    arms = {name: (how.split(":") + [args.batch_size])[:3] for name, how in (arm.split("=", 1) for arm in args.arms)}
    runs = {name: [train(*how, seed, args.model, flags) for seed in range(args.seeds)] for name, how in arms.items()}
    found = {name: [ndcg(run) for run in arm] for name, arm in runs.items()}
    before = next(iter(found.values()))[0][0]
    if any(old != before for arm in found.values() for old, _ in arm):
        raise SystemExit("the arms do not hold out the same pairs of the same sources: before training they differ")
    table("held-out nDCG@10", before, {name: [new for _, new in arm] for name, arm in found.items()})
    sources = data.load_sources(next(iter(arms.values()))[1])
    table("the same among all searched texts", ndcg_among_all(args.model, sources),
          {name: [ndcg_among_all(run / "model", sources) for run in arm] for name, arm in runs.items()})


if __name__ == "__main__":
    main()
