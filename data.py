"""Source-wise batches (§5.1): sources with sampling rates, and batches from one source at a time.

    manifest -> load_sources -> Source -> SourceBatches -> Batch -> make_micro_batches -> MicroBatch

Paper: for every new batch one source is drawn at random by its sampling rate, and the batch is
filled from that source alone; the pairs of a source are shuffled beforehand. Ours: all the rest,
as the comments say. Stage I, the pre-training of the backbone, is not here; stage II trains on
pairs (§5.1), stage III on pairs with negatives (§5.2), and both take their batches from here.

A corpus may be larger than memory. Batches are decided on an index of 8-byte hashes, which is on
disk, and a text is read only when its row is due on this rank. Nothing here knows about models,
losses or process groups: `rank` and `world_size` are two integers.
"""

import math
from collections import deque
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import BertWordPieceTokenizer
from torch import Tensor
from transformers import BertTokenizer

from corpora.convert import read_rows
from corpora.formats import Columns, Prompts, Row, text_hash
from corpora.index import count_distinct, is_among, open_index
from corpora.manifest import read_manifest
from plumbing.files import open_cache, sweep

MAX_LENGTH = 128  # Ours: tokens of a text, where neither --max-length nor the model says less
EVAL_TARGETS = 1000  # Ours: held-out targets of a source at most, and at most one in twenty
EPOCHS_TRIED = 10  # Ours: how many rows of an epoch fit together depends on its order
TOKENIZER_ROWS = 500_000  # Ours: more rows than this change a vocabulary of 30,000 very little


# sources

class Source:
    """Pairs with a name and a sampling rate. `hold_out` says what of them is trained on."""

    def __init__(self, name: str, path: Path, rate: float, kind: str, cache: Path,
                 eval: Path | None = None, collection: Path | None = None,
                 prompts: Prompts | None = None, columns: Columns = Columns(), licence: str = ""):
        self.name, self.path, self.rate, self.kind, self.licence = name, path, rate, kind, licence
        self.cache, self.eval, self.collection, self.columns = cache, eval, collection, columns
        self.prompts = prompts  # the manifest's, until corpora/prompts.py has chosen
        self.index, self.negative_hashes, self.lines, self.fingerprint = open_index(
            name, path, columns, cache)
        # what `hold_out` sets
        self.held_out: list[Row] = []  # to evaluate on, one a query
        self.held_out_hashes: set[int] = set()  # of the held-out targets of all sources
        self.train = np.arange(len(self.index))  # ids of the rows to train on

    def read(self, row_id: int) -> Row:
        offset, item, *_, crc = self.index[row_id].tolist()
        return self.lines.read(offset, item, crc)._replace(id=int(row_id))

    def hashes(self, row_id: int) -> tuple[int, int, list[int]]:
        """The query's, the positive's, and those of the negatives."""
        _, _, count, first, query, positive, _ = self.index[row_id].tolist()
        return query, positive, self.negative_hashes[first : first + count].tolist()

    def usable(self, row_ids: np.ndarray) -> int:
        """How many of these rows one batch can hold at most. No text stands twice in it, so no more
        than there are distinct queries, or distinct positives."""
        return min(count_distinct(self.index[side][row_ids]) for side in ("query", "positive"))


def load_sources(manifest: Path | str) -> list[Source]:
    """Opens the sources of a manifest (corpora/manifest.py), and holds out what is evaluated on.
    Indices go into `.cache` beside it. Raises OSError or ValueError, one line each."""
    manifest = Path(manifest)
    cache = manifest.parent / ".cache" / "v3"
    sweep(cache)
    sources = [Source(**entry, cache=cache) for entry in read_manifest(manifest)]
    hold_out(sources)
    return sources


def hold_out(sources: list[Source]) -> None:
    """What one source holds out, none trains on, neither as a target nor as a query, for equation
    (4) is symmetric."""
    targets = [held_out_targets(source) for source in sources]
    hashes = {text_hash(row.positive) for rows in targets for row in rows}
    for source, rows in zip(sources, targets):
        by_query = {text_hash(row.query): row for row in rows}
        source.held_out = list(by_query.values())[:EVAL_TARGETS]
        source.held_out_hashes = hashes
        query, positive = source.index["query"], source.index["positive"]
        source.train = np.flatnonzero(~is_among(query, hashes) & ~is_among(positive, hashes))


def held_out_targets(source: Source) -> list[Row]:
    """A row for each target of the `eval` file, or else for min(1,000, 5 %) of the source's own."""
    if source.eval:
        rows = list(read_rows(source.eval, source.columns))
        if not rows:
            raise ValueError(f"source {source.name}: {source.eval} holds no pair")
    else:  # those of the smallest hashes: at random, and whatever the order of the file
        order = np.lexsort((source.index["query"], source.index["positive"]))
        targets, first = np.unique(source.index["positive"][order], return_index=True)
        count = min(EVAL_TARGETS, len(targets) // 20)
        rows = [source.read(row_id) for row_id in order[first[:count]]]
    return list({text_hash(row.positive): row for row in rows}.values())


# batches

class Batch:
    """Rows of one source, and their texts to embed. Nothing else knows how these are ordered: all
    queries, all positives, all negatives row by row; equal texts are embedded once. Axis letters:
    B rows, N negatives of a row, M distinct texts, D width."""

    def __init__(self, source: str, rows: list[Row], dropped: int, digest: str,
                 prompts: Prompts | None = None):
        self.source = source
        self.rows = rows  # this rank's slice of the global batch
        self.dropped = dropped  # rows that an epoch left over when it ended before this batch
        self.digest = digest  # of the ids of the global batch: equal for equal batches
        query, document = prompts or Prompts()
        texts = [query + row.query for row in rows] + [document + row.positive for row in rows]
        texts += [document + text for row in rows for text in row.negatives]
        self.texts = list(dict.fromkeys(texts))  # M
        position = {text: i for i, text in enumerate(self.texts)}
        self.inverse = torch.tensor([position[text] for text in texts])  # (B + B + B N,)

    def split(self, embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(M, D), of `texts` -> q (B, D), p (B, D), n (B, N, D); n is None without negatives."""
        B, D = len(self.rows), embeddings.shape[1]
        q, p, n = embeddings[self.inverse].split([B, B, len(self.inverse) - 2 * B])
        return q, p, n.view(B, -1, D) if len(n) else None


class SourceBatches(Iterator):
    """Endless iterator of source-wise batches, the same global batches for every number of ranks.
    batch_size: rows of the global batch; rank r gets those from r * batch_size / world_size on.
    negatives: how many a row gives: 0 in stage II, 15 in the paper's stage III, None for all.
    Raises ValueError where a source cannot fill a batch.

    Ours: no text stands twice in a global batch, as query or positive, and none of these among the
    negatives: in (4) and (5) it would be contrasted with its own copy, or with its answer's. A row
    that collides waits for its source's next batch. Every draw has a seed of its own: the source of
    a batch (seed, step), the order of an epoch (seed, source, epoch), a row's negatives (seed,
    source, epoch, row). So the state is a cursor and the ids of the rows that wait, and resuming
    replays nothing."""

    def __init__(self, sources: list[Source], batch_size: int, seed: int, rank: int = 0,
                 world_size: int = 1, negatives: int | None = None):
        if batch_size % world_size:
            raise ValueError(f"--batch-size {batch_size} is not a multiple of the {world_size} "
                             f"ranks; it is the global batch")
        self.sources, self.batch_size = sources, batch_size
        self.seed, self.negatives = seed, negatives
        self.slice = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        rates = [source.rate for source in sources]
        self.probabilities = np.array(rates) / sum(rates)
        self.step = 0
        self.states = {}  # by source: what `state_dict` saves
        self.row_ids = {}  # by source: of what an epoch gives
        self.orders = {}  # by source: the same, shuffled for the epoch it is in
        for source in sources:
            row_ids = with_negatives(source, negatives) if negatives else source.train
            left_out = len(source.train) - len(row_ids)
            if left_out and rank == 0:
                print(f"source {source.name}: {left_out} of {len(source.train)} rows are left out: "
                      f"they have fewer than {negatives} negatives that are not held out")
            usable = source.usable(row_ids)
            if usable < batch_size:
                raise ValueError(f"source {source.name}: {usable} usable pairs (distinct queries "
                                 f"and targets, hold-out aside), but --batch-size {batch_size}; "
                                 f"lower it, or merge the source with another")
            self.row_ids[source.name] = row_ids
            self.states[source.name] = {"epoch": 0, "cursor": 0, "waiting": []}

    def __next__(self) -> Batch:
        source, dropped = self._draw_source(), 0
        self.step += 1
        for _ in range(EPOCHS_TRIED):
            picked = self._fill(source)
            if len(picked) == self.batch_size:
                digest = text_hash(str([row_id for row_id, _ in picked]))
                rows = []
                for row_id, chosen in picked[self.slice]:
                    row = source.read(row_id)
                    rows.append(row._replace(negatives=[row.negatives[j] for j in chosen]))
                return Batch(source.name, rows, dropped, f"{digest:016x}", source.prompts)
            dropped += len(picked) + len(self.states[source.name]["waiting"])
            self._next_epoch(source)
        raise ValueError(f"source {source.name}: a whole epoch gives {len(picked)} rows that fit "
                         f"together (no text twice, none among the negatives), but --batch-size "
                         f"{self.batch_size}; lower it")

    def _draw_source(self) -> Source:
        """Paper: at random, by the sampling rates."""
        rng = np.random.default_rng([self.seed, self.step])
        return self.sources[rng.choice(len(self.sources), p=self.probabilities)]

    def _fill(self, source: Source) -> list[tuple[int, list[int]]]:
        """(row id, which of its negatives) for a batch in which no text stands twice: of the rows
        that wait, then on from the cursor. Fewer than a batch where the epoch has no more."""
        state, order = self.states[source.name], self._order(source)
        waiting, collided = deque(state["waiting"]), []
        picked, texts, negatives = [], set(), set()
        while len(picked) < self.batch_size:
            if waiting:
                row_id = waiting.popleft()
            elif state["cursor"] < len(order):
                row_id = int(order[state["cursor"]])
                state["cursor"] += 1
            else:
                break
            pair = set(source.hashes(row_id)[:2])
            chosen = self._draw_negatives(source, row_id)
            # its query or positive is among its negatives, which leaves too few
            too_few = len(chosen) < (self.negatives or 0)
            if too_few or pair & texts or pair & negatives or not texts.isdisjoint(chosen.values()):
                collided.append(row_id)
                continue
            picked.append((row_id, list(chosen)))
            texts |= pair
            negatives.update(chosen.values())
        state["waiting"] = [*collided, *waiting]
        return picked

    def _order(self, source: Source) -> np.ndarray:
        """Paper: shuffled beforehand. Ours: anew for every epoch."""
        if source.name not in self.orders:
            epoch = self.states[source.name]["epoch"]
            rng = np.random.default_rng([self.seed, text_hash(source.name), epoch])
            self.orders[source.name] = rng.permutation(self.row_ids[source.name])
        return self.orders[source.name]

    def _draw_negatives(self, source: Source, row_id: int) -> dict[int, int]:
        """{which: hash} of the negatives that a row gives in this epoch: no held-out target, and
        neither of its own texts. Fewer than `negatives` where no more are left."""
        if self.negatives == 0:
            return {}
        query, positive, hashes = source.hashes(row_id)
        left = {j: h for j, h in enumerate(hashes)
                if h not in (query, positive) and h not in source.held_out_hashes}
        if self.negatives is None or len(left) <= self.negatives:
            return left
        epoch = self.states[source.name]["epoch"]
        rng = np.random.default_rng([self.seed, text_hash(source.name), epoch, row_id])
        drawn = rng.choice(list(left), self.negatives, replace=False)
        return {j: left[j] for j in sorted(drawn.tolist())}

    def _next_epoch(self, source: Source) -> None:
        """Rows that still wait are dropped."""
        state = self.states[source.name]
        state.update(epoch=state["epoch"] + 1, cursor=0, waiting=[])
        del self.orders[source.name]

    def state_dict(self) -> dict:
        """JSON-able: the step, how far each source is, and what must be the same to go on."""
        corpus = [[s.name, s.rate, len(s.train), s.fingerprint] for s in self.sources]
        prompts = {s.name: list(s.prompts) for s in self.sources if any(s.prompts or ())}
        return {"seed": self.seed, "batch_size": self.batch_size, "negatives": self.negatives,
                "corpus": corpus, "prompts": prompts, "step": self.step,
                "sources": {name: dict(state) for name, state in self.states.items()}}

    def _first_other(self, then: list, now: list) -> tuple:
        """What one source was and is, and of an edited file its path; such a file comes first, for
        it may change what others hold out."""
        others = [found for found in zip_longest(then, now, self.sources) if found[0] != found[1]]
        for was, is_now, source in others:
            if (isinstance(was, list) and is_now and was[:2] == is_now[:2]
                    and was[-1] != is_now[-1]):
                return was, is_now, f"{source.path}: "
        return *others[0][:2], ""

    def load_state_dict(self, state: dict) -> None:
        """Goes on where `state` was taken. Raises ValueError where it was taken of other batches,
        or where a source's place is none that a run can reach."""
        for what in ("seed", "batch_size", "negatives", "corpus", "prompts"):
            then, now, where = state.get(what, {}), self.state_dict()[what], ""
            if what == "corpus" and then != now and isinstance(then, list):
                then, now, where = self._first_other(then, now)
            if then != now:
                raise ValueError(f"{where}the checkpoint was made with another {what}: {then}, now "
                                 f"{now}; put that back, or begin a new run")
        self.step = state["step"]
        self.orders.clear()
        for source in self.sources:
            try:
                saved = self.states[source.name] = dict(state["sources"][source.name])
                passed = self._order(source)[: saved["cursor"]]
                good = (saved["epoch"] >= 0 and len(passed) == saved["cursor"]
                        and np.isin(saved["waiting"], passed).all()
                        and len(set(saved["waiting"])) == len(saved["waiting"]))
            except (LookupError, TypeError, ValueError):
                good = False
            if not good:
                raise ValueError(f"the checkpoint's state.json: source {source.name}: no run "
                                 f"reaches this epoch, cursor and waiting rows; put the file back")


def with_negatives(source: Source, count: int) -> np.ndarray:
    """Ids of the rows to train on of which `count` negatives are not held out. Raises ValueError
    where there is none."""
    row_ids = source.train
    counts = source.index["negatives"][row_ids].astype(int)
    held_out = is_among(source.negative_hashes, source.held_out_hashes)
    before = np.concatenate([[0], held_out.cumsum()])  # how many of the first 0, 1, 2 ... are
    first = source.index["first_negative"][row_ids].astype(int)
    counts -= before[first + counts] - before[first]
    if (most := counts.max(initial=0)) < count:
        raise ValueError(f"source {source.name}: {source.path}: its rows have at most {most} "
                         f"negatives that are not held out, but --negatives {count}; lower it, or "
                         f"mine more")
    return row_ids[counts >= count]


# tokens

def train_tokenizer(sources: list[Source], vocab_size: int) -> BertTokenizer:
    """A lower-case WordPiece tokenizer, trained on the rows that are trained on, once, and kept
    beside the sources: its trainer gives a slightly different vocabulary every time."""
    names = " ".join(f"{source.name} {source.fingerprint}" for source in sources)
    directory = sources[0].cache / f"tokenizer-{vocab_size}-{text_hash(names):016x}"

    def write(part: Path) -> None:
        print(f"training a WordPiece tokenizer of {vocab_size} entries on the sources, once, into "
              f"{directory}", flush=True)
        step = math.ceil(sum(len(source.train) for source in sources) / TOKENIZER_ROWS)
        texts = (text for source in sources for row_id in source.train[::step]
                 for text in source.read(row_id)[:2])
        wordpiece = BertWordPieceTokenizer(lowercase=True)
        wordpiece.train_from_iterator(texts, vocab_size=vocab_size, show_progress=False)
        tokenizer = BertTokenizer(vocab=wordpiece.get_vocab(), model_max_length=8192)
        tokenizer.save_pretrained(part)

    return BertTokenizer.from_pretrained(open_cache(directory, write))


class MicroBatch(NamedTuple):
    index: Tensor  # (b,) which of the step's texts these are
    input_ids: Tensor  # (b, T)
    attention_mask: Tensor  # (b, T)


def make_micro_batches(tokenizer, texts: list, max_length: int, micro_tokens: int,
                       whole: bool = False) -> list[MicroBatch]:
    """A step's texts, or pairs of texts to be read together, in micro-batches of at most
    `micro_tokens` tokens, padding included, or of one longer text. whole: all in one. Raises
    ValueError for a `max_length` beyond the model's."""
    if not 3 <= max_length <= tokenizer.model_max_length:  # [CLS], one token, [SEP]
        raise ValueError(f"--max-length {max_length}: expected 3 to {tokenizer.model_max_length} "
                         f"tokens for this model (what its sentence_bert_config.json says, or else "
                         f"its tokenizer; its positions at most)")
    ids = tokenizer(texts, truncation=True, max_length=max_length,
                    return_attention_mask=False)["input_ids"]
    lengths = [len(x) for x in ids]
    # all tokens in one array: copying each text into a tensor of its own takes half as long as the
    # tokenizer
    rows = torch.from_numpy(np.fromiter(chain.from_iterable(ids), np.int64)).split(lengths)
    micro_batches = []
    for index in split_by_length(lengths, micro_tokens, whole):
        mask = torch.arange(lengths[index[0]]) < torch.tensor([lengths[i] for i in index])[:, None]
        input_ids = torch.full(mask.shape, tokenizer.pad_token_id)
        input_ids[mask] = torch.cat([rows[i] for i in index])
        micro_batches.append(MicroBatch(torch.tensor(index), input_ids, mask.long()))
    return micro_batches


def split_by_length(lengths: list[int], micro_tokens: int, whole: bool) -> list[list[int]]:
    """Which texts go into each micro-batch. Ours: sorted by length, for their order is free, the
    longest first so that memory peaks at once, and split early where over 1/20 of a micro-batch
    would be padding. All in one if that fits and is cheaper, for one pass over P padded tokens
    costs 3 P (backward is twice forward), two passes over T tokens up to 4 T."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if whole or len(lengths) * max(lengths) <= min(micro_tokens, sum(lengths) * 4 / 3):
        return [order]
    chunks, tokens = [order[:1]], lengths[order[0]]
    for i in order[1:]:
        padded = lengths[chunks[-1][0]] * (len(chunks[-1]) + 1)  # tokens, were i to join the last
        if padded > micro_tokens or tokens + lengths[i] < 0.95 * padded:
            chunks.append([])
            tokens = 0
        chunks[-1].append(i)
        tokens += lengths[i]
    return chunks
