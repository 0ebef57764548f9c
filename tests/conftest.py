"""What every test has: fixed seeds, one thread, no window, and data that may lie next door."""

from __future__ import annotations

import os
import random
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# For the commands that tests start as well: no window opens, and users' mistakes are sentences.
os.environ["MPLBACKEND"] = "Agg"
os.environ.pop("HYDRA_FULL_ERROR", None)
# Checked shapes raise false errors inside a graph, and a minute of compiling is none of a test's:
# torch.compile gives functions back as they are, save to the tests that ask (`compiling`).
os.environ["TORCH_COMPILE_DISABLE"] = "1"

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


@pytest.fixture(autouse=True)
def fixed_seeds_and_one_thread() -> None:
    """Each test draws the same numbers whatever ran before; tiny tensors like one thread best."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - for libraries that draw from the global generator
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def compiling() -> dict[str, str]:
    """The environment of a process that compiles, apart from this one."""
    return {name: value for name, value in os.environ.items() if name != "TORCH_COMPILE_DISABLE"}


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
