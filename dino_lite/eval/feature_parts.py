"""Features of a data set in parts of bounded size: each is computed and written by itself, so that
an interrupted command goes on after the last one, and ranks share them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int
from torch import Tensor

from dino_lite.contracts import Source
from dino_lite.data.clean import CleanData
from dino_lite.distributed import all_gather_objects, rank, world_size
from dino_lite.eval.embedder import Embedder
from dino_lite.eval.feature_files import Part, Table
from dino_lite.eval.features import device_of, dtype_of, frozen
from dino_lite.meter import meter

_MOST_IMAGES, _MOST_BYTES = 4096, 256 * 2**20  # in a part, unless part_images says otherwise


def usual_part_images(image_bytes: int) -> int:
    """The largest power of two of images with at most 256 MiB of features, 4,096 at most."""
    return int(2 ** np.floor(np.log2(min(_MOST_IMAGES, max(1, _MOST_BYTES // image_bytes)))))


def parts_of(sources: Mapping[str, Source], part_images: int) -> list[Part]:
    """The parts of all splits, in order."""
    found = []
    for split, source in sources.items():
        starts = range(0, len(source), part_images)
        for number, start in enumerate(starts):
            stop = min(start + part_images, len(source))
            found.append(Part(split, number, len(starts), start, stop))
    return found


def write_parts(
    embedder: Embedder,
    data: CleanData,
    sources: Mapping[str, Source],
    parts: Sequence[Part],
    write: Callable[[Part, Table, list[tuple[str, str]]], None],
) -> None:
    """Compute this rank's share of `parts` and `write` each with the names and reasons of its
    unreadable images. One part at a time is in memory.
    """
    own = parts[rank() :: world_size()]
    total = sum(part.stop - part.start for part in own)
    with frozen(embedder.backbone), meter(total, "features") as advance:
        for split, source in sources.items():
            of_split = [part for part in own if part.split == split]
            for part, table in tables(embedder, data, split, source, of_split, advance):
                write(part, table, _bad_images(part, table, source, data))
                del table  # before memory for the next part is taken
    all_gather_objects(None)  # all parts are written


def tables(
    embedder: Embedder,
    data: CleanData,
    split: str,
    source: Source,
    parts: Sequence[Part],
    advance: Callable[[int], None] = lambda num: None,
) -> Iterator[tuple[Part, Table]]:
    """The features of each part of a split, in order; `advance` counts images. Use inside `frozen`.

    Batches do not reach beyond a part, so a part's features do not depend on other parts.
    """
    size, device = data.batch_size, device_of(embedder.backbone)
    order = (
        [*range(start, min(start + size, part.stop))]
        for part in parts
        for start in range(part.start, part.stop, size)
    )
    left = iter(parts)
    rows: _Rows | None = None
    dtype = dtype_of(embedder.backbone)
    for images, labels, index in data.indexed(source, device, dtype, order):
        found = embedder.to_host(embedder(images))
        while rows is None or int(index[0]) >= rows.part.stop:
            if rows is not None:
                yield rows.part, rows.table(split, source)
                rows = None  # frees its memory
            rows = _Rows(next(left), embedder)
        rows.add(index, labels, found)
        advance(len(index))
    if rows is not None:
        yield rows.part, rows.table(split, source)
    for part in left:  # without a readable image
        yield part, _Rows(part, embedder).table(split, source)


class _Rows:
    """The rows of a part, filled batch by batch."""

    def __init__(self, part: Part, embedder: Embedder) -> None:
        self.part, self.num = part, 0
        most = part.stop - part.start
        self.index, self.label = np.empty(most, np.int64), np.empty(most, np.int64)
        self.features = {
            column.name: np.empty((most, *column.shape), str(embedder.dtype).partition(".")[2])
            for column in embedder.columns
        }

    def add(
        self, index: Int[Tensor, "n"], labels: Int[Tensor, "n"], found: dict[str, np.ndarray]
    ) -> None:
        """Append a batch."""
        rows = slice(self.num, self.num + len(index))
        self.index[rows], self.label[rows] = index.numpy(), labels.cpu().numpy()
        for name, values in found.items():
            self.features[name][rows] = values
        self.num = rows.stop

    def table(self, split: str, source: Source) -> Table:
        """What was appended."""
        index = self.index[: self.num]
        names = [_encodable(source.name(i)) for i in index.tolist()]
        features = {name: values[: self.num] for name, values in self.features.items()}
        return Table(split, names, index, self.label[: self.num], source.classes, features)


def _bad_images(part: Part, table: Table, source: Source, data: CleanData) -> list[tuple[str, str]]:
    """Name and reason of the images of `part` that are not in its table."""
    read = set(table.index.tolist())
    names = [source.name(i) for i in range(part.start, part.stop) if i not in read]
    return [(_encodable(name), data.bad[name]) for name in names]


def _encodable(name: str) -> str:
    """`name` with what UTF-8 cannot express written as an escape."""
    return name.encode("utf-8", "backslashreplace").decode()
