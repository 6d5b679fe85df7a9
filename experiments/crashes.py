"""Kills runs of train.py with `kill -9` at random moments, resumes them until they end, and
compares what they leave with a run that nobody killed.

    python -m experiments.crashes
        20 runs of one process: everything must be bit-identical; then 20 tries of each of FAULTS,
        whose table says in how many the fault was refused, or left no trace, and what was said
    python -m experiments.crashes --runs 6 --ranks 2 --zero 2
        losses to a relative 1e-6, everything else equal

Half of the kills are aimed at the writing of a checkpoint, some at that of the final model: they
come while a `.part-` folder is there. A killed process loses nothing that it has written; what a
power cut does to a disk is not tried here.
"""

import argparse
import contextlib
import gzip
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
from safetensors.torch import load_file

import model
from curation import cross_encoder

TRAIN = Path(__file__).parents[1] / "train.py"
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a b c d e f g h i j".split()
STEPS, SAVE_EVERY = 60, 4
CHECKPOINT, MODEL = "checkpoints/*.part-*", "model.part-*"  # what a kill is aimed at
FLAGS = ["--sources", "sources.json", "--model", "toy", "--batch-size", "12",
         "--micro-tokens", "128", "--precision", "fp32", "--lr", "1e-3", "--eval-every", "10"]
BEGIN = [TRAIN, *FLAGS, "--steps", "20", "--out", "never"]

# a default corpus of the standard library alone
BUILD = """
import sysconfig
from pathlib import Path
from corpora import installed_docs
from plumbing.refusals import run_command

if __name__ == "__main__":
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    run_command("installed_docs", lambda: installed_docs.build(Path("built"), {"a==1": files}), "")
"""


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


def make_more(folder: Path) -> None:
    """more/sources.json, a source of 600 rows, more than a reader's buffer holds, and `reranker`, a
    cross-encoder that ranks them rightly: a target has the letters of its query, and one more."""
    (folder / "more").mkdir()
    letters = random.Random(0).choices(WORDS[5:], k=600 * 8)
    rows = [letters[i : i + 8] for i in range(0, len(letters), 8)]
    lines = [json.dumps([" ".join(row), " ".join([*row, row[0]])]) + "\n" for row in rows]
    (folder / "more/more.jsonl").write_text("".join(lines))
    sources = [{"name": "more", "path": "more.jsonl", "rate": 1}]
    (folder / "more/sources.json").write_text(json.dumps(sources))
    network, tokenizer = cross_encoder.load(folder / "toy", new_head=True)
    torch.nn.init.constant_(network.classifier.weight, 10)
    cross_encoder.save(network, tokenizer, folder / "reranker")


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
    """Runs them at once -> their exit statuses, sorted, and what one has said."""
    (folder / "log").unlink()
    statuses = sorted(process.wait() for process in [start(folder, c) for c in commands])
    return statuses, said(folder)


def said(folder: Path) -> str:
    """The line in which a command has ended."""
    printed = (folder / "log").read_text().replace("\r", "\n").replace(f"{folder}/", "")
    names = "train.py: ", "curation: ", "evaluation: ", "installed_docs: "
    return next((line for line in printed.splitlines()[::-1] if line.startswith(names)), "")


def refused(folder: Path, path: Path, content: bytes | None, command: list) -> tuple[bool, str]:
    """Whether a command is, in a line that names the file, while that has this content, or is not
    there."""
    shutil.rmtree(folder / "never", ignore_errors=True)  # of a run that was not refused
    stat, before = path.stat(), path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    statuses, line = end(folder, command)
    path.write_bytes(before)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return statuses == [2] and path.name in line, line


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
    statuses, line = end(folder, command, command)
    return statuses == [0, 2] and not differences(run, folder / "whole", exact=True), line


def curate_twice(folder: Path, flags: str) -> tuple[bool, str]:
    command = ["-m", "curation", *flags.split()]
    alone, out = folder / f"{command[2]}-alone", folder / f"{command[2]}-twice"
    if not alone.exists():
        end(folder, [*command, "--out", alone.name])
    shutil.rmtree(out, ignore_errors=True)
    statuses, line = end(folder, *[[*command, "--out", out.name]] * 2)
    one, other = ([path.read_bytes() for path in sorted(place.glob("*.jsonl"))]
                  for place in (alone, out))
    return statuses == [0, 2] and one == other != [], line


def filter_twice(folder: Path, draw: random.Random) -> tuple[bool, str]:
    return curate_twice(folder, "filter --sources sources.json --model toy --pool 50")


def mine_twice(folder: Path, draw: random.Random) -> tuple[bool, str]:
    return curate_twice(folder, "mine --sources more/sources.json --retriever toy --rows 100 "
                                "--cross-encoder reranker --candidates 20 --chunk 50")


def flip_a_bit(folder: Path, draw: random.Random) -> tuple[bool, str]:
    """In a file of the newest checkpoint, or of what is kept of a source."""
    run, resume = resumed(folder)
    place, command = draw.choice([(run / "checkpoints", resume), (folder / ".cache", BEGIN)])
    path = draw.choice([path for path in place.rglob("*") if path.is_file() and path.read_bytes()])
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return refused(folder, path, content, command)


def lose_a_part(folder: Path, draw: random.Random) -> tuple[bool, str]:
    """Half of an index, where a source was in state.json, or a checkpoint's tokenizer."""
    run, resume = resumed(folder)
    rows, = folder.glob(".cache/*/left-*/rows")
    state, = run.glob("checkpoints/*/state.json")
    moved = json.loads(state.read_text())
    moved["sampler"]["sources"]["left"]["cursor"] += draw.randrange(1, 9)
    return refused(folder, *draw.choice([
        (rows, rows.read_bytes()[: rows.stat().st_size // 2], BEGIN),
        (state, json.dumps(moved).encode(), resume),
        (state.parent / "model/tokenizer.json", None, resume)]))


def change_a_source(folder: Path, draw: random.Random) -> tuple[bool, str]:
    """Edited, cut or shuffled in its place while a run reads it."""
    (folder / "log").unlink()
    shutil.rmtree(folder / "changed", ignore_errors=True)
    path, step = folder / "more/more.jsonl", draw.randrange(STEPS // 2)
    before = path.read_bytes()
    process = start(folder, [*BEGIN, "--sources", "more/sources.json", "--steps", STEPS,
                             "--out", "changed"])
    while process.poll() is None and last_step(folder / "changed") < step:
        time.sleep(0.01)
    shuffled = draw.sample(before.splitlines(keepends=True), before.count(b"\n"))
    with open(path, "r+b") as file:
        file.write(draw.choice([
            before.replace(b"a", b"b"), before[: len(before) // 2], b"".join(shuffled)]))
        file.truncate()
    status = process.wait()
    path.write_bytes(before)
    return status == 2 and "more/more.jsonl, line " in said(folder), said(folder)


def change_the_case(folder: Path, draw: random.Random) -> tuple[bool, str]:
    """Of a line of a source, before --resume."""
    path = folder / "left.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    line = draw.randrange(len(lines))
    lines[line] = lines[line].upper()
    caches = set(folder.glob(".cache/*/*"))
    found = refused(folder, path, b"".join(lines), resumed(folder)[1])
    for cache in set(folder.glob(".cache/*/*")) - caches:
        shutil.rmtree(cache)
    return found


def diverge(folder: Path, draw: random.Random) -> tuple[bool, str]:
    """No checkpoint has a number that is not finite, and if there is one, the advice is good."""
    shutil.rmtree(folder / "wild", ignore_errors=True)
    statuses, line = end(folder, [
        *BEGIN, "--lr", draw.choice(("1e10", "1e3")), "--seed", draw.randrange(1000),
        "--save-every", 1, "--out", "wild"])
    tensors = [tensor for path in folder.glob("wild/checkpoints/**/*.safetensors")
               for tensor in load_file(path).values()]
    good = statuses == [1] and all(tensor.isfinite().all() for tensor in tensors)
    if "--resume" in line:
        good &= end(folder, [TRAIN, "--resume", "--out", "wild", "--lr", "1e-3"])[0] == [0]
    return good, line


def stop_a_build(folder: Path, draw: random.Random) -> tuple[bool, str]:
    """By kill -9, SIGTERM or Ctrl-C, while others read files for it: none is left."""
    (folder / "log").unlink()
    (folder / "build.py").write_text(BUILD)
    process, number = start(folder, ["build.py"]), draw.choice(
        (signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
    while process.poll() is None and "file/s" not in (folder / "log").read_text():
        time.sleep(0.01)
    time.sleep(draw.random())
    pids = family(process)
    process.send_signal(number)
    status = process.wait()
    good = gone(pids) and status == (-number if number == signal.SIGKILL else 130)
    return good and not any(folder.glob("built/*/manifest.json")), said(folder)


def gone(pids: list[int], seconds: float = 10) -> bool:
    """Whether no such process is left after so many seconds."""
    until = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < until:
        time.sleep(0.05)
    return not alive(pids)


def alive(pids: list[int]) -> list[int]:
    found = []
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
                found.append(pid)
    return found


def long_line(folder: Path, draw: random.Random) -> tuple[bool, str]:
    """Of 64 MB and a byte, as it is or packed."""
    name, before = draw.choice(("long.jsonl", "long.jsonl.gz")), draw.randrange(5)
    with (gzip.open if name.endswith(".gz") else open)(folder / name, "wb") as file:
        file.write(b'["a b", "c d"]\n' * before + bytes((1 << 26) + 1))
    statuses, line = end(folder, ["-m", "evaluation", "toy", "--pairs", name])
    return statuses == [2] and f"{name}, line {before + 1}: longer than 64 MB" in line, line


FAULTS = (resume_twice, filter_twice, mine_twice, flip_a_bit, lose_a_part, change_a_source,
          change_the_case, diverge, stop_a_build, long_line)


def try_faults(folder: Path, tries: int, draw: random.Random) -> int:
    """Prints a table -> how many were not survived."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    make_more(folder)
    lost = 0
    print("| fault | tries | survived | said |\n| --- | ---: | ---: | --- |")
    for fault in FAULTS:
        tried = [fault(folder, draw) for _ in range(tries)]
        survived = sum(good for good, _ in tried)
        lost += tries - survived
        _, line = min(tried, key=lambda found: (found[0], not found[1]))  # what was lost, if any
        name = fault.__name__.replace("_", " ")
        print(f"| {name} | {tries} | {survived} | {line} |", flush=True)
    return lost


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="that are killed")
    parser.add_argument("--tries", type=int, default=20, help="of each fault, on one rank")
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
        if args.tries and args.ranks == 1:
            different += try_faults(folder, args.tries, draw)
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
