"""Is it fast and small on a GPU? The cells of experiments/gpu.py's parts `fast` and `small`.

All cells of a part are in one process: what they hold is freed in between. Sides are those of
experiments/bench.py: a step from texts to optimizer, at learning rate 0 and without dropout. The
seconds are those of the better of two steps (one, if it took over 2 s) after a first one, all over
different texts: the same again have no new shape for the GPU's libraries to plan for. GB are
the most that torch's tensors held; `reserved` is what torch had taken for that from the GPU.
"""

import gc
import math
import re
import time
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

import data
import losses
import memory
import model
from experiments import bench
from experiments.bench import Cell, clock, lines_of
from experiments.gpu_lab import Lab
from experiments.gpu_right import attended
from plumbing.ranks import Ranks

GPU_ONLY = "reserved memory, and what happens where memory runs out",
MINI_BATCHES = 32, 128, 512  # theirs, in texts, and in tokens
MINI_TOKENS = 16384, 65536
CHOSEN_AT = {128: 1024, 512: 512}  # pairs, at which theirs is chosen, by the tokens of a text
# by the tokens of a text at most: how short the positives are at least, as a share of it; at 128 as
# the pairs come, 35 tokens a text on average
LENGTHS = {512: 0.2, 8192: 1.0}
ONCE = 2.0  # seconds from which on a step is not taken twice
SHAPES = [("minilm", 128, 4096), ("base", 128, 4096), ("minilm", 128, 32768),
          ("minilm", 512, 4096), ("base", 512, 4096)]


# sides

class Counted(bench.Ours):
    """Also counts the operations of each part of a step."""

    counter = None

    def lap(self, name: str) -> None:
        super().lap(name)
        if self.counter:
            total = self.counter.get_total_flops()
            self.operations[name], self.counted = total - self.counted, total

    def count(self, rows: list[data.Row]) -> dict[str, int]:
        self.operations, self.counted = {}, 0
        with FlopCounterMode(display=False) as self.counter:
            self.step(rows)
        self.counter = None
        return self.operations


class Theirs(bench.Theirs):
    """setting: texts of a mini-batch; or, beyond 1,000, tokens."""

    def __init__(self, cell: Cell, path):
        texts = min(cell.setting, max(MINI_BATCHES))
        super().__init__(cell._replace(setting=texts), path)
        if cell.setting > texts:
            if not hasattr(self.loss, "mini_batch_num_tokens"):
                raise NotImplementedError("this version has no mini_batch_num_tokens")
            self.loss.mini_batch_num_tokens = cell.setting


SIDES = {"ours": Counted, "theirs": Theirs, "one pass": bench.OnePass, "printed": bench.OnePass}


def measure(lab: Lab, side: str, name: str, tokens: int, pairs: int, setting: int | str,
            count: bool = False) -> dict:
    """A cell of bench.py. pairs, and tokens of a text: in a dry run fewer."""
    torch._dynamo.reset()
    least = LENGTHS.get(tokens)
    tokens, pairs = lab.tokens(tokens), lab.size(pairs)
    rows = lab.long_rows(3 * pairs, tokens, least) if least else lab.rows(3 * pairs)
    batches = [rows[i * pairs : (i + 1) * pairs] for i in range(3)]
    precision = "bf16" if lab.cuda else "fp32"
    cell = Cell(side, name, 2, pairs, precision, tokens, setting, turn=0)
    lines, seconds, all_losses, opened, at = [], [], [], None, "opening"
    # `printed` puts the loss's other form into `losses`
    with (patch.object(Ranks, "print_rank0", lambda _, line: lines.append(line)),
          patch.multiple(losses, pair_loss=losses.pair_loss,
                         hard_negative_loss=losses.hard_negative_loss)):
        try:
            opened = SIDES[side](cell, lab.directory(name))
            at = "step"
            opened.step(batches[0])
            reset_peak()
            for rows in batches[1:]:
                if sum(seconds) < ONCE:
                    start = clock()
                    all_losses.append(opened.step(rows))
                    seconds.append(clock() - start)
            found = {"loss": all_losses[0], "seconds": seconds, "pairs": pairs, "setting": setting,
                     "pairs_per_s": pairs / min(seconds), **peaks(),
                     "plan": lines[-1].splitlines()[-1] if lines else ""}
            if hasattr(opened, "spent"):
                found |= {"spent": opened.spent, "tokens": opened.tokens,
                          "padding": 1 - opened.tokens / opened.padded}
            if count:
                found["operations"] = opened.count(batches[1])
        except RuntimeError as error:
            if not re.search("out of memory|ALLOC_FAILED", str(error)):
                raise
            found = {"status": "no room", "pairs": pairs, "setting": setting, "at": at, **peaks(),
                     "error": str(error)[:300], "pairs_per_s": 0.0, "loss": math.nan,
                     "plan": lines[-1].splitlines()[-1] if lines else ""}
            error.__traceback__ = None
    del opened
    gc.collect()
    return {**found, "says": said(found)}


def said(found: dict) -> str:
    memory_said = f"{found['GB']:.2f} GB (reserved {found['reserved']:.2f})"
    if found.get("status"):
        return f"out of memory in the {found['at']}; {memory_said}"
    parts = ", ".join(f"{name} {1000 * s:.0f}" for name, s in found.get("spent", {}).items())
    return (f"{found['pairs_per_s']:,.0f} pairs/s, {memory_said}, loss {found['loss']:.4f}"
            + (f"; ms: {parts}; padding {found['padding']:.1%}" if parts else ""))


def reset_peak() -> None:
    if bench.CUDA:
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict:
    if not bench.CUDA:
        return {"GB": math.nan, "reserved": math.nan}
    return {"GB": torch.cuda.max_memory_allocated() / 1e9,
            "reserved": torch.cuda.max_memory_reserved() / 1e9}


# fast

def fast(lab: Lab) -> dict[str, Callable[[], dict]]:
    found = {"rate of matrix products": partial(rates, lab)}
    for i, (name, tokens, pairs) in enumerate(SHAPES):
        if (name, tokens) not in [shape[:2] for shape in SHAPES[:i]]:
            for setting in (*MINI_BATCHES, *MINI_TOKENS):
                found[theirs_at(name, tokens, setting)] = partial(
                    measure, lab, "theirs", name, tokens, CHOSEN_AT[tokens],
                    setting)
        shape = f"{name}, {tokens} tokens, {pairs} pairs"
        found[f"ours: {shape}"] = partial(
            measure, lab, "ours", name, tokens, pairs, "", count=pairs < 32768)
        found[f"theirs: {shape}"] = partial(theirs_at_best, lab, name, tokens, pairs)
        if i == 1:
            found["tiles of the loss"] = partial(
                tiles, lab, 32768, (384, 768), (1024, 2048, 4096, 8192, 16384, None))
            found["tokenising"] = partial(tokenising, lab)
            for micro_tokens in (8192, 131072, 65536, 16384, 32768):
                for which in ("minilm", "base"):
                    found[f"ours: {which}, 128 tokens, --micro-tokens {micro_tokens}"] = partial(
                        measure, lab, "ours", which, 128, 4096,
                        f"--micro-tokens {lab.tokens(micro_tokens)}")
    for name in ("minilm", "base"):
        found[f"layers compiled, {name}"] = partial(compiled, lab, name)
        found[f"kernels, {name}"] = partial(kernels, lab, name)
    found["flex at short lengths"] = partial(short_flex, lab)
    return found


def theirs_at(name: str, tokens: int, setting: int) -> str:
    kind = "texts" if setting in MINI_BATCHES else "tokens"
    return f"choosing theirs: {name}, {tokens} tokens, mini-batch of {setting} {kind}"


def theirs_at_best(lab: Lab, name: str, tokens: int, pairs: int) -> dict:
    """And beside ours: no ratio where ours is not twice their loss."""
    choices = {setting: lab.results.get(theirs_at(name, tokens, setting), {})
               for setting in (*MINI_BATCHES, *MINI_TOKENS)}
    best = max(choices, key=lambda setting: choices[setting].get("pairs_per_s", 0))
    found = measure(lab, "theirs", name, tokens, pairs, best)
    ours = lab.results.get(f"ours: {name}, {tokens} tokens, {pairs} pairs", {})
    if found.get("status") or not ours.get("pairs_per_s"):
        return found
    found["off"] = ours["loss"] / (2 * found["loss"]) - 1
    if not abs(found["off"]) < bench.NEAR["best" if lab.cuda else "fp32"]:
        found["wrong"] = f"losses {ours['loss']:.4f} and twice {found['loss']:.4f}: not the same"
    found["ratio"] = ours["pairs_per_s"] / found["pairs_per_s"]
    found["says"] += f"; mini-batch {best}; ours is {found['ratio']:.2f} times as fast"
    return found


def rates(lab: Lab) -> dict:
    """Of large square products, and copies."""
    size = 8192 if lab.cuda else 256
    found = {str(dtype).removeprefix("torch."): bench.matrix_rate(dtype, size)
             for dtype in (torch.bfloat16, torch.float16, torch.float32)}
    return {"rates": found, "says": ", ".join(
        f"{name} {rate / 1e12:.3g} T operations a second" for name, rate in found.items())}


def tiles(lab: Lab, pairs: int, widths: tuple, sizes: tuple) -> dict:
    """Seconds and GB of equation (4), forward and backward, by the size of its tiles; None: as
    printed."""
    rows, found = lab.size(pairs), {}
    for width in widths:
        for tile in sizes:
            q, p = (torch.randn(rows, width, device=lab.device, requires_grad=True)
                    for _ in range(2))
            form = partial(losses.info_nce_tiled, tile=lab.size(tile)) if tile else losses.info_nce
            losses.pair_loss(q[:100], p[:100], 0.05, form=form).backward()
            reset_peak()
            start, way = clock(), f"width {width}, {f'tile {tile}' if tile else 'printed'}"
            try:
                losses.pair_loss(q, p, 0.05, form=form).backward()
                found[way] = {"seconds": clock() - start, **peaks()}
            except torch.OutOfMemoryError:
                found[way] = {"seconds": math.inf, **peaks()}
    return {"found": found, "says": "; ".join(
        f"{way} {1000 * x['seconds']:.0f} ms, {x['GB']:.1f} GB" for way, x in found.items())}


def tokenising(lab: Lab) -> dict:
    """Seconds of the tokenizer alone, and with the making of tensors of its lists."""
    seconds = {}
    for pairs in (4096, 32768):
        texts = [text for row in lab.rows(lab.size(pairs)) for text in row[:2]]
        start = time.perf_counter()
        lab.tokenizer(texts, truncation=True, max_length=lab.tokens(128),
                      return_attention_mask=False)
        alone = time.perf_counter() - start
        start = time.perf_counter()
        data.make_micro_batches(lab.tokenizer, texts, lab.tokens(128), lab.tokens(32768))
        seconds[pairs] = [alone, time.perf_counter() - start]
    return {"seconds": seconds, "says": "; ".join(
        f"{pairs} pairs: {1000 * alone:.0f} ms alone, {1000 * whole:.0f} with tensors"
        for pairs, (alone, whole) in seconds.items())}


def kernels(lab: Lab, name: str) -> dict:
    """What the device does in a step over 2,048 pairs of 128 tokens: how long it is busy, and the
    kernels that take longest. Under the profiler a step takes longer."""
    activity = torch.profiler.ProfilerActivity
    pairs, tokens = lab.size(2048), lab.tokens(128)
    cell = Cell("ours", name, 2, pairs, "bf16" if lab.cuda else "fp32", tokens, "", turn=0)
    rows, opened = lab.rows(pairs), bench.Ours(cell, lab.directory(name))
    opened.step(rows)
    start = clock()
    opened.step(rows)
    seconds = clock() - start
    with torch.profiler.profile(
            activities=[activity.CUDA if lab.cuda else activity.CPU]) as profile:
        opened.step(rows)
        clock()
    spent = {}
    for event in profile.key_averages():
        took = event.self_device_time_total if lab.cuda else event.self_cpu_time_total
        spent[event.key] = spent.get(event.key, 0) + took / 1e6
    longest = sorted(spent, key=spent.get, reverse=True)[:25]
    busy = sum(spent.values())
    return {"seconds": seconds, "busy": busy, "kernels": {key: spent[key] for key in longest},
            "says": f"busy {1000 * busy:.0f} ms of a step of {1000 * seconds:.0f}: " + ", ".join(
                f"{key[:60]} {spent[key] / busy:.0%}" for key in longest[:8])}


def short_flex(lab: Lab) -> dict:
    """Attention of 12 heads over 32,768 tokens in bf16, forward and backward: from which length on
    is flex_attention faster than a bias?"""
    torch._dynamo.reset()
    times, said = {}, []
    for tokens in (128, 256, 512, 1024):
        T = lab.tokens(tokens)
        mask = torch.ones(max(2, lab.tokens(32768) // T), T, dtype=torch.long, device=lab.device)
        mask[:, -1] = 0
        q, k, v, g = (torch.randn(len(mask), 12, T, 64, device=lab.device).bfloat16()
                      for _ in range(4))
        slopes, ways = model.alibi_slopes(12), {}
        for name, longest in (("masked", T), ("flex", 0)):
            with patch.object(model, "LONG", longest):
                attend = model.attention(slopes, mask, torch.bfloat16)
            ways[name] = min(attended(attend, [q, k, v], g)[1] for _ in range(4))
        times[tokens] = ways
        said.append(f"{tokens} tokens {1000 * ways['masked']:.2f} ms, {1000 * ways['flex']:.2f}")
    return {"times": times, "says": "masked, flex: " + "; ".join(said)}


def compiled(lab: Lab, name: str) -> dict:
    """A pass of both ways over 32,768 tokens in bf16, its layers as they are and compiled; lengths
    are static."""
    torch._dynamo.reset()
    counters.clear()
    encoder, _ = model.load(lab.directory(name))
    bench.without_dropout(encoder)
    encoder.to(lab.device).train()
    memory.mixed_precision(encoder, torch.bfloat16)
    count = encoder.backbone.config.num_hidden_layers
    layers = next(module for module in encoder.modules()
                  if isinstance(module, nn.ModuleList) and len(module) == count)
    times, said = {}, []
    for tokens in (128, 512):
        length = lab.tokens(tokens)
        ids = torch.randint(5, 500, (max(2, lab.tokens(32768) // length), length),
                            device=lab.device)
        mask = torch.ones_like(ids)
        mask[:, -1] = 0
        plain = both_ways(encoder, ids, mask)
        forwards = [layer.forward for layer in layers]
        for layer in layers:
            layer.forward = torch.compile(layer.forward, dynamic=False,
                                          backend="inductor" if lab.cuda else "aot_eager")
        fast = both_ways(encoder, ids, mask)
        for layer, forward in zip(layers, forwards):
            layer.forward = forward
        times[tokens] = {"plain": plain, "compiled": fast}
        said.append(f"{tokens} tokens: {1000 * min(plain):.1f} ms, compiled "
                    f"{1000 * min(fast):.1f} ms ({min(plain) / min(fast):.2f} times as fast; the "
                    f"first took {fast[0]:.0f} s)")
    graphs = counters["stats"]["unique_graphs"]
    return {"times": times, "graphs": graphs, "says": f"{'; '.join(said)}; {graphs} graphs"}


def both_ways(encoder: nn.Module, ids: Tensor, mask: Tensor) -> list[float]:
    seconds = []
    for _ in range(6):
        start = clock()
        encoder(ids, mask).square().sum().backward()
        seconds.append(clock() - start)
    return seconds


# small

def small(lab: Lab) -> dict[str, Callable[[], dict]]:
    one_graph = f"--memory 0.01 --micro-tokens {lab.tokens(32768)}"
    ways = {"two passes": ("ours", one_graph),
            "two passes, checkpointed layers": ("ours", f"{one_graph} --checkpoint-layers"),
            "one pass": ("one pass", one_graph), "one pass, printed loss": ("printed", one_graph)}
    found = {}
    for pairs in (1024, 4096, 16384, 65536):
        for way, (side, flags) in ways.items():
            found[cell_of(way, pairs)] = partial(peak_of, lab, way, side, pairs, flags)
        if pairs == 16384:
            found |= long_texts(lab)
    for pairs in (16384, 65536):
        found[f"the loss alone, {pairs} pairs"] = partial(tiles, lab, pairs, (384,), (1024, None))
    found["largest batch: 131072 pairs, graphs kept"] = partial(
        measure, lab, "ours", "minilm", 128, 131072, "")
    found["largest batch: 262144 pairs, one graph kept"] = partial(
        measure, lab, "ours", "minilm", 128, 262144, one_graph)
    return found


def cell_of(way: str, pairs: int) -> str:
    return f"{way}, {pairs} pairs"


def peak_of(lab: Lab, way: str, side: str, pairs: int, flags: str) -> dict:
    """Where a quarter of it had no room, it has none."""
    before = lab.results.get(cell_of(way, pairs // 4), {})
    if before.get("status") == "no room":
        return {"status": "no room", "pairs": pairs, "says": "not tried, as a quarter had no room"}
    found = measure(lab, side, "minilm", 128, pairs, flags)
    first = lab.results.get(cell_of("two passes", pairs), found)
    if "status" not in found and not abs(found["loss"] / first["loss"] - 1) < 1e-3:
        found["wrong"] = f"loss {found['loss']:.5f}, in two passes {first['loss']:.5f}"
    return found


def long_texts(lab: Lab) -> dict[str, Callable[[], dict]]:
    """Steps of `base` over 8 pairs, whose positives have 8,192 tokens."""
    return {f"base, 8192 tokens{', checkpointed layers' if flags else ''}": partial(
        measure, lab, "ours", "base", 8192, 8, flags)
        for flags in ("--checkpoint-layers", "")}


# the table of `fast`

def table(lines: list[dict]) -> str:
    """Ours beside theirs, and what share of the card's rate of bf16 products each part reaches."""
    by_name = {line["cell"]: line for line in lines}
    rate = by_name.get("rate of matrix products", {}).get("rates", {}).get("bfloat16", math.nan)
    rows, shares = [], []
    for name, tokens, pairs in SHAPES:
        shape = f"{name}, {tokens} tokens, {pairs} pairs"
        ours, theirs = (by_name.get(f"{side}: {shape}", {}) for side in ("ours", "theirs"))
        if not ours.get("pairs_per_s"):
            continue
        rows.append((name, tokens, pairs, f"{ours['pairs_per_s']:,.0f}",
                     f"{theirs.get('pairs_per_s', 0):,.0f} ({theirs.get('setting', '-')})",
                     f"{theirs.get('ratio', 0):.2f}", f"{ours['GB']:.2f}",
                     f"{theirs.get('GB', 0):.2f}", f"{theirs.get('off', math.nan):+.1e}",
                     f"{ours['spent']['tokenising'] / sum(ours['spent'].values()):.0%}"))
        parts = [(part, ours["spent"][part], operations)
                 for part, operations in ours.get("operations", {}).items()]
        if parts:
            shares.append(f"{shape}: " + ", ".join(
                f"{part} {1000 * seconds:.0f} ms"
                + (f" at {operations / seconds / rate:.0%}" if operations else "")
                for part, seconds, operations in parts))
    head = ("model", "tokens", "pairs", "pairs/s, ours", "theirs (mini-batch)", "ratio",
            "GB, ours", "theirs", "loss off", "tokenising")
    return "\n".join([lines_of(head, rows), "", f"Share of {rate / 1e12:,.0f} T operations a "
                      f"second, bf16, by part of ours:", *shares])
