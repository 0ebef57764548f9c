"""Files of others: none runs code, takes memory or time before it fits, or ends in a traceback."""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import os
import pickle
import sys
import time
import types
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

import dino_lite
import tiny
from dino_lite.backbones.convnet import ConvNet
from dino_lite.backbones.spec import build_backbone, empty_backbone
from dino_lite.backbones.vit import ViT
from dino_lite.commands.evaluate import run_evaluate
from dino_lite.config import compose
from dino_lite.contracts import Backbone, UserError
from dino_lite.data.plain_json import read_object
from dino_lite.formats.tensors import read_content, safe_member
from dino_lite.formats.weights import load_pretrained, open_timm, open_weights
from dino_lite.runs.begin import begin_config
from dino_lite.runs.checkpoint import find_checkpoint, open_backbone, read_checkpoint
from dino_lite.runs.run import Run
from test_bad_input import listing

SPEC: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "embed_dim": 8,
    "depth": 1,
    "num_heads": 2,
}
HUGE = 10**9


def vit() -> ViT:
    """The network of every file here."""
    return ViT(**SPEC).eval()


WEIGHTS: dict[str, Tensor] = vit().state_dict()


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def made(folder: Path) -> Iterator[Call]:
    """Objects whose unpickling would leave a file in `folder`."""
    yield Call(os.system, f"touch {folder / 'canary'}")
    yield Call(eval, f"open({str(folder / 'canary')!r}, 'w')")
    yield Call(Path.touch, folder / "canary")
    yield Call(os.mkdir, str(folder / "canary"))
    yield Call(np.savetxt, str(folder / "canary"), [1.0])  # a function of a harmless package


def refused(action: Callable[[], object], folder: Path, words: str = "") -> str:
    """The one sentence with which `action` is refused; nothing in `folder` may change."""
    before = listing(folder)
    with pytest.raises(UserError, match=words or None) as caught:
        action()
    assert listing(folder) == before
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def exported(folder: Path, backbone: Backbone | None = None, **changes: Any) -> Path:
    """An export, with other values in its config.json."""
    backbone = backbone or vit()
    tiny.exported(backbone, folder, 16)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# --------------------------------------------------------------------------------- objects


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_no_reader_runs_what_a_pickle_calls(which: int, form: str, tmp_path: Path) -> None:
    """Each reader of weights, beside weights that are good; a run's checkpoint as well."""
    call = [*made(tmp_path)][which]
    content = {"state_dict": WEIGHTS, "global_step": 1, "other": [call], "args": call}
    run = Run(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    files = [tmp_path / "a.pth", tmp_path / "pytorch_model.bin", tmp_path / "w.safetensors"]
    for file in [*files, run.last]:
        if form == "pickle":
            file.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    before = listing(tmp_path)
    for file in [*files, tmp_path]:
        for read in (
            lambda file=file: open_weights(file),
            lambda file=file: load_pretrained(vit(), file),
            lambda file=file: open_backbone(find_checkpoint(str(file), tmp_path)),
            lambda file=file: dino_lite.load_backbone(file),
        ):
            # The last calls no program: it may be left out.
            with pytest.raises(UserError) if which < 4 else suppress(UserError):
                read()
    refused(lambda: read_checkpoint(run.last), tmp_path)
    assert listing(tmp_path) == before


def archive(content: bytes, file: Path) -> Path:
    """A file as torch.save writes it, with the pickle `content` behind its protocol."""
    with zipfile.ZipFile(file, "w") as inside:
        inside.writestr("a/data.pkl", b"\x80\x02" + content)
        inside.writestr("a/version", "3")
    return file


def call_of(name: str, arguments: bytes, how: bytes = b"R") -> bytes:
    """Opcodes of a dictionary with the result of calling the dotted `name`."""
    module, _, name = name.rpartition(".")
    return b"}K\0c%b\n%b\n%b%bs." % (module.encode(), name.encode(), arguments, how)


_FORTY_BILLION = b"\x8a\x05\0\x90\x2f\x50\x09\x85"  # a tuple of one number
_TWICE = b"h\0h\0\x86q\0"  # a tuple of the last one twice
BOMBS: dict[str, tuple[bytes, str]] = {
    **{
        f"{name} {how!r}": (call_of(name, _FORTY_BILLION, how), f"would call {name} when")
        for name in ("builtins.bytearray", "torch.FloatTensor", "torch.storage.UntypedStorage")
        for how in (b"R", b"\x81")
    },
    "a call in a call": (
        call_of(
            "torch._tensor._rebuild_from_type_v2",
            b"(cbuiltins\nbytearray\nctorch\nTensor\n" + _FORTY_BILLION + b"}t",
        ),
        r"would call builtins\.bytearray",
    ),
    "a slow encoding": (
        call_of("_codecs.encode", b"X\1\0\0\0aX\x08\0\0\0punycode\x86"),
        r"would call _codecs\.encode",
    ),
    "a key of 2^64 parts": (b"})q\0" + _TWICE * 64 + b"Ns.", "tuples inside tuples"),
    "a deep key": (b"})" + b"\x85" * 500_000 + b"Ns.", "tuples inside tuples"),
    "a text beyond the file": (b"}X\xff\xff\xff\xffabc", "cut short or damaged"),
    "a number beyond the file": (b"}\x8b\xff\xff\xff\x7fabc", "cut short or damaged"),
    "a number of a million digits": (b"}K\0L" + b"9" * 10**6 + b"L\ns.", "cut short or damaged"),
    "what was never stored": (b"}h\x99.", "cut short or damaged"),
    "an empty stack": (b"\x86.", "cut short or damaged"),
    "no mark": (b"NNt.", "cut short or damaged"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_pickle_takes_no_memory_or_time_beyond_its_size(kind: str, tmp_path: Path) -> None:
    """What would is told by its opcodes; nothing is called."""
    content, words = BOMBS[kind]
    file = archive(content, tmp_path / "a.pth")
    refused(lambda: read_content(file), tmp_path, words)


def test_a_lack_of_memory_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not damage."""
    torch.save(WEIGHTS, tmp_path / "a.pth")
    monkeypatch.setattr(torch, "load", lambda *_, **__: bytearray(2**62))
    refused(lambda: read_content(tmp_path / "a.pth"), tmp_path, "asks for more memory than there")


def test_what_weights_are_pickled_with_is_read(tmp_path: Path) -> None:
    """Parameters, tensors with attributes, bytes, and tuples that are stored once."""
    odd: Any = torch.ones(2)
    odd.note = "x"
    pair = (0.9, 0.99)
    content = {"p": nn.Parameter(torch.ones(3)), "odd": odd, "b": b"abc", "a": bytearray(b"abc")}
    content["groups"] = [{"betas": pair, pair: torch.Size([2, 3])} for _ in range(300)]
    for zipped in (True, False):
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        assert read_content(tmp_path / "a.pth")[0].keys() == {"p", "odd"}


def test_control_characters_of_a_file_are_not_printed(tmp_path: Path) -> None:
    """Names of tensors and of classes may hold anything: in messages they are escaped."""
    name = "a\nb\x1b[31m\u202ec"
    torch.save(WEIGHTS | {f"blocks.0.{name}": torch.ones(1)}, tmp_path / "a.pth")
    told = refused(lambda: load_pretrained(vit(), tmp_path / "a.pth"), tmp_path, "1 unknown")
    assert r"a\nb\x1b[31m\u202ec" in told
    torch.save({name: torch.ones(1)}, tmp_path / "b.pth")
    assert told.isprintable()
    assert refused(lambda: open_weights(tmp_path / "b.pth"), tmp_path).isprintable()
    archive(b"cos.\x1b[31m\nsystem\n.", tmp_path / "c.pth")
    assert refused(lambda: open_weights(tmp_path / "c.pth"), tmp_path).isprintable()
    torch.save(WEIGHTS | {f"head.{name}": torch.ones(1)}, tmp_path / "d.pth")
    notes = open_weights(tmp_path / "d.pth", num_heads=2).notes
    assert "left unused" in "".join(notes)
    assert all(note.isprintable() for note in notes)


def test_programs_in_a_pickle_are_named(tmp_path: Path) -> None:
    """Whoever has such a file should know."""
    torch.save(WEIGHTS | {"x": Call(os.system, "true")}, tmp_path / "a.pth")
    refused(lambda: read_content(tmp_path / "a.pth"), tmp_path, r"would call posix\.system")


class Settings(dict[str, Any]):
    """A dictionary with attributes, as many programs' configurations."""

    extra = 1


class Method(nn.Module):
    """A module that somebody pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


OBJECTS: dict[str, Any] = {
    "a namespace": argparse.Namespace(lr=0.1, out=Path("x")),
    "omegaconf": OmegaConf.create({"a": {"b": [1, "c"]}}),
    "numpy": {"array": np.ones(3), "scalar": np.float64(3), "state": np.random.default_rng(0)},
    "paths and dates": [Path("x"), datetime.datetime(2020, 1, 1), datetime.timedelta(1)],
    "collections": [collections.OrderedDict(a=1), collections.deque([1]), frozenset([1])],
    "dictionaries of a class": Settings(a=1) | {"b": collections.defaultdict(list, c=[1])},
    "types": [torch.float16, torch.device("cpu"), nn.Module, slice(1), range(3), 1j, b"x"],
    "a module among settings": Method(),
    "an exception": ValueError("x"),
}


@pytest.mark.parametrize("kind", OBJECTS)
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_beside_objects_of_other_programs_are_read(
    kind: str, zipped: bool, tmp_path: Path
) -> None:
    """The objects are left out: the code of none is imported."""
    if kind in ("a module among settings", "types") and not zipped:
        pytest.skip("torch stored the sources of modules then")
    content = {"state_dict": WEIGHTS, "hyper_parameters": {"x": OBJECTS[kind]}}
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    backbone = open_weights(tmp_path / "a.ckpt", num_heads=2).backbone
    assert torch.equal(backbone.pos_embed, WEIGHTS["pos_embed"])


def test_tensors_in_a_dictionary_of_a_class_are_read(tmp_path: Path) -> None:
    """As in those of plain dictionaries."""
    torch.save({"model": Settings(WEIGHTS)}, tmp_path / "a.pth")
    assert read_content(tmp_path / "a.pth")[0].keys() == {f"model.{name}" for name in WEIGHTS}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("form", ["alone", "in a dictionary"])
def test_a_pickled_module_is_a_sentence(form: str, zipped: bool, tmp_path: Path) -> None:
    """With the remedy."""
    content = Method() if form == "alone" else {"epoch": torch.tensor(3), "model": Method()}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    words = r"is a pickled module .*save its state_dict\(\)"
    refused(lambda: open_weights(tmp_path / "a.pt"), tmp_path, words)


def test_a_checkpoint_of_lightly_train_points_to_its_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last.ckpt holds modules."""
    monkeypatch.setattr(Method, "__module__", "lightly_train._checkpoint")
    for name in ("lightly_train", "lightly_train._checkpoint"):
        module = types.ModuleType(name)
        module.Method = Method  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    torch.save({"state_dict": WEIGHTS, "models": Method()}, tmp_path / "last.ckpt")
    words = r"give exported_models/exported_last\.pt"
    refused(lambda: open_weights(tmp_path / "last.ckpt"), tmp_path, words)


# ------------------------------------------------------------------------------ other files


def zipped(*names: str) -> Callable[[Path], Any]:
    """A zip archive of small files."""

    def write(file: Path) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            for name in names:
                archive.writestr(name, b"x")

    return write


def graph(file: Path) -> None:
    """An ONNX graph of one node."""
    value = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "xy"]
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", value[:1], value[1:]))
    model.producer_name = "pytorch"
    onnx.save(model, file)


def compressed(file: Path) -> None:
    """A checkpoint whose entries inflate to more than the file."""
    torch.save({"cls_token": torch.zeros(2**18)}, file.with_suffix(".part"))
    with zipfile.ZipFile(file.with_suffix(".part")) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED)
    file.with_suffix(".part").unlink()


LAYER = nn.Linear(1, 1)
OTHER_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "ONNX": (graph, "is an ONNX graph"),
    "TorchScript": (lambda f: torch.jit.save(torch.jit.trace(LAYER, torch.ones(1)), f), "TorchScr"),
    "torch.export": (lambda f: zipped("a/archive_format", "a/models/m")(f), r"torch\.export"),
    "Keras 2": (lambda f: f.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "HDF5"),
    "Keras 3": (zipped("model.weights.h5", "config.json"), "Keras"),
    "TF Lite": (lambda f: f.write_bytes(b"\x1c\0\0\0TFL3" + bytes(99)), "TensorFlow Lite"),
    "GGUF": (lambda f: f.write_bytes(b"GGUF" + bytes(99)), "GGUF"),
    "npz": (zipped("a.npy", "b.npy"), "NumPy arrays"),
    "npy": (lambda f: f.write_bytes(b"\x93NUMPY\x01\0" + bytes(99)), "NumPy array"),
    "zip": (zipped("cat.jpg"), "zip archive without weights"),
    "gzip": (lambda f: f.write_bytes(b"\x1f\x8b\x08" + bytes(99)), "is compressed: unpack it"),
    "web page": (lambda f: f.write_text("\n<!DOCTYPE html><html>404"), "is a web page"),
    "Git LFS": (lambda f: f.write_text("version https://git-lfs.github.com/spec/v1"), "git lfs"),
    "JSON": (lambda f: f.write_text('{"weight_map": {}}'), "JSON text"),
    "empty": (lambda f: f.touch(), "is empty"),
    "noise": (lambda f: f.write_bytes(b"\xff" * 99), "neither a .safetensors file nor a file of"),
    "plain pickle": (lambda f: f.write_bytes(pickle.dumps({"a": 1})), "torch.save did not write"),
    "protocol 4": (lambda f: torch.save(WEIGHTS, f, pickle_protocol=4), "pickle protocol 4"),
    "inflated": (compressed, "holds more than its size"),
    "a folder": (lambda f: f.mkdir(), "there is no such file"),
    "a pipe": (os.mkfifo, "is not a regular file"),
    "a device": (lambda f: f.symlink_to("/dev/zero"), "is not a regular file"),
    "a loop of links": (lambda f: f.symlink_to(f), "there is no such file"),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_file_of_another_kind_is_called_what_it_is(kind: str, tmp_path: Path) -> None:
    """By its content, and as each setting reads it; only what is damaged is said to be."""
    write, words = OTHER_FILES[kind]
    file = tmp_path / "weights.pth"
    write(file)
    assert "damaged" not in refused(lambda: open_weights(file), tmp_path, words)
    assert "damaged" not in refused(lambda: load_pretrained(vit(), file), tmp_path, words)
    refused(lambda: open_backbone(find_checkpoint(str(file), tmp_path)), tmp_path)
    refused(lambda: dino_lite.load_backbone(file), tmp_path)


def test_a_pickle_named_safetensors_is_refused_and_the_reverse_read(tmp_path: Path) -> None:
    """Whoever asks for safetensors does not get a pickle."""
    torch.save(WEIGHTS, tmp_path / "a.safetensors")
    save_file(WEIGHTS, tmp_path / "a.pth")
    words = r"is named \.safetensors, but is a pickle"
    refused(lambda: read_content(tmp_path / "a.safetensors"), tmp_path, words)
    assert read_content(tmp_path / "a.pth")[0].keys() == WEIGHTS.keys()


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_a_file_cut_at_any_byte_is_a_sentence(form: str, tmp_path: Path) -> None:
    """Every length of a small file, and none hangs."""
    tensors = {"cls_token": torch.ones(1, 1, 2), "norm.weight": torch.ones(2)}
    file = tmp_path / ("a.safetensors" if form == "safetensors" else "a.pth")
    if form == "safetensors":
        file.write_bytes(save(tensors))
    else:
        torch.save(tensors, file, _use_new_zipfile_serialization=form == "zip")
    whole = file.read_bytes()
    for size in range(0, len(whole), 1 if form == "safetensors" else 17):
        file.write_bytes(whole[:size])
        refused(lambda: read_content(file), tmp_path)
    file.write_bytes(whole)
    assert read_content(file)[0].keys() == tensors.keys()


# ------------------------------------------------------------------------------------ tensors


def nested(file: Path, depth: int = 10_000) -> None:
    """Write dictionaries in one another, deeper than torch.save can."""
    content = b"\x80\x02" + b"}X\x01\0\0\0a" * depth + b"}" + b"s" * depth + b"."
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/version", "3")


def doubled(depth: int) -> dict[str, Any]:
    """A dictionary of 2^depth paths."""
    content: dict[str, Any] = {"w": torch.ones(1)}
    for _ in range(depth):
        content = {"a": content, "b": content}
    return content


def itself() -> dict[str, Any]:
    """A dictionary that holds itself."""
    content: dict[str, Any] = {"w": torch.ones(1)}
    content["a"] = content
    return content


def with_(name: str, value: Tensor) -> dict[str, Tensor]:
    """Good weights but for one."""
    return WEIGHTS | {name: value}


BAD_TENSORS: dict[str, tuple[Callable[[], Any], str]] = {
    "NaN": (lambda: with_("norm.bias", torch.full((8,), float("nan"))), r"norm\.bias has values"),
    "inf": (lambda: with_("cls_token", torch.full((1, 1, 8), float("-inf"))), "cls_token has val"),
    "half NaN": (lambda: with_("norm.bias", torch.full((8,), float("nan")).half()), "not finite"),
    "integers": (
        lambda: with_("blocks.0.mlp.fc1.weight", torch.ones(32, 8, dtype=torch.int8)),
        r"blocks\.0\.mlp\.fc1\.weight is quantized",
    ),
    "complex": (
        lambda: with_("norm.weight", torch.full((8,), complex("nan"))),
        r"norm\.weight has the type complex64: give",
    ),
    "whole numbers": (
        lambda: with_("norm.weight", torch.ones(8, dtype=torch.int64)),
        r"norm\.weight has the type int64",
    ),
    "truth values": (
        lambda: with_("norm.weight", torch.ones(8, dtype=torch.bool)),
        r"norm\.weight has the type bool",
    ),
    "sparse": (lambda: with_("norm.bias", torch.ones(8).to_sparse()), "is quantized, sparse"),
    "no values": (lambda: with_("norm.bias", torch.ones(8, device="meta")), "not stored in full"),
    "one value many times": (
        lambda: with_("cls_token", torch.ones(1).expand(1, 1, HUGE)),
        "cls_token of shape .1, 1, 1000000000. is not stored in full",
    ),
    "a scalar": (lambda: with_("cls_token", torch.tensor(1.0)), "cannot be opened"),
    "a vector": (lambda: with_("patch_embed.proj.weight", torch.ones(3)), "cannot be opened"),
    "a billion blocks": (
        lambda: with_(f"blocks.{HUGE}.norm1.weight", torch.ones(8)),
        "depth=1000000001: at most 256",
    ),
    "a number of thousands of digits": (
        lambda: with_(f"blocks.{'9' * 5000}.norm1.weight", torch.ones(8)),
        "cannot be opened",
    ),
    "deep": (lambda: None, "nested deeper than 64"),
    "wide": (lambda: doubled(40), "more than 262,144 values"),
    "a circle": (itself, "nested deeper than 64"),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_are_no_networks_are_a_sentence(kind: str, tmp_path: Path) -> None:
    """At once, with the tensor's name; as a checkpoint and as a start."""
    make, words = BAD_TENSORS[kind]
    if (content := make()) is None:
        nested(tmp_path / "a.pth")
    else:
        torch.save(content, tmp_path / "a.pth")
    start = time.monotonic()
    refused(lambda: open_weights(tmp_path / "a.pth", num_heads=2), tmp_path, words)
    refused(lambda: load_pretrained(vit(), tmp_path / "a.pth"), tmp_path)
    assert time.monotonic() - start < 60  # not hours, as before: no measure of speed


# ----------------------------------------------------------------------- what describes them

ABSURD: dict[str, tuple[Any, str]] = {
    "depth": (SPEC | {"depth": HUGE}, "depth=1000000000: at most 256"),
    "depth as a float": (SPEC | {"depth": 1e9}, "depth=1000000000: at most 256"),
    "width": (SPEC | {"embed_dim": 20_000, "depth": 2}, "does not fit.*missing in the file|8"),
    "width and depth beyond the file": (
        SPEC | {"embed_dim": 2**20, "depth": 256},
        "does not fit.* 256 blocks of up to 1,048,576 channels",
    ),
    "blocks beyond the file": (
        {"kind": "convnet", "widths": [8] * 200, "depths": [256] * 200, "patch_size": 2**200},
        "patch_size",
    ),
    "stages beyond the file": (
        {"kind": "convnet", "widths": [8] * 9, "depths": [256] * 9, "patch_size": 256},
        "does not fit.* 2,304 blocks",
    ),
    "compact beyond the file": (
        {"kind": "compact", "width": 2, "whole": SPEC | {"embed_dim": 2**20, "depth": 256}},
        "does not fit.* 256 blocks",
    ),
    "width beyond memory": (SPEC | {"embed_dim": 2**40}, "embed_dim="),
    "no patch": (SPEC | {"patch_size": 0}, "patch_size=0"),
    "negative": (SPEC | {"depth": -1}, "depth=-1"),
    "text": (SPEC | {"embed_dim": "8"}, "embed_dim=8"),
    "nothing": (SPEC | {"depth": None}, "does not fit"),
    "not a number": (SPEC | {"mlp_ratio": float("nan")}, "mlp_ratio=nan"),
    "infinite": (SPEC | {"mlp_ratio": float("inf")}, "mlp_ratio=inf"),
    "a ratio beyond numbers": (SPEC | {"mlp_ratio": 1e300}, "cannot be opened|cannot be built"),
    "pixels": (SPEC | {"image_size": HUGE * 8}, "image_size="),
    "more positions": (SPEC | {"image_size": 64_000}, "pos_embed"),
    "a stranger's key": (SPEC | {"checkpoint_path": "x.pth"}, "checkpoint_path='x.pth', which no"),
    "pretrained": (SPEC | {"name": "test_vit", "pretrained": True}, "pretrained=true, which no"),
    "a device": (SPEC | {"device": "cpu"}, "device='cpu', which no vit has"),
    "a node": (SPEC | {"name": {"_target_": "os.getpid"}}, "which no vit has"),
    "a target": (SPEC | {"_target_": "os.getpid"}, "_target_='os.getpid', which no vit has"),
    "an interpolation": (SPEC | {"name": "${oc.env:HOME}"}, "which no vit has"),
    "a list": ([1], r"spec is \[1\]"),
    "null": (None, "spec is null"),
    "code": ({"kind": "os:system"}, r"trust='\[os\]'"),
    "a compact of nothing": ({"kind": "compact", "width": 2}, "spec is null"),
    "compacts": (
        json.loads('{"kind":"compact","width":2,"whole":' * 400 + "{}" + "}" * 400),
        "more than 8 compact in a row",
    ),
    **{
        f"name {name}": (SPEC | {"name": name}, "does not name a model of timm's")
        for name in (
            *("hf-hub:timm/test_vit", "hf_hub:timm/test_vit", "local-dir:.", "./test_vit"),
            *("../test_vit", "https://example.com/a.pth", "timm/test_vit", "test_vit\n"),
        )
    },
}


@pytest.mark.parametrize("kind", ABSURD)
def test_a_spec_that_is_not_the_weights_is_a_sentence(kind: str, tmp_path: Path) -> None:
    """Before time or memory is taken; by Python, as a checkpoint, and by its file alone."""
    spec, words = ABSURD[kind]
    folder = exported(tmp_path / "vit", spec=spec)
    refused(lambda: dino_lite.load_backbone(folder), tmp_path, words)
    refused(lambda: open_backbone(find_checkpoint(str(folder), tmp_path)), tmp_path, words)
    if isinstance(spec, dict):  # else what it is is read from its shapes
        refused(lambda: open_weights(folder), tmp_path)


PICTURES: dict[str, Any] = {
    "mean": (["0.5"] * 3, "0.5", [0.5], [[0.5] * 3] * 3, [float("nan")] * 3, None, [True] * 3),
    "std": ([0, 0.5, 0.5], [-1, 1, 1], [float("inf")] * 3, {"a": 1}),
    "image_size": (0, -16, HUGE, 16.5, "16", [16, -16], True),
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, vs in PICTURES.items() for v in vs])
def test_impossible_preprocessing_is_a_sentence(key: str, value: Any, tmp_path: Path) -> None:
    """Whoever reads it."""
    folder = exported(tmp_path / "vit", **{key: value})
    for read in (dino_lite.load_backbone, lambda f: open_backbone(find_checkpoint(str(f), "."))):
        refused(lambda read=read: read(folder), tmp_path, key)


CONTRADICTIONS: list[dict[str, Any]] = [
    *({"patch_size": 16}, {"embed_dim": 16}, {"in_chans": 1}, {"num_parameters": 3}),
    *({"card": [1]}, {"card": "x"}, {"image_size": 32}, {"mean": [0.1] * 3}, {"std": [0.1] * 3}),
    *({"preprocessing": [1]}, {"preprocessing": {"size": [31, 31]}}),
    *({"preprocessing": {"size": [16, 16, 16]}}, {"preprocessing": {"size": [True, True]}}),
    {"preprocessing": {"size": [16, 16], "crop": 1e-3}},
]


@pytest.mark.parametrize("changes", CONTRADICTIONS, ids=str)
def test_a_config_that_contradicts_itself_is_a_sentence(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    """When it is opened, not when images come; as a folder, and by its file what concerns it."""
    folder = exported(tmp_path / "vit", **changes)
    words = next(iter(changes)).replace("preprocessing", "preprocessing|how images are prepared")
    refused(lambda: dino_lite.load_backbone(folder), tmp_path, words)
    if words not in ("image_size", "mean", "std"):  # its preprocessing decides
        refused(lambda: open_weights(folder / "model.safetensors"), tmp_path, words)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_an_export_in_another_type_is_a_sentence(dtype: torch.dtype, tmp_path: Path) -> None:
    """Of all weights, and of one."""
    folder = exported(tmp_path / "vit")
    weights = load_file(folder / "model.safetensors")
    for name in ("norm.bias", "cls_token"):
        save_file(weights | {name: weights[name].to(dtype)}, folder / "model.safetensors")
        for read in (dino_lite.load_backbone, open_weights):
            refused(lambda read=read: read(folder), tmp_path, f"{name} has the type")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe{}", "utf-8"),
        (b"[1]", "it holds a list, not an object"),
        (b'{"spec": 1, "spec": 2}', "the key 'spec' occurs twice"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read"),
        (b"", "cannot be read"),
        (None, "larger than 64 MiB"),
    ],
)
def test_json_that_is_no_object_is_a_sentence(
    content: bytes | None, words: str, tmp_path: Path
) -> None:
    """config.json of an export and of others, a file's own, and a run's results."""
    folder = exported(tmp_path / "vit")
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    for file in (folder / "config.json", tmp_path / "a.json"):
        with open(file, "wb") as stream:
            stream.write(content or b"")
            stream.truncate(None if content is not None else 2**26 + 1)
    refused(lambda: dino_lite.load_backbone(folder), tmp_path, words)
    refused(lambda: find_checkpoint(str(folder), tmp_path), tmp_path, words)
    refused(lambda: open_weights(tmp_path / "a.safetensors"), tmp_path, words)
    refused(lambda: read_object(folder / "config.json"), tmp_path, words)


@pytest.mark.parametrize(
    "about",
    [
        {"num_attention_heads": "two"},
        {"num_attention_heads": HUGE},
        {"num_attention_heads": -2},
        {"layer_norm_eps": "small"},
        {"pretrained_cfg": [1]},
        {"pretrained_cfg": {"input_size": [3, "a", "b"]}},
        {"image_mean": "white"},
        {"image_std": [0, 0, 0]},
        {"spec": {"kind": "convnet"}},
        {"spec": ["vit"]},
    ],
)
def test_impossible_words_beside_a_file_are_a_sentence(about: Any, tmp_path: Path) -> None:
    """Of a wrong type, of a wrong number."""
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    (tmp_path / "a.json").write_text(json.dumps({"num_attention_heads": 2} | about))
    refused(lambda: open_weights(tmp_path / "a.safetensors"), tmp_path)


def test_a_start_takes_no_target_from_an_export(tmp_path: Path) -> None:
    """The settings of a convnet are read from the file that `backbone.pretrained` names."""
    net = ConvNet(widths=[4], depths=[1], patch_size=4, norm="group")
    call = {"_target_": "os.mkdir", "_args_": [str(tmp_path / "canary")]}
    for change in ({"widths": call}, call, {"norm": "${oc.env:HOME}"}):
        folder = exported(tmp_path / "net", net, spec=net.stored_spec() | change)
        config = compose("pretrain", [f"backbone.pretrained={folder}"])
        refused(lambda config=config: begin_config(config), tmp_path, "which no convnet has")


def test_a_spec_takes_no_memory_before_it_fits() -> None:
    """The largest that are allowed are built without their weights."""
    backbone = empty_backbone(SPEC | {"embed_dim": 2**16, "depth": 8, "image_size": 2**15})
    assert all(value.is_meta for value in backbone.state_dict().values())


def test_what_all_families_store_is_allowed() -> None:
    """A spec that was read is the one that was stored."""
    net = ConvNet(widths=[4, 8], depths=[1, 2], patch_size=4, fields=2)
    for backbone in (net, vit(), ViT(**SPEC, mlp="swiglu", num_registers=2)):
        spec = json.loads(json.dumps(backbone.stored_spec()))
        assert build_backbone(spec).stored_spec() == spec


def test_an_export_holds_its_weights_in_its_own_layout_and_type(tmp_path: Path) -> None:
    """They are as they were, in memory too."""
    net = ConvNet(widths=[4, 8], depths=[1, 1], patch_size=4, fields=2).eval()
    folder = exported(tmp_path / "net", net)
    half = {name: value.contiguous() for name, value in net.half().state_dict().items()}
    save_file(half, folder / "model.safetensors")
    again = dino_lite.load_backbone(folder)
    for name, value in again.state_dict().items():
        assert torch.equal(value, net.state_dict()[name])
        assert value.dtype == net.state_dict()[name].dtype
    conv = again.stages[0][0].conv1.weight
    assert conv.is_contiguous(memory_format=torch.channels_last)


def test_nan_in_an_export_is_a_sentence(tmp_path: Path) -> None:
    """With the weight's name."""
    folder = exported(tmp_path / "vit")
    weights = load_file(folder / "model.safetensors")
    weights["norm.bias"][3] = float("nan")
    save_file(weights, folder / "model.safetensors")
    refused(lambda: dino_lite.load_backbone(folder), tmp_path, r"norm\.bias has values")


# -------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.bin", "a/x.bin", "..", "", "x.pkl", 3])
def test_an_index_names_files_of_its_folder_only(name: object) -> None:
    """No other folder, no other kind."""
    with pytest.raises(UserError, match=r"which is not a \.safetensors or"):
        safe_member(name)
    assert safe_member("model-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    "name", ["hf-hub:timm/test_vit", "local-dir:.", "hf_hub:a/b", "./x", "https://example.com/x"]
)
def test_timm_names_no_place(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither as a checkpoint nor as a backbone's name."""
    monkeypatch.setattr("socket.socket", lambda *_, **__: pytest.fail("asked the network"))
    monkeypatch.chdir(exported(tmp_path / "vit"))
    refused(lambda: open_timm(name), tmp_path, f"timm:{name} does not name a model of timm's")
    refused(lambda: ViT(name=name), tmp_path, f"name={name} does not name a model of timm's")


@pytest.mark.parametrize("value", ["5", "[a]", "{a: 1}", "true", "a\\0b", "x" * 5000])
def test_a_checkpoint_of_another_type_is_a_sentence(value: str, tmp_path: Path) -> None:
    """Numbers, lists and names that no file can have."""
    overrides = [f"checkpoint='{value}'" if "\\" in value else f"checkpoint={value}"]
    with pytest.raises((UserError, OSError), match=r"checkpoint|name too long"):
        run_evaluate(compose("evaluate", [*overrides, f"runs_dir={tmp_path}"]))
