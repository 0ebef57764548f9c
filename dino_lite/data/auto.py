"""Opens a data set according to what `data.root` points to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dino_lite.contracts import Splits, UserError
from dino_lite.data import files
from dino_lite.data.builtin import CIFAR10_FOLDER, open_builtin
from dino_lite.data.columns import holds_images
from dino_lite.data.files import open_files
from dino_lite.data.folder import open_folder
from dino_lite.data.huggingface import open_huggingface
from dino_lite.data.npz import open_npz
from dino_lite.data.pixels import Background, Bounds, Pixels
from dino_lite.data.roots import Root, is_pattern, is_url, several
from dino_lite.data.shapes import open_shapes
from dino_lite.data.shards import open_shards
from dino_lite.data.sources import expand
from dino_lite.data.suffixes import SUFFIXES
from dino_lite.settings.kinds import Size


def open_auto(
    root: Root | None = None,
    labels: str | None = "auto",
    channels: Size = 3,
    range: Bounds | None = None,
    background: Background | None = None,
    truncated: bool = False,
) -> Splits:
    """Open the data set at `root`; without `root`, the embedded shapes.

    `root` is a list of files (.csv, .tsv, .parquet, .txt; a path or URL), tar shards, Parquet or
    Arrow files with images, an .npz file, CIFAR-10, or one or several folders or a pattern.
    `labels` applies to folders and lists; other formats use their own labels, which `none`
    discards. `channels` to `truncated`: see `Pixels`.
    """
    pixels = Pixels(channels, range, background, truncated)
    if root is None:
        return _with_own_labels(open_shapes(channels=channels), labels)
    if several(root) is not None or is_pattern(root):
        return open_folder(root, labels, *pixels)
    assert isinstance(root, str | Path)
    path = Path(str(root)) if is_url(root) else expand(root)
    if path.is_dir() and (path.name == CIFAR10_FOLDER or (path / CIFAR10_FOLDER).is_dir()):
        return _with_own_labels(open_builtin("cifar10", root, channels=channels), labels)
    kind = _kind(str(root), path)
    if kind == "shards":
        return _with_own_labels(open_shards(root, *pixels), labels)
    if kind == "huggingface":
        return _with_own_labels(open_huggingface(root, **pixels._asdict()), labels)
    if path.is_dir():
        return open_folder(root, labels, *pixels)
    suffix = files.suffix_of(str(root))
    if suffix in files.SUFFIXES:
        return open_files(root, labels, **pixels._asdict())
    if suffix == ".npz":
        return _with_own_labels(open_npz(root, channels, range), labels)
    if path.is_file():
        raise UserError(
            f"data.root={root} is a file of no known kind: give a folder of images, a list of them "
            f"({', '.join(files.SUFFIXES)}), tar shards, an .npz file, or torchvision's "
            f"{CIFAR10_FOLDER}."
        )
    return open_folder(root, labels, *pixels)


def _with_own_labels(splits: Splits, labels: str | None) -> Splits:
    """Keep or discard the labels of a format that has its own."""
    if labels in (None, "none"):
        for source in (splits.train, splits.test):
            if source is not None:
                source.labels, source.classes = None, []
    elif labels != "auto":
        raise UserError(
            f"data.labels={labels} is for folders of images, but {splits.name} brings its own: "
            "leave it out."
        )
    return splits


def _kind(root: str, path: Path) -> str:
    """The reader of a file or folder, judged by names: shards, huggingface or "" (neither)."""
    if root.lower().endswith((".tar", ".tar.gz", ".tgz")):
        return "shards"
    if path.suffix.lower() in (".parquet", ".arrow"):
        return "huggingface" if path.is_file() and holds_images(path) else ""
    if not path.is_dir():
        return ""
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return "huggingface"  # written by `Dataset.save_to_disk`
    found = dict(_first_of_each_suffix(path))
    if any(suffix.encode() in SUFFIXES for suffix in found):
        return ""
    if ".tar" in found:
        return "shards"
    tables = [found[suffix] for suffix in (".parquet", ".arrow") if suffix in found]
    return "huggingface" if any(map(holds_images, tables)) else ""


def _first_of_each_suffix(path: Path) -> Iterator[tuple[str, Path]]:
    """A file of each suffix in the folder and its subfolders; stops at the first image."""
    folders = [path]
    for folder in folders:  # grows during the loop
        try:
            for file in folder.iterdir():
                suffix = file.suffix.lower()
                if file.name.startswith("."):
                    continue
                if folder == path and file.is_dir():
                    folders.append(file)
                elif suffix and file.is_file():
                    yield suffix, file
                    if suffix.encode() in SUFFIXES:
                        return
        except OSError:  # reported when it is opened
            continue
