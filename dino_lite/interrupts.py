"""Signals that ask a process to stop, and the exceptions by which it does:

    Interrupt    wherever the program is: by the handler that commands install, and in training by
                 Checkpoints, before the first step and after a second Ctrl-C; ends the command
                 with "interrupted" (Lightning turns it into SystemExit, training into Interrupted)
    Stopped      between two steps, by Checkpoints, after saving; training turns it into Interrupted
    Interrupted  by training and by the end of pretraining (errors.py): ends the command, and with
                 it a sweep, with one sentence on what is left of its work

Each holds the signal's number; the exit code is 128 plus that: 130 for Ctrl-C, 143 for SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Ctrl-C; `timeout`, systemd and scancel; a closed terminal; Slurm's usual warning of a time limit
STOP_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)  # Windows has two of them
)


class Interrupt(KeyboardInterrupt):
    """Stop at once."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stopped(SystemExit):
    """Training has ended, and is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def interrupt(number: int, frame: FrameType | None) -> None:
    """Signal handler that raises Interrupt."""
    raise Interrupt(number)


def number_of(error: BaseException | None) -> int:
    """The signal that an exception is about: Ctrl-C, where it does not say."""
    return int(getattr(error, "number", signal.SIGINT))


def by_signal(number: int) -> str:
    """ " by SIGTERM", for messages; nothing for Ctrl-C."""
    return "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"


def report_interrupt(error: KeyboardInterrupt) -> int:
    """Write one line, on the first rank of a machine; returns the exit code."""
    number = number_of(error)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"dino-lite: interrupted{by_signal(number)}.\n")
    return 128 + number


@contextmanager
def on_stop(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Context in which `handler` gets the stop signals. Signals that are ignored (nohup, background
    jobs) or handled by other code are left alone; outside of the main thread, all are.
    """
    before: dict[int, Any] = {}
    usual = (signal.SIG_DFL, signal.default_int_handler, interrupt)
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if signal.getsignal(number) in usual:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)


def block_stop_signals() -> set[Any]:
    """Block the stop signals in this thread, and in threads and processes that it starts; returns
    the signals blocked before, for `signal.pthread_sigmask`.
    """
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS))
