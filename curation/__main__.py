"""Curates pairs for training: the consistency filter of §5.1, the negatives of §5.2 and the cross-encoder that confirms them.

    python curate.py filter --model DIR --out filtered           keeps the pairs whose target a model finds among many
    python curate.py mine --sources filtered/manifest.json --retriever DIR --out mined          gives a row 15 negatives
    python curate.py cross-encoder --model DIR --out judge       trains what `mine` otherwise trains for itself

Paper: pairs are consistency-filtered (Dai et al. 2023, Wang et al. 2022). Where queries search passages, negatives are what
retrieval models find similar, if a cross-encoder scores them lower than the positive; elsewhere they are drawn at random,
since hard ones hurt there. Ours: the numbers, whose origin is in each flag's help.

A command writes OUT when all is done: sources, a manifest for train.py, a report (or a cross-encoder). Until then OUT.work
holds what is done, and the same command goes on there. What is held out of a source becomes its `eval` file: it is neither
kept as a pair nor ever a negative. Nothing here knows how an embedding model is trained. Axis letters: M rows, C candidates,
N negatives.
"""

import argparse
import json
import math
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from textwrap import shorten
from urllib.parse import quote

import numpy as np
import torch
from tqdm import tqdm

import data
import model
from corpora import formats
from corpora.formats import text_hash
from curation import pool as search
from curation.reranker import Example, Reranker
from plumbing.files import publish

JUDGED = 1024  # rows judged at a time: with 30 candidates 31,744 pairs
EQUAL = 0.01  # Ours: scores closer than this are equal: bf16's rounding of the logit alone moves one by up to 0.0008
TRIED = 200  # Ours: held-out queries per source that a cross-encoder is tried on
JUDGE_STEPS, JUDGE_QUERIES, JUDGE_NEGATIVES = 300, 32, 4  # Ours: of a cross-encoder's training; candidates beside a positive
NEGATIVE = np.dtype([("place", "<u4"), ("rank", "<u4"), ("cosine", "<f4"), ("score", "<f4")])  # a random one has rank 0


# what the commands share

def open_sources(args: argparse.Namespace) -> tuple[list[data.Source], list[dict]]:
    """The sources of a manifest, and its entries."""
    if not args.sources:
        from corpora import installed_docs
        args.sources = str(installed_docs.build())
    return data.load_sources(args.sources), json.loads(Path(args.sources).read_bytes())


def draw(sources: list[data.Source], count: int | None, seed: int, apart: dict[str, np.ndarray] = {}) -> dict[str, np.ndarray]:
    """{source: ids of the rows to work on}, none of `apart`: all that may be trained on, or `count` at random by the sources'
    rates; where a source has fewer than its share, the others give more."""
    rows, share, left = {s.name: np.setdiff1d(s.train, apart.get(s.name, [])) for s in sources}, {}, count or 0
    for source in sorted(sources, key=lambda s: len(rows[s.name]) / s.rate):  # those that cannot give their share first
        rates = sum(s.rate for s in sources if s.name not in share)
        share[source.name] = min(len(rows[source.name]), round(left * source.rate / rates)) if count else len(rows[source.name])
        left -= share[source.name]
    return {name: np.sort(np.random.default_rng([seed, text_hash(name)]).permutation(rows[name])[: share[name]])
            for name in rows}


def identity(args: argparse.Namespace, sources: list[data.Source], *models: torch.nn.Module) -> dict:
    """What a command's work depends on."""
    free = "run", "sources", "out", "micro_tokens", "batch_size", "cross_encoder", "top_k", "margin", "negatives"
    return {**{name: value for name, value in vars(args).items() if name not in free},
            "corpus": [[s.name, s.rate, s.kind, s.fingerprint] for s in search.with_collections(sources)],
            "hold-out": text_hash(str(sorted(sources[0].held_out_hashes))), "model": list(map(search.fingerprint, models))}


class Report:
    """A table of the sources, printed as they come and written beside them."""

    def __init__(self, *columns: str):
        self.lines = []
        if columns:
            self.row("source", *columns)

    def row(self, name: str, *values) -> None:
        self.say(f"{name:26}" + "".join(f"{value:>12,}" if isinstance(value, int) else f"{value:>12}" for value in values))

    def say(self, line: str) -> None:
        tqdm.write(line)
        self.lines.append(line)


def say_if_few(report: Report, args: argparse.Namespace, source: data.Source, rows: np.ndarray, advice: str) -> None:
    if not len(rows):
        report.say(f"    {source.name} keeps no row and is left out; {advice}")
    elif source.usable(rows) < args.batch_size:
        report.say(f"    {source.name} keeps {source.usable(rows)} usable rows, fewer than --batch-size {args.batch_size}: "
                   f"train.py would refuse it; lower it there, or {advice}")


def write_sources(part: Path, entries: list[dict], sources: list[data.Source], report: Report,
                  files: Callable[[data.Source], dict[str, Iterator[dict]]]) -> None:
    """The manifest, the report, and {field of the manifest: lines} of every source that has rows, with what it holds out."""
    manifest, folder = [], {"path": "", "eval": "eval/", "collection": "dropped/"}
    for name in folder.values():
        (part / name).mkdir(exist_ok=True)
    for entry, source in zip(entries, sources):
        held_out = formats.read_rows(source.eval) if source.eval else source.held_out
        lines = files(source) | {"eval": ({"query": row.query, "positive": row.positive} for row in held_out)}
        names = {field: f"{folder[field]}{quote(source.name, '')}.jsonl" for field in lines}
        written = {field: names[field] for field in lines if write_lines(part / names[field], lines[field])}
        if "path" in written:
            manifest.append({field: value for field, value in entry.items() if field not in folder} | written)
    if not manifest:
        raise ValueError("no source keeps a row: see the table")
    (part / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    (part / "report.txt").write_text("\n".join(report.lines) + "\n")


def write_lines(path: Path, values: Iterator[dict]) -> int:
    count = 0
    with open(path, "w", encoding="utf-8") as file:
        for count, value in enumerate(values, 1):
            file.write(json.dumps(value, ensure_ascii=False) + "\n")
    return count


# §5.1: the consistency filter

def filter_pairs(args: argparse.Namespace) -> None:
    """Keeps the pairs whose target is among their query's --top-k of --pool random targets and itself."""
    sources, entries = open_sources(args)
    rows = draw(sources, args.rows, args.seed)
    pool = search.Pool([search.positives(source, source.train) for source in sources], args.pool, args.seed)
    if len(pool) <= args.top_k:
        raise ValueError(f"--pool {args.pool}: {len(pool)} targets and --top-k {args.top_k}: nearly every pair would stay; "
                         f"raise --pool, or lower --top-k")
    embed = search.Embedder(args.model, args.max_length, args.micro_tokens, args.chunk)
    work = search.Work(args.out, identity(args, sources, embed.encoder))
    vectors, known = embed.chunks(work, "pool", pool), search.KnownPositives(search.with_collections(sources), pool)

    def ranks(source: data.Source, rows: np.ndarray) -> np.ndarray:
        read = [source.read(row) for row in rows]
        q, own = embed([row.query for row in read]), embed([row.positive for row in read])
        return search.search.positions(q, own, vectors, known.cells(source.index["query"][rows]))

    report, found = Report("rows", "kept", "", "dropped"), {}
    report.say(f"    kept if among the first {args.top_k} of {len(pool):,} random targets and its own")
    for source in sources:
        ids = rows[source.name]
        rank = np.concatenate([ids[:0], *(
            np.load(work.keep(f"ranks-{source.name}-{start}", partial(ranks, source, ids[start : start + args.chunk])))
            for start in tqdm(range(0, len(ids), args.chunk), unit="chunk", desc=source.name))])
        found[source.name], kept = rank, rank <= args.top_k
        report.row(source.name, len(ids), int(kept.sum()), f"{kept.mean() if len(ids) else 0:.1%}", int((~kept).sum()))
        say_if_few(report, args, source, ids[kept], "raise --top-k, or lower --pool")
        for what, chosen in ("kept", kept), ("dropped", ~kept):
            for i in np.random.default_rng(args.seed).permutation(np.flatnonzero(chosen))[:2]:
                query, positive = (shorten(text, 52, placeholder=" ...") for text in source.read(ids[i])[:2])
                report.say(f"    {what:8}rank {rank[i]:6}    {query} -> {positive}")

    def kept(source: data.Source) -> Iterator[dict]:
        for i, rank in zip(rows[source.name], found[source.name]):
            if rank <= args.top_k:
                query, positive, negatives, _ = source.read(i)
                negatives = [text for text in negatives if text_hash(text) not in source.held_out_hashes]
                yield {"query": query, "positive": positive} | ({"negatives": negatives} if negatives else {})

    queries = np.concatenate([source.index["query"][rows[source.name]] for source in sources])
    targets = search.Pool([part for source in sources for part in search.searched(source, rows[source.name])]).hashes

    def dropped(source: data.Source) -> Iterator[dict]:
        for i, rank in zip(rows[source.name], found[source.name]):
            if rank > args.top_k:
                reason = f"rank {rank} among {len(pool)} random targets and its own, --top-k {args.top_k}"
                yield with_reason(source.read(i), reason)
        undrawn = np.setdiff1d(source.train, rows[source.name])
        query, positive = (source.index[side][undrawn] for side in ("query", "positive"))
        for i in undrawn[np.isin(query, queries) & np.isin(positive, targets)]:  # mine must know that the two belong together
            yield with_reason(source.read(i), "not drawn (--rows), but its texts are, in other rows")
        for row in formats.read_rows(source.collection) if source.collection else ():
            if text_hash(row.positive) not in source.held_out_hashes:
                yield with_reason(row, "of the collection, not of the source")

    def held_out(source: data.Source) -> Iterator[dict]:
        for i in np.setdiff1d(np.arange(len(source.index)), source.train):
            yield with_reason(source.read(i), "a text of it is held out")

    def write(part: Path) -> None:
        write_sources(part, entries, sources, report, lambda source: {"path": kept(source), "collection": dropped(source)})
        (part / "held-out").mkdir()
        for source in sources:
            write_lines(part / "held-out" / f"{quote(source.name, '')}.jsonl", held_out(source))

    work.finish(write)


def with_reason(row: formats.Row, reason: str) -> dict:
    return {"query": row.query, "positive": row.positive, "row": row.id, "reason": reason}


# §5.2: the cross-encoder

def train_judge(name: str, retrievers: list[search.Retriever], rows: dict[str, np.ndarray], steps: int, lr: float | None,
                args: argparse.Namespace, directory: Path) -> None:
    """Trains a cross-encoder from an encoder, on these rows and what the retriever finds for them."""
    torch.manual_seed(args.seed)
    rng, found, count = np.random.default_rng(args.seed), [], steps * JUDGE_QUERIES
    for r in (r for r in retrievers if len(rows[r.source.name])):
        places, cosines = r(rows[r.source.name], args.candidates)
        found += [(r, row, place[np.isfinite(cosine)]) for row, place, cosine in zip(rows[r.source.name], places, cosines)]
    if not found:
        raise ValueError("no source of kind \"retrieval\" has a row to train a cross-encoder on")
    order = np.concatenate([rng.permutation(len(found)) for _ in range(-(-count // len(found)))])[:count]

    def example(r: search.Retriever, row: int, places: np.ndarray) -> Example:
        return Example(*r.source.read(row)[:2], [r.pool.text(place) for place in rng.permutation(places)[:JUDGE_NEGATIVES]])

    batches = ([example(*found[i]) for i in batch] for batch in order.reshape(steps, -1))
    judge = Reranker(*model.load_cross_encoder(name, new_head=True), args.max_length, args.micro_tokens)
    lr = lr or (1e-3 if judge.encoder.config.hidden_size <= 256 else 5e-5)
    bar = tqdm(judge.train(batches, steps, lr), total=steps, unit="step", desc="cross-encoder")
    for loss in bar:
        bar.set_postfix(loss=f"{loss:.3f}")
    publish(directory, partial(model.save, judge.encoder, judge.tokenizer))


def held_out_pairs(sources: list[data.Source], embed: search.Embedder, args: argparse.Namespace) -> tuple[list, int]:
    """For held-out queries, (query, positive) and (query, one of the --candidates nearest held-out targets) in turn, and how
    often the retriever ranks the two rightly. Raises ValueError where they are too few to say anything."""
    pairs, right = [], 0
    for source in sources:
        targets = {text_hash(row.positive): row.positive for row in source.held_out}
        rows, texts, place = source.held_out[:TRIED], list(targets.values()), {key: i for i, key in enumerate(targets)}
        if len(texts) > 1:  # else there is nothing to tell the one from
            own = np.array([place[text_hash(row.positive)] for row in rows])
            q, p = embed([row.query for row in rows]), embed(texts)
            count = min(args.candidates, len(texts) - 1)
            places, cosines = search.search.nearest(q, [p.cpu().numpy()], count, (np.arange(len(own)), own))
            drawn = np.arange(len(own)), np.random.default_rng(args.seed).integers(count, size=len(own))
            right += int(((q * p[own]).sum(1).cpu().numpy() > cosines[drawn]).sum())
            pairs += [(row.query, text) for row, i in zip(rows, places[drawn]) for text in (row.positive, texts[i])]
    if len(pairs) < 40:
        raise ValueError(f"{len(pairs) // 2} held-out pairs are too few to try a cross-encoder on; give the sources of kind "
                         f"\"retrieval\" eval files with 20 or more")
    return pairs, right


def open_judge(name: Path | str, pairs: list, retriever: int, report: "Report", args: argparse.Namespace) -> Reranker:
    """A cross-encoder that is better than chance on the held-out pairs; ValueError otherwise."""
    judge = Reranker(*model.load_cross_encoder(name), args.max_length, args.micro_tokens)
    scores, count = judge(pairs).reshape(-1, 2), len(pairs) // 2
    right = int((scores[:, 0] > scores[:, 1]).sum())
    report.say(f"held-out positives against what the retriever finds: the cross-encoder ranks {right} of {count} rightly, the "
               f"retriever {retriever}")
    if right <= count / 2 + math.sqrt(count):  # chance: a half, with a standard deviation of sqrt(count) / 2
        raise ValueError(f"cross-encoder {name}: ranks {right} of {count} held-out pairs rightly, no better than chance; "
                         f"`curate.py cross-encoder` trains one with more --steps or another --lr, for mine's --cross-encoder")
    return judge


def cross_encoder(args: argparse.Namespace) -> None:
    """Trains a cross-encoder from an encoder, and says how well it ranks held-out pairs."""
    sources, _ = open_sources(args)
    embed = search.Embedder(args.retriever or args.model, args.max_length, args.micro_tokens, args.chunk)
    work = search.Work(args.out, identity(args, sources, embed.encoder, model.load(args.model)[0]))
    judge = work.directory / "cross-encoder"
    searched = [source for source in sources if source.kind == "retrieval"]
    if not searched:
        raise ValueError("no source is of kind \"retrieval\": a cross-encoder is not needed")
    pairs = held_out_pairs(searched, embed, args)
    if not judge.is_dir():
        retrievers = [search.Retriever(source, sources, embed, work) for source in searched]
        rows = draw(searched, args.steps * JUDGE_QUERIES, args.seed)
        train_judge(args.model, retrievers, rows, args.steps, args.lr, args, judge)
    open_judge(judge, *pairs, Report(), args)
    work.finish(partial(shutil.copytree, judge, dirs_exist_ok=True))


# §5.2: negatives

def choose(positive: float, scores: np.ndarray, margin: float, count: int) -> tuple[np.ndarray, int]:
    """Which candidates, given in the order of the retriever, become negatives: the `count` nearest whose score is lower than
    the positive's by more than the margin; and how many candidates are not, for they may be right answers."""
    confirmed = np.flatnonzero(scores < positive - max(margin, EQUAL))
    return confirmed[:count], len(scores) - len(confirmed)


def mine(args: argparse.Namespace) -> None:
    """Gives every row --negatives: of what the retriever finds, the nearest that the cross-encoder scores below the positive by
    --margin; where there are fewer, and for sources of kind "similarity", random ones."""
    sources, entries = open_sources(args)
    embed = search.Embedder(args.retriever, args.max_length, args.micro_tokens, args.chunk)
    work = search.Work(args.out, identity(args, sources, embed.encoder))
    rows, N = draw(sources, args.rows, args.seed), args.negatives
    retrievers = {source.name: search.Retriever(source, sources, embed, work) for source in sources}
    report = Report("rows", "candidates", "rejected", "", "topped up", "random")
    for source in sources:
        say_if_few(report, args, source, rows[source.name], "raise --rows")
    searched, trained, version = [s for s in sources if s.kind == "retrieval"], work.directory / "cross-encoder", ""
    if searched:
        pairs = held_out_pairs(searched, embed, args)
        if not args.cross_encoder:
            count, shared = JUDGE_STEPS * JUDGE_QUERIES, ""
            others = draw(searched, count, args.seed, apart=rows)
            if sum(map(len, others.values())) < count / 10:
                others, shared = draw(searched, count, args.seed), " on rows that it will judge: --rows leaves too few others"
            report.say(f"no --cross-encoder: training one from {args.retriever}{shared}")
            if not trained.is_dir():
                train_judge(args.retriever, [retrievers[s.name] for s in searched], others, JUDGE_STEPS, None, args, trained)
        judge = open_judge(args.cross_encoder or trained, *pairs, report, args)
        version = f"{search.fingerprint(judge.encoder)}-{args.margin}"
    mined_row = np.dtype([("score", "<f4"), ("candidates", "<u4"), ("rejected", "<u4"), ("hard", "<u4"),
                          ("negatives", NEGATIVE, N)])

    def mine_rows(source: data.Source, ids: np.ndarray, places: np.ndarray, cosines: np.ndarray) -> np.ndarray:
        pool, read, found = retrievers[source.name].pool, [source.read(i) for i in ids], np.zeros(len(ids), mined_row)
        taken = [set(place[np.isfinite(cosine)]) for place, cosine in zip(places, cosines)]  # what is no random negative
        for i, place in zip(*retrievers[source.name].excluded(ids)):
            taken[i].add(place)
        there = np.isfinite(cosines)
        if source in searched:
            pairs = [row[:2] for row in read] + [(read[i].query, pool.text(places[i, j])) for i, j in np.argwhere(there)]
            scores = judge(pairs)
            found["score"], scores = scores[: len(ids)], np.split(scores[len(ids) :], there.sum(1).cumsum()[:-1])
        for i, row in enumerate(found):
            if source in searched:  # candidates that are there come first
                hard, row["rejected"] = choose(row["score"], scores[i], args.margin, N)
                row["candidates"], row["hard"] = len(scores[i]), len(hard)
                for slot, j in enumerate(hard):
                    row["negatives"][slot] = places[i, j], j + 1, cosines[i, j], scores[i][j]
            if len(pool) - len(taken[i]) < N - row["hard"]:
                raise ValueError(f"source {source.name}, row {ids[i]}: {row['hard']} negatives found and "
                                 f"{len(pool) - len(taken[i])} texts to draw from; lower --negatives {N}")
            rng = np.random.default_rng([args.seed, text_hash(source.name), int(ids[i])])
            for slot in range(row["hard"], N):
                while (place := int(rng.integers(len(pool)))) in taken[i]:
                    pass
                taken[i].add(place)
                row["negatives"][slot] = place, 0, 0, 0
        return found

    def mined(source: data.Source) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids, what was mined for them), some rows at a time."""
        for first in range(0, len(rows[source.name]), args.chunk):
            ids, places, cosines = rows[source.name][first : first + args.chunk], *np.empty((2, args.chunk, 0))
            if source in searched:
                search_them = partial(retrievers[source.name], ids, args.candidates)
                places, cosines = np.load(work.keep(f"nearest-{source.name}-{first}", lambda: np.stack(search_them())))
            for part in (slice(start, start + JUDGED) for start in range(0, len(ids), JUDGED)):
                name = f"mined-{source.name}-{first + part.start}-{version}-{N}"
                compute = partial(mine_rows, source, ids[part], places[part].astype(int), cosines[part])
                yield ids[part], np.load(work.keep(name, compute))

    for source in sources:
        bar, sums = tqdm(total=len(rows[source.name]), unit="row", desc=source.name), np.zeros(4, int)
        for ids, found in mined(source):
            random = N - found["hard"].astype(int)
            sums += np.array([found["candidates"].sum(), found["rejected"].sum(), (random > 0).sum(), random.sum()], int)
            bar.update(len(ids))
        bar.close()
        candidates, rejected, topped_up, random = sums.tolist()
        report.row(source.name, len(rows[source.name]), candidates, rejected, f"{rejected / max(candidates, 1):.1%}", topped_up,
                   random)

    def with_negatives(source: data.Source) -> Iterator[dict]:
        pool = retrievers[source.name].pool
        for i, row in ((i, row) for ids, found in mined(source) for i, row in zip(ids, found)):
            query, positive, *_ = source.read(i)
            origins = [{"from": "retriever", "rank": int(n["rank"]), "cosine": round(float(n["cosine"]), 4),
                        "score": round(float(n["score"]), 4)} for n in row["negatives"][: row["hard"]]]
            yield {"query": query, "positive": positive,
                   **({"positive_score": round(float(row["score"]), 4)} if source in searched else {}),
                   "negatives": [pool.text(place) for place in row["negatives"]["place"]],
                   "mined": origins + [{"from": "random"}] * (N - row["hard"])}

    def write(part: Path) -> None:
        write_sources(part, entries, sources, report, lambda source: {"path": with_negatives(source)})
        if trained.is_dir() and not args.cross_encoder:
            shutil.copytree(trained, part / "cross-encoder")

    work.finish(write)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    formatter = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands, added = parser.add_subparsers(dest="command", required=True, metavar="COMMAND"), {}
    for name, run in ("filter", filter_pairs), ("cross-encoder", cross_encoder), ("mine", mine):
        command = commands.add_parser(name, description=run.__doc__, help=run.__doc__.split(".")[0], **formatter)
        command.set_defaults(run=run)
        add = added[name] = command.add_argument
        add("--sources", metavar="MANIFEST", help="as train.py's; unset: the installed packages' documentation")
        add("--out", metavar="DIR", required=True, help="where the results go, whole or not at all")
        add("--max-length", type=int, default=128, help="tokens per text, and per query and passage together (ours)")
        add("--micro-tokens", type=int, default=16384, help="bound on the tokens of one forward pass, for memory only (ours)")
        add("--chunk", type=int, default=8192, help="texts embedded, searched and kept at a time (ours)")
        add("--seed", type=int, default=0, help="of every draw")
    for name, batch_size in ("filter", 4096), ("mine", 256):
        add = added[name]
        add("--rows", type=int, help="work on so many rows, drawn by the sources' rates; unset: all")
        add("--batch-size", type=int, default=batch_size, help="train.py's, to say which source would be too small for it")
    for name in "cross-encoder", "mine":
        added[name]("--candidates", type=int, default=50, help="what the retriever finds per query (ours)")
    add = added["filter"]
    add("--model", metavar="NAME_OR_DIR", required=True, help="the encoder that has to find the target (all-MiniLM-L6-v2 in "
                                                              "Jina Embeddings v1)")
    add("--pool", type=int, default=1_000_000, help="random targets that a target must stand out from (v1's)")
    add("--top-k", type=int, default=2, help="a pair stays if its target is among so many (v1's)")
    add = added["cross-encoder"]
    add("--model", metavar="NAME_OR_DIR", required=True, help="the encoder to begin with")
    add("--retriever", metavar="NAME_OR_DIR", help="finds the candidates; unset: --model")
    add("--steps", type=int, default=JUDGE_STEPS, help=f"of {JUDGE_QUERIES} queries, each with its positive and "
                                                       f"{JUDGE_NEGATIVES} candidates (ours)")
    add("--lr", type=float, help="peak learning rate; unset: 1e-3 up to width 256, else 5e-5 (ours)")
    add = added["mine"]
    add("--retriever", metavar="NAME_OR_DIR", required=True, help="the bi-encoder that finds candidates")
    add("--cross-encoder", metavar="NAME_OR_DIR", help="a sequence-classification model with one logit (ms-marco-MiniLM-L-6-v2 "
                                                       "in v1); unset: one is trained from --retriever")
    add("--margin", type=float, default=0.0, help=f"a negative's score is lower than the positive's by more (0: the paper's; "
                                                  f"0.2: v1's; differences up to {EQUAL} are none)")
    add("--negatives", type=int, default=15, help="negatives per row (the paper's)")
    args = parser.parse_args(argv)
    at_least_1 = "rows", "pool", "top_k", "candidates", "negatives", "batch_size", "chunk", "micro_tokens", "steps"
    for flags, good, expected in ((at_least_1, lambda x: x >= 1, "1 or more"), (["seed"], lambda x: x >= 0, "0 or more"),
                                  (["margin"], lambda x: 0 <= x < 1, "at least 0 and less than 1: scores are from 0 to 1"),
                                  (["lr"], lambda x: 0 < x < math.inf, "a number above 0")):
        for flag in flags:
            if getattr(args, flag, None) is not None and not good(getattr(args, flag)):
                raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected {expected}")
    return args


def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        args = parse_arguments(argv)
        args.run(args)
        return print(f"{args.out} is written")
    except (OSError, ValueError) as error:
        status, line = 2, " ".join(str(error).split())
    except KeyboardInterrupt:
        status, line = 130, "stopped; the same command goes on from here"
    print("curate.py:", line, file=sys.stderr)  # not above, where the exception holds the progress bar open
    sys.exit(status)


if __name__ == "__main__":
    main()
