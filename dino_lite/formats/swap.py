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
_MARK = ".dino_lite_export"  # file that tells our hidden folders from others'; holds the lock


@contextmanager
def replaced(target: Path) -> Iterator[tuple[Path, Path]]:
    """Context with two empty folders: one becomes `target` at the end, the other is for scratch.

    Both are in a hidden, marked and locked folder beside `target`, which nothing is left of. A
    process that is killed leaves it, and the next one removes it. Raises UserError if another
    process is writing to `target`, or if a folder of that name is not ours.
    """
    target = target.resolve()  # of a link, what it leads to
    hidden = target.with_name(f".{target.name}.part")
    created = [folder for folder in target.parents if not folder.exists()]
    try:
        hidden.parent.mkdir(parents=True, exist_ok=True)
        with _ours(hidden, target):
            new, scratch = hidden / "new", hidden / "scratch"
            new.mkdir()
            scratch.mkdir()
            yield new, scratch
            _replace(target, new, hidden / "former")
    finally:
        for folder in created:
            with suppress(OSError):  # not empty
                folder.rmdir()


@contextmanager
def _ours(hidden: Path, target: Path) -> Iterator[None]:
    """Context in which `hidden` holds nothing but a locked mark; removed at the end."""
    lock = _locked(hidden, target)
    try:
        if (hidden / "former").is_dir() and not target.exists():  # killed within `_replace`
            (hidden / "former").rename(target)
        _empty(hidden)
        yield
    finally:
        with suppress(OSError):  # a file that cannot be removed; the mark stays, then
            _empty(hidden)
            (hidden / _MARK).unlink()
            hidden.rmdir()
        os.close(lock)


def _locked(hidden: Path, target: Path) -> int:
    """Descriptor of the locked mark in `hidden`, which is made if it is missing."""
    mark = hidden / _MARK
    while True:
        with suppress(FileExistsError):
            hidden.mkdir()
        try:
            if _is_foreign(hidden):
                raise UserError(
                    f"{hidden} was not made by dino-lite, and an export to {target} works there: "
                    "rename it, or give another out=."
                )
            lock = os.open(mark, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except FileNotFoundError:  # removed by another process just now
            continue
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(mark)):
                return lock
        except BlockingIOError as error:
            os.close(lock)
            raise UserError(f"Another process is writing {target}: wait for it.") from error
        except FileNotFoundError:  # removed between opening and locking
            pass
        os.close(lock)


def _is_foreign(hidden: Path) -> bool:
    """Whether it is a file, a link, or a folder with files but no mark."""
    if hidden.is_symlink() or hidden.is_file():
        return True
    found = os.listdir(hidden)
    return bool(found) and _MARK not in found


def _empty(hidden: Path) -> None:
    """Remove all but the mark."""
    for path in hidden.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _MARK:
            path.unlink()


def _replace(target: Path, new: Path, former: Path) -> None:
    """Give the name of `target` to `new`; what was there stays in the hidden folder."""
    if not target.exists():
        new.rename(target)
    elif not _exchange(target, new):
        target.rename(former)
        try:
            new.rename(target)
        except BaseException:
            former.rename(target)
            raise


def _exchange(one: Path, two: Path) -> bool:
    """Exchange the names of two folders in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2  # Linux
    except (AttributeError, OSError, TypeError):
        return False
    first, second = os.fsencode(one), os.fsencode(two)
    return bool(rename(_AT_FDCWD, first, _AT_FDCWD, second, _EXCHANGE) == 0)
