"""The cross-encoder (§5.2) against values worked out by hand, and what opens it: ours,
transformers, sentence-transformers.
"""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForSequenceClassification, BertConfig,
                          BertForSequenceClassification, BertModel, BertTokenizer)

import memory
import model
from curation import cross_encoder
from tests import zoo

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the weather in berlin is cold nothing at all".split()
PAIRS = [("the weather", "in berlin is cold"), ("berlin", "nothing at all")]
SMALL = dict(vocab_size=20, hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
             intermediate_size=96)


def randomise(network):
    """Every parameter at random: at the start biases are 0, which would hide a forgotten one."""
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.2
    return network.eval()


def random_cross_encoder():
    return randomise(cross_encoder.CrossEncoder(model.JinaBertConfig(**SMALL)))


def tokenizer():
    return BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, model_max_length=512)


def logits(network, tokens, pairs=PAIRS):
    queries, passages = map(list, zip(*pairs))
    with torch.no_grad():
        return network(**tokens(queries, passages, padding=True, return_tensors="pt")).logits


def weights_of(directory):
    return load_file(directory / "model.safetensors")


def rewrite_weights(directory, change):
    save_file(change(weights_of(directory)), directory / "model.safetensors", {"format": "pt"})


def make_jina_encoder(directory):
    encoder = model.PooledEncoder(model.JinaBertModel(model.JinaBertConfig(**SMALL)))
    model.save(encoder, tokenizer(), directory)


def make_bert(directory, kind=BertModel, **fields):
    """As transformers leaves it, without our save."""
    shutil.rmtree(directory, ignore_errors=True)
    kind(BertConfig(**SMALL, **fields)).save_pretrained(directory)
    tokenizer().save_pretrained(directory)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(a cross-encoder on JinaBERT, the directory it was saved in). Tests that break the directory
    copy it first."""
    network, directory = random_cross_encoder(), tmp_path_factory.mktemp("saved") / "model"
    cross_encoder.save(network, tokenizer(), directory)
    return network, directory


def test_a_logit_by_hand():
    """u and v are the unit means over the query's tokens, [CLS] and the first [SEP] among them, and
    over the passage's. With head weights 2 at column 0, -1 at column 5 and bias 0.5 the logit is
    2 u_0 v_0 - u_5 v_5 + 0.5. [CLS] the weather [SEP] are 4 tokens; [CLS] berlin [SEP], padded in
    the batch, 3."""
    network, tokens = random_cross_encoder(), tokenizer()
    network.classifier.weight.data.zero_()[0, [0, 5]] = torch.tensor([2.0, -1.0])
    network.classifier.bias.data.fill_(0.5)
    got = logits(network, tokens)
    assert got.shape == (2, 1)
    for i, first_of_passage in enumerate((4, 3)):
        ids = tokens(*PAIRS[i], return_tensors="pt")["input_ids"]
        hidden = network.bert(ids).last_hidden_state[0]
        u, v = hidden[:first_of_passage].mean(0), hidden[first_of_passage:].mean(0)
        u, v = u / u.norm(), v / v.norm()
        want = (2 * u[0] * v[0] - u[5] * v[5] + 0.5).item()
        assert got[i].item() == pytest.approx(want, abs=1e-5)


# load and save

def test_a_saved_cross_encoder_opens_equal_and_is_no_embedder(saved):
    """modules.json and 1_Pooling would make sentence-transformers take it for one."""
    network, directory = saved
    again, tokens = cross_encoder.load(directory)
    assert type(again) is cross_encoder.CrossEncoder and not again.training
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    state = again.state_dict()
    assert all(torch.equal(state[name], p) for name, p in network.state_dict().items())
    assert torch.allclose(logits(again, tokens), logits(network, tokenizer()), atol=1e-6, rtol=0)
    assert {path.name for path in directory.iterdir()} == {
        "config.json", "model.safetensors", "model.py", "cross_encoder.py", "tokenizer.json",
        "tokenizer_config.json"}
    assert json.loads((directory / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "model.JinaBertConfig",
        "AutoModelForSequenceClassification": "cross_encoder.CrossEncoder"}


@pytest.mark.parametrize("backbone", ["JinaBERT", "BERT", "BERT without pooler"])
def test_a_new_head_comes_on_an_encoder_s_weights_and_repeats_for_a_seed(backbone, tmp_path):
    """On a JinaBERT weights 10 and bias -5, on a BERT weights from N(0, 0.02) and bias 0; the rest
    as it came, but for a pooler that did not."""
    directory = tmp_path / "encoder"
    (make_jina_encoder if backbone == "JinaBERT" else make_bert)(directory)
    if backbone == "BERT without pooler":
        rewrite_weights(directory, lambda s: {n: p for n, p in s.items() if "pooler" not in n})
    made = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        network, tokens = cross_encoder.load(directory, new_head=True)
        made.append(torch.cat([p.flatten() for p in network.parameters()]))
    assert torch.equal(made[0], made[1])
    if backbone == "JinaBERT":
        assert set(network.classifier.weight.flatten().tolist()) == {10.0}
        assert network.classifier.bias.tolist() == [-5.0]
    else:
        assert 0.01 < network.classifier.weight.std() < 0.03
        assert network.classifier.bias.tolist() == [0.0]
        assert not torch.equal(made[0], made[2])
    assert not network.training and network.config.num_labels == 1
    state = network.bert.state_dict()
    assert all(torch.equal(state[name], p) for name, p in weights_of(directory).items())
    cross_encoder.save(network, tokens, tmp_path / "cross")
    again = cross_encoder.load(tmp_path / "cross")[0].state_dict()
    assert all(torch.equal(again[name], p) for name, p in network.state_dict().items())


def test_trained_in_16_bits_its_tokenizer_still_says_what_it_gives(tmp_path):
    """memory.py wraps the forward, whose arguments they are."""
    network = random_cross_encoder()
    memory.mixed_precision(network, torch.bfloat16)
    cross_encoder.save(network, tokenizer(), tmp_path)
    names = json.loads((tmp_path / "tokenizer_config.json").read_text())["model_input_names"]
    assert {"input_ids", "attention_mask", "token_type_ids"} == set(names)


def without_a_weight(state):
    return {name: p for name, p in state.items() if name != "bert.encoder.layer.1.mlp.wo.bias"}


def is_of(architecture, whole):
    """Another family's model, with its tokenizer."""
    return lambda directory: zoo.make(architecture, directory, whole, num_labels=1)


def encoder_with_an_unknown_weight(directory):
    make_jina_encoder(directory)
    rewrite_weights(directory, lambda s: s | {"encoder.layer.0.norm_q.weight": torch.ones(128)})


LOAD, NEW_HEAD = cross_encoder.load, partial(cross_encoder.load, new_head=True)
REFUSED = {  # what happens to a saved cross-encoder's directory, what opens it, what the line names
    "an encoder": (make_jina_encoder, LOAD, ValueError,
                   "without a classification head; `python -m curation cross-encoder --model {}`"),
    "a plain BERT": (make_bert, LOAD, ValueError, "without a classification head"),
    "two outputs": (partial(make_bert, kind=BertForSequenceClassification, num_labels=2), LOAD,
                    ValueError, "2 outputs"),
    "two rows": (partial(rewrite_weights, change=lambda s: s | {
        "classifier.weight": torch.ones(2, 128)}), LOAD, ValueError, "classifier.weight"),
    "a weight is missing": (partial(rewrite_weights, change=without_a_weight), LOAD, ValueError,
                            "bert.encoder.layer.1.mlp.wo.bias"),
    "a published reranker's pooler": (partial(rewrite_weights, change=lambda s: s | {
        "bert.pooler.dense.bias": torch.ones(128)}), LOAD, ValueError, "bert.pooler.dense.bias"),
    "an adapter": (lambda directory: (directory / "adapter_config.json").write_text("{}"), LOAD,
                   ValueError, "LoRA"),
    "a BART": (is_of("bart", "BartForSequenceClassification"), LOAD, ValueError, "has a decoder"),
    "a T5": (is_of("t5", "T5ForSequenceClassification"), LOAD, ValueError, "has a decoder"),
    "a BART without a head": (is_of("bart", "BartModel"), NEW_HEAD, ValueError, "has a decoder"),
    "a T5 without a head": (is_of("t5", "T5Model"), NEW_HEAD, ValueError, "has a decoder"),
    "a T5's encoder": (is_of("t5", "T5EncoderModel"), NEW_HEAD, ValueError, "decoder"),
    "nothing there": (shutil.rmtree, LOAD, OSError, "neither a directory"),
    "an encoder with an unknown weight": (encoder_with_an_unknown_weight, NEW_HEAD, ValueError,
                                          "encoder.layer.0.norm_q.weight"),
    "its head would go": (
        lambda directory: None, model.load, ValueError, "among them classifier.bias"),
    "BERT's head would go": (
        partial(make_bert, kind=BertForSequenceClassification, num_labels=1), model.load,
        ValueError, "among them classifier.bias"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_cross_encoder_or_no_encoder_is_refused_in_one_line(case, saved, tmp_path):
    """transformers would go on with a random head, or without the one that is there."""
    change, opens, error_type, says = REFUSED[case]
    directory = shutil.copytree(saved[1], tmp_path / "d")
    change(directory)
    with pytest.raises(error_type) as error:
        opens(directory)
    assert str(error.value).startswith(f"model {directory}: ") and "\n" not in str(error.value)
    assert says.format(directory) in str(error.value)


# other people's directories

@pytest.mark.parametrize("new_head", [True, False])
def test_a_directory_s_lower_case_and_length_hold_and_are_saved(new_head, tmp_path):
    """Of an encoder in a folder of its own, and of a reranker. The tokenizer itself knows no
    capital letters, and takes 512 tokens."""
    directory = folder = tmp_path / "st"
    says = {"max_seq_length": 9, "do_lower_case": True}
    if new_head:
        zoo.make_sentence_transformer(directory, encoder="0_Transformer", transformer=says)
        folder = directory / "0_Transformer"
    else:
        zoo.make("bert", directory, "BertForSequenceClassification", num_labels=1)
        zoo.write(directory / "sentence_bert_config.json", says)
    cased = BertTokenizer(vocab=zoo.wordpiece().get_vocab(), do_lower_case=False)
    cased.save_pretrained(folder)
    network, tokens = cross_encoder.load(directory, new_head)
    prefix, state = "bert." if new_head else "", network.state_dict()
    assert all(torch.equal(state[prefix + name], p) for name, p in weights_of(folder).items())
    cross_encoder.save(network, tokens, tmp_path / "saved")
    for tokens in (tokens, cross_encoder.load(tmp_path / "saved")[1]):
        assert tokens.model_max_length == 9
        assert tokens("A Bc", "D")["input_ids"] == zoo.wordpiece()("a bc", "d")["input_ids"]


@pytest.mark.parametrize("new_head", [True, False])
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gpt2"])
def test_a_decoder_s_logit_is_of_the_last_token_though_its_config_knows_no_padding(
        architecture, new_head, tmp_path):
    """A batch gives the logits of each pair alone, also when saved and opened by transformers."""
    whole = "" if new_head else zoo.ARCHITECTURES[architecture][0] + "ForSequenceClassification"
    directory = zoo.make(architecture, tmp_path / "d", whole, pad_token_id=None, num_labels=1)
    assert json.loads((directory / "config.json").read_text())["pad_token_id"] is None
    network, tokens = cross_encoder.load(directory, new_head)
    cross_encoder.save(network, tokens, tmp_path / "saved")
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    alone = torch.cat([logits(network, tokens, [pair]) for pair in PAIRS])
    for one in (network, saved.eval()):
        assert torch.allclose(logits(one, tokens), alone, atol=1e-5, rtol=0)


# what opens it elsewhere: in a process of its own, in another folder

def elsewhere(tmp_path, code, *arguments, path=""):
    """Runs the code with PAIRS and the arguments -> what it leaves in out.pt. It finds model.py
    only beside the weights, unless `path` says where else."""
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1",
                                "HF_MODULES_CACHE": str(tmp_path / "modules")}
    code = "import sys, json, torch\nPAIRS = json.loads(sys.argv[1])\n" + code
    command = [sys.executable, "-c", code, json.dumps(PAIRS), *map(str, arguments)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(tmp_path / "out.pt")


def test_transformers_opens_it_with_the_flag_and_gives_equal_logits(saved, tmp_path):
    got = elsewhere(tmp_path, """
from transformers import AutoModelForSequenceClassification, AutoTokenizer
tokens = AutoTokenizer.from_pretrained(sys.argv[2])
network, report = AutoModelForSequenceClassification.from_pretrained(
    sys.argv[2], trust_remote_code=True, output_loading_info=True)
assert network.config.num_labels == 1 and not any(report.values()), report
batch = tokens(*map(list, zip(*PAIRS)), padding=True, return_tensors="pt")
torch.save(network.eval()(**batch).logits.detach(), "out.pt")
""", saved[1])
    assert torch.allclose(got, logits(saved[0], tokenizer()), atol=1e-6, rtol=0)


def test_load_opens_it_in_another_process(saved, tmp_path):
    got = elsewhere(tmp_path, """
from curation import cross_encoder
network, tokens = cross_encoder.load(sys.argv[2])
batch = tokens(*map(list, zip(*PAIRS)), padding=True, return_tensors="pt")
torch.save(network(**batch).logits.detach(), "out.pt")
""", saved[1], path=str(Path(model.__file__).parent))
    assert torch.allclose(got, logits(saved[0], tokenizer()), atol=1e-6, rtol=0)


def test_saving_where_the_running_files_lie_changes_neither(saved, tmp_path, monkeypatch):
    """Somebody in the saved folder: `import cross_encoder` takes the copy there, and save would
    copy it onto itself."""
    directory = shutil.copytree(saved[1], tmp_path / "m")
    before = {name: (directory / name).read_text() for name in ("model.py", "cross_encoder.py")}
    monkeypatch.setattr(model, "__file__", str(directory / "model.py"))
    monkeypatch.setattr(cross_encoder, "__file__", str(directory / "cross_encoder.py"))
    cross_encoder.save(saved[0], tokenizer(), directory)
    assert before == {name: (directory / name).read_text() for name in before}


def test_sentence_transformers_predicts_the_sigmoid_of_the_logits(saved, tmp_path):
    pytest.importorskip("sentence_transformers")
    got = elsewhere(tmp_path, """
from sentence_transformers import CrossEncoder
network = CrossEncoder(sys.argv[2], trust_remote_code=True, device="cpu")
torch.save(network.predict(PAIRS, convert_to_tensor=True), "out.pt")
""", saved[1])
    want = logits(saved[0], tokenizer())[:, 0].sigmoid()
    assert torch.allclose(got, want, atol=1e-5, rtol=0)
