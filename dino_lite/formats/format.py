"""Contract of the formats that `dino-lite export` writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, NamedTuple

from dino_lite.backbones.compact import Compact
from dino_lite.backbones.convnet import ConvNet
from dino_lite.contracts import Backbone
from dino_lite.formats.opened import Opened


class Claim(NamedTuple):
    """What a written file can do. Every claim is checked in a fresh process in which dino_lite
    cannot be imported, before the export succeeds.

    `load` and `run` are lines of Python: `load` defines what `run` needs, given `folder` (str);
    `run` computes `cls` "n D" and `patches` "n P E" of `pixels`, normalized float32 "n C H W" as a
    torch tensor, without gradients. `read` defines `pixels` "1 C H W" of the file "image.jpg",
    after `load`; they are compared with the original's. The model card shows the same lines.
    """

    load: str
    run: str
    sizes: tuple[tuple[int, int], ...]  # rows and columns in pixels; first that of the training
    # Whether other sizes may be used too, in steps of the patch size: some are checked as well.
    any_size: bool = False
    tolerance: float = 1e-4  # largest difference, relative to the tokens' root mean square
    title: str = ""  # tells the claims of a format apart: "float16"
    read: str = ""  # "": by torchvision
    packages: tuple[str, ...] = ()  # that the lines need besides the format's


def described(backbone: Backbone) -> str:
    """What a backbone is, for a sentence that refuses it."""
    if isinstance(backbone, Compact):
        return f"a class token reduced by compact={backbone.embed_dim}"
    if isinstance(backbone, ConvNet) and backbone.spec["name"] == "resnet":
        return "the small convolutional network"
    return f"a network of kind {backbone.kind}"


class Format(ABC):
    """A way to write a backbone for other programs; configured by conf/format/NAME.yaml. The folder
    also gets README.md and export.json, so a format writes no files of these names.
    """

    name: ClassVar[str]  # of the folder below export/
    packages: ClassVar[tuple[str, ...]] = ()  # to install for writing or reading it
    library: ClassVar[str] = ""  # what reads it, as the Hub names libraries; "": as the format
    own: ClassVar[bool] = False  # read by dino_lite, so its claims are checked in this process

    @abstractmethod
    def write(self, opened: Opened, folder: Path) -> list[Claim]:
        """Write the backbone of `opened`, in float32 on the CPU, into the empty `folder`.

        Raises UserError if the format cannot hold it, naming formats that can.
        """
