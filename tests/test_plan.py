"""How much memory there is, what a token costs in it, and so what fits."""

import argparse
import json
import re
from pathlib import Path

import pytest
import torch

import memory
from plumbing import allocator, plan
from plumbing.ranks import Ranks
from tests.conftest import small_encoder

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux tells its memory")
CPU = torch.device("cpu")
ARGS = dict(batch_size=1000, stage=2, negatives=0, max_length=100, micro_tokens="auto", memory=None,
            zero=None, checkpoint_layers=False)


def planned(monkeypatch, graph, peak, **flags):
    """A plan with these bytes a token, in a process that holds 1 GB; 0 GB beyond it is free unless
    --memory says so. The machine is patched, for a test cannot choose it."""
    monkeypatch.setattr(plan, "bytes_a_token", lambda *_: (graph, peak))
    monkeypatch.setattr(plan, "memory_held", lambda *_, **__: 10**9)
    monkeypatch.setattr(plan, "memory_free", lambda *_: 0)
    return plan.make_plan(small_encoder(), argparse.Namespace(**ARGS | flags), Ranks(alone=True))


def figure(found, words):
    """The number that stands for # among these words in the line that a run prints."""
    number = re.search(words.replace("#", r"([\d.,]*\d)"), found.line)[1]
    return float(number.replace(",", ""))


def test_a_plan_by_hand(monkeypatch):
    """Width 32, 2,000 texts: the loss takes 4 x 32 x 2,000 x 8 = 2.05 MB + 100 MB, AdamW 8 bytes x
    30,000 parameters or so. Of 2.11 GB about 1,007 MB are left. At 100 kB a token, 150 kB at the
    peak, a pass of 2,048 tokens needs 307 MB, of which 102 MB are the backward pass's own: (1,007 -
    102) / .1 = 9,050 tokens keep their graph."""
    found = planned(monkeypatch, 1e5, 1.5e5, memory=2.11)
    assert found.micro_tokens == 2048 and found.keep_tokens == pytest.approx(9050, rel=0.01)
    assert figure(found, "# loss") == 0.10 and figure(found, "# activations") == 0.10
    assert figure(found, "# tokens a pass") == 2048
    assert figure(found, "about # of") == figure(found, "at most #") == 2.11


def test_less_room_makes_smaller_passes_and_then_says_what_helps(monkeypatch):
    """At 1.5 MB a token 1,007 MB hold a pass of 512 tokens, 768 MB; 7 MB do not hold one of 100."""
    assert planned(monkeypatch, 1e6, 1.5e6, memory=2.11).micro_tokens == 512
    short = planned(monkeypatch, 1e6, 1.5e6, memory=1.11)
    assert (short.micro_tokens, short.keep_tokens) == (100, 0)
    helps = {"--memory", "--checkpoint-layers", "--batch-size", "--max-length"}
    assert set(re.findall(r"--[a-z-]+", short.line)) == helps


def test_a_pass_of_the_size_that_is_asked_for_stays(monkeypatch):
    found = planned(monkeypatch, 1e6, 1.5e6, memory=1.11, micro_tokens=300)
    assert found.micro_tokens == 300 and "--micro-tokens" in found.line


def test_no_more_is_kept_than_a_step_can_have(monkeypatch):
    """1,000 pairs of at most 100 tokens a text; in stage 3 17 texts a row. A step of 2 pairs, 400
    tokens, is less than a pass: what fits does not depend on it."""
    assert figure(planned(monkeypatch, 1e3, 2e3, memory=9), "the graphs of #") == 200_000
    stage_3 = planned(monkeypatch, 1e3, 2e3, memory=9, negatives=15)
    assert figure(stage_3, "the graphs of #") == 1_700_000
    assert planned(monkeypatch, 1e3, 2e3, memory=9, batch_size=2).keep_tokens > 2048


def test_zero_3_has_no_room_for_more_than_the_one_graph_that_is_always_kept(monkeypatch):
    assert planned(monkeypatch, 1e3, 2e3, memory=9, zero="3").keep_tokens == 0


@pytest.mark.parametrize("zero, gigabytes", [
    ({"stage": 2, "reduce_bucket_size": 10**8}, 0.80), ({"stage": 1}, 4.00)])
def test_a_deepspeed_file_says_what_it_sets_aside(monkeypatch, tmp_path, zero, gigabytes):
    """8 bytes for each of the bucket's numbers; of DeepSpeed's own bucket there are 500 million."""
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    assert figure(planned(monkeypatch, 1e3, 2e3, zero=str(path)), "# optimizer") == gigabytes


def test_a_deepspeed_file_for_the_trainer_of_transformers_is_refused(tmp_path):
    """"auto" is its Trainer's to fill in."""
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}')
    with pytest.raises(ValueError, match='zero.json: field "reduce_bucket_size": found "auto"'):
        memory.read_zero(str(path))


@pytest.mark.parametrize("kind, limit, used, files", [
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")])
def test_the_limits_of_control_groups_count(tmp_path, kind, limit, used, files):
    """A job of 900 bytes in a container of 1,000; 300 are used, of which 50 are files that may go:
    650 and 750 are left. Both versions of control groups."""
    own, container = tmp_path / "own", tmp_path / kind
    job = container / "job" / "step"
    own.write_text(f"2:cpu:/\n{1 if kind else 0}:{kind}:/job/step\n")
    for folder, most in (container, 1000), (job, 900):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit).write_text(f"{most}\n")
        (folder / used).write_text("300\n")
        (folder / "memory.stat").write_text(f"file 70\n{files} 50\n")
    assert list(plan.below_limits(own, tmp_path)) == [650, 750]
    (job / limit).write_text("max\n")
    assert list(plan.below_limits(own, tmp_path)) == [750]


@pytest.mark.parametrize("room, least, kept", [
    (0, 0, 1), (4, 0, 1), (13, 0, 1), (14, 0, 2), (25, 0, 2), (26, 0, 3), (1000, 0, 3),
    (21, 11, 1), (22, 11, 2), (33, 11, 2), (34, 11, 3)])
def test_the_last_micro_batches_are_kept_as_far_as_there_is_room(room, least, kept):
    """12, 10 and 4 tokens with padding: the last is always kept, the last two from 14 on, all from
    26 on. Where one counts for 11 at least, these are 22 and 34."""
    micro_batches = [(None, torch.zeros(shape), None) for shape in ((3, 4), (5, 2), (4, 1))]
    assert plan.Plan(0, room, "", min_tokens=least).graphs_to_keep(micro_batches) == kept


def test_what_a_token_costs_is_measured_and_nothing_is_left_of_it():
    """Of a layer at least the input, 32 floats, and the feed-forward's 2 x 48; checkpointed layers
    keep less. Gradients are zero and the generator is where it was."""
    torch.manual_seed(3)
    expected, graphs = torch.rand(2), []
    for checkpointed in (False, True):
        encoder = small_encoder(dropout=0.1)
        if checkpointed:
            memory.checkpoint_layers(encoder)
        allocator.sparse_gradients(encoder)
        torch.manual_seed(3)
        graph, peak = plan.bytes_a_token(encoder, 512, CPU)
        assert peak >= graph and torch.equal(torch.rand(2), expected)
        assert all(not p.grad.any() for p in encoder.parameters())
        graphs.append(graph)
    assert graphs[0] > 3 * 4 * (32 + 2 * 48) and graphs[0] > graphs[1]
