"""Writes a data set as tar shards: few large files, read sequentially."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from itertools import chain, groupby
from pathlib import Path

import numpy as np
from PIL import Image

from dino_lite.contracts import Source, Splits, UserError
from dino_lite.data.names import file_name
from dino_lite.data.order import permutation
from dino_lite.data.parts import append_rows
from dino_lite.data.sources import reason
from dino_lite.data.tar_index import index_tar, join_indexes, write_index
from dino_lite.wording import count

INDEX, CLASSES, LEFT_OUT = "index.npz", "classes.json", "left_out.csv"
MAX_BYTES = 256 * 2**20
MAX_IMAGES = 10_000  # of a shard
_BLOCK = tarfile.BLOCKSIZE
_NUM_FETCHED = 64  # images prefetched at once from remote sources


def check_target(folder: Path) -> Path:
    """The absolute path of a folder to pack into. Raises UserError if it is not empty."""
    folder = Path(os.path.abspath(folder.expanduser()))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty: name a new folder to pack into.")
    return folder


def write_shards(
    splits: Splits,
    folder: Path,
    max_bytes: int = MAX_BYTES,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Pack a data set into `folder`/train-000000.tar …, test-000000.tar …, and give their paths.

    Files are packed as they are if the source has them (`Source.encoded`), else as PNG. They are
    shuffled once, with a fixed seed; a key is the image's index in its split. Labels go into
    key.cls, class names into classes.json, byte offsets into index.npz. An unreadable file is left
    out and listed in left_out.csv. A shard has at most 10,000 images and `max_bytes`, unless a
    single image is larger. `progress` is called with 1 after each image.

    The folder must not exist, or be empty; it appears once everything is written. Raises UserError.
    """
    folder = check_target(folder)
    part = folder.with_name(file_name(folder.name, f".{os.getpid()}.part"))
    try:
        part.mkdir(parents=True)
        shards = _write_all(splits, part, max_bytes, progress or (lambda num: None))
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror or error}): free some space, or name "
            "another folder."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return [folder / shard for shard in shards]


def _write_all(
    splits: Splits, folder: Path, max_bytes: int, progress: Callable[[int], None]
) -> list[str]:
    shards: list[str] = []
    for split, source in (("train", splits.train), ("test", splits.test)):
        if source is not None:
            shards += _write_split(source, split, folder, max_bytes, progress)
    if not shards:
        images = count(len(splits.train), "image")
        raise UserError(f"None of the {images} can be read: check data.root.")
    indexes = []
    for shard in shards:
        with open(folder / shard, "rb") as file:
            index = index_tar(str(folder / shard), file, (folder / shard).stat().st_size)
        indexes.append(index._replace(shards=[shard]))
    write_index(join_indexes(indexes), folder / INDEX)
    if splits.train.classes:
        text = json.dumps(splits.train.classes, ensure_ascii=False, indent=0)
        (folder / CLASSES).write_text(text, encoding="utf-8")
    return shards


Sample = list[tuple[str, bytes]]  # names and contents of members


def _write_split(
    source: Source, split: str, folder: Path, max_bytes: int, progress: Callable[[int], None]
) -> list[str]:
    shards: list[str] = []
    samples = _samples(source, folder, progress)
    for number, group in groupby(samples, _number_of_shard(max_bytes)):
        shards.append(f"{split}-{number:06d}.tar")
        with tarfile.open(folder / shards[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, content in chain.from_iterable(group):
                item = tarfile.TarInfo(name)  # no owner, no time: shards are reproducible
                item.size = len(content)
                tar.addfile(item, io.BytesIO(content))
    return shards


def _number_of_shard(max_bytes: int) -> Callable[[Sample], int]:
    """A key function for `groupby`: the number of the shard that the next sample goes into."""
    number = num_images = 0
    num_bytes = tarfile.RECORDSIZE  # the end of a tar file

    def place(sample: Sample) -> int:
        nonlocal number, num_images, num_bytes
        more = sum(_BLOCK * (1 + -(-len(content) // _BLOCK)) for _, content in sample)
        if num_images and (num_images == MAX_IMAGES or num_bytes + more > max_bytes):
            number, num_images, num_bytes = number + 1, 0, tarfile.RECORDSIZE
        num_images, num_bytes = num_images + 1, num_bytes + more
        return number

    return place


def _samples(source: Source, folder: Path, progress: Callable[[int], None]) -> Iterator[Sample]:
    """The members of each readable image, shuffled so that classes spread over the shards."""
    order = permutation(0, 0, len(source)).tolist()
    for place, index in enumerate(order):
        if place % _NUM_FETCHED == 0:
            source.prefetch(order[place : place + _NUM_FETCHED])
        try:
            content, suffix = _file(source, index)
        except (OSError, ValueError) as error:
            append_rows(
                folder / LEFT_OUT, ("path", "reason"), [(source.name(index), reason(error))]
            )
        else:
            key = f"{index:09d}"
            members = [(f"{key}{suffix}", content)]
            label = -1 if source.labels is None else int(source.labels[index])
            if label >= 0:
                members.append((f"{key}.cls", str(label).encode()))
            yield members
        progress(1)


def _file(source: Source, index: int) -> tuple[bytes, str]:
    """An image as a file: its own, else a PNG, else an array if PNG has no such channels."""
    if (stored := source.encoded(index)) is not None:
        content, suffix = stored
        return content, suffix.lower()
    pixels = source.read(index)
    file = io.BytesIO()
    if pixels.shape[2] not in (1, 3):
        np.save(file, pixels, allow_pickle=False)
        return file.getvalue(), ".npy"
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return file.getvalue(), ".png"
