"""Scores how relevant a passage is to a query, by a cross-encoder (§5.2): given, or trained here.

Paper: a cross-encoder validates that a negative's relevance score is lower than the positive's;
which one is not said. Ours: any sequence-classification model with one logit, or one trained here
from an encoder, for where none can be downloaded; and either must rank held-out pairs better than
chance. Nothing here knows what is done with the scores.
"""

import argparse
import math
import shutil
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import memory
import model
from corpora.formats import text_hash
from curation import cross_encoder
from curation.pool import Embedder, Retriever, device
from curation.sources import Report, draw, identity, open_sources
from curation.work import Work
from evaluation import search

STEPS = 300  # Ours: of training
QUERIES = 32  # Ours: of a step, each with its positive and
CANDIDATES = 4  # Ours: so many of what the retriever finds for it
TRIED = 200  # Ours: held-out queries per source that a cross-encoder is tried on


class Example(NamedTuple):
    query: str
    positive: str
    candidates: list[str]  # what a retriever found; one of them may be a false negative


class Reranker:
    """Relevance of a passage to a query, from 0 to 1; in bf16 where that is fast.

    encoder: (input_ids, attention_mask[, token_type_ids]), (B, T) each, -> .logits (B, 1).
    """

    def __init__(self, encoder: torch.nn.Module, tokenizer, max_length: int, micro_tokens: int):
        self.encoder, self.tokenizer = encoder.to(device()), tokenizer
        self.max_length = min(max_length, tokenizer.model_max_length)
        self.micro_tokens = micro_tokens
        # BERT is told which text a token is of, RoBERTa not
        types = getattr(encoder.config, "type_vocab_size", 1)
        self.typed = types > 1 and tokenizer.sep_token is not None
        memory.mixed_precision(encoder, memory.choose_precision("auto", device())[0])

    def logits(self, pairs: list[tuple[str, str]]) -> Iterator[tuple[Tensor, Tensor]]:
        """(which pairs, their logits), pairs of similar length together."""
        if self.typed:  # a text that speaks of [SEP] would be split there
            separator = self.tokenizer.sep_token
            pairs = [(query.replace(separator, " "), passage.replace(separator, " "))
                     for query, passage in pairs]
        batches = data.make_micro_batches(
            self.tokenizer, pairs, self.max_length, self.micro_tokens)
        for index, input_ids, attention_mask in batches:
            inputs = [input_ids, attention_mask]
            if self.typed:
                ends = (input_ids == self.tokenizer.sep_token_id).long()
                # after the first [SEP], which itself still is 0: [CLS] query [SEP] 0, passage 1
                inputs.append((ends.cumsum(1) > ends).long())
            logits = self.encoder(*(x.to(device()) for x in inputs)).logits
            yield index, logits[:, 0].float().cpu()

    @torch.no_grad()
    def __call__(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        """(query, passage) -> (M,)."""
        scores = np.empty(len(pairs), "f4")
        for index, logits in self.logits(pairs):
            scores[index] = logits.sigmoid()
        return scores

    def train(
        self, batches: Iterable[list[Example]], steps: int, lr: float
    ) -> Iterator[float]:
        """Binary cross-entropy of positives (1) and candidates (0), each side weighing a half;
        AdamW, a tenth of the steps to warm up and then linearly down. -> the loss of each step."""
        parameters = list(self.encoder.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, fused=True)
        self.encoder.train()
        for step, batch in enumerate(batches, 1):
            pairs, labels, weights = [], [], []
            for example in batch:
                pairs.append((example.query, example.positive))
                labels.append(1.0)
                weights.append(1.0)
                for text in example.candidates:
                    pairs.append((example.query, text))
                    labels.append(0.0)
                    weights.append(1 / len(example.candidates))
            labels, weights = torch.tensor(labels), torch.tensor(weights) / (2 * len(batch))
            total = 0.0
            for index, logits in self.logits(pairs):
                loss = F.binary_cross_entropy_with_logits(
                    logits, labels[index], weights[index], reduction="sum")
                loss.backward()  # a sum of parts: no factor for their number
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            warm_up, down = 10 * step / steps, (steps + 1 - step) / (0.9 * steps)
            optimizer.param_groups[0]["lr"] = lr * min(warm_up, 1, down)
            optimizer.step()
            optimizer.zero_grad()
            yield total
        self.encoder.eval()


# training one

def train_cross_encoder(
    name: str,
    retrievers: list[Retriever],
    rows: dict[str, np.ndarray],
    steps: int,
    lr: float | None,
    args: argparse.Namespace,
    directory: Path,
) -> None:
    """Trains a cross-encoder from an encoder, on these rows and what the retrievers find for them,
    and saves it. Raises ValueError where there is no row."""
    torch.manual_seed(args.seed)
    found = []  # (retriever, row, indices of what it finds)
    for retriever in retrievers:
        ids = rows[retriever.source.name]
        if len(ids):
            for row, index, cosine in zip(ids, *retriever.nearest(ids, args.candidates)):
                found.append((retriever, row, index[np.isfinite(cosine)]))
    if not found:
        raise ValueError('no source of kind "retrieval" has a row to train a cross-encoder on')
    reranker = Reranker(*cross_encoder.load(name, new_head=True), args.max_length,
                        args.micro_tokens)
    if lr is None:
        lr = 1e-3 if reranker.encoder.config.hidden_size <= 256 else 5e-5
    batches = draw_batches(found, steps, args.seed)
    bar = tqdm(reranker.train(batches, steps, lr), total=steps, unit="step", desc="cross-encoder")
    for loss in bar:
        bar.set_postfix(loss=f"{loss:.3f}")
    cross_encoder.save(reranker.encoder, reranker.tokenizer, directory)


def draw_batches(
    found: list[tuple[Retriever, int, np.ndarray]], steps: int, seed: int
) -> Iterator[list[Example]]:
    """All rows in a random order, then in another; of each some of what was found for it."""
    rng, count = np.random.default_rng(seed), steps * QUERIES
    epochs = math.ceil(count / len(found))
    order = np.concatenate([rng.permutation(len(found)) for _ in range(epochs)])[:count]
    for batch in order.reshape(steps, -1):
        examples = []
        for retriever, row, indices in (found[i] for i in batch):
            query, positive, *_ = retriever.source.read(row)
            drawn = rng.permutation(indices)[:CANDIDATES]
            candidates = [retriever.pool.text(index) for index in drawn]
            examples.append(Example(query, positive, candidates))
        yield examples


# trying one

def held_out_pairs(
    sources: list[data.Source], embed: Embedder, candidates: int, seed: int
) -> tuple[list[tuple[str, str]], int]:
    """For held-out queries, (query, positive) and (query, one of the `candidates` nearest held-out
    targets) in turn, and how often the retriever ranks the two rightly. Raises ValueError where
    they are too few to say anything."""
    pairs, right = [], 0
    for source in sources:
        targets = {text_hash(row.positive): row.positive for row in source.held_out}
        if len(targets) < 2:  # there is nothing to tell the one from
            continue
        number = {key: i for i, key in enumerate(targets)}
        rows, targets = source.held_out[:TRIED], list(targets.values())
        own = np.array([number[text_hash(row.positive)] for row in rows])
        q = embed([row.query for row in rows], source.prompts.query)
        p = embed(targets, source.prompts.document)
        count, each = min(candidates, len(targets) - 1), np.arange(len(rows))
        indices, cosines = search.nearest(q, [p.cpu().numpy()], count, (each, own))
        drawn = np.random.default_rng(seed).integers(count, size=len(rows))
        right += int(((q * p[own]).sum(1).cpu().numpy() > cosines[each, drawn]).sum())
        for row, index in zip(rows, indices[each, drawn]):
            pairs += [(row.query, row.positive), (row.query, targets[index])]
    if len(pairs) < 40:
        raise ValueError(f"{len(pairs) // 2} held-out pairs are too few to try a cross-encoder on; "
                         f'give the sources of kind "retrieval" eval files with 20 or more')
    return pairs, right


def open_reranker(
    name: Path | str,
    pairs: list[tuple[str, str]],
    retriever_right: int,
    report: Report,
    args: argparse.Namespace,
) -> Reranker:
    """A cross-encoder that is better than chance on the held-out pairs; ValueError otherwise."""
    reranker = Reranker(*cross_encoder.load(name), args.max_length, args.micro_tokens)
    scores, count = reranker(pairs).reshape(-1, 2), len(pairs) // 2
    right = int((scores[:, 0] > scores[:, 1]).sum())
    report.line(f"held-out positives against what the retriever finds: the cross-encoder ranks "
                f"{right} of {count} rightly, the retriever {retriever_right}")
    # Chance: a half, with a standard deviation of sqrt(count) / 2.
    if right <= count / 2 + math.sqrt(count):
        raise ValueError(
            f"cross-encoder {name}: ranks {right} of {count} held-out pairs rightly, no better "
            f"than chance; `python -m curation cross-encoder` trains one with more --steps or "
            f"another --lr, for mine's --cross-encoder")
    return reranker


def open_or_train(
    retrievers: list[Retriever],
    rows: dict[str, np.ndarray],
    embed: Embedder,
    work: Work,
    report: Report,
    args: argparse.Namespace,
) -> Reranker:
    """--cross-encoder, or else one trained from --retriever on other rows than these, if there are
    a tenth of what the training takes."""
    sources = [retriever.source for retriever in retrievers]
    pairs, right = held_out_pairs(sources, embed, args.candidates, args.seed)
    if args.cross_encoder:
        return open_reranker(args.cross_encoder, pairs, right, report, args)
    count, shared = STEPS * QUERIES, ""
    others = draw(sources, count, args.seed, apart=rows)
    if sum(map(len, others.values())) < count / 10:
        others = draw(sources, count, args.seed)
        shared = " on rows that it will score: --rows leaves too few others"
    report.line(f"no --cross-encoder: training one from {args.retriever}{shared}")
    trained = work.keep_folder("cross-encoder", partial(
        train_cross_encoder, args.retriever, retrievers, others, STEPS, None, args))
    return open_reranker(trained, pairs, right, report, args)


def make_cross_encoder(args: argparse.Namespace) -> None:
    """Trains a cross-encoder from an encoder, and says how well it ranks held-out pairs."""
    sources, _ = open_sources(args.sources)
    embed = Embedder(args.retriever or args.model, sources, args)
    encoder, _ = model.load(args.model)
    work = Work(args.out, identity(args, sources, embed.encoder, encoder))
    retrieval = [source for source in sources if source.kind == "retrieval"]
    if not retrieval:
        raise ValueError('no source is of kind "retrieval": a cross-encoder is not needed')
    pairs, right = held_out_pairs(retrieval, embed, args.candidates, args.seed)
    retrievers = [Retriever(source, sources, embed, work) for source in retrieval]
    rows = draw(retrieval, args.steps * QUERIES, args.seed)
    trained = work.keep_folder("cross-encoder", partial(
        train_cross_encoder, args.model, retrievers, rows, args.steps, args.lr, args))
    open_reranker(trained, pairs, right, Report(), args)
    work.finish(partial(shutil.copytree, trained, dirs_exist_ok=True))
