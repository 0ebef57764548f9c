"""Arrays that all processes of a run read from one place in memory."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from contextlib import suppress
from typing import Any

import numpy as np
from jaxtyping import Shaped

from dino_lite.contracts import UserError

MAX_COPIED = 2**20  # bytes of an array that a pickle may hold itself


class SharedArray(np.ndarray):
    """A read-only array that is a file mapped into memory; its pickle is the file's name.

    So a spawned worker maps the same pages, and a forked one has them already. What is computed
    from it, a slice as well, is an array like any other.
    """

    file: str | None = None

    def __reduce__(self) -> Any:
        if self.file is None:
            return super().__reduce__()
        return map_array, (self.file, self.dtype.str)


def share(array: Shaped[np.ndarray, "N"]) -> Shaped[np.ndarray, "N"]:
    """`array` itself where it has at most MAX_COPIED bytes; else a SharedArray of its numbers.

    The file is in the temporary folder (TMPDIR) and goes when the array does, or when this process
    ends, also by an exception; only a signal that kills it leaves the file. Other processes never
    remove it.
    """
    if array.nbytes <= MAX_COPIED:
        return array
    name = ""
    try:
        with tempfile.NamedTemporaryFile(prefix="dino_lite_", delete=False) as file:
            name = file.name
            file.write(np.ascontiguousarray(array).data)
        shared = map_array(name, array.dtype.str)
    except BaseException as error:
        _remove(name, os.getpid())
        if isinstance(error, OSError):
            raise UserError(
                f"{tempfile.gettempdir()} does not take the {array.nbytes / 2**20:.0f} MiB that "
                f"the list of images needs ({error.strerror}): let TMPDIR name another folder."
            ) from error
        raise
    weakref.finalize(shared, _remove, name, os.getpid())
    return shared


def map_array(file: str, dtype: str) -> Shaped[np.ndarray, "N"]:
    """The array that `share` has put into `file`."""
    with open(file, "rb") as opened:
        pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    shared = np.frombuffer(pages, dtype).view(SharedArray)
    shared.file = file
    return shared


def _remove(file: str, owner: int) -> None:
    """Remove the file in its owner; a forked worker inherits this call and must not follow it."""
    if os.getpid() == owner:
        with suppress(OSError):
            os.remove(file)
