"""What a command has done so far is kept: one that was interrupted goes on where it was.

    OUT.work   folders by name, each complete or absent                while the command runs
    OUT        the results, whole or not at all                        when it is done

Nothing here knows what is in them.
"""

import glob
import io
import json
import shutil
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from urllib.parse import quote

import numpy as np
from torch import nn

from plumbing.files import HOST, lock, open_cache, publish, read_json, sweep, write_whole

LONGEST_NAME = 150  # of a folder: while it is written it has a suffix, and 255 is the most


class Work:
    """OUT.work of a command, until `finish` publishes OUT.

    identity: JSON-able, what must be the same for another start to go on. Raises ValueError where
    it is not, where OUT is not empty, and where OUT.work is no work of ours; OSError as `lock`.
    """

    def __init__(self, out: str, identity: dict):
        self.out = Path(out).resolve()
        self.directory = self.out.with_name(f"{self.out.name}.work")
        self._check_out()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._check_identity(identity)
        lock(self.directory)
        self._check_out()  # whoever was at work there may have finished
        self._check_identity(identity)
        write_whole(self.directory / "identity.json", json.dumps(identity).encode())
        sweep(self.out.parent, f"{glob.escape(self.out.name)}.part-*-{HOST}")
        sweep(self.directory)

    def _check_out(self) -> None:
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ValueError(f"--out {self.out}: is not empty; choose another")

    def _check_identity(self, identity: dict) -> None:
        path = self.directory / "identity.json"
        started = {path.name, f"{path.name}.part", ".lock"}
        done = {file.name for file in self.directory.iterdir()} - started
        if done and not path.is_file():
            raise ValueError(f"{self.directory}: holds something else, and would be removed at the "
                             f"end; choose another --out")
        try:
            then = read_json(path) if done else identity
        except ValueError as error:
            raise ValueError(f"{error}; remove {self.directory}") from None
        for what, now in identity.items():
            if then.get(what) != now:
                values = f" ({then.get(what)}, now {now})" if len(str(now)) < 60 else ""
                raise ValueError(f"{self.directory} holds the work of another command, with "
                                 f"another {what}{values}; remove that folder, or choose another "
                                 f"--out")

    def keep(self, name: str, compute: Callable[[], np.ndarray]) -> Path:
        """The file of the array of that name, computed unless an earlier start did."""
        def write(part: Path) -> None:
            save_array(part / "array.npy", compute())

        name = quote(name, "")
        if len(name) > LONGEST_NAME:
            name = blake2b(name.encode(), digest_size=8).hexdigest()
        return self.keep_folder(name, write) / "array.npy"

    def keep_folder(self, name: str, write: Callable[[Path], None]) -> Path:
        """The folder of that name, filled by write(folder) unless an earlier start did."""
        return open_cache(self.directory / name, write)

    def finish(self, write: Callable[[Path], None]) -> None:
        """write(folder) fills what becomes OUT."""
        def write_and_check(part: Path) -> None:
            write(part)
            self._check_out()  # writing takes a while, and publishing replaces what is there

        publish(self.out, write_and_check)
        shutil.rmtree(self.directory)


def save_array(path: Path, array: np.ndarray) -> None:
    """By way of memory: on a full disk numpy may write less into a file without a word."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    path.write_bytes(buffer.getbuffer())


def fingerprint(network: nn.Module) -> str:
    """A hash of its weights."""
    weights = blake2b(digest_size=8)
    for parameter in network.parameters():
        weights.update(parameter.detach().cpu().numpy().tobytes())
    return weights.hexdigest()
