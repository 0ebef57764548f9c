"""Worker processes of data loaders, which leave signals to the process that started them."""

from __future__ import annotations

import atexit
import copy
import multiprocessing
import signal
from multiprocessing import resource_tracker
from typing import Any

from dino_lite.interrupts import block_stop_signals

_CAN_BLOCK = hasattr(signal, "pthread_sigmask")  # not on Windows


class Worker(multiprocessing.Process):
    """A process in which stop signals are blocked from its first instruction: a signal to the
    process group (Ctrl-C, `timeout`, scancel) must not end a worker while the run still saves.

    Hence `terminate` kills it. Workers that outlive their loader are killed at exit, where
    multiprocessing would wait for them.
    """

    def start(self) -> None:
        """Start with the stop signals blocked; those that arrive meanwhile are delivered later."""
        if multiprocessing.get_start_method() != "fork":
            resource_tracker.ensure_running()  # which unblocks some of them when it starts
        before = block_stop_signals() if _CAN_BLOCK else set()
        try:
            super().start()
        finally:
            if _CAN_BLOCK:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def run(self) -> None:
        """Run with the stop signals blocked, also if spawned by a process that did not."""
        if _CAN_BLOCK:
            block_stop_signals()
        super().run()

    def terminate(self) -> None:
        """As `kill`."""
        self.kill()


def worker_context(num_workers: int) -> Any:
    """A DataLoader's `multiprocessing_context` for such workers; None without workers."""
    if not num_workers:
        return None
    context: Any = copy.copy(multiprocessing.get_context())
    context.Process = Worker
    return context


@atexit.register  # runs before multiprocessing's own exit function, which was registered earlier
def _kill_workers() -> None:
    left = [each for each in multiprocessing.active_children() if isinstance(each, Worker)]
    if left and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
    for worker in left:
        worker.kill()
