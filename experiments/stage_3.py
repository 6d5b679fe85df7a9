"""Stage III against as many further steps of stage II from the same model (§5.2): held-out nDCG@10, over seeds.

    python -m experiments.stage_3 --model DIR --pairs FILTERED/manifest.json --mined MINED/manifest.json [train.py's flags]

Both take the same number of steps of the same number of rows. "same texts" is stage II with as many texts a step as stage III
has with 15 negatives. Other flags (--steps, --lr, --batch-size ...) go to train.py as they are; a run that is there is not run
again.
"""

import argparse
import json
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--mined", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("runs/stage_3"))
    parser.add_argument("--arms", nargs="+", default=["stage II", "stage II, same texts", "stage III"])
    args, flags = parser.parse_known_args()
    arms = {"stage II": ["2", args.pairs, args.batch_size],
            "stage II, same texts": ["2", args.pairs, args.batch_size * 17 // 2],
            "stage II, mined rows": ["2", args.mined, args.batch_size], "stage III": ["3", args.mined, args.batch_size]}
    results = {}
    for seed in range(args.seeds):
        for arm in args.arms:
            stage, sources, size = arms[arm]
            run = args.out / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
            if not (run / "model").is_dir():
                subprocess.run([sys.executable, "train.py", "--stage", stage, "--sources", sources, "--model", args.model,
                                "--batch-size", str(size), "--seed", str(seed), "--out", str(run), *flags], check=True)
            results.setdefault(arm, []).append(ndcg(run))
    before, show = results[args.arms[0]][0][0], "{:14.3f} ({:.3f}-{:.3f})".format
    print(f"\n{'held-out nDCG@10':26}{'before':>8}" + "".join(f"{arm:>24}" for arm in results))
    for name in before:
        values = [[after[name] for _, after in runs] for runs in results.values()]
        print(f"{name:26}{before[name]:8.3f}" + "".join(show(statistics.mean(v), min(v), max(v)) for v in values))


if __name__ == "__main__":
    main()
