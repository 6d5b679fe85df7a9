"""A checkpoint is complete or absent, the newest is found, the old ones go, and a damaged one is
named; and the folder of a run.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

import memory
from plumbing import checkpoint, files, run
from plumbing.ranks import Ranks
from tests.conftest import ROOT, without_rights

ALONE = Ranks(alone=True)


def engine_of(layer):
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    return memory.Engine(layer, optimizer, 1.0, memory.LossScale(torch.float32))


def trained():
    """The engine of a linear layer, after two steps of AdamW."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    engine = engine_of(layer)
    for _ in range(2):
        layer(torch.ones(3)).sum().backward()
        engine.step(1e-3)
    return engine


def save(folder, step, engine=None, write_model=lambda part: part.mkdir()):
    state = {"step": step, "args": {"precision": "fp32"}, "chosen": {},
             "loss_scale": {"skipped": 7}, "sampler": {"step": step}}
    checkpoint.save(folder, state, write_model, engine or trained(), ALONE)


def saved(folder):
    return sorted(os.listdir(folder / "checkpoints"))


# checkpoints

def test_moments_loss_scale_and_random_state_come_back(tmp_path):
    engine = trained()
    torch.manual_seed(5)
    save(tmp_path, 2, engine)
    expected = torch.rand(3)
    again = engine_of(engine.encoder)
    checkpoint.restore(checkpoint.newest(str(tmp_path)), again, "fp32", ALONE)
    assert torch.equal(torch.rand(3), expected) and again.scaling.skipped == 7
    for parameter in engine.encoder.parameters():
        before, after = (e.optimizer.state[parameter] for e in (engine, again))
        assert set(after) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(after[kind], before[kind]) for kind in after)


def test_a_parameter_of_no_elements_is_saved_too(tmp_path):
    """A BERT's token types, where its type_vocab_size is 0: they have no least and no largest."""
    engine = trained()
    engine.encoder.token_types = torch.nn.Embedding(0, 2)
    save(tmp_path, 2, engine)
    assert saved(tmp_path) == ["00000002"]


def test_in_another_precision_the_loss_scale_begins_anew(tmp_path):
    save(tmp_path, 2)
    again = trained()
    checkpoint.restore(checkpoint.newest(str(tmp_path)), again, "bf16", ALONE)
    assert again.scaling.skipped == 0


def test_the_two_newest_stay_and_the_newest_is_found(tmp_path):
    for step in (5, 10, 100):
        save(tmp_path, step)
    assert saved(tmp_path) == ["00000010", "00000100"]
    assert checkpoint.newest(str(tmp_path)).state["step"] == 100


def test_a_write_that_fails_leaves_the_last_one_and_no_trace(tmp_path):
    """A full disk raises OSError in the middle of writing."""
    save(tmp_path, 1)

    def full_disk(part):
        part.mkdir()
        (part / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, write_model=full_disk)
    assert saved(tmp_path) == ["00000001"]


@pytest.mark.parametrize("error", [
    Exception("No space left on device (os error 28)"), SafetensorError("I/O error")])
def test_the_libraries_errors_of_a_full_disk_become_one_oserror(tmp_path, error):
    """tokenizers raises a bare Exception, safetensors one of its own."""
    def write(part):
        raise error

    with pytest.raises(OSError, match="new.*(No space|I/O)"):
        files.publish(tmp_path / "new", write)
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_with_the_same_number_left_is_in_nobody_s_way(tmp_path):
    (tmp_path / f"new.part-{os.getpid()}-{files.HOST}").mkdir()
    files.publish(tmp_path / "new", lambda part: (part / "file").write_text("x"))
    assert os.listdir(tmp_path / "new") == ["file"]


def test_what_a_killed_process_left_half_written_is_no_checkpoint_and_goes_when_a_run_goes_on(
        tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "00000002.part-77").mkdir()
    (tmp_path / "model.part-77").mkdir()
    assert checkpoint.newest(str(tmp_path)).state["step"] == 1
    run.begin(tmp_path, first=2)
    assert saved(tmp_path) == ["00000001"] and not (tmp_path / "model.part-77").exists()


def truncate(name, size):
    return lambda path: os.truncate(path / name, size)


@pytest.mark.parametrize("damage, said", [
    (truncate("optimizer.safetensors", 40),
     r"optimizer\.safetensors.* found 40 bytes, .*written were \d+ bytes"),
    (lambda path: (path / "random.safetensors").unlink(), r"random\.safetensors.* found no file"),
    (truncate("state.json", 20), r"state\.json")])
def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path, damage, said):
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage(tmp_path / "checkpoints" / "00000002")
    with pytest.raises(ValueError, match=f"00000002/{said}.*remove .*00000002.* from 00000001"):
        checkpoint.newest(str(tmp_path))


NEWEST = """
import os
from pathlib import Path
from plumbing import checkpoint
path = Path("checkpoints/00000002")
for file in [*path.glob("*.*"), path]:
    mode = file.stat().st_mode
    file.chmod(0)
    try:
        checkpoint.newest(".")
    except OSError as error:
        print(file.name, type(error).__name__)
    file.chmod(mode)
"""


def test_of_a_checkpoint_that_may_not_be_read_nobody_says_that_it_is_damaged(tmp_path):
    """The advice would be to remove it."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    names = [path.name for path in (tmp_path / "checkpoints" / "00000002").glob("*.*")]
    tried = subprocess.run(
        [*without_rights(), sys.executable, "-c",
         NEWEST], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True)
    said = [f"{name} PermissionError" for name in [*names, "00000002"]]
    assert len(names) == 4 and sorted(tried.stdout.splitlines()) == sorted(said), tried


def test_what_diverges_again_takes_the_place_of_what_diverged_before(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    for _ in range(2):
        said = checkpoint.set_aside(tmp_path, since=2)
        assert saved(tmp_path) == ["00000001", "00000002.diverged"]
        assert "00000002.diverged; --resume" in said and said.endswith(" goes on from step 1")
        save(tmp_path, 2)


@pytest.mark.parametrize("make", [
    files.open_cache, lambda folder, write: files.publish(folder, write, replace=False)])
def test_a_cache_that_another_process_has_made_meanwhile_is_kept(tmp_path, make):
    """It may be reading it."""
    def write(part):
        (part / "file").write_text("ours")
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "file").write_text("theirs")

    make(tmp_path / "cache", write)
    assert os.listdir(tmp_path) == ["cache"]
    assert (tmp_path / "cache" / "file").read_text() == "theirs"


# the folder of a run

def test_runs_are_numbered_and_the_newest_is_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(run.free_run(None)) == "runs/001"
    (tmp_path / "runs" / "001-good").mkdir(parents=True)
    for name in ("001", "009", "1000"):
        save(tmp_path / "runs" / name, 1)
    assert str(run.free_run(None)) == "runs/1001"
    assert str(checkpoint.newest(None).run) == "runs/1000"


def test_an_explicit_folder_must_be_new_or_empty(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run.free_run(str(empty)) == empty
    (empty / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="empty.*--resume.*--out"):
        run.free_run(str(empty))


def test_of_two_runs_that_begin_at_once_the_second_is_refused(tmp_path, monkeypatch):
    """Both have found the same free number."""
    monkeypatch.chdir(tmp_path)
    first, second = run.free_run(None), run.free_run(None)
    run.begin(first, first=1)
    run.Metrics(first)(step=0)
    with pytest.raises(FileExistsError, match="runs/001/metrics.jsonl"):
        run.begin(second, first=1)
    assert (first / "metrics.jsonl").read_text() == '{"step": 0}\n'


@pytest.fixture
def another_process(monkeypatch):
    """From then on what this process holds is another's: the kernel goes by the open file."""
    return lambda: monkeypatch.setattr(files, "LOCKS", {})


def test_the_run_that_is_gone_on_with_is_held_before_it_is_looked_at(tmp_path, another_process):
    save(tmp_path, 1)
    checkpoint.newest(str(tmp_path))
    another_process()
    with pytest.raises(BlockingIOError, match="at work there"):
        checkpoint.newest(str(tmp_path))


def test_a_rank_that_outlives_its_launcher_keeps_others_out_and_lets_ranks_in(
        tmp_path, another_process):
    save(tmp_path, 1)
    run.Metrics(tmp_path, writes=False)
    another_process()
    run.Metrics(tmp_path, writes=False)
    with pytest.raises(BlockingIOError, match="at work there"):
        checkpoint.newest(str(tmp_path))


def test_a_run_that_has_begun_lets_other_ranks_in_and_no_other_run(tmp_path, another_process):
    save(tmp_path, 1)
    checkpoint.newest(str(tmp_path))
    run.begin(tmp_path, first=2)
    another_process()
    run.Metrics(tmp_path, writes=False)
    with pytest.raises(BlockingIOError, match="at work there"):
        checkpoint.newest(str(tmp_path))


def test_a_process_that_holds_a_folder_in_both_ways_is_named_once(tmp_path, another_process):
    files.lock(tmp_path)
    files.lock(tmp_path, shared=True)
    another_process()
    with pytest.raises(BlockingIOError, match=f"at work there: process {os.getpid()} on [^,]*;"):
        files.lock(tmp_path)


def test_where_another_process_is_at_work_no_run_begins(tmp_path, another_process):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n')
    run.Metrics(tmp_path, writes=False)
    another_process()
    with pytest.raises(BlockingIOError, match="at work there"):
        run.begin(tmp_path, first=2)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'


def test_metrics_from_the_first_step_to_come_are_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st')
    run.begin(tmp_path, first=2)
    log = run.Metrics(tmp_path)
    log(step=2, evaluation={"x": 1})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0}, {"step": 1}, {"step": 2, "evaluation": {"x": 1}}]
    assert log.evaluations() == [{"x": 1}]
