"""Checks the claims of a written format: it is read back without dino_lite, on real images."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from dino_lite.contracts import UserError
from dino_lite.data.transform import Transform
from dino_lite.formats import foreign_process
from dino_lite.formats.format import Claim, Format
from dino_lite.formats.opened import Opened
from dino_lite.formats.pixel_checks import Picture, PixelCheck, compare, write_pictures
from dino_lite.formats.reading import file_of, reading

Size = tuple[int, int]
_LEAST_SECONDS, _TIMES_EAGER = 900.0, 100.0  # after which a process that reads an export is ended


class Check(NamedTuple):
    """What a claim gave at one size and batch size. Differences are the largest, relative to the
    root mean square of the original's tokens; `seconds` are those of the run, with its overhead.
    """

    title: str  # of the claim
    size: Size
    batch: int
    cls: float
    patches: float
    tolerance: float
    seconds: float

    @property
    def difference(self) -> float:
        """The larger of both; NaN if either is."""
        return float(np.maximum(self.cls, self.patches))


class Original:
    """The backbone that exports are held against, and `images` of the training's size: the
    `pictures`, prepared. A single one is shown mirrored as well, so that there are two batch sizes.
    """

    def __init__(self, opened: Opened, pictures: Sequence[Picture]) -> None:
        self.backbone, self.how, self.pictures = opened.backbone, opened.preprocessing, pictures
        images = Transform(self.how)([*pictures])
        self.images = images if len(images) > 1 else torch.cat([images, images.flip(3)])
        self.seconds = 0.0  # spent on tokens so far
        self._tokens: dict[tuple[Size, int], dict[str, Tensor]] = {}

    def batches(self, size: Size) -> tuple[int, int]:
        """Two batch sizes: at the images' own size one is all of them."""
        return (1, len(self.images)) if tuple(self.images.shape[2:]) == size else (1, 2)

    def pixels(self, size: Size) -> Float[Tensor, "n C H W"]:
        """The images at `size`, resampled unless it is theirs."""
        if tuple(self.images.shape[2:]) == size:
            return self.images
        return F.interpolate(self.images, size, mode="bilinear", antialias=True)

    def tokens(self, size: Size, batch: int) -> dict[str, Tensor]:
        """The original's "cls" and "patches" of the first images at `size`."""
        if (size, batch) not in self._tokens:
            began = time.perf_counter()
            with torch.inference_mode():
                found = self.backbone(self.pixels(size)[:batch])
            self.seconds += time.perf_counter() - began
            self._tokens[size, batch] = {"cls": found.cls, "patches": found.patches}
        return self._tokens[size, batch]


def demand_packages(formats: dict[str, Format]) -> None:
    """Raise UserError if packages that a format needs are not installed."""
    for name, each in formats.items():
        missing = [p for p in each.packages if find_spec(p.replace("-", "_")) is None]
        if missing:
            raise UserError(
                f"format={name} needs {' and '.join(missing)}: pip install 'dino-lite[export]'."
            )


class Verified(NamedTuple):
    """What was found of a format whose claims hold."""

    checks: list[Check]
    pixels: list[PixelCheck]  # one a claim


def verify(
    form: Format,
    claims: list[Claim],
    folder: Path,
    original: Original,
    repeats: int = 1,
    scratch: Path | None = None,
) -> Verified:
    """Read `folder` back as each claim says, at all its sizes and at two batch sizes, and compare
    tokens; prepare the pictures as it says, and compare pixels.

    Raises UserError if it cannot be read, or above the tolerance. `repeats` of each run are timed;
    `scratch` is a folder for temporary files.
    """
    if not all([claims, *(claim.sizes for claim in claims)]):
        raise UserError(
            f"format={form.name} claims nothing that could be checked, so nothing was written: its "
            "`write` must return at least one claim, with the sizes of its images."
        )
    sizes = [sizes_of(claim, original.backbone.patch_size) for claim in claims]
    for each in sizes:  # before the others', whose time limit follows from this time
        for size in each:
            for batch in original.batches(size):
                original.tokens(size, batch)
    pixels = {_word(size): original.pixels(size) for each in sizes for size in each}
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        scratch = Path(name)
        job = {
            "folder": str(folder),
            "claims": [_job(*pair, original, scratch) for pair in zip(claims, sizes, strict=True)],
            "repeats": repeats,
            "path": [each for each in sys.path if each],
        }
        try:
            if form.own:
                found, seconds = foreign_process.execute(job, pixels)
            else:
                limit = _LEAST_SECONDS + _TIMES_EAGER * repeats * original.seconds
                found, seconds = _elsewhere(job, pixels, scratch, limit)
        except RuntimeError as error:
            end = "" if str(error).endswith("?") else "."
            raise UserError(f"format={form.name} cannot be read back, {error}{end}") from error
    checks, prepared = [], []
    for number, (claim, each) in enumerate(zip(claims, sizes, strict=True)):
        prepared.append(_prepared(number, claim, found, original, form))
        checks += _checks(number, claim, each, found, seconds, original, form)
    return Verified(checks, prepared)


def _job(claim: Claim, sizes: list[Size], original: Original, scratch: Path) -> dict[str, Any]:
    """What `foreign_process.execute` is to do for a claim."""
    how = original.how.at(claim.sizes[0])
    return {
        "load": claim.load,
        "run": claim.run,
        "sizes": [(_word(size), original.batches(size)) for size in sizes],
        "read": "\n".join(reading(claim, how)),
        "file": file_of(len(how.mean)),
        "pictures": write_pictures(original.pictures, how, scratch),
    }


def _prepared(
    number: int, claim: Claim, found: dict[str, Tensor], original: Original, form: Format
) -> PixelCheck:
    """The check of the pixels that the lines of a claim prepare. Raises UserError."""
    how, named = original.how.at(claim.sizes[0]), _named(form, claim.title)
    pixels = [found[f"{number}/picture/{i}"] for i in range(len(original.pictures))]
    levels, shifted, resized = compare(pixels, original.pictures, how, named)
    cls = 0.0
    if shifted or resized:
        own = Transform(how)([*original.pictures])
        with torch.inference_mode():
            there, here = (original.backbone(each).cls for each in (torch.cat(pixels), own))
        cls = float((there - here).abs().max() / here.square().mean().sqrt())
    return PixelCheck(claim.title, levels, shifted, resized, cls)


def _checks(
    number: int,
    claim: Claim,
    sizes: list[Size],
    found: dict[str, Tensor],
    seconds: dict[str, float],
    original: Original,
    form: Format,
) -> list[Check]:
    """The checks of a claim's tokens. Raises UserError."""
    checks = []
    for size in sizes:
        for batch in original.batches(size):
            expected = original.tokens(size, batch)
            key = f"{number}/{_word(size)}/{batch}"
            cls, patches = (
                _difference(found[f"{key}/{output}"], expected[output], output, form)
                for output in ("cls", "patches")
            )
            check = Check(claim.title, size, batch, cls, patches, claim.tolerance, seconds[key])
            checks.append(check)
            _demand(check, form)
    return checks


def sizes_of(claim: Claim, patch: int) -> list[Size]:
    """All sizes at which a claim is checked: of any size, also a smaller one, a larger one and a
    rectangle.
    """
    rows, columns = claim.sizes[0]
    least = 2 * patch  # a graph may be exact from two patches per side on
    half = [min(side, max(least, side // 2 // patch * patch)) for side in (rows, columns)]
    others = [
        (half[0], half[1]),
        (rows + patch, columns + patch),
        (rows + patch, columns + 3 * patch),
    ]
    return list(dict.fromkeys([*claim.sizes, *(others if claim.any_size else ())]))


def _word(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _difference(found: Tensor, expected: Tensor, output: str, form: Format) -> float:
    if found.shape != expected.shape:
        raise UserError(
            f"format={form.name} gives {output} of shape {tuple(found.shape)} instead of "
            f"{tuple(expected.shape)}: nothing was written."
        )
    largest = (found.double() - expected.double()).abs().max()
    scale = expected.double().square().mean().sqrt()
    return float(largest / scale) if largest else 0.0


def _demand(check: Check, form: Format) -> None:
    if not check.difference <= check.tolerance:
        raise UserError(
            f"{_named(form, check.title)} differs from the original by {check.difference:.1e} of "
            f"the tokens' root mean square, at {_word(check.size)} pixels and a batch of "
            f"{check.batch}; {check.tolerance} is allowed, so nothing was written: choose another "
            "format."
        )


def _named(form: Format, title: str) -> str:
    return f"format={form.name}{f' ({title})' if title else ''}"


def _elsewhere(
    job: dict[str, Any], pixels: dict[str, Tensor], folder: Path, limit: float
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """`foreign_process.execute` in a fresh interpreter, without network and GPU, which is ended
    after `limit` seconds; `folder` is for its files.
    """
    own = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    own["TMPDIR"] = str(folder)
    stored = {size: each.contiguous() for size, each in pixels.items()}
    save_file(stored, folder / "pixels.safetensors")
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    try:
        done = subprocess.run(
            [sys.executable, "-I", foreign_process.__file__, str(folder), str(os.getpid())],
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | own,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(
            f"as the process that did so was ended after {limit:,.0f} seconds without an answer: "
            "is this machine busy with something else?"
        ) from error
    answer_file = folder / "answer.json"
    if done.returncode or not answer_file.is_file():
        raise RuntimeError(f"as the process that did so {_end(done)}")
    answer = json.loads(answer_file.read_text(encoding="utf-8"))
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return load_file(folder / "tokens.safetensors"), answer["seconds"]


def _end(done: subprocess.CompletedProcess[str]) -> str:
    """How a process ended that could not say it itself."""
    if done.returncode < 0:
        return f"was ended by {signal.Signals(-done.returncode).name}; is there enough memory?"
    last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
    return f"ended with code {done.returncode} ({last})"
