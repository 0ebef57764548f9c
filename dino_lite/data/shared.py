"""Arrays in memory that all processes of a run share."""

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

MAX_COPIED = 2**20  # bytes of an array that is pickled by value


class SharedArray(np.ndarray):
    """A read-only array mapped from a file; its pickle is the file's name.

    A spawned worker maps the same pages, and a forked one has them already. Results of
    computations, slices included, are ordinary arrays.
    """

    file: str | None = None

    def __reduce__(self) -> Any:
        if self.file is None:
            return super().__reduce__()
        return map_array, (self.file, self.dtype.str)


def share(array: Shaped[np.ndarray, "N"]) -> Shaped[np.ndarray, "N"]:
    """`array` itself if it has at most MAX_COPIED bytes; else a SharedArray of its values.

    The file is in the temporary folder (TMPDIR) and is removed with the array or when this process
    exits, also by an exception, but not when a signal kills it. Other processes never remove it.
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
    """The array that `share` wrote to `file`."""
    with open(file, "rb") as opened:
        pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    shared = np.frombuffer(pages, dtype).view(SharedArray)
    shared.file = file
    return shared


def _remove(file: str, owner: int) -> None:
    """Remove the file, in its owner only: forked workers inherit this finalizer."""
    if os.getpid() == owner:
        with suppress(OSError):
            os.remove(file)
