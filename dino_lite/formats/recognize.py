"""Tells which kind of file was given as weights, by its content."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Literal

from dino_lite.contracts import UserError

_HEAD = 512  # bytes
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle in files of torch < 1.6
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_CONVERTED = "give the weights that it was made from, as .safetensors or a state_dict"
_EXPORTED = "it holds a program: save the network's state_dict() instead"
# What a file's first bytes say that it is, and what to do.
_OTHERS: tuple[tuple[re.Pattern[bytes], str, str], ...] = tuple(
    (re.compile(pattern, re.DOTALL | re.IGNORECASE), what, remedy)
    for pattern, what, remedy in (
        (rb"\Z", "is empty", "download or copy it again"),
        (rb"version https://git-lfs", "is a pointer of Git LFS, not the file", "run git lfs pull"),
        (rb"\s*<(!doctype|html|\?xml|head)", "is a web page", "download the file it links to"),
        (rb"\x89HDF\r\n", "is an HDF5 file, as Keras writes", _CONVERTED),
        (rb".{4}TFL3", "is a TensorFlow Lite model", _CONVERTED),
        (rb"GGUF", "is a GGUF file", _CONVERTED),
        (rb"\x93NUMPY", "is a NumPy array", _CONVERTED),
        (rb"\x08.\x12", "is an ONNX graph", _CONVERTED),
        (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|\x28\xb5\x2f\xfd|Rar!", "is compressed", "unpack it"),
        (rb".{257}ustar", "is a tar archive", "unpack it"),
        (rb"\s*[{[]", "is JSON text", "give the file of weights that it describes"),
    )
)


def kind_of(file: Path, asked: str) -> Literal["safetensors", "torch"]:
    """How the weights in `file` are stored. `asked` is the prefix of messages. Raises UserError
    with the cause if it is a file of another kind.
    """
    with open(file, "rb") as stream:
        head = stream.read(_HEAD)
    if head[8:9] == b"{":  # whatever its name
        return "safetensors"
    if head.startswith(b"PK"):
        _check_zip(file, asked)
    for pattern, what, remedy in _OTHERS:
        if pattern.match(head):
            raise UserError(f"{asked} {what}: {remedy}.")
    if file.suffix == ".safetensors":
        if head.startswith((b"PK", b"\x80")):
            raise UserError(
                f"{asked} is named .safetensors, but is a pickle: rename it to .pth if it is meant "
                "to be one."
            )
        return "safetensors"
    if head.startswith((b"PK", _LEGACY)):
        return "torch"
    if _PICKLE.match(head):
        raise UserError(
            f"{asked} is a pickle that torch.save did not write, which is not read without running "
            "code: write its tensors by torch.save or as .safetensors."
        )
    raise UserError(
        f"{asked} cannot be read as weights: it is neither a .safetensors file nor a file of "
        "torch.save, or was cut short."
    )


def _check_zip(file: Path, asked: str) -> None:
    """Raise UserError unless the zip archive is one of torch.save."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{asked} is cut short or damaged ({error}): download or copy it again."
        ) from error
    names = [entry.filename for entry in entries]
    last = {name.rpartition("/")[2] for name in names}
    what = None
    if "constants.pkl" in last or any("/code/" in name for name in names):
        what = f"is a TorchScript archive: {_EXPORTED}"
    elif last & {"archive_format", "serialized_exported_program.json"}:
        what = f"is a program of torch.export: {_EXPORTED}"
    elif "model.weights.h5" in last:
        what = f"is a Keras model: {_CONVERTED}"
    elif names and all(name.endswith(".npy") for name in names):
        what = f"is an archive of NumPy arrays: {_CONVERTED}"
    elif "data.pkl" not in last:
        what = "is a zip archive without weights of torch in it: unpack it"
    elif sum(entry.file_size for entry in entries) > file.stat().st_size:
        what = "is a zip archive that holds more than its size, which torch.save does not write"
        what += ": save it again by torch.save"
    if what is not None:
        raise UserError(f"{asked} {what}.")
