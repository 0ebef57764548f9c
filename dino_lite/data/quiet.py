"""Keeps what image libraries say about damaged files off stderr, for the reason of a failure."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from PIL import _imaging

_LOGGERS = ("PIL.TiffImagePlugin", "tifffile")
_heard = threading.local()  # .messages: of the block `quiet` in this thread, if it is in one
_lock = threading.Lock()
_blocks: list[Any] = [0, None]  # how many are open in all threads; what restores the warnings


def _start_anew() -> None:
    """In a forked process: no other thread of the parent, which may hold the lock, exists here."""
    global _lock
    _lock = threading.Lock()
    _blocks[0] = 0


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_start_anew)


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Suppress warnings, and collect what `listen` hears in this thread.

    Warnings are Python's for all threads, so the first block that opens suppresses them and the
    last one that closes restores them.
    """
    _heard.messages = messages = list[str]()
    with _lock:
        if not _blocks[0]:
            _blocks[1] = warnings.catch_warnings()
            _blocks[1].__enter__()
            warnings.simplefilter("ignore")  # about damaged EXIF and large sizes
        _blocks[0] += 1
    try:
        yield messages
    finally:
        with _lock:
            _blocks[0] -= 1
            if not _blocks[0]:
                _blocks[1].__exit__(None, None, None)
        _heard.messages = None


@cache
def listen() -> Any:
    """Let `quiet` hear what readers of TIFF log, and what libtiff itself writes to stderr.

    Outside of `quiet` both go where they went before. Returns what must stay alive.
    """
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_not_heard)
    try:
        # libtiff as Pillow links it: symbols of a library's dependencies are found through it.
        libtiff = ctypes.CDLL(_imaging.__file__)
        vsnprintf = ctypes.CDLL(None).vsnprintf
        set_handler = libtiff.TIFFSetErrorHandler
    except (AttributeError, OSError, TypeError):  # linked otherwise: its lines stay on stderr
        return None
    kind = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
    vsnprintf.argtypes = (ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_void_p)
    set_handler.restype = ctypes.c_void_p

    def handle(module: bytes | None, text: bytes, values: int | None) -> None:
        messages = getattr(_heard, "messages", None)
        if messages is None:
            if before:
                kind(before)(module, text, values)
            return
        told = ctypes.create_string_buffer(300)
        vsnprintf(told, len(told), text, values)
        messages.append(told.value.decode("utf-8", "replace").rstrip("."))

    handler = kind(handle)
    before = set_handler(handler)
    return handler


def _is_not_heard(record: logging.LogRecord) -> bool:
    """A filter: keeps a record for `quiet` instead of letting it be logged."""
    messages = getattr(_heard, "messages", None)
    if messages is not None:
        messages.append(record.getMessage())
    return messages is None
