"""What fits: how much memory there is, what a token costs in it, and so how large the passes of
memory.py may be.

    --micro-tokens auto   as many tokens a pass as make it fast, fewer where they do not fit
    --memory GB           what is left of it then keeps the graphs of pass 1, so that pass 2 need
                          not embed those texts again

Sizes change what a step costs, never its update, but for rounding and dropout's masks, which follow
the micro-batches.
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

from memory import read_zero
from plumbing.allocator import give_back_freed_memory
from plumbing.ranks import Ranks
from plumbing.refusals import is_out_of_memory

# Ours. On a CPU larger passes are no faster: a step of tiny takes 1.12 times as long at 8,192. On a
# GPU not measured.
TOKENS = {"cpu": 2048, "cuda": 32768}
MEASURED = {"cpu": 512, "cuda": 8192}  # tokens of the micro-batch that tells what one costs
# Ours: of the free memory, where --memory is not given; on a CPU others want some too
SHARE = {"cpu": 0.5, "cuda": 0.8}


class Plan(NamedTuple):
    micro_tokens: int
    keep_tokens: int  # room for the graphs of so many
    line: str
    max_bytes: float = math.inf  # that a process on a CPU may hold
    min_tokens: int = 0  # a graph counts for so many at least: some of it is there in any case

    def graphs_to_keep(self, micro_batches: Sequence[tuple]) -> int:
        """Of how many of the last micro-batches (index, input_ids, mask) the graph is kept:
        keep_tokens together at most, padding included. One at least, for pass 2 needs the room of
        one graph anyway."""
        sizes = [max(self.min_tokens, input_ids.numel())
                 for _, input_ids, _ in reversed(micro_batches)]
        return max(1, sum(size <= self.keep_tokens for size in accumulate(sizes)))

    def release_memory(self) -> None:
        """Gives back what lies freed in pieces, where it is so much that the process holds more
        than it may."""
        if memory_held(torch.device("cpu")) > self.max_bytes:
            give_back_freed_memory()


def memory_held(device: torch.device, peak: bool = False) -> int:
    """Bytes of this process now, or at its peak since `reset_peak`; on a GPU what torch has
    allocated there. 0: unknown."""
    if device.type == "cuda":
        if peak:
            return torch.cuda.max_memory_allocated(device)
        return torch.cuda.memory_allocated(device)
    status, field = Path("/proc/self/status"), "VmHWM" if peak else "VmRSS"
    if not status.exists():
        return 0
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", status.read_text())[1])


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # if it is not allowed, `bytes_a_token` finds too much
            Path("/proc/self/clear_refs").write_text("5")


def memory_free(device: torch.device) -> int:
    """Bytes this process could still take: of the GPU, or its share of the machine's or its
    container's memory."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    room = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    # torchrun's name, and the deepspeed launcher's
    processes = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", 1)
    return min([room, *below_limits()]) // int(processes)


def below_limits(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
                 ) -> Iterator[int]:
    """What the control groups that this process is in (a container, a job of Slurm) leave of their
    limits, in bytes."""
    versions = {"": ("memory.max", "memory.current", "inactive_file"),
                "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}
    for kind, group in re.findall(r"^\d+:(|memory):/(.*)$", own.read_text(), re.MULTILINE):
        limit, used, files = versions[kind]
        for folder in (root / kind / group, *(root / kind / group).parents):
            if not (folder / limit).exists() or (folder / limit).read_text().strip() == "max":
                continue
            most, taken = (int((folder / name).read_text()) for name in (limit, used))
            statistics = (folder / "memory.stat").read_text()
            cached = re.search(rf"^{files} (\d+)", statistics, re.MULTILINE)
            yield most - taken + (int(cached[1]) if cached else 0)  # files go when memory is needed


def bytes_a_token(encoder: nn.Module, max_length: int, device: torch.device) -> tuple[float, float]:
    """Bytes a token, measured on one micro-batch of MEASURED tokens: what its graph holds between
    forward and backward pass (in 16 bits also a copy of the weights), and the peak of both passes.
    Leaves gradients of zeros, and dropout's random state as it was."""
    state, config = torch.get_rng_state(), encoder.backbone.config
    texts = math.ceil(MEASURED[device.type] / max_length)
    ids = torch.randint(config.vocab_size, (texts, max_length), device=device)
    mask = torch.ones_like(ids)
    mask[:, -1] = 0  # with padding ALiBi's bias is another one for every text
    for _ in range(2):  # the first makes the gradients, and loads kernels
        give_back_freed_memory()
        before = memory_held(device)
        reset_peak(device)
        embeddings = encoder(ids, mask)
        give_back_freed_memory()
        graph = memory_held(device) - before
        embeddings.sum().backward()
        peak = memory_held(device, peak=True) - before
    for p in encoder.parameters():
        if p.grad is not None:
            p.grad.zero_()
    give_back_freed_memory()
    torch.set_rng_state(state)
    return max(graph, 1) / ids.numel(), max(peak, graph, 1) / ids.numel()


def make_plan(encoder: nn.Module, args: argparse.Namespace, ranks: Ranks) -> Plan:
    """The same on all ranks: what fits on the one with the least room. args: train.py's."""
    kind, config = ranks.device.type, encoder.backbone.config
    asked = None if args.micro_tokens == "auto" else args.micro_tokens
    size = asked or max(args.max_length, TOKENS[kind])
    if not memory_held(ranks.device):
        return Plan(size, 0, "memory: this system does not tell, so no activations are kept")
    costs = ranks.gather_objects(bytes_a_token(encoder, args.max_length, ranks.device))
    graph = max(graph for graph, _ in costs)
    peak = max(peak for _, peak in costs)

    now = memory_held(ranks.device)
    total = args.memory * 1e9 if args.memory else now + SHARE[kind] * memory_free(ranks.device)
    stage, optimizer = for_the_optimizer(encoder, args, ranks)
    texts = args.batch_size // ranks.world_size * (2 + args.negatives)
    # embeddings, unit rows, the columns of all ranks, and their gradients; tiles
    loss = 4 * config.hidden_size * texts * (4 + 4 * ranks.world_size) + 1e8
    room = min(ranks.gather_objects(total - now - optimizer - loss))

    while not asked and size > args.max_length and peak * size > room:
        size = max(args.max_length, size // 2)
    keep_tokens = int(max(0, (room - (peak - graph) * size) / graph))
    # less than half of the layers' inputs: then malloc gave nothing back, and nothing was measured
    unmeasured = graph < 2 * config.num_hidden_layers * config.hidden_size
    if keep_tokens < size or stage == 3 or unmeasured:
        keep_tokens = 0  # one graph is kept anyway; for stage 3 see memory.ZeroEngine
    keep = min(keep_tokens, texts * args.max_length)
    needed = now + optimizer + loss + max(keep * graph + (peak - graph) * size, peak * size)

    line = (f"memory in GB: {now / 1e9:.2f} the process with parameters and gradients, "
            f"{optimizer / 1e9:.2f} optimizer, {loss / 1e9:.2f} loss, "
            f"{1000 * graph / 1e9:.2f} activations per 1,000 tokens; {size:,} tokens a pass, "
            f"the graphs of {keep:,} kept; about {needed / 1e9:.2f} of at most {total / 1e9:.2f}")
    if peak * size > room:
        line += f": MORE THAN THERE IS; what helps: {', '.join(ways_to_less(args, size))}"
    max_bytes = max(needed, total) - loss if kind == "cpu" else math.inf  # room for the loss
    return Plan(size, keep_tokens, line, max_bytes, min_tokens=MEASURED[kind])


def for_the_optimizer(encoder: nn.Module, args: argparse.Namespace, ranks: Ranks
                      ) -> tuple[int, float]:
    """The ZeRO stage, and the bytes of AdamW's moments; DeepSpeed's stages 1 to 3 share them, and a
    copy of the parameters, and hold buckets to reduce gradients in."""
    parameters = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    if args.zero is None and not ranks.launched:
        return 0, 8 * parameters
    zero = read_zero(args.zero or "2")["zero_optimization"]
    bucket = 8 * zero.get("reduce_bucket_size", 5e8)  # DeepSpeed's default
    if zero["stage"] == 0:
        return 0, 8 * parameters + bucket
    return zero["stage"], 12 * parameters / ranks.world_size + bucket


def ways_to_less(args: argparse.Namespace, size: int) -> list[str]:
    """What helps where a pass of `size` tokens does not fit."""
    ways = []
    if args.memory:
        ways.append("a higher --memory")
    if size > args.max_length:
        ways.append("a lower --micro-tokens")
    if not args.checkpoint_layers:
        ways.append("--checkpoint-layers")
    return [*ways, "a lower --batch-size or --max-length"]


def out_of_memory(error: Exception, args: argparse.Namespace, device: torch.device) -> str | None:
    """What to lower, and to what, if it is memory that ran out; else None. (Linux may also kill a
    process without a word.)"""
    if not is_out_of_memory(error):
        return None
    most, ways = memory_held(device, peak=True) / 1e9, []
    if most:
        gigabytes = 0.8 * min(most, args.memory or most)
        ways.append(f"--memory {gigabytes:.2g} keeps fewer activations")
    length = args.max_length  # None until the model is open
    if length and args.micro_tokens != "auto" and args.micro_tokens > length:
        half = max(length, args.micro_tokens // 2)
        ways.append(f"--micro-tokens {half} makes the passes smaller")
    if not args.checkpoint_layers:
        ways.append("--checkpoint-layers keeps only what enters the layers")
    if args.batch_size > 1 and not args.resume:  # a run goes on with its batches
        ways.append(f"--batch-size {args.batch_size // 2} makes the loss smaller")
    return f"out of memory, with {most:.2f} GB held at most: {'; '.join(ways)}"
