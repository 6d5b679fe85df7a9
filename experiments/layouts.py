"""Which rows can be trained on as they come, what is refused and how, and what opening a million of
them costs.

    python -m experiments.layouts
    python -m experiments.layouts --rows 1000000

The first prints two tables, in seconds: files of every layout, opened and drawn from as train.py
does, with what was read of them; and what is refused, or said, of others. It ends with status 1
where rows are not those that the example means, or where nothing is refused, or said. The second
writes that many rows of about 200 bytes in each kind of file, one kind at a time into TMPDIR, and
opens each twice, in a process of its own, up to the first batch and then for ten more. Memory is
the process's peak, mapped files included (its VmHWM: ru_maxrss would begin at that of the process
that started it). Parquet wants pyarrow, and is left out without it.
"""

import argparse
import csv
import gzip
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

import data
from corpora.prompts import check_prompts, choose_prompts
from plumbing.plan import memory_held, reset_peak

BATCH = 4096
CPU = torch.device("cpu")
PYARROW = find_spec("pyarrow") is not None


class Example(NamedTuple):
    """files: {name: text, or bytes as they are}; a Parquet file's as JSON lines. entry: what else
    the manifest says. rows: what it means, by hand: query, positive, negative ...; next row."""
    name: str
    files: dict[str, str | bytes]
    rows: str = ""
    entry: dict = {}
    negatives: int | None = None  # as SourceBatches takes it


def lines(*rows: str) -> dict[str, str]:
    return {"a.jsonl": "".join(row + "\n" for row in rows)}


TRIPLET = '{"query": "q1", "positive": "p1", "negative": "n1"}\n'
FLAG = '{"query": "q1", "pos": ["p1", "r1"], "neg": ["n1", "m1"]%s}'
LABELLED = ('{"sentence1": "q1", "sentence2": "p1", "label": 1}',
            '{"sentence1": "q2", "sentence2": "x2", "label": 0}')
BEIR = {"b/corpus.jsonl": '{"_id": "d1", "title": "T", "text": "p1"}\n'
                          '{"_id": "d2", "title": "", "text": "p2"}\n',
        "b/queries.jsonl": '{"_id": "1", "text": "q1"}\n{"_id": "2", "text": "q2"}\n',
        "b/qrels/train.tsv": "query-id\tcorpus-id\tscore\n1\td1\t1\n1\td2\t2\n2\td1\t0\n"}

LAYOUTS = [
    Example("query, positive, negatives", lines('["q1", "p1", "n1", "m1"]', '["q2", "p2", "n2"]',
                                                '["q3", "p3"]'),
            "q1, p1, n1, m1; q2, p2, n2; q3, p3"),
    Example("sets", lines('{"set": ["q1", "p1", "r1"]}'), "q1, p1; q1, r1"),
    Example("sentence-transformers' triplets",
            lines('{"anchor": "q1", "positive": "p1", "negative": "n1"}'), "q1, p1, n1"),
    Example("its miner's n-tuples, with scores", lines(
        '{"question": "q1", "answer": "p1", "negative_1": "n1", "negative_2": "m1", '
        '"negative_10": "o1", "scores": [0.9, 0.3, 0.2, 0.1]}'),
        "q1, p1, n1, m1, o1", {"ignore": "scores"}),
    Example("FlagEmbedding", lines(FLAG % ""), "q1, p1, n1, m1; q1, r1, n1, m1"),
    Example("the same, scored", lines(FLAG % (', "pos_scores": [0.9, 0.8], "neg_scores": [0, 0.1], '
                                              '"prompt": "Find: ", "type": "normal"')),
            "q1, p1, n1, m1; q1, r1, n1, m1",
            {"ignore": ["pos_scores", "neg_scores", "prompt", "type"]}),
    Example("Tevatron", lines(
        '{"query_id": "1", "query": "q1", "positive_passages": [{"docid": "d1", "title": "T", '
        '"text": "p1"}], "negative_passages": [{"docid": "d2", "title": "", "text": "n1"}]}'),
        "q1, T p1, n1"),
    Example("DPR", lines(
        '{"question": "q1", "answers": ["x"], "positive_ctxs": [{"title": "T", "text": "p1"}], '
        '"negative_ctxs": [], "hard_negative_ctxs": [{"title": "U", "text": "n1"}]}'),
        "q1, T p1, U n1"),
    *(Example(f"{a}, {b}", lines(f'{{"id": 7, "{a}": "q1", "{b}": "p1"}}'), "q1, p1")
      for a, b in [("question", "answer"), ("title", "abstract"), ("text1", "text2"),
                   ("comment", "code")]),
    Example("SNLI", lines('{"gold_label": "entailment", "sentence1": "q1", "sentence2": "p1"}',
                          '{"gold_label": "neutral", "sentence1": "q2", "sentence2": "x2"}'),
            "q1, p1"),
    Example("labelled pairs", lines(*LABELLED), "q1, p1", {"where": {"label": 1}}),
    Example("names of one's own", lines('{"headline": "q1", "body": "p1", "other": "n1"}'),
            "q1, p1, n1", {"query": "headline", "positive": "body", "negatives": "other"}),
    Example("Parquet", {"a.parquet": TRIPLET}, "q1, p1, n1"),
    Example("CSV", {"a.csv": 'question,answer\nq1,"p1, ""so"""\n'}, 'q1, p1, "so"'),
    Example("CSV, labelled, packed", {"a.csv.gz": "text1,text2,label\nq1,p1,1\nq2,x2,0\n"},
            "q1, p1", {"where": {"label": 1}}),
    Example("TSV", {"a.tsv": "anchor\tpositive\tnegative_1\nq1\tp1\tn1\nq2\tp2\t\n"},
            "q1, p1, n1; q2, p2"),
    Example("JSON lines, packed", {"a.jsonl.gz": TRIPLET}, "q1, p1, n1"),
    Example("a folder of shards", {"d/0.jsonl": '["q1", "p1"]\n', "d/1.csv": "query,pos\nq2,p2\n",
                                   "d/README.md": "of two kinds\n"},
            "q1, p1; q2, p2", {"path": "d"}),
    Example("a glob", {"d/train-0.jsonl": '["q1", "p1"]\n', "d/train-1.jsonl": '["q2", "p2"]\n',
                       "d/test-0.jsonl": '["x", "y"]\n'}, "q1, p1; q2, p2", {"path": "d/train-*"}),
    Example("BEIR", BEIR, "q1, T p1; q1, p2", {"path": "b"}),
]

REFUSED = [
    Example("a label", lines('{"anchor": "q1", "positive": "p1", "label": 1}',
                             '{"anchor": "q2", "positive": "p2", "label": 0}')),
    Example("a score", lines('{"sentence1": "q1", "sentence2": "p1", "score": 4.2}')),
    Example("a prompt", lines(FLAG % ', "prompt": "Find: "')),
    Example("a type", lines(FLAG % ', "type": "symmetric_sts"')),
    Example("names that are not known", lines('{"input": "q1", "output": "p1"}')),
    Example("two layouts", lines('{"query": "q1", "positive": "p1", "answer": "r1"}')),
    Example("a JSON array", lines("[", '{"query": "q1", "positive": "p1"}', "]")),
    Example("one on one line", lines('[{"query": "q1", "positive": "p1"}]')),
    Example("no positive", lines('{"query": "q1", "pos": []}')),
    Example("an empty positive", lines('["q1", " "]')),
    Example("an empty negative", lines('["q1", "p1", "n1", ""]')),
    Example("a number", lines('["q1", 7]')),
    Example("several queries", lines('{"query": ["q1", "q2"], "positive": "p1"}')),
    Example("two values on a line", lines('["q1", "p1"] ["q2", "p2"]')),
    Example("Latin-1", {"a.jsonl": '["q1", "é"]\n'.encode("latin-1")}),
    Example("the prompt in the text", lines('["query: q1", "p1"]'),
            entry={"prompts": {"query": "query: "}}),
    Example("a field that is not there", lines('["q1", "p1"]'), entry={"where": {"label": 1}}),
    Example("a value that no row has", lines(*LABELLED), entry={"where": {"label": "yes"}}),
    Example("--negatives 2", lines('["q1", "p1", "n1"]', '["q2", "p2", "n2"]'), negatives=2),
    Example("no such file", {}, entry={"path": "a.jsonl"}),
    Example("no such split", BEIR, entry={"path": "b", "split": "dev"}),
    Example("a split of one file", {"a.csv": "query,positive\nq1,p1\n"}, entry={"split": "test"}),
    Example("no such document", BEIR | {"b/corpus.jsonl": '{"_id": "d2", "text": "p2"}\n'},
            entry={"path": "b"}),
    Example("several splits", {"d/train.jsonl": '["q1", "p1"]\n', "d/test.jsonl": '["q2", "p2"]\n'},
            entry={"path": "d"}),
    Example("an open quote", {"a.csv": 'query,positive\nq1,"p1\nq2,p2\n'}),
    Example("a separator without quotes", {"a.csv": "query,positive\nq1,p1, so\n"}),
    Example("no header", {"a.tsv": "q1\tp1\nq2\tp2\n"}),
    Example("cut short", {"a.jsonl.gz": gzip.compress(TRIPLET.encode())[:-9]}),
    Example("no Parquet", {"a.parquet": b"query,positive\n"}),
]

SAID = [  # and read
    Example("the query is the positive", lines('["q1", "q1"]', '["q2", "p2"]')),
    Example("fields that are not known", lines('{"query": "q1", "positive": "p1", "stars": 5}')),
    Example("rows that are left out", lines(*LABELLED), entry={"where": {"label": 1}}),
    Example("--negatives 2", lines('["q1", "p1", "n1", "m1"]', '["q2", "p2", "n2"]'), negatives=2),
]


# examples

def open_as_train_does(manifest: Path, batch_size: int, negatives: int | None
                       ) -> data.SourceBatches:
    sources = data.load_sources(manifest)
    batches = data.SourceBatches(sources, batch_size, seed=0, negatives=negatives)
    choose_prompts(sources, None, {})
    check_prompts(sources)
    return batches


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow.parquet import write_table
        write_table(pyarrow.Table.from_pylist(list(map(json.loads, content.splitlines()))), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(content.encode()))
    else:
        path.write_text(content)


def write_manifest(folder: Path, entry: dict) -> Path:
    path = folder / "manifest.json"
    path.write_text(json.dumps([{"name": "a", **entry}]))
    return path


def read(example: Example) -> tuple[list[list[str]], str, str]:
    """The texts of each row, what was said, and with what it was refused, or "" each."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()) as out:
        for name, content in example.files.items():
            write(Path(folder, name), content)
        manifest = write_manifest(
            Path(folder), {"path": next(iter(example.files), ""), **example.entry})
        rows, refusal = [], ""
        try:
            batches = open_as_train_does(manifest, 1, example.negatives)
            source, = batches.sources
            drawn = [next(batches).rows[0] for _ in batches.row_ids[source.name]]  # an epoch
            rows = [[row.query, row.positive, *row.negatives]
                    for row in sorted(drawn, key=lambda row: row.id)]
        except (OSError, ValueError) as error:
            refusal = str(error)
    said, refusal = (text.replace(f"{folder}/", "") for text in (out.getvalue(), refusal))
    return rows, said, refusal


def shown(example: Example) -> str:
    """Its files and its manifest entry, as two cells of a table."""
    parts = []
    for name, content in example.files.items():
        if isinstance(content, bytes):
            packed = name.endswith(".gz")
            content = "(bytes)" if packed else content.decode(errors="backslashreplace")
        rows = content.replace("\t", "\\t").splitlines()
        parts.append("<br>".join([f"{name}:", *(f"`{row}`" for row in rows)]))
    entry = json.dumps(example.entry)[1:-1]
    return f"{'<br>'.join(parts)} | {f'`{entry}`' if entry else ''}"


def print_row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def print_examples() -> bool:
    """The two tables. -> whether all was as it is meant."""
    good = True
    print_row("layout", "files", "manifest", "rows", "queries", "positives", "negatives")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for example in can_be_read(LAYOUTS):
        rows, _, refusal = read(example)
        texts = [{row[0] for row in rows}, {row[1] for row in rows},
                 {text for row in rows for text in row[2:]}]
        print_row(example.name, shown(example), len(rows), *map(len, texts))
        found = "; ".join(", ".join(row) for row in rows)
        if found != example.rows:
            good = False
            print(f"WRONG: expected {example.rows}; found {found or refusal}")
    print()
    print_row("", "files", "manifest", "message")
    print("| --- | --- | --- | --- |")
    for examples, verb in ((REFUSED, "refused"), (SAID, "said")):
        for example in can_be_read(examples):
            _, said, refusal = read(example)
            message = refusal if verb == "refused" else said.strip().replace("\n", "<br>")
            print_row(f"{verb}: {example.name}", shown(example), message)
            if not message or verb == "said" and refusal:
                good = False
                print(f"WRONG: expected to be {verb}; found {refusal or 'nothing'}")
    return good


def can_be_read(examples: list[Example]) -> list[Example]:
    return [example for example in examples
            if PYARROW or not any(name.endswith(".parquet") for name in example.files)]


# a million rows

DIGITS = dict(zip(map(ord, "0123456789abcdef"), [
    "a ", "of ", "the ", "time ", "house ", "river ", "between ", "nothing ", "green ", "answer ",
    "language ", "to ", "which ", "small ", "written ", "seven "]))


def text(number: int, length: int) -> str:
    """Of 8 words for each of `length` odd factors; no two numbers below 2^32 have the same."""
    return "".join(f"{number * (2_654_435_761 + 2 * i) % 2**32:08x}".translate(DIGITS)
                   for i in range(length)).strip()


def pairs(rows: range) -> Iterator[tuple[str, str]]:
    return ((f"{text(i, 1)}?", f"{text(i, 3)}.") for i in rows)


def write_lines(path: Path, rows: range) -> None:
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
        for query, positive in pairs(rows):
            file.write(json.dumps({"query": query, "positive": positive}) + "\n")


def write_csv(path: Path, rows: range) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("query", "positive"), *pairs(rows)])


def write_parquet(path: Path, rows: range) -> None:
    import pyarrow
    from pyarrow.parquet import write_table
    write_table(pyarrow.table(list(zip(*pairs(rows))), ["query", "positive"]), path)


def write_beir(path: Path, rows: range) -> None:
    (path / "qrels").mkdir(parents=True)
    with (open(path / "corpus.jsonl", "w") as documents, open(path / "queries.jsonl", "w") as asked,
          open(path / "qrels" / "train.tsv", "w") as judged):
        judged.write("query-id\tcorpus-id\tscore\n")
        for i, (query, positive) in enumerate(pairs(rows)):
            documents.write(json.dumps({"_id": f"d{i}", "title": "", "text": positive}) + "\n")
            asked.write(json.dumps({"_id": f"q{i}", "text": query}) + "\n")
            judged.write(f"q{i}\td{i}\t1\n")


def write_shards(path: Path, rows: range) -> None:
    path.mkdir()
    for i in range(4):
        write_lines(path / f"{i}.jsonl", rows[i::4])


KINDS = {"rows.jsonl": write_lines, "rows.jsonl.gz": write_lines, "rows.parquet": write_parquet,
         "rows.csv": write_csv, "beir": write_beir, "shards": write_shards}


def open_once(manifest: Path, batch_size: int) -> dict[str, float]:
    """CPU seconds up to the first batch, and of each of ten more; and MB of the process before, and
    at its peak."""
    before, start = memory_held(CPU), time.process_time()
    reset_peak(CPU)
    batches = open_as_train_does(manifest, batch_size, 0)
    next(batches)
    first = time.process_time()
    for _ in range(10):
        next(batches)
    return {"seconds": first - start, "batch": (time.process_time() - first) / 10,
            "before": before / 1e6, "peak": memory_held(CPU, peak=True) / 1e6}


def in_a_process(manifest: Path, batch_size: int) -> dict[str, float]:
    """`open_once` in a process of its own."""
    command = [sys.executable, "-m", "experiments.layouts", "--open", manifest, "--batch-size",
               str(batch_size)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def print_costs(rows: int, kinds: list[str]) -> None:
    print_row("", "rows", "MB", "in .cache", "first opening: CPU seconds", "peak MB",
              "of these imports", "second opening: CPU seconds", "peak MB", "a batch: CPU seconds")
    print("| --- |" + " ---: |" * 9)
    for name, write_rows in KINDS.items():
        if name not in kinds or write_rows is write_parquet and not PYARROW:
            continue
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            write_rows(folder / name, range(rows))
            size = megabytes(folder)
            manifest = write_manifest(folder, {"path": name})
            first, second = (in_a_process(manifest, min(BATCH, rows // 2)) for _ in range(2))
            print_row(name, f"{rows:,}", f"{size:.0f}", f"{megabytes(folder / '.cache'):.0f}",
                      f"{first['seconds']:.1f}", f"{first['peak']:.0f}", f"{first['before']:.0f}",
                      f"{second['seconds']:.1f}", f"{second['peak']:.0f}",
                      f"{second['batch']:.3f}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="of each kind of file; unset: the examples")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND",
                        help=f"with --rows: of {', '.join(KINDS)}; unset: all")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.open:
        print(json.dumps(open_once(args.open, args.batch_size)))
        return
    if not PYARROW:
        print("Parquet is left out: it wants pyarrow; python -m pip install pyarrow\n")
    if args.rows:
        print_costs(args.rows, args.kinds)
    elif not print_examples():
        sys.exit(1)


if __name__ == "__main__":
    main()
