"""Sides of a measurement: separate processes that take steps on request, one at a time.

Memory, allocator and threads are thus separate. Our side is what `dino-lite pretrain` builds from a
planned configuration; the other one is plain_step.py.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import plain_step
import torch
from plain_step import PlainStep
from torch import Tensor

from dino_lite.config import Config, compose, get, instantiate, put
from dino_lite.contracts import Crops, Progress, Splits
from dino_lite.machine import Facts, keep_freed_memory
from dino_lite.methods.step import Step
from dino_lite.planning.plan import gather_facts, plan
from dino_lite.runs.build import build_module
from dino_lite.runs.timing import wait_for

NUM_BATCHES = 2  # prepared and used alternately


class Setup(NamedTuple):
    """Model and batch of a measurement; crop sizes in pixels."""

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
    """A side failed: which one, of which setup, and why."""


def accelerator() -> str:
    """The device to measure: the GPU, if any."""
    return "cuda" if torch.cuda.is_available() else "cpu"


# --------------------------------------------------------------------------------- building a side


def planned(setup: Setup, precision: str = "auto", *more: str) -> tuple[Config, Facts, Splits]:
    """A run's configuration of these sizes with the arithmetic of the published code, planned for
    this machine; rates, momentum and temperature are constant, and there is no drop path.
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


def build_ours(config: Config, facts: Facts) -> Step:
    """The bare step of a run, on its device: as built for the trainer, without the trainer."""
    return build_module(config, facts).to(facts.accelerator).bare_step()


def save_student(setup: Setup, file: Path) -> None:
    """Save a fresh student of ours for the other side, with the weights that our side draws."""
    config, facts, _ = planned(setup, "32", "trainer.accelerator=cpu")
    student: Any = build_ours(config, facts).method.student
    torch.save({"spec": student.backbone.spec, "weights": student.state_dict()}, file)


def noise_crops(config: Config, seed: int = 0) -> Crops:
    """Noise in the shape of a normalized batch of a planned configuration, on its device."""
    augment, num = config["augment"], config["loader"]["batch_size"]
    device, num_crops = config["trainer"]["accelerator"], 2 + augment["num_local"]
    generator = torch.Generator().manual_seed(seed)

    def noise(num_crops: int, size: int) -> Tensor:
        return torch.randn((num_crops, num, 3, size, size), generator=generator).to(device)

    return Crops(
        globals_=noise(2, augment["global_size"]),
        locals_=noise(augment["num_local"], augment["local_size"]) if num_crops > 2 else None,
        index=torch.arange(num, device=device),
        labels=None,
        boxes=torch.zeros(num_crops, num, 4, device=device),
        draws=torch.zeros(num_crops, num, 11, device=device),
    )


# --------------------------------------------------------------------------------------- measuring


class Memory:
    """Peak memory of this process above that at construction, in bytes: GPU memory if `device` is a
    GPU, else resident memory (None if the system does not report it).
    """

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # reset the peak
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
    """A side: reports when ready, takes a step per number, on None sends its memory and exits."""
    try:
        device = torch.device(accelerator())
        half = precision == "fp16"  # only for the plain side: our runs reject it
        config, facts, _ = planned(setup, "32" if half else precision)
        batches = [noise_crops(config, seed) for seed in range(NUM_BATCHES)]
        make: Callable[[], Callable[[Crops, int], Any]]
        if student is None:
            make = functools.partial(_ours, config, facts)
        else:
            start = torch.load(student, weights_only=True)
            make = functools.partial(_plain, **start, device=device, half=half)
        memory = Memory(device)
        step = make()
        pipe.send("ready")
        while (number := pipe.recv()) is not None:
            crops = batches[number % NUM_BATCHES]
            wait_for(device)
            started = time.perf_counter()
            loss = step(crops, number)
            wait_for(device)
            pipe.send((time.perf_counter() - started, float(loss)))
        pipe.send(memory.peak())
    except (EOFError, KeyboardInterrupt):
        sys.exit(1)
    except Exception as error:
        pipe.send(SideError(f"{type(error).__name__}: {error}".splitlines()[0]))


def _ours(config: Config, facts: Facts) -> Callable[[Crops, int], Tensor]:
    if facts.accelerator == "cpu":
        keep_freed_memory()  # as a run does
    step = build_ours(config, facts)
    return lambda crops, number: step(crops, Progress(number, 1000, 1000))["loss"]


def _plain(**start: Any) -> Callable[[Crops, int], float]:
    step = PlainStep(**start)
    return lambda crops, number: step(crop_list(crops))


def crop_list(crops: Crops) -> list[Tensor]:
    """All crops, the global ones first, as the plain step expects them."""
    return [*crops.globals_, *([] if crops.locals_ is None else crops.locals_)]


class Served:
    """Runs `serve(pipe, *arguments)` in a separate process that answers over the pipe: first that
    it is ready, then each question. It starts in parallel with others; `wait` returns when it is
    ready. As a context manager, ends the process on exit.
    """

    def __init__(self, label: str, serve: Callable[..., None], *arguments: Any) -> None:
        self.label = label
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def wait(self) -> None:
        """Wait until it is ready."""
        self._answer()

    def ask(self, question: Any) -> Any:
        """Send a question; returns the answer. None is the last question: its answer is the peak
        memory in bytes, above that before the work began.
        """
        self.pipe.send(question)
        return self._answer()

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()
        self.process.join(timeout=60)
        self.process.kill()


class Side(Served):
    """A side in a separate process: ours, or the plain one if given a `student` saved by
    `save_student`.
    """

    def __init__(
        self, label: str, setup: Setup, precision: str, student: Path | None = None
    ) -> None:
        super().__init__(f"{label} of {setup.name}", _serve, setup, precision, student)

    def step(self, number: int) -> tuple[float, float]:
        """Take step `number`; returns its seconds and its loss."""
        seconds, loss = self.ask(number)
        return seconds, loss

    def memory(self) -> int | None:
        """Peak memory in bytes, above that before the model was built. Ends the side."""
        peak: int | None = self.ask(None)
        return peak


@functools.cache
def precision_of(setup: Setup) -> str:
    """The value of a run's `trainer.precision=auto` on this machine."""
    return str(get(planned(setup)[0], "trainer.precision"))
