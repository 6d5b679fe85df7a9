"""Trains an embedding model as §5 of Jina Embeddings 2 (arXiv 2310.19923) does: stage 2 on pairs, stage 3 with negatives.

    python train.py --stage 2 --batch-size 4096

composes the four other modules: source-wise batches (data.py, §5.1), the pooled encoder (model.py, §5), equations (4) and
(5) (losses.py), large batches in little memory (memory.py, §5.3). It knows how none of them does it.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
import data
import evaluate
import losses
import memory
import model


def parse_arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("losses (§5.1, §5.2)").add_argument
    add("--stage", type=int, choices=(2, 3), default=2, help="2: pairs, equation (4). 3: pairs with negatives, equation (5)")
    add("--tau", type=float, default=0.05, help="temperature (the paper's)")
    add("--negatives", type=int, default=15, help="negatives per row in stage 3 (the paper's)")
    add = parser.add_argument_group("data (§5.1)").add_argument
    add("--sources", metavar="MANIFEST", help="JSON list of sources; unset: documentation of the installed packages")
    add("--batch-size", type=int, default=4096, help="rows of the global batch (ours; v1 has 8,192, jina-clip-v1 32,768)")
    add("--max-length", type=int, default=128, help="tokens per text (ours; ALiBi lets the model embed 8,192 all the same)")
    add("--seed", type=int, default=0, help="of weights, batches and dropout")
    add = parser.add_argument_group("model (§5)").add_argument
    add("--model", default="tiny", help=f"directory or hub name, or {', '.join(model.SIZES)} with random weights (tiny is ours)")
    add("--dropout", type=float, help="unset: the model's own (0.1 in JinaBERT)")
    add = parser.add_argument_group("memory (§5.3)").add_argument
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of matrix products; auto: bf16 where it is fast")
    add("--micro-tokens", type=int, default=16384, help="tokens of one forward pass, padding included (ours)")
    add("--checkpoint-layers", action="store_true", help="keep only the layers' inputs, compute the rest again (the paper's)")
    add = parser.add_argument_group("run").add_argument
    add("--steps", type=int, default=40, help="optimizer steps (ours: some minutes on two CPU cores)")
    add("--lr", type=float, help="peak learning rate; unset: LR_RANDOM or LR_PRETRAINED of train.py")
    add("--warmup", type=float, default=0.1, help="share of the steps with rising rate, before it falls linearly to 0 (ours)")
    add("--weight-decay", type=float, default=0.01, help="of AdamW (Nomic Embed's)")
    add("--clip", type=float, default=1.0, help="bound on the gradient norm (Nomic Embed's)")
    add("--out", metavar="DIR", help="unset: the next free runs/NNN")
    add("--save-every", type=int, default=20, help="steps between checkpoints (ours)")
    add("--eval-every", type=int, help="steps between evaluations, beside those before and after; unset: half of --steps")
    add("--resume", action="store_true", help="go on from the newest checkpoint of --out, or of the newest runs/NNN")
    ...
