"""Curates pairs before training: the filter of §5.1, the negatives of §5.2.

    python -m curation filter --model DIR --out filtered
        keeps the pairs whose target a model finds among many
    python -m curation mine --sources filtered/manifest.json --retriever DIR --out mined
        gives a row 15 negatives
    python -m curation cross-encoder --model DIR --out cross-encoder
        trains what `mine` otherwise trains for itself

A command writes OUT when all is done: sources, a manifest for train.py and a report (or a
cross-encoder). Until then OUT.work holds what is done, and the same command goes on there. What is
held out of a source becomes its `eval` file: it is neither kept as a pair nor ever a negative.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial

import data
from corpora.prompts import parse_prompts
from curation import reranker
from curation.filter import filter_pairs
from curation.mine import EQUAL, mine
from curation.reranker import make_cross_encoder
from plumbing.flags import LARGEST
from plumbing.refusals import run_command

COMMANDS = {"filter": filter_pairs, "cross-encoder": make_cross_encoder, "mine": mine}
AT_LEAST_1 = ("rows", "pool", "top_k", "candidates", "negatives", "batch_size", "chunk",
              "micro_tokens", "steps")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m curation", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    adders = {"filter": add_filter, "cross-encoder": add_cross_encoder, "mine": add_mine}
    for name, run in COMMANDS.items():
        text = " ".join(run.__doc__.split())
        command = commands.add_parser(name, description=text, help=text.split(".")[0],
                                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        add_common(command.add_argument)
        adders[name](command.add_argument)
    args = parser.parse_args(argv)
    check(args)
    return args


def add_common(add: Callable) -> None:
    add("--sources", metavar="MANIFEST",
        help="as train.py's; unset: the installed packages' documentation")
    add("--out", metavar="DIR", required=True, help="where the results go, whole or not at all")
    add("--max-length", type=int,
        help=f"tokens per text, and per query and passage together; unset: {data.MAX_LENGTH} "
             f"(ours), or what the bi-encoder takes if that is less")
    add("--prompts", metavar="JSON",
        help='{"query": "...", "document": "..."}, before every text that the bi-encoder embeds; '
             'unset: the manifest\'s, or else the model\'s')
    add("--micro-tokens", type=int, default=16384,
        help="bound on the tokens of one forward pass, for memory only (ours)")
    add("--chunk", type=int, default=8192,
        help="texts embedded, searched and kept at a time (ours)")
    add("--seed", type=int, default=0, help="of every draw")


def add_filter(add: Callable) -> None:
    add_rows(add, batch_size=4096)
    add("--model", metavar="NAME_OR_DIR", required=True,
        help="the encoder that has to find the target (all-MiniLM-L6-v2 in Jina Embeddings v1)")
    add("--pool", type=int, default=1_000_000,
        help="random targets that a target must stand out from (Jina Embeddings v1's)")
    add("--top-k", type=int, default=2, help="a pair stays if its target is among so many (v1's)")


def add_cross_encoder(add: Callable) -> None:
    add_candidates(add)
    add("--model", metavar="NAME_OR_DIR", required=True, help="the encoder to begin with")
    add("--retriever", metavar="NAME_OR_DIR", help="finds the candidates; unset: --model")
    add("--steps", type=int, default=reranker.STEPS,
        help=f"of {reranker.QUERIES} queries, each with its positive and {reranker.CANDIDATES} "
             f"candidates (ours)")
    add("--lr", type=float,
        help="peak learning rate; unset: 1e-3 up to width 256, else 5e-5 (ours)")


def add_mine(add: Callable) -> None:
    add_rows(add, batch_size=256)
    add_candidates(add)
    add("--retriever", metavar="NAME_OR_DIR", required=True,
        help="the bi-encoder that finds candidates")
    add("--cross-encoder", metavar="NAME_OR_DIR",
        help="a sequence-classification model with one logit (ms-marco-MiniLM-L-6-v2 in Jina "
             "Embeddings v1); unset: one is trained from --retriever")
    add("--margin", type=float, default=0.0,
        help=f"a negative's score is lower than the positive's by more (0: the paper's; 0.2: Jina "
             f"Embeddings v1's; differences up to {EQUAL} are none)")
    add("--negatives", type=int, default=15, help="negatives per row (the paper's)")


def add_rows(add: Callable, batch_size: int) -> None:
    add("--rows", type=int,
        help="work on so many rows, drawn by the sources' rates; unset: all")
    add("--batch-size", type=int, default=batch_size,
        help="train.py's, to say which source would be too small for it")


def add_candidates(add: Callable) -> None:
    add("--candidates", type=int, default=50, help="what the retriever finds per query (ours)")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for a flag whose value cannot be used."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    for name in AT_LEAST_1:
        if not 1 <= given.get(name, 1) < LARGEST:
            raise ValueError(f"--{name.replace('_', '-')} {given[name]}: expected 1 or more, and "
                             f"below 2^63")
    parse_prompts(args.prompts)
    if not 0 <= args.seed < LARGEST:
        raise ValueError(f"--seed {args.seed}: expected 0 or more, and below 2^63")
    if not 0 <= given.get("margin", 0) < 1:
        raise ValueError(f"--margin {args.margin}: expected at least 0 and less than 1: scores are "
                         f"from 0 to 1")
    if not 0 < given.get("lr", 1) < math.inf:
        raise ValueError(f"--lr {args.lr}: expected a number above 0")


def curate(argv: list[str] | None) -> None:
    args = parse_arguments(argv)
    COMMANDS[args.command](args)
    print(f"{args.out} is written")


def main(argv: list[str] | None = None) -> None:
    run_command("curation", partial(curate, argv),
                memory="lower --micro-tokens, --chunk, --candidates or --pool",
                stopped="stopped; the same command goes on from here")


if __name__ == "__main__":
    main()
