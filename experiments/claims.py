"""What §5 claims, seen at a scale that two CPU cores reach: an arm of training for each side of a
claim, over seeds, and whether the two can be told apart.

    python -m experiments.claims [--only CLAIM ...] [--seeds N] [--figure FILE.svg]

The base is `tiny` from random weights on the default corpus: 160 steps of 256 pairs, 32 tokens.
An arm differs from it in what its claim is about (one of other batches also in the rate that
train.py takes for them), and has a process of its own, which calls train.main: with a flag, or
where none reaches, with a function of train's replaced by one of this file. Seeds, tokenizer and
hold-out are the same in all. What is in --out is not run again; without anything to run (--seeds 0)
the table and the figure are made of what is there.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import losses
import memory
import model
import train
from corpora import installed_docs, wheels
from corpora.formats import text_hash
from corpora.index import is_among
from curation import __main__ as curation
from curation import mine
from curation.sources import draw
from evaluation import metrics
from evaluation.embed import embed
from experiments.curation import count_swapped, lines, reordered, rewrite, swap
from experiments.verdicts import Claim, Room, table
from experiments.verdicts import draw as draw_figure
from plumbing.files import publish, write_whole
from plumbing.plan import memory_free, memory_held
from plumbing.ranks import Ranks

BATCH, LENGTH = 256, 32  # rows and tokens of the base
ROWS = {"filter": 60_000, "filter swapped": 120_000, "mine": 8000}  # curation's --rows
DOCSTRINGS = "summary_body", "name_summary"  # sources whose targets are docstrings
LABELLED = 20  # held-out docstrings of a package at least, for it to be a label
NO_RATE = 1e-9  # of a source that is held out but never drawn
GUESS = 300  # seconds of an arm, before one is measured


# what is replaced in train

def from_queries(q: Tensor, p: Tensor, n: None, tau: float, ranks: Ranks) -> tuple[Tensor, float]:
    """Equation (3) alone."""
    return losses.info_nce_tiled(q, [p], tau), metrics.in_batch_accuracy(q, p)


def from_positives(q: Tensor, p: Tensor, n: None, tau: float, ranks: Ranks
                   ) -> tuple[Tensor, float]:
    """The other half of equation (4)."""
    return losses.info_nce_tiled(p, [q], tau), metrics.in_batch_accuracy(q, p)


def own_negatives(q: Tensor, p: Tensor, n: Tensor, tau: float, ranks: Ranks
                  ) -> tuple[Tensor, float]:
    """Equation (5), but a query sees its own negatives only, not those of the other rows."""
    hard = (losses.unit(q)[:, None] * losses.unit(n)).sum(2) / tau  # (B, N)
    logits = torch.cat([losses.unit(q) @ losses.unit(p).T / tau, hard], 1)
    loss = F.cross_entropy(logits, torch.arange(len(q))) + losses.info_nce_tiled(p, [q], tau)
    return loss, metrics.in_batch_accuracy(q, p)


class MixedBatches(data.SourceBatches):
    """The rows of the next `ahead` source-wise batches, shuffled over as many of all sources. As
    there, a row goes into a batch that has neither of its texts, while there is one."""

    ahead, mixed = 1, []

    def __next__(self) -> data.Batch:
        if not self.mixed:
            rows = []
            for _ in range(self.ahead):
                batch = super().__next__()
                rows += batch.rows
            self.mixed = self._mix(rows, len(batch.rows))
        return self.mixed.pop(0)

    def _mix(self, rows: list[data.Row], size: int) -> list[data.Batch]:
        batches = [[] for _ in range(self.ahead)]
        texts = [set() for _ in batches]
        for i in np.random.default_rng([self.seed, self.step]).permutation(len(rows)):
            pair = {text_hash(rows[i].query), text_hash(rows[i].positive)}
            room = [b for b in range(self.ahead) if len(batches[b]) < size]
            apart = [b for b in room if texts[b].isdisjoint(pair)]
            b = min(apart or room, key=lambda b: len(batches[b]))
            batches[b].append(rows[i])
            texts[b] |= pair
        return [data.Batch("mixed", batch, 0, f"{text_hash(str(batch)):016x}")
                for batch in batches]


class RepeatingBatches(data.SourceBatches):
    """Rows as they come, for stage II: a text may stand twice in a batch."""

    def _fill(self, source: data.Source) -> list[tuple[int, list[int]]]:
        state = self.states[source.name]
        ids = self._order(source)[state["cursor"] : state["cursor"] + self.batch_size]
        state["cursor"] += len(ids)
        return [(int(row_id), []) for row_id in ids]


def create_cls(size: str) -> model.PooledEncoder:
    """model.create, with the first token's embedding instead of the mean."""
    return model.PooledEncoder(model.JinaBertModel(model.JinaBertConfig(**model.SIZES[size])),
                               "cls")


# what an arm is trained on: each is made once, under --runs, and gives its manifest

build_docs = cache(installed_docs.build)  # to see what is installed takes seconds


def docs(args: argparse.Namespace) -> Path:
    return build_docs()


def symptoms(args: argparse.Namespace) -> Path:
    """The Human Phenotype Ontology: a synonym's term (kind "similarity") and its definition."""
    return wheels.build(names=["hpo"])


def remake(manifest: Path, folder: Path, change: Callable[[dict], dict | None]) -> Path:
    """A manifest of the same files; change(an entry) gives what it becomes, or nothing."""
    def write(part: Path) -> None:
        entries = json.loads(manifest.read_text())
        for entry in entries:
            for field in {"path", "eval", "collection"} & set(entry):
                entry[field] = str((manifest.parent / entry[field]).resolve())
        changed = [entry for entry in map(change, entries) if entry]
        (part / "manifest.json").write_text(json.dumps(changed))

    if not folder.is_dir():
        publish(folder, write)
    return folder / "manifest.json"


def replant(manifest: Path, folder: Path, change: Callable) -> Path:
    """A manifest of rows that change(rows of a source, seed) has rewritten, with its hold-out."""
    def write(part: Path) -> None:
        sources = data.load_sources(manifest)
        rewrite(sources, {source.name: source.train for source in sources}, part / "rows", change)

    if not folder.is_dir():
        publish(folder, write)
    return folder / "rows" / "manifest.json"


def curate(folder: Path, *command: object) -> Path:
    if not folder.is_dir():
        curation.main([*map(str, command), "--out", str(folder), "--max-length", str(LENGTH)])
    return folder / "manifest.json"


def with_rates(rate: Callable[[dict], float], name: str, args: argparse.Namespace) -> Path:
    return remake(docs(args), args.runs / name, lambda entry: entry | {"rate": rate(entry)})


def without_titles(args: argparse.Namespace) -> Path:
    return with_rates(lambda entry: NO_RATE if entry["name"] == "summary_body" else entry["rate"],
                      "without-titles", args)


def equal_rates(args: argparse.Namespace) -> Path:
    return with_rates(lambda entry: 1.0, "equal-rates", args)


def swapped(args: argparse.Namespace) -> Path:
    return replant(docs(args), args.runs / "swapped", partial(swap, share=0.2))


def filtered(args: argparse.Namespace) -> Path:
    """By the model that the same wrong pairs have trained."""
    return curate(args.runs / "filtered", "filter", "--sources", swapped(args),
                  "--model", trained("swapped", 0, args), "--rows", ROWS["filter swapped"],
                  "--pool", 20_000, "--top-k", 20, "--batch-size", BATCH)


def kept(args: argparse.Namespace) -> Path:
    """As the README goes from raw pairs to stage III."""
    return curate(args.runs / "kept", "filter", "--model", trained("base", 0, args),
                  "--rows", ROWS["filter"], "--pool", 20_000, "--top-k", 20, "--batch-size", 256)


def mine_from(manifest: Path, folder: Path, retriever: Path, *flags: object) -> Path:
    return curate(folder, "mine", "--sources", manifest, "--retriever", retriever, "--rows",
                  ROWS["mine"], "--candidates", 20, "--margin", 0.2, *flags)


def mined(args: argparse.Namespace) -> Path:
    return mine_from(kept(args), args.runs / "mined", trained("base", 0, args))


def mined_by_minilm(args: argparse.Namespace) -> Path:
    """all-MiniLM-L6-v2 finds the candidates, and the cross-encoder is trained from it."""
    return mine_from(kept(args), args.runs / "mined-by-minilm", wheels.build_model())


def plant(rows: list[data.Row], seed: int) -> list[dict]:
    return [{"query": row.query, "positive": row.positive, "negatives": [reordered(row.positive)]}
            for row in rows]


def planted(how: str, args: argparse.Namespace) -> Path:
    """Rows mined among targets and, of each row, one false negative: its positive with the
    sentences in another order, for the default corpus has no near copies. how: random, unconfirmed
    or confirmed."""
    manifest = replant(kept(args), args.runs / "planted", plant)
    given = "--cross-encoder", mined(args).parent / "cross-encoder"
    if how == "random":
        manifest = remake(manifest, args.runs / "planted-similarity",
                          lambda entry: entry | {"kind": "similarity"})
    if how == "unconfirmed":  # in this process, whose only arm this is
        mine.score, mine.confirm = no_scores, confirm_all
    return mine_from(manifest, args.runs / f"planted-{how}", trained("base", 0, args), *given)


def no_scores(reranker, retriever, ids: np.ndarray, indices: np.ndarray, cosines: np.ndarray
              ) -> np.ndarray:
    return np.zeros((len(ids), 1 + indices.shape[1]), "f4")


def confirm_all(positive: float, scores: np.ndarray, margin: float) -> np.ndarray:
    return np.arange(len(scores))


def one_source(name: str, kind: str, args: argparse.Namespace) -> Path:
    """A source of `symptoms` alone, as one of this kind."""
    return remake(symptoms(args), args.runs / f"{name}-{kind}",
                  lambda entry: entry | {"kind": kind} if entry["name"] == name else None)


def mined_as(name: str, kind: str, args: argparse.Namespace) -> Path:
    return mine_from(one_source(name, kind, args), args.runs / f"{name}-{kind}-mined",
                     trained("symptoms", 0, args))


# what is wrong in it, counted

def swapped_share(manifest: Path) -> float:
    counts = [count_swapped(path) for path in manifest.parent.glob("*.jsonl")]
    wrong, right = map(sum, zip(*counts))
    return wrong / (wrong + right)


def false_negatives(manifest: Path) -> float:
    """Of the rows, how many have the one that was planted."""
    return statistics.mean(reordered(row["positive"]) in row["negatives"]
                           for path in manifest.parent.glob("*.jsonl") for row in lines(path))


# arms and claims

class Arm(NamedTuple):
    """flags: of train.py. replace: [(object, name, what takes its place)]. steps: as a share of
    --steps. start: the arm whose model it goes on from. corpus: that it is scored on. among: "some"
    other targets, "many" (--distractors), or "both". back: also of search for queries. wrong: the
    share of its rows with something wrong in it."""

    flags: str = ""
    replace: list[tuple] = []
    sources: Callable = docs
    batch: int = BATCH
    steps: float = 1
    start: str = ""
    corpus: Callable = docs
    among: str = "some"
    back: bool = False
    wrong: Callable | None = None


def stage_3(sources: Callable, start: str = "base", lr: float = 1e-3, steps: float = 1 / 4,
            **fields) -> Arm:
    return Arm(f"--stage 3 --lr {lr}", sources=sources, steps=steps, start=start, among="many",
               **fields)


def stage_2(batch: int, start: str = "base", lr: float = 1e-3, steps: float = 1 / 4) -> Arm:
    """More of it, from an arm's model."""
    return Arm(f"--lr {lr}", sources=kept, batch=batch, steps=steps, start=start, among="many")


def ways_on(prefix: str, **how) -> dict[str, Arm]:
    """From an arm's model; 256 rows of stage III have as many texts as 2,176 pairs."""
    return {f"{prefix}more-steps": stage_2(256, **how), f"{prefix}more-texts": stage_2(2176, **how),
            f"{prefix}stage-3": stage_3(mined, **how)}


TERMS, DEFINITIONS = "hpo_synonym_term", "hpo_synonym_definition"
ARMS = {
    "base": Arm(among="both", back=True),
    **{f"tau-{tau}": Arm(f"--tau {tau}") for tau in (0.01, 0.02, 0.1, 0.2)},
    "from-queries": Arm(replace=[(train, "step_loss", from_queries)], back=True),
    "from-positives": Arm(replace=[(train, "step_loss", from_positives)], back=True),
    "mixed": Arm(replace=[(data, "SourceBatches", MixedBatches)]),
    **{f"batch-{rows}": Arm(batch=rows, steps=BATCH / rows) for rows in (64, 1024, 4096)},
    **{f"steps-{rows}": Arm(batch=rows) for rows in (64, 1024)},
    "without-titles": Arm(sources=without_titles),
    "swapped": Arm(sources=swapped, among="many", wrong=swapped_share),
    "filtered": Arm(sources=filtered, among="many", wrong=swapped_share),
    **ways_on(""),
    **ways_on("gentle-", lr=3e-4, steps=1 / 8),
    **ways_on("longer-", steps=1 / 2),
    **ways_on("long-", start="long"),
    "stage-3-minilm": stage_3(mined_by_minilm),
    "stage-3-own": stage_3(mined, replace=[(train, "step_loss", own_negatives)]),
    "long": Arm(steps=4, among="many"),
    "long-tau-0.02": Arm("--tau 0.02", steps=4, among="many"),
    "long-mixed": Arm(replace=[(data, "SourceBatches", MixedBatches)], steps=4, among="many"),
    **{f"planted-{how}": stage_3(partial(planted, how), wrong=false_negatives)
       for how in ("random", "unconfirmed", "confirmed")},
    "symptoms": Arm(sources=symptoms, corpus=symptoms, among="many"),
    **{f"{name}-{kind}": stage_3(partial(mined_as, name, kind), "symptoms",
                                 corpus=partial(one_source, name, kind))
       for name in (TERMS, DEFINITIONS) for kind in ("similarity", "retrieval")},
    "repeated": Arm(replace=[(data, "SourceBatches", RepeatingBatches)], sources=symptoms,
                    corpus=symptoms, among="many"),
    "equal-rates": Arm(sources=equal_rates),
    "cls": Arm(replace=[(model, "create", create_cls)]),
}
STARTS = {arm.start for arm in ARMS.values()} | {"swapped"}  # their models are kept

NDCG = ("ndcg@10", "mean"), "nDCG@10 among held-out and 30,000 other targets"
BACK = ("back", "ndcg@10", "mean"), "nDCG@10 of queries, among held-out and 30,000 others"
NEARER = ("other source", "mean"), "queries nearer to another source's text"
MANY = ("many", "ndcg@10", "mean"), "nDCG@10 among held-out and 100,000 other targets"
ALONE = ("many", "held-out", "mean"), "nDCG@10 among held-out targets alone"
CLUSTERS = ("v_measure",), "V-measure of docstrings by package"
MEMORY = "memory"  # a claim of its own kind: nothing is trained

DIRECTIONS = {"queries only": "from-queries", "targets only": "from-positives", "both": "base"}
BY_SOURCE = {"mixed": "mixed", "one source": "base"}


def going_on(says: str, prefix: str = "", start: str = "base", score: tuple = MANY,
             optional: bool = True, **more: str) -> Claim:
    arms = {"stage II": start, "as many more steps": f"{prefix}more-steps",
            "as many more texts": f"{prefix}more-texts", "stage III": f"{prefix}stage-3"}
    return Claim(says, "stage III", arms | more, *score, optional=optional)


def by_kind(name: str) -> dict[str, str]:
    return {"random": f"{name}-similarity", "mined, confirmed": f"{name}-retrieval"}


CLAIMS = {
    "tau": Claim("tau = .05 is effective", ".05", {
        ".01": "tau-0.01", ".02": "tau-0.02", ".05": "base", ".1": "tau-0.1", ".2": "tau-0.2"},
        *NDCG),
    "directions": Claim("loss in both directions: search for targets", "both", DIRECTIONS, *NDCG),
    "directions-back": Claim("the same: search for queries", "both", DIRECTIONS, *BACK),
    "source-wise": Claim("a batch from one source", "one source", BY_SOURCE, *NDCG),
    "source-wise-alone": Claim("the same: among its own targets", "one source", BY_SOURCE,
                               ALONE[0][1:], ALONE[1]),
    "source-wise-nearer": Claim("the same: other sources' texts", "one source", BY_SOURCE, *NEARER,
                                lower=True),
    "batch-size": Claim("larger batches, of as many pairs in all", "4,096", {
        "64": "batch-64", "256": "base", "1,024": "batch-1024", "4,096": "batch-4096"}, *NDCG),
    "title-abstract": Claim("title-abstract pairs help clustering", "with", {
        "without": "without-titles", "with": "base"}, *CLUSTERS),
    "filtering": Claim("consistency filtering", "then filtered", {
        "as it is": "base", "20 % wrong": "swapped", "then filtered": "filtered"}, *MANY,
        aside="as it is"),
    "stage-3": going_on("stage III lifts ranking", optional=False),
    "hard": Claim("hard negatives, confirmed by a cross-encoder", "mined, confirmed", {
        "random": "planted-random", "mined": "planted-unconfirmed",
        "mined, confirmed": "planted-confirmed"}, *MANY),
    "similarity": Claim("random negatives where data is not for retrieval", "random",
                        by_kind(TERMS), MANY[0], "nDCG@10, synonym to term"),
    "retrieval": Claim("hard ones where it is", "mined, confirmed", by_kind(DEFINITIONS),
                       MANY[0], "nDCG@10, synonym to definition"),
    "stage-3-metric": going_on("(a) among held-out targets alone", score=ALONE),
    "stage-3-teacher": going_on("(b) mined by all-MiniLM-L6-v2", **{
        "stage III, mined by it": "stage-3-minilm"}),
    "stage-3-student": going_on("(c) after 640 steps of stage II", "long-", "long"),
    "stage-3-gentle": going_on("(d) 20 steps at 3e-4", "gentle-"),
    "stage-3-longer": going_on("(d) 80 steps at 1e-3", "longer-"),
    "stage-3-negatives": Claim("(e) all negatives of the batch", "all", {
        "own": "stage-3-own", "all": "stage-3"}, *MANY, optional=True),
    "source-wise-later": Claim("a batch from one source, after 640 steps", "one source", {
        "mixed": "long-mixed", "one source": "long"}, *MANY, optional=True),
    "tau-later": Claim("tau after 640 steps", ".05", {".02": "long-tau-0.02", ".05": "long"}, *MANY,
                       optional=True),
    "batch-size-steps": Claim("larger batches, in as many steps", "1,024", {
        "64": "steps-64", "256": "base", "1,024": "steps-1024"}, *NDCG,
        optional=True),
    "no-text-twice": Claim("no text twice in a batch (ours)", "once", {
        "twice": "repeated", "once": "symptoms"}, MANY[0], "nDCG@10 among all targets",
        optional=True),
    "rates": Claim("sampling rates by quality and size", "rates", {
        "equal": "equal-rates", "rates": "base"}, *NDCG, optional=True),
    "pooling": Claim("mean pooling", "mean", {"CLS": "cls", "mean": "base"}, *NDCG, optional=True),
}
CELLS = {  # §5.3: flags of train.py
    "fp32": "--precision fp32 --memory 1000", "bf16": "--precision bf16 --memory 1000",
    "bf16, checkpointed layers": "--precision bf16 --memory 1000 --checkpoint-layers",
    "the same, in two passes": "--precision bf16 --memory 0.1 --checkpoint-layers"}
BATCHES = 256, 1024, 4096, 16384, 65536
MEASURED = 4096  # rows of a batch that are tried, where they fit; beyond, the plan's arithmetic


# scores

def scores(run: Path, arm: Arm, args: argparse.Namespace) -> dict:
    encoder, tokenizer = model.load(run / "model")
    memory.mixed_precision(encoder, precision())
    sources = data.load_sources(arm.corpus(args))
    vectors = partial(vectors_of, encoder, tokenizer)
    held_out = {text_hash(text) for s in sources for row in s.held_out for text in row[:2]}
    apart = {s.name: np.flatnonzero(is_among(s.index["query"], held_out)
                                    | is_among(s.index["positive"], held_out)) for s in sources}
    found = {}
    if arm.among != "many":
        found = among(vectors, sources, draw(sources, args.distractors[0], 0, apart), arm.back)
    if arm.among != "some":
        found["many"] = among(vectors, sources, draw(sources, args.distractors[1], 0, apart))
    if arm.corpus is docs:
        runs = [metrics.clustering(encoder, tokenizer, labelled(args), LENGTH, 16384, seed=seed)
                for seed in range(3)]
        found["v_measure"] = statistics.mean(run["v_measure"] for run in runs)
    return found


def vectors_of(encoder, tokenizer, texts: list[str]) -> Tensor:
    """Of length 1, (M, D)."""
    parts = [embed(encoder, tokenizer, texts[i : i + 8192], LENGTH)
             for i in range(0, len(texts), 8192)]
    return F.normalize(torch.cat(parts), dim=-1)


def among(vectors: Callable, sources: list[data.Source], rows: dict[str, np.ndarray],
          back: bool = False) -> dict:
    """{metric: {source or "mean": value}} of search for the held-out targets of a source, among
    themselves and the targets of these rows of all sources. "other source": the share of queries to
    which one of another source is at least as near as the own target. back: also of search for the
    query."""
    pairs = {name: [source.read(i) for source in sources if source.name == name for i in ids]
             for name, ids in rows.items()}
    targets = {name: vectors([row.positive for row in found]) for name, found in pairs.items()}
    queries = vectors([row.query for found in pairs.values() for row in found]) if back else None
    everything, found, found_back = torch.cat(list(targets.values())), {}, {}
    for source in sources:
        q = vectors([row.query for row in source.held_out])
        t = vectors([row.positive for row in source.held_out])
        found[source.name] = measure(metrics.positions(q, torch.cat([t, everything])))
        found[source.name]["held-out"] = metrics.ndcg_at_10(metrics.positions(q, t))
        if len(sources) > 1:
            others = torch.cat([x for name, x in targets.items() if name != source.name])
            nearest = torch.cat([(part @ others.T).amax(1) for part in q.split(64)])
            nearer = nearest >= (q * t).sum(1) - metrics.TIE
            found[source.name]["other source"] = nearer.double().mean().item()
        if back:
            found_back[source.name] = measure(metrics.positions(t, torch.cat([q, queries])))
    return by_metric(found) | ({"back": by_metric(found_back)} if back else {})


def measure(positions: Tensor) -> dict[str, float]:
    return {"ndcg@10": metrics.ndcg_at_10(positions),
            "recall@1": metrics.recall_at(positions, 1)}


def by_metric(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """{source: {metric: value}} -> {metric: {source: value, ..., "mean": value}}."""
    turned = {}
    for name in next(iter(found.values())):
        values = {source: round(metric[name], 4) for source, metric in found.items()}
        turned[name] = values | {"mean": round(statistics.mean(values.values()), 4)}
    return turned


def labelled(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Held-out docstrings and the packages they come from, which are read once more."""
    path = args.runs / "labelled" / "docstrings.json"

    def write(part: Path) -> None:
        texts = {text_hash(row.positive): row.positive for source in data.load_sources(docs(args))
                 if source.name in DOCSTRINGS for row in source.held_out}
        packages = {}
        warnings.simplefilter("ignore")  # of other people's escapes
        for package, files in tqdm(installed_docs.installed().items(), desc="labels"):
            for file in files:
                rows = installed_docs.read(file)
                for _, target, *_ in (row for name in DOCSTRINGS for row in rows.get(name, [])):
                    packages.setdefault(text_hash(target), package.partition("==")[0])
        found = [(text, packages[key]) for key, text in texts.items() if key in packages]
        names = [package for _, package in found]
        found = [pair for pair in found if names.count(pair[1]) >= LABELLED]
        (part / path.name).write_text(json.dumps(found))

    if not path.is_file():
        publish(path.parent, write)
    return [tuple(pair) for pair in json.loads(path.read_text())]


# an arm, in a process of its own

def trained(name: str, seed: int, args: argparse.Namespace) -> Path:
    """The model of an arm, trained first if it is not there."""
    run = args.runs / f"{name}-{seed}"
    if not (run / "model").is_dir():
        child(args, name, seed)
    return run / "model"


def run_arm(name: str, seed: int, args: argparse.Namespace) -> dict:
    """Trains and scores it -> scores, seconds, machine."""
    arm, run = ARMS[name], args.runs / f"{name}-{seed}"
    manifest = arm.sources(args)
    start = trained(arm.start, seed, args) if arm.start else "tiny"
    labelled(args)  # once, and not in the seconds
    began, steps = time.perf_counter(), max(1, round(args.steps * arm.steps))
    if not (run / "model").is_dir():
        shutil.rmtree(run, ignore_errors=True)
        train_arm(arm, run, steps, ["--sources", manifest, "--model", start, "--seed", seed], args)
    found = {"scores": scores(run, arm, args)}
    if arm.wrong:
        found["wrong"] = round(arm.wrong(manifest), 4)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    if name not in STARTS:
        shutil.rmtree(run)
    return found | {"seconds": round(time.perf_counter() - began), "machine": machine()}


def train_arm(arm: Arm, run: Path, steps: int, flags: list, args: argparse.Namespace) -> None:
    corpus = data.load_sources(arm.corpus(args))
    train_tokenizer = data.train_tokenizer
    # of the corpus, whatever the arm makes of it
    data.train_tokenizer = lambda _, size: train_tokenizer(corpus, size)
    metrics.held_out_retrieval = lambda *_: {"mean": {}, "sources": {}}  # `scores` does that
    MixedBatches.ahead = steps
    for module, name, replacement in arm.replace:
        setattr(module, name, replacement)
    train.main([*map(str, flags), *arm.flags.split(), "--batch-size", str(arm.batch), "--steps",
                str(steps), "--max-length", str(LENGTH), "--save-every", str(steps), "--out",
                str(run)])
    if not (run / "model").is_dir():
        sys.exit("claims: stopped; the same command begins this arm again")


def memory_cell(cell: str, batch: int) -> dict:
    """GB of a process that takes one step on full texts: by the plan's arithmetic, and where that
    fits, at its peak."""
    ranks = Ranks()
    flags = f"{CELLS[cell]} --batch-size {batch} --max-length {LENGTH} --micro-tokens 2048"
    settings, _ = train.parse_arguments(flags.split(), ranks)
    room = memory_free(ranks.device)
    encoder = model.create("tiny").train()
    optimizer = torch.optim.AdamW(encoder.parameters(), fused=True)
    engine, plan = train.prepare(encoder, optimizer, settings.clip, settings, ranks)
    found = {"plan": float(re.search(r"about ([\d.]+) of", plan.line)[1])}
    if batch <= MEASURED and found["plan"] * 1e9 < 0.8 * room:
        # --memory 1000 would never give back what was freed
        engine.release_memory = plan._replace(max_bytes=found["plan"] * 1e9).release_memory
        ids = torch.randint(5, encoder.backbone.config.vocab_size, (2 * batch, LENGTH))
        rows = torch.arange(2 * batch).split(plan.micro_tokens // LENGTH)
        embeddings = engine.embed([(i, ids[i], torch.ones_like(ids[i])) for i in rows])
        loss, _ = train.step_loss(*embeddings.split(batch), None, settings.tau, ranks)
        loss.backward()
        engine.backward(embeddings.grad)
        engine.step(1e-3)
        found["measured"] = round(memory_held(ranks.device, peak=True) / 1e9, 2)
    return {"scores": found, "machine": machine()}


def machine() -> str:
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*:\s*(.*)", info.read_text())[1] if info.is_file() else ""
    return (f"{os.cpu_count()} CPUs, {name or platform.machine()}, trained in {precision()}, torch "
            f"{torch.__version__}")


def precision() -> torch.dtype:
    """train.py's on a CPU, where nothing is said of it."""
    return memory.choose_precision("auto", torch.device("cpu"))[0]


# all arms

def child(args: argparse.Namespace, name: str, seed: int | str) -> dict:
    """An arm in a process of its own -> its result, the last line of its log. Raises RuntimeError
    with that line where it fails."""
    command = [sys.executable, "-m", "experiments.claims", "--arm", name, "--seed", str(seed),
               "--runs", str(args.runs), "--steps", str(args.steps),
               "--distractors", *map(str, args.distractors)]
    args.runs.mkdir(parents=True, exist_ok=True)
    log = args.runs / f"{name}-{seed}.log"
    with log.open("w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    last = (log.read_text().splitlines() or [""])[-1]
    if status:
        raise RuntimeError(f"{log}: {last}; the same command goes on from here")
    return json.loads(last)


def write_results(path: Path, results: dict) -> None:
    """A line an arm and seed, whole or not at all."""
    rows = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(results.items()))
    write_whole(path, ("{\n" + ",\n".join(rows) + "\n}\n").encode())


def cells_of(claim: str, seeds: int) -> list[str]:
    """Keys of results: "arm/seed", or of memory "memory way/batch"."""
    if claim == MEMORY:
        return [f"{MEMORY} {way}/{batch}" for way in CELLS for batch in (BATCHES if seeds else ())]
    return [f"{arm}/{seed}" for arm in CLAIMS[claim].arms.values() for seed in range(seeds)]


def expected_seconds(todo: list[str], results: dict) -> float:
    """Of arms that were measured, by what they took; of others, the median of those."""
    took = {}
    for key, found in results.items():
        if "seconds" in found:
            took.setdefault(key.partition("/")[0], []).append(found["seconds"])
    usual = statistics.median([s for found in took.values() for s in found] or [GUESS])
    return sum(statistics.mean(took.get(key.partition("/")[0], [usual])) for key in todo)


def run_all(names: list[str], args: argparse.Namespace) -> dict:
    results = json.loads(args.out.read_text()) if args.out.is_file() else {}
    keys = dict.fromkeys(key for name in names for key in cells_of(name, args.seeds))
    if not (todo := [key for key in keys if key not in results]):
        return results
    setting = {"steps": args.steps, "batch": BATCH, "length": LENGTH, "precision": str(precision()),
               "distractors": args.distractors, "corpus": docs(args).parent.name}
    if results.setdefault("setting", setting) != setting:
        raise ValueError(f"{args.out} was made with {results['setting']}, not {setting}; choose "
                         f"another --out and --runs")
    hours = expected_seconds(todo, results) / 3600
    print(f"{len(todo)} arms to run, {len(keys) - len(todo)} are there: about {hours:.1f} hours, "
          f"and what it takes to filter and mine where that is not done", flush=True)
    for key in (bar := tqdm(todo, unit="arm")):
        name, _, number = key.rpartition("/")
        bar.set_postfix_str(key)
        results[key] = child(args, name, number)
        write_results(args.out, results)
    return results


def rooms(results: dict) -> dict[str, dict[int, Room]]:
    """Of memory_cell's results, by way and batch."""
    found = {}
    for way in CELLS:
        for batch in BATCHES:
            if cell := results.get(f"{MEMORY} {way}/{batch}", {}).get("scores"):
                room = Room(cell.get("measured", cell["plan"]), "measured" in cell)
                found.setdefault(way, {})[batch] = room
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m experiments.claims", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = [*CLAIMS, MEMORY]
    default = [name for name in names if name == MEMORY or not CLAIMS[name].optional]
    add("--only", nargs="+", choices=names, default=default, metavar="CLAIM",
        help=f"of {', '.join(names)}; unset: all but {', '.join(set(names) - set(default))}")
    add("--seeds", type=int, default=3)
    add("--figure", type=Path, metavar="FILE", help="an SVG of what is there")
    add("--steps", type=int, default=160, help="of the base")
    add("--distractors", type=int, nargs=2, default=[30_000, 100_000], metavar=("SOME", "MANY"),
        help="targets to search among, besides")
    add("--out", type=Path, default=Path("experiments/claims.json"), metavar="FILE")
    add("--runs", type=Path, default=Path("runs/claims"), metavar="DIR", help="models and rows")
    add("--arm", help=argparse.SUPPRESS)  # of a child
    add("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.arm:
        way = args.arm.removeprefix(f"{MEMORY} ")
        found = memory_cell(way, args.seed) if way in CELLS else run_arm(args.arm, args.seed, args)
        return print(f"\n{json.dumps(found)}", flush=True)
    if args.figure:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            sys.exit("claims: --figure needs matplotlib: pip install -r "
                     "experiments/requirements.txt")
    try:
        results = run_all(args.only, args)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"claims: {error}")
    seen = results, [CLAIMS[name] for name in args.only if name != MEMORY], (
        rooms(results) if MEMORY in args.only else {})
    print(table(*seen))
    if args.figure:
        draw_figure(*seen, args.figure)
        print(f"{args.figure} is written")


if __name__ == "__main__":
    main()
