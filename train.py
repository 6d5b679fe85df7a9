"""Trains an embedding model as §5 of Jina Embeddings 2 (arXiv 2310.19923) does: stage 2 on pairs, stage 3 with negatives.

    python train.py --stage 2 --batch-size 4096

composes the four other modules: source-wise batches (data.py, §5.1), the pooled encoder (model.py, §5), equations (4) and
(5) (losses.py), large batches in little memory (memory.py, §5.3). It knows how none of them does it.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
import data
import evaluate
import losses
import memory
import model


VOCABULARY = 30522  # entries of a tokenizer trained here: BERT's number; JinaBERT rounds it up to 30,528 embeddings
LR_RANDOM = 2e-3, "ours, for random weights"
LR_PRETRAINED = 2e-5, "Nomic Embed's, for pretrained weights"


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, checkpoint.Checkpoint | None]:
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
    add("--dropout", type=float, help="unset: the model's own (0.1 in JinaBERT)")
    add = parser.add_argument_group("memory.py (§5.3)").add_argument
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of matrix products; auto: bf16 if fast")
    add("--micro-tokens", type=int, default=8192, help="bound on the tokens of one forward pass, with padding (ours)")
    add("--checkpoint-layers", action="store_true", help="keep the layers' inputs only (the paper's; off: ours)")
    add = parser.add_argument_group("the run").add_argument
    add("--steps", type=int, default=36, help="optimizer steps (ours: minutes on two CPU cores with bf16 matrix units)")
    add("--lr", type=float, help=f"peak learning rate; unset: {LR_RANDOM[0]} ({LR_RANDOM[1]}), {LR_PRETRAINED[0]} "
                                 f"({LR_PRETRAINED[1]})")
    add("--warmup", type=float, default=0.1, help="share of the steps over which the rate rises linearly; then it falls (ours)")
    add("--weight-decay", type=float, default=0.01, help="AdamW's, on all parameters (Nomic Embed's)")
    add("--clip", type=float, default=1.0, help="bound on the gradient norm (Nomic Embed's)")
    add("--seed", type=int, default=0, help="of weights, batches and dropout")
    add("--out", metavar="DIR", help="unset: the next free runs/NNN")
    add("--save-every", type=int, default=20, help="steps from checkpoint to checkpoint (ours)")
    add("--eval-every", type=int, help="steps from evaluation to evaluation; unset: half of --steps")
    add("--resume", action="store_true", help="go on from the newest checkpoint of --out, or of the newest runs/NNN, "
                                              "with its flags where none is given")
    args, resumed = parser.parse_args(argv), None
    if args.resume:
        resumed = checkpoint.newest(args.out)
        parser.set_defaults(**resumed.state["args"])
        args = parser.parse_args(argv)
        if resumed.state["step"] >= args.steps and (resumed.run / "model").is_dir():
            raise ValueError(f"--resume: {resumed.run} is finished with {resumed.state['step']} steps; a higher --steps goes "
                             f"on from there, with the learning rate of the longer schedule")
        if (args.model, args.stage) != (resumed.state["args"]["model"], resumed.state["args"]["stage"]):
            raise ValueError(f"--resume: {resumed.run} has another --model or --stage; --model {resumed.run / 'model'} without "
                             f"--resume begins a new run with its model")
    for flag in ("batch_size", "micro_tokens", "steps", "save_every", "eval_every", "negatives", "tau", "clip", "lr"):
        value = getattr(args, flag)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{flag.replace('_', '-')} {value}: expected a number above 0")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: expected 0 or more")
    if args.stage == 3 and not args.sources:
        raise ValueError("--stage 3: the default sources have no negatives; --sources names some that have")
    if args.micro_tokens < args.max_length:
        raise ValueError(f"--micro-tokens {args.micro_tokens} is less than one text of --max-length {args.max_length}")
    return args, resumed


def held_out_scores(encoder, tokenizer, sources: list[data.Source], args: argparse.Namespace) -> dict:
    """{"mean": metrics, "sources": {name: metrics}} of retrieval among each source's held-out pairs."""
    scores = {source.name: evaluate.retrieval(encoder, tokenizer, source.held_out, args.max_length, args.micro_tokens)
              for source in sources if source.held_out}
    names = next(iter(scores.values()), {})
    return {"mean": {name: sum(s[name] for s in scores.values()) / len(scores) for name in names}, "sources": scores}


def train(args: argparse.Namespace, resumed: checkpoint.Checkpoint | None) -> None:
    run = resumed.run if resumed else checkpoint.free_run(args.out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)

    # data (§5.1)
    if not args.sources:
        from corpora import installed_docs
        args.sources = str(installed_docs.build())
    args.sources = str(Path(args.sources).resolve())  # as a resumed run will look for it
    sources = data.load_sources(args.sources)
    k, N = args.batch_size, args.negatives if args.stage == 3 else 0
    batches = data.SourceBatches(sources, k, args.seed, negatives=N)

    # model (§5)
    if resumed:
        encoder, tokenizer = model.load(resumed.path / "model")
    elif args.model in model.SIZES:
        encoder, tokenizer = model.create(args.model), data.train_tokenizer(sources, VOCABULARY)
    else:
        encoder, tokenizer = model.load(args.model)
    memory.micro_batches(tokenizer, ["a text"], args.max_length, args.micro_tokens)  # raises where the model cannot take it
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout) and args.dropout is not None:
            module.p = args.dropout
    encoder.to(device).train()

    # losses (§5.1, §5.2)
    if args.stage == 2:
        loss_of = lambda e: losses.pair_loss(e[:k], e[k:], args.tau)
    else:
        loss_of = lambda e: losses.hard_negative_loss(e[:k], e[k : 2 * k], e[2 * k :].view(k, N, -1), args.tau)

    # memory (§5.3)
    dtype, reason = memory.choose_precision(args.precision, device)
    memory.mixed_precision(encoder, dtype)
    if args.checkpoint_layers:
        memory.checkpoint_layers(encoder)

    # optimizer, and what an earlier process left
    peak, origin = (args.lr, "--lr") if args.lr else LR_RANDOM if args.model in model.SIZES else LR_PRETRAINED
    parameters = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=peak, weight_decay=args.weight_decay, fused=True)
    first = 1
    if resumed:
        first = resumed.state["step"] + 1
        batches.load_state_dict(resumed.state["sampler"])
        memory.set_random_state(checkpoint.restore(resumed.path, parameters, optimizer), device)
    stop, log = checkpoint.StopSignal(), checkpoint.Metrics(run, first)
    print(f"{run}: {sum(p.numel() for p in parameters.values()) / 1e6:.1f} M parameters, peak lr {peak:g} ({origin}), "
          f"{str(dtype).removeprefix('torch.')} ({reason})", flush=True)
    if device.type == "cpu" and dtype == torch.float32 and args.model == "tiny":
        print("without bf16 units a step takes long; shorter: python train.py --batch-size 1024 --steps 30", flush=True)

    # loop
    if not resumed:
        log(step=0, evaluation=held_out_scores(encoder, tokenizer, sources, args))
    warmup, eval_every = max(1, round(args.warmup * args.steps)), args.eval_every or -(-args.steps // 2)
    bar = tqdm(range(first, args.steps + 1), initial=first - 1, total=args.steps, unit="step")
    for step in bar:
        clock = time.perf_counter()
        batch = next(batches)
        micro_batches = memory.micro_batches(tokenizer, batch.texts(), args.max_length, args.micro_tokens)
        loss, embeddings = memory.backward(encoder, micro_batches, loss_of)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters.values(), args.clip)
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise FloatingPointError(f"step {step}, source {batch.source}: loss {loss:g}, gradient norm {grad_norm:g}; "
                                     f"the checkpoints in {run} are as they were; a lower --lr may help")
        lr = peak * min(step / warmup, (args.steps + 1 - step) / max(1, args.steps + 1 - warmup))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        accuracy = evaluate.in_batch_accuracy(embeddings[:k], embeddings[k : 2 * k])
        tokens = sum(int(m.attention_mask.sum()) for m in micro_batches)
        padded_tokens = sum(m.input_ids.numel() for m in micro_batches)
        seconds = time.perf_counter() - clock
        log(step=step, loss=loss.item(), accuracy=accuracy, source=batch.source, lr=lr, grad_norm=grad_norm.item(),
            tokens=tokens, padding=1 - tokens / padded_tokens, seconds=seconds, pairs_per_second=k / seconds,
            micro_batches=len(micro_batches), dropped=batch.dropped)
        bar.set_postfix(loss=f"{loss:.3f}", acc=f"{accuracy:.3f}", pairs_per_s=f"{k / seconds:.0f}", source=batch.source)
        if step == first:
            end = time.strftime("%H:%M", time.localtime(time.time() + seconds * (args.steps - step)))
            bar.write(f"the first step took {seconds:.1f} s: expect the end about {end}, evaluations aside")
        if step % eval_every == 0 or step == args.steps:
            log(step=step, evaluation=held_out_scores(encoder, tokenizer, sources, args))
        if step % args.save_every == 0 or step == args.steps or stop.name:
            state = {"step": step, "args": vars(args), "sampler": batches.state_dict()}
            checkpoint.save(run, state, lambda part: model.save(encoder, tokenizer, part), parameters, optimizer,
                            memory.random_state(device))
        if stop.name and step < args.steps:
            bar.close()
            print(f"{stop.name}: saved and stopped after step {step} of {args.steps}; "
                  f"python train.py --resume --out {run} goes on")
            return
    checkpoint.publish(run / "model", lambda part: model.save(encoder, tokenizer, part))
    report(run, log.evaluations(), isinstance(encoder.backbone, model.JinaBertModel))


def report(run: Path, evaluations: list[dict], jina: bool) -> None:
    """What the run has done, and how to use it."""
    before, after = evaluations[0], evaluations[-1]
    print(f"\n{'held-out recall@1':30}{'targets':>8}{'before':>8}{'after':>8}")
    for name, scores in [*after["sources"].items(), *[("mean", after["mean"])] * bool(after["mean"])]:
        old = before["sources"].get(name, before["mean"])
        print(f"{name:30}{scores['targets']:8.0f}{old['recall@1']:8.3f}{scores['recall@1']:8.3f}")
    path, flag = run / "model", ", trust_remote_code=True" if jina else ""
    print(f"{path} opens with model.load('{path}') and SentenceTransformer('{path}'{flag})"
          + ("; without that flag other tools build a plain BERT with random weights" if jina else ""))


def main(argv: list[str] | None = None) -> None:
    try:
        train(*parse_arguments(argv))
    except FloatingPointError as error:
        sys.exit(f"train.py: {error}")
    except (OSError, ValueError) as error:  # bad input: one line, and nothing of a former run touched
        print("train.py:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
