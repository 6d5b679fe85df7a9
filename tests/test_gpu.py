"""experiments/gpu.py without a GPU, at toy sizes: its cells run, and a planted error fails."""

import json

import pytest
import torch

import losses
import memory
import model
import train
from experiments import gpu


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the cells of a part that have this text in their names -> the exit status, and their
    lines."""
    texts, words = tmp_path / "texts.jsonl", "a b c d e f g h i j k l m n o p".split()
    texts.write_text("".join(
        json.dumps([f"{words[i % 16]} {i}", f"{words[i % 16]} {words[i // 40]} {i} {i + 1}"]) + "\n"
        for i in range(600)))
    monkeypatch.setattr(model, "LONG", model.LONG)  # Lab lowers it
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def run_cells(part, cells):
        out, threads = tmp_path / "out", torch.get_num_threads()
        argv = ["gpu", "--dry", "--texts", texts, "--out", out, "--only", part, "--cells", cells]
        monkeypatch.setattr("sys.argv", [str(arg) for arg in argv])
        with pytest.raises(SystemExit) as ended:
            gpu.main()
        torch.set_num_threads(threads)
        lines = map(json.loads, (out / f"{part}.jsonl").read_text().splitlines())
        return ended.value.code, {line["cell"]: line for line in lines}

    return run_cells


def doubled(call):
    return lambda *inputs, **more: 2 * call(*inputs, **more)


def test_an_update_that_is_off_fails(run, monkeypatch):
    status, lines = run("right", "--check, tiny, fp32")
    assert status == 0 and lines["--check, tiny, fp32"]["status"] == "ok"

    backward = memory.Engine.backward
    monkeypatch.setattr(memory.Engine, "backward", lambda self, gradient: backward(
        self, 1.5 * gradient))
    status, lines = run("right", "--check, minilm, fp32")
    assert status == 1 and "norm ratio 1.5" in lines["--check, minilm, fp32"]["wrong"]
    assert lines["--check, tiny, fp32"]["status"] == "ok", "it is there and not run again"


def test_dropout_masks_that_differ_between_the_passes_fail(run, monkeypatch):
    monkeypatch.setattr(memory.torch, "manual_seed", lambda seed: None)
    status, lines = run("right", "dropout, tiny, 128 tokens, fp32")
    assert status == 1 and "two passes" in lines["dropout, tiny, 128 tokens, fp32"]["wrong"]


def test_another_loss_than_theirs_fails(run, monkeypatch):
    cells = "minilm, 128 tokens, 4096 pairs"
    pytest.importorskip("sentence_transformers")
    monkeypatch.setattr(losses, "pair_loss", doubled(losses.pair_loss))
    status, lines = run("fast", cells)
    assert status == 1 and "not the same" in lines[f"theirs: {cells}"]["wrong"]


def test_two_losses_of_one_batch_fail(run, monkeypatch):
    monkeypatch.setattr(losses, "info_nce", doubled(losses.info_nce))
    status, lines = run("small", "1024 pairs")
    wrong = [name for name, line in lines.items() if line["status"] == "fail"]
    assert status == 1 and wrong == ["one pass, printed loss, 1024 pairs"]


def test_what_raises_is_a_line_and_the_rest_goes_on(run, monkeypatch):
    def raising(encoder):
        raise RuntimeError("no\nsuch layers")

    monkeypatch.setattr(train.memory, "checkpoint_layers", raising)
    status, lines = run("small", " 1024 pairs")
    assert status == 1 and len(lines) == 4
    line = lines["two passes, checkpointed layers, 1024 pairs"]
    assert (line["status"], line["wrong"]) == ("fail", "RuntimeError: such layers")
