"""all-MiniLM-L6-v2 adapted to a domain, as a user would do it, and what that costs it elsewhere.

    python -m experiments.domain [--only ARM ...] [--seeds N] [--out DIR]

The domain: symptoms, in a BEIR directory: 16,449 entries of the Human Phenotype Ontology, and their
synonyms as queries. A tenth of the entries, all synonyms of an entry with it, is the test split.
The other domain, never trained on: 3,720 news articles, and their titles as queries. Both are made
of what corpora.wheels downloads. Every command is printed, so that it can be typed; a run that is
there is not run again.
"""

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from corpora import wheels
from corpora.convert import read_rows
from plumbing.files import publish

SYMPTOMS, NEWS = "symptoms", "news"
ROWS = 512  # a batch; 18 of them are half of the train split
GENERAL = "icd", "esco_skills", "bible", "dictionary", "chitchat"  # those of enough rows


# collections

def write_collection(folder: Path, documents: dict[str, str], pairs: list[tuple[str, str]],
                     tested: int) -> None:
    """A BEIR directory. documents: {text: title}; pairs: queries and the texts of their documents;
    tested: of 256 documents, by hash, how many have their queries in the test split."""
    numbers = {text: f"d{number}" for number, text in enumerate(documents)}
    queries, judged = {}, {"train": {}, "test": {}}
    for query, text in pairs:
        split = "test" if hashlib.sha256(text.encode()).digest()[0] < tested else "train"
        number = queries.setdefault((split, query), f"q{len(queries)}")
        judged[split][f"{number}\t{numbers[text]}\t1"] = None
    write_lines(folder / "corpus.jsonl", [{"_id": numbers[text], "title": title, "text": text}
                                          for text, title in documents.items()])
    write_lines(folder / "queries.jsonl", [{"_id": number, "text": query}
                                           for (_, query), number in queries.items()])
    (folder / "qrels").mkdir()
    for split, lines in judged.items():
        text = "\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n"
        (folder / "qrels" / f"{split}.tsv").write_text(text, encoding="utf-8")


def write_lines(path: Path, values: list[dict]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


def write_collections(part: Path) -> None:
    """Both collections, the manifest of the domain alone, and that with general sources."""
    built = wheels.build()

    def pairs(name: str) -> list[tuple[str, str]]:
        return [row[:2] for row in read_rows(built.parent / f"{name}.jsonl")]

    titles = {definition: term for term, definition in pairs("hpo_term_definition")}
    synonyms = [(query, text) for query, text in pairs("hpo_synonym_definition") if text in titles]
    articles = pairs("news_article")
    for name, documents, found, tested in (
            (SYMPTOMS, titles, synonyms, 26), (NEWS, {text: "" for _, text in articles}, articles,
                                               256)):
        (part / name).mkdir()
        write_collection(part / name, documents, found, tested)
    domain = {"name": SYMPTOMS, "path": SYMPTOMS, "eval": SYMPTOMS, "rate": 2}
    general = [entry | {"path": str(built.parent / entry["path"])}
               for entry in json.loads(built.read_text(encoding="utf-8"))
               if entry["name"] in GENERAL]
    total = sum(entry["rate"] for entry in general)
    general = [entry | {"rate": entry["rate"] / total} for entry in general]  # a third of batches
    for name, manifest in (("alone", [domain]), ("mixed", [domain, *general])):
        (part / f"{name}.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


# arms

def run(*arguments: object) -> str:
    """Prints the command, runs it, and gives back what it wrote to stdout."""
    command = [str(argument) for argument in arguments]
    print("python", *(f"'{part}'" if " " in part else part for part in command), flush=True)
    return subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE,
                          text=True).stdout


def train(out: Path, *flags: object) -> Path:
    """The model of a run, which is not run again where it is there; half a run is begun anew."""
    if not (out / "model").is_dir():
        shutil.rmtree(out, ignore_errors=True)
        run("train.py", *flags, "--out", out)
    return out / "model"


def arms(folder: Path, seed: int, minilm: Path) -> dict:
    """{name: what gives the model}: an arm is run when it is asked for."""
    def stage_2(name: str, manifest: str, *flags: object) -> Path:
        return train(folder / f"{name}-{seed}", "--model", minilm, "--sources",
                     folder / f"{manifest}.json", "--batch-size", ROWS, "--seed", seed, *flags)

    def domain() -> Path:
        return stage_2("alone", "alone", "--steps", 18)

    def fast() -> Path:
        return stage_2("fast", "alone", "--steps", 18, "--lr", "2e-4")

    def mixed() -> Path:
        return stage_2("mixed", "mixed", "--steps", 27, "--lr", "2e-4")

    def stage_3() -> Path:
        alone, judge, mined = (folder / x for x in ("alone.json", "cross-encoder", "mined"))
        if not judge.is_dir():  # once, as what is mined, by the first seed's model
            run("-m", "curation", "cross-encoder", "--sources", alone, "--model", domain(),
                "--steps", 60, "--out", judge)
        if not mined.is_dir():
            run("-m", "curation", "mine", "--sources", alone, "--retriever", domain(),
                "--cross-encoder", judge, "--rows", 2048, "--candidates", 20, "--margin", 0.2,
                "--out", mined)
        return train(folder / f"negatives-{seed}", "--stage", 3, "--model", domain(), "--sources",
                     mined / "manifest.json", "--batch-size", 128, "--steps", 8, "--seed", seed)

    return {"as it is": lambda: minilm, "stage II": domain, "stage II, lr 2e-4": fast,
            "the same, general sources mixed in": mixed, "stage II, then III": stage_3}


def measure(model: Path, folder: Path) -> dict[str, dict]:
    """{collection: metrics of its test split}, kept beside the model's run."""
    kept = folder / f"{model.parent.name}.metrics.json"
    if not kept.is_file():
        found = {name: json.loads(run("-m", "evaluation", model, "--beir", folder / name,
                                      "--max-length", 128)) for name in (SYMPTOMS, NEWS)}
        kept.write_text(json.dumps(found), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def shown(values: list[float]) -> str:
    mean, least, most = statistics.mean(values), min(values), max(values)
    return f"{mean:.3f}" + (f" ({least:.3f} to {most:.3f})" if most > least else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(arms(Path(), 0, Path()))
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="ARM",
                        help=", ".join(names))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/domain"))
    args = parser.parse_args()
    if not args.out.is_dir():
        publish(args.out, write_collections, replace=False)
    minilm, found = wheels.build_model(), {name: [] for name in args.only}
    for seed in range(args.seeds):
        for name in args.only:
            model = arms(args.out, seed, minilm)[name]()
            found[name].append(measure(model, args.out))
    print(f"\n| | {SYMPTOMS}: nDCG@10 | recall@100 | {NEWS}: nDCG@10 | recall@100 |\n"
          "| --- | --- | --- | --- | --- |")
    for name, metrics in found.items():
        cells = [shown([one[collection][metric] for one in metrics])
                 for collection in (SYMPTOMS, NEWS) for metric in ("ndcg@10", "recall@100")]
        print("|", " | ".join([name, *cells]), "|")


if __name__ == "__main__":
    main()
