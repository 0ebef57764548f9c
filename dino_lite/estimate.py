"""How long a run will take and how much memory it needs, told before it starts."""

from __future__ import annotations

from typing import Any, NamedTuple

from dino_lite.config import Config
from dino_lite.cost import Work, memory, work
from dino_lite.machine import Facts
from dino_lite.peaks import Peaks, measure_peaks
from dino_lite.planning.checks import seconds
from dino_lite.sizes import Sizes, sizes


class Efficiency(NamedTuple):
    """Part of a peak that a real step reaches."""

    linear: float
    attention: float
    prototypes: float
    moved: float
    calls: float  # below 1: a real operation takes longer than the smallest one
    memory: float  # of what the system gives, the part that is needed
    overlaps: bool  # the host runs ahead of the device: the slower of both decides


EFFICIENCY = {
    # Measured: one thread of an AMD EPYC (Milan, AVX2), float32, scripts/measure_cost.py.
    "cpu": Efficiency(0.78, 0.3, 0.78, 0.37, 0.2, 0.75, False),
    # Not measured yet. Assumed: half of the peak in products, as well-tuned ViT training has on
    # other GPUs, and two thirds of the memory's speed.
    "cuda": Efficiency(0.5, 0.3, 0.5, 0.67, 0.3, 0.9, True),
    "mps": Efficiency(0.5, 0.3, 0.5, 0.67, 0.3, 0.9, True),
}


class Estimate(NamedTuple):
    """Of the steps of a run, everything else apart; plain JSON as a dict. Memory is of a device."""

    device: str
    num_devices: int
    seconds_per_step: float
    images_per_second: float  # of all devices
    flops_per_image: float
    num_steps: int
    num_epochs: float
    seconds: float  # of the whole run
    timed: bool  # the run is measured by the clock, and its length is no guess
    memory: int  # bytes
    free_memory: int
    fitting: int | None  # images a backward pass that the memory would do for; None: not even one

    def line(self) -> str:
        """One sentence."""
        rate = f"{_round(self.images_per_second)} images/s"
        epochs = f"{_round(self.num_epochs)} epoch"
        epochs += "" if epochs == "1 epoch" else "s"
        steps = f"{self.num_steps:,} step{'' if self.num_steps == 1 else 's'}"
        length = f"{epochs}, {steps} ≈ {_duration(self.seconds)} at {rate}"
        if self.timed:
            length = f"{_duration(self.seconds)} ≈ {steps}, {epochs} at {rate}"
        device = f"{self.num_devices} × {self.device}" if self.num_devices > 1 else self.device
        needed = f"{_size(self.memory)} of memory{' each' * (self.num_devices > 1)}"
        return (
            f"estimate: {length}, {needed} on {device} (of the steps alone: loading that is slower "
            "and evaluations add to it)"
        )

    def warning(self, config: Config) -> str | None:
        """What to do where the memory will not do; None where it will."""
        if self.memory <= self.free_memory:
            return None
        means = [f"trainer.micro_batch_size={self.fitting}"] if self.fitting else []
        means += ["trainer.memory=low"] if config["trainer"]["memory"] != "low" else []
        means += ["a smaller backbone or a smaller loader.batch_size"] if not self.fitting else []
        return (
            f"warning: a step needs about {_size(self.memory)} of memory and {self.device} has "
            f"{_size(self.free_memory)} free: try {' or '.join(means)}."
        )


def estimate(config: Config, facts: Facts) -> Estimate | None:
    """Of a planned configuration on this machine, whose peaks are measured for it in a fraction of
    a second; None where the cost of such a method is not known.
    """
    size = sizes(config)
    if size is None:
        return None
    precision = str(config["trainer"]["precision"])
    return predict(config, facts, size, measure_peaks(facts.accelerator, precision, size.width))


def predict(config: Config, facts: Facts, size: Sizes, peaks: Peaks) -> Estimate:
    """Pure: the same configuration, its sizes, facts and peaks give the same estimate."""
    trainer, share = config["trainer"], EFFICIENCY[facts.accelerator]
    ranks, batch_size = trainer["devices"] * trainer["num_nodes"], config["loader"]["batch_size"]
    cost = work(size)
    spent = step_seconds(cost, peaks, share)
    steps_per_epoch = facts.num_images / batch_size
    if trainer["max_time"] is not None:
        length = seconds(trainer["max_time"])
        num_steps = max(1, round(length / spent))
    else:
        num_steps = trainer["max_steps"] or max(1, round(trainer["max_epochs"] * steps_per_epoch))
        length = num_steps * spent
    return Estimate(
        device=facts.device_name,
        num_devices=ranks,
        seconds_per_step=spent,
        images_per_second=batch_size / spent,
        flops_per_image=cost.flops / size.num_images,
        num_steps=num_steps,
        num_epochs=num_steps / steps_per_epoch,
        seconds=length,
        timed=trainer["max_time"] is not None,
        memory=peak_memory(size, share),
        free_memory=peaks.memory,
        fitting=fitting(size, share, peaks.memory),
    )


def step_seconds(cost: Work, peaks: Peaks, share: Efficiency) -> float:
    """Seconds of a step of one rank. What ranks send each other is left out."""
    parts = step_parts(cost, peaks, share)
    calls = parts.pop("calls")
    return max(sum(parts.values()), calls) if share.overlaps else sum(parts.values()) + calls


def step_parts(cost: Work, peaks: Peaks, share: Efficiency) -> dict[str, float]:
    """Seconds of a step by what they are spent on."""
    return {
        "linear": cost.linear / (peaks.product * share.linear),
        "attention": cost.attention / (peaks.product * share.attention),
        "prototypes": cost.prototypes / (peaks.wide * share.prototypes),
        "moved": cost.moved / (peaks.copy * share.moved),
        "calls": cost.calls * peaks.call / share.calls,
    }


def peak_memory(size: Sizes, share: Efficiency) -> int:
    """Bytes a step needs on its device at most, as the system gives them."""
    moments = memory(size)
    stays = moments.pop("stays")
    return round((stays + max(moments.values())) / share.memory)


def fitting(size: Sizes, share: Efficiency, free: int) -> int | None:
    """Images of a micro-batch for which `free` bytes do: as many as now, or halved until they fit;
    None where one is too many.
    """
    num = size.micro_batch_size
    while peak_memory(size._replace(micro_batch_size=num), share) > free:
        if num == 1:
            return None
        num //= 2
    return num


def _duration(length: float) -> str:
    """Seconds as people say them: 40 s, 25 min, 31 h, 12 days."""
    for unit, name, most in ((1, "s", 100), (60, "min", 100), (3600, "h", 72)):
        if length < most * unit:
            return f"{_round(length / unit)} {name}"
    return f"{_round(length / 86_400)} days"


def _size(num_bytes: float) -> str:
    """Bytes as people say them; more than two digits are not known."""
    if num_bytes < 2**30:
        return f"{_round(num_bytes / 2**20)} MiB"
    return f"{_round(num_bytes / 2**30)} GiB"


def _round(value: float) -> str:
    """Two digits, as 0.34, 5.1, 12,000; whole numbers up to 1,000 as they are."""
    if value == int(value) and value < 1000:
        return f"{value:.0f}"
    digits: Any = float(f"{value:.2g}")
    return f"{digits:,.0f}" if digits >= 10 else f"{digits:g}"
