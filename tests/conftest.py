"""What every test has: fixed seeds, one thread, no window, and data that may lie next door."""

from __future__ import annotations

import importlib
import multiprocessing.forkserver
import os
import random
import resource
import signal
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# For the processes that tests start as well: they import this checkout and have one thread, no
# window opens, and users' mistakes are sentences.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.pop("HYDRA_FULL_ERROR", None)
# Checked shapes raise false errors inside a graph, and a minute of compiling is none of a test's:
# torch.compile gives functions back as they are, save to the tests that ask (`ranks.apart`).
os.environ["TORCH_COMPILE_DISABLE"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # in the process that compiles
# A background job, nohup and some runners hand SIGINT down as ignored; tests interrupt runs by it.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Before the package: what is first imported from inside it is compiled anew, for the import hook
# that checks shapes reads no bytecode but its own.
for name in ("pytorch_lightning", "timm"):
    importlib.import_module(name)

# The same examples every time and no folder written; a first example pays for imports: no deadline.
hypothesis.settings.register_profile("dino_lite", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("dino_lite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_sessionfinish() -> None:
    """End the server that processes were forked from (tests/ranks.py): its seconds count too."""
    for process in multiprocessing.active_children():
        if isinstance(process, multiprocessing.context.ForkServerProcess):
            process.kill()  # else the server would wait for it
    multiprocessing.forkserver._forkserver._stop()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """CPU seconds of this process and of all that it waited for, beside pytest's wall seconds."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in used)
    terminalreporter.write_line(f"{seconds:.0f} CPU seconds")


@pytest.fixture(autouse=True)
def fixed_seeds_and_one_thread() -> None:
    """Each test draws the same numbers whatever ran before; tiny tensors like one thread best."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - for libraries that draw from the global generator
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the checkout with golden numbers and real images, or a skip."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder shared/ beside the checkout: no golden numbers, no real images")
    return folder


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """The folder with cases.json and its tensors, or a skip."""
    folder = shared / "golden"
    if not (folder / "cases.json").is_file():
        pytest.skip("shared/golden holds no cases.json")
    return folder
