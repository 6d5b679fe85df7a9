"""The loop on toy sources, run as a user runs it: what it writes, how it stops and goes on, and
what it says of bad input.
"""

import json
import math
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

import memory
import model
import train
from plumbing import run
from plumbing.files import checksum
from plumbing.flags import check_flags
from tests.conftest import FLAGS, ROOT, python


def weights(run):
    return load_file(Path(run) / "model" / "model.safetensors")


def assert_equal(weights, others):
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def metrics(run):
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def steps(run, field="step"):
    return [line[field] for line in metrics(run) if "loss" in line]


def refused(capsys, *flags, status=2):
    """Runs train.py, which ends with this status -> the one line it said beside its progress."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(list(flags))
    printed = capsys.readouterr().err.splitlines()
    lines = [line for line in printed if line and "step/s" not in line]
    assert stop.value.code == status and len(lines) == 1, lines
    return lines[0]


# what a run leaves

def test_a_run_writes_metrics_checkpoints_and_a_model_that_opens(folder, capsys):
    """4 steps with a warm-up of 0.1 of them, so 1: the rate falls from 1e-3 by 1/4 a step. Ours has
    to be opened with a flag, and the last line says so."""
    train.main([*FLAGS, "--steps", "4"])
    lines = metrics("runs/001")
    assert [line["step"] for line in lines if "evaluation" in line] == [0, 2, 4]
    assert steps("runs/001") == [1, 2, 3, 4]
    assert steps("runs/001", "lr") == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert lines[1].keys() >= {"step", "loss", "source", "lr", "grad_norm", "tokens",
                               "pairs_per_second", "accuracy"}
    assert sorted(os.listdir("runs/001/checkpoints")) == ["00000002", "00000004"]
    assert type(model.load("runs/001/model")[0].backbone) is model.JinaBertModel
    assert "trust_remote_code=True" in capsys.readouterr().out.splitlines()[-1]


def test_the_same_command_gives_the_same_weights_in_the_next_free_folder(folder):
    train.main([*FLAGS, "--steps", "2"])
    train.main([*FLAGS, "--steps", "2"])
    assert_equal(weights("runs/001"), weights("runs/002"))


@pytest.mark.parametrize("lr, name, rows, rate", [
    (None, "tiny", 4096, 1 / 256), (None, "tiny", 1024, 1 / 256), (None, "tiny", 256, 1 / 512),
    (None, "tiny", 64, 1 / 1024), (None, "a/b", 64, 2e-5), (1e-3, "tiny", 64, 1e-3)])
def test_small_batches_of_random_weights_learn_at_a_rate_as_the_root_of_their_size(
        lr, name, rows, rate):
    args = SimpleNamespace(lr=lr, model=name, batch_size=rows)
    assert train.peak_learning_rate(args, 256)[0] == pytest.approx(rate)


def test_stage_2_and_stage_3_differ_in_the_loss_alone(folder):
    """Equal seeds and dropout 0: the first batch is the same, and equation (5) adds 2 * 16 terms to
    the queries' sums."""
    for stage in "23":
        train.main([*FLAGS, "--steps", "1", "--stage", stage, "--negatives", "2", "--dropout", "0",
                    "--out", stage])
    assert steps("2", "source") == steps("3", "source")
    assert steps("2", "loss") < steps("3", "loss")


def test_checkpointed_layers_and_micro_batches_give_the_same_run(folder):
    """fp32: checkpointed is bit-identical; other micro-batches agree to rounding with dropout
    off."""
    for out, flags in {"a": [], "b": ["--checkpoint-layers"],
                       "c": ["--micro-tokens", "100000"]}.items():
        train.main([*FLAGS, "--steps", "3", "--dropout", "0", "--out", out, *flags])
    assert steps("a", "loss") == steps("b", "loss")
    assert steps("a", "loss") == pytest.approx(steps("c", "loss"), rel=1e-4)
    assert steps("a", "micro_batches") > steps("c", "micro_batches")


def test_a_plain_bert_trains_and_opens_without_a_flag(folder, capsys):
    config = transformers.BertConfig(vocab_size=20, hidden_size=32, num_hidden_layers=2,
                                     num_attention_heads=2, intermediate_size=32)
    _, tokenizer = model.load("toy")
    model.save(model.PooledEncoder(transformers.BertModel(config)), tokenizer, "bert")
    train.main([*FLAGS, "--model", "bert", "--steps", "2", "--out", "run"])
    assert "trust_remote_code" not in capsys.readouterr().out
    assert type(model.load("run/model")[0].backbone) is transformers.BertModel


# how it stops and goes on

def stop_after_a_step(run):
    """SIGTERM to this process, when a step is on record."""
    path = run / "metrics.jsonl"

    def wait_and_stop():
        while not (path.exists() and '"loss"' in path.read_text()):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait_and_stop, daemon=True).start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_remembered_and_only_a_later_ctrl_c_ends_a_run_at_once(
        monkeypatch, number):
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=100.0)
    monkeypatch.setattr(run, "time", clock)
    stop = run.StopSignal()
    os.kill(os.getpid(), number)
    clock.now += 1.9
    os.kill(os.getpid(), signal.SIGINT)  # the launcher's, of the same stop
    clock.now += 0.2
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.name == signal.Signals(number).name
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("stage", ["2", "3"])
def test_a_run_stopped_and_resumed_ends_in_bit_identical_weights(folder, stage):
    """Dropout 0.1, fp32, CPU: 50 steps at once, against a SIGTERM and the rest by `--resume`
    alone."""
    flags = [*FLAGS, "--save-every", "50", "--steps", "50", "--stage", stage, "--negatives", "2"]
    train.main([*flags, "--out", "whole"])
    stop_after_a_step(folder / "parts")
    train.main([*flags, "--out", "parts"])
    stopped = steps("parts")[-1]
    assert os.listdir("parts/checkpoints") == [f"{stopped:08d}"] and stopped < 50
    assert not Path("parts/model").exists()
    train.main(["--resume", "--out", "parts"])
    assert_equal(weights("whole"), weights("parts"))
    assert steps("whole", "loss") == steps("parts", "loss") and len(steps("parts")) == 50


def test_a_resumed_run_goes_on_with_what_was_chosen(folder, monkeypatch):
    """The flags are kept as given, and beside them what was chosen where they left it open: the
    manifest is found from anywhere, and with passes of 128 tokens a step is many micro-batches."""
    train.main([*FLAGS, "--micro-tokens", "auto", "--steps", "2", "--out", "run"])
    path = folder / "run" / "checkpoints" / "00000002" / "state.json"
    state = json.loads(path.read_text())
    assert (state["args"]["sources"], state["args"]["micro_tokens"]) == ("sources.json", "auto")
    assert state["chosen"] == {"sources": str(folder / "sources.json"), "micro_tokens": 2048}

    state["chosen"]["micro_tokens"] = 128
    path.write_text(json.dumps(state))
    seal = path.with_name("checksums.json")
    seal.write_text(json.dumps(json.loads(seal.read_text()) | {path.name: checksum(path)}))
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    train.main(["--resume", "--out", "../run", "--steps", "4"])
    assert [count > 1 for count in steps("../run", "micro_batches")] == [False, False, True, True]


def test_lines_of_steps_after_the_checkpoint_are_cut_off_on_resume(folder):
    """Killed after step 5 with a checkpoint of step 4: step 5 is in metrics.jsonl once."""
    train.main([*FLAGS, "--steps", "4", "--out", "run"])
    with open("run/metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 5, "loss": 0.0}) + '\n{"step": 6, "lo')
    train.main(["--resume", "--out", "run", "--steps", "6"])
    assert steps("run") == [1, 2, 3, 4, 5, 6]


def test_the_model_is_written_by_a_resume_when_only_that_was_missing(folder):
    train.main([*FLAGS, "--steps", "2", "--out", "run"])
    before = weights("run")
    os.rename("run/model", "gone")
    train.main(["--resume", "--out", "run"])
    assert_equal(before, weights("run"))


def test_a_loss_that_is_not_finite_names_step_and_source_and_keeps_the_checkpoint(folder, capsys):
    """Weights of 1e18 after step 3: the lengths of step 4's vectors are beyond fp32."""
    train.main([*FLAGS, "--steps", "2", "--out", "run"])
    before = weights("run/checkpoints/00000002")
    said = refused(
        capsys, "--resume", "--out", "run", "--steps", "4", "--lr", "1e18", status=1)
    assert re.search("step 4, source (left|right): loss nan", said) and "--lr" in said
    assert os.listdir("run/checkpoints") == ["00000002"]
    assert_equal(before, weights("run/checkpoints/00000002"))


def test_a_loss_that_is_not_finite_ends_the_run_whatever_the_loss_scale(
        folder, capsys, monkeypatch):
    """As in fp16, where the scale could be lowered for 16 more steps."""
    def step_loss(*arguments):
        loss, accuracy = real(*arguments)
        return loss * math.inf, accuracy

    real = train.step_loss
    monkeypatch.setattr(train, "step_loss", step_loss)
    monkeypatch.setattr(memory.LossScale, "exhausted", lambda _: False)
    said = refused(capsys, *FLAGS, "--steps", "2", "--out", "run", status=1)
    assert re.match("train.py: step 1, source (left|right): loss inf", said)


def test_a_gradient_norm_that_is_not_finite_is_null_in_metrics(folder, monkeypatch):
    """Infinity is no JSON."""
    monkeypatch.setattr(memory.Engine, "step", lambda *_: math.inf)
    train.main([*FLAGS, "--steps", "2", "--out", "run"])
    assert steps("run", "grad_norm") == [None, None]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells its memory")
def test_running_out_of_memory_says_what_to_lower(folder, capsys):
    """A real allocation fails: what a text of 10^15 tokens costs is measured, which a model without
    a limit lets pass."""
    for file, limit in (("tokenizer_config.json", "model_max_length"),
                        ("sentence_bert_config.json", "max_seq_length"),
                        ("config.json", "max_position_embeddings")):
        path = folder / "toy" / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {limit: 10**30}))
    tokens = str(10**15)
    said = refused(capsys, *FLAGS, "--max-length", tokens, "--micro-tokens", tokens, status=1)
    assert "--checkpoint-layers" in said and "--batch-size 8" in said


def test_the_numbers_of_metrics_are_event_files_too_where_something_writes_them(
        folder, monkeypatch):
    """tensorboardX, or TensorBoard, which torch's own writer wants; a resumed run begins at its
    step."""
    written, begun = [], []

    class SummaryWriter:
        def __init__(self, run, purge_step):
            begun.append((run, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=SummaryWriter))
    train.main([*FLAGS, "--steps", "2", "--out", "run"])
    lines = metrics("run")
    losses = [("loss", line["loss"], line["step"]) for line in lines if "loss" in line]
    recalls = [("recall@1", line["evaluation"]["mean"]["recall@1"], line["step"])
               for line in lines if "evaluation" in line]
    assert len(losses) == 2 and len(recalls) >= 2 and set(losses + recalls) <= set(written)
    train.main(["--resume", "--out", "run", "--steps", "4"])
    assert begun == [("run", 1), ("run", 3)]


# what it refuses

@pytest.mark.parametrize("flags, said", [
    (["--sources", "none.json"], "none.json"),
    (["--model", "./none"], "model ./none"),
    (["--batch-size", "64"], "source left: 57 usable pairs"),
    (["--batch-size", "0"], "--batch-size 0"),
    (["--tau", "-1"], "--tau -1.0"),
    (["--micro-tokens", "64"], "--micro-tokens 64 is less than one text of 128 tokens"),
    (["--max-length", "9000", "--micro-tokens", "9000"], "--max-length 9000: expected 3 to 8192"),
    (["--max-length", "2"], "--max-length 2: expected 3 to 8192"),
    (["--lr", "0"], "--lr 0.0"),
    (["--eval-every", "-1"], "--eval-every -1"),
    (["--seed", "-1"], "--seed -1"),
    (["--dropout", "2"], "--dropout 2.0"),
    (["--warmup", "nan"], "--warmup nan"),
    (["--precision", "fp16"], "--precision fp16"),
    (["--zero", "4"], "--zero 4"),
    (["--stage", "3", "--sources", ""], "--stage 3: the default sources have no negatives"),
    (["--stage", "3"], "left.jsonl: its rows have at most 3 negatives that are not"),
    (["--stage", "3", "--negatives", "0"], "--negatives 0"),
    (["--resume"], "--resume: runs holds no complete checkpoint"),
    (["--resume", "--out", "none"], "--resume: none holds no complete checkpoint"),
])
def test_bad_input_is_one_line_and_writes_nothing(folder, capsys, flags, said):
    before = sorted(os.listdir())
    assert said in refused(capsys, *FLAGS, *flags)
    assert sorted(set(os.listdir()) - {".cache"}) == before


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, 1 << 63])
@pytest.mark.parametrize("flag", [
    "batch_size", "max_length", "memory", "steps", "save_every", "eval_every", "tau", "lr"])
def test_what_must_be_above_0_is_refused_by_its_flag(flag, value):
    args = train.argument_parser().parse_args([])
    setattr(args, flag, value)
    name = "--" + flag.replace("_", "-")
    with pytest.raises(ValueError, match=f"^{name} {value}: expected a number above 0, and below"):
        check_flags(args, torch.device("cpu"))


@pytest.mark.parametrize("flag, values, expected", [
    *((flag, [-1, math.nan, math.inf, 1 << 63], "0 or more, and below")
      for flag in ("seed", "weight_decay", "clip")),
    *((flag, [-0.1, 1, math.nan], "at least 0 and less than 1") for flag in ("dropout", "warmup"))])
def test_a_flag_beyond_its_range_is_refused_by_its_name(flag, values, expected):
    args = train.argument_parser().parse_args([])
    for value in values:
        setattr(args, flag, value)
        name = "--" + flag.replace("_", "-")
        with pytest.raises(ValueError, match=f"^{name} {value}: expected {expected}"):
            check_flags(args, torch.device("cpu"))


@pytest.mark.parametrize("max_length, rows", [("1024", 8), ("8192", 2)])
def test_check_takes_no_more_rows_than_plain_fp32_has_room_for(folder, capsys, max_length, rows):
    """Two texts a row and 16,384 tokens in all: of at most 1,024 tokens a text 8 rows, of 8,192 one
    row, and there are 2 at least."""
    train.main([*FLAGS, "--check", "--max-length", max_length, "--micro-tokens", max_length])
    assert f"a batch of {rows} rows" in capsys.readouterr().out


def test_a_finished_run_is_neither_written_over_nor_resumed(folder, capsys):
    train.main([*FLAGS, "--steps", "2", "--out", "run"])
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("[!.]*")}
    assert "--out run" in refused(capsys, *FLAGS, "--out", "run")
    assert "run is finished with 2 steps" in refused(capsys, "--resume", "--out", "run")
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("[!.]*")} == before


def test_resume_with_other_flags_or_sources_or_a_damaged_checkpoint_is_refused(folder, capsys):
    train.main([*FLAGS, "--steps", "2", "--out", "run"])
    resume = "--resume", "--out", "run", "--steps", "4"
    assert "another seed: 0, now 1" in refused(capsys, *resume, "--seed", "1")
    assert "--stage" in refused(capsys, *resume, "--stage", "3", "--negatives", "2")
    with open("left.jsonl", "a") as file:
        file.write('["one more", "row"]\n')
    assert "left.jsonl: the checkpoint was made with another corpus: " in refused(capsys, *resume)
    os.truncate("run/checkpoints/00000002/optimizer.safetensors", 100)
    assert "optimizer.safetensors: found 100 bytes" in refused(capsys, *resume)
    os.rename("run/checkpoints", "run/elsewhere")
    assert "holds no complete checkpoint" in refused(capsys, *resume)


def test_as_a_command_bad_input_has_status_2_and_no_traceback(folder):
    """What the other tests call in the process, once from outside."""
    run = python(ROOT / "train.py", "--sources", "none.json")
    assert run.returncode == 2 and re.fullmatch("train.py: .*none.json.*\n", run.stderr)


def test_train_imports_nothing_that_curates_or_measures_and_no_deepspeed():
    imported = python("-c", "import sys, train; print(*sys.modules)").stdout.split()
    packages = {name.partition(".")[0] for name in imported}
    assert {"train", "plumbing"} <= packages
    assert packages.isdisjoint({"curation", "experiments", "deepspeed"})
