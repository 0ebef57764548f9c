"""The interfaces and data types that all parts of dino_lite share.

Dimensions in shapes: B images, G global crops, L local crops, S student crops (G+L), T teacher
crops (=G), N tokens, P patches, M masked patches, D feature width, E bottleneck width, K
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

from dino_lite.errors import Interrupted as Interrupted  # apart, since they need no torch
from dino_lite.errors import UserError as UserError

Trust = Sequence[str] | None  # packages that may be imported when a file names their code
Memory = Literal["high", "normal", "low"]  # how much is saved for the backward pass
LOGITS_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}  # limit of logits held at once


class MatchError(TypeError):
    """A loss reads a Match whose student or target it cannot compare."""


class Progress(NamedTuple):
    """Progress of a run in optimizer steps, or in ticks of the clock if it is timed."""

    step: float
    total: float
    steps_per_epoch: float

    @property
    def fraction(self) -> float:
        """Completed fraction of the run, in [0, 1]."""
        return min(1.0, self.step / max(self.total, 1))

    @property
    def epoch(self) -> int:
        """Index of the current epoch, from 0."""
        return int(self.step // max(self.steps_per_epoch, 1e-9))


@runtime_checkable
class Schedule(Protocol):
    """A scalar that depends on progress: a rate, weight decay, momentum, temperature or weight."""

    def __call__(self, at: Progress) -> float: ...


class Source(ABC):
    """A finite, ordered collection of images. Subclasses implement `__len__`, `read`, `name` and
    `digest`; all other members have defaults. Workers get a forked or pickled copy.
    """

    labels: Int[np.ndarray, "N"] | None = None  # indices into `classes`; -1: unlabeled
    classes: Sequence[str] = ()
    channels: int = 3  # to which `data.decode.decode` converts the files from `encoded`
    pixels: Any = None  # its other settings (`data.pixels.Pixels`); None: the defaults
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

    def turns(self, order: Int64[np.ndarray, "N"], epoch: int) -> Int64[np.ndarray, "N"]:
        """The images of an epoch, given the order of 0 … N-1 in it. The default is that order. A
        source that holds more images than an epoch shows gives each of them its turn: with numbers
        of N or more, which `read` and `name` take too.
        """
        return order

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
    """A data set. Pretraining reads `train` only; `test` is None where there is one split.

    `left_out`: sentences that count what `root` holds besides, each with the key that takes it in.
    `labels_from`: where the labels come from, or why there are none ("the folders cat, dog").
    """

    train: Source
    test: Source | None
    name: str
    left_out: tuple[str, ...] = ()
    labels_from: str = ""


class Crops(NamedTuple):
    """The multi-crop batch of one rank, crop-major. uint8 until `photometric.Normalize` converts it
    to floats on the device.

    `boxes`: top, left, height, width of each crop as fractions of its image. `draws`: the
    photometric parameters, with the columns `data.crops.COLUMNS`. `extra`: further crops by name.
    """

    globals_: Shaped[Tensor, "G B C H W"]
    locals_: Shaped[Tensor, "L B C h w"] | None
    index: Int[Tensor, "B"]  # type: ignore[assignment]  # hides tuple.index, which is unused
    labels: Int[Tensor, "B"] | None
    boxes: Float[Tensor, "S B 4"]
    draws: Float[Tensor, "S B A"]
    extra: dict[str, Tensor] = {}  # noqa: RUF012 - a NamedTuple's default, never modified

    @property
    def num_images(self) -> int:
        """B, the number of images in this rank's batch."""
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
    """A backbone's output for n images, after its last norm."""

    cls: Float[Tensor, "n D"]
    patches: Float[Tensor, "n P D"]
    registers: Float[Tensor, "n R D"] | None
    grid: tuple[int, int]  # rows, columns: P = rows * columns


class Traits(NamedTuple):
    """What automatic settings depend on, known from a backbone's settings before it is built.

    A backbone with batch normalization must set `mixes_images` (checked when a run starts): else a
    run that is out of memory would reduce its micro-batch size, which changes the results.
    """

    convolutional: bool = False  # use crops, patch size and learning rate of a ResNet
    small: bool = False  # defined by sizes, for a CPU; not a published model
    drop_path: bool = True  # has stochastic depth
    mixes_images: bool = False  # in training, by batch normalization
    names: tuple[str, str] | None = None  # the values of name=auto: on a CPU, on other devices


class Backbone(nn.Module):
    """Images to tokens. Abstract.

    `spec` holds the constructor's keywords as plain JSON, without those that affect training only:
    `type(self)(**spec)` builds the same network with new weights.
    """

    kind: ClassVar[str]  # identifies the class in files: module:Class, or a short name of ours
    spec: dict[str, Any]
    embed_dim: int
    patch_size: int
    in_chans: int
    num_blocks: int
    transform: Callable[..., Tensor]  # prepares images, of a backbone loaded from an export
    whole_patches: bool = True  # whether image sides must be multiples of the patch size
    takes_masks: bool = False  # whether `forward` takes a mask
    any_size: bool = False  # whether a graph traced with dynamic image sizes is exact at all sizes
    __call__: Callable[..., Tokens]

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "kind" not in vars(cls):
            cls.kind = f"{cls.__module__}:{cls.__qualname__}"

    @classmethod
    def traits(cls, **settings: Any) -> Traits:
        """Traits of a backbone with these settings, some of which may still be "auto"."""
        return Traits()

    def stored_spec(self) -> dict[str, Any]:
        """`spec` and `kind`, as stored in files and read by `build_backbone`."""
        return self.spec | {"kind": self.kind}

    def forward(
        self,
        images: Float[Tensor, "n C H W"],
        mask: Bool[Tensor, "n P"] | None = None,
        cls_only: bool = False,
    ) -> Tokens:
        """Tokens after the last norm; patches in `mask` are replaced by a learned token. With
        `cls_only`, patches need not be computed: they are then empty, P = 0.
        """
        raise NotImplementedError

    def intermediate(self, images: Float[Tensor, "n C H W"], blocks: list[int]) -> list[Tokens]:
        """Tokens after each of `blocks` (negative: from the end) and the last norm."""
        raise NotImplementedError

    def attention(self, images: Float[Tensor, "n C H W"]) -> Float[Tensor, "n heads N N"]:
        """Softmax attention of the last block."""
        raise NotImplementedError

    def depth_of(self, name: str) -> int:
        """Layer of the parameter `name`: 0 for the stem, i+1 for block i, num_blocks+1 after."""
        raise NotImplementedError

    def set_memory(self, memory: Memory, compiled: bool) -> None:
        """Set activation memory and compilation. Affects speed and memory only, not results."""

    def disable_noise(self) -> None:
        """Disable randomness in training mode; the caller handles DropPath and Dropout."""

    def fix_size(self, height: int, width: int) -> None:
        """Store what depends on the image size, such as resampled positions, as constants for
        images of this size, so that a traced graph does not compute it. Other sizes may then fail.
        """


class Prototypes(NamedTuple):
    """K vectors with norms `length` along `direction` (any norm), kept separate: multiplying them
    would take two passes over the largest matrix of a head. If `length` is None, the vectors are
    the rows of `direction`.
    """

    direction: Float[Tensor, "K E"]
    length: Float[Tensor, "K 1"] | None = None

    def scale(self) -> Float[Tensor, "K 1"] | None:
        """Factors by which rows of `direction` are multiplied to give P; None: no scaling."""
        if self.length is None:
            return None
        norms: Tensor = torch.linalg.vector_norm(self.direction, dim=1, keepdim=True)
        return self.length / norms

    def rows(self) -> Float[Tensor, "K E"]:
        """P as one matrix: for tests and diagnostics only."""
        scale = self.scale()
        return self.direction if scale is None else self.direction * scale


class Scores(NamedTuple):
    """Bottleneck vectors `z` of student crops, with unit norms, and the student's prototypes."""

    z: Float[Tensor, "S n E"]
    prototypes: Prototypes

    def logits(self) -> Float[Tensor, "S n K"]:
        """z·Pᵀ as one tensor: for tests and diagnostics only."""
        return self.z @ self.prototypes.rows().T


class Targets(NamedTuple):
    """The teacher's distributions q = exp(z·Pᵀ/temp + row + col), recomputed when needed instead of
    stored.

    `pairs[t, s]` is the weight of the cross-entropy of student crop s with teacher crop t, `weight`
    that of each image.
    """

    z: Float[Tensor, "T n E"]
    prototypes: Prototypes
    row: Float[Tensor, "T n"]
    col: Float[Tensor, "K"]
    temp: float
    pairs: Float[Tensor, "T S"]
    weight: Float[Tensor, "n"]

    def probs(self) -> Float[Tensor, "T n K"]:
        """q as one tensor: for tests and diagnostics only."""
        logits = self.z @ self.prototypes.rows().T
        return (logits / self.temp + self.row[..., None] + self.col).exp()

    def part(self, start: int, stop: int) -> Targets:
        """Images start to stop (exclusive), their weights as in the whole batch."""
        cut = slice(start, stop)
        return self._replace(z=self.z[:, cut], row=self.row[:, cut], weight=self.weight[cut])


class Anchor(NamedTuple):
    """Targets of Gram anchoring: another network's patches of the G global crops of n images, on
    the student's grid, and the weight of each image.
    """

    patches: Float[Tensor, "G n P D"]
    weight: Float[Tensor, "n"]

    def part(self, start: int, stop: int) -> Anchor:
        """Images start to stop (exclusive), their weights as in the whole batch."""
        cut = slice(start, stop)
        return Anchor(self.patches[:, cut], self.weight[cut])


class Kept(NamedTuple):
    """Targets of retention: a frozen network's tokens of the G global crops of n images, patches on
    the student's grid, and the weight of each image.
    """

    cls: Float[Tensor, "G n D"]
    patches: Float[Tensor, "G n P D"]
    weight: Float[Tensor, "n"]

    def part(self, start: int, stop: int) -> Kept:
        """Images start to stop (exclusive), their weights as in the whole batch."""
        cut = slice(start, stop)
        return Kept(self.cls[:, cut], self.patches[:, cut], self.weight[cut])


class Match(NamedTuple):
    """The student's outputs and their targets: the argument of a loss.

    `student` is `Scores` or `Tokens`, `target` is `Targets` or `Anchor`, or either is of a type
    that a method and its losses define. Tokens of several crops are crop-major: rows "G*n".
    """

    student: object
    target: object


@runtime_checkable
class Divisible(Protocol):
    """Targets of a whole batch; `part` selects those of images start to stop (exclusive)."""

    def part(self, start: int, stop: int) -> Any: ...


# A loss whose match is missing is not active yet. If several students are trained at once, each has
# its own matches, "STUDENT/MATCH", and every loss is applied to each student.
StepOutputs = dict[str, Match]
StepTargets = dict[str, Divisible]


class Loss:
    """One term of the objective. Abstract.

    `reads` is the name of its Match, one of the method's `provides`. With `cls_only` the loss does
    not use patches of the `Tokens` it reads, so the forward pass may skip them.
    """

    cls_only: ClassVar[bool] = False

    reads: str
    weight: Schedule

    @staticmethod
    def mixes_images(settings: Mapping[str, Any]) -> bool:
        """Whether the result depends on how images are grouped in micro-batches, given the
        constructor's keywords.
        """
        return False

    def __call__(self, match: Match) -> Float[Tensor, ""]:
        """The mean over images, unweighted."""
        raise NotImplementedError


class Penalty:
    """A term of the objective that reads weights instead of a Match. Abstract.

    `backbone` is the student's, `start` a frozen network of the same architecture.
    """

    weight: Schedule

    def __call__(self, backbone: Backbone, start: Backbone) -> Float[Tensor, ""]:
        """The unweighted penalty."""
        raise NotImplementedError


class Evaluation:
    """Measures a frozen backbone on a data set, independent of the method. Abstract.

    `num_blocks`: number of last blocks it reads. `has_baselines`: whether its result is meaningful
    for raw pixels and untrained networks.
    """

    num_blocks: int = 1
    has_baselines: bool = True

    def __call__(self, backbone: Backbone, store: Any) -> dict[str, Any]:
        """The result (`eval.results.result`) on the features and images of a `FeatureStore`."""
        raise NotImplementedError

    def draw(self, backbone: Backbone, store: Any, path: Path) -> None:
        """Write a picture of the result to `path`. Optional: override to provide one."""
        raise NotImplementedError
