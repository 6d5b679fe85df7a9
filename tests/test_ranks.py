"""The law on many processes (DeepSpeed and gloo, nothing mocked), what ranks tell each other, and fp16's scale."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import memory
from experiments.law import K, TAU, cut, texts_of, toy, vector
from losses import pair_loss
from memory import LossScale, MicroBatch
from plumbing.ranks import Ranks
from tests.test_train import FLAGS, folder  # noqa: F401, a fixture

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is installed on Linux alone")
HERE = Path(__file__).parents[1]


def python(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    return subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=600)


def torchrun(*script):
    return python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, *script)


def rows(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


# the law, on processes

def test_many_processes_and_every_zero_stage_make_the_update_of_one_process_in_one_pass():
    """Three cells of each engine, on 2 processes ZeRO 0 to 3, on 4 stage 2: fp32 within 1e-4 in micro-batches whose number
    differs from rank to rank, bf16 within 1 %, AdamW with clipping within 1e-3. Each of q, p and n is gathered once a step
    and its gradient handed back once, in however many passes: 2 collectives each way in stage 2, 3 in stage 3."""
    run = python("-m", "experiments.law", "--cells", "few", "--processes", 2, 4)
    assert run.returncode == 0, run.stdout + run.stderr
    assert [(row[0], row[1], row[2], *row[-2:]) for row in rows(run.stdout)] == [
        *(("2", f"ZeRO {zero}", "3", "2, 3", "OK") for zero in range(4)), ("4", "ZeRO 2", "3", "2, 3", "OK")]


def test_the_law_sees_a_factor_of_the_world_size():
    """The gradient of the gathered columns times W, as when a reduce-scatter sum meets an all-gather that sums as well: every
    cell is red, AdamW's too, since it is a part of the gradient that grows, and the direction turns."""
    run = python("-m", "experiments.law", "--cells", "few", "--processes", 2, "--planted")
    assert run.returncode == 1, run.stderr
    assert [row[-1] for row in rows(run.stdout)] == ["FAIL (3 cells)"] * 4


PLANTED = """import sys, train
from plumbing.ranks import Gather
honest = Gather.backward
Gather.backward = staticmethod(lambda ctx, gradient: (2 * honest(ctx, gradient)[0], None))
train.main(sys.argv[1:])
"""


def test_check_passes_on_two_ranks_and_fails_where_a_factor_is_planted(folder):
    check = torchrun(HERE / "train.py", *FLAGS, "--check")
    assert check.returncode == 0, check.stderr
    assert "norm ratio 1.0000" in check.stdout and "they agree" in check.stdout
    Path("planted.py").write_text(PLANTED)
    planted = torchrun("planted.py", *FLAGS, "--check")
    assert planted.returncode == 1
    assert "THEY DIFFER" in planted.stdout, planted.stderr


# what ranks tell each other

TOLD = """import torch
from pathlib import Path
from plumbing.ranks import Ranks

ranks = Ranks()
r = ranks.rank
own = torch.tensor([[10.0 * r]], requires_grad=True)
columns = ranks.gather(own)
(columns * torch.tensor([[1.0], [2.0]]) * (r + 1)).sum().backward()
try:
    ranks.once(lambda: Path("/no/such/file").read_text())
    error = "nothing"
except FileNotFoundError as caught:
    error = type(caught).__name__
once = ranks.once(lambda: f"from {r}")
said = columns.flatten().tolist(), own.grad.item(), ranks.total(r, 1), ranks.all("ab"[r]), once, error
Path(f"rank{r}").write_text(repr(said))
ranks.leave()
"""


def test_two_ranks_gather_add_and_fail_together(tmp_path, monkeypatch):
    """Rank r has the row 10 r and the loss (r + 1) (1 x_0 + 2 x_1) of the columns x. So row 0's gradient, summed over the
    losses, is 1 (1 + 2) = 3, and row 1's is 2 (1 + 2) = 6. What rank 0 could not open is an error on both."""
    monkeypatch.chdir(tmp_path)
    Path("told.py").write_text(TOLD)
    run = torchrun("told.py")
    assert run.returncode == 0, run.stderr
    for r in (0, 1):
        assert eval(Path(f"rank{r}").read_text()) == (
            [0.0, 10.0], [3.0, 6.0][r], [1.0, 2.0], ["a", "b"], "from 0", "FileNotFoundError")


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_equalise_halves_the_largest_and_keeps_every_text_and_its_padding(count):
    """7 texts in micro-batches of 5 and 2, cut further: 5+2, 2+3+2, 2+1+2+2 ... until each is alone. Fewer are never joined."""
    whole = [MicroBatch(torch.arange(5), torch.arange(20).view(5, 4), torch.ones(5, 4)),
             MicroBatch(torch.tensor([6, 5]), torch.arange(6).view(2, 3), torch.eye(2, 3))]
    parts = memory.equalise(whole, count)
    assert len(parts) == max(2, count) and min(len(part.index) for part in parts) >= 1
    assert torch.cat([part.index for part in parts]).tolist() == [0, 1, 2, 3, 4, 6, 5]
    text = lambda batches: {int(i): (ids.tolist(), mask.tolist()) for b in batches for i, ids, mask in zip(*b)}
    assert text(parts) == text(whole)
    assert [len(part.index) for part in memory.equalise(whole, 3)] == [2, 3, 2]


# fp16, and what happens in a layer under an engine

def test_the_loss_scale_halves_on_overflow_and_doubles_after_2000_steps():
    """2^16, an overflow: 2^15; 1,999 good steps change nothing, the 2,000th doubles; another overflow starts the count anew."""
    scaling = LossScale(torch.float16)
    assert (scaling.scale, scaling.survives(float("inf")), scaling.scale, scaling.skipped) == (65536, False, 32768, 1)
    assert all(scaling.survives(1.0) for _ in range(1999)) and scaling.scale == 32768
    assert scaling.survives(1.0) and scaling.scale == 65536
    assert all(scaling.survives(1.0) for _ in range(1999)) and not scaling.survives(float("nan"))
    assert (scaling.scale, scaling.skipped) == (32768, 2)
    assert all(scaling.survives(1.0) for _ in range(1999)) and scaling.scale == 32768


def test_without_fp16_the_scale_is_1_and_never_grows():
    scaling = LossScale(torch.bfloat16)
    assert all(scaling.survives(1.0) for _ in range(4000)) and scaling.scale == 1 and scaling.skipped == 0


def test_fp16_is_refused_on_a_cpu():
    with pytest.raises(ValueError, match="--precision fp16: needs a GPU"):
        memory.choose_precision("fp16", torch.device("cpu"))


@pytest.fixture(scope="module")
def alone():
    """This process, in which DeepSpeed opens a process group of one: left behind are neither that, nor what it writes into
    the environment, nor the linear layer that ZeRO-3 puts into torch."""
    environment, linear = dict(os.environ), torch.nn.functional.linear
    yield Ranks()
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.nn.functional.linear = linear
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def build(alone, tmp_path):
    """build(dtype, zero) -> a toy encoder and its engine of plain SGD. ZeRO with buckets of a toy's size."""
    built = []

    def build(dtype, zero):
        config = tmp_path / "zero.json"
        config.write_text('{"zero_optimization": {"stage": %s, "reduce_bucket_size": 5000, '
                          '"stage3_param_persistence_threshold": 0}}' % zero)
        encoder = toy()
        scaling = memory.mixed_precision(encoder, dtype)
        optimizer = torch.optim.SGD(encoder.parameters(), lr=0.0)
        built.append(memory.engine(encoder, optimizer, 0.0, scaling, alone, None if zero is None else str(config)))
        return encoder, built[-1]

    yield build
    for engine in built:
        if isinstance(engine, memory.Zero):
            engine.model.destroy()


def weights(encoder, engine):
    with engine.whole():
        return vector(encoder)


def pass_back(encoder, backward):
    """One two-pass batch -> the gradients at the embeddings and inside the last layer, the latter with its dtype."""
    cached, inside = [], []
    layer = encoder.backbone.encoder["layer"][-1].mlp.wo

    def listen(module, inputs, output):
        if output.requires_grad:
            output.register_hook(inside.append)

    def loss_of(e):
        e.register_hook(cached.append)
        return pair_loss(e[:K], e[K:], TAU),

    hook = layer.register_forward_hook(listen)
    backward(cut(texts_of(0, 2), 3), loss_of)
    hook.remove()
    return cached[0], inside


def near(a, b):
    assert torch.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0) > 0.999
    assert a.double().norm() / b.double().norm() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("zero", [None, 0, 1, 2, 3])
def test_fp16_scales_the_gradient_inside_the_encoder_and_nowhere_else(build, zero):
    """Inside a layer 2^16 times the gradient of fp32, in fp16; at the embeddings and in the update (SGD with lr = 1: minus
    the gradient) as in fp32. 2^60 is beyond fp16: the weights stay, the step is counted, the scale halved, and the next step,
    at 2^16 again, is a good one: nothing of the overflow is left in the gradients."""
    plain = toy()
    cached, inside = pass_back(plain, lambda *xs: memory.backward(plain, *xs))
    gradient = torch.cat([p.grad.flatten() for p in plain.parameters()])

    encoder, engine = build(torch.float16, zero)
    before = weights(encoder, engine)
    engine.scaling.scale = 2.0**60
    pass_back(encoder, engine.backward)
    assert not torch.tensor(engine.step(1.0)).isfinite()
    assert torch.equal(weights(encoder, engine), before)
    assert (engine.scaling.skipped, engine.scaling.scale) == (1, 2.0**59)

    engine.scaling.scale = 2.0**16
    cached_16, inside_16 = pass_back(encoder, engine.backward)
    norm = engine.step(1.0)
    assert (cached_16.dtype, inside_16[0].dtype) == (torch.float32, torch.float16)
    near(cached_16, cached)
    near(*(torch.cat([g.flatten().double() / scale for g in xs]) for xs, scale in ((inside_16, 2**16), (inside, 1))))
    near(before - weights(encoder, engine), gradient)
    assert norm == pytest.approx(gradient.norm().item(), rel=0.01) and engine.scaling.skipped == 1


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_autocast_is_on_in_a_layer_under_deepspeed(build, zero):
    """DeepSpeed switches off an autocast around it; ours is entered inside. The parameters stay fp32."""
    encoder, engine = build(torch.bfloat16, zero)
    cached, inside = pass_back(encoder, engine.backward)
    assert {g.dtype for g in inside} == {torch.bfloat16} and cached.dtype == torch.float32
    engine.step(1.0)
    with engine.whole():
        assert {p.dtype for p in encoder.parameters()} == {torch.float32}
