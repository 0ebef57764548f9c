"""The nouns that every part of dino_lite shares, and nothing that computes.

Letters in shapes, everywhere: B images, G global crops, L local crops, S student crops (G+L), T
teacher crops (=G), N tokens, P patches, M masked patches, D feature width, E bottleneck width, K
prototypes, C channels, n rows of any kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64, Shaped, UInt8
from torch import Tensor, nn

Memory = Literal["high", "normal", "low"]  # how much is kept for the backward pass
LOGITS_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}  # of logits held at once


class UserError(Exception):
    """What the user can mend, in one sentence: what is wrong, where, what to do. Exit code 2."""


class Progress(NamedTuple):
    """Where a run stands: optimizer steps, or ticks of the clock when it is timed."""

    step: float
    total: float
    steps_per_epoch: float

    @property
    def fraction(self) -> float:
        """Part of the run that is behind, in [0, 1]."""
        return min(1.0, self.step / max(self.total, 1))

    @property
    def epoch(self) -> int:
        """Index of the running epoch, from 0."""
        return int(self.step // max(self.steps_per_epoch, 1e-9))


@runtime_checkable
class Schedule(Protocol):
    """A number that follows the run: a rate, a decay, a momentum, a temperature, a weight."""

    def __call__(self, at: Progress) -> float: ...


class Source(ABC):
    """A finite, ordered collection of images. Subclasses implement `__len__`, `read`, `name` and
    `digest`; all other members have defaults. Workers get a forked or pickled copy.
    """

    labels: Int[np.ndarray, "N"] | None = None  # indices into `classes`; -1: unlabeled
    classes: Sequence[str] = ()
    channels: int = 3  # to which `data.decode.decode` converts the files from `encoded`
    # Images groups[g] to groups[g+1] are stored, so best read, together (a shard, a row group).
    groups: Int64[np.ndarray, "bounds"] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int, min_pixels: int | None = None) -> UInt8[np.ndarray, "H W C"]:
        """Image `index`, upright; C is the same for all images of a source.

        With `min_pixels` it may be downscaled, to no fewer pixels than that. Raises OSError or
        ValueError if it cannot be read.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """Image `index` in messages and bad_files.csv: a path, or the set's name and the index."""

    @abstractmethod
    def digest(self) -> str:
        """16 hex digits over names or bytes in order; a run only resumes on the same digest."""

    def prefetch(self, indices: Sequence[int]) -> None:  # noqa: B027 - optional
        """Announce the next images to be read, for sources that can fetch them concurrently."""

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width of image `index`. The default reads it. Raises as `read` does."""
        height, width = self.read(index).shape[:2]
        return height, width

    def encoded(self, index: int) -> tuple[bytes, str] | None:
        """Content and suffix (".jpg") of a file that `data.decode.decode` reads, if there is one.
        Raises as `read` does.
        """
        return None

    def data_files(self) -> Iterable[str | bytes]:
        """Files that hold the images: cached features are discarded when one of them changes."""
        return ()


class Splits(NamedTuple):
    """A data set. Pretraining reads `train` only; `test` is None where there is one split."""

    train: Source
    test: Source | None
    name: str


class Crops(NamedTuple):
    """The multi-crop batch of one rank, crop-major. uint8 until `photometric.Normalize` makes
    floats of it on the device.

    `boxes`: top, left, height, width of each crop as fractions of its image. `draws`: the
    photometric parameters that were (or are to be) applied, columns as `data.crops.COLUMNS` names
    them. `extra`: further crops by name.
    """

    globals_: Shaped[Tensor, "G B C H W"]
    locals_: Shaped[Tensor, "L B C h w"] | None
    index: Int[Tensor, "B"]  # type: ignore[assignment]  # hides tuple.index, which nobody asks
    labels: Int[Tensor, "B"] | None
    boxes: Float[Tensor, "S B 4"]
    draws: Float[Tensor, "S B A"]
    extra: dict[str, Tensor] = {}  # noqa: RUF012 - a NamedTuple's default, never written to

    @property
    def num_images(self) -> int:
        """B, the images of this rank's batch."""
        return self.globals_.shape[1]

    def part(self, start: int, stop: int) -> Crops:
        """Images start to stop (exclusive) of the batch: a micro-batch."""
        cut = slice(start, stop)
        return Crops(
            globals_=self.globals_[:, cut],
            locals_=None if self.locals_ is None else self.locals_[:, cut],
            index=self.index[cut],
            labels=None if self.labels is None else self.labels[cut],
            boxes=self.boxes[:, cut],
            draws=self.draws[:, cut],
            extra={name: crops[:, cut] for name, crops in self.extra.items()},
        )


class Tokens(NamedTuple):
    """What a backbone makes of n images, after its last norm."""

    cls: Float[Tensor, "n D"]
    patches: Float[Tensor, "n P D"]
    registers: Float[Tensor, "n R D"] | None
    grid: tuple[int, int]  # rows, columns: P = rows * columns


class Traits(NamedTuple):
    """What automatic settings depend on, known from a backbone's settings before it is built."""

    convolutional: bool = False  # crops, patch size and rate of a ResNet
    small: bool = False  # given by its sizes, for a CPU, and no published model
    drop_path: bool = True  # has stochastic depth
    mixes_images: bool = False  # in training, by batch normalization
    names: tuple[str, str] | None = None  # what name=auto stands for: on a CPU, on other devices


class Backbone(nn.Module):
    """Images to tokens. Abstract.

    `spec` holds the constructor's keywords, plain JSON, without those that only training needs:
    `type(self)(**spec)` builds the same network with fresh weights.
    """

    kind: ClassVar[str]  # names the class in files: module:Class, or a short name of ours
    spec: dict[str, Any]
    embed_dim: int
    patch_size: int
    in_chans: int
    num_blocks: int
    takes_masks: bool = False  # whether `forward` takes a mask
    __call__: Callable[..., Tokens]

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "kind" not in vars(cls):
            cls.kind = f"{cls.__module__}:{cls.__qualname__}"

    @classmethod
    def traits(cls, **settings: Any) -> Traits:
        """What automatic settings ask of a backbone of these settings, of which some may still be
        "auto".
        """
        return Traits(small=settings.get("embed_dim") is not None)

    def stored_spec(self) -> dict[str, Any]:
        """`spec` with the class's kind: what files hold and `build_backbone` reads."""
        return self.spec | {"kind": self.kind}

    def forward(
        self,
        images: Float[Tensor, "n C H W"],
        mask: Bool[Tensor, "n P"] | None = None,
        cls_only: bool = False,
    ) -> Tokens:
        """Tokens after the last norm, a learned token in the place of patches in `mask`. With
        `cls_only` what only patches need may be left out: they come back empty, P = 0.
        """
        raise NotImplementedError

    def intermediate(self, images: Float[Tensor, "n C H W"], blocks: list[int]) -> list[Tokens]:
        """Tokens after each of `blocks` (negative: from the end), each through the last norm."""
        raise NotImplementedError

    def attention(self, images: Float[Tensor, "n C H W"]) -> Float[Tensor, "n heads N N"]:
        """Softmax attention of the last block."""
        raise NotImplementedError

    def depth_of(self, name: str) -> int:
        """Layer of the parameter `name`: 0 for the stem, i+1 for block i, num_blocks+1 after."""
        raise NotImplementedError

    def set_memory(self, memory: Memory, compiled: bool) -> None:
        """Set what is kept for the backward pass and what is compiled; no result depends on it."""

    def disable_noise(self) -> None:
        """Draw no random numbers in training mode; DropPath and Dropout are set by the caller."""


class Prototypes(NamedTuple):
    """K vectors of `length` along `direction`, not multiplied out: that would be two passes over
    the largest matrix of a head. `length` None: `direction` as it is.
    """

    direction: Float[Tensor, "K E"]
    length: Float[Tensor, "K 1"] | None = None

    def scale(self) -> Float[Tensor, "K 1"] | None:
        """What `direction` is to be multiplied by; None: nothing."""
        if self.length is None:
            return None
        norms: Tensor = torch.linalg.vector_norm(self.direction, dim=1, keepdim=True)
        return self.length / norms

    def rows(self) -> Float[Tensor, "K E"]:
        """P, multiplied out: for tests and probes only."""
        scale = self.scale()
        return self.direction if scale is None else self.direction * scale


class Scores(NamedTuple):
    """Student crops before the prototypes: row norms of `z` are 1."""

    z: Float[Tensor, "S n E"]
    prototypes: Prototypes

    def logits(self) -> Float[Tensor, "S n K"]:
        """z·Pᵀ, all of it at once: for tests and probes only."""
        return self.z @ self.prototypes.rows().T


class Targets(NamedTuple):
    """The teacher's distributions q = exp(z·Pᵀ/temp + row + col), never stored: recomputed where
    they are needed.

    `pairs[t, s]` weighs the cross-entropy of student crop s against teacher crop t, `weight` the
    images.
    """

    z: Float[Tensor, "T n E"]
    prototypes: Prototypes
    row: Float[Tensor, "T n"]
    col: Float[Tensor, "K"]
    temp: float
    pairs: Float[Tensor, "T S"]
    weight: Float[Tensor, "n"]

    def probs(self) -> Float[Tensor, "T n K"]:
        """q, all of it at once: for tests and probes only."""
        logits = self.z @ self.prototypes.rows().T
        return (logits / self.temp + self.row[..., None] + self.col).exp()

    def part(self, start: int, stop: int) -> Targets:
        """Images start to stop (exclusive), their weights as in the whole batch."""
        cut = slice(start, stop)
        return self._replace(z=self.z[:, cut], row=self.row[:, cut], weight=self.weight[cut])


class Anchor(NamedTuple):
    """Patches of the G global crops of n images as another network has them, on the student's grid,
    and what each image weighs: the relations among them are held (Gram anchoring).
    """

    patches: Float[Tensor, "G n P D"]
    weight: Float[Tensor, "n"]

    def part(self, start: int, stop: int) -> Anchor:
        """Images start to stop (exclusive), their weights as in the whole batch."""
        cut = slice(start, stop)
        return Anchor(self.patches[:, cut], self.weight[cut])


class Match(NamedTuple):
    """The student's outputs and what they are compared with: the one argument of a loss.

    Both are whatever the losses that read this match understand: `Scores` or `Tokens`, against
    `Targets` or an `Anchor`, or types of a method's own. Tokens of several crops of each image are
    crop-major: rows "G*n".
    """

    student: object
    target: object


@runtime_checkable
class Divisible(Protocol):
    """What is made for a whole batch; `part` is that of images start to stop (exclusive)."""

    def part(self, start: int, stop: int) -> Any: ...


StepOutputs = dict[str, Match]  # a loss whose match is missing is not active yet
StepTargets = dict[str, Divisible]


class Loss:
    """One term of the objective. Abstract.

    `reads` names the Match it takes, one of the method's `provides`. With `cls_only` the loss needs
    no patches of the `Tokens` it reads: the forward pass may skip them.
    """

    cls_only: ClassVar[bool] = False

    reads: str
    weight: Schedule

    @staticmethod
    def mixes_images(settings: Mapping[str, Any]) -> bool:
        """Whether the result depends on which images share a micro-batch, given the constructor's
        keywords.
        """
        return False

    def __call__(self, match: Match) -> Float[Tensor, ""]:
        """The mean over images, unweighted."""
        raise NotImplementedError


class Evaluation:
    """Measures a frozen backbone on a data set; knows no method. Abstract.

    `num_blocks`: how many of the last blocks it reads. `has_baselines`: whether its number means
    something for raw pixels and untrained networks.
    """

    num_blocks: int = 1
    has_baselines: bool = True

    def __call__(self, backbone: Backbone, store: Any) -> dict[str, Any]:
        """The result (`eval.results.result`) on the features and images of a `FeatureStore`."""
        raise NotImplementedError

    def draw(self, backbone: Backbone, store: Any, path: Path) -> None:
        """Write a picture of the result to `path`; evaluations without one leave this alone."""
        raise NotImplementedError
