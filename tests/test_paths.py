"""Lists of paths are compact, and what is large lies in one file for all processes."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dino_lite.data import shared
from dino_lite.data.paths import PathList, Paths, joined
from dino_lite.data.sources import PathSource
from images import sentence

fork_is_fine = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
PATHS = st.lists(st.binary(max_size=8).map(lambda path: path.replace(b"x", b"/")), max_size=20)


def paths_of(items: list[bytes]) -> Paths:
    """Paths of a list of bytes."""
    collected = PathList()
    for item in items:
        collected.add(item)
    return collected.paths()


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of its own, and every array large enough to be put there."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(shared, "MAX_COPIED", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


@given(PATHS)
def test_what_goes_in_comes_out(items: list[bytes]) -> None:
    """Any bytes, in order, twice or empty, also after pickling."""
    paths = paths_of(items)
    assert list(paths) == items
    assert len(paths) == len(items)
    assert list(pickle.loads(pickle.dumps(paths))) == items


@given(PATHS, PATHS, st.sampled_from([b"", b"a/", b"/"]))
def test_joined_and_cut(first: list[bytes], second: list[bytes], folder: bytes) -> None:
    """Lists one after the other below folders; of one, what lies below a folder."""
    both = joined([(b"a/", paths_of(first)), (b"", paths_of(second))])
    assert list(both) == [*(b"a/" + path for path in first), *second]
    items = paths_of([*both])
    rows = np.array([name.startswith(folder) for name in both], bool)
    wanted = [item for item in both if item.startswith(folder)]
    found, numbers = items.where(rows, folder)
    assert list(found) == [item[len(folder) :] for item in wanted]
    assert [items.folders()[i][len(folder) :] for i in numbers] == found.folders()


@given(PATHS, st.sampled_from([b"mask", b"a", b"z/", b"ab"]))
def test_folders_that_mention_a_word(items: list[bytes], word: bytes) -> None:
    """Of names of files alone, not of two that follow each other."""
    paths = paths_of(items)
    of = {paths.folders()[i] for i in paths.folders_that_mention([word])}
    wanted = {i[: i.rfind(b"/") + 1] for i in items if word in i[i.rfind(b"/") + 1 :].lower()}
    assert wanted <= of  # and perhaps one whose name ends where the word begins


def test_more_folders_than_a_byte_counts() -> None:
    """Numbers of folders are stored in as few bytes as they need."""
    items = [b"%d/%d" % (i, i) for i in range(300)]
    assert list(paths_of(items)) == items


def test_a_small_list_needs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is above MAX_COPIED bytes is put into the temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    keep = [shared.share(np.zeros(size, np.uint8)) for size in (2**20, 2**20 + 1)]
    assert len(os.listdir(tmp_path)) == 1
    assert not keep[1].any()


def test_a_pickle_names_the_file(files: Path) -> None:
    """A list of 1000 long paths and labels is sent in a few hundred bytes, and found again."""
    items = [b"%0100d" % i for i in range(1000)]
    source = PathSource(b"/data", paths_of(items), np.arange(1000), [])
    sent = pickle.dumps(source)
    assert len(sent) < 1500
    copy = pickle.loads(sent)
    assert copy.digest() == source.digest()
    assert np.array_equal(copy.labels, source.labels)
    assert os.listdir(files)


def test_files_go_with_the_list_but_not_with_a_copy(files: Path) -> None:
    """A copy can be thrown away while the list is in use; after the list nothing is left."""
    paths = paths_of([b"a/b", b"a/c"])
    before = sorted(os.listdir(files))
    copy = pickle.loads(pickle.dumps(paths))
    del copy
    gc.collect()
    assert sorted(os.listdir(files)) == before != []
    del paths
    gc.collect()
    assert os.listdir(files) == []


def test_what_is_computed_from_a_shared_array_is_its_own(files: Path) -> None:
    """A slice or a sum does not travel by the name of a file that holds other numbers."""
    array = shared.share(np.arange(10))
    for made in (array[2:5], array + 1, array[[1, 2]]):
        assert np.array_equal(pickle.loads(pickle.dumps(made)), made)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def _drop(paths: list[Paths], answer: Any) -> None:
    """In a worker: read, and let go of the list."""
    answer.put(paths.pop()[1])
    gc.collect()


@pytest.mark.slow
@fork_is_fine
@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_workers_read_the_list_and_leave_its_files(files: Path, how: str) -> None:
    """Also a worker that drops its list, or ends, removes nothing."""
    paths = paths_of([b"a/b", b"a/c"])
    before = sorted(os.listdir(files))
    context = multiprocessing.get_context(how)
    answer = context.Queue()
    worker = context.Process(target=_drop, args=([paths], answer))
    worker.start()
    assert answer.get() == b"a/c"
    worker.join()
    assert worker.exitcode == 0
    assert sorted(os.listdir(files)) == before
    assert list(paths) == [b"a/b", b"a/c"]


@pytest.mark.slow
def test_no_file_outlives_its_process(tmp_path: Path) -> None:
    """Also where that dies of an exception."""
    code = (
        "import os, numpy as np\n"
        "from dino_lite.data.shared import share\n"
        "kept = share(np.zeros(2**21, np.uint8))\n"
        f"print(len(os.listdir({str(tmp_path)!r})))\n"
        "raise RuntimeError"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "1\n", done.stderr
    assert os.listdir(tmp_path) == []


def test_a_temporary_folder_that_takes_nothing(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is a sentence, and leaves no half of a file."""

    class Full:
        name = str(files / "half")

        def __enter__(self) -> Full:
            Path(self.name).touch()
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def write(self, _: object) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared.tempfile, "NamedTemporaryFile", lambda **_: Full())
    told = sentence(shared.share, np.zeros(2**21, np.uint8))
    assert "No space left on device" in told
    assert "TMPDIR" in told
    assert os.listdir(files) == []
