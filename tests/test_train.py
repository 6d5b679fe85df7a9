"""The loop on toy sources, run as a user runs it: what it writes, how it stops and goes on, and what it says of bad input."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import model
import train

HERE = Path(__file__).parents[1]
SMALL = dict(vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a b c d e f g h i j".split()
STOP = {signal.SIGTERM: signal.getsignal(signal.SIGTERM), signal.SIGINT: signal.getsignal(signal.SIGINT)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a manifest of two sources, 60 rows each, with 3 negatives a row, and a small JinaBERT, dropout 0.1."""
    monkeypatch.chdir(tmp_path)
    def text(name, i, m):
        return " ".join([*(WORDS[5 + (i * m + i // 10 * j) % 10] for j in range(3 + i % 4)), f"{name}{i} {m}"])

    for name in ("left", "right"):
        rows = [[text(name, i, m) for m in range(1, 6)] for i in range(60)]  # query, positive and three negatives
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("sources.json").write_text('[{"name": "left", "path": "left.jsonl", "rate": 1}, '
                                    '{"name": "right", "path": "right.jsonl", "rate": 2}]')
    torch.manual_seed(0)
    config = model.JinaBertConfig(**SMALL)
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, model_max_length=8192)
    model.save(model.PooledEncoder(model.JinaBertModel(config)), tokenizer, tmp_path / "toy")
    yield tmp_path
    for number, handler in STOP.items():
        signal.signal(number, handler)


FLAGS = ["--sources", "sources.json", "--model", "toy", "--batch-size", "16", "--micro-tokens", "128", "--precision", "fp32",
         "--lr", "1e-3", "--save-every", "2"]


def weights(run):
    return load_file(Path(run) / "model" / "model.safetensors")


def metrics(run):
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def refused(capsys, *flags):
    """Runs train.py expecting exit status 2 -> the one line it said."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(list(flags))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def test_a_run_writes_metrics_checkpoints_and_a_model_that_opens(folder, capsys):
    train.main([*FLAGS, "--steps", "4"])
    lines = metrics("runs/001")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "evaluation" in line] == [0, 2, 4]
    assert {"step", "loss", "source", "lr", "grad_norm", "tokens", "pairs_per_second", "accuracy"} <= set(steps[0])
    assert [line["lr"] for line in steps] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert sorted(os.listdir("runs/001/checkpoints")) == ["00000002", "00000004"]
    encoder, tokenizer = model.load("runs/001/model")
    assert "trust_remote_code=True" in capsys.readouterr().out.splitlines()[-1]


def test_two_runs_that_begin_at_once_do_not_share_a_folder(folder, monkeypatch, capsys):
    """The other run's first file appears after this one has chosen the same free number."""
    Path("runs/001").mkdir(parents=True)
    monkeypatch.setattr(train.checkpoint, "free_run", lambda out: Path("runs/001"))
    Path("runs/001/metrics.jsonl").write_text("the other's")
    assert "metrics.jsonl" in refused(capsys, *FLAGS, "--steps", "2")
    assert Path("runs/001/metrics.jsonl").read_text() == "the other's"


def test_the_same_command_gives_the_same_weights_in_the_next_free_folder(folder):
    train.main([*FLAGS, "--steps", "2"])
    train.main([*FLAGS, "--steps", "2"])
    first, second = weights("runs/001"), weights("runs/002")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("stage", ["2", "3"])
def test_a_run_stopped_and_resumed_ends_in_bit_identical_weights(folder, monkeypatch, stage):
    """Dropout 0.1, fp32, CPU: 6 steps at once, against a SIGTERM during step 1 and 5 more by `--resume` alone."""
    flags = [*FLAGS, "--steps", "6", "--stage", stage, "--negatives", "2"]
    train.main([*flags, "--out", "whole"])

    class Stopped(train.checkpoint.StopSignal):
        def __init__(self):
            super().__init__()
            os.kill(os.getpid(), signal.SIGTERM)  # arrives before step 1 is over

    with monkeypatch.context() as patch:
        patch.setattr(train.checkpoint, "StopSignal", Stopped)
        train.main([*flags, "--out", "parts"])
    assert not Path("parts/model").exists() and os.listdir("parts/checkpoints") == ["00000001"]
    train.main(["--resume", "--out", "parts"])
    whole, parts = weights("whole"), weights("parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    losses = [[line["loss"] for line in metrics(run) if "loss" in line] for run in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_lines_of_steps_after_the_checkpoint_are_cut_off_on_resume(folder):
    """Killed after step 5 with a checkpoint of step 4: step 5 is in metrics.jsonl once."""
    train.main([*FLAGS, "--steps", "4", "--out", "run"])
    with open("run/metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 5, "loss": 0.0}) + '\n{"step": 6, "lo')
    train.main(["--resume", "--out", "run", "--steps", "6"])
    assert [line["step"] for line in metrics("run") if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_the_model_is_written_by_a_resume_when_only_that_was_missing(folder):
    train.main([*FLAGS, "--steps", "2", "--out", "run"])
    before = weights("run")
    os.rename("run/model", "gone")
    train.main(["--resume", "--out", "run"])
    assert all(torch.equal(before[name], after) for name, after in weights("run").items())


def test_stage_2_and_stage_3_differ_in_the_loss_alone(folder):
    """Equal seeds and dropout 0: the first batch is the same, and equation (5) adds 2 * 16 terms to the queries' sums."""
    for stage in "23":
        train.main([*FLAGS, "--steps", "1", "--stage", stage, "--negatives", "2", "--dropout", "0", "--out", stage])
    two, three = (metrics(stage)[1] for stage in "23")
    assert two["source"] == three["source"] and two["loss"] < three["loss"]


def test_checkpointed_layers_and_micro_batches_give_the_same_run(folder):
    """fp32: checkpointed is bit-identical; other micro-batches agree to rounding with dropout off."""
    for out, flags in (("a", []), ("b", ["--checkpoint-layers"]), ("c", ["--micro-tokens", "100000"])):
        train.main([*FLAGS, "--steps", "3", "--dropout", "0", "--out", out, *flags])
    a, b, c = ([line["loss"] for line in metrics(out) if "loss" in line] for out in "abc")
    assert a == b and a == pytest.approx(c, rel=1e-4)


def test_a_plain_bert_trains_and_opens_without_a_flag(folder, capsys):
    config = transformers.BertConfig(**SMALL)
    model.save(model.PooledEncoder(transformers.BertModel(config)), model.load("toy")[1], "bert")
    train.main([*FLAGS, "--model", "bert", "--steps", "2", "--out", "run"])
    assert "trust_remote_code" not in capsys.readouterr().out
    assert type(model.load("run/model")[0].backbone) is transformers.BertModel


def test_a_loss_that_is_not_finite_names_step_and_source_and_keeps_the_checkpoint(folder, monkeypatch, capsys):
    train.main([*FLAGS, "--steps", "2", "--out", "run"])
    before = weights("run/checkpoints/00000002")
    monkeypatch.setattr(train.losses, "pair_loss", lambda q, p, *_: (q - p).sum() * float("nan"))
    with pytest.raises(SystemExit) as stop:
        train.main(["--resume", "--out", "run", "--steps", "4"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and "step 3, source " in said and "loss nan" in said
    assert os.listdir("run/checkpoints") == ["00000002"]
    assert all(torch.equal(before[name], after) for name, after in weights("run/checkpoints/00000002").items())


@pytest.mark.parametrize("flags, said", [
    (["--sources", "none.json"], "none.json: no such manifest"),
    (["--model", "./none"], "model ./none: "),
    (["--batch-size", "64"], "source left: 57 usable pairs"),
    (["--batch-size", "0"], "--batch-size 0: expected a number above 0"),
    (["--tau", "-1"], "--tau -1.0: expected"),
    (["--micro-tokens", "64"], "--micro-tokens 64 is less than one text of --max-length 128"),
    (["--max-length", "9000", "--micro-tokens", "9000"], "--max-length 9000: expected 3 to 8192 tokens"),
    (["--max-length", "2"], "--max-length 2: expected 3 to"),
    (["--lr", "0"], "--lr 0.0: expected a number above 0"),
    (["--eval-every", "-1"], "--eval-every -1: expected a number above 0"),
    (["--seed", "-1"], "--seed -1: expected 0 or more"),
    (["--dropout", "2"], "--dropout 2.0: expected at least 0 and less than 1"),
    (["--warmup", "nan"], "--warmup nan: expected at least 0 and less than 1"),
    (["--precision", "fp16"], "--precision fp16: needs a GPU"),
    (["--zero", "4"], "--zero 4: neither 0, 1, 2, 3 nor a JSON file that opens"),
    (["--stage", "3", "--sources", ""], "--stage 3: the default sources have no negatives"),
    (["--stage", "3"], "left.jsonl, line 1: 3 negatives, but --negatives 15"),
    (["--stage", "3", "--negatives", "0"], "--negatives 0: expected a number above 0 in stage 3"),
    (["--resume"], "--resume: runs holds no complete checkpoint"),
    (["--resume", "--out", "none"], "--resume: none holds no complete checkpoint"),
])
def test_bad_input_is_one_line_and_writes_nothing(folder, capsys, flags, said):
    before = sorted(os.listdir())
    assert said in refused(capsys, *FLAGS, *flags)
    assert sorted(set(os.listdir()) - {".cache"}) == before


def test_check_takes_no_more_rows_than_plain_fp32_has_room_for(folder, monkeypatch, capsys):
    """A row of stage 3 with 2 negatives is 4 texts of at most 128 tokens: 2,560 tokens are 5 rows, and there are 2 at least."""
    for tokens, rows in (2560, 5), (100, 2):
        monkeypatch.setattr(train, "CHECK_TOKENS", tokens)
        train.main([*FLAGS, "--check", "--stage", "3", "--negatives", "2"])
        assert f"gradient of a batch of {rows} rows" in capsys.readouterr().out


def test_a_finished_run_is_neither_written_over_nor_resumed(folder, capsys):
    train.main([*FLAGS, "--steps", "2", "--out", "run"])
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    assert "--out run: is not empty" in refused(capsys, *FLAGS, "--out", "run")
    assert "run is finished with 2 steps" in refused(capsys, "--resume", "--out", "run")
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == before


def test_resume_with_other_flags_or_a_damaged_checkpoint_is_refused(folder, capsys):
    train.main([*FLAGS, "--steps", "2", "--out", "run"])
    resume = "--resume", "--out", "run", "--steps", "4"
    assert "another seed: 0, now 1" in refused(capsys, *resume, "--seed", "1")
    assert "another --model or --stage" in refused(capsys, *resume, "--stage", "3", "--negatives", "2")
    os.truncate("run/checkpoints/00000002/optimizer.safetensors", 100)
    assert "optimizer.safetensors: truncated, 100 of " in refused(capsys, *resume)
    os.rename("run/checkpoints", "run/elsewhere")
    assert "holds no complete checkpoint" in refused(capsys, *resume)


def test_resume_with_changed_sources_is_refused(folder, capsys):
    train.main([*FLAGS, "--steps", "2", "--out", "run"])
    with open("left.jsonl", "a") as file:
        file.write('["one more", "row"]\n')
    assert "another corpus: " in refused(capsys, "--resume", "--out", "run", "--steps", "4")


def test_as_a_command_bad_input_has_status_2_and_no_traceback(folder):
    """What the other tests call in the process, once from outside."""
    found = subprocess.run([sys.executable, HERE / "train.py", "--sources", "none.json"], capture_output=True, text=True)
    assert found.returncode == 2 and found.stderr.endswith("none.json: no such manifest\n") and found.stderr.count("\n") == 1
