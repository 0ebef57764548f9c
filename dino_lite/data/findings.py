"""Errors, warnings and hints that follow from the numbers of `data.statistics`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from dino_lite.data.summary import feeders
from dino_lite.wording import count

_MANY = 0.01  # of the images: more than this is a warning
_NEARLY_ALL = 0.95
_SMALL_PART = 1 / 8  # of the range of 16 bits
_UNEQUAL = 20  # ratio of the largest class to the smallest
_FEW_IMAGES = 1000

Level = Literal["error", "warning", "hint"]


class Finding(NamedTuple):
    """One sentence. An error would stop the run, a warning degrades it, a hint improves it."""

    level: Level
    text: str


def judge_files(name: str, split: dict[str, Any], max_bad_fraction: float) -> Iterator[Finding]:
    """Unreadable, misnamed and odd files of split `name`; in train at most `max_bad_fraction` may
    be unreadable.
    """
    num, num_bad = split["num_looked_at"], len(split["unreadable"])
    if name == "train" and num_bad > min(int(max_bad_fraction * num), num - 1):
        yield Finding(
            "error",
            f"{num_bad:,} of {num:,} images of train cannot be read, more than "
            f"loader.max_bad_fraction={max_bad_fraction:g} allows: repair or remove them "
            "(bad_files.csv).",
        )
    elif num_bad:
        instead = "others take their place" if name == "train" else "evaluations leave them out"
        yield Finding(
            "warning",
            f"{num_bad:,} of {num:,} images of {name} cannot be read (bad_files.csv): {instead}.",
        )
    if num < split["num_images"]:
        yield Finding(
            "hint",
            f"Of the {split['num_images']:,} images of {name}, {num:,} were inspected "
            "(max_images): duplicates among the others are unknown, and fractions are estimates.",
        )
    if split["num_misnamed"]:
        yield Finding(
            "hint",
            f"{count(split['num_misnamed'], 'file')} of {name} with another format than the suffix "
            "says: read all the same.",
        )


def judge_range(num_deep: int, largest: int, fraction: float) -> Iterator[str]:
    """Whether `num_deep` images of more than 8 bits use a small part of their range: `fraction`,
    with the value `largest`.
    """
    if num_deep and fraction < _SMALL_PART:
        yield (
            f"{num_deep:,} {'image' if num_deep == 1 else 'images'} of more than 8 bits use "
            f"{fraction:.1%} of their range (largest value: {largest:,}), so that they become "
            f"nearly black: set data.range=[0,{2 ** max(largest.bit_length(), 1) - 1}]."
        )


def judge_alpha(num_vanishing: int, num: int) -> Iterator[str]:
    """Whether `num_vanishing` of `num` images are lost without their alpha channel."""
    if num_vanishing > _MANY * num:
        yield (
            f"{num_vanishing:,} of {num:,} images show one color, since their transparency is "
            "dropped: set data.background=white, or black or [R,G,B]."
        )


def judge_pixels(train: dict[str, Any], batch_size: int, global_size: int) -> Iterator[Finding]:
    """Whether the images of train suit the planned crops and batch size."""
    num = max(train["num_readable"], 1)
    if train["num_small"] > 0.1 * num:
        yield Finding(
            "warning",
            f"{count(train['num_small'], 'image')} ({train['num_small'] / num:.0%}) with a side "
            f"below augment.global_size={global_size}: the crops are enlarged; a smaller "
            "augment.global_size trains faster and loses little.",
        )
    deep = (train.get(key, 0) for key in ("num_deep", "largest_value", "largest_fraction"))
    for text in (*judge_range(*deep), *judge_alpha(train.get("num_vanishing", 0), num)):
        yield Finding("warning", text)
    if train["num_blank"] > _MANY * num:
        yield Finding(
            "warning",
            f"{count(train['num_blank'], 'image')} ({train['num_blank'] / num:.0%}) of a single "
            "color: there is nothing to learn from; remove what is blank.",
        )
    if train["num_gray"] >= _NEARLY_ALL * num:
        yield Finding(
            "hint",
            f"{train['num_gray'] / num:.0%} of the images are gray: augment=grayscale leaves out "
            "what changes colors only.",
        )
    if batch_size > train["num_images"]:
        yield Finding(
            "warning",
            f"loader.batch_size={batch_size} is more than {count(train['num_images'], 'image')}: a "
            "step sees some twice; choose a smaller one.",
        )
    if train["num_images"] < _FEW_IMAGES:
        yield Finding(
            "hint",
            f"{count(train['num_images'], 'image')}: few to learn from alone; trained weights to "
            "start from (backbone.pretrained) help most.",
        )


def judge_classes(train: dict[str, Any], test: dict[str, Any] | None) -> Iterator[Finding]:
    """Whether the labels allow meaningful accuracies; training itself does not use them."""
    classes = train["classes"]
    if classes is None:
        return
    if classes["num_with_one_image"]:
        yield Finding(
            "warning",
            f"{count(classes['num_with_one_image'], 'class')} of train with one image: no neighbor "
            "can be right, so k-NN within train counts them as wrong.",
        )
    if classes["num_without_image"]:
        yield Finding(
            "warning",
            f"{count(classes['num_without_image'], 'class')} in test alone: nothing in train shows "
            "what to recognize.",
        )
    if classes["max"] >= _UNEQUAL * max(classes["min"], 1):
        yield Finding(
            "hint",
            f"The largest class has {count(round(classes['max']), 'image')}, the smallest "
            f"{classes['min']:,.0f}: accuracy over all images says little of small classes.",
        )
    if test is not None and test["classes"] is None:
        yield Finding("hint", "train has labels and test has none: accuracies are of train alone.")


def judge_duplicates(duplicates: dict[str, Any], num: int) -> Iterator[Finding]:
    """Leakage between the splits, and repeated images among the `num` of both."""
    exact, near = duplicates["exact"], duplicates["near"]
    of_near = near or dict.fromkeys(exact, 0)
    key = "num_test_images_in_train"
    if leaked := exact[key] + of_near[key]:
        yield Finding(
            "warning",
            f"{count(leaked, 'image')} of test found in train as well ({exact[key]:,} exactly, "
            f"{of_near[key]:,} nearly): accuracies on test come out too high; remove them from "
            "train (duplicates.csv).",
        )
    surplus = exact["num_surplus"] + of_near["num_surplus"]
    if surplus > _MANY * num:
        yield Finding(
            "warning",
            f"{count(surplus, 'image')} ({surplus / num:.0%}) equal to another "
            f"({exact['num_surplus']:,} exactly, {of_near['num_surplus']:,} nearly): what is "
            "repeated counts more; remove it (duplicates.csv).",
        )
    if near is None:
        yield Finding(
            "hint",
            "Near duplicates were not searched, as imagehash is not installed: "
            "pip install 'dino-lite[check]'.",
        )


def judge_speed(speed: dict[str, Any]) -> Iterator[Finding]:
    """The bottleneck of a run and how to remove it, from `runs.timing.compare`."""
    loading, training = speed["loading"], speed["training"]
    batch = speed["batch_size_per_device"]
    if training["largest_batch"] is not None:
        yield Finding(
            "warning",
            f"A step on {count(batch, 'image')} does not fit the memory of {speed['device']}, on "
            f"{training['largest_batch']} it does: choose trainer.micro_batch_size="
            f"{max(training['largest_batch'], 1)}, or a smaller loader.batch_size.",
        )
    if speed["bottleneck"] != "loading":
        return
    wanted, cores = loading["num_workers_wanted"], loading["num_cores"]
    if loading["num_workers"] < min(wanted, cores):
        todo = f"try loader.num_workers={min(wanted, cores)}"
    else:
        todo = (
            f"{count(wanted, 'core')} would keep up; else store the images smaller (twice "
            "augment.global_size is enough), or lower augment.num_local"
        )
    yield Finding(
        "warning",
        f"The device waits for data: {feeders(loading['num_workers'])} "
        f"{loading['images_per_second']:,.0f} images/s, this model trains "
        f"{training['images_per_second']:,.0f}; {todo}.",
    )
