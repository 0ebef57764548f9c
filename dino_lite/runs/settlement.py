"""The result of an adaptation in words: a table with intervals, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from dino_lite.eval.tradeoff import Change, images_to_resolve
from dino_lite.wording import aligned

Found = Mapping[str, Any]  # "adaptation" in results.json


def table(found: Found) -> str:
    """Before and after on each collection, with 95 % intervals, and the sentences."""
    adapted = f"adapted (alpha {found['alpha']:g})"
    rows: list[list[str]] = [["", "start", adapted, "end"]]
    for each in found["collections"]:
        rows.append([f"{each['name']}: {each['metric']}", "", "", ""])
        values = (_value(each[key]) for key in ("start", "adapted", "end"))
        rows.append([f"  {each['start']['num']:,} {each['images']}", *values])
        changes = (str(_change(each[key])) for key in ("adapted", "end"))
        rows.append(["  change", "", *changes])
    title = "before and after, with 95 % intervals; changes are paired, image by image"
    return "\n".join([title, *aligned(rows), *found["sentences"]])


def sentences(found: Found) -> list[str]:
    """What was chosen and why, and how far the numbers carry."""
    mine, *kept = found["collections"]
    return [*_choice(found, mine, kept), *_resolution(found, kept), *_of_tests(found, mine, kept)]


def _choice(found: Found, mine: Found, kept: list[Found]) -> Iterator[str]:
    if not found["choice"]:
        yield (
            f"No choice was made, as {mine['name']} has no labels to measure a gain by: "
            "adapted.ckpt is the end of training."
        )
        return
    best = _at(mine, found["alpha"])
    limited = [each["name"] for each in kept if each["labeled"]]
    limit = (
        ""
        if found["max_loss"] is None or not limited
        else (f" where {' and '.join(limited)} loses at most {_points(found['max_loss'])}")
    )
    on = f"on {best['num']:,} images held out of train"
    if found["alpha"] == 0:
        yield f"Nothing gained on {mine['name']}{limit}, {on}: adapted.ckpt is the start."
    elif best["change_interval"][0] <= 0:
        yield (
            f"Nothing gained on {mine['name']} that {on[3:]} can tell from chance: the best point"
            f"{limit} is alpha {found['alpha']:g}, {_change(best)} points; start.ckpt is the start."
        )
    else:
        yield (
            f"Alpha {found['alpha']:g} gains most on {mine['name']}{limit}: {_change(best)} points "
            f"{on}."
        )


def _resolution(found: Found, kept: list[Found]) -> Iterator[str]:
    """Whether the images that are held out can tell a loss of `max_loss` from none."""
    max_loss = found["max_loss"]
    for each in kept if max_loss is not None else ():
        if not each["labeled"]:
            continue
        at = _change(_at(each, found["alpha"] or 1.0))
        told = (
            f"From start to alpha {found['alpha'] or 1:g}, {each['name']} changes by {at} points: "
        )
        told += f"{at.num:,} images tell this to within {at.half_width:.2g}"
        wanted = images_to_resolve(at, max_loss)
        if wanted <= at.num:
            yield f"{told}, enough for adapt.max_loss={max_loss:g}."
        else:
            most = "no number" if math.isinf(wanted) else f"about {wanted:,}"
            yield f"{told}, too few for adapt.max_loss={max_loss:g}, for which {most} would do."


def _of_tests(found: Found, mine: Found, kept: list[Found]) -> Iterator[str]:
    max_loss = found["max_loss"]
    if found["choice"] and not found["held_out"]:
        yield f"Training saw the images of {mine['name']} that chose alpha: it may be too high."
    for each in (mine, *kept):
        loss = -each["adapted"]["change"]
        if each["labeled"] and not each["tested"] and found["choice"]:
            yield (
                f"{each['name']} has no labeled test images: its numbers are of the images by "
                "which alpha was chosen, so they may flatter."
            )
        elif each["kept"] and each["labeled"] and max_loss is not None and loss > max_loss:
            yield (
                f"On its test images, {each['name']} loses {loss:.2f} points, more than "
                f"adapt.max_loss={max_loss:g}: the held-out images promised less; lower it to be "
                "safer."
            )


def _points(number: float) -> str:
    return f"{number:g} point{'' if number == 1 else 's'}"


def _at(collection: Found, alpha: float) -> Found:
    found: Found = next(each for each in collection["path"] if each["alpha"] == alpha)
    return found


def _change(entry: Found) -> Change:
    low, high = entry["change_interval"]
    return Change(entry["change"], low, high, entry["num"])


def _value(entry: Found) -> str:
    low, high = entry["interval"]
    return f"{entry['value']:.2f} ({low:.2f} to {high:.2f})"
