"""Runs on several ranks that are told to stop, lose a rank or find the disk full, and go on, as
many ranks or others; and two of the runs that experiments/crashes.py kills. All against one run of
one process, with dropout off.
"""

import json
import os
import shutil
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

import train
from experiments import crashes
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is installed on Linux alone")
FLAGS = [*crashes.FLAGS, "--steps", "12", "--save-every", "100", "--dropout", "0"]

# train.py with slow steps, so that a signal arrives between them; it notes its process and how it
# ended.
SLOW = """
import os, sys, time
import train
step_loss, rank = train.step_loss, os.environ["RANK"]
open("pid" + rank, "w").write(str(os.getpid()))

def slow(*inputs):
    time.sleep(0.3)
    return step_loss(*inputs)

train.step_loss = slow
train.main(sys.argv[1:])
open("ended" + rank, "w").write("well")
"""

# The ranks of a run as forks of one process, which imports once what each would take seconds to.
# Prints how they ended. --full: the disk is full at the checkpoint of step 8. There is no disk of
# our own to fill, so the writing is patched.
FORKS = """
import os, socket, sys
os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed, train
from plumbing import checkpoint

save_file, world_size, ranks = checkpoint.save_file, int(sys.argv[1]), []
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]

def full(tensors, path):
    if "00000008" in str(path):
        raise OSError(28, "No space left on device")
    save_file(tensors, path)

if "--full" in sys.argv:
    sys.argv.remove("--full")
    checkpoint.save_file = full
for rank in range(world_size):
    ranks.append(os.fork())
    if not ranks[-1]:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        sys.exit(train.main(sys.argv[2:]))
print("ended with", [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks])
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with a toy corpus, a toy model and `whole`, the run of one process that the others
    are held against."""
    folder = tmp_path_factory.mktemp("crashes")
    crashes.make_toy(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main([*FLAGS, "--out", "whole"])
    return folder


@pytest.fixture
def in_toy(toy, monkeypatch):
    monkeypatch.chdir(toy)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Path("log").unlink(missing_ok=True)


def torchrun(*flags):
    """The slow train.py on 2 ranks."""
    for name in ("pid0", "pid1", "ended0", "ended1", "log"):
        Path(name).unlink(missing_ok=True)
    Path("slow.py").write_text(SLOW)
    return crashes.start(Path(), [*crashes.launcher(2), "slow.py", *flags])


def forks(ranks, *flags):
    """train.py on forked ranks -> what they printed."""
    Path("log").unlink(missing_ok=True)
    Path("forks.py").write_text(FORKS)
    crashes.start(Path(), ["forks.py", ranks, *flags]).wait(timeout=120)
    return said()


def said():
    """What a run has printed but for its progress bar, line by line."""
    printed = [line.rpartition("\r")[2].strip() for line in Path("log").read_text().splitlines()]
    return [line for line in printed if line and "step/s" not in line]


def count(words):
    return sum(words in line for line in said())


def wait_for(step, run, process):
    while crashes.last_step(Path(run)) < step:
        assert process.poll() is None, said()
        time.sleep(0.05)


def saved(run):
    return sorted(os.listdir(Path(run, "checkpoints")))


def assert_as_the_whole_run(run):
    """Each step once, the same rows, the loss to 1e-4."""
    ours, theirs = ([line for line in crashes.lines(Path(name)) if "loss" in line]
                    for name in (run, "whole"))
    assert [line["step"] for line in ours] == list(range(1, 13))
    assert [line["rows"] for line in ours] == [line["rows"] for line in theirs]
    losses = [line["loss"] for line in theirs]
    assert [line["loss"] for line in ours] == pytest.approx(losses, rel=1e-4)
    assert Path(run, "model", "model.safetensors").exists() and not crashes.parts(Path(run))


# one process

def test_two_runs_killed_at_random_are_bit_identical_to_one_left_alone(capsys, monkeypatch):
    """Dropout 0.1, the second killed while it writes. Then a try of three faults."""
    faults = crashes.resume_twice, crashes.filter_twice, crashes.flip_a_bit
    monkeypatch.setattr(crashes, "FAULTS", faults)
    with pytest.raises(SystemExit) as stop:
        crashes.main(["--runs", "2", "--tries", "1"])
    printed = capsys.readouterr().out
    assert not stop.value.code and printed.count("killed at step") >= 2, printed
    assert printed.count("identical: yes") == 2 and "2 of them to the last bit" in printed


@pytest.mark.parametrize("change, said", [
    (lambda lines: lines.pop(5), "steps"),
    (lambda lines: lines.insert(5, lines[5]), "steps"),
    (lambda lines: lines[5].update(rows="0"), "rows"),
    (lambda lines: lines[5].update(loss=lines[5]["loss"] * (1 + 2e-6)), "losses")])
def test_what_differs_from_the_uninterrupted_run_is_seen(in_toy, change, said):
    shutil.copytree("whole", "other", dirs_exist_ok=True)
    assert crashes.differences(Path("other"), Path("whole"), exact=False) == []
    lines = crashes.lines(Path("other"))
    change(lines)
    Path("other/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert said in crashes.differences(Path("other"), Path("whole"), exact=False)


# many ranks

def test_sigterm_to_one_of_two_ranks_stops_both_and_one_process_or_three_ranks_go_on(
        in_toy, capsys):
    """torchrun's status is 0 as every rank's is. ZeRO 2 (the default there), then plain torch, and
    then ZeRO 3, where 3 ranks have shares of 11, 11 and 10 of a bias of 32."""
    process = torchrun(*FLAGS, "--out", "two")
    wait_for(3, "two", process)
    os.kill(int(Path("pid1").read_text()), signal.SIGTERM)
    assert process.wait(timeout=60) == 0, said()
    step = crashes.last_step(Path("two"))
    assert saved("two") == [f"{step:08d}"] and not Path("two/model").exists()
    encoder, engine, memory, peak, last = said()  # rank 0 alone speaks, and nothing but this
    assert encoder.startswith("toy: mean pooling") and "ZeRO 2 on 2 ranks" in engine
    assert "GB" in memory and peak.startswith("two: peak lr")
    assert f"step {step} of 12" in last and "--resume --out two" in last
    assert list(Path("two").rglob("metrics*")) == [Path("two/metrics.jsonl")]

    for run in ("one", "three"):
        shutil.copytree("two", run)
    train.main(["--resume", "--out", "one"])
    assert "one had 2 ranks, now 1" in capsys.readouterr().out
    assert_as_the_whole_run("one")
    lines = forks(3, "--resume", "--out", "three", "--zero", "3")
    assert lines[-1] == "ended with [0, 0, 0]", lines
    assert count("three had 2 ranks, now 3") == 1
    assert_as_the_whole_run("three")


def test_sigterm_to_torchrun_stops_all_ranks_and_a_rank_killed_later_is_named(in_toy):
    """A cluster's preemption; then --resume, a kill -9, and --resume on one process."""
    process = torchrun(*FLAGS, "--out", "run")
    wait_for(2, "run", process)
    process.terminate()
    process.wait(timeout=60)
    assert Path("ended0").exists() and Path("ended1").exists(), said()
    step = crashes.last_step(Path("run"))
    assert saved("run") == [f"{step:08d}"] and count("--resume --out run") == 1

    process = torchrun("--resume", "--out", "run")
    wait_for(step + 1, "run", process)
    os.kill(int(Path("pid1").read_text()), signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert count("train.py: lost rank 1 on ") == 1, said()
    assert saved("run") == [f"{step:08d}"]
    train.main(["--resume", "--out", "run"])
    assert_as_the_whole_run("run")


def test_a_full_disk_ends_every_rank_with_status_2_and_keeps_the_last_checkpoint(in_toy):
    lines = forks(2, "--full", *FLAGS, "--save-every", "4", "--out", "full")
    assert lines[-1] == "ended with [2, 2]", lines
    assert count("no space left on device; make room there") == 1, lines
    assert saved("full") == ["00000004"] and crashes.last_step(Path("full")) == 8
    train.main(["--resume", "--out", "full"])
    assert_as_the_whole_run("full")
