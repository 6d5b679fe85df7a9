"""Arms of training from one model, over seeds: held-out nDCG@10 before and after (§5.2).

    python -m experiments.stage_3 --model DIR ARM ARM ... [flags]

An arm is NAME=STAGE:MANIFEST ("stage III=3:MINED/manifest.json"), or NAME=STAGE:MANIFEST:BATCH_SIZE
where that differs; the flags after the arms (--steps, --lr, ...) go to train.py as they are. Every
arm holds out the same pairs of the same sources. A run that is there, with the same flags, model
and manifest, is not run again.
"""

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path


def ndcg(run: Path) -> tuple[dict, dict]:
    """Before and after: {source: nDCG@10, "mean": ...}."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = []
    for line in lines:
        if "evaluation" in line:
            scores = {**line["evaluation"]["sources"], "mean": line["evaluation"]["mean"]}
            found.append({name: score["ndcg@10"] for name, score in scores.items()})
    return found[0], found[-1]


def train(
    stage: str, sources: str, batch_size: str, seed: int, model: str, flags: list[str]
) -> Path:
    command = ["--stage", stage, "--sources", sources, "--model", model,
               "--batch-size", batch_size, "--seed", str(seed), *flags]
    versions = [str(path.stat().st_mtime_ns)
                for path in (Path(sources), Path(model, "config.json"))]
    digest = hashlib.sha256(" ".join(command + versions).encode()).hexdigest()
    run = Path("runs/stage_3") / digest[:12]
    if not (run / "model").is_dir():
        shutil.rmtree(run, ignore_errors=True)
        subprocess.run([sys.executable, "train.py", *command, "--out", str(run)], check=True)
    return run


def print_table(found: dict[str, list[tuple[dict, dict]]]) -> None:
    """A row for each source, a column for each arm: the mean over the seeds, least and most."""
    before, _ = next(iter(found.values()))[0]
    print(f"\n{'held-out nDCG@10':26}{'before':>8}" + "".join(f"{name:>28}" for name in found))
    for source in before:
        cells = []
        for runs in found.values():
            values = [after[source] for _, after in runs]
            cells.append(f"{statistics.mean(values):14.3f} ({min(values):.3f}-{max(values):.3f})")
        print(f"{source:26}{before[source]:8.3f}" + "".join(f"{cell:>28}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", metavar="NAME=STAGE:MANIFEST[:BATCH_SIZE]")
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch-size", default="256")
    parser.add_argument("--seeds", type=int, default=3)
    args, flags = parser.parse_known_args()
    found = {}
    for arm in args.arms:
        name, how = arm.split("=", 1)
        stage, sources, batch_size = (how.split(":") + [args.batch_size])[:3]
        found[name] = [ndcg(train(stage, sources, batch_size, seed, args.model, flags))
                       for seed in range(args.seeds)]
    before, _ = next(iter(found.values()))[0]
    if any(old != before for runs in found.values() for old, _ in runs):
        raise SystemExit("the arms do not hold out the same pairs of the same sources: before "
                         "training they differ")
    print_table(found)


if __name__ == "__main__":
    main()
