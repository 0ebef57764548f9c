"""A backbone as a graph of torch's operators, without our code: what ONNX and torch.export hold."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dino_lite.backbones.compact import Compact
from dino_lite.contracts import Backbone, UserError
from dino_lite.formats.opened import Opened
from dino_lite.settings.kinds import Must

# Further image sizes: pixels per side of squares, or [rows, columns].
GraphSizes = Annotated[
    Sequence[Any],
    Must(
        "a list of image sizes in pixels, each a whole number or [rows, columns]",
        lambda sizes: all(_is_size(size) for size in sizes),
    ),
]
_STACKS = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn")


def _is_size(size: Any) -> bool:
    sides = size if isinstance(size, Sequence) and len(size) == 2 else [size]
    return all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)


class Graph(nn.Module):
    """Normalized float32 images to the class token and patch tokens, in float32, by a copy of
    `backbone` in eval mode. With `half` the copy has float16 weights, except for a `Compact`'s
    linear map, whose whitening may exceed float16's range.
    """

    def __init__(self, backbone: Backbone, size: tuple[int, int], half: bool) -> None:
        super().__init__()
        network: Any = copy.deepcopy(backbone).float().eval()
        if not network.any_size:
            network.fix_size(*size)
        compact = isinstance(network, Compact)
        self.reduce: nn.Module = network.reduce if compact else nn.Identity()
        self.backbone: Backbone = network.whole if compact else network
        self.dtype = torch.float16 if half else torch.float32
        self.backbone.to(self.dtype)

    def forward(self, images: Float[Tensor, "n C H W"]) -> dict[str, Tensor]:
        """Class token `cls` "n D" and patch tokens `patches` "n P E"."""
        tokens = self.backbone(images.to(self.dtype))
        return {"cls": self.reduce(tokens.cls.float()), "patches": tokens.patches.float()}


class GraphFile(NamedTuple):
    """One file of a graph format."""

    stem: str  # its name without suffix: "model", or with a size other than the training's
    program: ExportedProgram
    sizes: tuple[tuple[int, int], ...]  # rows and columns of images, as in Claim
    any_size: bool


def files(opened: Opened, more: GraphSizes, half: bool = False) -> Iterator[GraphFile]:
    """The graphs of a backbone for images of the size of training and of the sizes `more`: one for
    all sizes if the backbone is exact there, else one a size. Raises UserError if the patch size
    does not divide a size, or if torch.export cannot trace the backbone.
    """
    backbone, first = opened.backbone, opened.preprocessing.size
    patch = backbone.patch_size
    sizes = [first]
    for size in more:
        rows, columns = (size, size) if isinstance(size, int) else size
        if rows % patch or columns % patch:
            raise UserError(
                f"sizes: images of {rows}x{columns} pixels do not divide into patches of {patch}: "
                f"choose multiples of {patch}."
            )
        sizes.append((rows, columns))
    if backbone.any_size and min(first) >= 2 * patch:  # torch.export takes 1 cell for a constant
        yield GraphFile("model", traced(backbone, first, True, half), _once(*sizes), True)
        return
    for rows, columns in _once(*sizes):
        name = f"model_{rows}" if rows == columns else f"model_{rows}x{columns}"
        size = (rows, columns)
        program = traced(backbone, size, False, half)
        yield GraphFile("model" if size == first else name, program, (size,), False)


def _once(*sizes: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    return tuple(dict.fromkeys(sizes))


def traced(
    backbone: Backbone, size: tuple[int, int], free_size: bool, half: bool = False
) -> ExportedProgram:
    """The graph of `backbone` for any number of images of `size`, or also of other sizes if
    `free_size`. Holds no names of our modules and no paths. Raises UserError if torch.export cannot
    trace the backbone.
    """
    graph = Graph(backbone, size, half)
    shapes: dict[int, Any] = {0: Dim("batch", min=1)}
    if free_size:  # DYNAMIC: torch finds the smallest size; it cannot always prove a stated one
        shapes |= {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    images = torch.zeros(2, backbone.in_chans, *size)  # torch.export takes a batch of 1 for fixed
    try:
        with torch.no_grad(), silence():
            found = torch.export.export(
                graph, (images,), dynamic_shapes={"images": shapes}, strict=False
            )
    except Exception as error:  # of many kinds, by what the backbone's code does
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(
            f"torch.export cannot trace the backbone {backbone.kind} ({reason}): export it as "
            "format=[safetensors]."
        ) from error
    found.example_inputs = None  # else they are saved
    for node in found.graph.nodes:
        for stack in _STACKS:
            node.meta.pop(stack, None)
    return found


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep from the user what exporters print, log and warn of; what they raise tells the rest."""
    before, nowhere = logging.root.manager.disable, io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)
