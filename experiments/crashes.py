"""Kills runs of train.py with `kill -9` at random moments, resumes them until they end, and
compares what they leave with a run that nobody killed.

    python -m experiments.crashes
        20 runs of one process: everything must be bit-identical; then 20 tries of each of FAULTS,
        whose table says in how many the fault was refused, or left no trace
    python -m experiments.crashes --runs 6 --ranks 2 --zero 2
        losses to a relative 1e-6, everything else equal

Half of the kills are aimed at the writing of a checkpoint, some at that of the final model: they
come while a `.part-` folder is there. A killed process loses nothing that it has written; what a
power cut does to a disk is not tried here.
"""

import argparse
import json
import os
import random
import shutil
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
FLAGS = ["--sources", "sources.json", "--model", "toy", "--batch-size", "12",
         "--micro-tokens", "128", "--precision", "fp32", "--lr", "1e-3", "--eval-every", "10"]


# the runs

def make_toy(folder: Path) -> None:
    """sources.json, two sources of 60 rows, which a run passes over many times, and `toy`, a
    JinaBERT with dropout 0.1."""
    for name in ("left", "right"):
        rows = [[toy_text(name, i, 1), toy_text(name, i, 2)] for i in range(60)]
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    sources = [{"name": "left", "path": "left.jsonl", "rate": 1},
               {"name": "right", "path": "right.jsonl", "rate": 2}]
    (folder / "sources.json").write_text(json.dumps(sources))
    torch.manual_seed(0)
    config = model.JinaBertConfig(vocab_size=20, hidden_size=32, num_hidden_layers=2,
                                  num_attention_heads=2, intermediate_size=32)
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = transformers.BertTokenizer(vocab=vocabulary, model_max_length=8192)
    model.save(model.PooledEncoder(model.JinaBertModel(config)), tokenizer, folder / "toy")


def toy_text(name: str, i: int, m: int) -> str:
    """3 to 6 letters that follow from i and m, and a name."""
    letters = [WORDS[5 + (i * m + i // 10 * j) % 10] for j in range(3 + i % 4)]
    return " ".join([*letters, f"{name}{i} {m}"])


def launcher(ranks: int) -> list[str]:
    if ranks == 1:
        return []
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]


def start(folder: Path, command: list) -> subprocess.Popen:
    """`python COMMAND` in the folder, on one thread (the toy is too small for more); it adds its
    output to folder/log."""
    with open(folder / "log", "a") as log:
        return subprocess.Popen([sys.executable, *map(str, command)], cwd=folder, stdout=log,
                                stderr=log, env=os.environ | {
                                    "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TRAIN.parent)})


def family(process: subprocess.Popen) -> list[int]:
    """The process and all it has started. (torchrun starts each rank in a session of its own: a
    process group misses them.)"""
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
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def last_step(run: Path) -> int:
    return max((line["step"] for line in lines(run)), default=-1)


def parts(run: Path) -> list[Path]:
    return [*run.glob("*.part*"), *run.glob(CHECKPOINT)]


# the kills

def kill(process: subprocess.Popen, run: Path, draw: random.Random, aim: str | None) -> str | None:
    """Kills a run at a random point of the steps before it or, with an aim, in the next such
    writing after that -> where it was, or None where it ended by itself."""
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
    where = f"{max(last_step(run), 0)}"
    return f"{where} while writing" if parts(run) else where


def crashed(folder: Path, name: str, train: list, draw: random.Random, aim: str | None, kills: int
            ) -> tuple[Path, str]:
    """One run that is killed up to `kills` times and resumed until it ends -> its folder, and what
    became of it in words."""
    run, story = folder / name, []
    process = start(folder, [*train, "--out", name])
    for _ in range(kills):
        where = kill(process, run, draw, aim)
        if where is None:
            break
        if (run / "model").is_dir():  # it had nothing left to do
            return run, "; ".join([*story, f"killed at step {where}, when all was written"])
        checkpoints = (run / "checkpoints").glob("*")
        saved = sorted(path.name for path in checkpoints if path.name.isdigit())
        process = start(folder, [*train, "--out", run.name, "--resume"])
        if saved:
            story.append(f"killed at step {where}, resumed from {int(saved[-1])}")
        else:
            story.append(f"killed at step {where}, begun anew")
            expect_no_checkpoint(process, run.name, folder / "log")
            run = run.with_name(f"{run.name}-anew")
            process = start(folder, [*train, "--out", run.name])
        aim = draw.choice((None, None, CHECKPOINT, MODEL))
    if process.wait():
        raise RuntimeError(
            f"{run.name}: ends with {process.returncode} after it was " + "; ".join(story))
    return run, "; ".join(story) or "ended before it was killed"


def expect_no_checkpoint(process: subprocess.Popen, name: str, log: Path) -> None:
    """--resume has to say so where there is none."""
    status = process.wait()
    if not status or f"{name} holds no complete checkpoint" not in log.read_text():
        raise RuntimeError(f"{name}: --resume without a checkpoint ended with {status}")


# the comparison

def differences(run: Path, whole: Path, exact: bool) -> list[str]:
    """What of a run is not as in the uninterrupted one: its lines, each step once and in order, its
    weights, moments and random states, byte by byte. exact=False: losses to 1e-6, and no
    weights."""
    ours, theirs, found = lines(run), lines(whole), []
    pairs = list(zip(ours, theirs))
    tolerance = 0 if exact else 1e-6
    if [line["step"] for line in ours] != [line["step"] for line in theirs]:
        found.append("steps")
    if any(a.get("rows") != b.get("rows") for a, b in pairs):
        found.append("rows")
    losses = [(a.get("loss", 0), b.get("loss", 0)) for a, b in pairs]
    if any(not abs(a - b) <= tolerance * abs(b) for a, b in losses):  # not: NaN is no loss
        found.append("losses")
    if exact:
        if any(a.get("evaluation") != b.get("evaluation") for a, b in pairs):
            found.append("evaluations")
        last = f"checkpoints/{STEPS:08d}"
        for file in ("model/model.safetensors", f"{last}/optimizer.safetensors",
                     f"{last}/random.safetensors"):
            if (run / file).read_bytes() != (whole / file).read_bytes():
                found.append(file)
    return found + [f"{path.name} is left over" for path in parts(run)]


# the faults: each tried in a folder with the run `whole` -> whether it was survived, what was said

def end(folder: Path, *commands: list) -> tuple[list[int], str]:
    """Runs them at once -> their exit statuses, sorted, and the error that one has named."""
    (folder / "log").unlink()
    statuses = sorted(process.wait() for process in [start(folder, c) for c in commands])
    said = (folder / "log").read_text().replace("\r", "\n").splitlines()
    return statuses, next((line for line in said if line.startswith(("train", "curation:"))), "")


def resumed(folder: Path) -> tuple[Path, list]:
    """`whole` as it was before its last checkpoint, and what goes on with it."""
    run = folder / "again"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(folder / "whole", run)
    for path in (run / "model", run / f"checkpoints/{STEPS:08d}"):
        shutil.rmtree(path)
    return run, [TRAIN, "--resume", "--out", run.name]


def resume_twice(folder: Path, draw: random.Random) -> tuple[bool, str]:
    run, command = resumed(folder)
    statuses, said = end(folder, command, command)
    return statuses == [0, 2] and not differences(run, folder / "whole", exact=True), said


def filter_twice(folder: Path, draw: random.Random) -> tuple[bool, str]:
    command = "-m curation filter --sources sources.json --model toy --pool 50 --out".split()
    if not (folder / "alone").exists():
        end(folder, [*command, "alone"])
    shutil.rmtree(folder / "filtered", ignore_errors=True)
    statuses, said = end(folder, *[[*command, "filtered"]] * 2)
    alone, rows = ((folder / name / "right.jsonl").read_bytes() for name in ("alone", "filtered"))
    return statuses == [0, 2] and rows == alone, said


def flip_a_bit(folder: Path, draw: random.Random) -> tuple[bool, str]:
    """In a file of the newest checkpoint, or of what is kept of a source."""
    run, resume = resumed(folder)
    begin = [TRAIN, *FLAGS, "--out", "never"]
    place, command = draw.choice([(run / "checkpoints", resume), (folder / ".cache", begin)])
    path = draw.choice([path for path in place.rglob("*") if path.is_file() and path.read_bytes()])
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(flipped)
    statuses, said = end(folder, command)
    path.write_bytes(content)
    return statuses == [2], said


FAULTS = resume_twice, filter_twice, flip_a_bit


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", "--tries", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--zero", help="ZeRO stage; unset: train.py's default")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(argv)
    draw = random.Random(args.seed)
    different = killed = writing = to_the_bit = 0
    aims = (None, CHECKPOINT, None, CHECKPOINT, MODEL)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        log, whole = folder / "log", folder / "whole"
        make_toy(folder)
        train = [*launcher(args.ranks), TRAIN, *FLAGS, "--steps", STEPS, "--save-every", SAVE_EVERY]
        if args.zero:
            train += ["--zero", args.zero]
        if start(folder, [*train, "--out", whole.name]).wait():
            sys.exit(log.read_text())
        for i in range(args.runs):
            name, kills = f"run{i + 1:02d}", draw.choice((1, 1, 2))
            try:
                run, story = crashed(folder, name, train, draw, aims[i % len(aims)], kills)
                found = differences(run, whole, exact=args.ranks == 1)
                to_the_bit += not differences(run, whole, exact=True)
            except RuntimeError as error:
                story, found = str(error), ["its end", log.read_text()[-2000:]]
            verdict = f"NO: {', '.join(found)}" if found else "yes"
            print(f"{i + 1:2}: {story}; identical: {verdict}", flush=True)
            different += bool(found)
            killed += story.count("killed at")
            writing += story.count("writing")
        print(f"{args.runs} runs of {STEPS} steps on {args.ranks} rank(s), killed {killed} times, "
              f"{writing} of them while writing: {args.runs - different} as the uninterrupted run, "
              f"{to_the_bit} of them to the last bit")
        print("| fault | tries | survived | said |\n| --- | ---: | ---: | --- |")
        for fault in FAULTS if args.ranks == 1 else ():
            tried = [fault(folder, draw) for _ in range(args.runs)]
            survived = sum(good for good, _ in tried)
            different += args.runs - survived
            print(f"| {fault.__name__} | {args.runs} | {survived} | {tried[0][1]} |", flush=True)
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
