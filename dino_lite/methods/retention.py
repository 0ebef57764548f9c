"""Retention: targets that hold a student to a frozen network while it learns from new images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor

from dino_lite.backbones.blocks import evaluating
from dino_lite.backbones.noise import is_noisy
from dino_lite.contracts import (
    Anchor,
    Backbone,
    Crops,
    Kept,
    Loss,
    Match,
    StepOutputs,
    StepTargets,
    Tokens,
)
from dino_lite.losses.gram import regrid
from dino_lite.methods.method import Method
from dino_lite.nn.lora import without_adapters

KEPT, KEPT_GRAM = "kept", "kept_gram"


class Retention:
    """Matches the student's tokens of whole, unmasked global crops with those of a frozen network:
    "kept" with `Kept`, "kept_gram" with `Anchor`, as GramLoss reads it.

    `frozen` returns the frozen network's tokens of crops: a `FrozenTeacher`, or the student itself
    without its adapters (`Unadapted`). Its patches are resampled to the student's grid.
    Where the method's own pass over the global crops is masked or noisy (drop path, dropout, batch
    normalization, augmented coordinates), the student sees them once more in eval mode; else the
    tokens of the method's pass are used. So a student that is the frozen network has a distance of
    exactly zero.
    """

    provides = (KEPT, KEPT_GRAM)

    def __init__(self, frozen: Callable[..., Tokens]) -> None:
        self.frozen = frozen
        self._read: set[str] = set()  # the matches that losses read
        self._cls_only = self._own_pass = False

    def attach(self, method: Method, losses: Iterable[Loss]) -> bool:
        """Prepare for a method and the losses that are applied to it; whether any of them reads a
        match of this.
        """
        ours = [loss for loss in losses if loss.reads in self.provides]
        if not ours:
            return False
        self._read = {loss.reads for loss in ours}
        self._cls_only = all(loss.cls_only for loss in ours)
        self._own_pass = method.masks_crops or is_noisy(_student(method))
        if not self._own_pass and not self._cls_only:
            method.needs_patches = True
        return True

    def compare(
        self, method: Method, crops: Crops, targets: StepTargets, num_images: int
    ) -> StepOutputs:
        """The method's matches of a micro-batch of a batch of `num_images`, and these."""
        globals_, tokens = crops.globals_.flatten(0, 1), None
        if self._own_pass:  # first: the method's own updates statistics of batch normalization
            with evaluating(student := _student(method)):
                tokens = student(globals_, cls_only=self._cls_only)
        outputs = method.compare(crops, targets)
        tokens = cast(Tokens, outputs["tokens"].student if tokens is None else tokens)
        cls_only = not tokens.patches.shape[1]  # the same pass has the same rounding
        theirs = self.frozen(globals_, cls_only=cls_only)
        patches = theirs.patches.detach()
        if not cls_only:
            patches = regrid(patches, theirs.grid, tokens.grid)
        shape = crops.globals_.shape[:2]  # G n
        patches = patches.reshape(*shape, *patches.shape[1:])
        weight = crops.globals_.new_full(shape[1:], 1.0 / num_images)
        found = {
            KEPT: Kept(theirs.cls.detach().reshape(*shape, -1), patches, weight),
            KEPT_GRAM: Anchor(patches, weight),
        }
        return outputs | {name: Match(tokens, found[name]) for name in self._read}


class Unadapted:
    """Tokens of a backbone without its adapters, whose own weights are frozen: the network with
    which training began, without a copy of it.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    def __call__(self, crops: Float[Tensor, "n C H W"], cls_only: bool = False) -> Tokens:
        """Tokens of crops, in eval mode."""
        with evaluating(self._backbone), without_adapters(self._backbone):
            return self._backbone(crops, cls_only=cls_only)


def _student(method: Method) -> Any:
    return cast(Any, method.student).backbone
