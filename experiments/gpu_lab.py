"""What the cells of experiments/gpu.py share: texts, models with random weights, sizes.

Texts are pairs of one source, cut to a file that travels: `cut`. Where more distinct pairs are
asked for than it holds, further ones are the first half of one pair's texts, by words, and the
second half of another's: as long, and as good to measure with, not to learn from. A long text is
many texts one after the other, cut off.
"""

import argparse
import gzip
import itertools
import json
import math
import random
from functools import cached_property, partial
from pathlib import Path

import torch
import transformers

import data
import model
import train
from corpora import installed_docs
from corpora.convert import read_rows
from corpora.formats import text_hash
from corpora.manifest import read_manifest
from plumbing.files import publish
from plumbing.ranks import Ranks

SOURCE, CHARACTERS = "summary_body", 2500  # of a text at most; 512 tokens are about 2,000
# all-MiniLM-L6-v2's shape
MINILM = dict(num_hidden_layers=6, hidden_size=384, num_attention_heads=12, intermediate_size=1536)
# in a dry run
TOY = dict(num_hidden_layers=2, hidden_size=64, num_attention_heads=2, intermediate_size=96)
TOY_ROWS, TOY_VOCABULARY = 600, 1000


def cut(path: Path) -> None:
    """Writes the source's pairs, from the embedded default corpus, to a .jsonl.gz file."""
    sources = read_manifest(Path(installed_docs.build()))
    rows = read_rows(next(source["path"] for source in sources if source["name"] == SOURCE))
    with gzip.open(path, "wt") as file:
        for row in rows:
            file.write(json.dumps([row.query[:CHARACTERS], row.positive[:CHARACTERS]]) + "\n")


class Lab:
    """texts: a file of `cut`. folder: for manifest, tokenizer, models and runs. dry: toy sizes."""

    def __init__(self, texts: Path, folder: Path, dry: bool):
        self.dry, self.folder = dry, folder
        self.device = Ranks(alone=True).device
        self.cuda = self.device.type == "cuda"
        self.results = {}  # of this part's cells so far, by name
        folder.mkdir(parents=True, exist_ok=True)
        self.read = list(read_rows(texts))
        if dry:
            self.read = [data.Row(row.query[:300], row.positive[:300], [])
                         for row in self.read[:TOY_ROWS]]
            texts = folder / "toy.jsonl"
            lines = [json.dumps([row.query, row.positive]) + "\n" for row in self.read]
            texts.write_text("".join(lines))
            model.LONG = self.tokens(model.LONG)
        self.manifest = folder / "manifest.json"
        self.manifest.write_text(json.dumps([{"name": SOURCE, "path": str(texts.resolve())}]))

    # sizes

    def size(self, count: int) -> int:
        """Rows, or a number of the like."""
        return max(8, count // 256) if self.dry else count

    def tokens(self, count: int) -> int:
        return max(8, count // 16) if self.dry else count

    # texts

    @cached_property
    def halves(self) -> list[list[tuple[str, str]]]:
        """Of the queries, and of the positives."""
        def split(text: str) -> tuple[str, str]:
            words = text.split()
            middle = (len(words) + 1) // 2
            return " ".join(words[:middle]), " ".join(words[middle:])
        return [[split(row.query) for row in self.read], [split(row.positive) for row in self.read]]

    def rows(self, count: int) -> list[data.Row]:
        """Distinct queries and distinct positives, the same for the same count."""
        found, texts, n = [], set(), len(self.read)
        for k in range(50 * n):
            i, j = k % n, (k + k // n) % n  # i = j in the first round: the pairs as they are
            query, positive = (f"{half[i][0]} {half[j][1]}".strip() for half in self.halves)
            if texts.isdisjoint((query, positive)):
                texts |= {query, positive}
                found.append(data.Row(query, positive, []))
                if len(found) == count:
                    return found
        raise ValueError(f"{n} pairs make only {len(found)} distinct ones, not {count}")

    def long_rows(self, count: int, tokens: int, least: float = 1.0) -> list[data.Row]:
        """Rows whose positives are so many words, and so at least as many tokens; or by chance
        fewer, down to the share `least`."""
        draw, texts = random.Random(0), itertools.cycle(row.positive for row in self.read)
        found = []
        for row in self.rows(count):
            words, length = [], draw.randint(math.ceil(least * tokens), tokens)
            while len(words) < length:
                words += next(texts).split()
            found.append(row._replace(positive=" ".join(words[:length])))
        return found

    # models

    @cached_property
    def sources(self) -> list[data.Source]:
        return data.load_sources(self.manifest)

    @cached_property
    def tokenizer(self):
        return data.train_tokenizer(self.sources, TOY_VOCABULARY if self.dry else train.VOCABULARY)

    def create(self, name: str, **fields) -> model.PooledEncoder:
        """minilm: a BERT of that shape; or one of model.SIZES. Random weights, the same each
        time; fields: of its config."""
        torch.manual_seed(0)
        if name == "minilm":
            config = transformers.BertConfig(**MINILM | (TOY if self.dry else {}) | fields,
                                             vocab_size=len(self.tokenizer))
            return model.PooledEncoder(transformers.BertModel(config, add_pooling_layer=False))
        sizes = model.SIZES[name] | (TOY if self.dry else {}) | fields
        return model.PooledEncoder(model.JinaBertModel(model.JinaBertConfig(**sizes)))

    def classifier(self) -> transformers.PreTrainedModel:
        """A cross-encoder of MiniLM's shape."""
        config = transformers.BertConfig(**MINILM | (TOY if self.dry else {}), num_labels=1,
                                         vocab_size=len(self.tokenizer))
        return transformers.BertForSequenceClassification(config)

    def directory(self, name: str) -> Path:
        """Where `create`'s model is saved, to be opened by either side."""
        path = self.folder / name
        if not path.is_dir():
            publish(path, partial(model.save, self.create(name), self.tokenizer), replace=False)
        return path

    def args(self, *flags, **fields) -> argparse.Namespace:
        """train.py's."""
        flags = ["--sources", self.manifest, *flags]
        args, _ = train.parse_arguments([str(flag) for flag in flags], Ranks(alone=True))
        return argparse.Namespace(**vars(args) | fields)


def folder_of(texts: Path, dry: bool, temporary: Path) -> Path:
    """The same for the same file, so that a second call need not train the tokenizer again."""
    stat = texts.stat()
    name = text_hash(f"{texts.resolve()} {stat.st_size} {stat.st_mtime_ns} {dry}")
    return temporary / f"experiments-gpu-{name:016x}"
