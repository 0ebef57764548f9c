"""The statistics of `data.statistics` as text."""

from __future__ import annotations

from typing import Any

from dino_lite.wording import count

_BAR = 30  # characters of the longest bar
_SHOWN = 5  # unreadable files shown; all are in bad_files.csv


def split_table(name: str, split: dict[str, Any]) -> str:
    """Statistics of one split."""
    looked = split["num_looked_at"]
    part = "" if looked == split["num_images"] else f" ({looked:,} inspected)"
    size = f", {_bytes(split['num_bytes'])}" if split["num_bytes"] else ""
    rows = [
        ("formats", _counted(split["formats"])),
        ("modes as stored", _counted(split["modes"])),
        ("shorter side", _span(split["shorter_side"], "px")),
        *_bars(split["shorter_side"]),
        ("longer side", _span(split["longer_side"], "px")),
        ("width / height", _span(split["aspect"], "")),
        *_bars(split["aspect"]),
        ("size", _span(split["megapixels"], "megapixels")),
        ("below global crop", _some(split["num_small"])),
        ("turned by EXIF", _some(split["num_rotated"])),
        ("without color", _some(split["num_gray"])),
        ("blank", _some(split["num_blank"])),
        ("mean, std", _moments(split)),
        ("unreadable", _some(len(split["unreadable"]))),
        *(("", f"{bad['path']}: {bad['reason']}") for bad in split["unreadable"][:_SHOWN]),
    ]
    if len(split["unreadable"]) > _SHOWN:
        rows.append(("", "... all in bad_files.csv"))
    return "\n".join([f"{name}: {count(split['num_images'], 'image')}{part}{size}", *_lines(rows)])


def class_table(train: dict[str, Any], labels: str) -> str:
    """Source of the labels, and the number of images per class."""
    classes = train["classes"]
    if classes is None:
        return f"labels: none ({labels})"
    span = _span(classes, "images a class")
    rows = [
        ("balance", span),
        ("largest", ", ".join(f"{name} {num:,}" for name, num in classes["largest"])),
        ("smallest", ", ".join(f"{name} {num:,}" for name, num in classes["smallest"])),
    ]
    return "\n".join(
        [f"labels: {count(classes['num_classes'], 'class')} ({labels})", *_lines(rows)]
    )


def duplicate_table(duplicates: dict[str, Any]) -> str:
    """Repeated images, within and across the splits."""
    rows = []
    for kind, found in duplicates.items():
        if found is None:
            rows.append((kind, "not searched"))
            continue
        limit = ""
        if "distance" in found:
            limit = f" (up to {found['distance']} of 64 bits of a perceptual hash differ)"
        rows.append(
            (
                kind,
                f"{count(found['num_surplus'], 'image')} repeating another, in "
                f"{count(found['num_groups'], 'group')}; "
                f"{found['num_test_images_in_train']:,} of test also in train{limit}",
            )
        )
    return "\n".join(["duplicates:", *_lines(rows)])


def speed_table(speed: dict[str, Any]) -> str:
    """Speed of loading and training, from `runs.timing.compare`."""
    loading, training = speed["loading"], speed["training"]
    rows = [
        (
            "loading",
            f"{feeders(loading['num_workers'])} {loading['images_per_second']:,.0f} images/s "
            f"({loading['images_per_second_of_one']:,.0f} a process, "
            f"{count(loading['num_cores'], 'core')})",
        ),
        (
            "training",
            f"this model on {speed['device']} trains {training['images_per_second']:,.1f} "
            f"images/s ({training['seconds_per_step']:.2f} s a step of "
            f"{count(speed['batch_size_per_device'], 'image')} a device)",
        ),
        ("together", f"{speed['images_per_second']:,.1f} images/s; limit: {speed['bottleneck']}"),
        ("an epoch", _duration(speed["seconds_per_epoch"])),
    ]
    if speed["seconds_per_run"] is not None:
        rows.append(("the run", _duration(speed["seconds_per_run"])))
    return "\n".join(["speed, measured here (with files in the page cache):", *_lines(rows)])


def feeders(num_workers: int) -> str:
    """The processes that load data, as the start of a sentence."""
    if num_workers == 0:
        return "without workers the training process itself feeds"
    return "your 1 worker feeds" if num_workers == 1 else f"your {num_workers} workers feed"


def _lines(rows: list[tuple[str, str]]) -> list[str]:
    return [f"  {label:18} {text}".rstrip() for label, text in rows if text]


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {num:,}" for name, num in counts.items())


def _some(num: int) -> str:
    return f"{num:,}"


def _span(values: dict[str, Any], unit: str) -> str:
    """Minimum, median, maximum."""
    if "min" not in values:  # of nothing
        return ""
    least, middle, most = (_number(values[key]) for key in ("min", "median", "max"))
    if least == most:
        return f"{most} {unit}"
    return f"{least} to {most} {unit}, median {middle}".replace(" ,", ",")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or value >= 1000 else f"{value:.3g}"


def _bars(values: dict[str, Any]) -> list[tuple[str, str]]:
    """One line per bin of a histogram with several bins."""
    most = max((count for *_, count in values["histogram"]), default=1)
    if len(values["histogram"]) < 2:
        return []
    return [
        (
            "",
            f"{f'{start:g} ...' if stop is None else f'{start:g} to {stop:g}':>12} {count:>9,} "
            f"{'#' * -(-_BAR * count // most)}",
        )
        for start, stop, count in values["histogram"]
    ]


def _moments(split: dict[str, Any]) -> str:
    if not split["mean"]:
        return ""
    mean, std = (" ".join(f"{value:.3f}" for value in split[key]) for key in ("mean", "std"))
    return f"{mean}, {std} (of {count(split['num_readable'], 'image')})"


def _bytes(num: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if num < 1000 or unit == "TB":
            break
        num /= 1000
    return f"{num:,.0f} {unit}" if unit == "bytes" else f"{num:,.1f} {unit}"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"about {seconds / length:,.0f} {unit}"
    return f"about {seconds:,.0f} seconds"
