"""Writes a backbone as ONNX, by torch's exporter."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.export import ExportedProgram

from dino_lite.contracts import UserError
from dino_lite.formats.format import Claim, Format
from dino_lite.formats.graph import GraphSizes, files, silence
from dino_lite.formats.opened import Opened
from dino_lite.settings.validate import checked

OPSET = 20  # read by onnxruntime from 1.17 on
_MOST_BYTES = 2**31 - 2**24  # of weights in one file, whose limit is 2 GiB, graph included
_HALF_TOLERANCE = 2e-2


class Onnx(Format):
    """`model.onnx` for images of the size of training, in any number: `images` "n C H W" to `cls`
    "n D" and `patches` "n P E", all float32. Other `sizes` are in files of their own
    (`model_448.onnx`), unless the network is exact at all sizes.

    With `half` there is also `model_fp16.onnx`, whose weights and arithmetic are float16. Weights
    of 2 GB and more are in a second file, `model.onnx.data`.
    """

    name: ClassVar[str] = "onnx"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")

    @checked
    def __init__(self, half: bool = False, sizes: GraphSizes = ()) -> None:
        self.half, self.sizes = half, sizes

    def write(self, opened: Opened, folder: Path) -> list[Claim]:
        """Write all files, each checked by onnx.checker."""
        claims = []
        for half in (False, True) if self.half else (False,):
            for stem, program, sizes, any_size in files(opened, self.sizes, half):
                file = f"{stem}{'_fp16' * half}.onnx"
                _write(program, any_size, folder / file)
                load = (
                    "import onnxruntime\n"
                    f'session = onnxruntime.InferenceSession(folder + "/{file}", '
                    'providers=["CPUExecutionProvider"])'
                )
                run = 'cls, patches = session.run(["cls", "patches"], {"images": pixels.numpy()})'
                more: dict[str, Any] = {"tolerance": _HALF_TOLERANCE} if half else {}
                claims.append(Claim(load, run, sizes, any_size, title=file, **more))
        return claims


def _write(program: ExportedProgram, any_size: bool, path: Path) -> None:
    """Raises UserError if an operator of the graph has no counterpart in ONNX."""
    import onnx

    names = {0: "batch"} | ({2: "height", 3: "width"} if any_size else {})
    try:
        with silence():
            made: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["cls", "patches"],
                dynamic_shapes={"images": names},
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(
            f"the backbone has no form in ONNX ({reason}): choose format=[torch_export] or "
            "[safetensors]."
        ) from error
    for node in made.model.graph:  # how torch's code came to it, with paths of files
        node.metadata_props.clear()
    weights = [*program.state_dict.values(), *program.constants.values()]
    num_bytes = sum(each.nbytes for each in weights if isinstance(each, torch.Tensor))
    made.save(path, external_data=num_bytes > _MOST_BYTES)
    onnx.checker.check_model(str(path), full_check=True)
