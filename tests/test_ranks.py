"""The law on many processes (DeepSpeed and gloo, nothing mocked), what ranks tell each other, and
fp16 under every engine.
"""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import memory
from experiments.law import TAU, make_micro_batches, split, texts_of, toy, vector
from losses import pair_loss
from plumbing.ranks import Ranks
from tests.conftest import FLAGS, ROOT, python, torchrun

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is installed on Linux alone")


# the law, on processes

def rows(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def test_many_processes_and_every_zero_stage_make_the_update_of_one_process_in_one_pass():
    """Three cells of each engine, on 2 processes ZeRO 0 to 3, on 4 stage 2: fp32 within 1e-4 in
    micro-batches whose number differs from rank to rank, bf16 within 1 %, AdamW with clipping
    within 1e-3. Each of q, p and n is gathered once a step and its gradient handed back once, in
    however many passes: 2 collectives each way in stage 2, 3 in stage 3."""
    run = python("-m", "experiments.law", "--cells", "few", "--processes", 2, 4)
    assert run.returncode == 0, run.stdout + run.stderr
    assert [(row[0], row[1], row[2], *row[-2:]) for row in rows(run.stdout)] == [
        ("2", "ZeRO 0", "3", "2, 3", "OK"), ("2", "ZeRO 1", "3", "2, 3", "OK"),
        ("2", "ZeRO 2", "3", "2, 3", "OK"), ("2", "ZeRO 3", "3", "2, 3", "OK"),
        ("4", "ZeRO 2", "3", "2, 3", "OK")]


def test_the_law_sees_a_factor_of_the_world_size():
    """The gradient of the gathered columns times W, as when a reduce-scatter sum meets an
    all-gather that sums as well: every cell is red, AdamW's too, since it is a part of the gradient
    that grows, and the direction turns."""
    run = python("-m", "experiments.law", "--cells", "few", "--processes", 2, "--planted")
    assert run.returncode == 1, run.stderr
    assert [row[-1] for row in rows(run.stdout)] == ["FAIL (3 cells)"] * 4


# The mistake that --check is there for has to be planted: there is none to find.
PLANTED = """import sys, train
from plumbing.ranks import Gather
honest = Gather.backward
Gather.backward = staticmethod(lambda ctx, gradient: (2 * honest(ctx, gradient)[0], None))
train.main(sys.argv[1:])
"""


def test_check_passes_on_two_ranks_and_fails_where_a_factor_is_planted(folder):
    check = torchrun(ROOT / "train.py", *FLAGS, "--check")
    assert check.returncode == 0, check.stderr
    assert "norm ratio 1.0000" in check.stdout
    Path("planted.py").write_text(PLANTED)
    planted = torchrun("planted.py", *FLAGS, "--check")
    assert planted.returncode == 1
    assert "norm ratio" in planted.stdout and "norm ratio 1.0000" not in planted.stdout


# what ranks tell each other

TOLD = """import json, torch
from pathlib import Path
from plumbing.ranks import Ranks

ranks = Ranks()
r = ranks.rank
own = torch.tensor([[10.0 * r]], requires_grad=True)
columns = ranks.gather(own)
(columns * torch.tensor([[1.0], [2.0]]) * (r + 1)).sum().backward()
try:
    ranks.on_rank_0(lambda: Path("/no/such/file").read_text())
    error = "nothing"
except FileNotFoundError as caught:
    error = type(caught).__name__
told = {"columns": columns.flatten().tolist(), "gradient": own.grad.item(),
        "total": ranks.sum(r, 1), "all": ranks.gather_objects("ab"[r]),
        "once": ranks.on_rank_0(lambda: f"from {r}"), "error": error}
Path(f"rank{r}").write_text(json.dumps(told))
ranks.leave()
"""


def test_two_ranks_gather_add_and_fail_together(tmp_path, monkeypatch):
    """Rank r has the row 10 r and the loss (r + 1) (1 x_0 + 2 x_1) of the columns x. So row 0's
    gradient, summed over the losses, is 1 (1 + 2) = 3, and row 1's is 2 (1 + 2) = 6. What rank 0
    could not open is an error on both."""
    monkeypatch.chdir(tmp_path)
    Path("told.py").write_text(TOLD)
    run = torchrun("told.py")
    assert run.returncode == 0, run.stderr
    for r, gradient in (0, 3.0), (1, 6.0):
        assert json.loads(Path(f"rank{r}").read_text()) == {
            "columns": [0.0, 10.0], "gradient": gradient, "total": [1.0, 2.0],
            "all": ["a", "b"], "once": "from 0", "error": "FileNotFoundError"}


@pytest.mark.parametrize("rank, order", [(0, ["builds", "tells"]), (1, ["is told", "builds"])])
def test_what_rank_0_builds_is_there_when_others_look_for_it(rank, order):
    def gather_objects(value):
        did.append("is told" if rank else "tells")
        return [(None, None)]

    did, ranks = [], Ranks(alone=True)
    ranks.rank, ranks.gather_objects = rank, gather_objects
    ranks.rank_0_first(lambda: did.append("builds") or "built")
    assert did == order


def test_what_rank_0_cannot_build_no_other_rank_tries():
    ranks = Ranks(alone=True)
    ranks.rank = 1
    ranks.gather_objects = lambda _: [(None, OSError("no room"))]
    with pytest.raises(OSError, match="no room"):
        ranks.rank_0_first(lambda: pytest.fail("it tries"))


# fp16, and what happens in a layer under an engine

@pytest.fixture(scope="module")
def alone():
    """This process, in which DeepSpeed opens a process group of one: left behind are neither that,
    nor what it writes into the environment, nor the linear layer that ZeRO-3 puts into torch."""
    environment, linear = dict(os.environ), torch.nn.functional.linear
    yield Ranks()
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.nn.functional.linear = linear
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def build(alone, tmp_path):
    """build(dtype, zero) -> a toy encoder and its engine of plain SGD. ZeRO with buckets of a toy's
    size."""
    built = []

    def build(dtype, zero):
        sizes = {"stage": zero, "reduce_bucket_size": 5000, "stage3_param_persistence_threshold": 0}
        config = tmp_path / "zero.json"
        config.write_text(json.dumps({"zero_optimization": sizes}))
        encoder = toy()
        scaling = memory.mixed_precision(encoder, dtype)
        optimizer = torch.optim.SGD(encoder.parameters(), lr=0.0)
        engine = memory.make_engine(
            encoder, optimizer, 0.0, scaling, alone, None if zero is None else str(config))
        built.append(engine)
        return encoder, engine

    yield build
    for engine in built:
        if isinstance(engine, memory.ZeroEngine):
            engine.model.destroy()


def weights(encoder, engine):
    with engine.whole():
        return vector(encoder)


def pass_back(encoder, engine):
    """Both passes of a batch -> the gradient at the embeddings, and those inside the last layer."""
    inside = []

    def listen(module, inputs, output):
        if output.requires_grad:
            output.register_hook(inside.append)

    layer = encoder.backbone.encoder["layer"][-1].mlp.wo
    hook = layer.register_forward_hook(listen)
    embeddings = engine.embed(make_micro_batches(texts_of(0, 2), 3))
    q, p, _ = split(embeddings, 2)
    pair_loss(q, p, TAU).backward()
    engine.backward(embeddings.grad)
    hook.remove()
    return embeddings.grad, inside


def assert_near(a, b):
    assert torch.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0) > 0.999
    assert a.double().norm() / b.double().norm() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("zero", [None, 0, 1, 2, 3])
def test_fp16_scales_the_gradient_inside_the_encoder_and_nowhere_else(build, zero):
    """Inside a layer 2^16 times the gradient of fp32, in fp16; at the embeddings and in the update
    (SGD with lr = 1: minus the gradient) as in fp32. 2^60 is beyond fp16: the weights stay, the
    step is counted, the scale halved, and the next step, at 2^16 again, is a good one: nothing of
    the overflow is left in the gradients."""
    plain, plain_engine = build(torch.float32, None)
    cached, inside = pass_back(plain, plain_engine)
    gradient = torch.cat([p.grad.flatten() for p in plain.parameters()])

    encoder, engine = build(torch.float16, zero)
    before = weights(encoder, engine)
    engine.scaling.scale = 2.0**60
    pass_back(encoder, engine)
    assert not torch.tensor(engine.step(1.0)).isfinite()
    assert torch.equal(weights(encoder, engine), before)
    assert (engine.scaling.skipped, engine.scaling.scale) == (1, 2.0**59)

    engine.scaling.scale = 2.0**16
    cached_16, inside_16 = pass_back(encoder, engine)
    norm = engine.step(1.0)
    assert cached_16.dtype == torch.float32 and {g.dtype for g in inside_16} == {torch.float16}
    assert_near(cached_16, cached)
    assert_near(torch.cat([g.flatten().double() for g in inside_16]) / 2**16,
                torch.cat([g.flatten() for g in inside]))
    assert_near(before - weights(encoder, engine), gradient)
    assert norm == pytest.approx(gradient.norm().item(), rel=0.01) and engine.scaling.skipped == 1


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_autocast_is_on_in_a_layer_under_deepspeed(build, zero):
    """DeepSpeed switches off an autocast around it; ours is entered inside. The parameters stay
    fp32."""
    encoder, engine = build(torch.bfloat16, zero)
    cached, inside = pass_back(encoder, engine)
    assert {g.dtype for g in inside} == {torch.bfloat16} and cached.dtype == torch.float32
    engine.step(1.0)
    with engine.whole():
        assert {p.dtype for p in encoder.parameters()} == {torch.float32}
