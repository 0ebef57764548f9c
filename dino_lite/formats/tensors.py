"""Reads the tensors of a file and its JSON metadata, without running code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dino_lite.contracts import UserError
from dino_lite.data.plain_json import read_object
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.formats.recognize import kind_of
from dino_lite.formats.torch_files import StandIn, load_inert

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # names of the weights file in a folder
SHARDED = tuple(f"{name}.index.json" for name in WEIGHTS)  # of the index of several such files
_MOST_ENTRIES, _DEEPEST = 2**18, 64  # of nested dictionaries
_MOST_REPEATED = 2**20  # bytes of a tensor that repeats what the file stores once
_OF_TRAINING = ("arch", "args", "version")  # what timm's training says of the model


def read_content(
    path: str | Path, key: str = "backbone.pretrained"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a .safetensors file, a torch file or a folder with one, by dotted name, and
    what timm's training says of the model: "arch", "args", "version".

    `key` is the setting whose value is `path`, for messages. A torch file may contain nested
    dictionaries of tensors, and objects of any class, which are left out: their code is neither
    imported nor run. Raises UserError.
    """
    file = weights_file(path)
    if not file.is_file():
        what = "is not a regular file" if file.exists() else "there is no such file"
        raise UserError(f"{key}={path}: {what}; name a checkpoint or an exported folder.")
    asked = f"{key}={path}"
    return (_read_shards(file, asked), {}) if file.name in SHARDED else read_file(file, asked)


def read_file(file: Path, asked: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As `read_content`, of a file that exists; `asked` is the prefix of messages."""
    classes: dict[str, int] = {}
    try:
        if kind_of(file, asked) == "safetensors":
            return load_file(file), {}
        content, classes = load_inert(file, asked)
    except UserError:
        raise
    except Exception as error:
        if "persistent_load of storage" in str(error):  # of torch before 1.6
            raise UserError(_whole_module(asked, "a torch.nn.Module")) from error
        raise UserError(
            f"{asked} cannot be read as weights: it is cut short or damaged "
            f"({type(error).__name__}); download or copy it again."
        ) from error
    tensors = _flat(content, asked)
    _refuse_objects(tensors, content, classes, asked)
    for name, value in tensors.items():
        _refuse_unstored(name, value, asked)
    top = content if isinstance(content, dict) else {}
    return tensors, {key: top[key] for key in _OF_TRAINING if key in top}


def _read_shards(index: Path, asked: str) -> dict[str, Tensor]:
    """All tensors of the files next to Hugging Face's `index` that it names."""
    told = read_object(index).get("weight_map")
    if not isinstance(told, dict):
        raise UserError(f"{asked}: {index.name} has no weight_map: download it again.")
    tensors: dict[str, Tensor] = {}
    for name in sorted({safe_member(name) for name in told.values()}):
        if not (index.parent / name).is_file():
            raise UserError(
                f"{asked}: {index.name} names {name}, which is not next to it: download all files "
                "of the folder."
            )
        tensors |= read_file(index.parent / name, asked)[0]
    return tensors


def _refuse_objects(
    tensors: dict[str, Tensor], content: Any, classes: dict[str, int], asked: str
) -> None:
    """Raise UserError if the weights are in objects of `classes` (`load_inert`), not in `tensors`,
    which `content` has by name.
    """
    if any(name.startswith("lightly_train.") for name in classes):
        raise UserError(
            f"{asked} is a checkpoint of lightly-train with pickled modules, which are not read "
            "without running code: give exported_models/exported_last.pt of that training."
        )
    modules = {name: number for name, number in classes.items() if number}
    if len(tensors) < sum(modules.values()):
        raise UserError(_whole_module(asked, max(modules, key=lambda name: modules[name])))
    if not tensors and classes:
        raise UserError(
            f"{asked} cannot be read as weights: it has no tensors by name, only objects of "
            f"{', '.join([*classes][:3])}, which are not read without running code; save a "
            "state_dict()."
        )


def _whole_module(asked: str, name: str) -> str:
    return (
        f"{asked} is a pickled module ({name}), which is not read without running code: save its "
        "state_dict() instead."
    )


def _refuse_unstored(name: str, value: Tensor, asked: str) -> None:
    """Raise UserError for a dense tensor whose values are not in the file."""
    if value.layout != torch.strided or value.is_quantized:
        return
    size = value.numel() * value.element_size()
    if value.is_meta or size > max(value.untyped_storage().nbytes(), _MOST_REPEATED):
        raise UserError(
            f"{asked}: the tensor {name} of shape {tuple(value.shape)} is not stored in full: save "
            "the weights again from the network itself."
        )


def weights_file(path: str | Path) -> Path:
    """`path`, or the weights file, or the index of several, in it if it is a folder."""
    file = Path(path).expanduser()
    if not file.is_dir():
        return file
    inside = [file / name for pair in zip(WEIGHTS, SHARDED, strict=True) for name in pair]
    return next((found for found in inside if found.is_file()), inside[0])


def safe_member(name: object) -> str:
    """`name`, which a file gives as that of another file in its folder. Raises UserError if it is
    not the plain name of a weights file.
    """
    if (
        not isinstance(name, str)
        or Path(name).name != name
        or Path(name).suffix not in (".safetensors", ".bin")
        or "\\" in name
        or "\0" in name
    ):
        raise UserError(
            f"an index of weights names {name!r}, which is not a .safetensors or .bin file of its "
            "folder: download the folder again."
        )
    return name


def read_about(file: Path) -> dict[str, Any]:
    """Metadata of `file`: the contents of config.json and of Hugging Face's image processor next to
    it if it has one of the names `WEIGHTS` or `SHARDED`, else of NAME.json next to it. Raises
    UserError if one of them is not a JSON object.
    """
    about: dict[str, Any] = {}
    names = ("preprocessor_config.json", "processor_config.json", "config.json")
    for name in names if file.name in WEIGHTS + SHARDED else (f"{file.stem}.json",):
        if (beside := file.parent / name).is_file():
            content = read_object(beside)
            nested = content.get("image_processor") if name == names[1] else None
            about |= nested if isinstance(nested, dict) else content
    if file.name in WEIGHTS + SHARDED and (own := _exported(file.parent / "export.json")):
        about["preprocessing"] = own
    return about


def _exported(path: Path) -> dict[str, Any] | None:
    """The preprocessing that an export of ours records, which formats of others cannot all say."""
    content = read_object(path) if path.is_file() else {}
    told = content.get("preprocessing")
    if not str(content.get("written_by")).startswith("dino_lite ") or not isinstance(told, dict):
        return None
    own = {key: value for key, value in told.items() if key != "resize"}
    return own if own.keys() == Preprocessing((1, 1))._asdict().keys() else None


def _flat(content: Any, asked: str) -> dict[str, Tensor]:
    """Tensors in nested dictionaries; entries with integer keys (optimizer state) are skipped."""
    found: dict[str, Tensor] = {}
    open_: list[tuple[Any, str, int]] = [(content, "", 0)]
    num = 0
    while open_:
        value, name, depth = open_.pop()
        num += 1
        if num > _MOST_ENTRIES or depth > _DEEPEST:
            raise UserError(
                f"{asked} holds dictionaries nested deeper than {_DEEPEST}, or more than "
                f"{_MOST_ENTRIES:,} values: save a plain state_dict()."
            )
        if isinstance(value, Tensor) and name:
            found[name] = value
        entries = value.content if isinstance(value, StandIn) else value
        if isinstance(entries, dict):
            named = [(key, inner) for key, inner in entries.items() if isinstance(key, str)]
            stem = f"{name}." if depth else ""
            open_ += [(inner, f"{stem}{key}", depth + 1) for key, inner in reversed(named)]
    return found
