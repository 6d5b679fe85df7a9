"""Kills runs of train.py with `kill -9` at random moments, resumes them until they end, and compares what they leave with a
run that nobody killed.

    python -m experiments.crashes                               20 runs of one process: everything must be bit-identical
    python -m experiments.crashes --runs 6 --ranks 2 --zero 2   losses to a relative 1e-6, everything else equal

Half of the kills are aimed at the writing of a checkpoint, some at that of the final model: they come while a `.part-` folder
is there.
A killed process loses nothing that it has written; what a power cut does to a disk is not tried here.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

import model

TRAIN = Path(__file__).parents[1] / "train.py"
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a b c d e f g h i j".split()
STEPS, SAVE_EVERY = 60, 4
CHECKPOINT, MODEL = "checkpoints/*.part-*", "model.part-*"  # what a kill is aimed at
FLAGS = ["--sources", "sources.json", "--model", "toy", "--batch-size", "12", "--micro-tokens", "128", "--precision", "fp32",
         "--lr", "1e-3", "--eval-every", "10"]


def make_toy(folder: Path) -> None:
    """sources.json, two sources of 60 rows, which a run passes over many times, and `toy`, a JinaBERT with dropout 0.1."""
    for name in ("left", "right"):
        rows = [[" ".join([*(WORDS[5 + (i * m + i // 10 * j) % 10] for j in range(3 + i % 4)), f"{name}{i} {m}"])
                 for m in (1, 2)] for i in range(60)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sources.json").write_text('[{"name": "left", "path": "left.jsonl", "rate": 1}, '
                                         '{"name": "right", "path": "right.jsonl", "rate": 2}]')
    torch.manual_seed(0)
    config = model.JinaBertConfig(vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                  intermediate_size=32)
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, model_max_length=8192)
    model.save(model.PooledEncoder(model.JinaBertModel(config)), tokenizer, folder / "toy")


def launcher(ranks: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []


def start(folder: Path, command: list) -> subprocess.Popen:
    """`python COMMAND` in the folder, on one thread (the toy is too small for more); it adds its output to folder/log."""
    with open(folder / "log", "a") as log:
        return subprocess.Popen([sys.executable, *map(str, command)], cwd=folder, stdout=log, stderr=log,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})


def family(process: subprocess.Popen) -> list[int]:
    """The process and all it has started. (torchrun starts each rank in a session of its own: a process group misses them.)"""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # has just ended
            pass
    found = [process.pid]
    for pid in found:  # grows as it goes
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def lines(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def last_step(run: Path) -> int:
    return max((line["step"] for line in lines(run)), default=-1)


def parts(run: Path) -> list[Path]:
    return [*run.glob("*.part*"), *run.glob(CHECKPOINT)]


def kill(process: subprocess.Popen, run: Path, draw: random.Random, aim: str | None) -> str | None:
    """Kills a run at a random point of the steps before it or, with an aim, in the next such writing after that -> where it
    was, or None where it ended by itself."""
    path, born = run / "metrics.jsonl", time.time_ns()
    while process.poll() is None and not (path.exists() and path.stat().st_mtime_ns > born):
        time.sleep(0.01)
    pids, first = family(process), last_step(run)
    moment = draw.uniform(first, STEPS - (SAVE_EVERY - 1 if aim else 0))
    while process.poll() is None and last_step(run) < int(moment):
        time.sleep(0.002)
    while process.poll() is None and aim and not any(run.glob(aim)):
        time.sleep(0.0005)
    time.sleep(draw.uniform(0, 0.02 if aim else 0.1))
    if process.poll() is None:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    if process.wait() != -signal.SIGKILL:
        return None
    return f"{max(last_step(run), 0)}" + " while writing" * bool(parts(run))


def crashed(folder: Path, name: str, train: list, draw: random.Random, aim: str | None, kills: int) -> tuple[Path, str]:
    """One run that is killed up to `kills` times and resumed until it ends -> its folder, and what became of it in words."""
    run, story = folder / name, []
    process = start(folder, [*train, "--out", name])
    for _ in range(kills):
        where = kill(process, run, draw, aim)
        if where is None:
            break
        if (run / "model").is_dir():  # it had nothing left to do
            return run, "; ".join([*story, f"killed at step {where}, when all was written"])
        saved = sorted(path.name for path in (run / "checkpoints").glob("*") if path.name.isdigit())
        story.append(f"killed at step {where}, " + (f"resumed from {int(saved[-1])}" if saved else "begun anew"))
        process = start(folder, [*train, "--out", run.name, "--resume"])
        if not saved:
            if not process.wait() or f"{run.name} holds no complete checkpoint" not in (folder / "log").read_text():
                raise RuntimeError(f"{run.name}: --resume without a checkpoint ended with {process.returncode}")
            run = run.with_name(f"{run.name}-anew")
            process = start(folder, [*train, "--out", run.name])
        aim = draw.choice((None, None, CHECKPOINT, MODEL))
    if process.wait():
        raise RuntimeError(f"{run.name}: ends with {process.returncode} after it was " + "; ".join(story))
    return run, "; ".join(story) or "ended before it was killed"


def differences(run: Path, whole: Path, exact: bool) -> list[str]:
    """What of a run is not as in the uninterrupted one: its lines, each step once and in order, its weights, moments and
    random states, byte by byte. exact=False: losses to 1e-6, and no weights."""
    ours, theirs = lines(run), lines(whole)
    near = lambda a, b: a == b or not exact and abs(a - b) <= 1e-6 * abs(b)
    last = f"checkpoints/{STEPS:08d}"
    files = ["model/model.safetensors", f"{last}/optimizer.safetensors", f"{last}/random.safetensors"] if exact else []
    return [*["steps"] * ([line["step"] for line in ours] != [line["step"] for line in theirs]),
            *["rows"] * any(a.get("rows") != b.get("rows") for a, b in zip(ours, theirs)),
            *["losses"] * any(not near(a.get("loss", 0), b.get("loss", 0)) for a, b in zip(ours, theirs)),
            *["evaluations"] * (exact and any(a.get("evaluation") != b.get("evaluation") for a, b in zip(ours, theirs))),
            *[file for file in files if (run / file).read_bytes() != (whole / file).read_bytes()],
            *[f"{path.name} is left over" for path in parts(run)]]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--zero", help="ZeRO stage; unset: train.py's default")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(argv)
    draw, different, killed, writing, bits = random.Random(args.seed), 0, 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_toy(folder)
        train = [*launcher(args.ranks), TRAIN, *FLAGS, "--steps", STEPS, "--save-every", SAVE_EVERY,
                 *(["--zero", args.zero] if args.zero else [])]
        if start(folder, [*train, "--out", "whole"]).wait():
            sys.exit((folder / "log").read_text())
        for i in range(args.runs):
            try:
                run, story = crashed(folder, f"run{i + 1:02d}", train, draw, (None, CHECKPOINT, None, CHECKPOINT, MODEL)[i % 5],
                                     draw.choice((1, 1, 2)))
                found = differences(run, folder / "whole", exact=args.ranks == 1)
                bits += not differences(run, folder / "whole", exact=True)
            except RuntimeError as error:
                story, found = str(error), ["its end", (folder / "log").read_text()[-2000:]]
            print(f"{i + 1:2}: {story}; identical: " + (f"NO: {', '.join(found)}" if found else "yes"), flush=True)
            different += bool(found)
            killed, writing = killed + story.count("killed at"), writing + story.count("writing")
    print(f"{args.runs} runs of {STEPS} steps on {args.ranks} rank(s), killed {killed} times, {writing} of them while writing: "
          f"{args.runs - different} as the uninterrupted run, {bits} of them to the last bit")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
