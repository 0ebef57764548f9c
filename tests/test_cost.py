"""What a run will cost: products, memory and time, told from its configuration."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from dino_lite.runs.begin import build_method
from dino_lite.runs.build import build_module
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dino_lite import cost
from dino_lite.backbones.blocks import set_memory
from dino_lite.config import Config, compose, put
from dino_lite.contracts import Crops, Progress
from dino_lite.cost import memory, work
from dino_lite.estimate import EFFICIENCY, Estimate, peak_memory, predict, step_seconds
from dino_lite.machine import Facts
from dino_lite.methods.step import Step
from dino_lite.peaks import Peaks, free_memory, measure_peaks
from dino_lite.planning.plan import plan
from dino_lite.sizes import Group, Head, Sizes, sizes
from test_conf import EXPERIMENTS, facts
from tiny import tiny, tiny_command, train

LAPTOP = Peaks(product=8e10, wide=8e10, copy=1.6e10, call=2e-6, memory=16 * 2**30)
GPU = Peaks(product=8e14, wide=5e13, copy=4e12, call=4e-6, memory=139 * 2**30)
# LayerScale, registers and gated MLPs
DINOV2 = ("backbone.init_values=0.1", "backbone.num_registers=4", "backbone.mlp=swiglu")
AT = Progress(50, 1000, 10)
SHAPES = {"source": "shapes", "num_images": 400, "height": 32, "width": 32}
# wide enough that what is left out does not show
# paths dropped by the batch: three of four crops remain, a whole number here
PARTS = (
    *("backbone.drop_path=0.25", "backbone.drop_path_by=batch"),
    "backbone.drop_path_uniform=true",
)
WIDER = ("backbone.embed_dim=64", "backbone.depth=3", "method.head.num_prototypes=512")
MASKED = ("method=dinov2", *WIDER, "method.patch_head.num_prototypes=1024")
DEEP = (*WIDER, "backbone.depth=6", "augment.global_size=64")
SIM = ("method=simdino", *WIDER[:2], "method.head.num_prototypes=0")
UNMASKED = ("method=dinov2", *WIDER, "method.masking=null", "~loss.ibot")
ANCHORED = ("method=dinov3", "method.gram.start_step=0.0", "augment.gram_size=32", *MASKED[1:])


def planned(*overrides: str, **changes: object) -> tuple[Config, Facts]:
    """A tiny run, settled."""
    known = facts(**(SHAPES | changes))
    if any(override.startswith("method=") for override in overrides):
        config = compose("pretrain", tiny_command(Path("runs"), *overrides))
    else:
        config = tiny(Path("runs"), *overrides)
    return plan(config, known).config, known


def build(config: Config) -> tuple[Step, Crops]:
    """Its real step, after the first (which makes the optimizer's state), and noise for it."""
    augment, num = config["augment"], config["loader"]["batch_size"]
    large, small, num_local = (augment[k] for k in ("global_size", "local_size", "num_local"))
    step = build_module(config, facts(**SHAPES)).bare_step()
    gram_size = augment["gram_size"]
    crops = Crops(
        globals_=torch.randn(2, num, 3, large, large),
        locals_=torch.randn(num_local, num, 3, small, small),
        index=torch.arange(num),
        labels=None,
        boxes=torch.zeros(2 + num_local, num, 4),
        draws=torch.zeros(2 + num_local, num, 1),
        extra={"gram": torch.randn(2, num, 3, gram_size, gram_size)} if gram_size else {},
    )
    step(crops, AT)
    return step, crops


def read(config: Config) -> Sizes:
    """Its sizes, which are known."""
    size = sizes(config)
    assert size is not None
    return size


@pytest.mark.parametrize(
    "overrides",
    [
        *((), WIDER, ("trainer.micro_batch_size=3",), (*WIDER, *DINOV2), (*WIDER, *PARTS)),
        *(MASKED, (*MASKED, "method.patch_head=null"), ANCHORED, UNMASKED, SIM),
        (*WIDER, "trainer.memory=low"),  # blocks are made again
        (*MASKED, "augment.global_size=64", "method.patch_head.num_prototypes=8192"),
        (*MASKED, "augment.global_size=64", "method.patch_head.hidden_dim=1024"),
        (*ANCHORED, "backbone.patch_size=4", "augment.global_size=64", "augment.gram_size=64"),
    ],
)
def test_products_are_those_that_torch_counts(
    overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FLOPs of a real step within 2 %: left out are the loss's mixing of E numbers a pair, and the
    resampling of positions.
    """
    config, _ = planned(*overrides)
    step, crops = build(config)
    if config["trainer"]["memory"] != "low":
        set_memory(step.method, "high", False)  # torch's counter fails at slopes within slopes
    # torch counts no fused attention on a CPU; written out, it costs twice as much backward
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(crops, AT)
    monkeypatch.setattr(cost, "BLOCK", cost.BLOCK._replace(attention_backward=2.0))
    assert work(read(config)).flops == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_weights_are_counted_exactly() -> None:
    """Every weight of student and teacher, those that are trained, and their tensors."""
    config, _ = planned()
    method, size = build_method(config), read(config)
    student = list(method.student.parameters())
    trained = [p for p in student if p.requires_grad]
    assert size.num_student == sum(p.numel() for p in student)
    assert (size.num_trained, size.num_tensors) == (sum(p.numel() for p in trained), len(trained))
    assert size.num_teacher == sum(p.numel() for p in method.teachers.parameters())


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that were alive after any operation."""

    def __init__(self, *known: Any) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self.look(known)

    def look(self, tree: Any) -> None:
        """Count the tensors in `tree`."""
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.look((args, kwargs or {}, out))
        return out


@pytest.mark.parametrize(
    "overrides",
    [
        ("loader.batch_size=32", "augment.global_size=32", *WIDER),  # activations are most of it
        ("loader.batch_size=32", "augment.global_size=32", *WIDER, *DINOV2),
        ("loader.batch_size=32", "augment.global_size=32", *WIDER, *PARTS),
        ("loader.batch_size=32", "augment.global_size=32", *WIDER, *DINOV2, "trainer.memory=high"),
        ("loader.batch_size=32", "augment.global_size=64", *WIDER, "trainer.memory=low"),
        ("method.head.num_prototypes=32768",),  # prototypes are
        ("method.head.hidden_dim=2048",),  # the head's weights are
        ("loader.batch_size=64", "trainer.micro_batch_size=4"),  # the teacher's pass is
        (*MASKED, "augment.global_size=32"),
        (*MASKED, "augment.global_size=32", "trainer.micro_batch_size=4"),
        (*MASKED, "method.head.num_prototypes=32768"),
        (*ANCHORED, "augment.global_size=32", "augment.gram_size=64"),
        (*SIM, "augment.global_size=32"),
        (*DEEP, *DINOV2),  # what LayerScale takes in
        (*DEEP, "backbone.num_heads=8"),  # attention weights
        (*DEEP, "method=dinov3"),  # turned queries and keys
        (*DEEP, "method=dinov3", "trainer.memory=low"),
        (*DEEP, "method=dinov2", "trainer.precision=bf16"),
        (*ANCHORED, "backbone.patch_size=4", "augment.global_size=64", "augment.gram_size=64"),
        (*ANCHORED, "augment.gram_size=128"),  # the Gram teacher's pass
        (*MASKED, "augment.global_size=64", "method.patch_head.num_prototypes=16384"),
    ],
)
def test_memory_is_that_of_the_tensors_of_a_step(overrides: tuple[str, ...]) -> None:
    """Peak of the bytes alive in a real step within 15 %, whatever takes most of it."""
    config, _ = planned("loader.batch_size=16", *overrides)
    step, crops = build(config)
    state = [crops, list(step.method.parameters()), list(step.method.buffers())]
    state += [list(values.values()) for values in step.optimizer.state.values()]
    state += [[p.grad for group in step.clip_groups for p in group]]
    live = LiveBytes(state)
    del state  # the last step's gradients go when this one begins
    with live:
        step(crops, AT)
    moments = memory(read(config))
    told = moments.pop("stays") + max(moments.values())
    assert told == pytest.approx(live.peak, rel=0.15)


def test_a_last_block_of_the_class_token_needs_keys_and_values_of_all_and_the_rest_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its products, counted by hand for 5 tokens of 32 and a hidden width of 128; and less kept."""
    config, _ = planned("backbone.depth=1")
    size = read(config)
    monkeypatch.setattr(cost, "BLOCK", cost.BLOCK._replace(class_token_last=False))
    before = memory(size)["backward"]
    monkeypatch.setattr(cost, "BLOCK", cost.BLOCK._replace(class_token_last=True))
    keys_and_values, query_and_out, mlp = 5 * 2 * 32**2, 2 * 32**2, 2 * 32 * 128
    layers, attention = cost._block_flops(size, 5, False)
    assert layers == 2 * (keys_and_values + query_and_out + mlp)
    assert attention == pytest.approx(2 * 2 * 5 * 32)  # one row of weights, and what it picks
    assert memory(size)["backward"] < before


def test_registers_layer_scale_and_gates_are_counted() -> None:
    """Tokens of every crop, both halves of a gated MLP, and what LayerScale keeps."""
    plain, dinov2 = (read(planned(*overrides)[0]) for overrides in ((), DINOV2))
    for before, after in zip(plain.groups, dinov2.groups, strict=True):
        assert after == before._replace(num_tokens=before.num_tokens + 4)
    assert (plain.hidden, dinov2.hidden) == (128, 2 * 88)  # of 32: eights above 2/3 of 128
    assert dinov2.layer_scale
    assert not plain.layer_scale
    kept = [cost.kept_bytes(dinov2._replace(layer_scale=scaled)) for scaled in (False, True)]
    tokens = sum(group.num_crops * group.num_tokens for group in dinov2.groups)
    per_token = 2 * 32 * dinov2.float_bytes * (dinov2.depth - 1)  # the last block's are one token's
    assert kept[1] - kept[0] == dinov2.num_images * tokens * per_token


def test_a_large_network_is_read_without_its_memory() -> None:
    """A ViT-H of 2.5 GB of weights, and a head of 0.7, take nothing worth mentioning, and no random
    number.
    """
    config, _ = planned(
        *("backbone.name=vit_huge_patch14_224", "backbone.patch_size=14", "loader.batch_size=2"),
        *("augment.global_size=224", "augment.local_size=98", "backbone.embed_dim=null"),
        *("backbone.depth=null", "backbone.num_heads=null", "backbone.image_size=224"),
        *("method.head.num_prototypes=262144", "method.head.bottleneck_dim=256"),
    )
    state, before = torch.random.get_rng_state(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = read(config)
    assert (size.width, size.depth, size.num_heads, size.hidden) == (1280, 32, 16, 5120)
    assert size.num_student == pytest.approx(630e6 + 67e6, rel=0.01)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert torch.equal(torch.random.get_rng_state(), state)


def spent(size: Sizes) -> tuple[float, ...]:
    """What may only grow."""
    seconds = [step_seconds(work(size), p, EFFICIENCY["cpu"]) for p in (LAPTOP, GPU)]
    return (*work(size), *seconds, peak_memory(size, EFFICIENCY["cuda"]))


SMALL = st.integers(1, 12)


@settings(max_examples=60)
@given(
    images=st.integers(1, 600),
    micro=st.integers(1, 600),
    num_local=SMALL,
    large=SMALL,
    small=SMALL,
    prototypes=st.integers(1, 200_000),
    on_cpu=st.booleans(),
    which=st.sampled_from(["images", "num_local", "large", "small", "prototypes"]),
    more=st.integers(1, 50),
)
def test_more_of_anything_never_costs_less(which: str, more: int, **numbers: Any) -> None:
    """Images, crops, resolution and prototypes each add to products, bytes, time and memory."""

    def size(numbers: dict[str, Any]) -> Sizes:
        sides = (2, numbers["large"]), (numbers["num_local"], numbers["small"])
        weights = numbers["prototypes"] * 256
        return Sizes(
            num_images=numbers["images"],
            micro_batch_size=min(numbers["micro"], numbers["images"]),
            groups=tuple(Group(num, side**2 + 1, 3 * (16 * side) ** 2) for num, side in sides),
            width=384,
            depth=12,
            num_heads=6,
            hidden=1536,
            block_weights=12 * 384**2,
            last_weights=4 * 384**2,
            heads=(
                Head((384, 2048, 2048, 256), numbers["prototypes"], 2 + numbers["num_local"], 2),
            ),
            num_entries=weights,
            num_student=27_000_000 + weights,
            num_trained=27_000_000 + weights,
            num_teacher=27_000_000 + weights,
            num_tensors=158,
            wide_bytes=4,
            float_bytes=2,
            on_cpu=numbers["on_cpu"],
            memory="normal",
        )

    before, after = spent(size(numbers)), spent(size(numbers | {which: numbers[which] + more}))
    assert all(a >= b * (1 - 1e-9) for a, b in zip(after, before, strict=True))


def test_micro_batches_and_bfloat16_need_less_memory() -> None:
    """The two ways out that a user has."""
    config, _ = planned("loader.batch_size=64", "augment.global_size=64")
    size, share = read(config), EFFICIENCY["cpu"]
    assert peak_memory(size._replace(micro_batch_size=8), share) < 0.7 * peak_memory(size, share)
    assert peak_memory(size._replace(float_bytes=2), share) < 0.8 * peak_memory(size, share)


@pytest.mark.parametrize("accelerator", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_gets_an_estimate(experiment: str, accelerator: str) -> None:
    """On a laptop and on a GPU: a length, a rate and a memory, all of them positive; none for a
    convolutional network.
    """
    known = facts(accelerator=accelerator, num_devices=8, bf16=accelerator == "cuda")
    config = compose("pretrain", [f"experiment={experiment}", f"trainer.accelerator={accelerator}"])
    config = plan(config, known).config
    if config["backbone"]["_target_"] == "dino_lite.backbones.convnet.ConvNet":
        assert sizes(config) is None
        return
    told = told_of(config, known, LAPTOP._replace(memory=2**50))
    numbers = [value for value in told if isinstance(value, int | float) and value is not False]
    assert len(numbers) >= 10
    assert min(numbers) > 0
    assert json.loads(json.dumps(told._asdict())) == told._asdict()


def told_of(config: Config, known: Facts, peaks: Peaks) -> Estimate:
    """The estimate."""
    return predict(config, known, read(config), peaks)


def test_a_run_of_epochs_is_told_its_time_and_a_timed_run_its_steps() -> None:
    """The line names what is not given, and follows from the images a second."""
    config, known = planned("trainer.max_steps=null", "trainer.max_epochs=100")
    told = told_of(config, known, LAPTOP)
    assert (told.num_steps, told.num_epochs) == (5000, 100)
    assert told.seconds == pytest.approx(5000 * told.seconds_per_step)
    assert re.fullmatch(
        r"estimate: 100 epochs, 5,000 steps ≈ \d+ s at [\d,]+ images/s, [\d.]+ MiB of memory on "
        r"cpu \(of the steps alone: .*\)",
        told.line(),
    )
    config, known = planned(
        "trainer.max_steps=null", "trainer.max_time=30m", "optim.freeze_last_layer=0.1"
    )
    told = told_of(config, known, LAPTOP)
    assert told.num_steps == pytest.approx(1800 / told.seconds_per_step, abs=1)
    assert told.num_epochs == pytest.approx(told.num_steps * 8 / 400)
    assert re.match(r"estimate: 30 min ≈ [\d,]+ steps, [\d,]+ epochs at ", told.line())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"num_epochs": 100.0, "num_steps": 12_500, "seconds": 31 * 3600.0},
            "estimate: 100 epochs, 12,500 steps ≈ 31 h at 410 images/s, 11 GiB of memory on NVIDIA "
            "H200 (",
        ),
        (
            {"timed": True, "num_devices": 8, "num_steps": 1, "num_epochs": 0.05, "seconds": 90.0},
            "estimate: 90 s ≈ 1 step, 0.05 epochs at 410 images/s, 11 GiB of memory each on 8 × "
            "NVIDIA H200 (",
        ),
        ({"num_epochs": 1.0, "num_steps": 2, "seconds": 9e6}, "estimate: 1 epoch, 2 steps ≈ 100 d"),
    ],
)
def test_the_line_is_a_sentence(changes: dict[str, Any], expected: str) -> None:
    """Numbers as people say them, with no more digits than are known."""
    plain = Estimate(
        device="NVIDIA H200",
        num_devices=1,
        seconds_per_step=1.0,
        images_per_second=412.3,
        flops_per_image=1e9,
        num_steps=1,
        num_epochs=1.0,
        seconds=1.0,
        timed=False,
        memory=11 * 2**30,
        free_memory=139 * 2**30,
        fitting=8,
    )
    assert plain._replace(**changes).line().startswith(expected)


def test_too_little_memory_is_said_with_a_micro_batch_that_fits() -> None:
    """The warning names a size that has room, or a way out where no size has."""
    config, known = planned("loader.batch_size=64", "augment.global_size=64")
    share = EFFICIENCY["cpu"]
    needed = peak_memory(read(config), share)
    enough = told_of(config, known, LAPTOP._replace(memory=needed))
    assert enough.warning(config) is None
    short = told_of(config, known, LAPTOP._replace(memory=int(0.7 * needed)))
    assert short.fitting is not None
    fits = peak_memory(read(put(config, "trainer.micro_batch_size", short.fitting)), share)
    assert fits <= short.free_memory
    warning = short.warning(config)
    assert warning is not None
    assert f"try trainer.micro_batch_size={short.fitting} or trainer.memory=low." in warning
    none = told_of(config, known, LAPTOP._replace(memory=2**10)).warning(config)
    assert none is not None
    assert "a smaller backbone" in none
    assert "micro_batch_size" not in none
    low = put(config, "trainer.memory", "high")
    assert "trainer.memory=low" in (short.warning(low) or "")


def test_a_method_whose_cost_is_not_known_gets_no_estimate() -> None:
    """Somebody's own method trains without one."""
    config, _ = planned()
    assert sizes(put(config, "method._target_", "somebody.Method")) is None
    assert sizes(put(config, "backbone._target_", "somebody.Network")) is None


@pytest.mark.parametrize("precision", ["32", "64"])
def test_peaks_are_measured_and_leave_the_random_state_alone(precision: str) -> None:
    """Positive numbers of a plausible size."""
    state = torch.random.get_rng_state()
    peaks = measure_peaks("cpu", precision, 64)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert 1e8 < peaks.product < 1e14
    assert 1e8 < peaks.copy < 1e13
    assert 1e-8 < peaks.call < 1e-2
    assert peaks.wide == peaks.product
    assert 2**20 < free_memory("cpu") < 2**50


def test_a_run_prints_its_estimate_and_keeps_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One line before the first step, and the numbers in environment.json."""
    run = train(tmp_path, "trainer.max_steps=2", "callbacks=null")
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("estimate: ")]
    assert len(lines) == 1
    kept = json.loads((run / "environment.json").read_text())["estimate"]
    assert "2 steps ≈ " in lines[0]
    assert Estimate(**kept).line() == lines[0]
