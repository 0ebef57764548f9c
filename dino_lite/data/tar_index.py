"""Index of the images in tar shards, read from the headers once and cached."""

from __future__ import annotations

import json
import os
import re
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np
from jaxtyping import Int64

from dino_lite.contracts import UserError
from dino_lite.data.decode import File
from dino_lite.data.suffixes import FETCH, POINTER, SUFFIXES
from dino_lite.wording import count

FORMAT = 1  # version of an index file; others are ignored
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
_EXTENSIONS = {suffix.decode()[1:] for suffix in SUFFIXES}
_NO_CACHE = (OSError, RuntimeError)  # not writable, or no home directory
# WebDataset's rule: the key ends at the first dot of the file's name.
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")


class TarIndex(NamedTuple):
    """The images of some shards, in order. Shard s holds images bounds[s] to bounds[s+1]."""

    shards: list[str]  # file names, relative to where the index is
    shard_bytes: Int64[np.ndarray, "S"]
    bounds: Int64[np.ndarray, "bounds"]
    names: list[str]  # members: key.extension
    labels: list[str]  # "": none
    offsets: Int64[np.ndarray, "N"]  # of the image's first byte in its shard
    sizes: Int64[np.ndarray, "N"]  # bytes

    def part(self, shards: Sequence[str]) -> TarIndex:
        """The index of these shards only, in this order."""
        place_of = {shard: s for s, shard in enumerate(self.shards)}
        places = [place_of[shard] for shard in shards]
        spans = [(int(self.bounds[s]), int(self.bounds[s + 1])) for s in places]
        return TarIndex(
            list(shards),
            self.shard_bytes[places],
            np.cumsum([0, *(stop - start for start, stop in spans)], dtype=np.int64),
            [name for start, stop in spans for name in self.names[start:stop]],
            [label for start, stop in spans for label in self.labels[start:stop]],
            _concatenated([self.offsets[start:stop] for start, stop in spans]),
            _concatenated([self.sizes[start:stop] for start, stop in spans]),
        )

    def select(self, rows: Sequence[int]) -> TarIndex:
        """The index of these images only, in their order, without shards that have none."""
        shard_of = np.searchsorted(self.bounds, rows, "right") - 1
        counts = np.bincount(shard_of, minlength=len(self.shards))
        kept = np.flatnonzero(counts)
        return TarIndex(
            [self.shards[s] for s in kept],
            self.shard_bytes[kept],
            np.cumsum([0, *counts[kept]], dtype=np.int64),
            [self.names[row] for row in rows],
            [self.labels[row] for row in rows],
            self.offsets[rows],
            self.sizes[rows],
        )


def join_indexes(parts: Sequence[TarIndex]) -> TarIndex:
    """Concatenate the indexes of all parts."""
    return TarIndex(
        [shard for part in parts for shard in part.shards],
        _concatenated([part.shard_bytes for part in parts]),
        np.cumsum([0, *np.concatenate([np.diff(part.bounds) for part in parts])], dtype=np.int64),
        [name for part in parts for name in part.names],
        [label for part in parts for label in part.labels],
        _concatenated([part.offsets for part in parts]),
        _concatenated([part.sizes for part in parts]),
    )


def _concatenated(arrays: Sequence[Int64[np.ndarray, "_"]]) -> Int64[np.ndarray, "_"]:
    return np.concatenate([np.empty(0, np.int64), *arrays])


class _Member(NamedTuple):
    key: str
    extension: str
    offset: int
    size: int
    label: str  # content of a .cls or .json


def index_tar(shard: str, file: File, num_bytes: int) -> TarIndex:
    """Index the images of one shard from its headers. Raises UserError if that is impossible.

    A sample is a run of members with one key. Its image is the member key.jpg (or .png …); if there
    is none, every member with such an ending. Its label is key.cls or "label" in key.json.
    """
    start = file.read(len(POINTER))
    file.seek(0)
    if start == POINTER:
        raise UserError(f"{shard} {FETCH}.")
    if start.startswith(_COMPRESSED):
        raise UserError(
            f"{shard} is compressed, so that images cannot be read from its middle: unpack it "
            "(gunzip, unxz, unzstd …) and give the .tar."
        )
    images: list[_Member] = []
    labels: list[str] = []
    try:
        with tarfile.open(fileobj=cast("IO[bytes]", file), mode="r:") as tar:
            for _, members in groupby(_members(tar), lambda member: member.key):
                sample = list(members)
                ending = [m for m in sample if _ending(m) in _EXTENSIONS]
                found = [m for m in ending if "." not in m.extension][:1] or ending
                images += found
                labels += [next((m.label for m in sample if m.label), "")] * len(found)
            file.seek(tar.offset)
            if any(file.read(tarfile.BLOCKSIZE)):  # tarfile takes a damaged header for the end
                raise tarfile.ReadError("damaged header")
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(
            f"{shard} is not a complete tar file ({error}, after {count(len(images), 'image')}): "
            "fetch or pack it again, or leave it out."
        ) from error
    except Exception as error:  # OSError, or what a protocol's package raises
        raise UserError(
            f"{shard} cannot be read ({type(error).__name__}: {error}): check it and your access."
        ) from error
    return TarIndex(
        [shard],
        np.array([num_bytes], np.int64),
        np.array([0, len(images)], np.int64),
        [f"{image.key}.{image.extension}" for image in images],
        labels,
        np.array([image.offset for image in images], np.int64),
        np.array([image.size for image in images], np.int64),
    )


def _ending(member: _Member) -> str:
    return member.extension.lower().split(".")[-1]


def _members(tar: tarfile.TarFile) -> Iterator[_Member]:
    """Files with a key, except WebDataset's `__notes__`."""
    while (item := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # else it remembers every header
        match = _MEMBER.fullmatch(item.name.removeprefix("./"))
        if not item.isreg() or item.issparse() or match is None or match[1].startswith("__"):
            continue
        extension = match[2].lower()
        label = ""
        if extension in ("cls", "json") and (stored := tar.extractfile(item)) is not None:
            label = _label(extension, stored.read())
        yield _Member(match[1], match[2], item.offset_data, item.size, label)


def _label(extension: str, content: bytes) -> str:
    """A class as text, "" if the file has none."""
    if extension == "cls":
        return content.decode("utf-8", "replace").strip().replace("\0", "")
    try:
        label = json.loads(content).get("label")
    except (ValueError, AttributeError):  # not JSON, or not a mapping
        return ""
    return str(label).replace("\0", "") if isinstance(label, int | str) else ""


# ----------------------------------------------------------------------------------- index files


def write_index(index: TarIndex, path: Path) -> None:
    """Write the index as .npz, atomically."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with open(part, "wb") as file:
        np.savez(
            file,
            format=np.array(FORMAT),
            shards=_packed(index.shards),
            names=_packed(index.names),
            labels=_packed(index.labels),
            shard_bytes=index.shard_bytes,
            bounds=index.bounds,
            offsets=index.offsets,
            sizes=index.sizes,
        )
    os.replace(part, path)


def read_index(file: File) -> TarIndex | None:
    """An index from `write_index`; None if the file is something else."""
    try:
        with np.load(cast("IO[bytes]", file), allow_pickle=False) as stored:
            if int(stored["format"]) != FORMAT:
                return None
            return TarIndex(
                _unpacked(stored["shards"]),
                stored["shard_bytes"],
                stored["bounds"],
                _unpacked(stored["names"]),
                _unpacked(stored["labels"]),
                stored["offsets"],
                stored["sizes"],
            )
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
        return None


def _packed(texts: Sequence[str]) -> np.ndarray:
    return np.frombuffer(
        "".join(f"{text}\0" for text in texts).encode("utf-8", "surrogateescape"), np.uint8
    )


def _unpacked(packed: np.ndarray) -> list[str]:
    return packed.tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1]


def cached_index(shard: str, place: str, num_bytes: int, version: str) -> TarIndex | None:
    """The cached index of a shard, if the shard has not changed."""
    with suppress(*_NO_CACHE), open(_cache_file(place, num_bytes, version), "rb") as file:
        index = read_index(file)
        return None if index is None else index._replace(shards=[shard])
    return None


def cache_index(index: TarIndex, place: str, num_bytes: int, version: str) -> None:
    """Cache the index, if the cache folder is writable."""
    if not version:  # a rewritten shard could not be recognized
        return
    with suppress(*_NO_CACHE):
        path = _cache_file(place, num_bytes, version)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_index(index, path)


def _cache_file(place: str, num_bytes: int, version: str) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = blake2b(
        f"{place}\0{num_bytes}\0{version}".encode("utf-8", "surrogateescape"), digest_size=16
    )
    return folder / "dino_lite" / "shards" / f"{key.hexdigest()}.npz"
