"""Trains on two hosts whose link is slow, or is cut for a while or for good, and compares what
comes of it with a run of one process.

    python -m experiments.hosts

The hosts are network namespaces with a hostname and a rank each, and share the file system, as the
hosts of a run do. A cut link drops every packet and says so to nobody, as where a switch loses its
power. Needs Linux, root, /dev/net/tun, `ip`, `unshare` and `hostname`. Ends with status
1 where a cell is not OK, 2 where something is missing.
"""

import argparse
import collections
import contextlib
import fcntl
import math
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from experiments.crashes import FLAGS as TOY_FLAGS
from experiments.crashes import TRAIN, last_step, lines, make_toy, parts, start

HOSTS, ADDRESSES = ("alder", "birch"), ("10.213.0.1", "10.213.0.2")
STEPS, CUT_AT = 40, 12  # the step after which the link is cut
FLAGS = [*TOY_FLAGS, "--dropout", "0", "--steps", STEPS, "--save-every", "8"]
TOLERANCE, PATIENCE = 1e-5, 120  # relative, of a loss; seconds until both hosts have ended
START = 600  # seconds until that step at most
CELLS = {  # flags, delay in s and loss of the link, seconds that it is cut for
    "ZeRO 2": (["--zero", 2], (), 0),
    "ZeRO 3": (["--zero", 3], (), 0),
    "50 ms, 1 % loss": (["--zero", 2], (0.05, 0.01), 0),
    "cut for 20 s": (["--zero", 2], (), 20),
    "cut for good": (["--zero", 2], (), PATIENCE),
    "ZeRO 3, cut for good": (["--zero", 3], (), PATIENCE),
}
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x1, 0x1000  # linux/if_tun.h
HEAD = """\
| cell | steps | longest step, s | losses differ by | ended after, s | said | half-written | |
| --- | ---: | ---: | ---: | ---: | --- | --- | --- |"""


def missing() -> str | None:
    """What stands in the way of two hosts here, or None."""
    absent = [tool for tool in ("ip", "unshare", "hostname") if not shutil.which(tool)]
    if absent:
        return f"needs {', '.join(absent)}, on Linux"
    if os.geteuid():
        return "needs root, for network namespaces"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as error:
        return f"needs /dev/net/tun ({error.strerror.lower()})"
    made = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, text=True)
    return (made.stderr.strip() or "unshare fails") if made.returncode else None


def namespace(host: str) -> str:
    return f"{host}-{os.getpid()}"


def shell(command: str) -> None:
    """Raises RuntimeError with what a command says that fails."""
    done = subprocess.run(command.split(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr.strip()}")


class Link:
    """Inside, the two hosts are there, each with a device `wire`; a thread carries packets from one
    to the other. Whatever runs on the hosts ends with them. (Not a veth and netem, which kernels
    may lack.)"""

    def __init__(self, delay: float = 0.0, loss: float = 0.0):
        """delay: seconds that a packet takes; loss: share of packets that do not arrive."""
        self.delay, self.loss = delay, loss
        self.ended, self.thread = threading.Event(), threading.Thread(target=self._carry)

    def __enter__(self):
        self.ends = [os.open("/dev/net/tun", os.O_RDWR) for _ in HOSTS]
        try:
            for i, host in enumerate(HOSTS):
                space, device = namespace(host), f"wire{i}-{os.getpid()}"
                ifreq = struct.pack("16sH22x", device.encode(), IFF_TUN | IFF_NO_PI)
                fcntl.ioctl(self.ends[i], TUNSETIFF, ifreq)
                shell(f"ip netns add {space}")
                shell(f"ip link set {device} netns {space} name wire")
                shell(f"ip -n {space} address add {ADDRESSES[i]} peer {ADDRESSES[1 - i]} dev wire")
                shell(f"ip -n {space} link set wire up")
                shell(f"ip -n {space} link set lo up")
        except BaseException:
            self.__exit__()
            raise
        self.thread.start()
        return self

    def _carry(self) -> None:
        there, waiting = dict(zip(self.ends, reversed(self.ends))), collections.deque()
        while not self.ended.is_set():
            due = waiting[0][0] - time.monotonic() if waiting else 0.1
            for end in select.select(self.ends, [], [], max(0, min(due, 0.1)))[0]:
                packet = os.read(end, 1 << 16)
                if random.random() >= self.loss:
                    waiting.append((time.monotonic() + self.delay, there[end], packet))
            while waiting and waiting[0][0] <= time.monotonic():
                _, end, packet = waiting.popleft()
                os.write(end, packet)

    def cut(self, run: Path, processes: list[subprocess.Popen], seconds: float) -> float:
        """For so many seconds, after step CUT_AT of a run -> the moment of the cut."""
        until = time.monotonic() + START
        while last_step(run) < CUT_AT:
            if time.monotonic() > until or any(process.poll() is not None for process in processes):
                said = "".join((run.parent / host).read_text() for host in HOSTS)
                raise RuntimeError(f"the run does not come to step {CUT_AT}:\n{said}")
            time.sleep(0.02)
        before, self.loss, moment = self.loss, 1.0, time.monotonic()
        if seconds < PATIENCE:
            time.sleep(seconds)
            self.loss = before
        return moment

    def __exit__(self, *_) -> None:
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join()
        for host, end in zip(HOSTS, self.ends):
            space = namespace(host)
            inside = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True)
            for pid in map(int, inside.stdout.split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)
            os.close(end)


def launch(folder: Path, node: int, script: list) -> subprocess.Popen:
    """torchrun, with one rank, on one of the hosts. Its output goes to folder/HOST."""
    host = HOSTS[node]
    command = ["ip", "netns", "exec", namespace(host), "unshare", "--uts",
               "sh", "-c", f'hostname {host} && exec "$@"', "sh", sys.executable,
               "-m", "torch.distributed.run", "--nnodes", 2, "--node_rank", node,
               "--nproc_per_node", 1, "--master_addr", ADDRESSES[0], *script]
    with open(folder / host, "w") as log:
        return subprocess.Popen(
            [*map(str, command)], cwd=folder, stdout=log, stderr=log, env=os.environ | {
                "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TRAIN.parent),
                "GLOO_SOCKET_IFNAME": "wire"})


def said(folder: Path, host: str) -> str:
    """The lines in which train.py has spoken there."""
    log = (folder / host).read_text().replace("\r", "\n").splitlines()
    return "; ".join(line for line in log if line.startswith("train.py: "))


def wait(processes: list[subprocess.Popen], until: float) -> list[float]:
    """The moment at which each has ended; infinity where it has not until then."""
    ended = {}
    while len(ended) < len(processes) and time.monotonic() < until:
        for process in processes:
            if process.poll() is not None:
                ended.setdefault(process, time.monotonic())
        time.sleep(0.05)
    return [ended.get(process, math.inf) for process in processes]


def worst(run: Path, whole: Path) -> float:
    """The largest relative difference of a loss; infinity where the steps are others."""
    ours, theirs = lines(run), lines(whole)
    if [line["step"] for line in ours] != [line["step"] for line in theirs]:
        return math.inf
    return max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(ours, theirs) if "loss" in b)


def try_cell(folder: Path, cell: str, script: list) -> list[str]:
    """Trains on two hosts -> the table's row; its last column is OK, or what is not."""
    flags, packets, seconds = CELLS[cell]
    whole, run = folder / "whole", folder / cell.replace(" ", "-").replace("%", "")
    for_good = seconds >= PATIENCE
    train = [*script, *FLAGS, *flags, "--out", run.name]
    with Link(*packets) as link:
        processes = [launch(folder, node, train) for node in (0, 1)]
        moment = link.cut(run, processes, seconds) if seconds else time.monotonic()
        ended = wait(processes, moment + (PATIENCE if for_good else 1200))
        statuses = [process.poll() for process in processes]
    words, wrong = [said(folder, host) for host in HOSTS], []
    left, reached = [path.name for path in parts(run)], last_step(run)
    if for_good:
        if start(folder, [TRAIN, "--resume", "--out", run.name]).wait():
            wrong.append("--resume fails")
        if not all(other in word for other, word in zip(reversed(HOSTS), words)):
            wrong.append("a host does not name the other")
    difference = worst(run, whole)
    if statuses != ([1, 1] if for_good else [0, 0]):
        wrong.append(f"exit statuses {statuses}")
    if left:
        wrong.append("something is half-written")
    if not difference <= TOLERANCE:
        wrong.append("losses")
    longest = max((line.get("seconds", 0) for line in lines(run)), default=0)
    return [cell, f"{reached} of {STEPS}", f"{longest:.1f}", f"{difference:.0e}",
            ", ".join(f"{end - moment:.0f}" for end in ended) if seconds else "",
            "<br>".join(words) if for_good else "", ", ".join(left) or "nothing",
            "; ".join(wrong) or "OK"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), metavar="CELL",
                        help=f"of {', '.join(CELLS)}; unset: all")
    args = parser.parse_args(argv)
    if reason := missing():
        print(f"hosts: {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the namespaces are removed
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_toy(folder)
        if start(folder, [TRAIN, *FLAGS, "--out", "whole"]).wait():
            sys.exit((folder / "log").read_text())
        print(HEAD)
        for cell in args.cells:
            rows.append(try_cell(folder, cell, [TRAIN]))
            print(f"| {' | '.join(rows[-1])} |", flush=True)
            if rows[-1][-1] != "OK":
                for host in HOSTS:
                    print(f"{host}:\n{(folder / host).read_text()}", file=sys.stderr)
    return int(any(row[-1] != "OK" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
