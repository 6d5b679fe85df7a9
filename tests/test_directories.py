"""What a model's directory says of pooling, further layers, lengths and prompts is used, carried
over to the next save, or refused by name in one line; and other people's encoders train.

Directories are those of zoo.py, their vectors worked out from transformers' hidden states.
"""

import json
import os
import random
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer, BertModel, BertTokenizer

import data
import memory
import model
import train
from corpora import convert
from corpora.convert import read_rows
from corpora.formats import Prompts, prompts_of
from corpora.prompts import check_prompts
from curation import cross_encoder
from curation.__main__ import main as curate
from curation.reranker import Reranker
from evaluation.__main__ import main as evaluate
from evaluation.embed import embed
from losses import pair_loss
from tests import zoo
from tests.conftest import torchrun
from tests.test_train import refused

TEXTS = zoo.TEXTS
FLAGS = ["--sources", "sources.json", "--batch-size", "16", "--micro-tokens", "128",
         "--precision", "fp32", "--lr", "1e-3", "--steps", "2"]


def read(path):
    return json.loads(Path(path).read_text())


def said(directory, name="config_sentence_transformers.json"):
    return read(Path(directory, name))


def near(a, b, atol=1e-6):
    return torch.allclose(a, b, atol=atol, rtol=0)


def opened(directory, texts=TEXTS, **how):
    return embed(*model.load(directory), texts, **how)


def train_two_steps(monkeypatch, *flags):
    """-> the vectors of TEXTS by the encoder that was then saved, as it was in memory."""
    save, vectors = model.save, []

    def embed_and_save(encoder, tokens, directory):
        vectors.append(embed(encoder, tokens, TEXTS))
        save(encoder, tokens, directory)

    with monkeypatch.context() as patch:
        patch.setattr(model, "save", embed_and_save)
        train.main([*FLAGS, *map(str, flags)])
    return vectors[-1]


# pooling, and what follows it: by hand from hidden states h (T, 32) and the Dense layer's weights

TANH = {"in_features": 32, "out_features": 16, "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh"}
IDENTITY = {"in_features": 32, "out_features": 48, "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity"}
CLS = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False,
       "pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False}
LAST = {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True, "include_prompt": True}


def first(h, dense):
    return h[0]


def last(h, dense):
    return h[-1]


def mean(h, dense):
    return h.mean(0)


def unit(h, dense):
    return h[0] / h[0].norm()


def tanh_of_dense(h, dense):
    return torch.tanh(dense["linear.weight"] @ h.mean(0) + dense["linear.bias"])


def unit_of_dense(h, dense):
    x = dense["linear.weight"] @ h[-1]
    return x / x.norm()


POOLED = {  # what the directory says, and what that is
    "mean": (dict(), mean),
    "mean, booleans": (dict(pooling={"pooling_mode_mean_tokens": True}), mean),
    "mean, in a folder of its own": (dict(encoder="0_Transformer"), mean),
    "cls": (dict(pooling={"pooling_mode": "cls"}), first),
    "cls, booleans": (dict(pooling=CLS), first),
    "last token": (dict(pooling={"pooling_mode": "lasttoken"}), last),
    "last token, booleans": (dict(pooling=LAST), last),
    "cls, Normalize": (dict(pooling=CLS, after=[{}]), unit),
    "mean, Dense": (dict(after=[TANH]), tanh_of_dense),
    "last token, Dense, Normalize": (dict(pooling=LAST, after=[IDENTITY, {}]), unit_of_dense),
}
NAMES = {mean: "mean", first: "cls", last: "lasttoken", unit: "cls", tanh_of_dense: "mean",
         unit_of_dense: "lasttoken"}


def worked_out(directory, encoder, hand):
    """The vectors of TEXTS, each alone; an encoder of its own is in a folder of the directory."""
    bert = BertModel.from_pretrained(directory / encoder).eval()
    tokens = BertTokenizer.from_pretrained(directory / encoder)
    dense = directory / "2_Dense" / "model.safetensors"
    dense = load_file(dense) if dense.exists() else {}
    with torch.no_grad():
        hidden = [bert(**tokens(text, return_tensors="pt")).last_hidden_state[0] for text in TEXTS]
    return torch.stack([hand(h, dense) for h in hidden]), dense


@pytest.mark.parametrize("case", POOLED)
def test_a_directory_gives_the_vectors_it_says_before_and_after_training(
        case, folder, monkeypatch, capsys):
    """Two steps move every vector and the Dense layer; what is saved then says the same, at the top
    of its directory, and its vectors are those of the encoder in memory."""
    fields, hand = POOLED[case]
    directory = zoo.make_sentence_transformer(folder / "st", **fields)
    before, dense = worked_out(directory, fields.get("encoder", ""), hand)
    assert near(opened(directory), before)
    trained = train_two_steps(monkeypatch, "--model", "st")
    assert (trained - before).norm(dim=1).min() > 1e-3
    after, trained_dense = worked_out(folder / "runs" / "001" / "model", "", hand)
    assert near(trained, after) and torch.equal(opened("runs/001/model"), trained)
    assert all(not torch.equal(dense[name], trained_dense[name]) for name in dense)
    assert f"{NAMES[hand]} pooling (the model's)" in capsys.readouterr().out


def test_a_saved_head_has_the_layers_it_had_in_their_order(tmp_path):
    """Two Dense layers, 32 -> 48 without a bias and 48 -> 16, a norm between them and one after."""
    narrow = TANH | {"in_features": 48}
    directory = zoo.make_sentence_transformer(tmp_path / "st", after=[IDENTITY, {}, narrow, {}])
    encoder, tokens = model.load(directory)
    model.save(encoder, tokens, tmp_path / "again")
    assert [one["path"] for one in read(tmp_path / "again" / "modules.json")] == [
        "", "1_Pooling", "2_Dense", "3_Normalize", "4_Dense", "5_Normalize"]
    for path, config in (("2_Dense", IDENTITY), ("4_Dense", narrow)):
        assert read(tmp_path / "again" / path / "config.json") == config
    assert torch.equal(opened(tmp_path / "again"), embed(encoder, tokens, TEXTS))
    assert near(opened(directory).norm(dim=1), torch.ones(4))


def test_dense_and_normalize_compute_in_fp32_in_mixed_precision_too(folder, capsys):
    """A norm of bf16 numbers is off by up to 1/256; the vectors are still those of bf16 layers."""
    directory = zoo.make_sentence_transformer(folder / "st", after=[TANH, {}])
    train.main([*FLAGS, "--model", "st", "--check", "--precision", "bf16"])
    assert "they agree" in capsys.readouterr().out
    encoder, tokens = model.load(directory)
    plain = embed(encoder, tokens, TEXTS, max_length=32)
    memory.mixed_precision(encoder, torch.bfloat16)
    vectors = embed_with_graph(encoder, tokens)
    assert vectors.dtype == torch.float32 and near(vectors.norm(dim=1), torch.ones(4))
    assert (vectors * plain).sum(1).min() > 0.99 and not torch.equal(vectors, plain)


def test_the_older_names_of_files_are_found(tmp_path):
    """Dense in pytorch_model.bin, the encoder's length in sentence_roberta_config.json."""
    new, old = (zoo.make_sentence_transformer(tmp_path / name, after=[TANH])
                for name in ("new", "old"))
    weights = old / "2_Dense" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    zoo.write(old / "sentence_roberta_config.json", {"max_seq_length": 5})
    assert torch.equal(opened(old, ["a b c d e"]), opened(new, ["a b c"]))


def test_of_several_files_of_lengths_that_of_bert_counts_and_then_the_next(tmp_path):
    """In sentence-transformers' order."""
    directory = zoo.make_sentence_transformer(tmp_path / "st")
    names = "bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"
    paths = [directory / f"sentence_{name}_config.json" for name in names]
    for length, path in reversed([*enumerate(paths, 3)]):
        zoo.write(path, {"max_seq_length": length})
    for length, path in enumerate(paths, 3):
        assert model.load(directory)[1].model_max_length == length
        path.unlink()


# lengths, letters, padding

def test_max_seq_length_and_do_lower_case_hold_in_training_and_in_what_is_saved(
        folder, monkeypatch, capsys):
    """The tokenizer itself knows no capital letters: each would be [UNK]. Of "a b c d e" 5 tokens
    are [CLS] a b c [SEP]."""
    directory = zoo.make_sentence_transformer(
        folder / "st", transformer={"max_seq_length": 5, "do_lower_case": True})
    cased = BertTokenizer(vocab=zoo.wordpiece().get_vocab(), do_lower_case=False)
    cased.save_pretrained(directory)
    assert cased.tokenize("A b") == ["[UNK]", "b"]
    train_two_steps(monkeypatch, "--model", "st")
    assert read("runs/001/checkpoints/00000002/state.json")["args"]["max_length"] == 5
    for name in ("st", "runs/001/model"):
        vectors = opened(name, ["A B c D e", "a b C", "a b", "a b c d e"])
        assert torch.equal(vectors[0], vectors[1]) and torch.equal(vectors[0], vectors[3])
        assert (vectors[0] - vectors[2]).norm() > 1e-3
        fields = said(name, "sentence_bert_config.json")
        assert (fields["max_seq_length"], fields["do_lower_case"]) == (5, True)
    assert "--max-length 6" in refused(capsys, *FLAGS, "--model", "st", "--max-length", "6")


@pytest.mark.parametrize("cased", [True, False])
def test_a_tokenizer_is_made_lower_case_once(cased, tmp_path):
    """In tokenizer.json, where every tool finds it; one that is so already stays as it is."""
    directory = zoo.make_sentence_transformer(tmp_path / "st", transformer={"do_lower_case": True})
    vocabulary, wanted = zoo.wordpiece().get_vocab(), zoo.wordpiece()("a bcd e")["input_ids"]
    BertTokenizer(vocab=vocabulary, do_lower_case=not cased).save_pretrained(directory)
    for name in ("once", "twice"):
        model.save(*model.load(directory), tmp_path / name)
        directory = tmp_path / name
        assert model.load(directory)[1]("A BcD e")["input_ids"] == wanted
        assert AutoTokenizer.from_pretrained(directory)("A BcD e")["input_ids"] == wanted
        path = directory / "tokenizer.json"
        assert Tokenizer.from_file(str(path)).encode("A BcD e").ids == wanted
        assert path.read_text().count('"Lowercase"') == (1 if cased else 0)


def test_a_roberta_of_514_positions_takes_512_tokens(folder, monkeypatch, capsys):
    """Its positions are counted from 2, behind that of the padding token 1; its tokenizer says
    nothing."""
    tokens = zoo.roberta(10**30)
    tokens.save_pretrained(zoo.make("roberta", folder / "roberta"))
    encoder, tokens = model.load("roberta")
    assert tokens.model_max_length == 512
    assert opened("roberta", ["a" * 600]).isfinite().all()
    line = refused(capsys, *FLAGS, "--model", "roberta", "--max-length", "513",
                   "--micro-tokens", "513")
    assert "--max-length 513" in line and "512" in line
    train_two_steps(monkeypatch, "--model", "roberta", "--max-length", "512",
                    "--micro-tokens", "512")
    saved = folder / "runs" / "001" / "model"
    assert said(saved, "sentence_bert_config.json")["max_seq_length"] == 512
    assert said(saved, "tokenizer_config.json")["model_max_length"] == 512
    assert read(saved / "tokenizer.json")["truncation"] is None


def test_a_tokenizer_that_cuts_and_pads_by_itself_does_so_no_more(tmp_path):
    """As MiniLM's tokenizer.json, whatever else the directory says. Nor when it is saved, though it
    has just cut and padded texts for somebody."""
    directory = zoo.make("bert", tmp_path / "bert")
    before, path = opened(directory), str(directory / "tokenizer.json")
    tokens = Tokenizer.from_file(path)
    tokens.enable_truncation(5)
    tokens.enable_padding(length=128)
    tokens.save(path)
    encoder, tokens = model.load(directory)
    assert torch.equal(embed(encoder, tokens, TEXTS), before)
    tokens(TEXTS, padding=True, truncation=True, max_length=9)
    model.save(encoder, tokens, tmp_path / "saved")
    saved = read(tmp_path / "saved" / "tokenizer.json")
    assert saved["padding"] is None and saved["truncation"] is None
    assert torch.equal(opened(tmp_path / "saved"), before)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("tokenizer", [zoo.wordpiece, zoo.roberta, zoo.decoder, zoo.unigram])
def test_a_micro_batch_has_the_tokens_of_every_text_alone_and_its_padding(tokenizer, whole):
    """Behind them the tokenizer's own padding token, 0 or 1. The last text is cut at 20 tokens."""
    tokens, texts, found = tokenizer(), [*TEXTS, "a" * 99], []
    for index, ids, mask in data.make_micro_batches(tokens, texts, 20, 40, whole):
        assert ids.dtype == mask.dtype == torch.int64
        for i, row, seen in zip(index.tolist(), ids.tolist(), mask.tolist()):
            alone = tokens(texts[i], truncation=True, max_length=20)["input_ids"]
            padding = len(row) - len(alone)
            assert row == alone + [tokens.pad_token_id] * padding
            assert seen == [1] * len(alone) + [0] * padding
            found.append(i)
    assert sorted(found) == [*range(len(texts))]


# special tokens

SPECIAL = {  # what tokenizer.json puts around a text, and the fields of tokenizer_config.json
    "both": ("<s>", "</s>", {"add_bos_token": True, "add_eos_token": True}),
    "the first": ("<s>", "", {"add_bos_token": True, "add_eos_token": False}),
    "the last": ("", "</s>", {"add_bos_token": False, "add_eos_token": True}),
    "none": ("", "", {"add_bos_token": False, "add_eos_token": False}),
    "both, no fields": ("<s>", "</s>", {}),
    "the first, other fields": ("<s>", "", {"add_eos_token": True}),
}


def make_llama(directory, before, after, fields):
    zoo.make("llama", directory, vocab_size=270)
    zoo.llama_like(before, after).save_pretrained(directory)
    says_too("tokenizer_config.json", tokenizer_class="LlamaTokenizer", **fields)(directory)
    return directory


@pytest.mark.parametrize("case", SPECIAL)
def test_what_a_llama_s_tokenizer_adds_to_a_text_is_what_its_saved_fields_say(case, tmp_path):
    """transformers 5 goes by tokenizer.json alone, and writes the fields no more; version 4 by the
    fields alone, where one is missing by <s> and no </s>."""
    before, after, _ = SPECIAL[case]
    encoder, tokens = model.load(make_llama(tmp_path / "llama", *SPECIAL[case]))
    ids = tokens("a")["input_ids"]
    assert (ids[0] == 1, ids[-1] == 2) == (bool(before), bool(after))
    model.save(encoder, tokens, tmp_path / "saved")
    assert model.load(tmp_path / "saved")[1]("a")["input_ids"] == ids
    own = Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    assert own.encode("a").ids == ids
    saved = said(tmp_path / "saved", "tokenizer_config.json")
    assert saved.get("add_bos_token", True) == bool(before)
    assert saved.get("add_eos_token", False) == bool(after)


def test_a_tokenizer_is_saved_with_the_inputs_that_its_model_takes(tmp_path):
    """BERT's makes token types, which others would pass to a DistilBERT, and end."""
    directory = zoo.make("distilbert", tmp_path / "distilbert")
    zoo.wordpiece().save_pretrained(directory)
    model.save(*model.load(directory), tmp_path / "saved")
    saved = said(tmp_path / "saved", "tokenizer_config.json")
    assert saved["model_input_names"] == ["input_ids", "attention_mask"]


def test_more_special_tokens_are_saved_by_the_name_that_every_version_reads(tmp_path):
    """And nothing of where they came from on this machine."""
    directory, tokens = zoo.make("llama", tmp_path / "llama", vocab_size=270), zoo.decoder()
    tokens.add_special_tokens({"extra_special_tokens": ["<one>", "<two>"]})
    tokens.save_pretrained(directory)
    model.save(*model.load(directory), tmp_path / "saved")
    saved = said(tmp_path / "saved", "tokenizer_config.json")
    assert saved["additional_special_tokens"] == ["<one>", "<two>"]
    assert not {"extra_special_tokens", "is_local", "local_files_only"} & set(saved)
    tokens = model.load(tmp_path / "saved")[1]
    assert tokens("a<two>b")["input_ids"] == [66, 259, 67, 1]


# what is refused

BASE = dict(after=[TANH, {}], prompts={"query": "q: "}, transformer={"max_seq_length": 100})
POOLING, DENSE = "1_Pooling/config.json", "2_Dense/config.json"
ENCODER, PROMPTS = "sentence_bert_config.json", "config_sentence_transformers.json"
OURS = "sentence_transformers.models"


def says(name, value):
    """Breaks a directory: this file says that."""
    return lambda directory: zoo.write(directory / name, value)


def says_too(name, **fields):
    return lambda directory: zoo.write(directory / name, read(directory / name) | fields)


def has_weight(name):
    def add(directory):
        path = directory / "model.safetensors"
        save_file(load_file(path) | {name: torch.ones(4, 32)}, path, {"format": "pt"})
    return add


def has_module(kind):
    def add(directory):
        modules = read(directory / "modules.json")
        modules.append({"idx": 4, "name": "4", "path": "4_More", "type": kind})
        zoo.write(directory / "modules.json", modules)
    return add


def without(name):
    return lambda directory: (directory / name).unlink()


def is_dpr(directory):
    backbone = transformers.DPRQuestionEncoder(transformers.DPRConfig(**zoo.BERT, vocab_size=77))
    backbone.save_pretrained(directory)


def has_more_tokens(directory):
    tokens = zoo.wordpiece()
    tokens.add_tokens(["one more"])
    tokens.save_pretrained(directory)


def has_another_tokenizer(directory):
    """T5's class makes a tokenizer of its own of T5's vocabulary, without digits."""
    zoo.unigram().save_pretrained(directory)
    says_too("tokenizer_config.json", tokenizer_class="T5Tokenizer")(directory)


def has_other_special_tokens(directory):
    """RoBERTa's class puts <s> before a text, whatever tokenizer.json says."""
    tokens = zoo.make("roberta", directory) / "tokenizer.json"
    says_too(tokens.name, post_processor=None)(directory)
    says_too("tokenizer_config.json", tokenizer_class="RobertaTokenizer")(directory)


def has_token_types(directory):
    """Of a text alone, all 1."""
    path = str(directory / "tokenizer.json")
    tokens = Tokenizer.from_file(path)
    tokens.post_processor = processors.TemplateProcessing(
        single="[CLS]:1 $A:1", special_tokens=[("[CLS]", 2)])
    tokens.save(path)
    says_too("tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast",
             model_input_names=["input_ids", "token_type_ids"])(directory)


def has_dense_of_48(directory):
    config = TANH | {"in_features": 48}
    says(DENSE, config)(directory)
    zoo.make_dense(directory / "2_Dense", config)


QK = {"AutoModel": "jinaai/jina-bert-v2-qk-post-norm--modeling_bert.JinaBertModel"}
REFUSED = {  # what is wrong, and what the message must name
    "max": (says_too(POOLING, pooling_mode="max"), [POOLING, "max"]),
    "max, booleans": (says(POOLING, {"pooling_mode_max_tokens": True}), [POOLING, "max"]),
    "weighted mean": (says(POOLING, {"pooling_mode_weightedmean_tokens": True}), ["weightedmean"]),
    "root of the length": (
        says(POOLING, {"pooling_mode_mean_sqrt_len_tokens": True}), ["mean_sqrt_len_tokens"]),
    "two poolings": (says(POOLING, {"pooling_mode": ["mean", "cls"]}), ["mean and cls"]),
    "two, booleans": (says(POOLING, CLS | {"pooling_mode_max_tokens": True}), ["cls and max"]),
    "no pooling": (says(POOLING, dict.fromkeys(CLS, False)), [POOLING]),
    "prompts left out of the mean": (
        says_too(POOLING, include_prompt=False), [POOLING, "include_prompt"]),
    "more of pooling": (says_too(POOLING, temperature=2), [POOLING, "temperature"]),
    "no file of pooling": (without(POOLING), [POOLING]),
    "an adapter": (says("adapter_config.json", {}), ["LoRA", "merge_and_unload"]),
    "its own code": (has_module("custom_st.Router"), ["custom_st.Router"]),
    "another module": (has_module(f"{OURS}.CNN"), ["CNN"]),
    "pooling alone": (says("modules.json", [{"path": "", "type": f"{OURS}.Pooling"}]), ["Pooling"]),
    "a reranker": (says(PROMPTS, {"model_type": "CrossEncoder"}), ["CrossEncoder"]),
    "shorter vectors": (says_too(PROMPTS, truncate_dim=16), [PROMPTS, "truncate_dim"]),
    "a default that is no prompt": (
        says_too(PROMPTS, default_prompt_name="sts"), [PROMPTS, "default_prompt_name", "sts"]),
    "a ColBERT": (says(PROMPTS, {"model_type": "MultiVectorEncoder"}), ["MultiVectorEncoder"]),
    "more of Dense": (says_too(DENSE, dropout=0.5), [DENSE, "dropout"]),
    "a residual": (says_too(DENSE, use_residual=True), [DENSE, "use_residual"]),
    "Dense on tokens": (
        says_too(DENSE, module_input_name="token_embeddings"), [DENSE, "module_input_name"]),
    "any callable": (says_too(DENSE, activation_function="os.system"), [DENSE, "os.system"]),
    "Dense on another width": (has_dense_of_48, ["module 2", "48", "32"]),
    "a wider Dense": (says_too(DENSE, out_features=17), ["2_Dense", "linear"]),
    "no weights of Dense": (without("2_Dense/model.safetensors"), ["2_Dense"]),
    "more of the encoder": (says_too(ENCODER, query_expansion="[MASK]"), [ENCODER, "query_exp"]),
    "an unknown field": (says_too(ENCODER, strip=True), [ENCODER, '"strip"']),
    "a projection": (has_weight("linear.weight"), ["linear.weight"]),
    "a classifier": (has_weight("classifier.weight"), ["classifier.weight"]),
    "a score": (has_weight("score.weight"), ["score.weight"]),
    "DPR": (is_dpr, ["DPRQuestionEncoder"]),
    "more tokens than rows": (has_more_tokens, ["77"]),
    "another tokenizer": (has_another_tokenizer, ["T5Tokenizer", "tokenizer.json"]),
    "token types": (has_token_types, ["token types"]),
    "other special tokens": (has_other_special_tokens, ["RobertaTokenizer", "tokenizer.json"]),
    "JinaBERT without a gate": (
        says_too("config.json", position_embedding_type="alibi", feed_forward_type="original"),
        ["feed_forward_type", "original"]),
    "another JinaBERT": (
        says_too("config.json", position_embedding_type="alibi", auto_map=QK),
        ["jinaai/jina-bert-v2-qk-post-norm"]),
    # JSON of another shape
    "no JSON": (lambda directory: (directory / PROMPTS).write_text("{"), [PROMPTS, "JSON"]),
    "modules, an object": (says("modules.json", {"0": "Transformer"}), ["modules.json"]),
    "modules, a number": (says("modules.json", [{"path": "", "type": 3}]), ["module"]),
    "pooling, a list": (says(POOLING, ["mean"]), [POOLING]),
    "pooling, a number": (says(POOLING, {"pooling_mode": 3}), [POOLING]),
    "Dense, a list": (says(DENSE, ["tanh"]), [DENSE]),
    "activation, null": (says_too(DENSE, activation_function=None), [DENSE]),
    "encoder, a list": (says(ENCODER, [100]), [ENCODER]),
    "length, a text": (says(ENCODER, {"max_seq_length": "100"}), [ENCODER, "max_seq_length"]),
    "length, below 0": (says(ENCODER, {"max_seq_length": -1}), [ENCODER, "max_seq_length"]),
    "length, 2": (says(ENCODER, {"max_seq_length": 2}), [ENCODER, "max_seq_length"]),
    "prompts, a list": (says(PROMPTS, ["query: "]), [PROMPTS]),
    "prompts, a text": (says(PROMPTS, {"prompts": "query: "}), [PROMPTS, "prompts"]),
    "prompts, a list in them": (says(PROMPTS, {"prompts": ["query: "]}), [PROMPTS, "prompts"]),
    "prompts, a number": (says(PROMPTS, {"prompts": {"query": 3}}), [PROMPTS, "prompts"]),
    "others' prompts, a number": (says(PROMPTS, {"prompts": {"sts": 3}}), [PROMPTS, "prompts"]),
    "lower case, a number": (says(ENCODER, {"do_lower_case": 1}), [ENCODER, "do_lower_case"]),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """mean, Dense, Normalize; a prompt; 100 tokens."""
    return zoo.make_sentence_transformer(tmp_path_factory.mktemp("base") / "st", **BASE)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_here_is_refused_by_name_in_one_line(case, base, tmp_path):
    break_it, names = REFUSED[case]
    directory = shutil.copytree(base, tmp_path / "broken")
    break_it(directory)
    with pytest.raises((OSError, ValueError)) as error:
        model.load(directory)
    message = str(error.value)
    assert str(directory) in message and "\n" not in message
    assert all(name in message for name in names), message


def test_an_adapter_of_the_encoder_s_own_folder_is_refused(tmp_path):
    """As peft writes it: there is no config.json."""
    directory = zoo.make_sentence_transformer(tmp_path / "st", encoder="0_Transformer")
    (directory / "0_Transformer" / "config.json").unlink()
    zoo.write(directory / "0_Transformer" / "adapter_config.json", {})
    with pytest.raises(ValueError, match="LoRA"):
        model.load(directory)


def test_what_changes_no_vector_is_not_refused(tmp_path):
    """Published JinaBERTs say how their own code computes attention; null prompts are none."""
    torch.manual_seed(0)
    sizes = zoo.BERT | {"vocab_size": 77}
    encoder = model.PooledEncoder(model.JinaBertModel(model.JinaBertConfig(**sizes))).eval()
    model.save(encoder, zoo.wordpiece(), tmp_path / "jina")
    before = opened(tmp_path / "jina")
    says_too("config.json", attn_implementation="torch")(tmp_path / "jina")
    for prompts in (None, {}, {"query": None}):
        says_too(PROMPTS, prompts=prompts, default_prompt_name=None, truncate_dim=None)(
            tmp_path / "jina")
        assert torch.equal(opened(tmp_path / "jina"), before)


LEFT_OUT = {  # a class, whose family it is of, and what of it is no part of an encoder
    "BertForPreTraining": ("bert", {"cls"}),
    "RobertaForMaskedLM": ("roberta", {"lm_head"}),
    "AlbertForPreTraining": ("albert", {"predictions", "sop_classifier"}),
    "BartForConditionalGeneration": ("bart", {"final_logits_bias"}),
    "T5Model": ("t5", {"decoder"}),
    "T5ForConditionalGeneration": ("t5", {"decoder"}),
}


@pytest.mark.parametrize("whole", LEFT_OUT)
def test_what_is_no_part_of_an_encoder_is_left_out_by_name(whole, tmp_path):
    """What is saved has it no more. A BART is both its halves, a T5 the encoder alone."""
    architecture, parts = LEFT_OUT[whole]
    encoder, tokens = model.load(zoo.make(architecture, tmp_path / "whole", whole))
    model.save(encoder, tokens, tmp_path / "saved")
    again, _ = model.load(tmp_path / "saved")
    assert torch.equal(embed(again, tokens, TEXTS), embed(encoder, tokens, TEXTS))
    notes = set(encoder.notes) - set(again.notes)
    assert {name for note in notes for name in note.partition(": ")[2].split(", ")} == parts


def test_a_bart_without_the_weights_of_its_decoder_is_refused(tmp_path):
    """Its vectors come out of the decoder."""
    path = zoo.make("bart", tmp_path / "bart") / "model.safetensors"
    weights = {name: p for name, p in load_file(path).items() if not name.startswith("decoder.")}
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing, among them decoder\."):
        model.load(tmp_path / "bart")


# what `load` leaves behind

def test_load_leaves_no_gradient_and_no_random_state_behind(base):
    torch.manual_seed(5)
    random.seed(5)
    state, python_state = torch.get_rng_state(), random.getstate()
    encoder, _ = model.load(base)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python_state
    assert all(p.grad is None and not p._backward_hooks for p in encoder.parameters())
    assert not encoder.training and torch.is_grad_enabled()


@pytest.mark.parametrize("architecture", zoo.ARCHITECTURES)
def test_load_freezes_what_no_loss_reaches_and_nothing_else(architecture, tmp_path):
    """The mean of transformers' hidden states, in training mode, of a text with every token."""
    directory = zoo.make(architecture, tmp_path / "model")
    encoder, tokens = model.load(directory)
    plain = AutoModel.from_pretrained(directory) if architecture != "t5" else (
        transformers.T5EncoderModel.from_pretrained(directory))
    ids = torch.arange(len(tokens))[None]
    plain.train()(input_ids=ids).last_hidden_state.mean(1).square().sum().backward()
    unreached = {name for name, p in plain.named_parameters() if p.grad is None}
    assert {name for name, p in encoder.backbone.named_parameters()
            if not p.requires_grad} == unreached
    assert all("pooler" in name for name in unreached)
    assert (architecture in ("bert", "albert", "roberta", "mpnet")) == bool(unreached)


# prompts

MODEL = {"query": "model query: ", "passage": "model passage: "}  # as E5 and others name them
LEFT = {"query": "left query: ", "document": "left document: "}
FLAG = {"query": "flag query: "}
PRECEDENCE = {  # --prompts, the manifest's for `left`; what left and right get
    "the model's": (None, None, Prompts(*MODEL.values()), Prompts(*MODEL.values())),
    "a manifest's": (None, LEFT, Prompts(*LEFT.values()), Prompts(*MODEL.values())),
    "the flag's": (FLAG, LEFT, Prompts("flag query: "), Prompts("flag query: ")),
    "none by flag": ({}, LEFT, Prompts(), Prompts()),
}


def texts_of(name):
    """The queries of a source, and its other texts, in order."""
    lines = [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()]
    return [line[0] for line in lines], [text for line in lines for text in line[1:]]


def prompted(**prompts):
    """What may be embedded of the sources {name: its prompts}."""
    found = set()
    for name, (query, document) in prompts.items():
        queries, documents = texts_of(name)
        found |= {query + text for text in queries} | {document + text for text in documents}
    return found


@pytest.fixture
def embedded(monkeypatch):
    """The texts that are cut into tokens, in training and in evaluation."""
    make_micro_batches, texts = data.make_micro_batches, []

    def note(tokens, batch, *args, **kwargs):
        texts.extend(text for text in batch if text != "a text")  # of the look at --max-length
        return make_micro_batches(tokens, batch, *args, **kwargs)

    monkeypatch.setattr(data, "make_micro_batches", note)
    return texts


@pytest.fixture
def prompter(folder):
    """The folder, with a model that has prompts."""
    zoo.make_sentence_transformer(folder / "st", prompts=MODEL)
    return folder


@pytest.mark.parametrize("case", PRECEDENCE)
def test_prompts_are_the_flag_s_or_the_manifest_s_or_the_model_s(
        case, prompter, embedded, capsys):
    """Before every text that is embedded, whoever's they are; the rows are drawn alike. What is
    saved has the prompts of all sources, or else, which a line says, those it came with; "document"
    is the name that sentence-transformers looks for first, and finds always."""
    flag, manifest, left, right = PRECEDENCE[case]
    sources = read("sources.json")
    sources[0]["prompts"] = manifest
    zoo.write(Path("sources.json"), sources)
    flags = [] if flag is None else ["--prompts", json.dumps(flag)]
    train.main([*FLAGS, "--model", "st", *flags])
    assert set(embedded) <= prompted(left=left, right=right)
    assert any("left1" in text for text in embedded)
    assert any("right1" in text for text in embedded)
    printed = capsys.readouterr().out
    assert ("by source" in printed and "are kept" in printed) == (left != right)

    digests = [json.loads(line).get("rows") for line in open("runs/001/metrics.jsonl")]
    train.main([*FLAGS, "--model", "st", "--prompts", "{}", "--out", "plain"])
    assert digests == [json.loads(line).get("rows") for line in open("plain/metrics.jsonl")]

    expected = left if left == right else Prompts(*MODEL.values())
    saved = said("runs/001/model")["prompts"]
    assert prompts_of(saved) == expected
    assert (saved.get("query", ""), saved.get("document", "")) == expected


RESUMED = {  # a case of PRECEDENCE, and what the model's directory says beside prompts
    "the model's": dict(pooling=CLS),
    "a manifest's": dict(pooling=LAST),
    "the flag's": dict(after=[TANH, {}]),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_with_prompts_goes_on_with_them_and_ends_in_the_same_files(
        case, folder, embedded):
    """With dropout 0.1, and a Dense that is trained too. Killed after step 4 of 4, before that was
    saved."""
    zoo.make_sentence_transformer(folder / "st", prompts=MODEL, **RESUMED[case])
    flag, manifest, left, right = PRECEDENCE[case]
    sources = read("sources.json")
    sources[0]["prompts"] = manifest
    zoo.write(Path("sources.json"), sources)
    flags = [] if flag is None else ["--prompts", json.dumps(flag)]
    train.main([*FLAGS, "--model", "st", *flags, "--steps", "4", "--save-every", "2",
                "--out", "whole"])
    shutil.copytree("whole", "parts")
    for later in ("model", "checkpoints/00000004"):
        shutil.rmtree(Path("parts", later))
    embedded.clear()
    train.main(["--resume", "--out", "parts"])
    assert embedded and set(embedded) <= prompted(left=left, right=right)
    parts, whole = files_of("parts/model"), files_of("whole/model")
    assert parts == whole and len(whole) >= 9


def files_of(directory):
    paths = [path for path in Path(directory).rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): read(path) if path.suffix == ".json"
            else path.read_bytes() for path in paths}


@pytest.mark.parametrize("document", ["", None])
def test_of_prompts_for_documents_the_first_that_is_not_empty_counts(document, folder, embedded):
    """sentence-transformers 6 writes an empty "document" beside a "passage"."""
    zoo.make_sentence_transformer(folder / "st", prompts=MODEL | {"document": document})
    train.main([*FLAGS, "--model", "st"])
    prompts = Prompts(MODEL["query"], MODEL["passage"])
    assert embedded and set(embedded) <= prompted(left=prompts, right=prompts)
    saved = said("runs/001/model")["prompts"]
    assert prompts_of(saved) == prompts and saved["document"] == saved["passage"]


WRONG = {"another name": {"queries": "a: "}, "a task": {"query": "a: ", "sts": "b: "},
         "a number": {"query": 3}, "a list": ["a: "], "a text": "a: "}


@pytest.mark.parametrize("case", WRONG)
def test_prompts_for_training_of_other_names_or_kinds_are_refused(case, folder, capsys):
    """By flag and by manifest: they would be no prompts, without a word."""
    line = refused(capsys, *FLAGS, "--model", "toy", "--prompts", json.dumps(WRONG[case]))
    assert "--prompts" in line and json.dumps(WRONG[case]) in line
    sources = read("sources.json")
    sources[1]["prompts"] = WRONG[case]
    zoo.write(Path("sources.json"), sources)
    line = refused(capsys, *FLAGS, "--model", "toy")
    assert 'sources.json, source 2: field "prompts"' in line and json.dumps(WRONG[case]) in line
    assert not Path("runs").exists()


def test_a_prompt_that_leaves_no_token_for_a_text_is_refused(prompter, capsys):
    """Of "model passage: " 5 + 7 letters and a colon, with [CLS] and [SEP] 15 tokens."""
    line = refused(capsys, *FLAGS, "--model", "st", "--max-length", "15")
    assert "--max-length" in line and json.dumps(MODEL["passage"]) in line
    assert not Path("runs").exists()
    train.main([*FLAGS, "--model", "st", "--max-length", "16"])


@pytest.mark.parametrize("text", range(3), ids=["query", "positive", "negative"])
def test_a_row_that_begins_with_its_prompt_is_refused_before_the_first_step(
        text, prompter, capsys):
    """By file and line: in training alone it would stand there twice."""
    lines = [json.loads(line) for line in Path("right.jsonl").read_text().splitlines()]
    lines[7][text] = ("model passage:" if text else "model query:") + lines[7][text]
    Path("right.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    message = refused(capsys, *FLAGS, "--model", "st")
    assert "right.jsonl, line 8" in message and ("passage" if text else "query") in message
    assert not Path("runs").exists()


def test_rows_are_looked_through_once_for_the_same_prompts(folder, monkeypatch):
    """Again for other prompts, and when the file changed."""
    reads, read_lines = [], convert.read_lines
    monkeypatch.setattr(convert, "read_lines", lambda path: reads.append(path) or read_lines(path))

    def look_through(*prompts):
        source, _ = data.load_sources("sources.json")
        reads.clear()
        source.prompts = Prompts(*prompts)
        check_prompts([source])
        return len(reads)

    assert [look_through(query) for query in ("a: ", "A: ", "a: ", "A: ")] == [1, 1, 0, 0]
    os.utime("left.jsonl", (1, 1))
    assert [look_through("a: "), look_through("a: ")] == [1, 0]
    with pytest.raises(ValueError, match="left.jsonl, line 1"):
        look_through(json.loads(Path("left.jsonl").read_text().split("\n")[0])[0])


def test_a_held_out_row_that_begins_with_its_prompt_is_refused_by_file_and_line(prompter, capsys):
    """So is a file to evaluate on, before the first step."""
    Path("eval.jsonl").write_text('["a b", "c d"]\n["model query: a", "g"]\n')
    sources = read("sources.json")
    sources[0]["eval"] = "eval.jsonl"
    zoo.write(Path("sources.json"), sources)
    assert "eval.jsonl, line 2" in refused(capsys, *FLAGS, "--model", "st")


def test_what_a_directory_says_for_others_is_saved_again(folder, monkeypatch):
    """Prompts for other tasks, the default's name, the similarity, versions."""
    more = {"default_prompt_name": "sts", "similarity_fn_name": "dot",
            "__version__": {"sentence_transformers": "3.0.1"}}
    prompts = MODEL | {"sts": "about: "}
    zoo.make_sentence_transformer(folder / "st", prompts=prompts, **more)
    train_two_steps(monkeypatch, "--model", "st")
    saved = said("runs/001/model")
    assert saved["prompts"].items() >= prompts.items() and saved.items() >= more.items()


@pytest.mark.parametrize("command, flags", [
    ("filter", ["--model", "st", "--top-k", "20"]),
    ("mine", ["--retriever", "st", "--cross-encoder", "pairs", "--negatives", "2",
              "--candidates", "8"])])
def test_curation_searches_with_prompts_and_writes_without(
        command, flags, prompter, embedded, monkeypatch):
    """Every third row is held out, to try the cross-encoder on, which knows the answers."""
    make_cross_encoder("pairs")
    monkeypatch.setattr(Reranker, "__call__", lambda self, pairs: np.array(
        [0.9 if query.split()[-2] == passage.split()[-2] else 0.1 for query, passage in pairs]))
    sources = read("sources.json")
    for source in sources:
        held_out = Path(source["path"]).read_text().splitlines(keepends=True)[::3]
        Path(f"eval-{source['path']}").write_text("".join(held_out))
        source["eval"] = f"eval-{source['path']}"
    zoo.write(Path("sources.json"), sources)
    curate([command, "--sources", "sources.json", "--out", "out", *flags])
    prompts = Prompts(*MODEL.values())
    assert embedded and set(embedded) <= prompted(left=prompts, right=prompts)
    for name in ("left", "right"):
        rows = list(read_rows(f"out/{name}.jsonl"))
        queries, documents = texts_of(name)
        assert rows and {row.query for row in rows} <= set(queries)
        assert {text for row in rows for text in (row.positive, *row.negatives)} <= set(documents)
        assert all(len(row.negatives) == 2 for row in rows) or command == "filter"


def make_cross_encoder(directory):
    torch.manual_seed(0)
    network = transformers.BertForSequenceClassification(
        transformers.BertConfig(**zoo.BERT, vocab_size=77, num_labels=1))
    cross_encoder.save(network, zoo.wordpiece(), directory)


def test_evaluation_puts_the_model_s_prompts_before_queries_and_targets(
        prompter, embedded, capsys):
    """The same metrics as with the prompts in the file and none by flag, and others than
    without."""
    def metrics(file, *flags):
        capsys.readouterr()
        evaluate(["st", "--pairs", file, *flags])
        return {name: value for name, value in json.loads(capsys.readouterr().out).items()
                if name not in ("model", "file")}

    queries, documents = texts_of("left")
    pairs = list(zip(queries, documents[::4]))
    query, document = MODEL.values()
    Path("there.jsonl").write_text("".join(
        json.dumps([query + q, document + p]) + "\n" for q, p in pairs))
    Path("not.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    own = metrics("not.jsonl")
    assert set(embedded) == {query + q for q, _ in pairs} | {document + p for _, p in pairs}
    assert own == metrics("there.jsonl", "--prompts", "{}") != metrics(
        "not.jsonl", "--prompts", "{}")


def test_texts_that_are_neither_get_the_prompt_that_the_model_names_for_them(
        folder, embedded, capsys):
    """As sentence-transformers' encode: that of default_prompt_name, or none."""
    Path("scored.jsonl").write_text('["a b", "c", 1]\n["d", "e", 0]\n["d", "f g", 0.5]\n')
    for name, prompt in ((None, ""), ("sts", "about: ")):
        zoo.make_sentence_transformer(
            folder / str(name), prompts=MODEL | {"sts": "about: "}, default_prompt_name=name)
        embedded.clear()
        evaluate([str(name), "--scored", "scored.jsonl"])
        assert set(embedded) == {prompt + text for text in ("a b", "c", "d", "e", "f g")}


# every architecture, trained

@pytest.mark.parametrize("architecture", zoo.ARCHITECTURES)
def test_an_encoder_of_others_trains_and_is_saved_as_it_was_in_memory(
        architecture, folder, monkeypatch, capsys):
    """Also with layers checkpointed, with dropout where it has some, to the same bits. ALBERT has
    one layer that it passes twice."""
    zoo.make(architecture, folder / "other")
    before = opened("other")
    trained = train_two_steps(monkeypatch, "--model", "other", "--out", "plain")
    assert (trained - before).norm(dim=1).min() > 1e-3
    assert torch.equal(opened("plain/model"), trained)
    flags = ["--model", "other", "--out", "checkpointed", "--checkpoint-layers"]
    if architecture == "albert":
        assert "AlbertModel" in refused(capsys, *FLAGS, *flags)
        return
    assert torch.equal(train_two_steps(monkeypatch, *flags), trained)
    weights, others = (load_file(Path(run, "model", "model.safetensors"))
                       for run in ("plain", "checkpointed"))
    assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.parametrize("architecture", zoo.ARCHITECTURES)
def test_a_vector_of_others_does_not_depend_on_the_padding(architecture, tmp_path):
    encoder, tokens = model.load(zoo.make(architecture, tmp_path / "model"))
    ids = [torch.tensor(tokens(text)["input_ids"]) for text in TEXTS]
    padded = pad_sequence(ids, batch_first=True, padding_value=tokens.pad_token_id)
    mask = pad_sequence([torch.ones_like(x) for x in ids], batch_first=True)
    with torch.no_grad():
        alone = torch.cat([encoder(x[None], torch.ones_like(x)[None]) for x in ids])
        assert near(encoder(padded, mask), alone, atol=1e-5)
    assert (alone[0] - alone[1]).norm() > 1e-3


CHECKS = """import sys, train
from plumbing.ranks import Ranks

ranks = Ranks()
for architecture in sys.argv[1:]:
    args, _ = train.parse_arguments(
        ["--sources", "sources.json", "--model", architecture, "--micro-tokens", "32",
         "--max-length", "16", "--precision", "fp32", "--check", "--checkpoint-layers"], ranks)
    status = train.train(args, None, ranks)
    ranks.print_rank0(f"{architecture}: {status}")
ranks.leave()
"""


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="is installed on Linux alone")
def test_on_two_ranks_the_gradient_of_others_is_that_of_one_process(folder):
    families = "bert", "roberta", "modernbert", "qwen3", "t5"
    for architecture in families:
        zoo.make(architecture, folder / architecture)
    Path("checks.py").write_text(CHECKS)
    run = torchrun("checks.py", *families)
    assert run.returncode == 0, run.stderr
    for architecture in families:
        assert f"{architecture}: 0\n" in run.stdout, run.stdout


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "bart"])
def test_more_passes_than_texts_change_no_gradient(architecture, tmp_path):
    """As on a rank with fewer texts than another has passes. Each of 4 texts is a pass of its own,
    and 3 more pass a text of which nothing is asked: a BERT takes no empty batch."""
    encoder, tokens = model.load(zoo.make(architecture, tmp_path / "model"))
    micro_batches = data.make_micro_batches(tokens, TEXTS, 32, micro_tokens=32)
    texts = [len(index) for index, _, _ in memory.equalise(micro_batches, 7)]
    assert texts == [0, 0, 0, 1, 1, 1, 1]

    def gradient(passes):
        optimizer = torch.optim.SGD(encoder.parameters(), 0.0)
        engine = memory.Engine(encoder, optimizer, 0.0, memory.LossScale(torch.float32))
        embeddings = engine.embed(memory.equalise(micro_batches, passes))
        pair_loss(embeddings[:2], embeddings[2:], 0.05).backward()
        engine.backward(embeddings.grad)
        found = torch.cat([p.grad.flatten() for p in engine.parameters.values()])
        encoder.zero_grad()
        return found

    plain = embed_with_graph(encoder, tokens)
    pair_loss(plain[:2], plain[2:], 0.05).backward()
    expected = torch.cat([p.grad.flatten() for p in encoder.parameters() if p.requires_grad])
    encoder.zero_grad()
    for passes in (4, 7):
        assert (gradient(passes) - expected).norm() < 1e-5 * expected.norm()


def embed_with_graph(encoder, tokens):
    (index, ids, mask), = data.make_micro_batches(tokens, TEXTS, 32, micro_tokens=64, whole=True)
    return encoder(ids, mask)[index.argsort()]
