"""Features of a data set, extracted once per backbone and cached."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dino_lite.contracts import Backbone, Source, Splits, UserError
from dino_lite.data.clean import CleanData
from dino_lite.data.labeled import labels_told
from dino_lite.data.subset import Subset
from dino_lite.distributed import all_gather_cat, all_gather_objects, rank, world_size
from dino_lite.eval.features import Pooled, device_of, dtype_of, extract_pooled

_FORMAT = "dino_lite features 2"  # increase the number when the format changes


class FeatureStore:
    """Extracts and caches features for evaluations; `data` is for those that need images.

    Features are kept in memory and, given `folder`, on disk, under a key of everything they depend
    on: weights, images, preprocessing. Each rank extracts its part of the images; all ranks
    get all. `num_blocks`: at least this many are kept, for later evaluations.
    """

    def __init__(self, data: CleanData, folder: Path | None = None, num_blocks: int = 1) -> None:
        self.data, self.folder, self.num_blocks = data, folder, num_blocks
        self._kept: dict[str, Pooled] = {}
        # Keeps the objects alive, so that their ids are not reused.
        self._keys: dict[tuple[int, int], tuple[Backbone, Source, str]] = {}

    def pooled(self, backbone: Backbone, source: Source, num_blocks: int = 1) -> Pooled:
        """Features of every readable image of `source`, a split of `data`, in its order."""
        most = min(max(num_blocks, self.num_blocks), backbone.num_blocks)
        at = (id(backbone), id(source))
        if at not in self._keys:
            self._keys[at] = (backbone, source, content_key(backbone, self.data, source))
        key = self._keys[at][2]
        if key in self._kept and self._kept[key].cls.shape[1] >= most:
            return self._kept[key]
        found = self._read(key, most)
        if found is None:
            found = self._extract(backbone, source, most)
            if rank() == 0:
                self._write(key, found, source)
        self._kept[key] = found
        return found

    def labeled(
        self, backbone: Backbone, what: str, num_blocks: int = 1
    ) -> tuple[Pooled, Pooled | None]:
        """Features of train and, if labeled, of test; `what` names the evaluation in messages."""
        train, test = self.data.splits.train, self.data.splits.test
        demand_labels(self.data.splits, what)
        bank = self.pooled(backbone, train, num_blocks)
        if test is None or test.labels is None:
            return bank, None
        return bank, self.pooled(backbone, test, num_blocks)

    def _extract(self, backbone: Backbone, source: Source, num_blocks: int) -> Pooled:
        """Each rank extracts one of equal contiguous parts."""
        bounds = [len(source) * r // world_size() for r in (rank(), rank() + 1)]
        rows = torch.arange(*bounds)
        part = source if world_size() == 1 else Subset(source, rows.numpy())
        device = device_of(backbone)
        own = extract_pooled(backbone, self.data, part, device, num_blocks, "features")
        shapes = [shape for shape in all_gather_objects(_shapes(own)) if shape[0][-1]]
        if not shapes:
            raise UserError("The evaluation found no image it could read; check data.root.")
        if not len(own.labels):  # widths from another rank
            cls, patches = (torch.zeros(0, *shape) for shape in shapes[0])
            own = own._replace(cls=cls, patches=patches)
        own = own._replace(index=rows[own.index])
        for bad in all_gather_objects(dict(self.data.bad)):
            self.data.bad.update(bad)
        return Pooled(*(all_gather_cat(part.to(device)).cpu() for part in own))

    def _path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{key}.safetensors"

    def _read(self, key: str, num_blocks: int) -> Pooled | None:
        """Features from disk, if they have enough blocks; None on all ranks unless every rank has
        them.
        """
        path, found = self._path(key), None
        if path is not None and path.is_file():
            try:
                with safe_open(path, "pt") as file:
                    found = Pooled(*(file.get_tensor(name) for name in Pooled._fields))
                    bad = json.loads(file.metadata()["bad"])
            except (OSError, SafetensorError, KeyError, ValueError):
                found = None  # truncated or foreign file: extract again
        if found is not None and found.cls.shape[1] < num_blocks:
            found = None
        if not all(all_gather_objects(found is not None)):
            return None
        self.data.bad.update(bad)
        return found

    def _write(self, key: str, pooled: Pooled, source: Source) -> None:
        """Write atomically; failures, such as a full disk, only lose the cache."""
        path = self._path(key)
        if path is None:
            return
        names = {source.name(i) for i in set(range(len(source))) - set(pooled.index.tolist())}
        bad = {name: why for name, why in self.data.bad.items() if name in names}
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {name: value.contiguous() for name, value in pooled._asdict().items()}
            save_file(tensors, part, metadata={"format": _FORMAT, "bad": json.dumps(bad)})
            os.replace(part, path)
        except (OSError, SafetensorError):
            with suppress(OSError):
                part.unlink()


def demand_labels(splits: Splits, what: str) -> Int[np.ndarray, "N"]:
    """The labels of the training images. Raises UserError, naming `what` and the reason, if there
    are none.
    """
    if splits.train.labels is None:
        raise UserError(
            f"{what} needs labels, and the training images have none ({labels_told(splits)}); give "
            "them by folders, one per class, or by data.labels=FILE.csv."
        )
    return splits.train.labels


def content_key(backbone: Backbone, data: CleanData, source: Source) -> str:
    """32 hex digits over everything that features depend on, except the number of blocks."""
    total = blake2b(digest_size=16)
    about: list[Any] = [
        *(_FORMAT, backbone.stored_spec(), str(dtype_of(backbone)), data.preprocessing.pixels),
        *(data.normalize.mean.tolist(), data.normalize.std.tolist()),
        *(len(source), source.digest(), source.name(0), source.name(len(source) - 1)),
    ]
    if source.pixels is not None and any(source.pixels[1:]):  # channels are those of normalize
        about.append([*source.pixels[1:]])
    if data.preprocessing.geometry:  # of other programs
        about.append([*data.preprocessing.geometry])
    total.update(json.dumps(about).encode())
    total.update(b"" if source.labels is None else source.labels.tobytes())
    total.update(file_stamps(source))
    add_weights(total, backbone)
    return total.hexdigest()


def add_weights(total: blake2b, backbone: Backbone) -> None:
    """Update the hash `total` with the names and values of a backbone's weights."""
    for name, value in backbone.state_dict().items():
        total.update(name.encode() + _bytes(value))


def file_stamps(source: Source) -> bytes:
    """A digest of sizes and modification times of local files, which tell of changed content."""
    total = blake2b(digest_size=16)
    for path in source.data_files():
        try:
            seen = os.stat(path)
            total.update(f"{seen.st_size} {seen.st_mtime_ns}".encode())
        except (OSError, ValueError):
            total.update(b"-")  # a URL, or missing
    return total.digest()


def _bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous()
    return plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def _shapes(pooled: Pooled) -> list[tuple[int, ...]]:
    return [tuple(pooled.cls.shape[1:]), tuple(pooled.patches.shape[1:])]
