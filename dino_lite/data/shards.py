"""Images in WebDataset tar shards, local or by URL, read in place by byte ranges.

The `webdataset` library streams shards: its epochs have a nominal length, a split over ranks and
workers repeats or drops images, and a run resumed within an epoch starts another one. Here shards
are indexed (one pass over their headers), so that order, split and resume are exact, as with any
source, and the sampler keeps reads near each other (`groups`). The format is the same: either
library reads the other's shards.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, final

import numpy as np
from jaxtyping import Int, UInt8

from dino_lite.contracts import Source, Splits, UserError
from dino_lite.data.byte_ranges import (
    Range,
    expand_braces,
    filesystem,
    names_below,
    read_range,
    read_ranges,
    versions,
)
from dino_lite.data.decode import decode, upright_size
from dino_lite.data.folder_names import matches
from dino_lite.data.labels import Labels, encode_known
from dino_lite.data.pack import CLASSES, INDEX
from dino_lite.data.packed import Packed, split_packed
from dino_lite.data.paths import PathList
from dino_lite.data.pixels import Background, Bounds, Pixels, as_pixels
from dino_lite.data.roots import is_url
from dino_lite.data.selection import Patterns, select
from dino_lite.data.shared import share
from dino_lite.data.sources import digest, expand
from dino_lite.data.tar_index import (
    TarIndex,
    cache_index,
    cached_index,
    index_tar,
    join_indexes,
    read_index,
)
from dino_lite.settings.kinds import Size

_NUM_CONNECTIONS = 8  # shards indexed at once over a network


def open_shards(
    root: str | Path | None = None,
    channels: Size = 3,
    range: Bounds | None = None,
    background: Background | None = None,
    truncated: bool = False,
    train: Patterns = None,
    test: Patterns = None,
    exclude: Patterns = None,
    class_level: int = 0,
) -> Splits:
    """The images of tar shards: a folder of them, a single one, or a pattern
    `train-{000..146}.tar`.

    `root` may be a URL: s3://…, https://…. The names of the shards say which are train and which
    are test, or else the folders in them, see `layout.read_layout`; `train`, `test` and `exclude`
    say otherwise, as in `open_folder`. Labels: key.cls or "label" in key.json, a number or text; -1
    for unlabeled images; without any, the folders in the shards. `channels` to `truncated`: see
    `Pixels`.
    """
    chosen = select(train, test, exclude, class_level)
    base, shards = find_shards(root)
    index = _load_index(base, [shard for shard in shards if not matches(shard, chosen.exclude)])
    if not index.names:
        raise UserError(f"{base} has no image (key.jpg, key.png …) in its shards: check data.root.")
    parts = split_packed(index, chosen)
    if not parts.train.names:
        asked = ",".join(chosen.train or [])
        raise UserError(f"data.train={asked} names no shard of {base}, and no folder in them.")
    found = _labels(base, parts)
    of_test, pixels = parts.test, Pixels(channels, range, background, truncated)
    return Splits(
        ShardSource(base, parts.train, found.train, found.classes, pixels),
        ShardSource(base, of_test, found.test, found.classes, pixels) if of_test.names else None,
        base.rpartition("/")[2] or "shards",
        tuple(parts.left_out),
        found.origin,
    )


def num_packed(base: str, shards: list[str]) -> int:
    """The number of images in these shards, 0 if they cannot be read."""
    try:
        return len(_load_index(base, shards).names)
    except UserError:
        return 0


@final
class ShardSource(Source):
    """Images in the shards of one split, in the shards' order. `groups` are the shards' bounds.

    All arrays are shared with workers; there is no object per image.
    """

    def __init__(
        self,
        base: str,
        index: TarIndex,
        labels: Int[np.ndarray, "N"] | None,
        classes: list[str],
        pixels: Pixels | int = 3,
    ) -> None:
        self.base, self.shards, self._bounds = base, index.shards, index.bounds
        self.groups = index.bounds
        self.labels = None if labels is None else share(labels)
        self.classes, self.pixels = classes, as_pixels(pixels)
        self.channels = self.pixels.channels
        names = PathList()
        for name in index.names:
            names.add(name.encode("utf-8", "surrogateescape"))
        self._names = names.paths()
        self._offsets, self._sizes = share(index.offsets), share(index.sizes)
        self._fetched: dict[int, bytes | OSError] = {}  # by `prefetch`
        self._digest: str | None = None

    def __len__(self) -> int:
        return len(self._sizes)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fetched": {}}

    def read(self, index: int, min_pixels: int | None = None) -> UInt8[np.ndarray, "H W C"]:
        """Image `index`, as `decode` gives it."""
        return decode(io.BytesIO(self.encoded(index)[0]), self.pixels, min_pixels)

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width of image `index`, from its header. Raises as `read` does."""
        return upright_size(io.BytesIO(self.encoded(index)[0]))

    def encoded(self, index: int) -> tuple[bytes, str]:
        """Content and suffix of the packed file. Raises OSError."""
        suffix = "." + self._member(index).rpartition(".")[2]
        found = self._fetched.get(index)
        if isinstance(found, OSError):
            raise found
        return read_range(self._range(index)) if found is None else found, suffix

    def prefetch(self, indices: Sequence[int]) -> None:
        """Fetch these images concurrently for `read`, and drop those fetched before."""
        if is_url(self.base):
            found = read_ranges([self._range(index) for index in indices])
            self._fetched = dict(zip(indices, found, strict=True))

    def name(self, index: int) -> str:
        """Path of the shard, and the name within it."""
        return f"{self._place(index)}/{self._member(index)}"

    def data_files(self) -> list[str]:
        """Paths or URLs of the shards."""
        return [f"{self.base}/{shard}" for shard in self.shards]

    def digest(self) -> str:
        """16 hex digits over names and sizes, by shard; independent of the folder."""
        if self._digest is None:  # takes seconds for millions of images
            shards = "\0".join(self.shards).encode("utf-8", "surrogateescape")
            arrays = (self._bounds.tobytes(), self._sizes.tobytes())
            self._digest = digest(chain([shards, *arrays], self._names))
        return self._digest

    def _member(self, index: int) -> str:
        return self._names[index].decode("utf-8", "surrogateescape")

    def _place(self, index: int) -> str:
        return f"{self.base}/{self.shards[np.searchsorted(self._bounds, index, 'right') - 1]}"

    def _range(self, index: int) -> Range:
        return Range(self._place(index), int(self._offsets[index]), int(self._sizes[index]))


# --------------------------------------------------------------------------------------- shards


def find_shards(root: str | Path | None) -> tuple[str, list[str]]:
    """The folder or URL that contains all shards of `root`, and their paths below it."""
    text = str(root or "")
    text = text if is_url(text) else str(expand(root)).replace("\\", "/")
    if text.lower().endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")):
        raise UserError(
            f"data.root={text} is compressed, so that images cannot be read from its middle: "
            "unpack it (gunzip, unxz, unzstd …) and give the .tar."
        )
    if text.lower().endswith(".tar"):
        places = expand_braces(text)
        base = places[0].rpartition("/")[0]
        while base and not all(place.startswith(f"{base}/") for place in places):
            base = base.rpartition("/")[0]
        if is_url(text) and not is_url(base):
            raise UserError(f"data.root={text} names shards of several places: give those of one.")
        return base, [place[len(base) + 1 :] for place in places]
    base = text.rstrip("/")
    shards = names_below(base, ".tar")
    if not shards:
        raise UserError(
            f"data.root={text} holds no .tar file: name a folder of shards, one shard, or a "
            "pattern like train-{000..146}.tar."
        )
    return base, shards


# ---------------------------------------------------------------------------------------- index


def _load_index(base: str, shards: list[str]) -> TarIndex:
    """The index from the file beside the shards, from the cache, or from the shards."""
    places = [f"{base}/{shard}" for shard in shards]
    stamps = versions(places)
    beside = _index_beside(base)
    if beside is not None:
        known = dict(zip(beside.shards, beside.shard_bytes.tolist(), strict=True))
        if all(known.get(shard) == size for shard, (size, _) in zip(shards, stamps, strict=True)):
            return beside.part(shards)

    def load(number: int) -> TarIndex:
        place, stamp = places[number], stamps[number]
        found = cached_index(shards[number], place, *stamp)
        if found is None:
            found = _read_headers(shards[number], place, stamp[0])
            cache_index(found, place, *stamp)
        return found

    if not is_url(base):
        return join_indexes([load(number) for number in range(len(shards))])
    with ThreadPoolExecutor(_NUM_CONNECTIONS) as pool:
        return join_indexes(list(pool.map(load, range(len(shards)))))


def _index_beside(base: str) -> TarIndex | None:
    content = _file_beside(base, INDEX)
    return None if content is None else read_index(io.BytesIO(content))


def _file_beside(base: str, name: str) -> bytes | None:
    """Content of a file in the shards' folder, None if there is none."""
    try:
        if not is_url(base):
            return Path(base, name).read_bytes()
        fs, path = filesystem(f"{base}/{name}")
        content: bytes = fs.cat_file(path)
        return content
    except Exception:  # optional
        return None


def _read_headers(shard: str, place: str, num_bytes: int) -> TarIndex:
    fs, path = filesystem(place) if is_url(place) else (io, place)
    try:
        opened = fs.open(path, "rb")
    except Exception as error:  # any exception of the protocol's package
        raise UserError(
            f"{place} cannot be opened ({type(error).__name__}: {error}): check data.root and your "
            "access to it."
        ) from error
    with opened as file:
        return index_tar(place, file, num_bytes)._replace(shards=[shard])


def _labels(base: str, parts: Packed) -> Labels:
    """Labels from .cls and .json files, integers if all of them are; or else the folders."""
    both = (parts.train, parts.test)
    if not any(label for part in both for label in part.labels):
        return parts.by_folder
    number = all(label.isdecimal() for part in both for label in part.labels if label)
    names = [
        [None if not label else int(label) if number else label for label in part.labels]
        for part in both
    ]
    origin = "the .cls or .json files in the shards"
    return encode_known(names[0], names[1], _stored_classes(base), origin)


def _stored_classes(base: str) -> list[str]:
    """Class names that `write_shards` stored beside its shards, if there are any."""
    try:
        return [*map(str, json.loads(_file_beside(base, CLASSES) or b"[]"))]
    except (ValueError, TypeError):
        return []
