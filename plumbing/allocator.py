"""What becomes of memory that was freed, on a CPU: glibc's habits, and gradients that are mostly 0.

Nothing here changes a number that is computed.
"""

import contextlib
import ctypes

import torch
from torch import nn


def keep_freed_memory() -> None:
    """Keeps it in the process, for the next tensors, under glibc, which otherwise hands large ones
    back to the system and takes them anew, page by page. With the graphs kept that is a fourth of a
    step's time, as much as keeping them saves."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no tensor is a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: what lies free at the end stays, all of it


def give_back_freed_memory() -> None:
    """Gives it to the system, under glibc, which keeps it in pieces: with tensors of ever new
    shapes, a few MB more a micro-batch."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def sparse_gradients(encoder: nn.Module) -> None:
    """Makes those of the embeddings sparse, in plain torch: a micro-batch adds to the rows of its
    own tokens. A dense gradient is made of as many zeros as the vocabulary times the width and
    added as a whole, by every micro-batch: up to an eighth of a step."""
    for module in encoder.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad:
            if module.weight.device.type == "cpu":
                module.sparse = True
                module.weight.grad = torch.zeros_like(module.weight)  # autograd adds to it in place
