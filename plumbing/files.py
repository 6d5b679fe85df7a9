"""A folder is written whole or not at all: under another name, until every byte is on disk. And
JSON files."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError


def publish(directory: Path, write: Callable[[Path], None], replace: bool = True) -> None:
    """write(part) fills a folder, which takes the name `directory` only when every byte is on disk.
    If a folder has that name by then, it is replaced; or kept, without `replace`, since another
    process has made the same. Raises OSError when it cannot be written."""
    part = directory.with_name(f"{directory.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)  # a killed process may have had the same number
    part.mkdir(parents=True)
    try:
        write(part)
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
            raise OSError(f"{directory} cannot be written: {error}") from error
        raise


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
