"""Trains an embedding model as §5 of Jina Embeddings 2 (arXiv 2310.19923) does.

    python train.py --stage 2 --batch-size 4096

Stage I is the paper's pre-training of the backbone, and not here. Stage II (§5.1) takes pairs and
equation (4), stage III (§5.2) pairs with negatives and equation (5). This file composes the four
other modules: source-wise batches (data.py), the pooled encoder (model.py), the losses (losses.py),
large batches in little memory (memory.py). How they do it is theirs to know. On many ranks:

    torchrun --nproc_per_node 2 train.py --stage 2 --batch-size 4096 --zero 2
"""

import argparse
import math
import signal
import sys
import time
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import data
import losses
import memory
import model
from corpora.prompts import check_prompts, choose_prompts
from evaluation import metrics
from plumbing import allocator, checkpoint, model_card, model_directory, run
from plumbing.check import check_update
from plumbing.flags import check_flags
from plumbing.plan import Plan, make_plan
from plumbing.probe import try_length
from plumbing.ranks import Ranks

VOCABULARY = 30522  # of a tokenizer trained here: BERT's number; JinaBERT rounds it up to 30,528
LR_PRETRAINED = 2e-5  # Nomic Embed's
# Ours, for random weights: sqrt(min(1, batch size / LR_ROWS)) / width. 8e-3 diverges for tiny; at
# 1 / width batches of 64 collapsed, and one run of 512.
LR_ROWS = 1024


# flags

def parse_arguments(argv: list[str] | None, ranks: Ranks
                    ) -> tuple[argparse.Namespace, checkpoint.Checkpoint | None]:
    """The flags, and the checkpoint to go on from. Raises OSError or ValueError, one line each."""
    parser = argument_parser()
    args, resumed = parser.parse_args(argv), None
    if args.resume:
        resumed = ranks.on_rank_0(lambda: checkpoint.newest(args.out, parser))
        parser.set_defaults(**resumed.flags())
        args = parser.parse_args(argv)
        resumed.check_flags(args)
    if args.stage == 2:
        args.negatives = 0
    check_flags(args, ranks.device)
    return args, resumed


def whole_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("losses.py (§5.1, §5.2)").add_argument
    add("--stage", type=int, choices=(2, 3), default=2,
        help="2: pairs, equation (4); 3: with negatives, equation (5)")
    add("--tau", type=float, default=0.05, help="temperature (the paper's)")
    add = parser.add_argument_group("data.py (§5.1)").add_argument
    add("--sources", metavar="MANIFEST",
        help="JSON list of sources; unset: the installed packages' documentation")
    add("--batch-size", type=int, default=4096,
        help="rows of the global batch (ours; jina-clip-v1 begins with 32,768)")
    add("--negatives", type=int, default=15, help="negatives per row in stage 3 (the paper's)")
    add("--max-length", type=int,
        help=f"tokens per text in training; unset: {data.MAX_LENGTH} (ours), or what the model "
             f"takes if that is less")
    add("--prompts", metavar="JSON",
        help='{"query": "...", "document": "..."}, put before every text; what is left out is '
             'empty; unset: the manifest\'s, or else the model\'s')
    add = parser.add_argument_group("model.py (§5)").add_argument
    add("--model", default="tiny",
        help=f"directory, hub name, or {' | '.join(model.SIZES)}: random weights (tiny: ours)")
    add("--dropout", type=float, help="unset: the model's own (0.1 in JinaBERT, 0 in tiny)")
    add = parser.add_argument_group("memory.py (§5.3)").add_argument
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="of matrix products; auto: bf16 if fast")
    add("--memory", type=float, metavar="GB",
        help="what a process (on a GPU: its tensors) may hold, about: the more, the fewer texts "
             "are embedded twice; unset: what it has and half of what is free (GPU: 0.8; ours)")
    add("--micro-tokens", type=whole_or_auto, default="auto",
        help="bound on the tokens of one forward pass, with padding; auto: as many as make it "
             "fast and fit (ours); a resumed run goes on with what was chosen")
    add("--checkpoint-layers", action="store_true",
        help="keep the layers' inputs only (the paper's; off: ours)")
    add("--zero", metavar="STAGE",
        help="DeepSpeed ZeRO stage 0, 1, 2 or 3, or a DeepSpeed JSON file that names one; unset: "
             "plain torch in one process, stage 2 (Jina Embeddings v1's) under a launcher")
    add("--check", action="store_true",
        help="do not train, but compare the gradient of a small batch, with these flags on these "
             "ranks, in many micro-batches, with that of plain fp32 in one process and pass")
    add = parser.add_argument_group("the run").add_argument
    add("--steps", type=int, default=36,
        help="optimizer steps (ours: 40 minutes on two older CPU cores)")
    add("--lr", type=float,
        help=f"peak learning rate; unset: 1 / width for random weights, and below {LR_ROWS} rows "
             f"that times the root of --batch-size / {LR_ROWS} (ours); {LR_PRETRAINED} for "
             f"pretrained ones (Nomic Embed's)")
    add("--warmup", type=float, default=0.1,
        help="share of the steps over which the rate rises linearly; then it falls (ours)")
    add("--weight-decay", type=float, default=0.01, help="AdamW's, on all weights (Nomic Embed's)")
    add("--clip", type=float, default=1.0, help="bound on the gradient norm (Nomic's); 0: none")
    add("--seed", type=int, default=0, help="of weights, batches and dropout")
    add("--out", metavar="DIR", help="unset: the next free runs/NNN")
    add("--save-every", type=int, default=20, help="steps from checkpoint to checkpoint (ours)")
    add("--eval-every", type=int, help="steps between evaluations; unset: half of --steps")
    add("--resume", action="store_true",
        help="go on from the newest checkpoint of --out, or of the newest runs/NNN, with its "
             "flags where none is given")
    # the deepspeed launcher adds it; the environment has it too
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser


# what the loop is made of

def open_model(args: argparse.Namespace, resumed: checkpoint.Checkpoint | None,
               sources: list[data.Source], ranks: Ranks) -> tuple[model.PooledEncoder, object]:
    """The encoder on this rank's device, in training mode, and its tokenizer."""
    if resumed:
        encoder, tokenizer = model.load(resumed.path / "model")
    elif args.model in model.SIZES:
        tokenizer = ranks.rank_0_first(lambda: data.train_tokenizer(sources, VOCABULARY))
        encoder = model.create(args.model)
    else:
        encoder, tokenizer = model.load(args.model)
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout) and args.dropout is not None:
            module.p = args.dropout
    encoder.to(ranks.device)
    args.max_length = args.max_length or min(data.MAX_LENGTH, tokenizer.model_max_length)
    if args.micro_tokens != "auto" and args.micro_tokens < args.max_length:
        raise ValueError(f"--micro-tokens {args.micro_tokens} is less than one text of "
                         f"{args.max_length} tokens; raise it, or lower --max-length")
    return encoder.train(), tokenizer


def peak_learning_rate(args: argparse.Namespace, width: int) -> tuple[float, str]:
    """The rate, and whose it is."""
    if args.lr:
        return args.lr, "--lr"
    if args.model in model.SIZES:
        share = min(1, args.batch_size / LR_ROWS)
        scaled = f", times the root of {share:.2g}" if share < 1 else ""
        return share ** 0.5 / width, f"ours for random weights, 1 / width{scaled}"
    return LR_PRETRAINED, "Nomic Embed's for pretrained weights"


def prepare(encoder: torch.nn.Module, optimizer: torch.optim.Optimizer, clip: float,
            args: argparse.Namespace, ranks: Ranks) -> tuple[memory.Engine, Plan]:
    """The means of §5.3 around an encoder: precision, checkpointed layers, as large passes as fit,
    ZeRO -> the engine, and its plan of the memory. clip: --clip, but in --check."""
    dtype, reason = memory.choose_precision(args.precision, ranks.device)
    size = sum(p.numel() for p in encoder.parameters()) / 1e6
    scaling = memory.mixed_precision(encoder, dtype)
    if args.checkpoint_layers:
        memory.checkpoint_layers(encoder)
    if args.zero is None and not ranks.launched:
        allocator.sparse_gradients(encoder)
    plan = make_plan(encoder, args, ranks)
    if plan.keep_tokens and ranks.device.type == "cpu":
        allocator.keep_freed_memory()
    engine = memory.make_engine(
        encoder, optimizer, clip, scaling, ranks, args.zero,
        graphs_to_keep=plan.graphs_to_keep, release_memory=plan.release_memory)
    name = str(dtype).removeprefix("torch.")
    ranks.print_rank0(f"{size:.1f} M parameters, {name} ({reason}), {engine}\n{plan.line}")
    return engine, plan


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Of step 1 .. steps: rises linearly over the share `warmup` of them, then falls linearly."""
    rising = max(1, round(warmup * steps))
    return peak * min(step / rising, (steps + 1 - step) / max(1, steps + 1 - rising))


def step_loss(q: Tensor, p: Tensor, n: Tensor | None, tau: float | Tensor, ranks: Ranks
              ) -> tuple[Tensor, float]:
    """Equation (4) or, with negatives, (5), for this rank's rows against the columns of all ranks;
    and the in-batch accuracy of these rows. q, p (B, D), n (B, N, D) or None."""
    first_row = len(q) * ranks.rank
    all_q, all_p = ranks.gather(q), ranks.gather(p)
    if n is None:
        loss = losses.pair_loss(q, p, tau, (all_q, all_p), first_row)
    else:
        columns = all_q, all_p, ranks.gather(n)
        loss = losses.hard_negative_loss(q, p, n, tau, columns, first_row)
    return loss, metrics.in_batch_accuracy(q, all_p, first_row)


def train(args: argparse.Namespace, resumed: checkpoint.Checkpoint | None, ranks: Ranks) -> int:
    """A run, or --check -> the exit status."""
    out = resumed.run if resumed else ranks.on_rank_0(lambda: run.free_run(args.out))
    torch.manual_seed(args.seed)

    # data (§5.1)
    manifest = args.sources
    if not manifest:
        from corpora import installed_docs
        manifest = ranks.rank_0_first(installed_docs.build)
    manifest = str(Path(manifest).resolve())  # as a resumed run will look for it
    sources = ranks.rank_0_first(lambda: data.load_sources(manifest))
    if not args.check:  # which takes fewer rows
        batches = data.SourceBatches(
            sources, args.batch_size, args.seed, ranks.rank, ranks.world_size, args.negatives)

    # model (§5)
    encoder, tokenizer = open_model(args, resumed, sources, ranks)
    encoder.prompts, prompts_line = choose_prompts(sources, args.prompts, encoder.prompts)
    ranks.on_rank_0(lambda: check_prompts(sources))
    ranks.print_rank0(f"{args.model}: {model_directory.describe(encoder)}; {prompts_line}")
    make_micro_batches = partial(data.make_micro_batches, tokenizer, max_length=args.max_length)
    try_length(encoder, tokenizer, args.max_length, chain(*(s.prompts for s in sources)))
    corpus = [(s.name, s.rate, len(s.train), s.fingerprint) for s in sources]
    if not ranks.agree((corpus, sorted(tokenizer.get_vocab().items()))):
        raise ValueError("the ranks see different corpora or tokenizers; they belong on a file "
                         "system that all nodes share")
    if args.check:
        good = check_update(encoder, tokenizer, sources, args, ranks, prepare, step_loss)
        return 0 if good else 1

    # memory (§5.3)
    peak, origin = peak_learning_rate(args, encoder.backbone.config.hidden_size)
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=peak, weight_decay=args.weight_decay, fused=True)
    engine, plan = prepare(encoder, optimizer, args.clip, args, ranks)

    # the run
    first = resumed.state["step"] + 1 if resumed else 1
    torch.manual_seed(args.seed + ranks.rank)  # a rank's dropout masks are its own
    if resumed:
        batches.load_state_dict(resumed.state["sampler"])
        checkpoint.restore(resumed, engine, args.precision, ranks)
    evaluate = partial(metrics.held_out_retrieval, engine.model, tokenizer, sources,
                       args.max_length, plan.micro_tokens)
    write_model = partial(model.save, encoder, tokenizer)
    card = model_card.card_fields(encoder, tokenizer, batches, manifest, args, peak)
    eval_every = args.eval_every or math.ceil(args.steps / 2)
    stop = run.StopSignal()
    ranks.on_rank_0(lambda: run.begin(out, first))
    log = run.Metrics(out, writes=ranks.rank == 0, first=first)
    ranks.print_rank0(f"{out}: peak lr {peak:g} ({origin})")
    if not resumed:
        log(step=0, evaluation=evaluate())

    # loop
    bar = tqdm(range(first, args.steps + 1), initial=first - 1, total=args.steps, unit="step",
               disable=ranks.rank > 0)
    for step in bar:
        start = time.perf_counter()
        lr = learning_rate(step, args.steps, peak, args.warmup)

        batch = next(batches)                                     # one source (§5.1)
        micro_batches = make_micro_batches(batch.texts, micro_tokens=plan.micro_tokens)
        embeddings = engine.embed(micro_batches)                  # pass 1 (§5.3): a leaf (M, D)
        loss, accuracy = step_loss(*batch.split(embeddings), args.tau, ranks)  # equation (4) or (5)
        loss.backward()                                           # as far as the embeddings
        engine.backward(embeddings.grad)                          # pass 2: on into the parameters
        grad_norm = engine.step(lr)                               # nothing changes if not finite
        del embeddings  # else the next pass 1 would hold both

        tokens = sum(int(m.attention_mask.sum()) for m in micro_batches)
        padded = sum(m.input_ids.numel() for m in micro_batches)
        loss, accuracy = ranks.mean(loss.item(), accuracy)
        tokens, padded, stopped = ranks.sum(tokens, padded, stop.name is not None)
        if not math.isfinite(loss) or engine.scaling.exhausted():
            diverged_at = step - max(1, engine.scaling.bad_steps)  # whose weights are those of now
            raise FloatingPointError(
                f"step {step}, source {batch.source}: loss {loss:g}, gradient norm {grad_norm:g}; "
                f"{ranks.on_rank_0(lambda: checkpoint.set_aside(out, diverged_at))}")
        seconds = time.perf_counter() - start
        log(step=step, loss=loss, accuracy=accuracy, source=batch.source, rows=batch.digest, lr=lr,
            grad_norm=grad_norm if math.isfinite(grad_norm) else None,
            skipped=engine.scaling.skipped, tokens=int(tokens), padding=1 - tokens / padded,
            seconds=seconds, pairs_per_second=args.batch_size / seconds,
            micro_batches=len(micro_batches), dropped=batch.dropped)
        bar.set_postfix(loss=f"{loss:.3f}", acc=f"{accuracy:.3f}", source=batch.source,
                        pairs_per_s=f"{args.batch_size / seconds:.0f}")

        if step % eval_every == 0 or step == args.steps:
            log(step=step, evaluation=evaluate())
        if step % args.save_every == 0 or step == args.steps or stopped:
            state = {"step": step, "args": vars(args), "sampler": batches.state_dict(),
                     "chosen": {"sources": manifest, "micro_tokens": plan.micro_tokens},
                     "loss_scale": vars(engine.scaling)}
            checkpoint.save(out, state, write_model, engine, ranks)
        if stopped and step < args.steps:
            bar.close()
            ranks.print_rank0(
                f"{stop.name or 'another rank was told to stop'}: saved and stopped after step "
                f"{step} of {args.steps}; python train.py --resume --out {out} goes on")
            return 0

    with engine.whole():
        ranks.on_rank_0(lambda: model_card.publish_with_card(
            out / "model", write_model, card, log.evaluations()))
    if ranks.rank == 0:
        jina = isinstance(encoder.backbone, model.JinaBertModel)
        run.report(out, log.evaluations(), needs_flag=jina)
    return 0


def main(argv: list[str] | None = None) -> None:
    ranks, args = Ranks(), None
    # until the loop has its own: what is half built is cleared away
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        args, resumed = parse_arguments(argv, ranks)
        status = train(args, resumed, ranks)
    except (ArithmeticError, OSError, ValueError, RuntimeError, MemoryError,
            KeyboardInterrupt) as error:
        status = run.report_error(error, args, ranks)
    if status:
        sys.exit(status)
    ranks.leave()


if __name__ == "__main__":
    main()
