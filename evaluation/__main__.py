"""Metrics: how good an encoder's embeddings are on texts that it was not trained on.

    --pairs     a query and its target, among all targets    recall@1, recall@10, MRR, nDCG@10
    --scored    two sentences and a human score              Spearman's correlation of cosine and score
    --labelled  a text and its class                         V-measure of k-means clusters

Paper: §6 reports MTEB, whose main figures for retrieval, similarity and clustering are nDCG@10,
Spearman and V-measure. Ours: the same figures on your own files. train.py calls `in_batch_accuracy`
and `retrieval` during a run.

Axis letters: M queries or texts, K targets or clusters, D width. Nothing here knows about losses,
optimizers, sources or distributed ranks: a rank in this file is a place in a list of search
results.
"""

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path

import torch

import model
from corpora import formats
from evaluation.metrics import clustering, retrieval, similarity

KINDS = {"text": (str,), "a finite number": (int, float), "text or a whole number": (str, int)}


def read_fields(path: str, **fields: str) -> list[tuple]:
    """Lines {"field": value, ...} or [value, ...] of a .jsonl or .jsonl.gz file, as tuples in the
    order of `fields`, each one of KINDS. Raises ValueError naming file, line and field."""
    def check(value, name):
        value = formats.text_of(value, name) if isinstance(value, str) else value
        if type(value) not in KINDS[fields[name]] or isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f'field "{name}": found {json.dumps(value)[:40]}, expected {fields[name]}')
        return str(value) if str in KINDS[fields[name]] else value

    def parse(value):
        value = dict(zip(fields, value)) if isinstance(value, list) else value
        if not isinstance(value, dict):
            raise ValueError(f"found {json.dumps(value)[:40]}, expected a list or an object")
        return [tuple(check(value.get(name), name) for name in fields)]

    return [row for _, rows in formats.read_lines(Path(path), parse) for row in rows]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Metrics of an encoder, as one JSON line.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="directory or hub name")
    file, flag = parser.add_mutually_exclusive_group(required=True), dict(metavar="FILE", default=argparse.SUPPRESS)
    file.add_argument("--pairs", **flag, help="retrieval: any layout of pairs that train.py reads")
    file.add_argument("--scored", **flag, help='similarity: lines {"sentence1", "sentence2", "score"} or lists of them')
    file.add_argument("--labelled", **flag, help='clustering: lines {"text", "label"} or lists of them')
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a text; ours: the paper's pre-training "
                        "length, and the most that an ordinary BERT takes. A JinaBERT takes any")
    parser.add_argument("--micro-tokens", type=int, default=16384, help="tokens of a forward pass; ours, for memory only")
    parser.add_argument("--seed", type=int, default=0, help="of k-means; ours")
    args = parser.parse_args(argv)
    if args.max_length < 3 or args.micro_tokens < 1:
        parser.error("--max-length is at least 3, [CLS], a token and [SEP], and --micro-tokens at least 1")
    try:
        if "pairs" in args:
            path, measure, rows = args.pairs, retrieval, list(formats.read_rows(args.pairs))
        elif "scored" in args:
            path, measure = args.scored, similarity
            rows = read_fields(path, sentence1="text", sentence2="text", score="a finite number")
        else:
            path, measure = args.labelled, partial(clustering, seed=args.seed)
            rows = read_fields(path, text="text", label="text or a whole number")
        if not rows:
            raise ValueError(f"{path}: found no row; write one JSON value a line")
        if measure is not retrieval and len({value for *_, value in rows}) < 2:
            raise ValueError(f"{path}: found {rows[0][-1]!r} on every line; give two different scores or labels at least")
        encoder, tokenizer = model.load(args.model)
        encoder.to("cuda" if torch.cuda.is_available() else "cpu")
        found = measure(encoder, tokenizer, rows, args.max_length, args.micro_tokens)
    except (OSError, ValueError) as error:
        print("evaluation:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    print(json.dumps({"model": args.model, "file": path, **found}))


if __name__ == "__main__":
    main()
