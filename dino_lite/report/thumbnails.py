"""Pictures of a run's folder, reduced in size and embedded in the page."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from dino_lite.report.markup import Markup, join, tag

BYTES = 3_300_000  # all pictures together: base64 adds a third, and the page stays below 5 MB
_TRIES = ((1800, 86), (1800, 72), (1400, 66), (1000, 60), (700, 50), (400, 40))  # width, quality
_WIDE = 1.15  # aspect ratio above which a picture gets its own line
_LARGEST = 200_000_000  # pixels; larger files were not drawn by dino_lite


class Kind(NamedTuple):
    """What pictures show whose file name starts with `name`."""

    name: str
    title: str
    text: str


_KINDS = (
    Kind("crops", "Crops", "Inputs of student and teacher in the first step, one row per image."),
    Kind("attention", "Attention", "Attention of the class token in the last block."),
    Kind(
        "pca",
        "Patch features as colors",
        "Three principal components of the patch tokens as red, green and blue.",
    ),
    Kind("neighbors", "Nearest neighbors", "Images with the most similar features."),
    Kind("map", "Map of the images", "Features projected to two dimensions."),
    Kind("confusion", "Confusion", "Confusion matrix of the k-NN classifier."),
    Kind("path", "From start to end", "Change on held-out images along the line of weights."),
    Kind("segmentation", "Segmentation", "Predictions of a linear layer on patch tokens."),
)

# In the folder of a sequence.
MATRIX = Kind("matrix", "Accuracy after each stage", "k-NN accuracy on each collection.")


class Picture(NamedTuple):
    """A picture file and its kind."""

    path: Path
    kind: Kind


def find_pictures(folder: Path | None) -> list[Picture]:
    """Every known picture of a folder: crops.png, pca.png, pca_2.png, … in the order of _KINDS."""
    if folder is None:
        return []
    return [
        Picture(path, kind)
        for kind in _KINDS
        for path in sorted(folder.glob(f"{kind.name}*"))
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
        and not path.stem[len(kind.name) :][:1].isalpha()
    ]


def picture_figures(pictures: list[Picture], most: int = BYTES) -> tuple[Markup, list[str]]:
    """A figure for each picture, enlarged by a click, of at most about `most` bytes together; and
    sentences about those that cannot be read.
    """
    figures, unreadable = [], []
    for picture in pictures:
        try:
            source, width, height = data_uri(picture.path, most // len(pictures))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            unreadable.append(f"{picture.path.name} cannot be shown: {error}.")
            continue
        kind, detail = picture.kind, picture.path.stem[len(picture.kind.name) :].strip("_-@ ")
        title = f"{kind.title}: {detail}" if detail else kind.title
        image = tag("img", src=source, alt=f"{title}. {kind.text}", width=width, height=height)
        opens = tag("button", image, type="button", aria_label=f"Enlarge: {title}")
        told = tag("figcaption", tag("h3", title), tag("p", kind.text, class_="note"))
        shape = "picture wide" if width > _WIDE * height else "picture"
        figures.append(tag("figure", told, opens, class_=shape))
    return join(*figures), unreadable


def data_uri(path: Path, most: int) -> tuple[str, int, int]:
    """The picture as a data: URI of at most about `most` bytes before encoding, with width and
    height in pixels.
    """
    with Image.open(path) as opened:
        if opened.width * opened.height > _LARGEST:
            raise ValueError(f"too large, {opened.width}x{opened.height} pixels")
        image = opened.convert("RGB")
    for width, quality in _TRIES:
        small = image
        if image.width > width:
            height = max(1, round(image.height * width / image.width))
            small = image.resize((width, height), Image.Resampling.LANCZOS)
        written = io.BytesIO()
        small.save(written, "WEBP", quality=quality, method=4)
        if written.tell() <= most:
            break
    code = base64.b64encode(written.getvalue()).decode("ascii")
    return f"data:image/webp;base64,{code}", small.width, small.height
