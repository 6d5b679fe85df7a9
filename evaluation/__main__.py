"""The metrics of an encoder on a file of yours, or on a collection of BEIR's, as one JSON line.

    --pairs     a query and its target, among all targets    recall@1, recall@10, MRR, nDCG@10
    --scored    two sentences and a human score              Spearman's correlation of cosine, score
    --labelled  a text and its class                         V-measure of k-means clusters
    --beir      queries, documents, graded judgements        nDCG@10, recall@100, MRR@10
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

import model
from corpora.convert import judgements, read_rows
from corpora.convert import read as read_values
from corpora.formats import Columns, listed, shown, text_of
from corpora.prompts import check_file, describe_prompts, parse_prompts
from evaluation import beir
from evaluation.embed import MAX_LENGTH, MICRO_TOKENS
from evaluation.metrics import clustering, retrieval, similarity
from plumbing import model_directory
from plumbing.refusals import run_command

KINDS = {"text": (str,), "a finite number": (int, float), "text or a whole number": (str, int)}
SCORED = {"sentence1": "text", "sentence2": "text", "score": "a finite number"}
LABELLED = {"text": "text", "label": "text or a whole number"}


def read_fields(path: str, fields: dict[str, str]) -> list[tuple]:
    """Lines {"field": value, ...} or [value, ...], or rows of a table, as tuples in the order of
    `fields`: {name: one of KINDS}. Raises ValueError naming file, line and field."""
    parsed = read_values(Path(path), lambda value: [parse_fields(value, fields)])
    return [row for _, rows in parsed for row in rows]


def parse_fields(value: object, fields: dict[str, str]) -> tuple:
    if isinstance(value, list):
        value = dict(zip(fields, value))
    if not isinstance(value, dict):
        raise ValueError(f"found {shown(value)}, expected a list or an object")
    for name in fields:
        if name not in value:
            raise ValueError(f'field "{name}" is missing; found {listed(value)}')
    return tuple(parse_field(name, value[name], kind) for name, kind in fields.items())


def parse_field(name: str, value: object, kind: str) -> str | int | float:
    if isinstance(value, str):
        value = text_of(value, name)
        if str not in KINDS[kind]:
            with suppress(ValueError):  # a cell of a CSV file
                value = float(value)
    finite = not isinstance(value, float) or math.isfinite(value)
    if type(value) not in KINDS[kind] or not finite:  # type: true is no number
        raise ValueError(f'field "{name}": found {shown(value)}, expected {kind}')
    return str(value) if str in KINDS[kind] else value


def read(args: argparse.Namespace) -> tuple[str, list | beir.Collection, Callable]:
    """The file or directory that is given, what is in it, and what measures an encoder on that."""
    if "beir" in args:
        return args.beir, beir.read(args.beir, args.split), beir.retrieval
    if "pairs" in args:
        path, metrics_of = str(judgements(Path(args.pairs), "test")), retrieval
        rows = list(read_rows(path))
    elif "scored" in args:
        path, rows, metrics_of = args.scored, read_fields(args.scored, SCORED), similarity
    else:
        path, rows = args.labelled, read_fields(args.labelled, LABELLED)
        metrics_of = partial(clustering, seed=args.seed)
    if not rows:
        raise ValueError(f"{path}: found no row; write one JSON value a line")
    if metrics_of is not retrieval and len({value for *_, value in rows}) < 2:
        raise ValueError(f"{path}: found {rows[0][-1]!r} on every line; give two different scores "
                         f"or labels at least")
    return path, rows, metrics_of


def measure(args: argparse.Namespace) -> dict:
    """Reads what is given, opens the model and measures it. Raises OSError or ValueError, one line
    each."""
    given = parse_prompts(args.prompts)  # raises, before the model opens
    path, rows, metrics_of = read(args)
    encoder, tokenizer = model.load(args.model)
    encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    prompts, whose = given, "--prompts"
    if given is None:
        one_sided = "scored" in args or "labelled" in args
        prompts, whose = model_directory.prompts_for(encoder, one_sided), "the model's"
    if "pairs" in args:
        check_file(Path(path), prompts, Columns())
    line = describe_prompts(prompts, whose, encoder.prompts)
    print(f"{args.model}: {model_directory.describe(encoder)}; {line}", file=sys.stderr)
    found = metrics_of(encoder, tokenizer, rows, args.max_length, args.micro_tokens, prompts)
    return {"model": args.model, "file": path, **found}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation", description="Metrics of an encoder, as one JSON line.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="directory or hub name")
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    file = {"metavar": "FILE", "default": argparse.SUPPRESS}
    add("--pairs", **file, help="retrieval: any layout of pairs that train.py reads")
    add("--scored", **file,
        help='similarity: lines {"sentence1", "sentence2", "score"} or lists of them')
    add("--labelled", **file, help='clustering: lines {"text", "label"} or lists of them')
    add("--beir", metavar="DIR", default=argparse.SUPPRESS,
        help="retrieval with graded judgements: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv")
    add = parser.add_argument
    add("--split", default="test", help="of --beir's judgements")
    add("--max-length", type=int,
        help=f"tokens of a text; unset: {MAX_LENGTH} (the paper's pre-training length), or what "
             f"the model takes if that is less")
    add("--prompts", metavar="JSON",
        help='{"query": "...", "document": "..."}, put before every text; --scored and --labelled '
             'take the query\'s; unset: the model\'s, for these two its default, if any')
    add("--micro-tokens", type=int, default=MICRO_TOKENS,
        help="tokens of a forward pass; ours, for memory only")
    add("--seed", type=int, default=0, help="of k-means; ours")
    args = parser.parse_args(argv)
    if (args.max_length or 3) < 3 or args.micro_tokens < 1 or not 0 <= args.seed < 1 << 32:
        parser.error("--max-length is at least 3, [CLS], a token and [SEP], --micro-tokens at "
                     "least 1, and --seed a number of 32 bits")
    run_command("evaluation", lambda: print(json.dumps(measure(args))),
                memory="lower --micro-tokens or --max-length")


if __name__ == "__main__":
    main()
