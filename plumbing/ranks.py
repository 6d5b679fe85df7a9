"""The processes of one training run: what they tell each other, and how the rows of one reach the
losses of all.

Nothing here knows about models, losses or optimizers. Axis letters: W ranks, b rows of one rank.
"""

import atexit
import contextlib
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from hashlib import blake2b

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

SILENCE = 60  # seconds that another host may be out of reach; TCP itself would wait 15 minutes


class Gather(torch.autograd.Function):
    """(b, ...) of every rank -> (W b, ...), in the order of the ranks. Backward: every rank has a
    gradient of all W b rows for its own loss; a rank gets back the *sum* over ranks of those of its
    own rows."""

    @staticmethod
    def forward(ctx, own: Tensor, world_size: int) -> Tensor:
        ctx.shape = own.shape
        rows = own.new_empty(world_size * len(own), *own.shape[1:])
        dist.all_gather_single(rows, own.contiguous())
        return rows

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        own = gradient.new_empty(ctx.shape)
        dist.reduce_scatter_single(own, gradient.contiguous())
        return own, None


class Ranks:
    """The processes of a run, as torchrun or the deepspeed launcher started them; without a
    launcher this process alone."""

    def __init__(self, alone: bool = False):
        self.launched = "RANK" in os.environ and not alone
        self.rank = int(os.environ["RANK"]) if self.launched else 0
        self.world_size = int(os.environ["WORLD_SIZE"]) if self.launched else 1
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        if self.launched:
            self.store = next(dist.rendezvous("env://"))[0]
            self.join(self.store)
            self.hosts = self.gather_objects(platform.node())
            self.ended = threading.Event()
            self.beats = threading.Thread(target=self._beat, daemon=True)
            self.beats.start()
            atexit.register(self._end_beats)

    def join(self, store: dist.Store) -> None:
        forever = timedelta(days=1)  # the others wait while rank 0 builds an index
        cuda = self.device.type == "cuda"
        dist.init_process_group(
            "nccl" if cuda else "gloo", store=store, rank=self.rank, world_size=self.world_size,
            timeout=timedelta(minutes=10) if cuda else forever)
        self.messages = dist.new_group(backend="gloo", timeout=forever)  # short ones, by the CPU

    def leave(self) -> None:
        """The process group, where every rank does: NCCL's end waits for all."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def complain(self, line: str) -> None:
        """One line for all ranks that fail, of rank 0 if it is among them. Rank 0 may hold the
        store in which they look whether another has spoken: it waits until they have."""
        time.sleep(1 if self.rank else 0)
        with contextlib.suppress(RuntimeError):
            if not self.launched or self.store.add("complaints", 1) == 1:
                print(line, file=sys.stderr, flush=True)
        time.sleep(3 if self.launched and self.rank == 0 else 0)

    def print_rank0(self, line: str) -> None:
        if self.rank == 0:
            tqdm.write(line)

    def gather(self, own: Tensor) -> Tensor:
        """(b, ...) -> (W b, ...), differentiable: one all-gather, and one reduce-scatter on the way
        back."""
        return Gather.apply(own, self.world_size) if self.world_size > 1 else own

    def mean(self, *values: float) -> list[float]:
        return [value / self.world_size for value in self.sum(*values)]

    def sum(self, *values: float) -> list[float]:
        values = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(values, group=self.messages)
        return values.tolist()

    def agree(self, value: object) -> bool:
        """Whether it is the same on every rank, by its repr."""
        digest = blake2b(repr(value).encode()).hexdigest()
        return len(set(self.gather_objects(digest))) == 1

    def gather_objects(self, value: object) -> list:
        """Every rank's `value`, on every rank."""
        values = [value]
        if self.world_size > 1:
            values *= self.world_size
            dist.all_gather_object(values, value, group=self.messages)
        return values

    def on_rank_0(self, call: Callable):
        """What call() gives on rank 0, on every rank. Where it raises OSError, ValueError or
        FloatingPointError, every rank does."""
        result = error = None
        if self.rank == 0:
            try:
                result = call()
            except (OSError, ValueError, FloatingPointError) as caught:
                error = caught
        result, error = self.gather_objects((result, error))[0]
        if error:
            raise error
        return result

    def rank_0_first(self, call: Callable):
        """call() on rank 0, then on the others: what it builds on disk, they find."""
        own = []
        self.on_rank_0(lambda: own.append(call()))
        return own[0] if own else call()

    def _beat(self) -> None:
        """A heartbeat in the store, every second: how `lost` tells who is gone."""
        with contextlib.suppress(RuntimeError):  # whoever held the store is gone
            while not self.ended.wait(1):
                if len(set(self.hosts)) > 1:  # groups, and so connections, come later too
                    limit_silence()
                self.store.add(f"beats of {self.rank}", 1)

    def _end_beats(self) -> None:
        """A thread that is in the store when Python ends would abort the process, and its good
        status with it."""
        self.ended.set()
        self.beats.join(timeout=5)

    def lost(self) -> list[int]:
        """The ranks whose process is gone, asked when something has gone wrong: those that have not
        beaten for 4 seconds. Where the store is out of reach, all on the host of rank 0, or rank 0
        alone where that is this host: it may hold the store. Never this one."""
        if self.world_size == 1:
            return []
        ranks = range(self.world_size)
        try:
            before = [self.store.add(f"beats of {r}", 0) for r in ranks]
            time.sleep(4)
            after = [self.store.add(f"beats of {r}", 0) for r in ranks]
        except RuntimeError:
            far = self.hosts[self.rank] != self.hosts[0]
            gone = [r for r in ranks if r == 0 or far and self.hosts[r] == self.hosts[0]]
            return [r for r in gone if r != self.rank]
        return [r for r in ranks if before[r] == after[r] and r != self.rank]

    def speaks(self, lost: list[int]) -> bool:
        """Whether this is the first on its host of the ranks that are left."""
        left = set(range(self.world_size)) - set(lost)
        here = [r for r in left if self.hosts[r] == self.hosts[self.rank]]
        return self.rank == min(here, default=None)

    def linger(self, lost: list[int]) -> None:
        """On the host of rank 0, which holds the store: until ranks on further hosts have noticed
        and looked there who is lost."""
        left = {self.hosts[r] for r in range(self.world_size) if r not in lost}
        if self.hosts[self.rank] == self.hosts[0] and len(left) > 1:
            time.sleep(SILENCE / 4)


def limit_silence() -> None:
    """Every TCP connection of this process, gloo's and the store's, fails once the other host has
    not answered for SILENCE seconds, and with it the call that waits for a rank there. Kernels ask
    and answer, so a rank may be busy for as long as it likes. (One that is stopped may not while
    more is sent to it than its buffers hold.)"""
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # no socket, or not TCP's
            connection = socket.socket(fileno=int(descriptor))
            try:
                set_option = partial(connection.setsockopt, socket.IPPROTO_TCP)
                set_option(socket.TCP_USER_TIMEOUT, 1000 * SILENCE)
                set_option(socket.TCP_KEEPIDLE, SILENCE // 3)  # asks where nothing is sent
                set_option(socket.TCP_KEEPINTVL, SILENCE // 6)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            finally:
                connection.detach()  # it is another's to close
