"""What the tests share: a toy encoder, a toy run, and processes.

Functions are imported from here (`from tests.conftest import FLAGS`); pytest finds fixtures itself.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

import model
from experiments import crashes

torch.set_num_threads(1)  # the toys are too small for more, and a machine may be busy
ROOT = Path(__file__).parents[1]

# of `python train.py` in `folder`
FLAGS = ["--sources", "sources.json", "--model", "toy", "--batch-size", "16", "--micro-tokens",
         "128", "--precision", "fp32", "--lr", "1e-3", "--save-every", "2"]

# as pytest sets them: train.py sets its own
HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}


@pytest.fixture(autouse=True)
def signal_handlers():
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


# encoders

def small_encoder(dropout=0.0, kind="jina"):
    """JinaBERT or BERT: 50 words, width 32, 3 layers, 2 heads, feed-forward 48."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
                 intermediate_size=48, hidden_dropout_prob=dropout)
    if kind == "jina":
        return model.PooledEncoder(model.JinaBertModel(model.JinaBertConfig(**sizes))).train()
    config = transformers.BertConfig(**sizes, attention_probs_dropout_prob=dropout)
    return model.PooledEncoder(transformers.BertModel(config, add_pooling_layer=False)).train()


COMPASS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "north", "east", "south", "west"]


@pytest.fixture
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(COMPASS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]")


class Compass(nn.Module):
    """A text's vector is the sum of its words' directions: north is (0, 1), east (1, 0), ...; the
    rest are (0, 0)."""

    def __init__(self):
        super().__init__()
        directions = torch.tensor([[0, 0]] * 4 + [[0, 1], [1, 0], [0, -1], [-1, 0]]).float()
        self.table, self.dropout = nn.Embedding.from_pretrained(directions), nn.Dropout(0.9)
        # what `model.load` gives every encoder
        self.pooling, self.head, self.notes = "mean", [], []
        self.settings, self.prompts = None, {}

    def forward(self, input_ids, attention_mask):
        return self.dropout((self.table(input_ids) * attention_mask[:, :, None]).sum(1))


@pytest.fixture
def compass(monkeypatch, tokenizer):
    """`MODEL` is a Compass, whose figures are known; nothing saved would open as one."""
    monkeypatch.setattr(model, "load", lambda name: (Compass(), tokenizer))


# a run

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a manifest of two sources of 60 rows, each with 3 negatives, and
    `toy`, a JinaBERT with dropout 0.1."""
    monkeypatch.chdir(tmp_path)
    crashes.make_toy(tmp_path)
    for name in ("left", "right"):
        rows = [[crashes.toy_text(name, i, m) for m in range(1, 6)] for i in range(60)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


# processes

def python(*arguments):
    """`python ...` in the current folder, on one thread, where our modules can be imported."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *map(str, arguments)], env=environment,
                          capture_output=True, text=True, timeout=600)


def torchrun(*script):
    """A script on 2 processes."""
    return python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, *script)


def without_rights() -> list[str]:
    """What a command begins with so that permissions hold for it, even if root runs it."""
    if os.geteuid():
        return []
    if not shutil.which("setpriv"):
        pytest.skip("root is refused nothing")
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
