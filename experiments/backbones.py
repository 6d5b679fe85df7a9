"""Do our vectors stay those of sentence-transformers, with other people's models?

    python -m experiments.backbones
        tiny random models of tests/zoo.py: 13 architectures, and a BERT in directories that say
        more than "mean"
    python -m experiments.backbones DIR ... --old FOLDER
        yours; FOLDER is what `pip install --target` made of another sentence-transformers with
        another transformers, for a second column

The least cosine between `embed` and sentence-transformers' `encode`, `encode_query` and
`encode_document` of the same texts: as the directory came, and of the directory that two steps of
train.py saved. "kept" is the largest difference that opening and saving that once more makes.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

import model
import train
from evaluation.embed import embed
from experiments.bench import lines_of
from plumbing.model_directory import prompts_for
from tests import zoo

TEXTS = ["a stone", "Every Lamp, and a table with 17 legs", "x", "rivers and markets " * 9]
CLS, LAST = {"pooling_mode_cls_token": True}, {"pooling_mode": "lasttoken"}
TANH = {"in_features": 32, "out_features": 16, "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh"}
DIRECTORIES = {
    "mean, Normalize": dict(after=[{}]), "cls": dict(pooling=CLS),
    "cls, Normalize": dict(pooling=CLS, after=[{}]), "lasttoken": dict(pooling=LAST),
    "Dense": dict(after=[TANH]), "cls, Dense, Normalize": dict(pooling=CLS, after=[TANH, {}]),
    "prompts": dict(prompts={"query": "query: ", "document": "passage: "}),
    "16 tokens, lower case": dict(transformer={"max_seq_length": 16, "do_lower_case": True}),
    "0_Transformer": dict(encoder="0_Transformer"), "dot": dict(similarity_fn_name="dot")}
# in a process of its own: which directories, where to -> {directory: three rows of vectors}
THEIRS = """
import json, sys, torch
from sentence_transformers import SentenceTransformer
found = {}
for directory in json.loads(sys.argv[1]):
    try:
        st = SentenceTransformer(directory, trust_remote_code=True, device="cpu")
        found[directory] = [encode(json.loads(sys.argv[2]), convert_to_tensor=True)
                            for encode in (st.encode, st.encode_query, st.encode_document)]
    except Exception as error:
        print(directory, type(error).__name__, str(error).splitlines()[0], file=sys.stderr)
torch.save(found, sys.argv[3])
"""


def theirs(directories: list[str], out: Path, overlay: str | None) -> dict[str, list]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(out.parent / "code")}
    if overlay:
        environment["PYTHONPATH"] = overlay
    command = [sys.executable, "-c", THEIRS, json.dumps(directories), json.dumps(TEXTS), out]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return torch.load(out)


def ours(encoder, tokenizer) -> list[torch.Tensor]:
    plain, both = (prompts_for(encoder, one_sided) for one_sided in (True, False))
    return [embed(encoder, tokenizer, TEXTS, prompt=prompt)
            for prompt in (plain.query, both.query, both.document)]


def least(a: list, b: list | None) -> str:
    if b is None:
        return "does not open"
    # in double precision, for 1 is written as 0.9999999 in single
    cosines = [F.cosine_similarity(x.double(), y.double()) for x, y in zip(a, b)]
    return f"{torch.cat(cosines).min():.6f}"


def trained(directory: str, out: Path, manifest: Path) -> Path:
    """Two steps -> what they saved. Raises ValueError where they did not end well."""
    flags = ["--model", directory, "--sources", manifest, "--batch-size", 16, "--steps", 2,
             "--precision", "fp32", "--lr", 1e-2, "--out", out]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            train.main([str(flag) for flag in flags])
    except SystemExit:
        raise ValueError(said.getvalue().splitlines()[-1]) from None
    return out / "model"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="*", metavar="DIR")
    parser.add_argument("--old", metavar="FOLDER")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if not args.directories:
            made = [zoo.make(name, folder / "zoo" / name) for name in zoo.ARCHITECTURES]
            made += [zoo.make_sentence_transformer(folder / "zoo" / name, **fields)
                     for name, fields in DIRECTORIES.items()]
            args.directories = list(map(str, made))
        rows = [[f"{i} about {text}", f"{text} number {i}"]
                for i in range(60) for text in TEXTS[:2]]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "rows.json").write_text('[{"name": "rows", "path": "rows.jsonl"}]')

        vectors, saved = {}, {}  # of all directories; and of those that came, where they are saved
        for number, directory in enumerate(args.directories):
            try:
                before = ours(*model.load(directory))
                out = trained(directory, folder / "runs" / str(number), folder / "rows.json")
                opened = model.load(out)
                model.save(*opened, folder / "again" / str(number))
                again = str(folder / "again" / str(number))
                vectors |= {directory: before, str(out): ours(*opened),
                            again: ours(*model.load(again))}
                saved[directory] = str(out), again
            except (OSError, ValueError) as error:
                print(error)
        versions = [None, args.old] if args.old else [None]
        theirs_of = [theirs([x for x in vectors], folder / "theirs.pt", overlay)
                     for overlay in versions]
        lines = []
        for directory, (out, again) in saved.items():
            change = max(float((a - b).abs().max())
                         for a, b in zip(vectors[out], vectors[again]))
            lines.append((
                Path(directory).name,
                *(least(vectors[directory], found.get(directory)) for found in theirs_of),
                f"{change:.0e}", *(least(vectors[out], found.get(out)) for found in theirs_of)))
        names = ["installed", "old"][: len(versions)]
        print(lines_of(("directory", *(f"as it came, {name}" for name in names), "kept",
                        *(f"trained and saved, {name}" for name in names)), lines))


if __name__ == "__main__":
    main()
