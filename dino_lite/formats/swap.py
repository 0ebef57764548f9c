"""Replaces a folder by a new one in one step, or leaves everything as it was."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: no lock, so two processes may write the same folder
    fcntl = None  # type: ignore[assignment]

from dino_lite.contracts import UserError

_AT_FDCWD, _EXCHANGE = -100, 2  # of renameat2(2)


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """Context with an empty hidden folder beside `target`, which becomes `target` at the end.

    If the context fails, nothing is left of it. A process that is killed leaves the hidden folder,
    which the next one removes. Raises UserError if another process is writing to `target`.
    """
    target = target.resolve()  # of a link, what it leads to
    part = target.with_name(f".{target.name}.part")
    created = [folder for folder in target.parents if not folder.exists()]
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with _fresh(part):
            yield part
            _replace(target, part)
    finally:
        for folder in created:
            with suppress(OSError):  # not empty
                folder.rmdir()


@contextmanager
def _fresh(part: Path) -> Iterator[None]:
    """Context in which `part` is an empty folder, locked by this process; removed at the end."""
    with suppress(FileExistsError):
        part.mkdir()
    lock = os.open(part, os.O_RDONLY) if fcntl is not None else None
    try:
        if fcntl is not None and lock is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise UserError(
            f"Another process is writing {part.with_name(part.name[1:-5])}: wait for it."
        ) from error
    try:
        for left in part.iterdir():  # by a process that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield
    finally:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(part, ignore_errors=True)


def _replace(target: Path, part: Path) -> None:
    """Give the name of `target` to `part`; what was there gets the name of `part`."""
    if not target.exists():
        part.rename(target)
    elif not _exchange(target, part):
        former = part.with_suffix(".former")
        target.rename(former)
        try:
            part.rename(target)
        except BaseException:
            former.rename(target)
            raise
        former.rename(part)


def _exchange(one: Path, two: Path) -> bool:
    """Exchange the names of two folders in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2  # Linux
    except (AttributeError, OSError, TypeError):
        return False
    first, second = os.fsencode(one), os.fsencode(two)
    return bool(rename(_AT_FDCWD, first, _AT_FDCWD, second, _EXCHANGE) == 0)
