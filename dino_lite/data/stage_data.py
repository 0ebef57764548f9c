"""The data of a stage: a collection without its held-out tenth, and images of earlier ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64

from dino_lite.contracts import Source, Splits, UserError
from dino_lite.data.facts import first_readable
from dino_lite.data.mixture import Mixture
from dino_lite.data.sources import digest
from dino_lite.data.subset import Subset, hold_out, spread
from dino_lite.settings.kinds import Count, Must
from dino_lite.wording import count

HELD_OUT = 0.1  # of the labeled images of train, by class
_NUM_COMPARED = 16  # images by which two collections are told apart

Replayed = Annotated[
    float, Must("a number of at least 0 and below 1", lambda share: 0 <= share < 1)
]


class Halves(NamedTuple):
    """Rows of train by which a stage is judged: `held` are classified by their neighbors in `bank`;
    no stage trains on either's labels, nor on the images of `held`.
    """

    bank: Int64[np.ndarray, "n"]
    held: Int64[np.ndarray, "h"]


def open_stage_data(
    data: Splits,
    keep: Mapping[str, Splits] | None = None,
    share: Replayed = 0.0,
    hold_out: bool = True,
    seed: Count = 0,
) -> Splits:
    """`data` for a stage that may replay: train without its held-out tenth (`halves`), and a
    `share` of each epoch's images from the train splits of `keep`, likewise without theirs, as many
    of each.

    Replayed images have no labels. Raises UserError for collections with other channels.
    """
    own = _trained_on(data.train, seed) if hold_out else data.train
    notes = list(data.left_out)
    if num_held := len(data.train) - len(own):
        notes.append(
            f"{num_held:,} of {count(len(data.train), 'image')} are held out, a tenth of each "
            "class, to measure what is gained."
        )
    others = {} if not share or not keep else keep
    check_channels(data, others)
    train = own
    if others:
        num = max(1, round(len(own) * share / (1 - share)))
        left = [
            _trained_on(each.train, seed) if hold_out else each.train for each in others.values()
        ]
        train = Mixture(own, left, num, seed)
        notes.append(
            f"Each epoch replays {count(num, 'image')} of {' and '.join(map(repr, others))} beside "
            f"the {len(own):,} of {data.name}; all get their turn."
        )
    return data._replace(train=train, left_out=tuple(notes))


def own_collection(node: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the collection in a stage's data; of other data, as it is."""
    own: dict[str, Any] = node["data"] if node["_target_"].endswith(".open_stage_data") else node
    return own


def halves(source: Source, seed: int) -> Halves | None:
    """The labeled images of train in two parts, a tenth of each class held out, drawn from `seed`.
    None if there are not two classes, or no class has two images.
    """
    if source.labels is None:
        return None
    labeled = np.flatnonzero(source.labels >= 0)
    labels = torch.from_numpy(np.asarray(source.labels)[labeled].astype(np.int64))
    kept, held = (rows.numpy() for rows in hold_out(labels, HELD_OUT, seed))
    if len(set(labels.tolist())) < 2 or not len(held):
        return None
    return Halves(labeled[kept], labeled[held])


def _trained_on(source: Source, seed: int) -> Source:
    """All images but those held out."""
    parts = halves(source, seed)
    if parts is None:
        return source
    return Subset(source, np.setdiff1d(np.arange(len(source)), parts.held))


def check_collections(mine: Splits, keep: Mapping[str, Splits], key: str = "data.root") -> None:
    """Raise UserError if one of `keep`, by its key in the configuration, holds the images of
    another or of `mine`, which `key` names, or has another number of channels.
    """
    named = {key: mine} | dict(keep)
    for i, (key, one) in enumerate(named.items()):
        for other in list(named)[:i]:
            if same_images(one.train, named[other].train):
                raise UserError(
                    f"{key} and {other} hold the same images ({one.name}): name another "
                    f"collection, or leave out {key}."
                )
    check_channels(mine, keep)


def check_channels(mine: Splits, keep: Mapping[str, Splits]) -> None:
    """Raise UserError unless the images of all collections have as many channels."""
    if not keep:
        return
    wanted = first_readable(mine.train).shape[2]
    for key, each in keep.items():
        if (found := first_readable(each.train).shape[2]) != wanted:
            raise UserError(
                f"{key}: the images of {each.name} have {count(found, 'channel')}, those of "
                f"{mine.name} {wanted}: set channels of both to the same number."
            )


def same_images(one: Source, other: Source) -> bool:
    """Whether two sources hold the same images in the same order, wherever they are: as far as 16
    of them tell. Digests may be of relative names, which other images have as well.
    """
    return len(one) == len(other) and _sample(one) == _sample(other)


def identity(source: Source) -> str:
    """16 hex digits that tell a collection from others, also from those with the same names."""
    return digest([source.digest().encode(), *_sample(source)])


def _sample(source: Source) -> list[bytes]:
    """Shape and pixels of 16 images; nothing of those that cannot be read."""
    found = []
    for index in spread(len(source), _NUM_COMPARED).tolist():
        try:
            image = source.read(index)
            found.append(str(image.shape).encode() + image.tobytes())
        except (OSError, ValueError):
            found.append(b"")
    return found
