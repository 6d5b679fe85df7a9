"""What is shared, damaged or has diverged is refused in one line, whose advice works: nothing goes
on with status 0 and another result.
"""

import errno
import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import memory
import train
from curation.__main__ import main as curate
from curation.work import Work
from experiments import crashes
from plumbing import checkpoint, files
from tests.conftest import ROOT, python
from tests.test_checkpoint import save, trained

FLAGS = [*crashes.FLAGS, "--steps", "4", "--save-every", "2"]
HOST = files.HOST


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with a toy corpus, a toy model and `run`, with checkpoints of steps 2 and 4, and no
    model yet."""
    folder = tmp_path_factory.mktemp("faults")
    crashes.make_toy(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main([*FLAGS, "--out", "run"])
    shutil.rmtree(folder / "run/model")
    return folder


@pytest.fixture
def copy(toy, tmp_path, monkeypatch):
    """The current folder is a copy of it."""
    shutil.copytree(toy, tmp_path, dirs_exist_ok=True, copy_function=shutil.copy2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, call, *flags, status=2):
    """Runs it expecting this exit status -> the one line it said."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call([*map(str, flags)])
    said = [line.rpartition("\r")[2] for line in capsys.readouterr().err.splitlines()]
    said = [line for line in said if re.search("^train.py:|^curation:|Error", line)]
    assert stop.value.code == status and len(said) == 1, said
    return said[0]


def flip(path, byte=-5):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


def edit(change):
    def edited(path):
        state = json.loads(path.read_text())
        change(state)
        path.write_text(json.dumps(state))
    return edited


def remove_what_it_says(said):
    """Follows "remove PATH"."""
    path = Path(re.search(r"remove (\S+?)[,;]", said)[1])
    shutil.rmtree(path) if path.is_dir() else path.unlink()


# what is read is what was written

@pytest.mark.parametrize("file, damage", [
    ("model/model.safetensors", flip), ("optimizer.safetensors", flip),
    ("optimizer.safetensors", halve), ("random.safetensors", flip),
    ("model/tokenizer.json", Path.unlink), ("model/config.json", halve), ("state.json", flip),
    ("state.json", edit(lambda state: state["sampler"]["sources"]["left"].update(cursor=7))),
    ("checksums.json", halve), ("checksums.json", flip), ("checksums.json", Path.unlink)])
def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(copy, capsys, file, damage):
    damage(copy / "run/checkpoints/00000004" / file)
    said = refused(capsys, train.main, "--resume", "--out", "run")
    assert ("run/checkpoints/00000004/" + file) in said or damage is flip
    remove_what_it_says(said)
    train.main(["--resume", "--out", "run"])
    assert crashes.last_step(Path("run")) == 4 and Path("run/model").is_dir()


def test_the_only_checkpoint_has_none_before_it(copy, capsys):
    shutil.rmtree("run/checkpoints/00000002")
    flip(copy / "run/checkpoints/00000004/optimizer.safetensors")
    said = refused(capsys, train.main, "--resume", "--out", "run")
    assert "begin anew with another --out" in said


@pytest.mark.parametrize("change", [
    lambda state: state.update(step=3), lambda state: state.update(step="4"),
    lambda state: state.pop("step"), lambda state: state.update(args=[]),
    lambda state: state.update(chosen=3), lambda state: state.pop("sampler"),
    lambda state: state["args"].update(lr="fast"), lambda state: state["args"].update(stage=4),
    lambda state: state["args"].update(batch_size=1.5),
    lambda state: state["args"].update(steps=True),
    lambda state: state["args"].update(tau=-1.0), lambda state: state["args"].update(lrr=1.0),
    lambda state: state["args"].update(checkpoint_layers="yes"),
    lambda state: state["args"].pop("model"),
    lambda state: state["chosen"].update(micro_tokens=0.5),
    lambda state: state["loss_scale"].update(scale="x"),
    lambda state: state["loss_scale"].update(scales=1.0),
    lambda state: state["loss_scale"].update(skipped=-1),
    lambda state: state["sampler"].update(step=3),
    lambda state: state["sampler"].update(seed=1),
    lambda state: state["sampler"].update(corpus=3),
    lambda state: state["sampler"].update(sources=[]),
    lambda state: state["sampler"]["sources"].pop("left"),
    lambda state: state["sampler"]["sources"]["left"].pop("cursor"),
    lambda state: state["sampler"]["sources"]["left"].update(cursor=1000),
    lambda state: state["sampler"]["sources"]["left"].update(cursor=-1),
    lambda state: state["sampler"]["sources"]["left"].update(epoch="1"),
    lambda state: state["sampler"]["sources"]["left"].update(waiting=[10**6]),
    lambda state: state["sampler"]["sources"]["left"].update(waiting=3)])
def test_state_json_is_checked_as_a_whole(copy, capsys, change):
    """Also where the checksums are right."""
    state = copy / "run/checkpoints/00000004/state.json"
    edit(change)(state)
    edit(lambda sums: sums.update({state.name: files.checksum(state)}))(state.parent / files.SEAL)
    assert "checksum" not in refused(capsys, train.main, "--resume", "--out", "run")


@pytest.mark.parametrize("flag, value", [
    ("lr", "fast"), ("batch_size", 1.5), ("steps", True), ("stage", 4),
    ("checkpoint_layers", "yes")])
def test_a_flag_in_state_json_that_is_none_of_its_values_is_named(flag, value):
    state = {"step": 1, "args": {flag: value}, "chosen": {}, "loss_scale": {},
             "sampler": {"step": 1}}
    assert checkpoint.damage(state, 1, train.argument_parser()) == flag


@pytest.mark.parametrize("file, damage", [
    ("rows", halve), ("rows", flip), ("rows", Path.unlink)])
def test_a_damaged_index_is_named_and_made_again(copy, capsys, file, damage):
    data.load_sources("sources.json")
    for path in Path(".cache").glob(f"*/left-*/{file}"):
        damage(path)
    flags = [*FLAGS, "--out", "other"]
    said = refused(capsys, train.main, *flags)
    assert f"/{file}: found" in said
    remove_what_it_says(said + ",")
    train.main(flags)
    one, two = (Path(run, "checkpoints/00000004/optimizer.safetensors") for run in ("other", "run"))
    assert one.read_bytes() == two.read_bytes()


def test_the_tokenizer_of_the_sources_is_checked(copy):
    sources = data.load_sources("sources.json")
    data.train_tokenizer(sources, 100)
    path = next(Path(".cache").glob("*/tokenizer-*/tokenizer.json"))
    path.unlink()
    with pytest.raises(ValueError, match="tokenizer.json: found no file.*remove .*made again"):
        data.train_tokenizer(sources, 100)


def half_an_array(path):
    np.save(path, np.load(path)[:1])


@pytest.mark.parametrize("damage", [flip, halve, half_an_array])
def test_a_damaged_array_of_curation_is_named_and_made_again(copy, capsys, damage):
    work = Work("out", {})
    path = work.keep("pool-0", lambda: np.arange(6.0).reshape(3, 2))
    damage(path)
    with pytest.raises(ValueError, match="pool-0/array.npy: found.*made again") as error:
        Work("out", {}).keep("pool-0", lambda: None)
    assert "written were" in str(error.value)
    remove_what_it_says(str(error.value))
    again = Work("out", {}).keep("pool-0", lambda: np.ones(3))
    assert np.load(again).tolist() == [1, 1, 1]


def test_an_array_of_a_source_with_a_long_name_is_kept(copy):
    """255 characters are the most that a file system takes."""
    for name in ("a" * 240, "a" * 239 + "b", "\u00e9" * 240):
        path = Work("out", {}).keep(name, lambda: np.array([len(set(name))]))
        assert Work("out", {}).keep(name, lambda: None) == path
        assert np.load(path).tolist() == [len(set(name))]


# one process at a time

HOLD = """
import sys, time
from pathlib import Path
from plumbing import files
files.lock(Path(sys.argv[1]), shared=len(sys.argv) > 2)
print("held", flush=True)
time.sleep(60)
"""


def start_python(code, *arguments):
    """A process, when it has said something."""
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert process.stdout.readline()
    return process


@pytest.fixture
def holder():
    """Starts processes that hold a folder, and ends them."""
    started = []

    def start(*arguments):
        started.append(start_python(HOLD, *arguments))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("how", [[], ["as one of several ranks"]])
def test_a_run_where_another_process_is_at_work_is_not_gone_on_with(copy, capsys, holder, how):
    """And is where that one was killed."""
    before = Path("run/metrics.jsonl").read_bytes()
    process = holder("run", *how)
    said = refused(capsys, train.main, "--resume", "--out", "run")
    assert re.search(rf"run: at work there: .*process {process.pid} on ", said)
    assert Path("run/metrics.jsonl").read_bytes() == before
    process.kill()
    process.wait()
    train.main(["--resume", "--out", "run"])


def test_ranks_share_a_run(tmp_path, holder):
    first, second = holder(tmp_path, "shared"), holder(tmp_path, "shared")
    with pytest.raises(BlockingIOError, match=f"{first.pid} on .*{second.pid} on "):
        files.lock(tmp_path)


def test_a_folder_is_not_let_go_of_where_it_is_held_in_another_way(tmp_path, monkeypatch):
    def tried(file, how):
        with open(tmp_path / ".lock") as another, pytest.raises(BlockingIOError):
            flock(another, fcntl.LOCK_EX | fcntl.LOCK_NB)
        flock(file, how)

    files.lock(tmp_path)
    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", tried)
    files.lock(tmp_path, shared=True)


def test_who_held_a_folder_before_is_not_named_beside_who_does(tmp_path):
    (tmp_path / ".lock").write_text("process 1 on elsewhere\n")
    files.lock(tmp_path)
    assert re.fullmatch(f"process {os.getpid()} on .*\n", (tmp_path / ".lock").read_text())


def test_where_a_file_system_has_no_locks_that_is_said_once(tmp_path, capsys, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    files.lock(tmp_path)
    files.lock(tmp_path, shared=True)
    said, = capsys.readouterr().out.splitlines()
    assert said.startswith(f"{tmp_path}: cannot be locked ([Errno ") and "nothing else" in said


@pytest.mark.parametrize("file, said", [
    ("out/manifest.json", "is not empty; choose another"),
    ("out.work/identity.json", "holds the work of another command, with another seed")])
def test_what_another_process_does_until_the_lock_is_had_is_seen(copy, monkeypatch, file, said):
    """It ends well, or begins and is killed."""
    def lock(folder):
        for path in (copy / "out", copy / "out.work/array"):
            path.mkdir(exist_ok=True)
        (copy / file).write_text('{"seed": 1}')

    monkeypatch.setattr("curation.work.lock", lock)
    with pytest.raises(ValueError, match=said):
        Work("out", {"seed": 0})


def test_of_two_curations_of_one_out_the_second_ends_with_2(copy, capsys, holder):
    Path("out.work").mkdir()
    process = holder("out.work")
    flags = "filter", "--sources", "sources.json", "--model", "toy", "--pool", 50, "--out", "out"
    assert f"out.work: at work there: process {process.pid} on" in refused(capsys, curate, *flags)
    assert os.listdir("out.work") == [".lock"]
    process.kill()
    process.wait()
    curate([*map(str, flags)])
    assert Path("out/manifest.json").is_file() and not Path("out.work").exists()


# what the dead left

@pytest.fixture
def dead():
    """The number of a process that was."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_parts_of_dead_processes_are_swept_and_no_others(tmp_path, dead):
    swept = f"a.part-{dead}", f"b.part-{dead}-{HOST}"
    stay = (f"c.part-{os.getpid()}", f"d.part-{os.getpid()}-{HOST}", f"e.part-{dead}-elsewhere",
            "f.part-one", "g.part-1", "h.part-99999999999999999999", "i")
    for name in (*swept, *stay):
        (tmp_path / name).mkdir()
    files.sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == list(stay)


def test_a_part_of_another_user_s_process_stays(tmp_path, monkeypatch):
    def not_permitted(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    (tmp_path / "a.part-1").mkdir()
    monkeypatch.setattr(os, "kill", not_permitted)
    files.sweep(tmp_path)
    assert os.listdir(tmp_path) == ["a.part-1"]


def test_beside_out_what_is_named_like_a_part_by_somebody_else_stays(tmp_path, dead):
    for name in (f"out.part-{dead}", f"other.part-{dead}-{HOST}", f"out.part-{dead}-{HOST}"):
        (tmp_path / name).mkdir()
    Work(str(tmp_path / "out"), {})
    assert sorted(os.listdir(tmp_path)) == [
        f"other.part-{dead}-{HOST}", f"out.part-{dead}", "out.work"]
    (tmp_path / f"out.work/pool-0.part-{dead}-{HOST}").mkdir()
    Work(str(tmp_path / "out"), {})
    assert sorted(os.listdir(tmp_path / "out.work")) == [".lock", "identity.json"]


PUBLISH = """
import sys, time
from pathlib import Path
from plumbing import files
files.publish(Path(sys.argv[1]), lambda part: (print("writing", flush=True), time.sleep(60)))
"""


def test_kill_9_while_a_cache_is_written_leaves_nothing_after_the_next_start(copy):
    cache = next(Path(".cache").iterdir())
    process = start_python(PUBLISH, cache / "new")
    data.load_sources("sources.json")
    assert len(list(cache.glob("*.part-*"))) == 1  # its writer is alive
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    data.load_sources("sources.json")
    assert not list(cache.glob("*.part-*"))


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is installed on Linux alone")
def test_a_lock_that_a_killed_compiler_left_keeps_nobody_waiting(copy, monkeypatch):
    """torch's, for an op of DeepSpeed's: it waits for that without end, and without a word."""
    lock = copy / "extensions/deepspeed_shm_comm/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(copy / "extensions"))
    run = python(ROOT / "train.py", *FLAGS, "--zero", "2", "--out", "zero")
    assert run.returncode == 0, run.stderr


# a run that diverges

@pytest.mark.parametrize("lr, kept", [("1e10", []), ("1e3", ["00000001"])])
def test_a_run_that_diverges_keeps_a_checkpoint_worth_going_on_from(copy, capsys, lr, kept):
    """The one right before the loss that is not finite gives that loss again, and is put aside; the
    advice, followed, ends well."""
    flags = [*FLAGS, "--save-every", "1", "--steps", "6", "--out", "wild", "--lr"]
    said = refused(capsys, train.main, *flags, lr, status=1)
    assert sorted(path.name for path in Path("wild/checkpoints").glob("*[0-9]")) == kept
    for path in Path("wild/checkpoints").rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path
    if kept:
        assert said.endswith("--resume --out wild with a lower --lr goes on from step 1")
        train.main(["--resume", "--out", "wild", "--lr", "1e-3"])
        assert crashes.last_step(Path("wild")) == 6
    else:
        assert "no checkpoint" in said and "another --out" in said


def test_a_run_whose_last_steps_were_skipped_goes_on_from_before_them(copy, capsys, monkeypatch):
    """As in fp16, where a lower loss scale is tried first: steps 4, 5 and 6 change nothing, so the
    checkpoint of step 4 has the weights of step 3."""
    survives, norms = memory.LossScale.survives, []

    def none_from_step_4_on(scaling, norm):
        norms.append(norm)
        if len(norms) < 4:
            scaling.scale = 4.0
        return survives(scaling, norm if len(norms) < 4 else math.inf)

    monkeypatch.setattr(memory.LossScale, "survives", none_from_step_4_on)
    said = refused(capsys, train.main, *FLAGS, "--steps", 8, "--out", "wild", status=1)
    assert said.startswith("train.py: step 6, source ") and said.endswith(
        "wild/checkpoints/00000004 is now 00000004.diverged; --resume --out wild with a lower --lr "
        "goes on from step 2")


@pytest.mark.parametrize("what", ["weight", "moment"])
def test_no_checkpoint_is_written_of_what_is_not_finite(tmp_path, what):
    engine = trained()
    save(tmp_path, 1, engine)
    with torch.no_grad():
        tensor = next(engine.encoder.parameters())
        if what == "moment":
            tensor = engine.optimizer.state[tensor]["exp_avg_sq"]
        tensor[0] = float("nan")
    with pytest.raises(FloatingPointError, match="step 2: weight.* goes on from step 1$"):
        save(tmp_path, 2, engine)
    assert checkpoint.newest(str(tmp_path)).state["step"] == 1
