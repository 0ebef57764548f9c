"""The keys of a configuration: groups without a `_target_`, and keys of all commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

from torch.optim import Optimizer

from dino_lite.contracts import Backbone, Evaluation, Loss, Memory, Penalty, Schedule
from dino_lite.data.stage_data import Replayed
from dino_lite.eval.embedder import Dtype, Feature
from dino_lite.eval.feature_files import FileFormat
from dino_lite.eval.tradeoff import Promise
from dino_lite.formats.format import Format
from dino_lite.formats.plain import Layout
from dino_lite.methods.clock import seconds
from dino_lite.methods.method import Method
from dino_lite.optim.param_groups import ClipBy, FreezeBy
from dino_lite.optim.schedules import RateRule, Span
from dino_lite.settings.kinds import (
    Count,
    Fraction,
    Must,
    NonNegative,
    Positive,
    Share,
    Size,
    Values,
)

# Number of images that each name of `preset` stands for.
PRESETS = {"tiny": 2_000, "small": 20_000, "medium": 200_000, "large": 1_280_000}

Accelerator = Literal["cpu", "cuda", "gpu", "mps"]  # gpu: cuda
Node = Callable[..., Any]  # a group with a _target_
Preset = Annotated[
    int | str,
    Must(
        f"one of {', '.join(PRESETS)}, or a number of images",
        lambda size: size in PRESETS or (isinstance(size, int) and size > 0),
    ),
]
Precision = Annotated[
    int | str,
    Must("32, bf16 or 64 (fp16 overflows in DINO)", lambda kind: str(kind) in ("32", "bf16", "64")),
]
Duration = Annotated[
    float | str, Must('a positive time as "90s", "30m" or "2h"', lambda time: seconds(time) > 0)
]


class Trainer(NamedTuple):
    """The group `trainer`: device, length, precision and speed of a run.

    Defaults of a group apply to runs saved before the key existed, and give the old behavior.
    """

    accelerator: Accelerator
    devices: Size = 1
    num_nodes: Size = 1
    max_epochs: Positive | None = None
    max_steps: Size | None = None
    max_time: Duration | None = None
    precision: Precision = "32"
    num_threads: Size = 1
    micro_batch_size: Count = 0
    memory: Memory = "normal"
    compile: bool = False


class Loader(NamedTuple):
    """The group `loader`: how images are read and batched."""

    batch_size: Size
    num_workers: Count = 0
    draft: bool = False
    max_bad_fraction: Fraction = 0.05


class Optim(NamedTuple):
    """The group `optim`: the optimizer, its schedules and parameter groups, and clipping."""

    optimizer: Callable[[list[dict[str, Any]]], Optimizer]
    rate: NonNegative
    rate_rule: RateRule
    learning_rate: Annotated[Schedule, Values(NonNegative)]
    weight_decay: Annotated[Schedule, Values(NonNegative)]
    rate_scale: NonNegative = 1.0
    decay_tokens: bool = False
    layer_decay: Share = 1.0
    patch_embed_scale: NonNegative = 1.0
    last_blocks: Size | None = None
    freeze_backbone: Span = 0.0
    backbone_ramp: Span = 0.0
    clip: NonNegative = 3.0
    clip_by: ClipBy = "global"
    freeze_last_layer: Span = 0.0
    freeze_by: FreezeBy = "gradient"
    max_skipped: Size = 20


class Teacher(NamedTuple):
    """The group `teacher` of a stage: a frozen network to learn from or to hold on to."""

    checkpoint: str  # whatever `checkpoint=` of the commands takes
    digest: str | None = None  # of its content; null: determined when the stage begins


class Distill(NamedTuple):
    """The group `distill` of its command."""

    chain: bool = False
    teacher_size: Size | None = None
    export: bool = True


class Generations(TypedDict, total=False):
    """The key with which `pretrain` trains several runs; that of one run is 1."""

    generations: Size


class Start(TypedDict, total=False):
    """Keys of the group `backbone` that are not arguments of the backbone's class."""

    pretrained: str | None


class Replay(TypedDict, total=False):
    """Keys of the group `keep` that are not arguments of what opens the data."""

    share: Replayed


class Settings(TypedDict, total=False):
    """Keys of all commands."""

    data: Node
    augment: Node
    normalize: Node
    backbone: Callable[..., Backbone]
    students: dict[str, Callable[..., Backbone]]
    adapter: Callable[[Backbone], None] | None
    generations: Annotated[int, Must("1 (several are trained by dino-lite pretrain)", (1).__eq__)]
    teacher: Teacher
    keep: Node
    stages: str | list[str] | None
    adapt: Promise
    method: Callable[[Backbone], Method]
    trainer: Trainer
    loader: Loader
    optim: Optim
    loss: dict[str, Loss | Penalty]
    eval: dict[str, Evaluation] | None
    callbacks: dict[str, Node | None] | None
    format: dict[str, Format]
    name: str
    runs_dir: str
    checkpoint: str | None
    trust: list[str] | str | None
    checkpoint_layout: Layout | None
    plan: Literal["short", "full"]
    preset: Preset
    seed: Count
    baselines: bool
    accelerator: Accelerator | Literal["auto"]
    features_dir: str | None
    image_size: Size | Literal["auto"]
    batch_size: Size
    num_workers: Count | Literal["auto"]
    features: Feature | list[Feature]
    blocks: int | list[int]
    splits: Literal["all", "train", "test"]
    file_format: FileFormat
    part_images: Size | Literal["auto"]
    dtype: Dtype
    unit_length: bool
    precision: Annotated[int | str, Must("32 or bf16", lambda kind: str(kind) in ("32", "bf16"))]
    max_images: Size | None
    draw: bool
    out: str | None
    license: str
    pack: str | None
    pictures: str | None


RECORDS = {
    "trainer": Trainer,
    "loader": Loader,
    "optim": Optim,
    "teacher": Teacher,
    "adapt": Promise,
}
