"""§5.3 changes what a step costs, never what it computes: updates of plain SGD, with and without
each of memory.py's means. K pairs, N negatives a pair, M = K (2 + N) = 24 texts.
"""

import pytest
import torch
from torch.nn.utils import parameters_to_vector
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import losses
import memory
from losses import hard_negative_loss, pair_loss
from plumbing import allocator, plan
from tests.conftest import python, small_encoder

K, N = 6, 2
M = K * (2 + N)
IN_ORDER = list(range(M))
SHUFFLED = torch.randperm(M, generator=torch.Generator().manual_seed(2)).tolist()


def make_micro_batches(size, order=IN_ORDER):
    """(index, input_ids, attention_mask) of `size` texts each; a text has 3 to 12 tokens."""
    g, texts = torch.Generator().manual_seed(1), []
    for _ in range(M):
        length = int(torch.randint(3, 13, (), generator=g))
        texts.append(torch.randint(1, 50, (length,), generator=g))
    micro_batches = []
    for start in range(0, M, size):
        index = order[start : start + size]
        ids = pad_sequence([texts[i] for i in index], batch_first=True)
        mask = pad_sequence([torch.ones_like(texts[i]) for i in index], batch_first=True)
        micro_batches.append((torch.tensor(index), ids, mask))
    return micro_batches


def stage_2(e):
    return pair_loss(e[:K], e[K : 2 * K], 0.05)


def stage_3(e):
    return hard_negative_loss(e[:K], e[K : 2 * K], e[2 * K :].view(K, N, -1), 0.05)


def engine_of(encoder, keep=1, lr=0.1):
    optimizer = torch.optim.SGD(encoder.parameters(), lr)
    scaling = memory.LossScale(torch.float32)
    return memory.Engine(encoder, optimizer, 0.0, scaling, graphs_to_keep=lambda _: keep)


def pass_back(engine, micro_batches, loss_of, factor=1):
    """Both passes -> the embeddings, and the gradients of all parameters."""
    embeddings = engine.embed(micro_batches)
    loss_of(embeddings).backward()
    engine.backward(factor * embeddings.grad)
    return embeddings, [p.grad for p in engine.encoder.parameters()]


def vector(encoder):
    return parameters_to_vector(encoder.parameters()).detach().clone()


def sgd_update(encoder, micro_batches, loss_of, steps=3, factor=1):
    """theta_after - theta_before of plain SGD."""
    engine, before = engine_of(encoder), vector(encoder)
    for _ in range(steps):
        pass_back(engine, micro_batches, loss_of, factor)
        engine.step(0.1)
    return vector(encoder) - before


def one_pass_update(loss_of):
    """The same of three steps, without memory.py."""
    encoder = small_encoder()
    before, optimizer = vector(encoder), torch.optim.SGD(encoder.parameters(), 0.1)
    (_, ids, mask), = make_micro_batches(M)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(encoder(ids, mask)).backward()
        optimizer.step()
    return vector(encoder) - before


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


# the two passes

@pytest.mark.parametrize("loss_of", [stage_2, stage_3])
@pytest.mark.parametrize("size, order", [
    (1, IN_ORDER), (5, IN_ORDER), (23, IN_ORDER), (24, IN_ORDER), (7, SHUFFLED), (24, SHUFFLED)])
def test_any_cut_into_micro_batches_gives_the_update_of_one_pass(loss_of, size, order):
    """dL/dtheta = sum_c d<E_c, G_c>/dtheta for every partition c: equal but for rounding, of which
    2e-5 is usual."""
    found = sgd_update(small_encoder(), make_micro_batches(size, order), loss_of)
    assert relative_error(found, one_pass_update(loss_of)) < 1e-4


def test_the_comparison_would_see_a_factor():
    """A gradient that comes in doubled makes twice the update, an error of 1: the bound above can
    fail."""
    micro_batches = make_micro_batches(5)
    whole = sgd_update(small_encoder(), micro_batches, stage_2, steps=1)
    doubled = sgd_update(small_encoder(), micro_batches, stage_2, steps=1, factor=2)
    assert relative_error(doubled, whole) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("loss_of", [stage_2, stage_3])
def test_the_second_pass_repeats_the_dropout_of_the_first(loss_of):
    """With a fixed seed the loss of pass 1 is a function of the weights, whose slope along its own
    gradient g is |g|, which (L(theta + h g/|g|) - L(theta - h g/|g|)) / 2h tells. With other
    masks in pass 2, g would be no gradient of this function: half off."""
    encoder, micro_batches = small_encoder(dropout=0.3), make_micro_batches(5)
    engine, theta, h = engine_of(encoder), vector(encoder), 1e-3

    def loss_at(weights):
        torch.nn.utils.vector_to_parameters(weights, encoder.parameters())
        torch.manual_seed(3)
        return loss_of(engine.embed(micro_batches)).item()

    torch.manual_seed(3)
    _, gradients = pass_back(engine, micro_batches, loss_of)
    g = parameters_to_vector(gradients)
    slope = (loss_at(theta + h * g / g.norm()) - loss_at(theta - h * g / g.norm())) / (2 * h)
    assert slope == pytest.approx(g.norm().item(), rel=1e-3)


@pytest.mark.parametrize("keep, again", [(1, 2), (2, 1), (3, 0), (9, 0)])
def test_what_keeps_its_graph_is_embedded_once(keep, again):
    """Of 3 micro-batches, those without a graph go through the encoder a second time."""
    encoder, forward_passes = small_encoder(), []
    encoder.backbone.embeddings.register_forward_hook(lambda *_: forward_passes.append(1))
    pass_back(engine_of(encoder, keep), make_micro_batches(8), stage_2)
    assert len(forward_passes) == 3 + again


@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_keeps_its_graph_changes_no_bit_and_no_random_number(checkpointed):
    """With dropout: the same masks, added up in the same order; the generator is left at the same
    place. Of 5 micro-batches, keep = 5 embeds nothing again."""
    found = []
    for keep in range(1, 6):
        encoder = small_encoder(dropout=0.3)
        if checkpointed:
            memory.checkpoint_layers(encoder)
        torch.manual_seed(3)
        embeddings, gradients = pass_back(engine_of(encoder, keep), make_micro_batches(5), stage_3)
        found.append([embeddings, *gradients, torch.rand(3)])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_dropout_or_none_a_step_leaves_the_generator_at_the_same_place():
    draws = []
    for dropout in (0.0, 0.3):
        encoder = small_encoder(dropout)
        torch.manual_seed(3)
        pass_back(engine_of(encoder), make_micro_batches(5), stage_2)
        draws.append(torch.rand(3))
    assert torch.equal(*draws)


GROWN = """
import torch
from model import SIZES, JinaBertConfig, JinaBertModel, PooledEncoder
from plumbing import plan
from tests.test_memory import engine_of

def step(count):
    micro_batches, texts = [], 0
    for c in range(count):
        length = 100 - 90 * c // count
        ids = torch.ones(1024 // length, length, dtype=torch.long)
        micro_batches.append((torch.arange(texts, texts + len(ids)), ids, torch.ones_like(ids)))
        texts += len(ids)
    embeddings = engine.embed(micro_batches)
    embeddings.square().mean().backward()
    engine.backward(embeddings.grad)

engine = engine_of(PooledEncoder(JinaBertModel(JinaBertConfig(vocab_size=50, **SIZES["tiny"]))))
device = torch.device("cpu")
step(4)
before = plan.memory_held(device)
for count in (8, 150):
    plan.reset_peak(device)
    step(count)
    print(plan.memory_held(device, peak=True) - before)
"""


HELD = """
import torch
import model, train
from plumbing import plan
from plumbing.ranks import Ranks

ranks, encoder = Ranks(alone=True), model.create("tiny").train()
flags = ["--memory", "1.3", "--checkpoint-layers", "--batch-size", "2048", "--max-length", "32",
         "--micro-tokens", "2048"]
args, _ = train.parse_arguments(flags, ranks)
optimizer = torch.optim.AdamW(encoder.parameters())
engine, made = train.prepare(encoder, optimizer, args.clip, args, ranks)
ids = torch.ones(64, 32, dtype=torch.long)
micro_batches = [(index, ids, ids) for index in torch.arange(4096).split(64)]
embeddings = engine.embed(micro_batches)
kept = len(engine.graphs)
train.step_loss(*embeddings.split(2048), None, .05, ranks)[0].backward()
engine.backward(embeddings.grad)
engine.step(1e-3)
print(kept, plan.memory_held(ranks.device, peak=True))
"""

no_peaks = pytest.mark.skipif(not plan.memory_held(torch.device("cpu"), peak=True),
                              reason="no /proc tells peaks")


@no_peaks
def test_graphs_of_checkpointed_layers_stay_within_the_memory_that_was_given():
    """All are kept, 0.4 GB. What a layer frees lay in pieces between them before: two fifths
    more than --memory."""
    kept, peak = map(int, python("-c", HELD).stdout.split()[-2:])
    assert kept == 64 and peak < 1.05 * 1.3e9


@no_peaks
def test_a_step_of_many_micro_batches_holds_hardly_more_than_one_of_few():
    """Of ever new shapes, 1,000 tokens each. What was freed lay in pieces before: 0.6 MB more of
    them for every micro-batch."""
    run = python("-c", GROWN)
    few, many = map(int, run.stdout.split())
    assert many - few < 50e6


def test_sparse_gradients_of_the_embeddings_give_the_dense_ones():
    """Three steps, so that the second adds to what zero_grad left."""
    sparse = small_encoder()
    allocator.sparse_gradients(sparse)
    layouts = set()
    weight = sparse.backbone.embeddings.word_embeddings.weight
    weight.register_hook(lambda gradient: layouts.add(gradient.layout))
    micro_batches = make_micro_batches(5)
    found = sgd_update(sparse, micro_batches, stage_3)
    assert relative_error(found, sgd_update(small_encoder(), micro_batches, stage_3)) < 1e-5
    assert layouts == {torch.sparse_coo}, "they were sparse"


# checkpoints of activations

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["jina", "bert"])
@pytest.mark.parametrize("size", [24, 5])
def test_checkpointed_layers_give_bit_identical_gradients_with_dropout_on(kind, size, dtype):
    """The layers run again on the same inputs with the same masks: torch.equal, which holds on
    CPU."""
    found = []
    for checkpointed in (False, True):
        encoder = small_encoder(dropout=0.2, kind=kind)
        memory.mixed_precision(encoder, dtype)
        if checkpointed:
            memory.checkpoint_layers(encoder)
        torch.manual_seed(3)
        found.append(pass_back(engine_of(encoder), make_micro_batches(size), stage_3)[1])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_checkpointed_layers_keep_one_input_per_layer():
    """Of a layer stays its input, 24 texts x 12 tokens x 32 floats x 4 bytes = 36,864 bytes,
    110,592 for 3 layers. Beside them what is outside the layers: embeddings and their LayerNorm,
    the bias, pooling, together under 8 such tensors, so 405,504 bytes at most. Every layer's
    forward runs twice."""
    def saved_bytes(checkpointed):
        encoder, seen, calls = small_encoder(), {}, []
        layer = encoder.backbone.encoder["layer"][0]
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        if checkpointed:
            memory.checkpoint_layers(encoder)
        (_, ids, mask), = make_micro_batches(M)
        parameters = {p.untyped_storage().data_ptr() for p in encoder.parameters()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            embeddings = encoder(ids, mask)
        stage_3(embeddings).backward()
        return sum(seen.values()), len(calls)

    plain, plain_calls = saved_bytes(False)
    small, small_calls = saved_bytes(True)
    assert (plain_calls, small_calls) == (1, 2)
    assert 110_592 <= small <= 405_504 < plain


def test_a_model_without_a_list_of_layers_is_named():
    encoder = small_encoder()
    encoder.backbone.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="--checkpoint-layers: JinaBertModel .* 7 layers"):
        memory.checkpoint_layers(encoder)


# mixed precision

def test_mixed_precision_multiplies_in_bf16_and_keeps_fp32_around_it():
    """Inside a layer bf16, in both passes; embeddings, parameters and their gradients fp32."""
    encoder, inside = small_encoder(), set()
    layer = encoder.backbone.encoder["layer"][0]
    layer.mlp.wo.register_forward_hook(lambda module, inputs, output: inside.add(output.dtype))
    memory.mixed_precision(encoder, torch.bfloat16)
    embeddings, gradients = pass_back(engine_of(encoder), make_micro_batches(12), stage_2)
    outside = [embeddings, *gradients, *encoder.parameters()]
    assert inside == {torch.bfloat16} and {x.dtype for x in outside} == {torch.float32}


@pytest.mark.parametrize("kind", ["jina", "bert"])
def test_bf16_gives_nearly_the_fp32_update(kind):
    """8 bits of mantissa: cosine at least 0.99 with the fp32 gradient, norm within 5 % (tau = 0.05
    magnifies rounding)."""
    mixed = small_encoder(kind=kind)
    memory.mixed_precision(mixed, torch.bfloat16)
    a = sgd_update(small_encoder(kind=kind), make_micro_batches(5), stage_2, steps=1)
    b = sgd_update(mixed, make_micro_batches(5), stage_2, steps=1)
    assert torch.cosine_similarity(a, b, dim=0) > 0.99
    assert b.norm() / a.norm() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("dtype, fused", [(torch.float32, True), (torch.bfloat16, False)])
def test_a_bert_takes_no_fused_attention_in_bf16(dtype, fused):
    """On a CPU its backward pass is slow in bf16."""
    encoder = small_encoder(kind="bert")
    memory.mixed_precision(encoder, dtype)
    _, ids, mask = make_micro_batches(5)[0]
    with torch.profiler.profile() as profile:
        encoder(ids, mask)
    operations = {event.key for event in profile.key_averages()}
    assert ("aten::scaled_dot_product_attention" in operations) == fused


@pytest.mark.parametrize("unit, cpu, dtype", [
    ("avx2", "AMD EPYC", torch.float32), ("amx_bf16", "Intel Xeon", torch.bfloat16),
    ("avx512_bf16", "Intel Xeon", torch.float32), ("avx512_bf16", "AMD EPYC", torch.bfloat16)])
def test_auto_is_bf16_only_where_the_hardware_multiplies_it_fast(monkeypatch, unit, cpu, dtype):
    """The hardware is patched, for a test has no other."""
    monkeypatch.setattr(torch.cpu, "get_capabilities",
                        lambda: {unit: True, "bf16": False, "cpu_name": cpu})
    found, reason = memory.choose_precision("auto", torch.device("cpu"))
    assert found == dtype and (unit in reason) == (dtype == torch.bfloat16)
    assert memory.choose_precision("fp32", torch.device("cpu"))[0] == torch.float32


def test_fp16_is_refused_on_a_cpu():
    with pytest.raises(ValueError, match="--precision fp16"):
        memory.choose_precision("fp16", torch.device("cpu"))


def test_the_loss_scale_halves_on_overflow_and_doubles_after_2000_steps():
    """2^16, an overflow: 2^15; 1,999 good steps change nothing, the 2,000th doubles; another
    overflow starts the count anew."""
    scaling = memory.LossScale(torch.float16)
    assert scaling.scale == 65536
    assert not scaling.survives(float("inf"))
    assert scaling.scale == 32768 and scaling.skipped == 1
    assert all(scaling.survives(1.0) for _ in range(1999)) and scaling.scale == 32768
    assert scaling.survives(1.0) and scaling.scale == 65536
    assert all(scaling.survives(1.0) for _ in range(1999))
    assert not scaling.survives(float("nan"))
    assert scaling.scale == 32768 and scaling.skipped == 2
    assert all(scaling.survives(1.0) for _ in range(1999)) and scaling.scale == 32768


def test_without_fp16_the_scale_is_1_and_never_grows():
    scaling = memory.LossScale(torch.bfloat16)
    assert all(scaling.survives(1.0) for _ in range(4000))
    assert scaling.scale == 1 and scaling.skipped == 0


# what it does for a GPU

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_goes_without_cudnn_in_any_precision(dtype):
    """It plans anew for every new shape, and every micro-batch has one."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        memory.mixed_precision(small_encoder(), dtype)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_the_loss_makes_tiles_of_the_size_that_suits_the_device(monkeypatch):
    """8 x 8 logits in tiles of 3, or of 5 on a GPU where there is one."""
    assert losses.TILE.keys() >= {"cpu", "cuda"}
    monkeypatch.setattr(losses, "TILE", {"cpu": 3, "cuda": 5})
    made = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.mm.default:
                made.append(tuple(result.shape))
            return result

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with Products():
        pair_loss(*torch.ones(2, 8, 4, device=device), 0.05)
    assert max(made) == (losses.TILE[device], losses.TILE[device])


# what it is told, and by whom

@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_equalise_halves_the_largest_and_keeps_every_text_and_its_padding(count):
    """7 texts in micro-batches of 5 and 2, cut further: 5+2, 2+3+2, 2+1+2+2 ... until each is
    alone. Fewer are never joined."""
    whole = [(torch.arange(5), torch.arange(20).view(5, 4), torch.ones(5, 4)),
             (torch.tensor([6, 5]), torch.arange(6).view(2, 3), torch.eye(2, 3))]
    parts = memory.equalise(whole, count)
    sizes = {1: [5, 2], 2: [5, 2], 3: [2, 3, 2], 5: [1, 1, 1, 2, 2], 7: [1] * 7}[count]
    assert [len(index) for index, _, _ in parts] == sizes

    def texts(micro_batches):
        return [(int(i), ids.tolist(), seen.tolist())
                for micro_batch in micro_batches for i, ids, seen in zip(*micro_batch)]

    assert texts(parts) == texts(whole)


def test_memory_knows_no_text_and_not_what_plans_it():
    code = "import sys; before = set(sys.modules); import memory; print(*set(sys.modules) - before)"
    imported = set(python("-c", code).stdout.split())
    assert "plumbing.ranks" in imported
    assert imported.isdisjoint({"data", "transformers", "tokenizers", "plumbing.plan"})
