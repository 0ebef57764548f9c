"""Sides of a measurement: each in a process of its own, stepped from outside, one at a time.

So that memory, allocator and threads are each side's own. Ours is what `dino-lite pretrain` builds
from a planned configuration; the other one is plain_step.py.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import plain_step
import torch
from plain_step import PlainStep
from torch import Tensor

from dino_lite.commands.pretrain import build
from dino_lite.config import Config, compose, get, instantiate, put
from dino_lite.contracts import Crops, Facts, Progress, Splits
from dino_lite.machine import keep_freed_memory
from dino_lite.methods.method import Method
from dino_lite.methods.step import Step
from dino_lite.plan import gather_facts, plan
from dino_lite.runs import Run

NUM_BATCHES = 2  # prepared, taken in turns


class Setup(NamedTuple):
    """What is trained on what; sizes of crops in pixels."""

    name: str
    backbone: str  # timm's name, or "vit" for a tiny one
    patch_size: int
    global_size: int
    local_size: int
    num_local: int
    num_prototypes: int
    batch_size: int
    hidden_dim: int = 2048
    bottleneck_dim: int = 256


class SideError(Exception):
    """A side could not go on: which one, of what, and why."""


def accelerator() -> str:
    """What is measured here: the GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


# --------------------------------------------------------------------------------- building a side


def planned(setup: Setup, precision: str = "auto", *more: str) -> tuple[Config, Facts, Splits]:
    """A run's configuration of these sizes with the arithmetic of the published code, planned for
    this machine; rates, momentum and temperature stand still, and no path is dropped.
    """
    sizes = {
        "backbone.name": setup.backbone,
        "backbone.patch_size": setup.patch_size,
        "backbone.drop_path": 0.0,
        "augment.global_size": setup.global_size,
        "augment.local_size": setup.local_size,
        "augment.num_local": setup.num_local,
        "method.head.num_prototypes": setup.num_prototypes,
        "method.head.hidden_dim": setup.hidden_dim,
        "method.head.bottleneck_dim": setup.bottleneck_dim,
        "loader.batch_size": setup.batch_size,
        "loader.num_workers": 0,
        "data.num_train": 2 * setup.batch_size,
        "data.num_test": 0,
        "trainer.accelerator": accelerator(),
        "trainer.precision": precision,
        "trainer.max_steps": 1000,
        "optim.freeze_last_layer": 0.0,
        "optim.clip": plain_step.CLIP,
        "method.center_momentum": plain_step.CENTER_MOMENTUM,
        "loss.dino.student_temp": plain_step.STUDENT_TEMP,
    }
    if setup.backbone == "vit":
        sizes |= {"backbone.embed_dim": 32, "backbone.depth": 2, "backbone.num_heads": 2}
    overrides = [f"{key}={value}" for key, value in sizes.items()]
    config = compose("pretrain", ["data=shapes", "compat=dino", *overrides, *more])
    splits: Splits = instantiate(config["data"])
    facts = gather_facts(config, splits)
    config = plan(config, facts).config
    still = {
        "optim.learning_rate": plain_step.RATE,
        "optim.weight_decay": plain_step.DECAY,
        "method.momentum": plain_step.MOMENTUM,
        "method.teacher_temp": plain_step.TEACHER_TEMP,
    }
    for key, value in still.items():
        constant = {"_target_": "dino_lite.optim.schedules.Constant", "value": value}
        config = put(config, key, constant)
    return config, facts, splits


def build_ours(config: Config, facts: Facts, splits: Splits) -> tuple[Method, Step]:
    """The bare step of a run, on its device: what is built for the trainer, without the trainer."""
    run = Run(Path(tempfile.gettempdir()) / "dino_lite_bench")  # nothing is written there
    _, module, _ = build(config, facts, splits, run)
    module.to(facts.accelerator)
    return module.method, module.make_step(module.method, optimizer=module.configure_optimizers())


def save_student(setup: Setup, file: Path) -> None:
    """A fresh student of ours for the other side: the weights that every side of `setup` draws."""
    method, _ = build_ours(*planned(setup, "32", "trainer.accelerator=cpu"))
    student: Any = method.student
    torch.save({"spec": student.backbone.spec, "weights": student.state_dict()}, file)


def prepared_crops(setup: Setup, seed: int, device: torch.device) -> Crops:
    """Noise in the shape of a normalized batch."""
    generator = torch.Generator().manual_seed(seed)

    def noise(num: int, size: int) -> Tensor:
        shape = (num, setup.batch_size, 3, size, size)
        return torch.randn(shape, generator=generator).to(device)

    num_crops = 2 + setup.num_local
    return Crops(
        globals_=noise(2, setup.global_size),
        locals_=noise(setup.num_local, setup.local_size) if setup.num_local else None,
        index=torch.arange(setup.batch_size, device=device),
        labels=None,
        boxes=torch.zeros(num_crops, setup.batch_size, 4, device=device),
        draws=torch.zeros(num_crops, setup.batch_size, 11, device=device),
    )


# --------------------------------------------------------------------------------------- measuring


class Memory:
    """Peak of what this process takes beyond what it has when this is made, in bytes: of the GPU's
    memory where `device` is one, else resident (None where the system does not tell).
    """

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.base = _status("VmRSS") or 0

    def peak(self) -> int | None:
        """Bytes."""
        if self.on_gpu:
            return torch.cuda.max_memory_allocated() - self.base
        high = _status("VmHWM")
        return None if high is None else high - self.base


def _status(key: str) -> int | None:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def finish_work(device: torch.device) -> None:
    """Wait until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def machine() -> str:
    """The device's name, for tables and titles."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s'[: threads - 1]}"


# --------------------------------------------------------------------------------------- processes


def _serve(pipe: Any, setup: Setup, precision: str, student: Path | None) -> None:
    """A side: says when it stands, takes a step for each number, at None tells its memory."""
    try:
        device = torch.device(accelerator())
        batches = [prepared_crops(setup, seed, device) for seed in range(NUM_BATCHES)]
        make: Callable[[], Callable[[Crops, int], Any]]
        if student is None:
            make = functools.partial(_ours, *planned(setup, precision))
        else:
            start = torch.load(student, weights_only=True)
            make = functools.partial(_plain, **start, device=device, half=precision == "fp16")
        memory = Memory(device)
        step = make()
        pipe.send("ready")
        while (number := pipe.recv()) is not None:
            crops = batches[number % NUM_BATCHES]
            finish_work(device)
            started = time.perf_counter()
            loss = step(crops, number)
            finish_work(device)
            pipe.send((time.perf_counter() - started, float(loss)))
        pipe.send(memory.peak())
    except (EOFError, KeyboardInterrupt):
        sys.exit(1)
    except Exception as error:
        pipe.send(SideError(f"{type(error).__name__}: {error}".splitlines()[0]))


def _ours(config: Config, facts: Facts, splits: Splits) -> Callable[[Crops, int], Tensor]:
    if facts.accelerator == "cpu":
        keep_freed_memory()  # as a run does
    _, step = build_ours(config, facts, splits)
    return lambda crops, number: step(crops, Progress(number, 1000, 1000))["loss"]


def _plain(**start: Any) -> Callable[[Crops, int], float]:
    step = PlainStep(**start)
    return lambda crops, number: step(crop_list(crops))


def crop_list(crops: Crops) -> list[Tensor]:
    """All crops, the global ones first, as the plain step takes them."""
    return [*crops.globals_, *([] if crops.locals_ is None else crops.locals_)]


class Side:
    """A side in a process of its own: ours, or with a `student` saved by `save_student` the plain
    one. It gets ready while others do, until `wait` returns. As a context it ends with it.
    """

    def __init__(
        self, label: str, setup: Setup, precision: str, student: Path | None = None
    ) -> None:
        self.label = f"{label} of {setup.name}"
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, setup, precision, student)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def wait(self) -> None:
        """Until it is ready to step."""
        self._answer()

    def step(self, number: int) -> tuple[float, float]:
        """Take step `number`: its seconds and its loss."""
        self.pipe.send(number)
        seconds, loss = self._answer()
        return seconds, loss

    def memory(self) -> int | None:
        """Bytes at the peak, beyond those before the model was built. The last thing it does."""
        self.pipe.send(None)
        peak: int | None = self._answer()
        return peak

    def _answer(self) -> Any:
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            raise SideError(f"{self.label} died with exit code {code}: out of memory?") from None
        if isinstance(answer, SideError):
            raise SideError(f"{self.label}: {answer}")
        return answer

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()
        self.process.join(timeout=60)
        self.process.kill()


@functools.cache
def precision_of(setup: Setup) -> str:
    """What a run's `trainer.precision=auto` is on this machine."""
    return str(get(planned(setup)[0], "trainer.precision"))
