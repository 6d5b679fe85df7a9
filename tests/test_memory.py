"""§5.3 changes what a step costs, never what it computes: updates of plain SGD, with and without each of memory.py's means."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import memory
from plumbing import allocator
from losses import hard_negative_loss, pair_loss
from model import SIZES, JinaBertConfig, JinaBertModel, PooledEncoder

K, N = 6, 2  # pairs, negatives per pair


def small_encoder(dropout=0.0, kind="jina"):
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
                 hidden_dropout_prob=dropout)
    if kind == "jina":
        return PooledEncoder(JinaBertModel(JinaBertConfig(**sizes))).train()
    config = transformers.BertConfig(**sizes, attention_probs_dropout_prob=dropout)
    return PooledEncoder(transformers.BertModel(config, add_pooling_layer=False)).train()


def wide_encoder():
    torch.manual_seed(0)
    return PooledEncoder(JinaBertModel(JinaBertConfig(vocab_size=50, **SIZES["tiny"])))


def step_texts(count=K * (2 + N)):
    """Token ids of `count` texts of 3 to 12 tokens."""
    g = torch.Generator().manual_seed(1)
    return [torch.randint(1, 50, (int(torch.randint(3, 13, (), generator=g)),), generator=g) for _ in range(count)]


def cut(texts, groups):
    """Micro-batches (index, input_ids, attention_mask) for the given groups of text numbers."""
    pad = lambda xs: torch.nn.utils.rnn.pad_sequence(xs, batch_first=True)
    return [(torch.tensor(g), pad([texts[i] for i in g]), pad([torch.ones_like(texts[i]) for i in g])) for g in groups]


def stage_2(e):
    return pair_loss(e[:K], e[K : 2 * K], 0.05), e.detach()


def stage_3(e):
    return hard_negative_loss(e[:K], e[K : 2 * K], e[2 * K :].view(K, N, -1), 0.05), e.detach()


def sgd_update(encoder, micro_batches, loss_of, steps=3, lr=0.1):
    """theta_after - theta_before of `steps` steps of plain SGD, as one vector."""
    theta = [p for p in encoder.parameters() if p.requires_grad]
    before = torch.nn.utils.parameters_to_vector(theta).detach().clone()
    optimizer = torch.optim.SGD(theta, lr)
    for _ in range(steps):
        optimizer.zero_grad()
        memory.backward(encoder, micro_batches, loss_of)
        optimizer.step()
    return torch.nn.utils.parameters_to_vector(theta).detach() - before


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def groups_of(size, count=K * (2 + N), order=None):
    order = order or list(range(count))
    return [order[i : i + size] for i in range(0, count, size)]


SHUFFLED = torch.randperm(K * (2 + N), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.mark.parametrize("loss_of", [stage_2, stage_3])
@pytest.mark.parametrize("groups", [groups_of(1), groups_of(5), groups_of(23), groups_of(7, order=SHUFFLED),
                                    groups_of(24, order=SHUFFLED)], ids=["1", "5", "23", "7 shuffled", "all shuffled"])
def test_any_cut_into_micro_batches_gives_the_update_of_one_pass(loss_of, groups):
    """dL/dtheta = sum_c d<E_c, G_c>/dtheta for every partition c: equal but for rounding, 1e-4 (DESIGN: 2e-5 is usual)."""
    texts = step_texts()
    whole = sgd_update(small_encoder(), cut(texts, groups_of(len(texts))), loss_of)
    assert relative_error(sgd_update(small_encoder(), cut(texts, groups), loss_of), whole) < 1e-4


def test_the_comparison_would_see_a_factor():
    """If every micro-batch's gradient came in doubled, the update of SGD would be far off: the bound above can fail."""
    texts = step_texts()
    whole = sgd_update(small_encoder(), cut(texts, groups_of(24)), stage_2, steps=1)
    doubled = sgd_update(small_encoder(), cut(texts, groups_of(5)), lambda e: (2 * stage_2(e)[0],), steps=1)
    assert relative_error(doubled, whole) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("loss_of", [stage_2, stage_3])
def test_the_second_pass_repeats_the_dropout_of_the_first(loss_of):
    """With dropout 0.3, against one graph kept over the same micro-batches with the seeds of their masks."""
    micro_batches = cut(step_texts(), groups_of(5))
    encoder = small_encoder(dropout=0.3)
    torch.manual_seed(3)
    loss, embeddings = memory.backward(encoder, micro_batches, loss_of)
    two_pass = [p.grad.clone() for p in encoder.parameters()]
    next_draw = torch.rand(3)

    encoder.zero_grad()
    torch.manual_seed(3)
    seeds = torch.randint(1 << 62, (len(micro_batches),)).tolist()
    after = torch.get_rng_state()
    kept = torch.cat([torch.manual_seed(seed) and encoder(ids, mask) for seed, (_, ids, mask) in zip(seeds, micro_batches)])
    loss_of(kept)[0].backward()
    assert torch.equal(loss, loss_of(kept)[0].detach()) and torch.equal(embeddings, kept.detach())
    for a, b in zip(two_pass, [p.grad for p in encoder.parameters()]):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6 * b.abs().max())
    torch.set_rng_state(after)
    assert torch.equal(next_draw, torch.rand(3)), "a step takes its seeds of the generator, and nothing else"


@pytest.mark.parametrize("kind", ["jina", "bert"])
@pytest.mark.parametrize("size", [24, 5])
def test_checkpointed_layers_give_bit_identical_gradients_with_dropout_on(kind, size):
    """The layers run again on the same inputs with the same masks: torch.equal, which holds on CPU."""
    gradients = []
    for checkpointed in (False, True):
        encoder = small_encoder(dropout=0.2, kind=kind)
        if checkpointed:
            memory.checkpoint_layers(encoder)
        torch.manual_seed(3)
        memory.backward(encoder, cut(step_texts(), groups_of(size)), stage_3)
        gradients.append([p.grad for p in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_checkpointed_layers_keep_one_input_per_layer():
    """Of a layer stays its input, 24 texts x 12 tokens x 32 floats x 4 bytes = 36,864 bytes, 110,592 for 3 layers. Beside
    them what is outside the layers: embeddings and their LayerNorm, the bias, pooling, together under 8 such tensors, so
    405,504 bytes at most. Every layer's forward runs twice."""
    def saved_bytes(checkpointed):
        encoder, seen, calls = small_encoder(), {}, []
        encoder.backbone.encoder["layer"][0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        if checkpointed:
            memory.checkpoint_layers(encoder)
        _, ids, mask = cut(step_texts(), groups_of(24))[0]
        parameters = {p.untyped_storage().data_ptr() for p in encoder.parameters()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            embeddings = encoder(ids, mask)
        stage_3(embeddings)[0].backward()
        return sum(seen.values()), len(calls)

    plain, plain_calls = saved_bytes(False)
    small, small_calls = saved_bytes(True)
    assert (plain_calls, small_calls) == (1, 2)
    assert 110_592 <= small <= 405_504 < plain


@pytest.mark.parametrize("keep, passes", [(1, "001-11"), (2, "011-1"), (3, "111-"), (9, "111-")])
def test_what_keeps_its_graph_is_embedded_once(keep, passes):
    """3 micro-batches: 0 a pass without a graph, 1 one with, - the loss, then 1 for each that is embedded again."""
    calls, encoder = [], small_encoder()
    encoder.backbone.embeddings.register_forward_hook(lambda *_: calls.append("01"[torch.is_grad_enabled()]))
    memory.backward(encoder, cut(step_texts(), groups_of(8)), lambda e: calls.append("-") or stage_2(e), keep=keep)
    assert "".join(calls) == passes


@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_keeps_its_graph_changes_no_bit_and_no_random_number(checkpointed):
    """With dropout: the same masks, added up in the same order; the generator is left at the same place."""
    found = []
    for keep in range(1, 6):
        encoder = small_encoder(dropout=0.3)
        if checkpointed:
            memory.checkpoint_layers(encoder)
        torch.manual_seed(3)
        memory.backward(encoder, cut(step_texts(), groups_of(5)), stage_3, keep=keep)
        found.append([p.grad for p in encoder.parameters()] + [torch.rand(3)])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


GROWN = """
import torch, memory, plan
from data import MicroBatch
from tests.test_memory import wide_encoder

def step(count):
    micro_batches, texts = [], 0
    for c in range(count):
        length = 100 - 90 * c // count
        ids = torch.ones(1024 // length, length, dtype=torch.long)
        micro_batches.append(MicroBatch(torch.arange(texts, texts + len(ids)), ids, torch.ones_like(ids)))
        texts += len(ids)
    memory.backward(encoder, micro_batches, lambda e: (e.square().mean(),))

encoder, device = wide_encoder(), torch.device("cpu")
step(4)
before = plan.held(device)
for count in (8, 150):
    plan.forget_peak(device)
    step(count)
    print(plan.held(device, peak=True) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system tells no peaks")
def test_a_step_of_many_micro_batches_holds_hardly_more_than_one_of_few():
    """Of ever new shapes, 1,000 tokens each. What was freed lay in pieces before: 0.6 MB more of them for every micro-batch."""
    done = subprocess.run([sys.executable, "-c", GROWN], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    few, many = map(int, done.stdout.split())
    assert many - few < 50e6


def test_sparse_gradients_of_the_embeddings_give_the_dense_ones():
    """Two steps, so that the second adds to what zero_grad left."""
    updates = []
    for sparse in (False, True):
        encoder = small_encoder()
        before = torch.nn.utils.parameters_to_vector(encoder.parameters()).detach().clone()
        if sparse:
            allocator.sparse_gradients(encoder)
        weight, layouts = encoder.backbone.embeddings.word_embeddings.weight, set()
        weight.register_hook(lambda gradient: layouts.add(gradient.layout))
        optimizer = torch.optim.SGD(encoder.parameters(), 0.1)
        engine = memory.OneProcess(encoder, optimizer, 0.0, memory.LossScale(torch.float32))
        micro_batches = [memory.MicroBatch(*x) for x in cut(step_texts(), groups_of(5))]
        for _ in range(2):
            engine.backward(micro_batches, stage_3)
            assert weight.grad.layout == torch.strided
            engine.step(0.1)
        assert layouts == {torch.sparse_coo if sparse else torch.strided}
        updates.append(torch.nn.utils.parameters_to_vector(encoder.parameters()).detach() - before)
    assert relative_error(*updates) < 1e-5


def test_mixed_precision_multiplies_in_bf16_and_keeps_fp32_around_it():
    """Inside a layer bf16; embeddings, cached gradient, parameters and their gradients fp32."""
    encoder, inside = small_encoder(), []
    encoder.backbone.encoder["layer"][0].mlp.wo.register_forward_hook(lambda m, i, output: inside.append(output.dtype))
    memory.mixed_precision(encoder, torch.bfloat16)
    _, embeddings = memory.backward(encoder, cut(step_texts(), groups_of(12)), stage_2)
    assert set(inside) == {torch.bfloat16} and len(inside) == 3  # of two micro-batches, one is embedded again
    assert embeddings.dtype == torch.float32
    assert {p.grad.dtype for p in encoder.parameters()} == {p.dtype for p in encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["jina", "bert"])
def test_bf16_gives_nearly_the_fp32_update(kind):
    """8 bits of mantissa: cosine at least 0.99 with the fp32 gradient, norm within 5 % (tau = 0.05 magnifies rounding)."""
    updates = []
    for dtype in (torch.float32, torch.bfloat16):
        encoder = small_encoder(kind=kind)
        memory.mixed_precision(encoder, dtype)
        if kind == "bert":  # its own choice is the fused kernel
            assert encoder.backbone.config._attn_implementation == ("sdpa" if dtype == torch.float32 else "eager")
        updates.append(sgd_update(encoder, cut(step_texts(), groups_of(5)), stage_2, steps=1))
    a, b = updates
    assert torch.cosine_similarity(a, b, dim=0) > 0.99 and b.norm() / a.norm() == pytest.approx(1, abs=0.05)


def test_mixed_precision_and_checkpoints_together_are_bit_identical_to_mixed_precision_alone():
    gradients = []
    for checkpointed in (False, True):
        encoder = small_encoder(dropout=0.2)
        memory.mixed_precision(encoder, torch.bfloat16)
        if checkpointed:
            memory.checkpoint_layers(encoder)
        torch.manual_seed(3)
        memory.backward(encoder, cut(step_texts(), groups_of(5)), stage_2)
        gradients.append([p.grad for p in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_auto_is_bf16_only_where_the_hardware_multiplies_it(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": False})
    assert memory.choose_precision("auto", cpu) == (torch.float32, "this CPU (without bf16 units): bf16 would gain nothing")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": True})
    assert memory.choose_precision("auto", cpu) == (torch.bfloat16, "this CPU (amx_bf16) multiplies bf16 fast")
    assert memory.choose_precision("fp32", cpu) == (torch.float32, "as asked for")


def test_a_model_without_a_list_of_layers_is_named():
    encoder = small_encoder()
    encoder.backbone.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="JinaBertModel has no list of its 7 layers"):
        memory.checkpoint_layers(encoder)
