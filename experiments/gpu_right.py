"""Is it right on a GPU? The cells of experiments/gpu.py's part `right`.

A cell returns what it measured, a line that says it, and in `wrong` what is not as it should be.
"""

import argparse
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention

import data
import model
import train
from curation import __main__ as curation
from curation.pool import Embedder
from curation.reranker import Example, Reranker
from evaluation import __main__ as evaluation
from evaluation import search
from experiments import law
from experiments.gpu_lab import Lab
from plumbing import plan
from plumbing.ranks import Gather, Ranks

GPU_ONLY = ("--check in fp16", "an overflow in fp16 (in its place: one in fp32)",
            "flex_attention compiled, and backward (in its place: forward, as it is)",
            "out of memory", "NCCL (in its place: gloo)")
TAU = 0.05
LENGTHS = 1100, 2048, 8192


def cells(lab: Lab) -> dict[str, Callable[[], dict]]:
    found = {}
    for name in ("minilm", "tiny"):
        for precision in ("bf16", "fp16", "fp32") if lab.cuda else ("bf16", "fp32"):
            found[f"--check, {name}, {precision}"] = partial(check, lab, name, precision)
    found |= flex_cells(lab, "bf16")
    found["twenty shapes of long texts"] = partial(twenty_shapes, lab)
    found["overflow"] = partial(overflow, lab)
    found["the law's cells"] = partial(laws, lab)
    for name, tokens, precision in (("minilm", 128, "bf16"), ("tiny", 128, "bf16"),
                                    ("minilm", 128, "fp32"), ("tiny", 128, "fp32"),
                                    ("tiny", 1100, "bf16")):
        found[f"dropout, {name}, {tokens} tokens, {precision}"] = partial(
            dropout, lab, name, tokens, precision)
    found["resumed run"] = partial(resumed_run, lab)
    found |= flex_cells(lab, "fp32")
    found["evaluation and curation"] = partial(commands, lab)
    found["no texts in a micro-batch"] = partial(no_texts, lab)
    found["gathered rows, one rank"] = partial(gathered, lab)
    found["twenty shapes of long texts, dynamic from the first on"] = partial(
        twenty_shapes, lab, dynamic=True)
    if lab.cuda:
        found["out of memory"] = partial(out_of_memory, lab)
    return found


def quiet() -> tuple[Ranks, list[str]]:
    """This process alone, and the lines that it prints."""
    ranks, lines = Ranks(alone=True), []
    ranks.print_rank0 = lines.append
    return ranks, lines


def relative(found: Tensor, expected: Tensor) -> float:
    """Infinite where not a number."""
    error = ((found.double() - expected.double()).norm() / expected.double().norm()).item()
    return error if math.isfinite(error) else math.inf


def graphs() -> int:
    """That torch.compile has made since `forget_graphs`."""
    return counters["stats"]["unique_graphs"]


def forget_graphs() -> None:
    torch._dynamo.reset()
    counters.clear()


# --check, and the law

def check(lab: Lab, name: str, precision: str) -> dict:
    ranks, lines = quiet()
    args = lab.args("--model", lab.directory(name), "--precision", precision, "--check",
                    "--max-length", lab.tokens(128))
    status = train.train(args, None, ranks)
    numbers = lines[-1].partition("fp32: ")[2]
    return {"says": numbers, "plan": lines[0], "wrong": numbers if status else ""}


def laws(lab: Lab) -> dict:
    """Plain torch's cells of experiments/law.py, against plain fp32 on the CPU."""
    ranks, _ = quiet()
    expected = {way: law.plain_update(*way) for way in ((2, "sgd"), (3, "sgd"), (3, "adamw"))}
    wrong, errors = [], {"fp32": [], "bf16": []}
    chosen = [cell for cell in law.cells(1, few=lab.dry) if cell.zero is None]
    for cell in chosen:
        update = law.update(cell, ranks, "")
        error, norm, angle = law.compare(update, expected[cell.stage, cell.optimizer])
        errors[cell.precision].append(error)
        if not law.good(cell, dict(error=error, norm=norm, cosine=1 - angle, calls=[0, 0]), 1):
            wrong.append(f"{cell}: {error:.1e}")
    return {"says": f"{len(chosen)} cells; worst error, fp32 {max(errors['fp32']):.1e}, bf16 "
                    f"{max(errors['bf16']):.1e}",
            "errors": errors, "wrong": "; ".join(wrong)}


# flex_attention

def flex_cells(lab: Lab, precision: str) -> dict[str, Callable[[], dict]]:
    return {f"flex beside masked, {tokens} tokens, {precision}": partial(
        flex_beside_masked, lab, tokens, precision) for tokens in LENGTHS}


def flex_beside_masked(lab: Lab, tokens: int, precision: str) -> dict:
    """Outputs and gradients of attention with ALiBi's bias tile by tile and as a tensor, both held
    against the latter in fp32, over the tokens that are no padding."""
    torch.manual_seed(0)
    if tokens == LENGTHS[0]:  # the others go on with its graphs
        forget_graphs()
    T, heads = lab.tokens(tokens), 2 if lab.dry else 12
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    slopes, found, wrong = model.alibi_slopes(heads), {}, []
    for B, padded in ((3, True), (1, False), (1, True), (2, False)):
        mask = torch.ones(B, T, dtype=torch.long, device=lab.device)
        if padded:
            mask[-1, T - T // 3 :] = 0
        q, k, v, g = (torch.randn(B, T, heads, 64, device=lab.device).transpose(1, 2)
                      for _ in range(4))
        g = g * mask[:, None, :, None]
        flex = model.attention(slopes, mask, dtype)
        if lab.cuda and flex.func is not model.attend_flex:
            raise ValueError(f"{flex.func.__name__} is not the path that is meant")
        exact, _ = attended(slopes_attend(slopes, mask, torch.float32), (q, k, v), g)
        inputs = [x.to(dtype) for x in (q, k, v)]
        masked, seconds_masked = attended(slopes_attend(slopes, mask, dtype), inputs, g)
        tiled, seconds_first = attended(flex, inputs, g)
        _, seconds_flex = attended(flex, inputs, g)
        errors = {name: max(relative(a, b) for a, b in zip(ours, exact))
                  for name, ours in (("flex", tiled), ("masked", masked))}
        if not lab.cuda:  # there it is for the forward pass alone, and another path is taken
            with torch.no_grad():
                uncompiled = model.attend_flex(
                    *inputs, torch.tensor(slopes), mask, flex_attention) * (g != 0)
            errors["flex"] = max(errors["flex"], relative(uncompiled, exact[0]))
        case = f"{B} text(s){', padded' if padded else ''}"
        found[case] = errors | {"seconds": [seconds_first, seconds_flex, seconds_masked]}
        limit = max({"bf16": 1e-2, "fp32": 1e-4}[precision], 2 * errors["masked"])
        if not errors["flex"] <= limit:
            wrong.append(f"{case}: {errors['flex']:.1e}")
    worst = {name: max(case[name] for case in found.values()) for name in ("flex", "masked")}
    first, steady, beside = found["3 text(s), padded"]["seconds"]
    return {"says": f"error {worst['flex']:.1e}, masked {worst['masked']:.1e}; {graphs()} graphs, "
                    f"first call {first:.1f} s, then {1000 * steady:.1f} ms, masked "
                    f"{1000 * beside:.1f}",
            "cases": found, "graphs": graphs(), "wrong": "; ".join(wrong)}


def slopes_attend(slopes: list[float], mask: Tensor, dtype: torch.dtype) -> Callable:
    return partial(model.attend, bias=model.alibi_bias(slopes, mask, dtype))


def attended(attend: Callable, inputs: list[Tensor], g: Tensor) -> tuple[list[Tensor], float]:
    """Output and gradients of q, k, v for the gradient g (0 at padding), and the seconds."""
    q, k, v = leaves = [x.detach().requires_grad_() for x in inputs]
    start = clock()
    out = attend(q, k, v)
    (out * g).sum().backward()
    seconds = clock() - start
    return [out.detach() * (g != 0), *(x.grad for x in leaves)], seconds


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def twenty_shapes(lab: Lab, **more) -> dict:
    """more: for torch.compile."""
    with patch("torch.compile", partial(torch.compile, **more)):
        return shapes_in_a_row(lab)


def shapes_in_a_row(lab: Lab) -> dict:
    """Steps of micro-batches whose shapes are all different, as --max-length 8192 meets them: the
    graphs compiled for them, and the time that takes."""
    forget_graphs()
    ranks, _ = quiet()
    longest, rows = lab.tokens(8192), (1, 1, 2, 3, 1, 5, 2, 1, 4, 6)
    shapes = [(B, longest - lab.tokens(300) * i) for i, B in enumerate(2 * rows)]
    ids = torch.randint(5, 100, (sum(B for B, _ in shapes), longest))
    encoder = lab.create("tiny").to(lab.device).train()
    args = lab.args("--max-length", longest, "--precision", "bf16")
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.0)
    engine, _ = train.prepare(encoder, optimizer, 1.0, args, ranks)
    micro_batches, first = [], 0
    for B, T in shapes:
        index = torch.arange(first, first + B)
        mask = torch.ones(B, T, dtype=torch.long)
        mask[-1, T - 3 :] = 0
        micro_batches.append((index, ids[index, :T], mask))
        first += B
    engine.graphs_to_keep = lambda micro_batches: 1
    seconds = []
    for _ in range(2):
        start = clock()
        embeddings = engine.embed(micro_batches)
        engine.backward(torch.ones_like(embeddings))
        norm = engine.step(0.0)
        seconds.append(clock() - start)
        made = graphs()
    engine.encoder.eval()
    with torch.no_grad():
        engine.encoder(ids[:2].to(lab.device), torch.ones_like(ids[:2]).to(lab.device))
    limit = torch._dynamo.config.recompile_limit
    return {"says": f"{made} graphs in the first two passes over {len(shapes)} shapes, "
                    f"{graphs()} with evaluation, of at most {limit}; {seconds[0]:.1f} s, then "
                    f"{seconds[1]:.2f} s",
            "graphs": graphs(), "seconds": seconds,
            "wrong": "" if math.isfinite(norm) else f"gradient norm {norm}"}


# one step, computed otherwise

def overflow(lab: Lab) -> dict:
    """A gradient too large for fp16: the step is skipped, the scale halved, all else as it was."""
    ranks, _ = quiet()
    tokens, precision = lab.tokens(128), "fp16" if lab.cuda else "fp32"
    encoder = lab.create("tiny").to(lab.device).train()
    args = lab.args("--precision", precision, "--max-length", tokens)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3, fused=True)
    engine, _ = train.prepare(encoder, optimizer, args.clip, args, ranks)
    batch = data.Batch("", lab.rows(lab.size(2048)), 0, "")
    micro_batches = data.make_micro_batches(lab.tokenizer, batch.texts, tokens, 8 * tokens)

    def step(planted: float | None = None) -> float:
        embeddings = engine.embed(micro_batches)
        train.step_loss(*batch.split(embeddings), TAU, ranks)[0].backward()
        if planted:
            embeddings.grad[0, 0] = planted
        engine.backward(embeddings.grad)
        return engine.step(1e-3)

    def state() -> list[Tensor]:
        moments = [x for p in encoder.parameters() for x in optimizer.state[p].values()]
        return [x.detach().clone() for x in (*encoder.parameters(), *moments)]

    tried = 1
    while not math.isfinite(step()) and tried < 20:
        tried += 1
    scaling, before = engine.scaling, state()
    scale, skipped = scaling.scale, scaling.skipped
    norm = step(planted=1e8 if lab.cuda else math.inf)
    same = all(torch.equal(a, b) for a, b in zip(before, state()))
    halved, counted = scaling.scale == scale / 2, scaling.skipped == skipped + 1
    good_after = math.isfinite(step()) and not torch.equal(before[0], state()[0])
    wrong = [what for what, good in (
        (f"the norm was finite, {norm:g}", not math.isfinite(norm)), ("state changed", same),
        ("scale not halved", halved), ("not counted", counted), ("did not go on", good_after))
        if not good]
    return {"says": f"{precision}: skipped, scale {scale:g} -> {scale / 2:g}, {len(before)} "
                    f"tensors as they were; the first good step was no. {tried}",
            "wrong": "; ".join(wrong)}


def dropout(lab: Lab, name: str, tokens: int, precision: str) -> dict:
    """With dropout, the gradient of one graph of all micro-batches (no second pass), against two
    passes, and against checkpointed layers; also twice the same, and with other masks."""
    forget_graphs()
    gradient = partial(dropped_gradient, lab, name, lab.tokens(tokens), precision)
    one_graph = gradient(graphs_kept=1000)
    ways = {"the same again": gradient(graphs_kept=1000), "two passes": gradient(graphs_kept=1),
            "checkpointed": gradient(graphs_kept=1000, checkpointed=True),
            "checkpointed in two passes": gradient(graphs_kept=1, checkpointed=True),
            "other masks": gradient(graphs_kept=1000, seed=1)}
    errors = {way: relative(found, one_graph) for way, found in ways.items()}
    equal = [way for way, found in ways.items() if torch.equal(found, one_graph)]
    wrong = [f"{way}: {error:.1e}" for way, error in errors.items()
             if (error < 0.01 if way == "other masks" else not error < 3e-3)]
    return {"says": ", ".join(f"{way} {error:.1e}" for way, error in errors.items())
                    + f"; to the last bit: {', '.join(equal) or 'none'}",
            "errors": errors, "equal": equal, "wrong": "; ".join(wrong)}


def dropped_gradient(lab: Lab, name: str, tokens: int, precision: str, graphs_kept: int,
                     checkpointed: bool = False, seed: int = 0) -> Tensor:
    ranks, _ = quiet()
    encoder = lab.create(name, hidden_dropout_prob=0.1).to(lab.device).train()
    flags = ["--checkpoint-layers"] if checkpointed else []
    args = lab.args("--precision", precision, "--max-length", tokens, *flags)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.0)
    engine, _ = train.prepare(encoder, optimizer, 0.0, args, ranks)
    engine.graphs_to_keep = lambda micro_batches: min(graphs_kept, len(micro_batches))
    long = tokens > model.LONG
    rows = lab.long_rows(8, tokens) if long else lab.rows(8 if lab.dry else 64)
    batch = data.Batch("", rows, 0, "")
    micro_batches = data.make_micro_batches(lab.tokenizer, batch.texts, tokens, 3 * tokens)
    if len(micro_batches) < 2:
        raise ValueError("one micro-batch shows nothing")
    torch.manual_seed(seed)
    embeddings = engine.embed(micro_batches)
    train.step_loss(*batch.split(embeddings), TAU, ranks)[0].backward()
    engine.backward(embeddings.grad)
    return torch.cat([p.grad.flatten() for p in encoder.parameters()])


# a run

def resumed_run(lab: Lab) -> dict:
    """Six steps with dropout; the same once more; and from the first's checkpoint of step 3, as if
    it had been killed there. How far the losses and weights of the last two are from the first."""
    runs = lab.folder / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    flags = ["--sources", lab.manifest, "--model", lab.directory("tiny"), "--dropout", 0.1,
             "--batch-size", lab.size(2048), "--max-length", lab.tokens(64), "--lr", 1e-3,
             "--steps", 6, "--save-every", 3, "--micro-tokens", lab.tokens(8192)]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for name in ("whole", "again"):
            train.main([str(flag) for flag in [*flags, "--out", runs / name]])
        shutil.copytree(runs / "whole", runs / "resumed")
        for late in ("model", "checkpoints/00000006"):
            shutil.rmtree(runs / "resumed" / late)
        train.main(["--resume", "--out", str(runs / "resumed")])
    finally:  # train.py has set its own
        for number, handler in handlers.items():
            signal.signal(number, handler)
    losses, rows, weights = {}, {}, {}
    for name in ("whole", "again", "resumed"):
        lines = map(json.loads, (runs / name / "metrics.jsonl").read_text().splitlines())
        steps = {line["step"]: line for line in lines if "loss" in line}
        losses[name] = torch.tensor([steps[step]["loss"] for step in range(1, 7)])
        rows[name] = [steps[step]["rows"] for step in range(1, 7)]
        encoder, _ = model.load(runs / name / "model")
        weights[name] = torch.cat([p.detach().flatten() for p in encoder.parameters()])
    errors = {f"{name}, {what}": relative(found[name], found["whole"])
              for name in ("again", "resumed")
              for what, found in (("losses", losses), ("weights", weights))}
    equal = [name for name in ("again", "resumed") if torch.equal(weights[name], weights["whole"])]
    limit = max(1e-2, 10 * errors["again, weights"])
    wrong = [f"{way}: {error:.1e}" for way, error in errors.items() if not error < limit]
    if rows["resumed"] != rows["whole"]:
        wrong.append("other rows")
    return {"says": ", ".join(f"{way} {error:.1e}" for way, error in errors.items())
                    + f"; to the last bit: {', '.join(equal) or 'none'}; losses "
                    + " ".join(f"{loss:.3f}" for loss in losses["whole"].tolist()),
            "errors": errors, "equal": equal, "wrong": "; ".join(wrong)}


def commands(lab: Lab) -> dict:
    """Does the rest work on a GPU? `curation filter` and `evaluation` on a few rows, and what
    `curation mine` calls: a search, and a cross-encoder that trains and scores."""
    out, name, tokens = lab.folder / "filter", lab.directory("minilm"), lab.tokens(128)
    shutil.rmtree(out, ignore_errors=True)
    rows, pool = lab.rows(lab.size(4096)), lab.size(4096)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        flags = ["filter", "--sources", lab.manifest, "--max-length", tokens, "--model", name,
                 "--pool", pool, "--rows", pool, "--top-k", pool // 8, "--out", out]
        curation.main([str(flag) for flag in flags])
    finally:
        signal.signal(signal.SIGTERM, handler)
    pairs = lab.folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row[:2]) + "\n" for row in rows))
    flags = [name, "--pairs", pairs, "--max-length", tokens]
    evaluation.main([str(flag) for flag in flags])

    flags = argparse.Namespace(
        max_length=tokens, micro_tokens=lab.tokens(16384), chunk=pool, prompts=None)
    embed = Embedder(str(name), lab.sources, flags)
    vectors = embed([row.positive for row in rows])
    itself = np.arange(len(rows)), np.arange(len(rows))
    halves = [half.cpu().numpy() for half in vectors.split(len(rows) // 2)]
    found, cosines = search.nearest(vectors, halves, 5, itself)
    cosine = vectors @ vectors.T
    cosine.fill_diagonal_(-torch.inf)
    near = torch.allclose(cosine.topk(5).values.cpu(), torch.from_numpy(cosines), atol=1e-5)

    reranker = Reranker(lab.classifier(), lab.tokenizer, tokens, lab.tokens(16384))
    examples = [Example(row.query, row.positive, [rows[j].positive for j in found[i, :3]])
                for i, row in enumerate(rows[:64])]
    losses = list(reranker.train([examples] * 3, 3, 1e-4))
    scores = reranker([row[:2] for row in rows[:64]])
    good = near and np.isfinite(scores).all() and np.isfinite(losses).all()
    return {"says": f"cross-encoder's loss {losses[0]:.3f} -> {losses[-1]:.3f}",
            "wrong": "" if good else f"search {near}, losses {losses}, scores {scores}"}


# what ranks, and a full card, meet

def no_texts(lab: Lab) -> dict:
    """Under ZeRO a rank may have a micro-batch of none."""
    encoder = lab.create("tiny").to(lab.device).train()
    lengths = 16, lab.tokens(1100)
    for tokens in lengths:
        ids = torch.zeros(0, tokens, dtype=torch.long, device=lab.device)
        encoder(ids, ids).sum().backward()
        clock()
    return {"says": f"{lengths} tokens"}


def gathered(lab: Lab) -> dict:
    """The collectives of the loss, on the GPU's own backend."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    ranks, _ = quiet()
    for new, old in (("all_gather_single", "all_gather_into_tensor"),
                     ("reduce_scatter_single", "reduce_scatter_tensor")):
        if not hasattr(dist, new):  # an older torch than ours
            setattr(dist, new, getattr(dist, old))
    ranks.join(dist.HashStore())
    try:
        x = torch.randn(4, 3, device=lab.device, requires_grad=True)
        rows = Gather.apply(x, 1)
        (rows * rows).sum().backward()
        same = torch.equal(rows, x) and torch.equal(x.grad, 2 * x)
        backend = dist.get_backend()
    finally:
        ranks.leave()
    return {"says": backend, "wrong": "" if same else "other rows or gradients"}


def out_of_memory(lab: Lab) -> dict:
    """What train.py says, and that the process goes on."""
    some = torch.ones(1 << 28, device=lab.device)
    try:
        torch.empty(1 << 44, device=lab.device)
    except RuntimeError as error:
        advice = plan.out_of_memory(error, lab.args(), lab.device)
    good = advice and "--memory" in advice and some.sum() == len(some)
    return {"says": advice, "wrong": "" if good else f"said {advice}"}


