"""Flags of train.py that cannot work are refused before anything is built."""

import argparse
from pathlib import Path

import torch

import memory
import model
from corpora.prompts import parse_prompts


LARGEST = 1 << 63  # torch's integers end below it


def check_flags(args: argparse.Namespace, device: torch.device) -> None:
    """Raises ValueError for what cannot work, before anything is built."""
    above_0 = ("batch_size", "max_length", "memory", "steps", "save_every", "eval_every", "tau",
               "lr")
    at_least_0 = ("seed", "weight_decay", "clip")
    shares = ("dropout", "warmup")
    for flag in (*above_0, *at_least_0, *shares):
        value, name = getattr(args, flag), f"--{flag.replace('_', '-')}"
        if value is None:
            continue
        if flag in above_0 and not 0 < value < LARGEST:
            raise ValueError(f"{name} {value}: expected a number above 0, and below 2^63")
        if flag in at_least_0 and not 0 <= value < LARGEST:
            raise ValueError(f"{name} {value}: expected 0 or more, and below 2^63")
        if flag in shares and not 0 <= value < 1:
            raise ValueError(f"{name} {value}: expected at least 0 and less than 1")
    if not args.resume and args.model in model.SIZES and Path(args.model, "config.json").is_file():
        raise ValueError(f"--model {args.model}: a size, but also a directory here; ./{args.model} "
                         f"means the directory")
    if args.stage == 3 and args.negatives < 1:
        raise ValueError(f"--negatives {args.negatives}: expected a number above 0 in stage 3")
    if args.stage == 3 and not args.sources:
        raise ValueError("--stage 3: the default sources have no negatives; `python -m curation "
                         "mine` makes some, for --sources")
    memory.choose_precision(args.precision, device)  # raises; so do the next ones
    if args.zero is not None:
        memory.read_zero(args.zero)
    parse_prompts(args.prompts)
