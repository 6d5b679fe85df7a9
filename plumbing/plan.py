"""What fits: how much memory there is, what a token costs in it, and so how large the passes of memory.py may be.

    --micro-tokens auto   as many tokens a pass as make it fast, fewer where they do not fit
    --memory GB           what is left of it then keeps the graphs of pass 1, so that pass 2 need not embed those texts again

Sizes change what a step costs, never its update, but for rounding and dropout's masks, which follow the micro-batches.
"""

import argparse
import contextlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from data import MicroBatch
from memory import read_zero
from plumbing.allocator import give_back_freed_memory
from plumbing.ranks import Ranks

# Ours. On a CPU larger passes are no faster: a step of tiny takes 1.12 times as long at 8,192. On a GPU not measured.
TOKENS = {"cpu": 2048, "cuda": 32768}
MEASURED = {"cpu": 512, "cuda": 8192}  # tokens of the micro-batch that tells what one costs
SHARE = {"cpu": 0.5, "cuda": 0.8}  # Ours: of the free memory, where --memory is not given; on a CPU others want some too


class Plan(NamedTuple):
    micro_tokens: int
    keep_tokens: int  # room for the graphs of so many
    line: str
    most: float = math.inf  # bytes that a process on a CPU may hold
    least: int = 0  # tokens that a graph counts for even if it has fewer: some of it, as a copy of the weights, is not by token

    def kept(self, micro_batches: Sequence[MicroBatch]) -> int:
        """Of how many of the last micro-batches the graph is kept: keep_tokens together at most, padding included. One at
        least, for pass 2 needs the room of one graph anyway."""
        sizes = accumulate(max(self.least, micro_batch.input_ids.numel()) for micro_batch in reversed(micro_batches))
        return max(1, sum(size <= self.keep_tokens for size in sizes))

    def tidy(self) -> None:
        """Gives back what lies freed in pieces, where it is so much that the process holds more than it may."""
        if held(torch.device("cpu")) > self.most:
            give_back_freed_memory()


def held(device: torch.device, peak: bool = False) -> int:
    """Bytes of this process now, or at its peak since `forget_peak`; on a GPU what torch has allocated there. 0: unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    status = Path("/proc/self/status")
    found = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+)", status.read_text() if status.exists() else "")
    return 1024 * int(found[1]) if found else 0


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # not allowed everywhere; `cost` then finds more than there is, not less
            Path("/proc/self/clear_refs").write_text("5")


def free(device: torch.device) -> int:
    """Bytes this process could still take: of the GPU, or its share of the machine's or its container's memory."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    room = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    processes = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", 1)  # torchrun's name, and deepspeed's
    return min([room, *below_limits()]) // int(processes)


def below_limits(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """What the control groups that this process is in (a container, a job of Slurm) leave of their limits, in bytes."""
    versions = {"": ("memory.max", "memory.current", "inactive_file"),
                "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}
    for kind, group in re.findall(r"^\d+:(|memory):/(.*)$", own.read_text(), re.MULTILINE):
        limit, used, files = versions[kind]
        for folder in (root / kind / group, *(root / kind / group).parents):
            if (folder / limit).exists() and (most := (folder / limit).read_text().strip()) != "max":
                cached = re.search(rf"^{files} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
                yield int(most) - int((folder / used).read_text()) + int(cached[1] if cached else 0)  # given up when needed


def cost(encoder: nn.Module, max_length: int, device: torch.device) -> tuple[float, float]:
    """Bytes a token, measured on one micro-batch of MEASURED tokens: what its graph holds between forward and backward pass
    (in 16 bits also a copy of the weights), and the peak of both passes. Leaves gradients of zeros, and dropout's random state
    as it was."""
    state, config = torch.get_rng_state(), encoder.backbone.config
    ids = torch.randint(config.vocab_size, (-(-MEASURED[device.type] // max_length), max_length), device=device)
    mask = torch.ones_like(ids)
    mask[:, -1] = 0  # with padding ALiBi's bias is another one for every text
    for _ in range(2):  # the first makes the gradients, and loads kernels
        give_back_freed_memory()
        before = held(device)
        forget_peak(device)
        embeddings = encoder(ids, mask)
        give_back_freed_memory()
        graph = held(device) - before
        embeddings.sum().backward()
        peak = held(device, peak=True) - before
    for p in encoder.parameters():
        if p.grad is not None:
            p.grad.zero_()
    give_back_freed_memory()
    torch.set_rng_state(state)
    return max(graph, 1) / ids.numel(), max(peak, graph, 1) / ids.numel()


def plan(encoder: nn.Module, args: argparse.Namespace, ranks: Ranks) -> Plan:
    """The same on all ranks: what fits on the one with the least room. args: train.py's."""
    default = max(args.max_length, TOKENS[ranks.device.type])
    chosen = None if args.micro_tokens == "auto" else args.micro_tokens
    if not held(ranks.device):
        return Plan(chosen or default, 0, "memory: this system does not tell, so no activations are kept")
    graph, peak = (max(x) for x in zip(*ranks.all(cost(encoder, args.max_length, ranks.device))))
    now = held(ranks.device)
    total = args.memory * 1e9 if args.memory else now + SHARE[ranks.device.type] * free(ranks.device)
    # AdamW's moments; DeepSpeed's stages 1 to 3 share them, and a copy of the parameters, and hold buckets to reduce
    plain = args.zero is None and not ranks.launched
    zero = {"stage": 0, "reduce_bucket_size": 0} if plain else read_zero(args.zero or "2")["zero_optimization"]
    parameters = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    optimizer = 12 * parameters / ranks.world_size if zero["stage"] else 8 * parameters
    optimizer += 8 * zero.get("reduce_bucket_size", 5e8)  # DeepSpeed's default
    # embeddings, unit rows, the columns of all ranks, and their gradients; tiles
    texts = args.batch_size // ranks.world_size * (2 + args.negatives)
    loss = 4 * encoder.backbone.config.hidden_size * texts * (4 + 4 * ranks.world_size) + 1e8
    room = min(ranks.all(total - now - optimizer - loss))
    size = chosen or default
    while not chosen and size > args.max_length and peak * size > room:
        size = max(args.max_length, size // 2)
    fits = int(max(0, (room - (peak - graph) * size) / graph))
    config = encoder.backbone.config
    untold = graph < 2 * config.num_hidden_layers * config.hidden_size  # half of their inputs: a malloc that gives nothing back
    if fits < size or zero["stage"] == 3 or untold:
        fits = 0  # one graph is kept anyway; for stage 3 see Zero.backward
    keep = min(fits, texts * args.max_length)
    needed = now + optimizer + loss + max(keep * graph + (peak - graph) * size, peak * size)
    gb = lambda x: f"{x / 1e9:.2f}"
    line = (f"memory in GB: {gb(now)} the process with parameters and gradients, {gb(optimizer)} optimizer, {gb(loss)} loss, "
            f"{gb(1000 * graph)} activations per 1,000 tokens; {size:,} tokens a pass, the graphs of {keep:,} kept; about "
            f"{gb(needed)} of at most {gb(total)}")
    if peak * size > room:
        ways = (["a higher --memory"] * bool(args.memory) + ["a lower --micro-tokens"] * (size > args.max_length)
                + ["--checkpoint-layers"] * (not args.checkpoint_layers) + ["a lower --batch-size or --max-length"])
        line += f": MORE THAN THERE IS; what helps: {', '.join(ways)}"
    most = max(needed, total) if ranks.device.type == "cpu" else math.inf
    return Plan(size, fits, line, most, least=MEASURED[ranks.device.type])


def out_of_memory(error: Exception, args: argparse.Namespace, device: torch.device) -> str | None:
    """What to lower, and to what, if it is memory that ran out; else None. (Linux may also kill a process without a word.)"""
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not re.search("allocate memory|ALLOC_FAILED", str(error)):
        return None
    most = held(device, peak=True) / 1e9
    ways = [f"--memory {0.8 * min(most, args.memory or most):.2g} keeps fewer activations"] * (most > 0)
    if isinstance(args.micro_tokens, int) and args.micro_tokens > args.max_length:
        ways.append(f"--micro-tokens {max(args.max_length, args.micro_tokens // 2)} makes the passes smaller")
    if not args.checkpoint_layers:
        ways.append("--checkpoint-layers keeps only what enters the layers")
    if args.batch_size > 1 and not args.resume:  # a run goes on with its batches
        ways.append(f"--batch-size {args.batch_size // 2} makes the loss smaller")
    return f"out of memory, with {most:.2f} GB held at most: {'; '.join(ways)}"
