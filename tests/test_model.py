"""The encoder against values worked out by hand, a slow copy written from the paper's description,
and what others open.

In every docstring T tokens, D width, H heads. `WORDS` is a whole vocabulary: one token per word, so
lengths are countable.
"""

import json
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertModel, BertTokenizer

import model
from tests.conftest import ROOT

WORDS = ("[PAD] [UNK] [CLS] [SEP] [MASK] the weather in berlin is cold and long text about nothing "
         "at all").split()
TEXTS = ["the weather", "berlin", "a long text about nothing at all",
         "the weather in berlin is cold and long " * 80]
FIELDS = {  # what config.json of the published checkpoints says
    "model_type": "bert", "position_embedding_type": "alibi", "feed_forward_type": "geglu",
    "hidden_act": "gelu", "emb_pooler": "mean", "vocab_size": 30528,
    "max_position_embeddings": 8192, "architectures": ["JinaBertForMaskedLM"],
    "_name_or_path": "jinaai/jina-bert-implementation"}
SMALL = dict(vocab_size=20, hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
             intermediate_size=96)


def randomise(module, seed=0):
    """Every parameter at random: at the start biases are 0 and LayerNorms 1, which would hide a
    forgotten one."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.2
        if "norm.weight" in name.lower():
            p.data += 1
    return module.eval()


def small(**fields):
    config = model.JinaBertConfig(**SMALL | fields)
    return randomise(model.PooledEncoder(model.JinaBertModel(config)))


def tokenizer():
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    return BertTokenizer(vocab=vocabulary, model_max_length=8192)


def embed(encoder, tokens, texts=TEXTS):
    inputs = [tokens(t, return_tensors="pt", return_token_type_ids=False) for t in texts]
    with torch.no_grad():
        return torch.cat([encoder(**one) for one in inputs])


def random_tokens(*shape):
    return torch.randint(5, 20, shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(a JinaBERT, the directory it was saved in). Tests that break the directory copy it first."""
    encoder, directory = small(), tmp_path_factory.mktemp("saved") / "model"
    model.save(encoder, tokenizer(), directory)
    return encoder, directory


# ALiBi, names, sizes

@pytest.mark.parametrize("heads, slopes", [
    (4, [1 / 4, 1 / 16, 1 / 64, 1 / 256]),
    (8, [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]),
    (12, [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256,
          0.7071068, 0.3535534, 0.1767767, 0.0883883])])
def test_slopes_by_hand(heads, slopes):
    """2^(-8(h+1)/H): powers of 2^-2 for 4 heads, of 2^-1 for 8. For 12: those of 8, then the 1st,
    3rd, 5th and 7th of 16 heads, 2^-0.5, 2^-1.5, 2^-2.5, 2^-3.5."""
    assert model.alibi_slopes(heads) == pytest.approx(slopes, abs=1e-7)


def test_the_bias_of_three_tokens_by_hand_is_symmetric():
    """-slope |i - j|, and the most negative number in the column of a padded key."""
    bias = model.alibi_bias([0.5, 0.25], torch.tensor([[1, 1, 1]]), torch.float32)
    assert bias.tolist() == [[[[0, -0.5, -1], [-0.5, 0, -0.5], [-1, -0.5, 0]],
                              [[0, -0.25, -0.5], [-0.25, 0, -0.25], [-0.5, -0.25, 0]]]]
    low = torch.finfo(torch.bfloat16).min
    bias = model.alibi_bias([0.5], torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.bfloat16)
    assert bias[:, 0].tolist() == [[[0, -0.5, -1], [-0.5, 0, -0.5], [-1, -0.5, 0]],
                                   [[0, -0.5, low], [-0.5, 0, low], [-1, -0.5, low]]]


def test_tiny_has_the_published_names_and_no_buffer():
    """transformers 5 brings buffers that are not saved back as garbage, so there must be none."""
    D, I = 256, 1024
    shapes = {
        "embeddings.word_embeddings.weight": (30528, D),
        "embeddings.token_type_embeddings.weight": (2, D),
        "embeddings.LayerNorm.weight": (D,), "embeddings.LayerNorm.bias": (D,)}
    for layer in ("encoder.layer.0.", "encoder.layer.1."):
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            shapes[f"{layer}attention.{name}.weight"] = (D, D)
            shapes[f"{layer}attention.{name}.bias"] = (D,)
        for name in ("attention.output.LayerNorm", "mlp.layernorm"):
            shapes |= {f"{layer}{name}.weight": (D,), f"{layer}{name}.bias": (D,)}
        shapes |= {f"{layer}mlp.gated_layers.weight": (2 * I, D),
                   f"{layer}mlp.wo.weight": (D, I), f"{layer}mlp.wo.bias": (D,)}
    encoder = model.create("tiny")
    assert {name: tuple(p.shape) for name, p in encoder.backbone.state_dict().items()} == shapes
    assert list(encoder.buffers()) == []
    assert len(list(encoder.parameters())) == len(shapes)  # pooling adds none


@pytest.mark.parametrize("size, layers, width, heads, intermediate, gate, dropout, parameters", [
    ("tiny", 2, 256, 4, 1024, "geglu", 0.0, 9_917_952),
    ("small", 4, 512, 8, 2048, "geglu", 0.1, 32_428_032),
    ("base", 12, 768, 12, 3072, "geglu", 0.1, 136_777_728),
    ("large", 24, 1024, 16, 4096, "reglu", 0.1, 434_139_136)])
def test_sizes_are_those_of_table_1(
        size, layers, width, heads, intermediate, gate, dropout, parameters):
    """Parameters: D (30528 + 2 + 2) of embeddings; a layer has 4 (D^2 + D) + 2D of attention and
    2ID + ID + D + 2D of feed-forward. The paper's 33, 137 and 435 million also count BERT's pooler,
    D^2 + D."""
    with torch.device("meta"):
        backbone = model.create(size).backbone
    c = backbone.config
    assert (c.num_hidden_layers, c.hidden_size, c.num_attention_heads) == (layers, width, heads)
    assert (c.intermediate_size, c.feed_forward_type) == (intermediate, gate)
    assert (c.hidden_dropout_prob, c.attention_probs_dropout_prob) == (dropout, 0.0)
    assert (c.layer_norm_eps, c.hidden_size // heads) == (1e-12, 64)
    assert sum(p.numel() for p in backbone.parameters()) == parameters


def test_create_repeats_for_a_seed_and_only_for_it():
    """Random weights come from torch's generator alone."""
    weights = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        weights.append(torch.cat([p.flatten() for p in model.create("tiny").parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# the forward pass

def slow_embedding(w, ids, slopes, act):
    """One text without padding, from the description alone: loops over heads and tokens, softmax
    spelled out."""
    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    def norm(x, name):
        x = x - x.mean(1, keepdim=True)
        x = x / (x.square().mean(1, keepdim=True) + 1e-12).sqrt()
        return x * w[name + ".weight"] + w[name + ".bias"]

    x = torch.stack([w["embeddings.word_embeddings.weight"][i] for i in ids])
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    T = len(ids)
    for layer in ("encoder.layer.0.", "encoder.layer.1."):
        attention, mlp = f"{layer}attention.", f"{layer}mlp."
        q, k, v = (linear(x, f"{attention}self.{name}") for name in ("query", "key", "value"))
        context = torch.zeros_like(x)
        for h, slope in enumerate(slopes):
            own = slice(64 * h, 64 * h + 64)
            for i in range(T):
                logits = [q[i, own] @ k[j, own] / 8 - slope * abs(i - j) for j in range(T)]
                e = torch.stack(logits).exp()
                context[i, own] = e / e.sum() @ v[:, own]
        x = norm(x + linear(context, attention + "output.dense"), attention + "output.LayerNorm")
        ab = linear(x, mlp + "gated_layers")
        a, b = ab[:, : ab.shape[1] // 2], ab[:, ab.shape[1] // 2 :]
        x = norm(x + linear(act(a) * b, mlp + "wo"), mlp + "layernorm")
    return x.mean(0)


def gelu(a):
    return a * (1 + torch.erf(a / 2**0.5)) / 2


def relu(a):
    return a * (a > 0)


@pytest.mark.parametrize("feed_forward, act", [("geglu", gelu), ("reglu", relu)])
def test_the_forward_pass_is_the_one_described(feed_forward, act):
    """3 heads: 2^-4 and 2^-8 are those of 2, and 2^-2 is the first of 4. The shorter text is padded
    in the model, not in the slow copy. fp64, where only the slopes are rounded to fp32."""
    encoder = small(hidden_size=192, num_attention_heads=3, feed_forward_type=feed_forward).double()
    ids = torch.tensor([[2, 7, 9, 9, 14, 5, 3], [2, 11, 6, 3, 0, 0, 0]])
    got = encoder(ids, torch.tensor([[1] * 7, [1] * 4 + [0] * 3]))
    w = encoder.backbone.state_dict()
    for row, T in ((0, 7), (1, 4)):
        want = slow_embedding(w, ids[row, :T].tolist(), [1 / 16, 1 / 256, 1 / 4], act)
        assert torch.allclose(got[row], want, atol=1e-6, rtol=0)


def test_mean_pool_by_hand():
    """(1, 2) and (3, 4) average to (2, 3), whatever stands at the padding; a text of padding alone
    gives 0, not 0/0. In bf16 1 + 256 would be 256; the average is taken in fp32."""
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]]] * 2)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert model.mean_pool(hidden, mask).tolist() == [[2.0, 3.0], [0.0, 0.0]]
    hidden = torch.tensor([[[1.0], [256.0]]]).bfloat16()
    assert model.mean_pool(hidden, torch.ones(1, 2)).tolist() == [[128.5]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_embedding_does_not_depend_on_its_batch_or_padding(side):
    """ALiBi knows distances only, so even padding on the left changes nothing."""
    encoder, ids = small(), [2, 7, 9, 13, 3]
    alone = encoder(torch.tensor([ids]), torch.ones(1, 5))
    for T in (6, 17, 64):
        batch, mask = torch.randint(5, 20, (4, T)), torch.ones(4, T, dtype=torch.long)
        own = slice(T - 5, T) if side == "left" else slice(0, 5)
        batch[2, own], mask[2] = torch.tensor(ids), 0  # what stands at the padding stays random
        mask[2, own] = 1
        assert torch.allclose(encoder(batch, mask)[2], alone[0], atol=1e-5, rtol=0)


def test_8192_tokens_in_one_text():
    """No positions: 8,192 times one token average the same values as one such token alone. A 512-
    or 8,191-token limit would not see the last token change, of which its own share shows at least:
    |change| / 8,192 with |change| about 11."""
    encoder = small(num_hidden_layers=1, hidden_size=64, num_attention_heads=1)
    ids = torch.full((1, 8192), 9)
    with torch.no_grad():
        same = encoder(ids, torch.ones_like(ids))
        alone = encoder(ids[:, :1], torch.ones(1, 1))
        ids[0, -1] = 10
        other = encoder(ids, torch.ones_like(ids))
    assert torch.allclose(same, alone, atol=1e-4, rtol=0)
    assert (other - same).norm() > 5e-4


# attention, by length and precision

def random_heads(B, T, count):
    """q, k, v ... (B, 2, T, 64)"""
    return [torch.randn(B, 2, T, 64, generator=torch.Generator().manual_seed(i))
            for i in range(count)]


def outputs_and_gradients(attend, tensors, mask):
    """Of tensors q, k, v and the upstream gradient; of queries at padding, which are pooled with
    weight 0, nothing."""
    q, k, v, upstream = tensors
    seen = mask[:, None, :, None].to(q.dtype)
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = attend(*inputs)
    return [out * seen, *torch.autograd.grad(out, inputs, upstream * seen)]


@pytest.mark.parametrize("T", [5, 130, 1024])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_in_bf16_on_a_cpu_is_the_kernel_s_in_fp32(T, padded):
    """On the same bf16 numbers; bf16 rounds by 2^-9 = 0.2 %."""
    mask = torch.ones(2, T)
    if padded:
        mask[1, T // 2 :] = 0
    in_bf16 = [x.bfloat16() for x in random_heads(2, T, 4)]
    in_fp32 = [x.float() for x in in_bf16]
    slopes = [1 / 16, 1 / 256]
    bias = model.alibi_bias(slopes, mask, torch.float32)
    attend = model.attention(slopes, mask, torch.bfloat16)
    found = outputs_and_gradients(attend, in_bf16, mask)
    wanted = outputs_and_gradients(
        partial(F.scaled_dot_product_attention, attn_mask=bias), in_fp32, mask)
    for got, want in zip(found, wanted):
        assert got.dtype == torch.bfloat16 and (got - want).norm() < 0.01 * want.norm()
    if padded:
        _, _, *of_keys_and_values = found
        assert not any(gradient[1, :, T // 2 :].any() for gradient in of_keys_and_values)


@pytest.mark.parametrize("T", [40, 1100])
def test_a_text_of_padding_alone_is_zero_in_mixed_precision_too(T):
    """fp32's most negative number is -inf in bf16, and the softmax of a row of -inf is NaN: the
    bias must be made in the precision of the products. Short texts and long ones."""
    encoder, ids = small(num_hidden_layers=1), random_tokens(2, T)
    mask = torch.ones_like(ids)
    mask[1] = 0
    plain = encoder(ids, mask)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = encoder(ids, mask)
    assert torch.cosine_similarity(mixed[0], plain[0], dim=0) > 0.999
    assert mixed[1].tolist() == [0.0] * 128


@pytest.mark.parametrize("lengths", [[1100], [1300, 1025, 700, 1, 0]])
def test_long_texts_have_the_values_and_gradients_of_the_materialised_bias(lengths):
    """Beyond 1,024 tokens the bias is a view; the same as H x T x T numbers, but for rounding, by
    which they are seen to be two."""
    T, slopes = max(lengths), [1 / 16, 1 / 256]
    mask = (torch.arange(T) < torch.tensor(lengths)[:, None]).long()
    tensors = random_heads(len(lengths), T, 4)
    materialised = partial(model.attend, bias=model.alibi_bias(slopes, mask, torch.float32))
    wanted = outputs_and_gradients(materialised, tensors, mask)
    found = outputs_and_gradients(model.attention(slopes, mask, torch.float32), tensors, mask)
    for got, want in zip(found, wanted):
        assert 0 < (got - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize("T", [5, 1100])
def test_no_texts_are_a_batch_too(T):
    """As `memory.equalise` makes one where a rank has fewer texts than another has micro-batches;
    it must back-propagate."""
    encoder, none = small(num_hidden_layers=1), torch.zeros(0, T, dtype=torch.long)
    encoder(none, none).sum().backward()
    query = encoder.backbone.encoder["layer"][0].attention["self"].query
    assert not query.weight.grad.any()


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16"])
def test_long_texts_need_no_memory_that_grows_with_the_square_of_their_length(mixed):
    """T = 1,100, H = 2, 3 layers: H T^2 = 2,420,000 numbers. The widest tensor of a layer has 2 I =
    192 a token, 422,400 for two texts. By storage: the bias is a view of shape (1, H, T, T), which
    the backward pass keeps."""
    encoder, ids = small(num_hidden_layers=3), random_tokens(2, 1100)
    mask, made = torch.ones_like(ids), set()
    mask[1, 1050:] = 0

    class Storages(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    made.add(x.untyped_storage().nbytes() // x.itemsize)
            return out

    with Storages():
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            out = encoder(ids, mask)
        out.sum().backward()
    assert max(made) == 422_400


@pytest.mark.parametrize("padding", [slice(0, 1), slice(500, 501)], ids=["left", "a hole"])
def test_a_long_text_with_padding_inside_is_refused(padding):
    ids = random_tokens(2, 1100)
    mask = torch.ones_like(ids)
    mask[1, padding] = 0
    with pytest.raises(ValueError, match="attention_mask: .* 1024 tokens .* right"):
        small()(ids, mask)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_bias_that_a_gpu_adds_tile_by_tile_is_the_same():
    """flex_attention as written, uncompiled, which a CPU can run forward: padding on the right, on
    the left, a hole, none, and nothing else, where a token sees itself alone instead of nothing,
    which would be NaN."""
    q, k, v = random_heads(5, 40, 3)
    slopes, mask = model.alibi_slopes(2), torch.ones(5, 40, dtype=torch.long)
    mask[0, 30:], mask[1, :7], mask[2, 11:20], mask[4] = 0, 0, 0, 0
    got = model.attend_flex(q, k, v, torch.tensor(slopes), mask, flex_attention)
    want = model.attend(q, k, v, model.alibi_bias(slopes, mask, torch.float32))
    assert torch.allclose(got[4], v[4])
    seen = mask > 0
    got, want = got.transpose(1, 2)[seen], want.transpose(1, 2)[seen]
    assert torch.allclose(got, want, atol=1e-5, rtol=0)


# load and save

def test_a_saved_model_opens_with_the_same_weights_and_tokens(saved):
    encoder, directory = saved
    again, tokens = model.load(directory)
    state = again.state_dict()
    assert list(state) == list(encoder.state_dict())
    assert all(torch.equal(state[name], p) for name, p in encoder.state_dict().items())
    assert tokens(TEXTS)["input_ids"] == tokenizer()(TEXTS)["input_ids"]
    assert tokens.model_max_length == 8192
    assert not any(module.training for module in again.modules())


def test_a_saved_config_has_the_published_fields_and_nothing_is_pickled(tmp_path):
    """transformers leaves out defaults, drops `_name_or_path` and writes its own class into
    `architectures`."""
    directory = tmp_path / "m"
    encoder = small(vocab_size=30528, hidden_size=64, num_attention_heads=1)
    model.save(encoder, tokenizer(), directory)
    config = json.loads((directory / "config.json").read_text())
    assert {name: config.get(name) for name in FIELDS} == FIELDS
    assert config["auto_map"] == {
        "AutoConfig": "model.JinaBertConfig", "AutoModel": "model.JinaBertModel"}
    assert (config["layer_norm_eps"], config["attention_probs_dropout_prob"]) == (1e-12, 0.0)
    files = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert files == {
        "config.json", "model.safetensors", "model.py", "tokenizer.json", "tokenizer_config.json",
        "modules.json", "1_Pooling/config.json", "sentence_bert_config.json",
        "config_sentence_transformers.json"}


def test_saving_leaves_the_encoder_as_it_was(tmp_path):
    encoder = small().train()
    before = {name: p.clone() for name, p in encoder.state_dict().items()}
    model.save(encoder, tokenizer(), tmp_path)
    assert all(torch.equal(before[name], p) for name, p in encoder.state_dict().items())
    assert encoder.backbone.training and all(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_published_checkpoints_open_without_their_code(prefix, tmp_path):
    """Half precision, maybe a leading `bert.`, BERT's pooler, the head of the masked language
    model, attention dropout 0.1 in the config and an `auto_map` to other code: the embeddings are
    those of the backbone, in fp32."""
    encoder, tokens = small(), tokenizer()
    weights = {name: p.half() for name, p in encoder.backbone.state_dict().items()}
    state = {prefix + name: p for name, p in weights.items()}
    state |= {prefix + "pooler.dense.weight": torch.ones(128, 128),
              prefix + "pooler.dense.bias": torch.ones(128),
              "cls.predictions.bias": torch.ones(20),
              "cls.predictions.decoder.weight": torch.ones(20, 128)}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    code = "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel"
    config = FIELDS | SMALL | {
        "attention_probs_dropout_prob": 0.1, "torch_dtype": "float16", "layer_norm_eps": 1e-12,
        "auto_map": {"AutoModel": code}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens.save_pretrained(tmp_path)
    got, got_tokens = model.load(tmp_path)
    assert {p.dtype for p in got.parameters()} == {torch.float32}
    encoder.backbone.load_state_dict(weights)  # the same rounding
    assert torch.equal(embed(got, got_tokens), embed(encoder, tokens))


def with_weight(name, value):
    """Breaks a directory: this weight is another one, or is missing."""
    def break_it(directory):
        state = load_file(directory / "model.safetensors") | {name: value}
        state = {name: p for name, p in state.items() if p is not None}
        save_file(state, directory / "model.safetensors", {"format": "pt"})
    return break_it


def with_config(**fields):
    def break_it(directory):
        config = json.loads((directory / "config.json").read_text()) | fields
        (directory / "config.json").write_text(json.dumps(config))
    return break_it


def with_file(name, text):
    return lambda directory: (directory / name).write_text(text)


def without(pattern):
    def break_it(directory):
        for path in directory.glob(pattern):
            path.unlink()
    return break_it


def truncated(directory):
    os.truncate(directory / "model.safetensors", 9000)


BIAS, UNKNOWN = "encoder.layer.1.mlp.wo.bias", "encoder.layer.0.attention.self.layer_norm_q.weight"
BROKEN = {  # how, and what the message must name
    "a weight is missing": (with_weight(BIAS, None), BIAS),
    "an unknown weight": (with_weight(UNKNOWN, torch.ones(128)), UNKNOWN),
    "a weight of another shape": (with_weight(BIAS, torch.ones(7)), BIAS),
    "more layers in config.json": (with_config(num_hidden_layers=3), "encoder.layer.2."),
    "truncated weights": (truncated, "weights"),
    "no weights": (without("model.safetensors"), "model.safetensors"),
    "no such directory": (shutil.rmtree, "neither a directory"),
    "no config.json": (without("config.json"), "config.json"),
    "config.json is no JSON": (with_file("config.json", "{"), "JSON"),
    "config.json is a list": (with_file("config.json", "[]"), "config.json"),
    "a word for a number": (with_config(hidden_size="wide"), "hidden_size"),
    "no tokenizer": (without("tokenizer*"), "tokenizer"),
    "no vocabulary": (without("tokenizer.json"), "tokenizer"),
    "tokenizer.json is empty": (with_file("tokenizer.json", "{}"), "tokenizer"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_directory_is_refused_in_one_line(case, saved, tmp_path):
    """transformers would go on with random weights, or with a tokenizer that knows five words."""
    (break_it, says), directory = BROKEN[case], shutil.copytree(saved[1], tmp_path / "broken")
    break_it(directory)
    with pytest.raises((OSError, ValueError)) as error:
        model.load(directory)
    message = str(error.value)
    assert str(directory) in message and says in message and "\n" not in message


def plain_bert(directory):
    """Whatever AutoModel opens: a directory as transformers leaves it, without our save."""
    torch.manual_seed(0)
    bert = randomise(BertModel(BertConfig(**SMALL)))
    bert.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return bert


def test_plain_bert_opens_trains_and_saves_with_its_pooler_as_it_was(tmp_path):
    """Mean pooling gives BERT's pooler no gradient: frozen, saved all the same. No model.py beside
    it."""
    bert, texts = plain_bert(tmp_path / "bert"), TEXTS[:3]
    encoder, tokens = model.load(tmp_path / "bert")
    assert type(encoder.backbone) is BertModel
    assert {name for name, p in encoder.named_parameters() if not p.requires_grad} == {
        "backbone.pooler.dense.weight", "backbone.pooler.dense.bias"}
    hidden = bert(**tokens(texts[2], return_tensors="pt")).last_hidden_state
    assert torch.allclose(embed(encoder, tokens, texts)[2], hidden.mean(1)[0], atol=1e-6, rtol=0)
    model.save(encoder, tokens, tmp_path / "again")
    state = model.load(tmp_path / "again")[0].backbone.state_dict()
    assert all(torch.equal(p, state[name]) for name, p in bert.state_dict().items())
    assert not (tmp_path / "again" / "model.py").exists()


# what others open: in a process of its own

def elsewhere(tmp_path, code, *arguments, path=""):
    """It finds model.py only beside the weights, unless `path` says where else."""
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1",
                                "HF_MODULES_CACHE": str(tmp_path / "modules")}
    code = "import sys, json, torch\nTEXTS = json.loads(sys.argv[1])\n" + code
    command = [sys.executable, "-c", code, json.dumps(TEXTS), *map(str, arguments)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(tmp_path / "out.pt")


def test_a_saved_directory_is_a_place_to_work_in(saved, tmp_path):
    """`import model` takes the copy there, before the project's, and save would copy it onto
    itself."""
    encoder, directory = saved
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    assert elsewhere(tmp_path, """
import model
model.save(*model.load("."), ".")
torch.save(model.__file__, "out.pt")
""", path=str(ROOT)) == str(tmp_path / "model.py")
    assert (tmp_path / "model.py").read_text() == (directory / "model.py").read_text()
    assert torch.equal(embed(*model.load(tmp_path)), embed(*model.load(directory)))


def test_transformers_opens_it_with_the_flag_and_without_it_gives_random_weights(saved, tmp_path):
    """The trap that the README warns of: config.json says `bert`, so without trust_remote_code=True
    a plain BERT is built, its feed-forward made up anew in every process. If this ever fails, the
    warning can go."""
    result = elsewhere(tmp_path, """
from transformers import AutoModel, AutoTokenizer
tokens = AutoTokenizer.from_pretrained(sys.argv[2])
def embed(seed, **flag):
    torch.manual_seed(seed)
    encoder = AutoModel.from_pretrained(sys.argv[2], **flag).eval()
    inputs = [tokens(text, return_tensors="pt") for text in TEXTS[:3]]
    hidden = [encoder(**one).last_hidden_state for one in inputs]
    return type(encoder).__name__, torch.cat([h.mean(1) for h in hidden]).detach()
torch.save([embed(0, trust_remote_code=True), embed(0), embed(1)], "out.pt")
""", saved[1])
    (trusted, ours), (plain, first), (_, second) = result
    assert (trusted, plain) == ("JinaBertModel", "BertModel")
    assert torch.allclose(ours, embed(saved[0], tokenizer(), TEXTS[:3]), atol=1e-5, rtol=0)
    assert (first - ours).norm() > 1 and (first - second).norm() > 1


def test_sentence_transformers_gives_the_embeddings_of_load(saved, tmp_path):
    """Texts of 4 to 642 tokens in one call, so padded, and longer than BERT's 512. A plain BERT
    needs no flag."""
    pytest.importorskip("sentence_transformers")
    plain_bert(tmp_path / "bert")
    encoder, tokens = model.load(tmp_path / "bert")
    model.save(encoder, tokens, tmp_path / "plain")
    assert len(tokens(TEXTS[3])["input_ids"]) == 642
    ours, plain = elsewhere(tmp_path, """
from sentence_transformers import SentenceTransformer
ours = SentenceTransformer(sys.argv[2], trust_remote_code=True, device="cpu")
plain = SentenceTransformer(sys.argv[3], device="cpu")
torch.save([ours.encode(TEXTS, convert_to_tensor=True),
            plain.encode(TEXTS[:3], convert_to_tensor=True)], "out.pt")
""", saved[1], tmp_path / "plain")
    assert torch.allclose(ours, embed(*model.load(saved[1])), atol=1e-5, rtol=0)
    assert torch.allclose(plain, embed(encoder, tokens, TEXTS[:3]), atol=1e-5, rtol=0)
