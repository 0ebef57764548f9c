"""Python that prepares an image as a preprocessing says, with Pillow and torchvision alone."""

from __future__ import annotations

from typing import Any

from dino_lite.data.preprocessing import Preprocessing
from dino_lite.formats.format import Claim


def file_of(channels: int) -> str:
    """The file that the lines read: an image, or with other channels than gray and RGB an array."""
    return "image.jpg" if channels in (1, 3) else "image.npy"


def reading(claim: Claim, how: Preprocessing) -> list[str]:
    """Lines that define `pixels` of an image file for `claim`, given what its `load` defines: its
    own, else those of torchvision for images of its first size.
    """
    return claim.read.splitlines() or _torchvision(how.at(claim.sizes[0]))


def _torchvision(how: Preprocessing) -> list[str]:
    rows, columns = how.size
    channels = len(how.mean)
    normalize = f"transforms.Normalize({[*how.mean]}, {[*how.std]})"
    if channels not in (1, 3):
        return [
            "import numpy as np",
            "from torchvision import transforms",
            "",
            f'image = np.load("{file_of(channels)}")  # uint8, ({rows}, {columns}, {channels})',
            "pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255",
            f"pixels = {normalize}(pixels)",
        ]
    mode = "RGB" if channels == 3 else "L"
    lines = [*_resizing(how), *_cropping(how, mode)]
    if how.rule == "dino_lite":
        lines = [f"if image.size != ({columns}, {rows}):", *(f"    {line}" for line in lines)]
    return [
        "from PIL import Image",
        "from torchvision import transforms",
        "",
        f'image = Image.open("{file_of(channels)}").convert("{mode}")',
        *lines,
        f"pixels = {normalize}(transforms.ToTensor()(image)[None])",
    ]


def _resizing(how: Preprocessing) -> list[str]:
    """Lines that do what `Preprocessing.resized` says."""
    kind, target = how.interpolation.upper(), _target(how)
    if isinstance(target, int) or how.squash:
        wanted = target if isinstance(target, int) else tuple(target)
        return [f"image = transforms.Resize({wanted}, transforms.InterpolationMode.{kind})(image)"]
    rows, columns = target
    least = "max" if how.border else "min"
    return [
        f"ratio = {least}(image.height / {rows}, image.width / {columns})",
        "size = (round(image.width / ratio), round(image.height / ratio))",
        f"image = image.resize(size, Image.Resampling.{kind})",
    ]


def _cropping(how: Preprocessing, mode: str) -> list[str]:
    """Lines that do what `Preprocessing.corner` says."""
    rows, columns = how.size
    if how.border:
        color = [round(255 * value) for value in how.mean]
        fill = tuple(color) if mode == "RGB" else color[0]
        return [
            f'whole = Image.new("{mode}", ({columns}, {rows}), {fill})',
            f"whole.paste(image, (({columns} - image.width) // 2, ({rows} - image.height) // 2))",
            "image = whole",
        ]
    if how.rule == "hugging_face":
        return [
            f"left, top = (image.width - {columns}) // 2, (image.height - {rows}) // 2",
            f"image = image.crop((left, top, left + {columns}, top + {rows}))",
        ]
    return [f"image = transforms.CenterCrop(({rows}, {columns}))(image)"]


def told_preprocessing(how: Preprocessing) -> dict[str, Any]:
    """Plain JSON of a preprocessing. "resize" is to how many pixels: the shorter side, else rows
    and columns, which with `border` hold the whole image, and without `squash` are filled by it.
    """
    told = {key: list(v) if isinstance(v, tuple) else v for key, v in how._asdict().items()}
    return {"size": told.pop("size"), "resize": _target(how)} | told


def read_told(told: dict[str, Any]) -> Preprocessing:
    """The preprocessing that `told_preprocessing` told. Raises TypeError for others."""
    return Preprocessing.read({key: value for key, value in told.items() if key != "resize"})


def _target(how: Preprocessing) -> int | list[int]:
    rows, columns = how._replace(squash=True).resized(*how.size)
    one_side = rows == columns or how.rule == "hugging_face"
    return min(rows, columns) if one_side and not (how.squash or how.border) else [rows, columns]
