"""Files and flags with 200 seeded mutations, thrown at the commands: each does what it should, or
ends with status 1 or 2 and one line."""

import json
import math
import random
import re
import shutil
import signal
from pathlib import Path

import pytest

import train
from curation.__main__ import main as curate
from evaluation.__main__ import main as evaluate
from experiments import crashes
from tests.conftest import FLAGS

TRAIN = [*FLAGS, "--steps", "2", "--out", "new"]
COMMANDS = {  # command, its flags, what it reads and what it may be given
    "train": (train.main, TRAIN,
              "sources.json left.jsonl toy/*.json toy/*/*.json",
              "sources batch-size negatives max-length prompts model dropout precision memory "
              "micro-tokens zero steps lr warmup weight-decay clip seed out save-every eval-every "
              "tau stage"),
    "resume": (train.main, ["--resume", "--out", "run", "--steps", "3"],
               "run/metrics.jsonl run/checkpoints/*/*.json run/checkpoints/*/model/*.json "
               "run/checkpoints/*/*.safetensors right.jsonl",
               "steps save-every eval-every lr seed batch-size out"),
    "evaluation": (evaluate, ["toy", "--pairs", "left.jsonl"],
                   "left.jsonl toy/*.json toy/*/*.json",
                   "pairs scored labelled beir max-length prompts micro-tokens seed"),
    "curation": (curate, ["filter", "--sources", "sources.json", "--model", "toy", "--pool", "50",
                          "--out", "new"],
                 "sources.json right.jsonl toy/*.json",
                 "sources max-length prompts micro-tokens chunk seed rows batch-size model pool "
                 "top-k out"),
}
VALUES = [None, True, -1, 0, 1.5, 10**30, 1e308, math.nan, "", "x", "\0", "\ud800", [], {}, [[]],
          {"x": 1}, "1" * 5000]
FLAG_VALUES = ["-1", "0", "nan", "inf", "1e400", "9" * 30, " ", "x", "[]", "{", '{"query": 1}', "/",
               "left.jsonl", "toy", "sources.json", "\0", "x" * 5000, "1e-320"]


# mutations

def mutate_bytes(path, draw):
    raw = bytearray(path.read_bytes())
    at = draw.randrange(len(raw))
    kind = draw.choice(["cut", "flipped", "doubled", "zeroed", "lost"])
    if kind == "cut":
        del raw[at:]
    elif kind == "flipped":
        raw[at] ^= 1 << draw.randrange(8)
    elif kind == "doubled":
        raw[at:at] = raw[:at]
    elif kind == "zeroed":
        raw[at : at + 100] = bytes(len(raw[at : at + 100]))
    else:
        del raw[at : at + 20]
    path.write_bytes(raw)
    return f"{kind} at {at}"


def mutate_file(path, draw):
    kind = draw.choice(["removed", "a folder", "empty"])
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    return kind


def mutate_json(path, draw):
    """A value of a JSON file, or of a line, swapped, left out, or under another name."""
    text = path.read_text()
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    number = draw.randrange(len(lines))
    value = json.loads(lines[number])
    places = list(containers(value))
    where = draw.choice(places)
    key = draw.choice(list(where) if isinstance(where, dict) else range(len(where)))
    kind = draw.choice(["swapped", "swapped", "left out", "renamed"])
    old = where.pop(key)
    said = f"{key}: {str(old)[:40]} {kind}"
    if kind != "left out":
        new = old if kind == "renamed" else draw.choice(VALUES)
        said += f" {str(new)[:40]!r}"
        if isinstance(where, dict):
            where[f"{key}x" if kind == "renamed" else key] = new
        else:
            where.insert(key, new)
    lines[number] = json.dumps(value)
    path.write_text("\n".join(lines) + "\n")
    return said


def containers(value):
    """What is not empty of the lists and objects in it."""
    if isinstance(value, dict | list) and value:
        yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from containers(part)


def mutation(name, draw):
    """Mutates something in the current folder -> (the command's arguments, what was done)."""
    _, argv, files, flags = COMMANDS[name]
    if draw.random() < 0.3:
        flag, value = draw.choice(flags.split()), draw.choice(FLAG_VALUES)
        return [*argv, f"--{flag}={value}"], f"--{flag}={value[:40]!r}"
    path = draw.choice(sorted(path for glob in files.split() for path in Path().glob(glob)))
    how = draw.choice([mutate_bytes, mutate_file, mutate_json, mutate_json, mutate_json])
    if path.suffix not in (".json", ".jsonl"):
        how = mutate_bytes
    return argv, f"{path}: {how(path, draw)}"


# what is right

def check_result(name, printed):
    if name == "evaluation":
        found = json.loads(printed)
        assert 0 <= found["mrr"] <= 1 and found["targets"] > 0
    elif name == "curation":
        assert json.loads(Path("new/manifest.json").read_text())
    else:
        out, steps = ("new", 2) if name == "train" else ("run", 3)
        lines = crashes.lines(Path(out))
        losses = [line["loss"] for line in lines if "loss" in line]
        assert len(losses) == steps and math.isfinite(losses[-1])  # the one taken now
        assert Path(out, "model", "config.json").is_file()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the commands read, and a run of two steps."""
    folder = tmp_path_factory.mktemp("whole")
    crashes.make_toy(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main([*TRAIN[:-1], "run"])
    return folder


@pytest.mark.parametrize("seed", range(200))
def test_what_is_mutated_is_right_or_refused_in_one_line(
        whole, tmp_path, monkeypatch, capfd, seed):
    draw = random.Random(seed)
    monkeypatch.chdir(shutil.copytree(whole, tmp_path / "here"))
    monkeypatch.setattr("plumbing.files.sync", lambda path: None)
    name = draw.choice(list(COMMANDS))
    argv, done = mutation(name, draw)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"{name}, {done}: no end"))
    signal.alarm(120)
    capfd.readouterr()
    try:
        COMMANDS[name][0](argv)
        status = 0
    except SystemExit as stop:
        status = stop.code
    except Exception as error:
        raise AssertionError(f"{name}, {done}: a traceback") from error
    finally:
        signal.alarm(0)
    printed, said = capfd.readouterr()
    print(f"{name}, {done}: {status}\n{said}")
    if status == 0:
        return check_result(name, printed.splitlines()[-1] if printed else "")
    lines = [line for line in said.splitlines()
             if re.match(r"(train\.py|curation|evaluation|.*: error): ", line)]
    assert status in (1, 2) and len(lines) == 1 and len(lines[0]) > 20
    assert "Traceback" not in said and "[Errno" not in said
