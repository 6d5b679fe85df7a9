"""A checkpoint is complete or absent, the newest is found, the old ones go, and a damaged one is named."""

import json
import os

import pytest
import torch
from safetensors import SafetensorError

import memory
from plumbing import checkpoint, files


def trained():
    """A linear layer after two steps of AdamW."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    for _ in range(2):
        layer(torch.ones(3)).sum().backward()
        optimizer.step()
    return layer, optimizer


def engine(layer, optimizer):
    return memory.OneProcess(layer, optimizer, 1.0, memory.LossScale(torch.float32))


def save(run, step, layer, optimizer, write_model=lambda part: part.mkdir()):
    moments = engine(layer, optimizer).moments()
    checkpoint.save(run, {"step": step, "sampler": {}}, write_model, moments, [torch.get_rng_state()])


def test_moments_and_random_state_come_back_by_name(tmp_path):
    layer, optimizer = trained()
    state = torch.get_rng_state()
    save(tmp_path, 2, layer, optimizer)
    torch.rand(5)
    fresh = torch.optim.AdamW(layer.parameters(), fused=True)
    moments, [restored] = checkpoint.restore(checkpoint.newest(str(tmp_path)).path)
    engine(layer, fresh).load_moments(moments)
    assert torch.equal(restored, state)
    for parameter in layer.parameters():
        assert set(fresh.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, optimizer.state[parameter][kind]) for kind, value in fresh.state[parameter].items())


def test_the_two_newest_stay_and_the_newest_is_found(tmp_path):
    layer, optimizer = trained()
    for step in (5, 10, 100):
        save(tmp_path, step, layer, optimizer)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["00000010", "00000100"]
    assert checkpoint.newest(str(tmp_path)).state["step"] == 100


def test_a_write_that_fails_leaves_the_last_one_and_no_trace(tmp_path):
    """A full disk raises OSError in the middle of writing."""
    layer, optimizer = trained()
    save(tmp_path, 1, layer, optimizer)

    def full_disk(part):
        part.mkdir()
        (part / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, layer, optimizer, full_disk)
    assert os.listdir(tmp_path / "checkpoints") == ["00000001"]


@pytest.mark.parametrize("error", [Exception("No space left on device (os error 28)"), SafetensorError("I/O error")])
def test_the_libraries_errors_of_a_full_disk_become_one_oserror(tmp_path, error):
    """tokenizers raises a bare Exception, safetensors one of its own."""
    def write(part):
        raise error

    with pytest.raises(OSError, match="cannot be written: (No space|I/O)"):
        files.publish(tmp_path / "new", write)
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_with_the_same_number_left_is_in_nobody_s_way(tmp_path):
    (tmp_path / f"new.part-{os.getpid()}").mkdir()
    files.publish(tmp_path / "new", lambda part: (part / "file").write_text("x"))
    assert os.listdir(tmp_path / "new") == ["file"]


def test_what_a_killed_process_left_half_written_is_no_checkpoint_and_goes_with_the_next(tmp_path):
    layer, optimizer = trained()
    save(tmp_path, 1, layer, optimizer)
    (tmp_path / "checkpoints" / "00000002.part-77").mkdir()
    assert checkpoint.newest(str(tmp_path)).state["step"] == 1
    save(tmp_path, 3, layer, optimizer)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["00000001", "00000003"]


@pytest.mark.parametrize("damage, said", [
    (lambda path: os.truncate(path / "optimizer.safetensors", 40), r"optimizer\.safetensors: truncated, 40 of \d+ bytes"),
    (lambda path: (path / "random.safetensors").unlink(), r"random\.safetensors: truncated, 0 of \d+ bytes"),
    (lambda path: os.truncate(path / "state.json", 20), r"state\.json: does not open"),
])
def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path, damage, said):
    layer, optimizer = trained()
    save(tmp_path, 1, layer, optimizer)
    save(tmp_path, 2, layer, optimizer)
    damage(tmp_path / "checkpoints" / "00000002")
    with pytest.raises(ValueError, match=said + ".*remove that folder"):
        checkpoint.newest(str(tmp_path))


def test_runs_are_numbered_and_the_newest_is_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(checkpoint.free_run(None)) == "runs/001"
    (tmp_path / "runs" / "001-good").mkdir(parents=True)
    for name in ("runs/001", "runs/009", "runs/1000"):
        save(tmp_path / name, 1, *trained())
    assert str(checkpoint.free_run(None)) == "runs/1001"
    assert str(checkpoint.newest(None).run) == "runs/1000"


def test_an_explicit_folder_must_be_new_or_empty(tmp_path):
    (tmp_path / "empty").mkdir()
    assert checkpoint.free_run(str(tmp_path / "empty")) == tmp_path / "empty"
    (tmp_path / "empty" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        checkpoint.free_run(str(tmp_path / "empty"))


def test_metrics_from_the_first_step_to_come_are_cut_off(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st')
    with pytest.raises(FileExistsError):
        checkpoint.begin_metrics(tmp_path, first=1)
    checkpoint.begin_metrics(tmp_path, first=2)
    log = checkpoint.Metrics(tmp_path)
    log(step=2, evaluation={"x": 1})
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 0}, {"step": 1}, {"step": 2, "evaluation": {"x": 1}}]
    assert log.evaluations() == [{"x": 1}]
