"""Writes a backbone as model.pt2, which torch.export loads without our code."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch

from dino_lite.formats.format import Claim, Format
from dino_lite.formats.graph import GraphSizes, files, silence
from dino_lite.formats.opened import Opened
from dino_lite.settings.validate import checked


class TorchExport(Format):
    """`model.pt2` for images of the size of training, in any number; its output is a dict of `cls`
    "n D" and `patches` "n P E". Other `sizes` are in files of their own (`model_448.pt2`), unless
    the network is exact at all sizes.
    """

    name: ClassVar[str] = "torch_export"

    @checked
    def __init__(self, sizes: GraphSizes = ()) -> None:
        self.sizes = sizes

    def write(self, opened: Opened, folder: Path) -> list[Claim]:
        """Write all files; needs nothing but torch."""
        claims = []
        for stem, program, sizes, any_size in files(opened, self.sizes):
            with silence():
                torch.export.save(program, folder / f"{stem}.pt2")
            load = f'import torch\nmodel = torch.export.load(folder + "/{stem}.pt2").module()'
            run = 'tokens = model(pixels)\ncls, patches = tokens["cls"], tokens["patches"]'
            claims.append(Claim(load, run, sizes, any_size, title=f"{stem}.pt2"))
        return claims
