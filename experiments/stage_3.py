"""Arms of training from one model, over seeds: held-out nDCG@10 before and after (§5.2).

    python -m experiments.stage_3 --model DIR "stage II=2:FILTERED/manifest.json" "stage III=3:MINED/manifest.json" [flags]

An arm is NAME=STAGE:MANIFEST, or NAME=STAGE:MANIFEST:BATCH_SIZE where it differs; the flags after the arms (--steps, --lr, ...)
go to train.py as they are. Every arm holds out the same pairs of the same sources. A run that is there, with the same flags,
model and manifest, is not run again.
"""

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("arms", nargs="+", metavar="NAME=STAGE:MANIFEST[:BATCH_SIZE]")
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch-size", default="256")
    parser.add_argument("--seeds", type=int, default=3)
    args, flags = parser.parse_known_args()
    arms = {name: (how.split(":") + [args.batch_size])[:3] for name, how in (arm.split("=", 1) for arm in args.arms)}
    found = {name: [ndcg(train(*how, seed, args.model, flags)) for seed in range(args.seeds)] for name, how in arms.items()}
    before = next(iter(found.values()))[0][0]
    if any(old != before for arm in found.values() for old, _ in arm):
        raise SystemExit("the arms do not hold out the same pairs of the same sources: before training they differ")
    show = "{:14.3f} ({:.3f}-{:.3f})".format
    print(f"\n{'held-out nDCG@10':26}{'before':>8}" + "".join(f"{name:>28}" for name in found))
    for source in before:
        values = [[new[source] for _, new in arm] for arm in found.values()]
        print(f"{source:26}{before[source]:8.3f}" + "".join(f"{show(statistics.mean(v), min(v), max(v)):>28}" for v in values))


if __name__ == "__main__":
    main()
