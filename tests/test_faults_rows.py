"""Rows that change while a run reads them, lines too long to read, and a default corpus whose
building is cut short: a run ends, in one line, and leaves nothing behind."""

import errno
import gzip
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from corpora import convert, index
from curation.__main__ import main as curate
from evaluation.__main__ import main as evaluate
from experiments import crashes
from plumbing import files
from plumbing.probe import try_length
from plumbing.refusals import line_of, run_command
from plumbing.run import Metrics
from tests.conftest import FLAGS, ROOT, small_encoder, without_rights
from train import main as train

needs_proc = pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads Linux's /proc")


def corpus(folder, rows, name="a.jsonl"):
    """A manifest of one source of these rows."""
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    (folder / "m.json").write_text(json.dumps([{"name": "a", "path": name}]))
    return folder / "m.json"


def pairs(count):
    return [[f"q{i:02}", f"p{i:02}"] for i in range(count)]


# what is changed while it is read

def edited(raw):
    return raw.replace(b"p07", b"p70")


def in_capitals(raw):
    return raw.replace(b"p07", b"P07")


def shuffled(raw):
    lines = raw.splitlines(keepends=True)
    return b"".join([lines[7], *lines[1:7], lines[0], *lines[8:]])


def cut(raw):
    return raw[: raw.index(b"p07")]


@pytest.mark.parametrize("change", [edited, in_capitals, shuffled, cut])
def test_a_line_that_is_not_what_was_indexed_ends_the_run_with_its_number(tmp_path, change):
    source, = data.load_sources(corpus(tmp_path, pairs(15)))
    file = tmp_path / "a.jsonl"
    changed = change(file.read_bytes())
    with open(file, "r+b") as there:  # in place: an editor that writes another file changes nothing
        there.write(changed)
        there.truncate()
    assert source.read(3)[:2] == ("q03", "p03")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 8: .*put the file back .*or remove"):
        source.read(7)


def test_a_changed_file_of_the_same_size_and_time_is_read_after_its_index_is_removed(tmp_path):
    manifest = corpus(tmp_path, pairs(15))
    data.load_sources(manifest)
    file = tmp_path / "a.jsonl"
    then = file.stat().st_mtime_ns
    file.write_bytes(edited(file.read_bytes()))
    os.utime(file, ns=(then, then))
    source, = data.load_sources(manifest)
    with pytest.raises(ValueError) as error:
        source.read(7)
    folder = Path(str(error.value).partition("remove ")[2].partition(" and begin")[0])
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    source, = data.load_sources(manifest)
    assert source.read(7).positive == "p70"


def test_a_damaged_copy_of_a_packed_file_is_noticed(tmp_path):
    manifest = corpus(tmp_path, pairs(15), "a.jsonl.gz")
    data.load_sources(manifest)
    copy, = tmp_path.glob(".cache/*/*/unpacked.jsonl")
    copy.write_bytes(edited(copy.read_bytes()))
    with pytest.raises(ValueError, match=r"unpacked\.jsonl: found .* remove .* made again"):
        data.load_sources(manifest)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_another_case_is_another_corpus(tmp_path, name):
    """Hashes are blind to it, but the model's tokenizer may not be."""
    rows = pairs(15)
    before, = data.load_sources(corpus(tmp_path, rows, name))
    same, = data.load_sources(corpus(tmp_path, rows, name))
    rows[7][1] = "P07"
    after, = data.load_sources(corpus(tmp_path, rows, name))
    assert before.fingerprint == same.fingerprint != after.fingerprint
    state = data.SourceBatches([before], 4, seed=0).state_dict()
    with pytest.raises(ValueError, match=f"{name}: the checkpoint was made with another corpus"):
        data.SourceBatches([after], 4, seed=0).load_state_dict(state)


def test_a_run_says_which_line_was_changed(folder, capsys):
    def change(*_):
        text = Path("left.jsonl").read_text()
        Path("left.jsonl").write_text(text.upper())

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr("plumbing.run.begin", change)
        patch.setattr("plumbing.run.Metrics", lambda *_, **__: lambda **___: None)
        train([*FLAGS, "--steps", "4", "--out", "run"])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert stop.value.code == 2 and len(said) == 1 and "left.jsonl, line " in said[0]


# lines too long, or too full

@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv"])
def test_a_line_that_is_too_long_is_refused_with_its_number(tmp_path, name, monkeypatch):
    monkeypatch.setattr(convert, "LONGEST_LINE", 1000)
    manifest = corpus(tmp_path, [["query", "positive"], ["q", "p" * 1000]], name)
    with pytest.raises(OSError, match=rf"{name}, line 2: longer than .*one value a line"):
        data.load_sources(manifest)


def test_a_judgement_that_is_too_long_is_refused_with_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "LONGEST_LINE", 1000)
    (tmp_path / "qrels").mkdir()
    path = tmp_path / "qrels" / "test.tsv"
    path.write_text(f"query-id\tcorpus-id\tscore\nq\t{'d' * 1000}\t1\n")
    with pytest.raises(OSError, match="test.tsv, line 2: longer than"):
        convert.read_judgements(path)


@needs_proc
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_long_line_takes_no_more_memory_than_its_bound(tmp_path, name):
    """A file of 1 GB in one line."""
    path = tmp_path / name
    if path.suffix == ".gz":
        with gzip.open(path, "wb", compresslevel=1) as file:
            for _ in range(64):
                file.write(bytes(1 << 24))
    else:
        path.touch()
        os.truncate(path, 1 << 30)
    code = (f"from corpora.convert import read_lines; from pathlib import Path\n"
            f"try: next(read_lines(Path({str(path)!r})))\n"
            f"except OSError as error: print(error)\n"
            f"print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    line, kilobytes = done.stdout.splitlines()
    assert "line 1: longer than 64 MB" in line and int(kilobytes) < 500_000, done


def test_a_line_with_many_positives_is_parsed_once(tmp_path, monkeypatch):
    rows = [{"query": "q", "positive": [f"p{i}" for i in range(2000)]}, *pairs(100)]
    source, = data.load_sources(corpus(tmp_path, rows))
    parsed, records = [], index.records
    monkeypatch.setattr(index, "records", lambda *a: parsed.append(1) or records(*a))
    for i in range(100):
        assert source.read(20 * i).positive == f"p{20 * i}"
        assert source.read(2000 + i).positive == f"p{i:02}"
    assert len(parsed) <= 100


def test_of_lines_with_many_positives_the_last_alone_is_kept(tmp_path):
    """A file of nothing but such lines must not come into memory one by one."""
    rows = [{"query": f"q{i}", "positive": [f"p{i} {j}" for j in range(200)]} for i in range(5)]
    source, = data.load_sources(corpus(tmp_path, rows))
    for i in (0, 3, 1, 3):
        assert source.read(200 * i + 7).positive == f"p{i} 7"
        kept, = source.lines.kept.values()
        assert [row.query for row in kept] == [f"q{i}"] * 200


# the default corpus, cut short

@pytest.fixture
def begun(tmp_path):
    """A process that begins to build a corpus."""
    (tmp_path / "build.py").write_text(crashes.BUILD)
    with open(tmp_path / "said", "wb") as said:
        process = subprocess.Popen(
            [sys.executable, "build.py"], cwd=tmp_path, stdout=said, stderr=said,
            start_new_session=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    yield process
    with suppress(ProcessLookupError):  # those that read for it too, whose parent may be gone
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def building(begun, tmp_path):
    """The process, and those that read for it, in the midst of it."""
    while not re.search(rb"\D[1-9]\d*/", (tmp_path / "said").read_bytes()):
        time.sleep(0.05)
    return begun, crashes.family(begun)


@needs_proc
def test_the_processes_that_read_for_a_killed_one_end_with_it(building):
    process, family = building
    process.kill()
    assert len(family) > 1 and crashes.gone(family)


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("to", [os.kill, os.killpg])
def test_a_signal_ends_the_building_soon_and_in_one_line(building, tmp_path, number, to):
    """To the process alone, or as a terminal's Ctrl-C to all of its group."""
    process, family = building
    to(process.pid, number)
    assert crashes.gone(family) and process.wait() == 130
    *_, last = (tmp_path / "said").read_text().splitlines()
    assert last == "installed_docs: stopped" and "Traceback" not in (tmp_path / "said").read_text()
    assert not list((tmp_path / "built").iterdir())


@needs_proc
def test_a_build_whose_reader_is_killed_says_so(building, tmp_path):
    """As Linux does where memory runs out."""
    process, family = building
    reader = [pid for pid in family if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(reader[0], signal.SIGKILL)
    assert crashes.gone(family) and process.wait() == 2
    said = (tmp_path / "said").read_text()
    assert "installed_docs: a process that reads the packages' files has ended: memory ran" in said
    assert "Traceback" not in said and not list((tmp_path / "built").iterdir())


@needs_proc
def test_a_ctrl_c_while_those_that_read_start_is_one_line_too(begun, tmp_path):
    """A terminal sends it to them as well, before they could say what becomes of it."""
    while len(family := crashes.family(begun)) < 3:  # the first is a tracker of resources
        time.sleep(0.01)
    time.sleep(0.2)
    os.killpg(begun.pid, signal.SIGINT)
    assert crashes.gone(family) and begun.wait() == 130
    said = (tmp_path / "said").read_text()
    assert said.endswith("installed_docs: stopped\n") and "Traceback" not in said


# what else ends a command

def refused(capsys, command, *argv):
    """-> the exit status, and the one line that was said, progress bars aside."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command([*map(str, argv)])
    said = capsys.readouterr().err
    line, = re.findall(r"^(?:train\.py|curation|evaluation): (.*)", said, re.MULTILINE)
    assert "Traceback" not in said and "[Errno" not in line
    return stop.value.code, line


FILTER = "filter", "--sources", "sources.json", "--model", "toy", "--pool", 50, "--out", "new"
EVALUATE = "toy", "--pairs", "left.jsonl"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command, argv", [(train, FLAGS), (curate, FILTER), (evaluate, EVALUATE)])
def test_a_signal_before_anything_is_done_is_one_line(
        folder, capsys, monkeypatch, command, argv, number):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    for target in ("data.load_sources", "model.load"):
        monkeypatch.setattr(target, lambda *_: os.kill(os.getpid(), number) or time.sleep(5))
    status, line = refused(capsys, command, *argv)
    assert status == 130 and line.startswith("stopped")


@pytest.mark.parametrize("command, argv", [(curate, FILTER), (evaluate, EVALUATE)])
@pytest.mark.parametrize("allocate", [lambda *_, **__: torch.empty(1 << 50),
                                      lambda *_, **__: np.empty(1 << 50)])
def test_out_of_memory_says_what_to_lower(folder, capsys, monkeypatch, command, argv, allocate):
    for target in ("curation.pool.embed", "evaluation.metrics.embed"):
        monkeypatch.setattr(target, allocate)
    status, line = refused(capsys, command, *argv)
    assert status == 1 and "out of memory; lower --micro-tokens" in line


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")])
@pytest.mark.parametrize("command, argv", [(train, FLAGS), (curate, FILTER)])
def test_all_that_say_out_of_memory_are_understood(
        folder, capsys, monkeypatch, command, argv, error):
    def load(name):
        raise error

    monkeypatch.setattr("model.load", load)
    status, line = refused(capsys, command, *argv)
    assert status == 1 and line.startswith("out of memory")


def test_an_error_of_our_own_keeps_its_traceback():
    def call():
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        run_command("curation", call, memory="")


def test_a_long_text_for_which_memory_runs_out_is_not_said_to_be_too_long(tokenizer, monkeypatch):
    def forward(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    encoder = small_encoder()
    monkeypatch.setattr(encoder, "forward", forward)
    with pytest.raises(torch.OutOfMemoryError):
        try_length(encoder, tokenizer, 8, [])


@pytest.mark.parametrize("command, argv, size", [
    *((train, [*FLAGS, "--steps", 2, "--out", "new"], size) for size in (100, 5000, 20000, 100000)),
    *((curate, FILTER, size) for size in (100, 5000, 6500))])
def test_what_cannot_be_written_is_named_with_a_way_out(folder, capsys, command, argv, size):
    """Files of so many bytes at most, as a full disk has them."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        status, line = refused(capsys, command, *argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and str(folder) in str(Path(line.split(":")[0].split(" ")[0]).resolve())
    assert "make room there" in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's")
@pytest.mark.parametrize("full, write", [
    ("metrics.jsonl", lambda folder: Metrics(folder)(step=1)), (".lock", files.lock),
    ("new.json.part", lambda folder: files.write_whole(folder / "new.json", b"{}"))])
def test_a_file_on_a_full_disk_is_named(tmp_path, full, write):
    (tmp_path / full).symlink_to("/dev/full")
    with pytest.raises(OSError) as error:
        write(tmp_path)
    assert line_of(error.value).startswith(str(tmp_path / full.removesuffix(".part")))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_quota_is_a_full_disk(number):
    assert line_of(OSError(number, "", "a/file")).endswith("make room there, or write elsewhere")


@pytest.mark.parametrize("path", [
    "sources.json", "left.jsonl", "toy", "toy/config.json", "toy/tokenizer.json",
    "toy/model.safetensors"])
def test_no_permission_is_not_no_file(folder, path):
    os.chmod(path, 0)
    run = subprocess.run(
        [*without_rights(), sys.executable,
         ROOT / "train.py", *FLAGS, "--out", "new"], capture_output=True, text=True)
    os.chmod(path, 0o700)
    line, = run.stderr.splitlines()
    assert run.returncode == 2 and "no such file" not in line.lower()
    assert "permission denied" in line.lower() and path in line


LOOK = """
from pathlib import Path
from corpora.convert import read_rows
from plumbing import checkpoint
from plumbing.refusals import line_of

for look, path in ((read_rows, "top/*/a.jsonl"), (read_rows, "top/**/*.jsonl"),
                   (read_rows, "top/shut/a.jsonl"), (checkpoint.newest, "run"),
                   (read_rows, "through/open/*.jsonl")):
    try:
        print(path, "gives", len(list(look(path))))
    except OSError as error:
        print(path, line_of(error))
"""


def test_what_may_not_be_looked_into_is_not_passed_over(tmp_path, monkeypatch):
    """Beside it lies what may; and a folder of checkpoints is not without any. What a glob names
    itself need only be passed through."""
    monkeypatch.chdir(tmp_path)
    shut = Path("top/shut"), Path("run/checkpoints")
    for folder in (Path("top/open"), Path("through/open"), *shut):
        folder.mkdir(parents=True)
    Path("through/open/a.jsonl").write_text('["q", "p"]\n')
    Path("through").chmod(0o311)
    for name in ("open", "shut"):
        Path(f"top/{name}/a.jsonl").write_text('["q", "p"]\n')
    for folder in shut:
        folder.chmod(0)
    done = subprocess.run(
        [*without_rights(), sys.executable, "-c", LOOK],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    for folder in shut:
        folder.chmod(0o700)
    Path("through").chmod(0o700)
    *globs, file, run, through = done.stdout.splitlines()
    assert through == "through/open/*.jsonl gives 1"
    assert all("top/shut/: permission denied" in line.lower() for line in globs), done
    assert "top/shut/a.jsonl: permission denied" in file.lower()
    assert "run/checkpoints: permission denied" in run.lower() and len(globs) == 2


LOAD = """
from pathlib import Path
import model
from plumbing.refusals import line_of
for path in [*sorted(Path("toy").rglob("*.json")), Path("toy/1_Pooling")]:
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        model.load("toy")
        print(path, "is passed over")
    except OSError as error:
        print(path, line_of(error))
    path.chmod(mode)
"""


def test_no_file_of_a_model_is_passed_over_for_want_of_permission(folder):
    """Without its modules.json it would be another model."""
    names = sorted(map(str, Path("toy").rglob("*.json")))
    run = subprocess.run(
        [*without_rights(), sys.executable, "-c", LOAD],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [*names, "toy/1_Pooling"], run.stderr
    assert len(names) == 7
    for name, line in zip([*names, "toy/1_Pooling"], lines):
        assert "permission denied" in line.lower() and name in line.partition(" ")[2], line


@pytest.mark.parametrize("damage", [
    b"{}\n", b'{"step": null}\n', b'{"step": 1\n', b"[1]\n", b"\xff\n", b"1\n", b"[" * 9999 + b"\n",
    b'{"step": 1, "evaluation": {"mean": {}}}\n', b'{"step": 1, "evaluation": 1}\n',
    b'{"step": 1, "evaluation": {"mean": {}, "sources": [1]}}\n',
    b'{"step": 1, "evaluation": {"mean": {}, "sources": {"left": {"targets": "3"}}}}\n'])
def test_a_damaged_line_of_metrics_is_refused_by_its_number(folder, capsys, damage):
    train([*FLAGS, "--steps", "2", "--out", "run"])
    path = Path("run/metrics.jsonl")
    first, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first, damage, *others]))
    resume = "--resume", "--out", "run", "--steps", 3
    status, line = refused(capsys, train, *resume)
    assert status == 2 and line.startswith("run/metrics.jsonl, line 2: is damaged; take ")
    path.write_bytes(b"".join([first, *others, damage[:-1]]))  # a killed process was writing it
    train([*map(str, resume)])


@pytest.mark.parametrize("command, argv, flag", [
    (train, FLAGS, "--seed"), (curate, FILTER, "--seed"), (train, FLAGS, "--steps"),
    (curate, FILTER, "--chunk")])
def test_a_number_beyond_what_torch_takes_is_refused(folder, capsys, command, argv, flag):
    status, line = refused(capsys, command, *argv, flag, 1 << 64)
    assert status == 2 and line.startswith(f"{flag} {1 << 64}: expected ")


@pytest.mark.parametrize("rate", [1e308, 10**400])
def test_rates_whose_sum_is_no_number_are_refused(folder, capsys, rate):
    entries = json.loads(Path("sources.json").read_text())
    Path("sources.json").write_text(json.dumps([entry | {"rate": rate} for entry in entries]))
    status, line = refused(capsys, train, *FLAGS)
    assert status == 2 and 'source 1: field "rate": ' in line
