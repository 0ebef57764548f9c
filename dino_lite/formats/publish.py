"""Writes an export: format → verification → model card → one step that replaces the former one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from stat import S_IMODE
from typing import Any

from dino_lite.contracts import UserError
from dino_lite.formats.card import model_card
from dino_lite.formats.format import Claim, Format
from dino_lite.formats.opened import Opened
from dino_lite.formats.portable import portable
from dino_lite.formats.reading import told_preprocessing
from dino_lite.formats.safetensors import CONFIG, WEIGHTS, read_config
from dino_lite.formats.swap import replaced
from dino_lite.formats.verify import Original, Verified, verify
from dino_lite.version import __version__

ABOUT, CARD = "export.json", "README.md"
_BY = "dino_lite "  # begins who wrote it
_FULL = 2**20  # bytes


def publish(
    form: Format,
    opened: Opened,
    target: Path,
    original: Original,
    license: str = "unknown",
    repeats: int = 1,
) -> dict[str, Any]:
    """Write `opened` to the folder `target`, if what is read back agrees with `original`.

    Returns the content of export.json with "directory" and "largest_difference". Until the end the
    former export stays; if anything fails, nothing else is left. Raises UserError.
    """
    check_target(target)
    opened = opened._replace(card=portable(opened.card))
    with _told(target), replaced(target) as (part, scratch):
        claims = form.write(opened, part)
        found = verify(form, claims, part, original, repeats, scratch)
        about = _about(form, opened, original, claims, found) | {
            "folder": target.name,
            "license": license,
        }
        about["files"] = sorted([*os.listdir(part), ABOUT, CARD])
        (part / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        card = model_card(about, form.library or form.name)
        (part / CARD).write_text(card, encoding="utf-8")
        usual = (part / CARD).stat().st_mode  # safetensors lets nobody else read its files
        for path in part.rglob("*"):
            if path.is_file():
                path.chmod(S_IMODE(usual))
        check_target(target)  # it may have changed meanwhile
        _keep_others(target, part)
    largest = max(check.difference for check in found.checks)
    return about | {"directory": str(target), "largest_difference": largest}


def check_target(target: Path) -> None:
    """Raise UserError if `target` cannot be replaced: it holds other files than an export's."""
    if target.exists() and not target.is_dir():
        raise UserError(f"Cannot write to {target}: it is a file; name a folder.")
    if target.is_dir() and (os.path.ismount(target) or target.samefile(Path.cwd())):
        raise UserError(
            f"{target} cannot be replaced, as the current folder or a mount point: name a folder "
            f"in it, as in out={target / 'export'}."
        )
    visible = _names(target) - {name for name in _names(target) if name.startswith(".")}
    if visible and not _former(target):
        raise UserError(
            f"{target} holds other files than an export's, such as {min(visible)}: name a new "
            "folder as out=."
        )


def _names(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


def _former(target: Path) -> set[str]:
    """Names of the files of the export in `target`; empty if there is none."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or not ours
        about = json.loads((target / ABOUT).read_text(encoding="utf-8"))
        if about["written_by"].startswith(_BY):
            return set(about["files"])
    with suppress(UserError):  # of a version that wrote no export.json
        read_config(target)
        return {WEIGHTS, CONFIG}
    return set()


def _keep_others(target: Path, part: Path) -> None:
    """Copy what others have put beside the former export, such as results. Raises UserError if one
    of these has the name of a new file.
    """
    others = _names(target) - _former(target)
    if both := others & _names(part):
        raise UserError(
            f"{target} holds a {min(both)} that is no file of the export there, and the new one "
            "has a file of this name: rename yours, or name a new folder as out=."
        )
    for name in others:
        path = target / name
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, part / name, symlinks=True)
        else:
            shutil.copy2(path, part / name, follow_symlinks=False)


def _about(
    form: Format, opened: Opened, original: Original, claims: list[Claim], found: Verified
) -> dict[str, Any]:
    """What is known of an export, for its card and for programs."""
    backbone, size = opened.backbone, opened.preprocessing.size
    return {
        "format": form.name,
        "written_by": f"{_BY}{__version__}",
        "backbone": portable(backbone.stored_spec()),
        "embed_dim": backbone.embed_dim,
        "patch_dim": original.tokens(size, 1)["patches"].shape[2],
        "num_parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "patch_size": backbone.patch_size,
        "in_chans": backbone.in_chans,
        "preprocessing": told_preprocessing(opened.preprocessing),
        "claims": [claim._asdict() for claim in claims],
        "verification": {
            "own": form.own,
            "num_images": len(original.pictures),
            "versions": _versions("torch", *form.packages, *claims[0].packages),
            "checks": [check._asdict() for check in found.checks],
            "pixels": [check._asdict() for check in found.pixels],
        },
        "training": opened.card,
    }


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # another distribution provides it, as onnxruntime-gpu does
            continue
    return found


@contextmanager
def _told(target: Path) -> Iterator[None]:
    """Context in which a full disk or a folder that cannot be written is a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(f"Cannot write to {target}: {error.strerror or error}.") from error
    except UserError:
        raise
    except Exception as error:  # some writers have errors of their own for a full disk
        above = next(folder for folder in target.absolute().parents if folder.is_dir())
        if shutil.disk_usage(above).free > _FULL and "os error 28" not in str(error):
            raise
        raise UserError(f"Cannot write to {target}: the disk is full.") from error
