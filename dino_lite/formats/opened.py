"""A loaded backbone and its metadata."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, NamedTuple

from dino_lite.contracts import Backbone, UserError
from dino_lite.data.preprocessing import Preprocessing


class Fit(NamedTuple):
    """How a file's weights were loaded into a backbone."""

    layout: str  # whose names the file has
    why: str  # how that was told, one clause
    num_weights: int
    unused: list[str]  # the file's names
    adapted: list[str]  # our names of weights whose values had to be adapted
    said: tuple[str, ...] = ()  # one clause on each conversion, and on what starts fresh

    def notes(self, spec: dict[str, Any] | None = None) -> tuple[str, ...]:
        """One clause each on what matched, the `spec`, and what was unused, adapted or fresh."""
        notes = [f"all {self.num_weights} weights loaded, from {self.layout}'s layout ({self.why})"]
        if spec:
            notes.append("built as " + ", ".join(f"{key}={value}" for key, value in spec.items()))
        if self.unused:
            notes.append(f"left unused: {_summary(self.unused, 2)}")
        if self.adapted:
            notes.append(f"adapted: {_summary(self.adapted, 4)}")
        return (*notes, *self.said)


class Opened(NamedTuple):
    """A backbone in eval mode on the CPU, with its metadata.

    `preprocessing` is how it expects images. `card` is plain JSON about its training. `data` is the
    data configuration of its run, `fit` how foreign weights matched; None if not applicable.
    """

    backbone: Backbone
    preprocessing: Preprocessing
    card: dict[str, Any]
    data: dict[str, Any] | None = None
    fit: Fit | None = None
    said: tuple[str, ...] = ()  # on the preprocessing, if another program's; one clause each
    sized: bool = False  # whether all images of its data have exactly the preprocessing's size

    def at(self, image_size: int | str) -> Preprocessing:
        """Preprocessing for another `image_size`, pixels per side; "auto": as it is. Raises
        UserError if that is not a multiple of the patch size.
        """
        if image_size == "auto":
            return self.preprocessing
        patch = self.backbone.patch_size
        if not isinstance(image_size, int) or image_size < 1 or image_size % patch:
            raise UserError(
                f"image_size={image_size}: must be a multiple of the backbone's patch size, "
                f"{patch}."
            )
        return self.preprocessing.at(image_size)

    @property
    def for_others(self) -> Preprocessing:
        """The preprocessing as programs can be told it that know no exception for images of its
        size: if all of the data are, without a crop, which leaves them as they are.
        """
        how = self.preprocessing
        return how._replace(crop=1.0) if self.sized and how.rule == "dino_lite" else how

    @property
    def image_size(self) -> int:
        """Pixels per side."""
        return self.preprocessing.size[0]

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, of pixels in [0, 1]."""
        return self.preprocessing.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel, of pixels in [0, 1]."""
        return self.preprocessing.std

    @property
    def notes(self) -> tuple[str, ...]:
        """How foreign weights matched, and how images are prepared for them, one clause each."""
        fit = () if self.fit is None else self.fit.notes(self.backbone.stored_spec())
        return fit + self.said


def _summary(names: list[str], num_parts: int) -> str:
    """Counts of names, grouped by their first `num_parts` parts with * for block numbers."""
    split = [re.sub(r"\.\d+(?=\.)", ".*", name).split(".") for name in names]
    short = Counter(".".join(parts[:-1][:num_parts]) or parts[0] for parts in split)
    kinds = sorted(short.items(), key=lambda kind: -kind[1])
    shown = ", ".join(f"{kind} ({num})" if num > 1 else kind for kind, num in kinds[:4])
    rest = sum(num for _, num in kinds[4:])
    return f"{shown} and {rest} more" if rest else shown
