"""Trains an embedding model as §5 of Jina Embeddings 2 (arXiv 2310.19923) does: stage 2 on pairs, stage 3 with negatives.

    python train.py --stage 2 --batch-size 4096

composes the four other modules: source-wise batches (data.py, §5.1), the pooled encoder (model.py, §5), equations (4) and
(5) (losses.py), large batches in little memory (memory.py, §5.3). How they do it is theirs to know. On many ranks:

    torchrun --nproc_per_node 2 train.py --stage 2 --batch-size 4096 --zero 2
"""

import argparse
import copy
import math
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import data
import losses
import memory
import model
from evaluation import metrics
from plumbing import allocator, checkpoint
from plumbing.plan import out_of_memory, plan as plan_memory
from plumbing.ranks import Ranks

VOCABULARY = 30522  # entries of a tokenizer trained here: BERT's number; JinaBERT rounds it up to 30,528 embeddings
LR_PRETRAINED = 2e-5  # Nomic Embed's; for random weights ours, 1 / width: 3.9e-3 for tiny, where 8e-3 diverges
CHECK_ROWS, CHECK_TOKENS = 32, 16384  # of --check: few rows, for plain fp32 holds the graph of them all
CHECK_LR = 1024.0  # a step beside which the weights' own rounding is nothing


def whole_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def parse_arguments(argv: list[str] | None, ranks: Ranks) -> tuple[argparse.Namespace, checkpoint.Checkpoint | None]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("losses.py (§5.1, §5.2)").add_argument
    add("--stage", type=int, choices=(2, 3), default=2, help="2: pairs, equation (4); 3: with negatives, equation (5)")
    add("--tau", type=float, default=0.05, help="temperature (the paper's)")
    add = parser.add_argument_group("data.py (§5.1)").add_argument
    add("--sources", metavar="MANIFEST", help="JSON list of sources; unset: the installed packages' documentation")
    add("--batch-size", type=int, default=4096, help="rows of the global batch (ours; jina-clip-v1 begins with 32,768)")
    add("--negatives", type=int, default=15, help="negatives per row in stage 3 (the paper's)")
    add("--max-length", type=int, default=128, help="tokens per text in training (ours)")
    add = parser.add_argument_group("model.py (§5)").add_argument
    add("--model", default="tiny", help=f"directory, hub name, or {' | '.join(model.SIZES)}: random weights (tiny: ours)")
    add("--dropout", type=float, help="unset: the model's own (0.1 in JinaBERT, 0 in tiny)")
    add = parser.add_argument_group("memory.py (§5.3)").add_argument
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="of matrix products; auto: bf16 if fast")
    add("--memory", type=float, metavar="GB", help="what a process (on a GPU: its tensors) may hold, about: the more, the fewer "
                                                  "texts are embedded twice; unset: what it has, and half of what is "
                                                  "free (on a GPU 0.8 of it; ours)")
    add("--micro-tokens", type=whole_or_auto, default="auto",
        help="bound on the tokens of one forward pass, with padding; auto: as many as make it fast and fit (ours); a resumed "
             "run goes on with what was chosen")
    add("--checkpoint-layers", action="store_true", help="keep the layers' inputs only (the paper's; off: ours)")
    add("--zero", metavar="STAGE", help="DeepSpeed ZeRO stage 0, 1, 2 or 3, or a DeepSpeed JSON file that names one; unset: "
                                        "plain torch in one process, stage 2 (Jina Embeddings v1's) under a launcher")
    add("--check", action="store_true", help="do not train, but compare the gradient of a small batch, with these flags on "
                                             "these ranks (in many micro-batches, without dropout), with that of plain fp32 "
                                             "in one process and one pass")
    add = parser.add_argument_group("the run").add_argument
    add("--steps", type=int, default=36, help="optimizer steps (ours: minutes on two CPU cores with bf16 matrix units)")
    add("--lr", type=float, help=f"peak learning rate; unset: 1 / width for random weights (ours), {LR_PRETRAINED} for "
                                 f"pretrained ones (Nomic Embed's)")
    add("--warmup", type=float, default=0.1, help="share of the steps over which the rate rises linearly; then it falls (ours)")
    add("--weight-decay", type=float, default=0.01, help="AdamW's, on all parameters (Nomic Embed's)")
    add("--clip", type=float, default=1.0, help="bound on the gradient norm (Nomic Embed's); 0: none")
    add("--seed", type=int, default=0, help="of weights, batches and dropout")
    add("--out", metavar="DIR", help="unset: the next free runs/NNN")
    add("--save-every", type=int, default=20, help="steps from checkpoint to checkpoint (ours)")
    add("--eval-every", type=int, help="steps from evaluation to evaluation; unset: half of --steps")
    add("--resume", action="store_true", help="go on from the newest checkpoint of --out, or of the newest runs/NNN, "
                                              "with its flags where none is given")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it; the environment has it too
    args, resumed = parser.parse_args(argv), None
    if args.resume:
        resumed = ranks.once(lambda: checkpoint.newest(args.out))
        parser.set_defaults(**resumed.state["args"])
        args = parser.parse_args(argv)
        if resumed.state["step"] >= args.steps and (resumed.run / "model").is_dir():
            raise ValueError(f"--resume: {resumed.run} is finished with {resumed.state['step']} steps; a higher --steps goes "
                             f"on from there, with the learning rate of the longer schedule")
        if (args.model, args.stage) != (resumed.state["args"]["model"], resumed.state["args"]["stage"]):
            raise ValueError(f"--resume: {resumed.run} has another --model or --stage; --model {resumed.run / 'model'} without "
                             f"--resume begins a new run with its model")
    above_0 = "batch_size", "memory", "steps", "save_every", "eval_every", "tau", "lr"
    for flags, good, expected in ((above_0, lambda x: 0 < x < math.inf, "a number above 0"),
                                  (("seed", "weight_decay", "clip"), lambda x: 0 <= x < math.inf, "0 or more"),
                                  (("dropout", "warmup"), lambda x: 0 <= x < 1, "at least 0 and less than 1")):
        for flag in flags:
            if getattr(args, flag) is not None and not good(getattr(args, flag)):
                raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected {expected}")
    if not args.resume and args.model in model.SIZES and Path(args.model, "config.json").is_file():
        raise ValueError(f"--model {args.model}: a size, but also a directory here; ./{args.model} means the directory")
    if args.stage == 2:
        args.negatives = 0
    elif args.negatives < 1:
        raise ValueError(f"--negatives {args.negatives}: expected a number above 0 in stage 3")
    elif not args.sources:
        raise ValueError("--stage 3: the default sources have no negatives; `python -m curation mine` makes some, for --sources")
    memory.choose_precision(args.precision, ranks.device)  # for what it and the next raise, before anything is built
    if args.zero is not None:
        memory.read_zero(args.zero)
    if args.micro_tokens != "auto" and args.micro_tokens < args.max_length:
        raise ValueError(f"--micro-tokens {args.micro_tokens} is less than one text of --max-length {args.max_length}")
    return args, resumed


def held_out_scores(encoder, tokenizer, sources: list[data.Source], args: argparse.Namespace) -> dict:
    """{"mean": metrics, "sources": {name: metrics}} of retrieval among each source's held-out pairs."""
    scores = {source.name: metrics.retrieval(encoder, tokenizer, source.held_out, args.max_length, args.micro_tokens)
              for source in sources if source.held_out}
    names = next(iter(scores.values()), {})
    return {"mean": {name: sum(s[name] for s in scores.values()) / len(scores) for name in names}, "sources": scores}


def relative_length(sources: list[data.Source], name: str, max_length: int) -> float:
    """Length of the texts of source `name` against that of an average batch, by the held-out pairs at 4 letters a token."""
    length = {s.name: sum(min(len(x), 4 * max_length) for row in s.held_out for x in row[:2]) / max(1, len(s.held_out)) or 1
              for s in sources}
    return length[name] * sum(s.rate for s in sources) / sum(s.rate * length[s.name] for s in sources)


def step_loss(e: torch.Tensor, place: torch.Tensor, args: argparse.Namespace, ranks: Ranks) -> tuple[torch.Tensor, float]:
    """Equation (4) or (5) for this rank's rows against the columns of all ranks, and the in-batch accuracy of these rows.

    e: the embeddings of the step's distinct texts; e[place] those of b queries, their b positives and, in stage 3, their b N
    negatives row by row."""
    b = args.batch_size // ranks.world_size
    row, (q, p, n) = b * ranks.rank, e[place].split([b, b, len(place) - 2 * b])
    all_q, all_p = ranks.gather(q), ranks.gather(p)
    if args.stage == 2:
        loss = losses.pair_loss(q, p, args.tau, (all_q, all_p), row)
    else:
        n = n.view(b, -1, e.shape[1])
        loss = losses.hard_negative_loss(q, p, n, args.tau, (all_q, all_p, ranks.gather(n)), row)
    return loss, metrics.in_batch_accuracy(q, all_p, row)


def prepare(encoder: torch.nn.Module, optimizer: torch.optim.Optimizer, clip: float, args: argparse.Namespace,
            ranks: Ranks) -> memory.OneProcess:
    """The means of §5.3 around an encoder: precision, checkpointed layers, as large passes as fit, ZeRO."""
    dtype, reason = memory.choose_precision(args.precision, ranks.device)
    size = sum(p.numel() for p in encoder.parameters()) / 1e6
    scaling = memory.mixed_precision(encoder, dtype)
    if args.checkpoint_layers:
        memory.checkpoint_layers(encoder)
    if args.zero is None and not ranks.launched:
        allocator.sparse_gradients(encoder)
    plan = plan_memory(encoder, args, ranks)
    args.micro_tokens = plan.micro_tokens
    if plan.keep_tokens and ranks.device.type == "cpu":
        allocator.keep_freed_memory()
    engine = memory.engine(encoder, optimizer, clip, scaling, ranks, args.zero, kept=plan.kept, tidy=plan.tidy)
    ranks.say(f"{size:.1f} M parameters, {str(dtype).removeprefix('torch.')} ({reason}), {engine}")
    ranks.say(plan.line)
    slow = args.precision == "auto" and dtype == torch.float32 and ranks.device.type == "cpu" and args.model == "tiny"
    if slow and args.batch_size * args.steps > 2 * 1024 * 30:
        ranks.say("without bf16 units a step takes long; shorter: python train.py --batch-size 1024 --steps 30")
    return engine


def check(ranks: Ranks, args: argparse.Namespace, encoder: torch.nn.Module, own: data.Batch, whole: data.Batch,
          cut: Callable) -> None:
    """--check: the update of one step of plain SGD on these ranks and with these flags, over its learning rate, against the
    gradient of plain fp32 in one process and one pass. own, whole: the rows of this rank, and of the global batch."""
    encoder.eval()  # no dropout: its masks follow the micro-batches
    plain = copy.deepcopy(encoder)
    engine = prepare(encoder, torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=0.0), 0.0, args, ranks)
    norm = math.inf
    while not math.isfinite(norm) and engine.scaling.scale >= 1:  # fp16 may have to lower its scale first
        texts, place = own.texts()
        engine.backward(cut(texts, micro_tokens=args.max_length), partial(step_loss, place=place, args=args, ranks=ranks))
        norm = engine.step(CHECK_LR)
    texts, place = whole.texts()
    memory.backward(plain, cut(texts, micro_tokens=1, whole=True),
                    partial(step_loss, place=place, args=args, ranks=Ranks(alone=True)))
    with engine.whole():
        pairs = [(before.grad, (before - after).detach() / CHECK_LR)
                 for before, after in zip(plain.parameters(), encoder.parameters()) if before.requires_grad]
    expected, found = (torch.cat([x.flatten() for x in xs]).double() for xs in zip(*pairs))
    ratio, cosine = (found.norm() / expected.norm()).item(), torch.cosine_similarity(found, expected, dim=0).item()
    dtype, _ = memory.choose_precision(args.precision, ranks.device)
    near, least = (1e-3, 0.9999) if dtype == torch.float32 else (0.02, 0.99)
    good = abs(ratio - 1) <= near and cosine >= least
    ranks.say(f"gradient of a batch of {args.batch_size} rows, here against one process in fp32: norm ratio {ratio:.6f} (1 +- "
              f"{near}), cosine {cosine:.6f} (at least {least}): " + ("they agree" if good else "THEY DIFFER"))
    if not good:
        sys.exit(1)


def train(ranks: Ranks, args: argparse.Namespace, resumed: checkpoint.Checkpoint | None) -> None:
    run = resumed.run if resumed else ranks.once(lambda: checkpoint.free_run(args.out))
    torch.manual_seed(args.seed)

    # data (§5.1)
    if not args.sources:
        from corpora import installed_docs
        args.sources = str(ranks.rank_0_first(installed_docs.build))
    args.sources = str(Path(args.sources).resolve())  # as a resumed run will look for it
    sources = ranks.rank_0_first(lambda: data.load_sources(args.sources))
    if args.check:
        rows = CHECK_TOKENS // (args.max_length * (2 + args.negatives))
        args.batch_size = ranks.world_size * -(-min(CHECK_ROWS, max(2, rows)) // ranks.world_size)
    draw = partial(data.SourceBatches, sources, args.batch_size, args.seed, negatives=args.negatives)
    batches = draw(rank=ranks.rank, world_size=ranks.world_size)

    # model (§5)
    if resumed:
        encoder, tokenizer = model.load(resumed.path / "model")
    elif args.model in model.SIZES:
        tokenizer = ranks.rank_0_first(lambda: data.train_tokenizer(sources, VOCABULARY))
        encoder = model.create(args.model)
    else:
        encoder, tokenizer = model.load(args.model)
    same = data.text_hash(str((batches.state_dict(), sorted(tokenizer.get_vocab().items()))))
    if len(set(ranks.all(same))) > 1:
        raise ValueError("the ranks see different corpora or tokenizers; they belong on a file system that all nodes share")
    cut = partial(data.make_micro_batches, tokenizer, max_length=args.max_length)
    cut(["a text"], micro_tokens=args.max_length)  # raises where the model cannot take it
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout) and args.dropout is not None:
            module.p = args.dropout
    encoder.to(ranks.device).train()
    if args.check:
        return check(ranks, args, encoder, next(batches), next(draw()), cut)

    # memory (§5.3)
    unset = ((1 / encoder.backbone.config.hidden_size, "ours for random weights, 1 / width") if args.model in model.SIZES else
             (LR_PRETRAINED, "Nomic Embed's for pretrained weights"))
    peak, origin = (args.lr, "--lr") if args.lr else unset
    optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=peak,
                                  weight_decay=args.weight_decay, fused=True)
    engine = prepare(encoder, optimizer, args.clip, args, ranks)
    write_model = partial(model.save, encoder, tokenizer)

    # what an earlier process left
    first = 1
    torch.manual_seed(args.seed + ranks.rank)  # a rank's dropout masks are its own
    if resumed:
        first = resumed.state["step"] + 1
        batches.load_state_dict(resumed.state["sampler"])
        moments, random_states = checkpoint.restore(resumed.path)
        engine.load_moments(moments)
        del moments  # 8 bytes a parameter
        if args.precision == resumed.state["args"]["precision"]:
            vars(engine.scaling).update(resumed.state["loss_scale"])
        if len(random_states) == ranks.world_size:
            torch.set_rng_state(random_states[ranks.rank])
        else:
            ranks.say(f"{run} had {len(random_states)} ranks, now {ranks.world_size}: all goes on but the dropout masks")
    stop = checkpoint.StopSignal()
    ranks.once(lambda: checkpoint.begin_metrics(run, first))
    log = checkpoint.Metrics(run, writes=ranks.rank == 0)
    ranks.say(f"{run}: peak lr {peak:g} ({origin})")

    # loop
    if not resumed:
        log(step=0, evaluation=held_out_scores(engine.model, tokenizer, sources, args))
    warmup, eval_every = max(1, round(args.warmup * args.steps)), args.eval_every or -(-args.steps // 2)
    bar = tqdm(range(first, args.steps + 1), initial=first - 1, total=args.steps, unit="step", disable=ranks.rank > 0)
    for step in bar:
        clock = time.perf_counter()
        batch = next(batches)
        texts, place = batch.texts()
        micro_batches = cut(texts, micro_tokens=args.micro_tokens)
        loss, accuracy = engine.backward(micro_batches, partial(step_loss, place=place, args=args, ranks=ranks))
        lr = peak * min(step / warmup, (args.steps + 1 - step) / max(1, args.steps + 1 - warmup))
        grad_norm = engine.step(lr)  # nothing changes where it is not finite

        tokens = sum(int(m.attention_mask.sum()) for m in micro_batches)
        padded = sum(m.input_ids.numel() for m in micro_batches)
        loss, accuracy, tokens, padded, stopped = ranks.total(loss.item(), accuracy, tokens, padded, stop.name is not None)
        loss, accuracy = loss / ranks.world_size, accuracy / ranks.world_size
        if not math.isfinite(loss) or engine.scaling.scale < 1:
            raise FloatingPointError(f"step {step}, source {batch.source}: loss {loss:g}, gradient norm {grad_norm:g}; "
                                     f"the checkpoints in {run} are as they were; a lower --lr may help")
        seconds = time.perf_counter() - clock
        log(step=step, loss=loss, accuracy=accuracy, source=batch.source, rows=batch.digest, lr=lr,
            grad_norm=grad_norm if math.isfinite(grad_norm) else None, skipped=engine.scaling.skipped, tokens=int(tokens),
            padding=1 - tokens / padded, seconds=seconds, pairs_per_second=args.batch_size / seconds,
            micro_batches=len(micro_batches), dropped=batch.dropped)
        bar.set_postfix(loss=f"{loss:.3f}", acc=f"{accuracy:.3f}", pairs_per_s=f"{args.batch_size / seconds:.0f}",
                        source=batch.source, **{"skipped": engine.scaling.skipped} if engine.scaling.skipped else {})
        if step == first:
            left = seconds * (args.steps - step) / relative_length(sources, batch.source, args.max_length)
            ranks.say(f"the first step took {seconds:.1f} s: expect the end about "
                      f"{time.strftime('%a %H:%M', time.localtime(time.time() + left))}, evaluations aside")
        if step % eval_every == 0 or step == args.steps:
            log(step=step, evaluation=held_out_scores(engine.model, tokenizer, sources, args))
        if step % args.save_every == 0 or step == args.steps or stopped:
            state = {"step": step, "args": vars(args), "sampler": batches.state_dict(), "loss_scale": vars(engine.scaling)}
            moments, random_states = engine.moments(), ranks.all(torch.get_rng_state())
            with engine.whole():
                ranks.once(lambda: checkpoint.save(run, state, write_model, moments, random_states))
            del moments
        if stopped and step < args.steps:
            bar.close()
            return ranks.say(f"{stop.name or 'another rank was told to stop'}: saved and stopped after step {step} of "
                             f"{args.steps}; python train.py --resume --out {run} goes on")
    with engine.whole():
        ranks.once(lambda: checkpoint.publish(run / "model", write_model))
    if ranks.rank == 0:
        report(run, log.evaluations(), isinstance(encoder.backbone, model.JinaBertModel))


def report(run: Path, evaluations: list[dict], jina: bool) -> None:
    """What the run has done, and how to use it."""
    before, after = evaluations[0], evaluations[-1]
    print(f"\n{'held-out: before -> after':30}{'targets':>8}{'recall@1':>18}{'nDCG@10':>18}")
    for name, scores in [*after["sources"].items(), *[("mean", after["mean"])] * bool(after["mean"])]:
        old = before["sources"].get(name, before["mean"])
        print(f"{name:30}{scores['targets']:8.0f}" + "".join(f"{old[metric]:9.3f} -> {scores[metric]:.3f}"
                                                             for metric in ("recall@1", "ndcg@10")))
    path, flag = run / "model", ", trust_remote_code=True" if jina else ""
    print(f"{path} opens with model.load('{path}') and SentenceTransformer('{path}'{flag})"
          + ("; without that flag other tools build a plain BERT with random weights" if jina else ""))


def main(argv: list[str] | None = None) -> None:
    ranks, args, status = Ranks(), None, 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # until the loop: what is half built is cleared away
    try:
        args, resumed = parse_arguments(argv, ranks)
        train(ranks, args, resumed)
    except (FloatingPointError, OSError, ValueError) as error:  # one line, and nothing of a former run touched
        status = 1 if isinstance(error, FloatingPointError) else 2
        ranks.complain(f"train.py: {' '.join(str(error).split())}")
    except (RuntimeError, MemoryError) as error:
        status, advice = 1, args and out_of_memory(error, args, ranks.device)
        if advice:
            sys.exit(f"train.py: {advice}")
        lost = ranks.lost()
        if not lost:
            raise
        if ranks.rank == min(set(range(ranks.world_size)) - set(lost)):
            print(f"train.py: lost rank {', '.join(map(str, lost))} ({str(error).splitlines()[0]}); the checkpoints are as "
                  f"they were, and --resume goes on from the last", file=sys.stderr)
    if status:
        sys.exit(status)
    ranks.leave()


if __name__ == "__main__":
    main()
