"""Curates pairs for training: the consistency filter of §5.1, the negatives of §5.2 and the cross-encoder that confirms them.

    python curate.py filter --model DIR --out filtered           keeps the pairs whose target a model finds among many
    python curate.py mine --sources filtered/manifest.json --retriever DIR --out mined          gives a row 15 negatives
    python curate.py cross-encoder --model DIR --out judge       trains what `mine` otherwise trains for itself

Paper: pairs are consistency-filtered (Dai et al. 2023, Wang et al. 2022). Where queries search passages, negatives are what
retrieval models find similar, if a cross-encoder scores them lower than the positive; elsewhere they are drawn at random,
since hard ones hurt there. Ours: the numbers, whose origin is in each flag's help.

A command writes OUT (sources, a manifest for train.py, a report) when all is done; until then OUT.work holds what is done,
and the same command goes on there. What is held out of a source becomes its `eval` file: it is neither kept as a pair nor
ever a negative. Nothing here knows about training an embedding model. Axis letters: M queries, C candidates, N negatives.
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
import formats
import model
import search
from checkpoint import publish
from judge import Example, Judge

ROWS_AT_ONCE = 1024  # in mining: with 30 candidates 31,744 pairs for the cross-encoder
EQUAL = 0.01  # Ours: scores closer than this are equal: bf16 logits near 4 are 0.03 apart, a quarter of that in the score
TRIED = 200  # Ours: held-out queries per source that a cross-encoder is tried on
JUDGE_NEGATIVES = 4  # Ours: candidates beside a positive in the cross-encoder's training
NEGATIVE = np.dtype([("place", "<u4"), ("rank", "<u4"), ("cosine", "<f4"), ("score", "<f4")])  # a random one has rank 0


# what the commands share

def open_sources(args: argparse.Namespace) -> tuple[list[data.Source], list[dict]]:
    """The sources of a manifest, and its entries."""
    if not args.sources:
        from corpora import installed_docs
        args.sources = str(installed_docs.build())
    return data.load_sources(args.sources), json.loads(Path(args.sources).read_bytes())


def draw(sources: list[data.Source], count: int | None, seed: int) -> dict[str, np.ndarray]:
    """{source: ids of the rows to work on}: all that may be trained on, or `count` at random by the sources' rates; where a
    source has fewer than its share, the others give more."""
    share, left = {}, count or 0
    for source in sorted(sources, key=lambda s: len(s.train) / s.rate):  # those that cannot give their share first
        rates = sum(s.rate for s in sources if s.name not in share)
        share[source.name] = min(len(source.train), round(left * source.rate / rates)) if count else len(source.train)
        left -= share[source.name]
    return {s.name: np.sort(np.random.default_rng([seed, formats.key(s.name)]).permutation(s.train)[: share[s.name]])
            for s in sources}


def identity(args: argparse.Namespace, sources: list[data.Source], *models: torch.nn.Module) -> dict:
    """What a command's work depends on."""
    flags = {name: value for name, value in vars(args).items() if name != "run"}
    opened = [*sources, *(more for source in sources for more in search.collection(source))]
    return {**flags, "corpus": [[s.name, s.rate, s.kind, s.fingerprint] for s in opened],
            "hold-out": formats.key(str(sorted(sources[0].held_out_keys))), "weights": list(map(search.fingerprint, models))}


def known_positives(sources: list[data.Source]) -> search.Known:
    return search.Known([*sources, *(more for source in sources for more in search.collection(source))])


class Report:
    """A table of the sources, printed as they come and written beside them."""

    def __init__(self, *columns: str):
        self.lines = []
        self.row("source", *columns)

    def row(self, name: str, *values) -> None:
        self.say(f"{name:26}" + "".join(f"{value:>12,}" if isinstance(value, int) else f"{value:>12}" for value in values))

    def say(self, line: str) -> None:
        tqdm.write(line)
        self.lines.append(line)


def say_if_few(report: Report, args: argparse.Namespace, source: data.Source, rows: np.ndarray, advice: str) -> None:
    if source.usable(rows) < args.batch_size:
        report.say(f"    {source.name} keeps {source.usable(rows)} usable rows, fewer than --batch-size {args.batch_size}: "
                   f"train.py would refuse it; lower it there, {advice}")


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
        raise ValueError("no source keeps a row; a larger --top-k or a smaller --pool keeps more")
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
    pool = search.Pool([search.positives(source, rows[source.name]) for source in sources], args.pool, args.seed)
    if len(pool) <= args.top_k:
        raise ValueError(f"--pool {args.pool}: {len(pool)} targets and --top-k {args.top_k}: nearly every pair would stay; "
                         f"raise --pool, or lower --top-k")
    embed = search.Embedder(args.model, args.max_length, args.micro_tokens, args.chunk)
    work = search.Work(args.out, identity(args, sources, embed.encoder))
    vectors, known = embed.chunks(work, "pool", pool), known_positives(sources)

    def ranks(source: data.Source, rows: np.ndarray) -> np.ndarray:
        read = [source.read(row) for row in rows]
        q, own = embed([row.query for row in read]), embed([row.positive for row in read])
        return search.ranks(q, own, vectors, known.cells(source.index["query"][rows], pool))

    report, found = Report("rows", "kept", "", "dropped"), {}
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
                negatives = [text for text in negatives if formats.key(text) not in source.held_out_keys]
                yield {"query": query, "positive": positive} | ({"negatives": negatives} if negatives else {})

    def dropped(source: data.Source) -> Iterator[dict]:
        for i, rank in zip(rows[source.name], found[source.name]):
            if rank > args.top_k:
                reason = f"rank {rank} among {len(pool)} random targets and its own, --top-k {args.top_k}"
                yield with_reason(source.read(i), reason)
        for row in formats.read_rows(source.collection) if source.collection else ():
            if formats.key(row.positive) not in source.held_out_keys:
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


# §5.2: negatives

def train_judge(name: str, retrievers: list[search.Retriever], args: argparse.Namespace, directory: Path) -> None:
    """Trains a cross-encoder from an encoder, on rows by the sources' rates and on what the retriever finds for them."""
    torch.manual_seed(args.seed)
    rng, found, count = np.random.default_rng(args.seed), [], args.judge_steps * args.judge_batch_size
    rows = draw([r.source for r in retrievers], count, args.seed)
    for r in (r for r in retrievers if len(rows[r.source.name])):
        places, cosines = r(rows[r.source.name], args.candidates)
        found += [(r, row, place[np.isfinite(cosine)]) for row, place, cosine in zip(rows[r.source.name], places, cosines)]
    if not found:
        raise ValueError("no source of kind \"retrieval\" has a row to train a cross-encoder on")
    order = np.concatenate([rng.permutation(len(found)) for _ in range(-(-count // len(found)))])[:count]

    def example(r: search.Retriever, row: int, places: np.ndarray) -> Example:
        return Example(*r.source.read(row)[:2], [r.pool.text(place) for place in rng.permutation(places)[:JUDGE_NEGATIVES]])

    batches = ([example(*found[i]) for i in batch] for batch in order.reshape(args.judge_steps, -1))
    judge = Judge(*model.load_cross_encoder(name, new_head=True), args.max_length, args.micro_tokens)
    lr = args.judge_lr or (1e-3 if judge.encoder.config.hidden_size <= 256 else 5e-5)
    bar = tqdm(judge.train(batches, args.judge_steps, lr), total=args.judge_steps, unit="step", desc="cross-encoder")
    for loss in bar:
        bar.set_postfix(loss=f"{loss:.3f}")
    publish(directory, partial(model.save, judge.encoder, judge.tokenizer))


def open_judge(name: Path | str, sources: list[data.Source], embed: search.Embedder, args: argparse.Namespace) -> Judge:
    """A cross-encoder that is better than chance: printed is how often it scores a held-out positive above one of the
    --candidates held-out targets that the retriever finds, and how often the retriever does. Raises ValueError otherwise."""
    judge = Judge(*model.load_cross_encoder(name), args.max_length, args.micro_tokens)
    pairs, retriever = [], 0
    for source in sources:
        targets = {formats.key(row.positive): row.positive for row in source.held_out}
        rows, texts = source.held_out[:TRIED], list(targets.values())
        own = np.array([list(targets).index(formats.key(row.positive)) for row in rows], int)
        if len(texts) > 1:  # else there is nothing to tell the one from
            q, p = embed([row.query for row in rows]), embed(texts)
            count = min(args.candidates, len(texts) - 1)
            places, cosines = search.nearest(q, [p.cpu().numpy()], count, (np.arange(len(own)), own))
            drawn = np.arange(len(own)), np.random.default_rng(args.seed).integers(count, size=len(own))
            retriever += int(((q * p[own]).sum(1).cpu().numpy() > cosines[drawn]).sum())
            pairs += [(row.query, text) for row, i in zip(rows, places[drawn]) for text in (row.positive, texts[i])]
    scores, count = judge(pairs).reshape(-1, 2) if pairs else np.empty((0, 2)), len(pairs) // 2
    right = int((scores[:, 0] > scores[:, 1]).sum())
    print(f"held-out positives against what the retriever finds: the cross-encoder ranks {right} of {count} rightly, the "
          f"retriever {retriever}")
    if count < 20:
        raise ValueError(f"{count} held-out pairs are too few to try a cross-encoder on; give the sources of kind "
                         f"\"retrieval\" eval files with 20 or more")
    if right <= count / 2 + math.sqrt(count):  # chance: a half, with a standard deviation of sqrt(count) / 2
        raise ValueError(f"cross-encoder {name}: ranks {right} of {count} held-out pairs rightly, no better than chance; train "
                         f"it longer (--judge-steps), or give another")
    return judge


def cross_encoder(args: argparse.Namespace) -> None:
    """Trains a cross-encoder from an encoder, and says how well it ranks held-out pairs."""
    sources, _ = open_sources(args)
    embed = search.Embedder(args.retriever or args.model, args.max_length, args.micro_tokens, args.chunk)
    work = search.Work(args.out, identity(args, sources, embed.encoder, model.load(args.model)[0]))
    judge, known = work.directory / "cross-encoder", known_positives(sources)
    searched = [source for source in sources if source.kind == "retrieval"]
    if not judge.is_dir():
        train_judge(args.model, [search.Retriever(source, known, embed, work) for source in searched], args, judge)
    open_judge(judge, searched, embed, args)
    work.finish(partial(shutil.copytree, judge, dirs_exist_ok=True))


def mine(args: argparse.Namespace) -> None:
    """Gives every row --negatives: of what the retriever finds, the hardest that the cross-encoder scores below the positive by
    --margin; where there are fewer, and for sources of kind "similarity", random ones."""
    sources, entries = open_sources(args)
    embed = search.Embedder(args.retriever, args.max_length, args.micro_tokens, args.chunk)
    given = [model.load_cross_encoder(args.cross_encoder)[0]] if args.cross_encoder else []
    work = search.Work(args.out, identity(args, sources, embed.encoder, *given))
    rows, N = draw(sources, args.rows, args.seed), args.negatives
    known = known_positives(sources)
    retrievers = {source.name: search.Retriever(source, known, embed, work) for source in sources}
    searched, judge, trained = [s for s in sources if s.kind == "retrieval"], None, work.directory / "cross-encoder"
    if searched:
        if not args.cross_encoder and not trained.is_dir():
            print(f"no --cross-encoder: training one from {args.retriever}")
            train_judge(args.retriever, [retrievers[source.name] for source in searched], args, trained)
        judge = open_judge(args.cross_encoder or trained, searched, embed, args)

    mined_row = np.dtype([("score", "<f4"), ("candidates", "<u4"), ("rejected", "<u4"), ("hard", "<u4"),
                          ("negatives", NEGATIVE, N)])

    def mine_rows(source: data.Source, ids: np.ndarray) -> np.ndarray:
        retriever, found = retrievers[source.name], np.zeros(len(ids), mined_row)
        which, barred = retriever.barred(ids)
        taken = [set() for _ in ids]  # what is no random negative
        for i, place in zip(which, barred):
            taken[i].add(place)
        if source in searched:
            read, (places, cosines) = [source.read(i) for i in ids], retriever(ids, args.candidates)
            there = np.argwhere(np.isfinite(cosines))
            pairs = [row[:2] for row in read] + [(read[i].query, retriever.pool.text(places[i, j])) for i, j in there]
            scores = judge(pairs)
            found["score"] = scores[: len(ids)]
            for (i, j), score in zip(there, scores[len(ids) :]):  # row by row, the nearest first
                row = found[i]
                taken[i].add(places[i, j])
                row["candidates"] += 1
                if not score < row["score"] - max(args.margin, EQUAL):
                    row["rejected"] += 1
                elif row["hard"] < N:
                    row["negatives"][row["hard"]] = places[i, j], j + 1, cosines[i, j], score
                    row["hard"] += 1
        for i, row in enumerate(found):
            rng = np.random.default_rng([args.seed, formats.key(source.name), int(ids[i])])
            if len(retriever.pool) - len(taken[i]) < N - row["hard"]:
                raise ValueError(f"source {source.name}, row {ids[i]}: {row['hard']} negatives found and "
                                 f"{len(retriever.pool) - len(taken[i])} texts to draw from, but --negatives {N}; lower it")
            for slot in range(row["hard"], N):
                while (place := int(rng.integers(len(retriever.pool)))) in taken[i]:
                    pass
                taken[i].add(place)
                row["negatives"][slot] = place, 0, 0, 0
        return found

    report, mined = Report("rows", "candidates", "rejected", "", "topped up", "random"), {}
    for source in sources:
        ids = rows[source.name]
        mined[source.name] = found = np.concatenate([np.empty(0, mined_row), *(
            np.load(work.keep(f"mined-{source.name}-{start}", partial(mine_rows, source, ids[start : start + ROWS_AT_ONCE])))
            for start in tqdm(range(0, len(ids), ROWS_AT_ONCE), unit="chunk", desc=source.name))])
        tried, rejected, random = int(found["candidates"].sum()), int(found["rejected"].sum()), N - found["hard"].astype(int)
        report.row(source.name, len(ids), tried, rejected, f"{rejected / max(tried, 1):.1%}", int((random > 0).sum()),
                   int(random.sum()))
        say_if_few(report, args, source, ids, "or raise --rows")

    def with_negatives(source: data.Source) -> Iterator[dict]:
        for i, found in zip(rows[source.name], mined[source.name]):
            row, pool = source.read(i), retrievers[source.name].pool
            chosen = found["negatives"]
            origins = [{"from": "retriever", "rank": int(n["rank"]), "cosine": round(float(n["cosine"]), 4),
                        "score": round(float(n["score"]), 4)} for n in chosen[: found["hard"]]]
            yield {"query": row.query, "positive": row.positive,
                   **({"positive_score": round(float(found["score"]), 4)} if source in searched else {}),
                   "negatives": [pool.text(place) for place in chosen["place"]],
                   "mined": origins + [{"from": "random"}] * (N - found["hard"])}

    def write(part: Path) -> None:
        write_sources(part, entries, sources, report, lambda source: {"path": with_negatives(source)})
        if trained.is_dir():
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
    add = added["filter"]
    add("--model", metavar="NAME_OR_DIR", required=True, help="the encoder that has to find the target (all-MiniLM-L6-v2 in "
                                                              "Jina Embeddings v1)")
    add("--pool", type=int, default=1_000_000, help="random targets that a target must stand out from (v1's)")
    add("--top-k", type=int, default=2, help="a pair stays if its target is among so many (v1's)")
    add("--rows", type=int, help="work on so many rows, drawn by the sources' rates; unset: all")
    for name in "cross-encoder", "mine":
        add = added[name]
        add("--candidates", type=int, default=50, help="what the retriever finds per query (ours)")
        add("--judge-steps", type=int, default=300, help="steps of training a cross-encoder (ours)")
        add("--judge-batch-size", type=int, default=32, help=f"queries a step, each with its positive and {JUDGE_NEGATIVES} "
                                                            f"candidates (ours)")
        add("--judge-lr", type=float, help="peak learning rate of a cross-encoder; unset: 1e-3 to width 256, else 5e-5 (ours)")
    added["cross-encoder"]("--model", metavar="NAME_OR_DIR", required=True, help="the encoder to begin with")
    added["cross-encoder"]("--retriever", metavar="NAME_OR_DIR", help="finds the candidates; unset: --model")
    add = added["mine"]
    add("--retriever", metavar="NAME_OR_DIR", required=True, help="the bi-encoder that finds candidates")
    add("--cross-encoder", metavar="NAME_OR_DIR", help="a sequence-classification model with one logit (ms-marco-MiniLM-L-6-v2 "
                                                       "in v1); unset: one is trained from --retriever")
    add("--margin", type=float, default=0.0, help="a negative's score is lower than the positive's by more (paper; v1: 0.2)")
    add("--negatives", type=int, default=15, help="negatives per row (the paper's)")
    add("--rows", type=int, help="work on so many rows, drawn by the sources' rates; unset: all")
    for name in "filter", "mine":
        added[name]("--batch-size", type=int, default=4096 if name == "filter" else 256,
                    help="train.py's, to say at once which source would be too small for it")
    args = parser.parse_args(argv)
    at_least_1 = ("rows", "pool", "top_k", "candidates", "negatives", "batch_size", "chunk", "micro_tokens", "judge_steps",
                  "judge_batch_size")
    for flags, good, expected in ((at_least_1, lambda x: x >= 1, "1 or more"), (["seed"], lambda x: x >= 0, "0 or more"),
                                  (["margin"], lambda x: 0 <= x < 1, "at least 0 and less than 1: scores are from 0 to 1"),
                                  (["judge_lr"], lambda x: 0 < x < math.inf, "a number above 0")):
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
