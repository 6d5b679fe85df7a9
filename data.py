"""Source-wise batches (§5.1): sources with sampling rates, batches from one source at a time.

    manifest -> load_sources -> [Source] -> SourceBatches -> Batch(source, rows) -> make_micro_batches -> [MicroBatch]

Paper: for every new batch one source is drawn at random by its sampling rate, and the batch is filled from that source
alone; pairs inside a source are shuffled beforehand. Ours: all the rest, as the comments say. Nothing here knows about
models, losses or process groups: `rank` and `world_size` are two integers.

A corpus may be larger than memory. Each file is read once into an index on disk (per row: where it stands, and 8-byte
hashes of its texts). Batches are decided on the hashes, and a text is read only when its row is due on this rank.
"""

import gzip
import json
import shutil
from collections.abc import Iterator
from hashlib import blake2b
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import BertWordPieceTokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BertTokenizer

from corpora.formats import Row, read_lines, read_rows, records, text_hash
from plumbing.files import publish

EVAL_TARGETS = 1000  # Ours: held-out targets per source at most, and at most one in twenty
TOKENIZER_ROWS = 500_000  # Ours: more rows than this change a vocabulary of 30,000 very little
ROW = np.dtype([("offset", "<u8"), ("item", "<u4"), ("negatives", "<u4"), ("first_negative", "<u8"),
                ("query", "<u8"), ("positive", "<u8")])  # a change here, or in `records`, wants another .cache/v1


class Batch:
    """Rows of one source, and their texts to embed. It alone knows how these are ordered: all queries, all positives, all
    negatives row by row; a text that stands several times among them is embedded once. Axis letters: B rows, N negatives of
    a row, M distinct texts, D width."""

    def __init__(self, source: str, rows: list[Row], dropped: int, digest: str):
        self.source = source
        self.rows = rows  # this rank's slice of the global batch
        self.dropped = dropped  # rows left over by the epoch that ended before this batch: they could not fill one
        self.digest = digest  # of the ids of the global batch: equal for equal batches
        texts = [row.query for row in rows] + [row.positive for row in rows]
        texts += [text for row in rows for text in row.negatives]
        number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        self.texts = list(number)  # distinct
        self.inverse = torch.tensor([number[text] for text in texts])

    def split(self, embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(M, D) of `texts` -> q (B, D), p (B, D), n (B, N, D); n is None where the rows have no negatives."""
        B = len(self.rows)
        q, p, n = embeddings[self.inverse].split([B, B, len(self.inverse) - 2 * B])
        return q, p, n.view(B, -1, n.shape[1]) if len(n) else None


# sources

class Source:
    """A file of pairs with a name and a sampling rate. `load_sources` sets `train`, ids of the rows to train on, and
    `held_out`, the rows to evaluate on."""

    def __init__(self, name: str, path: Path, rate: float, kind: str, cache: Path, eval: Path | None = None,
                 collection: Path | None = None):
        self.name, self.path, self.rate, self.kind, self.cache = name, path, rate, kind, cache
        self.eval, self.collection = eval, collection
        if not path.is_file():
            raise FileNotFoundError(f"source {name}: {path}: no such file")
        stat = path.stat()  # a changed file is a new one
        version = blake2b(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode(), digest_size=8).hexdigest()
        done = cache / f"{path.name.split('.')[0]}-{version}"
        if not done.is_dir():
            publish(done, self._index, replace=False)
        self.index, self.negative_hashes = (
            np.memmap(file, dtype, "r") if file.stat().st_size else np.empty(0, dtype)
            for file, dtype in ((done / "rows", ROW), (done / "negatives", np.dtype("<u8"))))
        if not len(self.index):
            raise ValueError(f"source {name}: {path} holds no pair")
        self.file = open(done / "unpacked.jsonl" if path.suffix == ".gz" else path, "rb")
        fingerprint = blake2b(self.index, digest_size=8)
        fingerprint.update(self.negative_hashes)
        self.fingerprint = fingerprint.hexdigest()

    def _index(self, directory: Path) -> None:
        if self.path.suffix == ".gz" or self.path.stat().st_size > 1 << 27:
            print(f"source {self.name}: indexing and unpacking {self.path} once, into {self.cache}", flush=True)
        first = 0
        with open(directory / "rows", "wb") as rows, open(directory / "negatives", "wb") as negatives:
            for offset, line in read_lines(self.path):
                for item, row in enumerate(line):
                    values = offset, item, len(row.negatives), first, text_hash(row.query), text_hash(row.positive)
                    rows.write(np.array(values, ROW).tobytes())
                    negatives.write(np.array([text_hash(text) for text in row.negatives], "<u8").tobytes())
                    first += len(row.negatives)
        if self.path.suffix == ".gz":
            with gzip.open(self.path, "rb") as packed, open(directory / "unpacked.jsonl", "wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)

    def read(self, row: int) -> Row:
        self.file.seek(int(self.index["offset"][row]))
        return records(json.loads(self.file.readline()))[int(self.index["item"][row])]._replace(id=int(row))

    def usable(self, rows: np.ndarray) -> int:
        """How many of these rows an epoch can give at most, when no text stands twice in it."""
        return min(len(np.unique(self.index[side][rows])) for side in ("query", "positive"))

    def line_number(self, row: int) -> int:
        with open(self.file.name, "rb") as file:
            return next(number for number, _ in enumerate(file, 1) if file.tell() > self.index["offset"][row])


def load_sources(manifest: Path | str) -> list[Source]:
    """Opens the sources that a manifest names, and holds out what they are evaluated on.

    manifest: a JSON list of {"name", "path", "rate", "kind", "eval", "collection", "licence"} (rate 1 and kind "retrieval"
    unless said; "similarity" is for §5.2's random negatives; a collection is a file whose targets may become negatives too),
    or sentence-transformers' data_config.json ({"name", "lines", "weight"}). Paths are relative to it. Indices and unpacked
    files go into `.cache` beside it.

    Held out: min(1,000, 5 %) of a source's targets, by hash, or the targets of its `eval` file (of which 1,000 pairs are
    evaluated). What one source holds out, no source trains on, neither as a target nor as a query.
    Raises OSError or ValueError, one line each.
    """
    manifest, sources = Path(manifest), []
    if not manifest.is_file():
        raise FileNotFoundError(f"{manifest}: no such manifest")
    try:
        entries = json.loads(manifest.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{manifest}: not JSON ({error}); a manifest is a JSON list of sources") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{manifest}: expected a list of sources, each an object with a name and a path")
    for number, entry in enumerate(entries, 1):
        defaults = {"name": None, "path": entry.get("name"), "rate": entry.get("weight", 1), "kind": "retrieval", "eval": None,
                    "collection": None}
        name, path, rate, kind, held_out, collection = (entry.get(field, default) for field, default in defaults.items())
        where, known = f"{manifest}, source {number}", [*defaults, "licence", "lines", "weight"]
        for unknown in set(entry) - set(known):
            raise ValueError(f'{where}: unknown field "{unknown}"; known are {", ".join(known)}')
        for field, found, good, expected in [
                ("name", name, isinstance(name, str) and name not in [s.name for s in sources], "a text, each name once"),
                ("path", path, isinstance(path, str), "a text"),
                ("rate", rate, type(rate) in (int, float) and 0 < rate < float("inf"), "a number above 0"),
                ("kind", kind, kind in ("retrieval", "similarity"), '"retrieval" or "similarity"'),
                ("eval", held_out, held_out is None or isinstance(held_out, str), "a text"),
                ("collection", collection, collection is None or isinstance(collection, str), "a text")]:
            if not good:
                raise ValueError(f'{where}: field "{field}": found {found!r}, expected {expected}')
        sources.append(Source(name, manifest.parent / path, rate, kind, manifest.parent / ".cache" / "v1",
                              *(file and manifest.parent / file for file in (held_out, collection))))
    for source in sources:
        order = np.lexsort((source.index["query"], source.index["positive"]))  # by hash: at random, whatever the file's order
        targets, first = np.unique(source.index["positive"][order], return_index=True)
        chosen = order[first[: min(EVAL_TARGETS, len(targets) // 20)]]
        rows = read_rows(source.eval) if source.eval else map(source.read, chosen)
        source.held_out = list({text_hash(row.positive): row for row in rows}.values())
        if source.eval and not source.held_out:
            raise ValueError(f"source {source.name}: {source.eval} holds no pair")
    held_out = {text_hash(row.positive) for source in sources for row in source.held_out}
    for source in sources:
        source.held_out = list({text_hash(row.query): row for row in source.held_out}.values())[:EVAL_TARGETS]
        source.held_out_hashes = held_out
        query, positive = (np.isin(source.index[side], np.array(list(held_out), "<u8")) for side in ("query", "positive"))
        source.train = np.flatnonzero(~(query | positive))
    return sources


# batches

class SourceBatches(Iterator):
    """Endless iterator of source-wise batches, the same global batches for every number of ranks.

    batch_size: rows of the global batch; rank r gets rows r * batch_size / world_size and on. negatives: how many negatives
    a row gives: 0 in stage II, 15 in the paper's stage III, None for whatever it has.

    Ours: no text stands twice in a global batch, as query or positive, and none of these among the negatives: in equations
    (4) and (5) it would be contrasted with its own copy, or with its answer's. A row that collides waits for its source's
    next batch. Every draw has a seed of its own: the source of a batch (seed, step), the order of an epoch (seed, source,
    epoch), a row's negatives (seed, source, epoch, row). So the state is a cursor and the ids of the rows that wait, and
    resuming replays nothing.
    """

    def __init__(self, sources: list[Source], batch_size: int, seed: int, rank: int = 0, world_size: int = 1,
                 negatives: int | None = None):
        if batch_size % world_size:
            raise ValueError(f"--batch-size {batch_size} is not a multiple of the {world_size} ranks; it is the global batch")
        self.sources, self.batch_size, self.seed, self.negatives = sources, batch_size, seed, negatives
        self.own = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.rates = np.array([source.rate for source in sources]) / sum(source.rate for source in sources)
        self.step, self.states, self.orders, self.rows = 0, {}, {}, {}
        for source in sources:
            rows = source.train
            if negatives:
                counts = source.index["negatives"][rows].astype(int)
                if counts.min(initial=negatives) < negatives:
                    raise ValueError(f"{source.path}, line {source.line_number(rows[counts.argmin()])}: {counts.min()} "
                                     f"negatives, but --negatives {negatives}; lower it, or mine more")
                barred = np.isin(source.negative_hashes, np.array(list(source.held_out_hashes), "<u8"))
                before, first = np.concatenate([[0], barred.cumsum()]), source.index["first_negative"][rows].astype(int)
                rows = rows[counts - (before[first + counts] - before[first]) >= negatives]
                if rank == 0 and len(rows) < len(source.train):
                    print(f"source {source.name}: {len(source.train) - len(rows)} of {len(source.train)} rows are left out: "
                          f"fewer than {negatives} of their negatives are not held out")
            if source.usable(rows) < batch_size:
                raise ValueError(f"source {source.name}: {source.usable(rows)} usable pairs (distinct queries and targets, "
                                 f"hold-out aside), but --batch-size {batch_size}; lower it, or merge the source with another")
            self.states[source.name], self.rows[source.name] = {"epoch": 0, "cursor": 0, "waiting": []}, rows

    def __next__(self) -> Batch:
        source = self.sources[np.random.default_rng([self.seed, self.step]).choice(len(self.sources), p=self.rates)]
        self.step += 1
        state, dropped = self.states[source.name], 0
        for _ in range(10):  # how many rows of an epoch fit together depends on its order
            picked = self._fill(source, state)
            if len(picked) == self.batch_size:
                break
            dropped += len(picked) + len(state["waiting"])
            state.update(epoch=state["epoch"] + 1, cursor=0, waiting=[])
        else:
            raise ValueError(f"source {source.name}: a whole epoch gives {len(picked)} rows that fit together (no text twice, "
                             f"none among the negatives), but --batch-size {self.batch_size}; lower it")
        rows = [(source.read(row), chosen) for row, chosen in picked[self.own]]
        rows = [row._replace(negatives=[row.negatives[j] for j in chosen]) for row, chosen in rows]
        return Batch(source.name, rows, dropped, f"{text_hash(str([row for row, _ in picked])):016x}")

    def _fill(self, source: Source, state: dict) -> list[tuple[int, list[int]]]:
        """Takes (row, which of its negatives) for a batch: those that wait first, then on from the cursor."""
        if self.orders.get(source.name, (None,))[0] != state["epoch"]:
            rng = np.random.default_rng([self.seed, text_hash(source.name), state["epoch"]])
            self.orders[source.name] = state["epoch"], rng.permutation(self.rows[source.name])
        order = self.orders[source.name][1]
        picked, waiting, texts, negatives = [], [], set(), set()
        block = np.array(state["waiting"], int)
        while True:
            for row, *pair in zip(block.tolist(), *(source.index[side][block].tolist() for side in ("query", "positive"))):
                if len(picked) == self.batch_size or not texts.isdisjoint(pair) or not negatives.isdisjoint(pair):
                    waiting.append(row)
                    continue
                chosen, keys = self._negatives(source, row, pair, state["epoch"])
                if not keys.isdisjoint(texts) or len(chosen) < (self.negatives or 0):  # too few: its own texts are among them
                    waiting.append(row)
                    continue
                picked.append((row, chosen))
                texts.update(pair)
                negatives |= keys
            block = order[state["cursor"] : state["cursor"] + self.batch_size - len(picked)]
            if not len(block):
                state["waiting"] = waiting
                return picked
            state["cursor"] += len(block)

    def _negatives(self, source: Source, row: int, pair: list[int], epoch: int) -> tuple[list[int], set[int]]:
        """Which of its negatives a row gives in this epoch, and their keys."""
        if self.negatives == 0:
            return [], set()
        first, count = int(source.index["first_negative"][row]), int(source.index["negatives"][row])
        keys = source.negative_hashes[first : first + count].tolist()
        chosen = [j for j, k in enumerate(keys) if k not in pair and k not in source.held_out_hashes]
        if self.negatives is not None and len(chosen) > self.negatives:
            rng = np.random.default_rng([self.seed, text_hash(source.name), epoch, row])
            chosen = sorted(rng.choice(chosen, self.negatives, replace=False).tolist())
        return chosen, {keys[j] for j in chosen}

    def state_dict(self) -> dict:
        """JSON-able: the step and, per source, epoch, cursor and the rows that wait; and what must be the same to go on."""
        corpus = [[source.name, source.rate, len(source.train), source.fingerprint] for source in self.sources]
        return {"seed": self.seed, "batch_size": self.batch_size, "negatives": self.negatives, "corpus": corpus,
                "step": self.step, "sources": {name: dict(state) for name, state in self.states.items()}}

    def load_state_dict(self, state: dict) -> None:
        """Goes on where `state` was taken. Raises ValueError when it was taken of other batches."""
        for what, now in self.state_dict().items():
            if what not in ("step", "sources") and state.get(what) != now:
                then = state.get(what)
                if what == "corpus":  # [name, rate, rows, fingerprint] per source; name the first that differs
                    then, now = next(pair for pair in zip_longest(then or [], now) if pair[0] != pair[1])
                raise ValueError(f"the checkpoint was made with another {what}: {then}, now {now}")
        self.step, self.states = state["step"], {name: dict(saved) for name, saved in state["sources"].items()}


# tokens

def train_tokenizer(sources: list[Source], vocab_size: int) -> BertTokenizer:
    """A lower-case WordPiece tokenizer for these sources, trained on rows that are trained on, once, and kept beside them
    (its trainer gives a slightly different vocabulary every time)."""
    names = " ".join(f"{source.name} {source.fingerprint}" for source in sources)
    directory = sources[0].cache / f"tokenizer-{vocab_size}-{text_hash(names):016x}"
    if not directory.is_dir():
        print(f"training a WordPiece tokenizer of {vocab_size} entries on the sources, once, into {directory}", flush=True)
        step = -(-sum(len(source.train) for source in sources) // TOKENIZER_ROWS)
        texts = (text for source in sources for i in source.train[::step] for text in source.read(i)[:2])
        wordpiece = BertWordPieceTokenizer(lowercase=True)
        wordpiece.train_from_iterator(texts, vocab_size=vocab_size, show_progress=False)
        tokenizer = BertTokenizer(vocab=wordpiece.get_vocab(), model_max_length=8192)
        publish(directory, tokenizer.save_pretrained, replace=False)
    return BertTokenizer.from_pretrained(directory)


class MicroBatch(NamedTuple):
    index: Tensor  # (b,) which of the step's texts these are
    input_ids: Tensor  # (b, T)
    attention_mask: Tensor  # (b, T)


def make_micro_batches(tokenizer, texts: list[str], max_length: int, micro_tokens: int, whole: bool = False) -> list[MicroBatch]:
    """Cuts a step's texts into micro-batches of at most `micro_tokens` tokens, padding included. whole: into one, whatever
    its size.

    Ours: sorted by length (their order is free), the longest first so that memory peaks at once, and cut early where
    more than 1/20 of a micro-batch would be padding. All in one if that fits and is the cheaper: one pass over P padded tokens
    costs 3 P (backward is twice forward), two passes over T tokens 4 T where no graph is kept. A single text may exceed the
    bound.
    """
    if not 3 <= max_length <= tokenizer.model_max_length:  # [CLS], one token, [SEP]
        raise ValueError(f"--max-length {max_length}: expected 3 to {tokenizer.model_max_length} tokens for this model")
    ids = tokenizer(texts, truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]
    lengths = [len(x) for x in ids]
    whole = whole or len(ids) * max(lengths) <= min(micro_tokens, sum(lengths) * 4 / 3)
    chunks, width, tokens = [], 0, 0
    for i in sorted(range(len(ids)), key=lambda i: -lengths[i]):
        size = width * (len(chunks[-1]) + 1) if chunks else 0
        if not chunks or not whole and (size > micro_tokens or tokens + lengths[i] < 0.95 * size):
            chunks.append([])
            width, tokens = lengths[i], 0
        chunks[-1].append(i)
        tokens += lengths[i]
    return [MicroBatch(torch.tensor(chunk),
                       pad_sequence([torch.tensor(ids[i]) for i in chunk], True, tokenizer.pad_token_id),
                       pad_sequence([torch.ones(lengths[i], dtype=torch.long) for i in chunk], True)) for chunk in chunks]
