"""The README.md beside a trained model: its card, as the Hugging Face hub and sentence-transformers
read it. The text is in model_card.md; here are its fields.

A card may be published: nothing in it speaks of the machine, and of a path it has the last part.
"""

import argparse
import json
import re
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import ModelCardData, metadata_load, snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id

import data
import model
from plumbing.files import publish
from plumbing.model_directory import Dense
from plumbing.run import held_out_table, label

TEMPLATE = Path(__file__).with_name("model_card.md")
# The other flags change where and how fast the same update is made.
DECIDING = ("stage", "model", "sources", "batch_size", "negatives", "max_length", "prompts",
            "steps", "lr", "tau", "dropout", "warmup", "weight_decay", "clip", "precision", "seed")


def publish_with_card(directory: Path, write_model: Callable[[Path], None], fields: dict,
                      evaluations: list[dict]) -> None:
    """The model and its card in one folder, whole or not at all. fields: of `card_fields`."""
    def write(part: Path) -> None:
        write_model(part)
        table = textwrap.indent(held_out_table(evaluations), "    ")
        text = TEMPLATE.read_text(encoding="utf-8").format(evaluation=table, **fields)
        (part / "README.md").write_text(text, encoding="utf-8")

    publish(directory, write)


def card_fields(encoder: model.PooledEncoder, tokenizer, batches: data.SourceBatches,
                manifest: str, args: argparse.Namespace, peak: float) -> dict:
    """The template's fields, but for the evaluation. They are taken when a run begins: what they
    are read from may be gone when it ends. peak: the learning rate."""
    is_jina = isinstance(encoder.backbone, model.JinaBertModel)
    name, bases, origin = comes_from(args.model)
    tags = ["sentence-transformers", "sentence-similarity", "feature-extraction"]
    metadata = ModelCardData(
        library_name="sentence-transformers", pipeline_tag="sentence-similarity",
        tags=tags + ["custom_code"] if is_jina else tags, base_model=bases or None)
    widths = [encoder.backbone.config.hidden_size]
    widths += [layer.linear.out_features for layer in encoder.head if isinstance(layer, Dense)]
    longest = tokenizer.model_max_length
    warning = ("Without `trust_remote_code=True`, other tools build a plain BERT with random "
               "weights.\nWith it, they run the model.py in this folder.\n\n")
    stage = f"stage III (§5.2: pairs with {args.negatives} negatives each, equation (5))"
    if args.stage == 2:
        stage = "stage II (§5.1: pairs, equation (4))"
    return {
        "metadata": metadata.to_yaml(), "kind": type(encoder.backbone).__name__,
        "pooling": " and ".join([f"{encoder.pooling} pooling",
                                 *(type(layer).__name__ for layer in encoder.head)]),
        "width": widths[-1], "origin": origin, "stage": stage,
        "longest": f"{longest:,} tokens" if longest < 1 << 30 else "no limit",
        "max_length": args.max_length, "flag": ", trust_remote_code=True" if is_jina else "",
        "warning": warning if is_jina else "", "prompts": prompts_text(batches.sources),
        "sources": source_rows(batches, Path(manifest)),
        "command": command(args, name, Path(manifest), peak)}


def comes_from(name: str) -> tuple[str, list[str], str]:
    """Of --model: the name to show, the hub's names of what it derives from ([]: not known; the hub
    refuses paths), and a phrase."""
    if name in model.SIZES:
        return name, [], f"random weights ({name})"
    if not Path(name).is_dir() and is_fetched(name):
        return name, [name], f"[{name}](https://huggingface.co/{name})"
    shown = Path(name).resolve().name
    bases, phrase = bases_of(Path(name) / "README.md"), f"a local model, {plain(shown)}"
    if bases:
        phrase += f", which derives from {' and '.join(bases)}"
    return shown, bases, phrase


def is_fetched(name: str) -> bool:
    """Whether the hub gave us this model: a resumed run may look for a directory elsewhere."""
    try:
        snapshot_download(name, local_files_only=True)
    except (OSError, HFValidationError):  # the latter: a path
        return False
    return True


def bases_of(card: Path) -> list[str]:
    """The hub's names that a model's card gives as its base."""
    try:
        bases = metadata_load(card)["base_model"]
        bases = [bases] if isinstance(bases, str) else list(bases)
        for base in bases:
            validate_repo_id(base)
    except Exception:  # no card, no YAML, no such field, or a path
        return []
    return bases


def source_rows(batches: data.SourceBatches, manifest: Path) -> str:
    unknown = "not said"
    if is_default(manifest):
        unknown = "that of each Python package it is cut from"
    return "\n".join(
        f"| {plain(source.name)} | {len(batches.row_ids[source.name]):,} | {source.rate:g} "
        f"| {plain(source.licence or unknown)} |" for source in batches.sources)


def is_default(manifest: Path) -> bool:
    """Whether it is that of corpora/installed_docs.py, which a resumed run is given by its path."""
    return manifest.parent.name.startswith("installed_docs-")


def prompts_text(sources: list[data.Source]) -> str:
    prompts = {source.name: json.dumps(source.prompts._asdict(), ensure_ascii=False)
               for source in sources}
    if not any(any(source.prompts) for source in sources):
        return "It was trained without prompts."
    if len(set(prompts.values())) == 1:
        return ("It was trained with prompts, which `encode_query` and `encode_document` put "
                "before the texts:\n\n    " + prompts[sources[0].name])
    lines = [f"    {label(name)}: {prompt}" for name, prompt in prompts.items()]
    return ("It was trained with prompts that differ by source; "
            '`model.encode(texts, prompt="...")` takes yours:\n\n' + "\n".join(lines))


def command(args: argparse.Namespace, name: str, manifest: Path, peak: float) -> str:
    sources = None if is_default(manifest) else manifest.name
    values = vars(args) | {"model": name, "sources": sources, "lr": peak,
                           "negatives": args.negatives or None}
    words = ["python", "train.py"]
    for flag in DECIDING:
        if values[flag] is not None:
            words += [f"--{flag.replace('_', '-')}", str(values[flag])]
    return shlex.join(words)


def plain(text: object) -> str:
    """A label that Markdown, in a table too, shows as it is."""
    return re.sub(r"([\\`*<\[|])", r"\\\1", label(str(text)))
