"""How a command ends that cannot go on: in one line that says where, what, and what to do.

Nothing here knows what a command does.
"""

import contextlib
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOM = "make room there, or write elsewhere"
FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG


def line_of(error: BaseException) -> str:
    """The error in one line, without "[Errno 28]"."""
    if isinstance(error, OSError) and error.filename and error.errno:
        advice = ROOM if error.errno in FULL else "check the path and its permissions"
        return f"{error.filename}: {os.strerror(error.errno).lower()}; {advice}"
    return re.sub(r"\[Errno -?\d+\] ", "", " ".join(str(error).split()))


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and bool(
        re.search("out of memory|allocate memory|ALLOC_FAILED", str(error)))


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError inside names `path`, where the system's names none: a full or broken disk's."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


def run_command(command: str, call: Callable[[], None], memory: str, stopped: str = "stopped"
                ) -> None:
    """call(); where it cannot go on, a line of `command`, and the exit status: 2 for bad input or a
    full disk, 1 where memory runs out (memory: what takes less), 130 where a signal ends it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return call()
    except (OSError, ValueError) as error:
        status, line = 2, line_of(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        status, line = 1, f"out of memory; {memory}"
    except KeyboardInterrupt:
        status, line = 130, stopped
    # not above: there the traceback keeps a bar open, which would be drawn over the line
    print(f"{command}: {line}", file=sys.stderr)
    sys.exit(status)
