"""How much memory there is, what a token costs in it, and what is said when it runs out."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import memory
from plumbing import plan
from plumbing.ranks import Ranks
from tests.test_memory import small_encoder
from tests.test_train import FLAGS, folder  # noqa: F401, a fixture

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells its memory")
CPU = torch.device("cpu")
ARGS = dict(batch_size=1000, stage=2, negatives=0, max_length=100, micro_tokens="auto", memory=None, zero=None,
            checkpoint_layers=False)


def planned(monkeypatch, graph, peak, **flags):
    """A plan with these bytes a token, in a process that holds 1 GB; 0 GB beyond it is free unless --memory says so."""
    monkeypatch.setattr(plan, "cost", lambda *_: (graph, peak))
    monkeypatch.setattr(plan, "held", lambda *_, **__: 10**9)
    monkeypatch.setattr(plan, "free", lambda *_: 0)
    return plan.plan(small_encoder(), argparse.Namespace(**ARGS | flags), Ranks(alone=True))


def test_a_plan_by_hand(monkeypatch):
    """Width 32, 2,000 texts: the loss takes 4 x 32 x 2,000 x 8 = 2.05 MB + 100 MB, AdamW 8 bytes x 30,000 parameters or so. Of
    2.11 GB about 1,007 MB are left. At 100 kB a token, 150 kB at the peak, a pass of 2,048 tokens needs 307 MB, of which 102 MB
    are the backward pass's own: (1,007 - 102) / .1 = 9,050 tokens keep their graph."""
    found = planned(monkeypatch, 1e5, 1.5e5, memory=2.11)
    assert found.micro_tokens == 2048 and found.keep_tokens == pytest.approx(9050, rel=0.01)
    assert "0.10 loss, 0.10 activations per 1,000 tokens; 2,048 tokens a pass" in found.line
    assert found.line.endswith("about 2.11 of at most 2.11")


def test_less_room_makes_smaller_passes_and_then_says_so(monkeypatch):
    """At 1.5 MB a token 1,007 MB hold a pass of 512 tokens, 768 MB; 7 MB do not hold one of 100."""
    assert planned(monkeypatch, 1e6, 1.5e6, memory=2.11).micro_tokens == 512
    short = planned(monkeypatch, 1e6, 1.5e6, memory=1.11)
    assert (short.micro_tokens, short.keep_tokens) == (100, 0) and "MORE THAN THERE IS" in short.line
    assert planned(monkeypatch, 1e6, 1.5e6, memory=2.11, micro_tokens=300).micro_tokens == 300, "what is asked for stays"


def test_no_more_is_kept_than_a_step_can_have(monkeypatch):
    """1,000 pairs of at most 100 tokens a text; in stage 3 17 texts a row. ZeRO 3 keeps nothing. A step of 2 pairs, 400 tokens,
    is less than a pass: what fits does not depend on it."""
    assert "the graphs of 200,000 kept" in planned(monkeypatch, 1e3, 2e3, memory=9).line
    assert "the graphs of 1,700,000 kept" in planned(monkeypatch, 1e3, 2e3, memory=9, negatives=15).line
    assert planned(monkeypatch, 1e3, 2e3, memory=9, batch_size=2).keep_tokens > 2048
    assert planned(monkeypatch, 1e3, 2e3, memory=9, zero="3").keep_tokens == 0


def test_a_deepspeed_file_says_what_it_sets_aside(monkeypatch, tmp_path):
    """8 bytes for each of the bucket's numbers; of DeepSpeed's own bucket there are 500 million."""
    for zero, said in ({"stage": 2, "reduce_bucket_size": 10**8}, " 0.80 optimizer"), ({"stage": 1}, " 4.00 optimizer"):
        (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
        assert said in planned(monkeypatch, 1e3, 2e3, zero=str(tmp_path / "zero.json")).line
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}')
    with pytest.raises(ValueError, match='zero.json: field "reduce_bucket_size": found "auto", expected a number'):
        memory.read_zero(str(tmp_path / "zero.json"))


def test_the_limits_of_control_groups_count(tmp_path):
    """A job of 900 bytes in a container of 1,000; 300 are used, of which 50 are files that may go. In both versions."""
    for kind, files in (("", ("memory.max", "memory.current", "inactive_file")),
                        ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))):
        for folder, limit in (tmp_path / kind, 1000), (tmp_path / kind / "job" / "step", 900):
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in zip((*files[:2], "memory.stat"), (limit, 300, f"file 70\n{files[2]} 50\n")):
                (folder / name).write_text(f"{text}\n")
        (tmp_path / "own").write_text(f"2:cpu:/\n1:{kind}:/job/step\n")
        assert list(plan.below_limits(tmp_path / "own", tmp_path)) == [650, 750]
        (tmp_path / kind / "job" / "step" / files[0]).write_text("max\n")
    (tmp_path / "own").write_text("0::/job/step\n")
    assert list(plan.below_limits(tmp_path / "own", tmp_path)) == [750]


def test_the_last_micro_batches_are_kept_as_far_as_there_is_room():
    """12, 10 and 4 tokens with padding: the last is always kept, the last two from 14 on, all from 26 on. Where one counts for
    11 at least, these are 22 and 34."""
    parts = [memory.MicroBatch(None, torch.zeros(shape), None) for shape in ((3, 4), (5, 2), (4, 1))]
    kept = lambda tokens, least=0: plan.Plan(0, tokens, "", least=least).kept(parts)
    assert [kept(tokens) for tokens in (0, 4, 13, 14, 25, 26, 1000)] == [1, 1, 1, 2, 2, 3, 3]
    assert [kept(tokens, 11) for tokens in (21, 22, 33, 34)] == [1, 2, 2, 3]


def test_what_a_token_costs_is_measured_and_nothing_is_left_of_it():
    """Of a layer at least the input, 32 floats, and the feed-forward's 2 x 48; checkpointed layers keep less. Gradients are
    zero and the generator is where it was."""
    torch.manual_seed(3)
    expected, found = torch.rand(2), {}
    for checkpointed in (False, True):
        encoder = small_encoder(dropout=0.1)
        if checkpointed:
            memory.checkpoint_layers(encoder)
        allocator.sparse_gradients(encoder)
        torch.manual_seed(3)
        found[checkpointed] = plan.cost(encoder, 512, CPU)
        assert torch.equal(torch.rand(2), expected)
        assert all(not p.grad.any() for p in encoder.parameters())
    assert found[False][0] > 3 * 4 * (32 + 2 * 48) and found[False][0] > found[True][0]


def test_running_out_of_memory_says_what_to_lower(folder):
    """A real allocation fails, in the first step: the process may map 10 MB more than it has, and asks for 4 GB."""
    Path("short.py").write_text("""import resource, sys, re, train, losses
honest = losses.pair_loss
def pair_loss(*inputs):
    size = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size + 10**7, size + 10**7))
    train.torch.empty(10**9)
    return honest(*inputs)
losses.pair_loss = pair_loss
train.main(sys.argv[1:])
""")
    run = subprocess.run([sys.executable, "short.py", *FLAGS], env={"PYTHONPATH": str(Path(__file__).parents[1])}, capture_output=True,
                         text=True)
    assert run.returncode == 1
    line = run.stderr.strip().splitlines()[-1]
    assert line.startswith("train.py: out of memory, with ") and "--batch-size 8 makes the loss smaller" in line, run.stderr
    assert "Traceback" not in run.stderr
