"""A folder, or a file, is written whole or not at all: under another name, until every byte is on
disk. A folder is read as it was written, and one process at a time goes on with it. And JSON files.
"""

import fcntl
import json
import os
import platform
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from plumbing.refusals import ROOM, naming


SEAL = "checksums.json"
LOCKS = {}  # by device and inode: the files that this process holds until it ends
HOST = platform.node()
if os.path.exists("/proc/self/ns/pid"):  # of containers, more than one may have a process 7
    HOST += f".{os.stat('/proc/self/ns/pid').st_ino}"


def lock(folder: Path, shared: bool = False) -> None:
    """Holds a folder, alone or with others that share it, until this process ends: the kernel lets
    go of it (flock of folder/.lock) however that happens. Raises BlockingIOError saying who is at
    work there. Over NFS the server holds it, for all hosts; mounted with local_lock or nolock, a
    host sees its own processes alone. Where a file system has no locks, that is said."""
    file = open(folder / ".lock", "a+")
    stat = os.fstat(file.fileno())
    key = stat.st_dev, stat.st_ino
    is_new = key not in LOCKS
    file = LOCKS.setdefault(key, file)
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        del LOCKS[key]
        file.seek(0)
        holders = dict.fromkeys(file.read().splitlines())
        raise BlockingIOError(f"{folder}: at work there: {', '.join(holders) or 'another process'};"
                              f" wait until that has ended, or stop it") from None
    except OSError as error:
        if is_new:
            print(f"{folder}: cannot be locked ({error}); see that nothing else works there")
    with naming(folder / ".lock"):
        if not shared:
            file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()


def sweep(folder: Path, parts: str = "*.part-*") -> None:
    """Removes the parts that dead processes of this host, or container, were writing into it."""
    for part in folder.glob(parts):
        pid, _, host = part.name.rpartition(".part-")[2].partition("-")
        try:
            if pid.isdigit() and host in ("", HOST):  # earlier versions: ""
                os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(part, ignore_errors=True)
        except (PermissionError, OverflowError):  # another user's, alive; no process's number
            pass


def publish(directory: Path, write: Callable[[Path], None], replace: bool = True,
            sealed: bool = False) -> None:
    """write(part) fills a folder, which takes the name `directory` only when every byte is on disk.
    If a folder has that name by then, it is replaced; or kept, without `replace`, since another
    process has made the same. sealed: for `check_seal`. Raises OSError if it cannot be written."""
    part = directory.with_name(f"{directory.name}.part-{os.getpid()}-{HOST}")
    shutil.rmtree(part, ignore_errors=True)  # a killed process may have had the same number
    part.mkdir(parents=True)
    try:
        with naming(directory):
            write(part)
            if sealed:
                files = [path for path in part.rglob("*") if path.is_file()]
                write_json(part / SEAL, {str(f.relative_to(part)): checksum(f) for f in files})
            for path in [*part.rglob("*"), part]:
                sync(path)
        if replace:
            shutil.rmtree(directory, ignore_errors=True)
        os.rename(part, directory)
        sync(directory.parent)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError) and not replace and directory.is_dir():
            return
        # the libraries' errors for a full disk: tokenizers' is a bare Exception
        if type(error) is Exception or isinstance(error, SafetensorError):
            raise OSError(f"{directory} cannot be written: {error}; {ROOM}") from error
        raise


def checksum(path: Path) -> str:
    """Size and crc32 of a file, in words: 0.7 s a GB."""
    if not path.is_file():
        return "no file"
    crc = 0
    with naming(path), open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
        return f"{file.tell()} bytes, crc32 {crc:08x}"


def check_seal(directory: Path) -> None:
    """Raises ValueError naming a file that is not as it was written."""
    sums = read_json(directory / SEAL)
    if sums is None:
        raise ValueError(f"{directory / SEAL}: no such file")
    for name, written in sums.items():
        if (found := checksum(directory / name)) != written:
            raise ValueError(f"{directory / name}: found {found}, written were {written}")


def open_cache(directory: Path, write: Callable[[Path], None]) -> Path:
    """A folder that is made once, by write(part), and checked whenever it is opened again."""
    if not directory.is_dir():
        publish(directory, write, replace=False, sealed=True)
        return directory
    try:
        check_seal(directory)
    except ValueError as error:
        raise ValueError(f"{error}; remove {directory}, and it is made again") from None
    return directory


def write_whole(path: Path, content: bytes) -> None:
    """A file, whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    with naming(path):
        part.write_bytes(content)
        sync(part)
    os.replace(part, path)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def read_json(path: Path, kind: type = dict) -> dict | list | None:
    """An object, or of another kind; None where there is no file. Raises ValueError naming it."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, kind):
        raise ValueError(f"{path}: found {json.dumps(found)[:40]}, expected "
                         f"{'an object' if kind is dict else 'a list'}")
    return found


def write_json(path: Path, value: dict | list) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def follow_umask(directory: Path) -> None:
    """safetensors writes files that their owner alone can read."""
    mask = os.umask(0)
    os.umask(mask)
    for path in directory.rglob("*.safetensors"):
        path.chmod(0o666 & ~mask)
