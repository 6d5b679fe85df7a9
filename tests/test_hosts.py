"""Two hosts, as network namespaces, and what a rank knows of the hosts of the others."""

import socket
import sys
from pathlib import Path

import pytest

from experiments import hosts
from experiments.crashes import TRAIN, make_toy, start
from plumbing import ranks
from plumbing.ranks import Ranks

MISSING = hosts.missing()
needs_hosts = pytest.mark.skipif(MISSING is not None, reason=f"two hosts: {MISSING}")


# what a rank knows, in one process

@pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed, and so ranks, are on Linux alone")
def test_a_connection_waits_for_a_host_out_of_reach_for_60_seconds_and_stays_open():
    """Of what was sent, 60,000 ms; where nothing is sent, it asks after 20 s and every 10 s. Other
    files of the process, and sockets that are not TCP's, are left alone."""
    server = socket.create_server(("127.0.0.1", 0))
    pair = [socket.create_connection(server.getsockname()), server.accept()[0]]
    other = socket.socketpair()
    ranks.limit_silence()
    for connection in pair:
        tcp = [connection.getsockopt(socket.IPPROTO_TCP, option) for option in (
            socket.TCP_USER_TIMEOUT, socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL)]
        assert tcp == [60_000, 20, 10]
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    for a, b in (pair, other):
        a.sendall(b"still open")
        assert b.recv(20) == b"still open"
    for one in (*pair, *other, server):
        one.close()


class Store:
    """The beats of ranks that go on, but for some; with `gone`, whoever held it is."""

    def __init__(self, silent=(), gone=False):
        self.silent, self.gone, self.beats = [f"beats of {r}" for r in silent], gone, 0

    def add(self, key, amount):
        if self.gone:
            raise RuntimeError("Connection timed out")
        self.beats += 1
        return 7 if key in self.silent else self.beats


def rank(r, store):
    """One of four, two of them on each of two hosts."""
    made = Ranks(alone=True)
    made.rank, made.world_size, made.hosts = r, 4, ["alder", "alder", "birch", "birch"]
    made.store = store
    return made


def test_the_first_rank_left_on_each_host_names_the_lost_ones(monkeypatch):
    """The store is on the host of rank 0, which is therefore lost with all its ranks where another
    host cannot reach it. On that host itself it went with rank 0."""
    monkeypatch.setattr(ranks.time, "sleep", lambda seconds: None)
    assert [rank(r, Store(silent=[2, 3])).lost() for r in (0, 1)] == [[2, 3]] * 2
    assert [rank(r, Store(gone=True)).lost() for r in range(4)] == [[], [0], [0, 1], [0, 1]]
    store = Store()
    assert [rank(r, store).speaks([2, 3]) for r in (0, 1)] == [True, False]
    assert [rank(r, store).speaks([0, 1]) for r in (2, 3)] == [True, False]
    assert [rank(r, store).speaks([3]) for r in (0, 1, 2)] == [True, False, True]


def test_the_host_with_the_store_waits_until_further_hosts_have_looked_there(monkeypatch):
    waited = []
    monkeypatch.setattr(ranks.time, "sleep", waited.append)
    store = Store()
    rank(0, store).linger([2, 3])  # nobody else is left
    rank(2, store).linger([3])  # the store is not here
    assert waited == []
    for r in (0, 1):
        rank(r, store).linger([3])
    assert waited == [ranks.SILENCE / 4] * 2


# two hosts

PLANTED = """import sys, train
from plumbing import ranks
ranks.SILENCE = 9
train.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the toy, and the run of one process."""
    folder = tmp_path_factory.mktemp("hosts")
    make_toy(folder)
    (folder / "planted.py").write_text(PLANTED)
    assert start(folder, [TRAIN, *hosts.FLAGS, "--out", "whole"]).wait() == 0
    return folder


def cell(folder: Path, monkeypatch, seconds, script):
    """ZeRO 2 with a link cut for so many seconds: the last column of the table."""
    monkeypatch.setitem(hosts.CELLS, f"cut {seconds}", (["--zero", 2], (), seconds))
    row = hosts.try_cell(folder, f"cut {seconds}", [script])
    return row[-1], [(folder / host).read_text() for host in hosts.HOSTS]


@needs_hosts
def test_two_hosts_have_the_losses_of_one_process_though_the_link_is_cut_meanwhile(
        folder, monkeypatch):
    verdict, logs = cell(folder, monkeypatch, 5, TRAIN)
    assert verdict == "OK", logs


@needs_hosts
def test_a_link_cut_for_good_ends_both_hosts_and_one_goes_on_as_if_nothing_had_been(
        folder, monkeypatch):
    """Each names the other, nothing is left half-written, and the resumed run has the losses of one
    process."""
    monkeypatch.setattr(hosts, "PATIENCE", 60)
    verdict, logs = cell(folder, monkeypatch, 60, "planted.py")
    assert verdict == "OK", logs
