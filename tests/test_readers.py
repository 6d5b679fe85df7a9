"""What we save, opened with readers that have no defaults: every field they want is there, and
vectors computed from the files alone are ours. Also other versions of transformers and
sentence-transformers, and exporters.

What each client asks was read from its sources: Text Embeddings Inference 1.9 refuses a directory
where a field is missing, and computes a JinaBERT with `hidden_act`.
"""

import json
import os
import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import model
from corpora.formats import prompts_of
from evaluation.embed import embed
from plumbing import model_directory
from plumbing.files import publish
from tests import zoo
from tests.test_directories import CLS, IDENTITY, LAST, MODEL, POOLED, SPECIAL, make_llama, near
from tests.test_model import elsewhere, gelu, relu, slow_embedding, small, tokenizer

TEXTS = [*zoo.TEXTS, "A Text of CAPITALS"]
PROMPTS = {"query": "for: ", "document": "from: "}
SAYS = {name: fields for name, (fields, _) in POOLED.items()} | {
    "prompts": dict(prompts=PROMPTS),
    "cls and prompts": dict(prompts=PROMPTS, pooling=CLS, after=[{}]),
    "a default prompt": dict(prompts=PROMPTS | {"sts": "as: "}, default_prompt_name="sts"),
    "short texts": dict(prompts=PROMPTS, transformer={"max_seq_length": 9}),
    "all": dict(prompts=PROMPTS, transformer={"max_seq_length": 12, "do_lower_case": False},
                pooling=LAST, after=[IDENTITY, {}], encoder="0_Transformer",
                similarity_fn_name="dot"),
}


def read(*parts):
    return json.loads(Path(*parts).read_text())


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """{name: (the directory of others, what we have saved of it)}: one of every kind that
    sentence-transformers writes, and one of every architecture."""
    folder, made = tmp_path_factory.mktemp("directories"), {}
    for name, fields in SAYS.items():
        made[name] = zoo.make_sentence_transformer(folder / name, **fields)
    for name in zoo.ARCHITECTURES:
        made[name] = zoo.make(name, folder / name)
    found = {}
    for name, directory in made.items():
        found[name] = directory, folder / f"{name}, saved"
        model.save(*model.load(directory), found[name][1])
    return found


def ours(directory, texts=TEXTS):
    """The vectors of texts that are neither queries nor documents, of queries, of documents."""
    encoder, tokens = model.load(directory)
    prompts = prompts_of(encoder.prompts)
    neither = model_directory.prompts_for(encoder, one_sided=True).query
    return [embed(encoder, tokens, texts, prompt=prompt) for prompt in (neither, *prompts)]


# sentence-transformers' files

def pool(hidden, config):
    """hidden (T, D) -> (D,)"""
    ways = {"pooling_mode_cls_token": lambda: hidden[0],
            "pooling_mode_mean_tokens": lambda: hidden.mean(0),
            "pooling_mode_lasttoken": lambda: hidden[-1]}
    assert config["word_embedding_dimension"] == hidden.shape[1] and config["include_prompt"]
    assert not (config["pooling_mode_max_tokens"] or config["pooling_mode_mean_sqrt_len_tokens"]
                or config["pooling_mode_weightedmean_tokens"])
    way, = [way for way in ways if config[way]]
    return ways[way]()


def go_on(x, kind, folder):
    """What a module makes of a vector."""
    if kind == "Normalize":
        return x / np.sqrt((x * x).sum())
    config, weights = read(folder, "config.json"), load_file(folder / "model.safetensors")
    assert weights["linear.weight"].shape == (config["out_features"], config["in_features"])
    x = weights["linear.weight"] @ x + (weights["linear.bias"] if config["bias"] else 0)
    return {"torch.nn.modules.activation.Tanh": np.tanh,
            "torch.nn.modules.linear.Identity": lambda x: x}[config["activation_function"]](x)


def without_defaults(directory, texts, prompt):
    """The vectors of texts, from the files alone. Every field is looked up; none may be missing."""
    modules = read(directory, "modules.json")
    kinds = [one["type"].removeprefix("sentence_transformers.models.") for one in modules]
    assert [one["idx"] for one in modules] == [int(one["name"]) for one in modules]
    assert kinds[:2] == ["Transformer", "Pooling"] and modules[0]["path"] == ""
    encoder = read(directory, "sentence_bert_config.json")
    tokens = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokens.truncation is None and tokens.padding is None
    tokens.enable_truncation(encoder["max_seq_length"])
    kind = getattr(transformers, read(directory, "config.json")["architectures"][0])
    backbone = kind.from_pretrained(directory).eval()
    vectors = []
    for text in texts:
        text = text.lower() if encoder["do_lower_case"] else text
        ids = torch.tensor([tokens.encode(prompt + text).ids])
        with torch.no_grad():
            hidden = backbone(input_ids=ids).last_hidden_state[0].numpy()
        vector = pool(hidden, read(directory, modules[1]["path"], "config.json"))
        for one, kind in zip(modules[2:], kinds[2:]):
            vector = go_on(vector, kind, directory / one["path"])
        vectors.append(torch.from_numpy(vector))
    return torch.stack(vectors)


@pytest.mark.parametrize("name", [*SAYS, *zoo.ARCHITECTURES])
def test_a_reader_without_defaults_computes_our_vectors_from_what_we_save(name, directories):
    """The encoder's own length and padding side, one pooling, every layer behind it, the prompts,
    and a similarity."""
    saved = directories[name][1]
    says = read(saved, "config_sentence_transformers.json")
    assert says["similarity_fn_name"] in ("cosine", "dot")
    prompts = says["prompts"] | {None: ""}
    wanted = [prompts[says["default_prompt_name"]]]
    if name in SAYS and "prompts" in SAYS[name]:
        wanted += [prompts["query"], prompts["document"]]
    for prompt, vectors in zip(wanted, ours(saved)):
        assert near(without_defaults(saved, TEXTS, prompt), vectors, atol=1e-5)
    tokens = read(saved, "tokenizer_config.json")
    assert tokens["padding_side"] == "right"
    assert tokens["tokenizer_class"] not in ("TokenizersBackend", None)
    assert tokens["model_max_length"] == read(saved, "sentence_bert_config.json")["max_seq_length"]


def test_the_prompt_of_passages_is_saved_under_the_name_that_is_looked_for_first(tmp_path):
    """sentence-transformers takes "document" before "passage", and since its version 5 always has
    one, "" where none is said: a model with "passage" alone would lose it. A prompt that is null is
    none: Text Embeddings Inference wants texts."""
    prompts = MODEL | {"clustering": None}
    model.save(*model.load(zoo.make_sentence_transformer(tmp_path / "st", prompts=prompts)),
               tmp_path / "saved")
    saved = read(tmp_path / "saved", "config_sentence_transformers.json")["prompts"]
    assert (saved["query"], saved["document"]) == tuple(MODEL.values())
    assert all(isinstance(prompt, str) for prompt in saved.values())


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_and_folders_have_the_modes_that_the_umask_gives(mask, tmp_path):
    """safetensors alone would make them readable for their owner only."""
    encoder, tokens = model.load(zoo.make_sentence_transformer(tmp_path / "st", **SAYS["all"]))
    before = os.umask(mask)
    try:
        publish(tmp_path / "saved", partial(model.save, encoder, tokens))
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    paths = [tmp_path / "saved", *(tmp_path / "saved").rglob("*")]
    assert len([path for path in paths if path.suffix == ".safetensors"]) == 2
    for path in paths:
        usual = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == usual & ~mask, path


# Text Embeddings Inference

@pytest.mark.parametrize("feed_forward, act", [("geglu", "gelu"), ("reglu", "relu")])
def test_text_embeddings_inference_finds_a_jina_bert_and_its_fields(feed_forward, act, tmp_path):
    """It knows the architecture by `_name_or_path`, and computes with `hidden_act`."""
    encoder = small(feed_forward_type=feed_forward)
    model.save(encoder, tokenizer(), tmp_path)
    config = read(tmp_path, "config.json")
    assert config["model_type"] == "bert" and config["position_embedding_type"] == "alibi"
    assert config["_name_or_path"].startswith("jinaai/jina-bert")
    assert config["architectures"] == ["JinaBertForMaskedLM"]
    for field in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                  "intermediate_size", "max_position_embeddings", "type_vocab_size",
                  "pad_token_id"):
        assert type(config[field]) is int
    for field in ("hidden_dropout_prob", "initializer_range", "layer_norm_eps"):
        assert type(config[field]) is float
    pooling = read(tmp_path, "1_Pooling", "config.json")
    assert [pooling[f"pooling_mode_{kind}"] for kind in (
        "cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")] == [
        False, True, False, False]
    length = read(tmp_path, "sentence_bert_config.json")["max_seq_length"]
    assert type(length) is int and length == config["max_position_embeddings"] == 8192
    assert all(type(prompt) is str for prompt in read(
        tmp_path, "config_sentence_transformers.json")["prompts"].values())

    assert config["hidden_act"] == act
    tokens = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    weights = {name: torch.from_numpy(p)
               for name, p in load_file(tmp_path / "model.safetensors").items()}
    for text in ("the weather in berlin", "cold"):
        ids = tokens.encode(text).ids
        function = {"gelu": gelu, "relu": relu}[config["hidden_act"]]
        computed = slow_embedding(weights, ids, [1 / 16, 1 / 256], function)
        assert near(computed, ours(tmp_path, [text])[0][0], atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "modernbert", "llama"])
def test_the_base_of_rotary_positions_is_where_others_read_it(name, tmp_path):
    """transformers 5 writes `rope_parameters`, which its version 4, and Text Embeddings Inference,
    do not know: the first goes on with a base of its own, the second stops."""
    rope = {"rope_type": "default", "rope_theta": 123456.0}
    fields = {"rope_parameters": rope}
    if name == "modernbert":
        local = rope | {"rope_theta": 4321.0}
        fields = {"rope_parameters": {"full_attention": rope, "sliding_attention": local}}
    encoder, tokens = model.load(zoo.make(name, tmp_path / "other", **fields))
    model.save(encoder, tokens, tmp_path / "saved")
    config = read(tmp_path / "saved", "config.json")
    if name == "modernbert":
        assert (config["global_rope_theta"], config["local_rope_theta"]) == (123456.0, 4321.0)
    else:
        assert config["rope_theta"] == 123456.0
    assert torch.equal(ours(tmp_path / "saved")[0], embed(encoder, tokens, TEXTS))


# exporters

LENGTHS = [[3], [3, 2], [40, 40], [40, 7, 1], [1100], [1100, 40]]  # above model.LONG, too


class Hidden(nn.Module):
    """A backbone as exporters want it: tensors in, a tensor out."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, input_ids, attention_mask):
        return self.backbone(input_ids, attention_mask).last_hidden_state


def batch(lengths):
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, 20, (n,), generator=generator) for n in lengths]
    return (pad_sequence(texts, batch_first=True),
            pad_sequence([torch.ones_like(text) for text in texts], batch_first=True))


@pytest.fixture(scope="module")
def jina(tmp_path_factory):
    """A saved JinaBERT, opened."""
    directory = tmp_path_factory.mktemp("jina") / "model"
    model.save(small(num_hidden_layers=1), tokenizer(), directory)
    return model.load(directory)[0]


def exported(backbone):
    length = {0: torch.export.Dim("texts", max=64), 1: torch.export.Dim("tokens", max=8192)}
    shapes = {"input_ids": length, "attention_mask": length}
    return torch.export.export(Hidden(backbone), batch([7, 7]), dynamic_shapes=shapes).module()


def traced(backbone):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of slopes, which are constants
        return torch.jit.trace(Hidden(backbone), batch([7, 7]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("export", [exported, traced])
def test_what_was_exported_with_a_sample_without_padding_takes_padding_and_long_texts(
        export, jina):
    """That the sample has none, or is short, must not be decided for good."""
    with torch.no_grad():
        run = export(jina.backbone)
        for lengths in LENGTHS:
            ids, mask = batch(lengths)
            vectors = model.mean_pool(run(ids, mask), mask)
            assert near(vectors, jina(ids, mask), atol=1e-5), lengths


# other programs, in a process of their own

SENTENCE_TRANSFORMERS = """
from sentence_transformers import SentenceTransformer
texts, vectors = json.loads(sys.argv[2]), {}
for directory in sys.argv[3:]:
    encoder = SentenceTransformer(directory, device="cpu", trust_remote_code=True)
    vectors[directory] = [encode(texts, convert_to_tensor=True) for encode in (
        encoder.encode, encoder.encode_query, encoder.encode_document)]
torch.save(vectors, "out.pt")
"""


def by_sentence_transformers(tmp_path, directories, path=""):
    return elsewhere(tmp_path, SENTENCE_TRANSFORMERS, json.dumps(TEXTS), *directories, path=path)


@pytest.mark.skipif(find_spec("sentence_transformers") is None, reason="is not installed")
def test_sentence_transformers_encodes_queries_and_documents_as_we_do(directories, tmp_path):
    """Of its own directories before and after we have saved them, and of every architecture."""
    wanted = {str(directory): ours(directory)
              for name in SAYS for directory in directories[name]}
    wanted |= {str(directories[name][1]): ours(directories[name][1])
               for name in zoo.ARCHITECTURES}
    found = by_sentence_transformers(tmp_path, wanted)
    for directory, vectors in wanted.items():
        for a, b in zip(found[directory], vectors):
            assert near(a, b, atol=1e-5), directory


VERSION = "import transformers\ntorch.save(transformers.__version__, 'out.pt')"
OLD = os.environ.get("OLD_TRANSFORMERS")  # a folder with transformers 4 and what it needs


@pytest.mark.skipif(not OLD, reason="OLD_TRANSFORMERS names no folder")
def test_transformers_4_opens_what_transformers_5_has_saved(directories, tmp_path):
    """A JinaBERT, every kind of directory, and every architecture; Llamas with special tokens,
    which version 5 writes as a list, with others around a text, and with positions of another base,
    scaled or not."""
    model.save(small(), tokenizer(), tmp_path / "jina")
    saved = [tmp_path / "jina", *(after for _, after in directories.values())]
    tokens = zoo.decoder()
    tokens.add_special_tokens({"extra_special_tokens": ["<one>", "<two>"]})
    for kind in ("default", "linear"):
        rope = {"rope_type": kind, "rope_theta": 500000.0}
        if kind == "linear":
            rope["factor"] = 2.0
        llama = zoo.make("llama", tmp_path / kind, vocab_size=270, rope_parameters=rope)
        tokens.save_pretrained(llama)
        saved.append(tmp_path / f"llama-{kind}")
        model.save(*model.load(llama), saved[-1])
    for case in SPECIAL:
        saved.append(tmp_path / f"llama, {case}")
        model.save(*model.load(make_llama(tmp_path / case, *SPECIAL[case])), saved[-1])
    version = elsewhere(tmp_path, VERSION, path=OLD)
    assert version.startswith("4.")
    found = by_sentence_transformers(tmp_path, saved, path=OLD)
    for directory in saved:
        for a, b in zip(found[str(directory)], ours(directory)):
            assert near(a, b, atol=1e-5), directory
