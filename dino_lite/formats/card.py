"""The model card of an export, README.md: how to use it, what it was trained on, what it is worth,
and how it was verified.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from textwrap import dedent, indent
from typing import Any

import yaml  # type: ignore[import-untyped]

from dino_lite.formats.format import Claim
from dino_lite.formats.reading import read_told, reading
from dino_lite.wording import count

About = dict[str, Any]  # the content of export.json
_PACKAGES = {"PIL": "pillow", "dino_lite": "dino-lite"}  # named unlike their modules


def model_card(about: About, library: str) -> str:
    """The text of README.md, of what export.json says; `library` is what reads the files."""
    training = about["training"]
    name = str(training.get("run") or training.get("checkpoint") or about["format"])
    parts = [
        _front_matter(about, library),
        f"# {name}",
        _summary(about),
        f"## Use\n\n{_use(about)}",
        f"## Training\n\n{_training(about)}",
        _results(training.get("results") or [], training.get("results_of")),
        f"## Verification\n\n{_verification(about['verification'])}",
        _configuration(training.get("config") or {}),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(about: About, library: str) -> str:
    """What the Hub reads; a license that is no identifier is told as its name."""
    said = about["license"]
    known = re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", said)
    rights = {"license": said} if known else {"license": "other", "license_name": said}
    method = _method(about["training"].get("config") or {})
    tags = ["self-supervised-learning", "dino-lite", *filter(None, [method]), about["format"]]
    words = {"library_name": library, **rights, "pipeline_tag": "image-feature-extraction"}
    return f"---\n{yaml.safe_dump(words | {'tags': tags}, sort_keys=False)}---"


def _summary(about: About) -> str:
    how = about["preprocessing"]
    return (
        f"A vision backbone of {about['num_parameters']:,} parameters, exported by "
        f"{about['written_by']}. An image of {_times(how['size'])} pixels becomes a class token of "
        f"{about['embed_dim']:,} numbers and patch tokens of {about['patch_dim']:,}, one for "
        f"{about['patch_size']} x {about['patch_size']} pixels each."
    )


def _use(about: About) -> str:
    several, patch = len(about["claims"]) > 1, about["patch_size"]
    told = read_told(about["preprocessing"])
    size = _times(told.size)
    parts, packages = [], dict[str, None]()
    for claim in about["claims"]:
        sizes = " or ".join(_times(size) for size in claim["sizes"])
        whose = f"{claim['title']}: images" if several else "Images"
        if claim["any_size"]:
            told_sizes = f"{whose} have any multiple of {patch} pixels per side; trained at {size}"
        else:
            told_sizes = f"{whose} have {sizes} pixels"
        code = usage(about, claim)
        imported = re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE)
        needed = dict.fromkeys([_PACKAGES.get(n, n) for n in imported] + [*claim["packages"]])
        shown = f"```python\n{code}\n```"
        parts += [f"{told_sizes}:", shown] if several else [shown, f"{told_sizes}."]
        packages.update(needed)
    parts.insert(0, f"These lines need {', '.join(packages)}.")
    same = f"; those of exactly {size} pixels were left as they are"
    except_ = same if told.rule == "dino_lite" else ""
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (told.mean, told.std))
    scaled = f"scaled to [0, 1], minus {mean}, divided by {std}"
    return "\n\n".join(
        [*parts, f"For training's evaluations images were {told.said()}{except_}; pixels {scaled}."]
    )


def usage(about: About, claim: dict[str, Any]) -> str:
    """Python that reads an image, and computes its tokens as the claim says."""
    load = dedent(claim["load"]).strip().splitlines()
    lines = [
        "import torch",
        f"folder = {about['folder']!r}  # with this file in it",
        *(line for line in load if line != "import torch"),
        *reading(Claim(**claim), read_told(about["preprocessing"])),
        "with torch.no_grad():",
        indent(dedent(claim["run"]).strip(), "    "),
        "print(cls.shape, patches.shape)",
    ]
    return "\n".join(lines)


def _training(about: About) -> str:
    training = about["training"]
    config, data = training.get("config") or {}, training.get("data") or {}
    rows: dict[str, str] = {}
    if method := _method(config):
        losses = ", ".join(config.get("loss") or ())
        rows["method"] = f"{method}{f', losses {losses}' if losses else ''}"
        rows["teacher"] = "moving average of the student; its weights are these"
    if frozen := training.get("teacher"):
        rows["teacher"] = (
            f"{frozen['name']}, frozen (digest {frozen['digest']}, license {frozen['license']}); "
            "these weights are the moving average of its student"
        )
    spec = about.get("backbone") or {}
    if reduced := training.get("compact"):
        whitened = ", whitened" if reduced["whiten"] else ""
        rows["class token"] = (
            f"{reduced['width']:,} of {reduced['of']:,} numbers, by PCA of the class tokens of "
            f"training images{whitened}"
        )
    while isinstance(whole := spec.get("whole"), dict):
        spec = whole
    if spec:
        rows["backbone"] = ", ".join(f"{key}={value}" for key, value in _leaves(spec))
    if data:
        classes = data.get("num_classes")
        parts = [
            f"{data['name']}: {count(data['num_images'], 'training image')}",
            f"digest {data['digest']}",
            f"{count(data['num_test'], 'test image')}"
            if data.get("num_test")
            else "no test images",
            count(classes, "class") if classes else "no labels",
        ]
        rows["data"] = ", ".join(parts)
    if steps := training.get("steps"):
        rows["length"] = count(steps, "step")
        if seen := training.get("images_seen"):
            rows["length"] += f", {seen:,} images seen"
    rows["start"] = _starts(training.get("start"))
    rows["license of these weights"] = about["license"]
    return _table(["", ""], rows.items())


def _leaves(spec: About, stem: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values of nested dictionaries, joined by dots."""
    for key, value in spec.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{stem}{key}.")
        else:
            yield f"{stem}{key}", value


def _starts(starts: list[dict[str, str]] | None) -> str:
    if starts is None:
        return "unknown"
    named = [f"{each['name']} (license of its weights: {each['license']})" for each in starts]
    return ", which began with ".join(named) or "random weights"


def _results(results: list[About], width: int | None) -> str:
    """The measured numbers beside their baselines; of class tokens of `width`, if other ones."""
    if not results:
        return ""
    rows = []
    for each in results:
        low_high = " to ".join(f"{bound:.4g}" for bound in each.get("interval") or ())
        baselines = [
            f"{title} {found['value']:.4g}" for title, found in each.get("baselines", {}).items()
        ]
        rows.append(
            [
                f"{each['name']}: {each['metric']}",
                f"{each['value']:.4g} {each.get('unit', '')}".strip(),
                low_high,
                ", ".join(baselines),
                each.get("protocol") or "",
                f"{each.get('num_train') or '-'} / {each.get('num_test') or '-'}",
            ]
        )
    head = ["evaluation", "value", "95 % interval", "baselines", "protocol", "train / test images"]
    whose = f"Of the whole network's class token of {width:,} numbers.\n\n" if width else ""
    return f"## Results\n\n{whose}{_table(head, rows)}"


def _verification(found: About) -> str:
    where = "by dino_lite" if found["own"] else "in a process in which dino_lite cannot be imported"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    pixels = found["pixels"]
    several = len(pixels) > 1
    rows = [
        [
            *([check["title"]] if several else []),
            _times(check["size"]),
            str(check["batch"]),
            f"{check['cls']:.1e}",
            f"{check['patches']:.1e}",
            f"{check['tolerance']:.0e}",
        ]
        for check in found["checks"]
    ]
    head = [*(["file"] if several else []), "size", "batch", "`cls`", "`patches`", "allowed"]
    return (
        f"Read back {where}, on {count(found['num_images'], 'real image')} ({versions}). The "
        "largest difference from the original, relative to the tokens' root mean square:\n\n"
        + "\n\n".join([_table(head, rows), *(_told_pixels(check, several) for check in pixels)])
    )


def _told_pixels(check: About, several: bool) -> str:
    """A sentence on the pixels that a claim's lines prepare, one of `several`."""
    whose = f"of {check['title']} " if several else ""
    parts = [
        f"The pixels that the lines above {whose}prepare of these images differ from those of the "
        f"original's evaluations by at most {check['levels']:.2g} of 255 levels, averaged over an "
        "image"
    ]
    if check["shifted"]:
        parts.append(
            f"{count(check['shifted'], 'image')} cropped one pixel off, as this library rounds"
        )
    if check["resized"]:
        parts.append(
            f"{count(check['resized'], 'image')} of exactly the size of training resized and "
            "cropped, since this format knows no exception for them"
        )
    if len(parts) > 1:
        parts.append(
            f"the class token then differs by up to {check['cls']:.2g} of its root mean square"
        )
    return "; ".join(parts) + "."


def _configuration(config: About) -> str:
    if not config:
        return ""
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return f"## Configuration\n\n```yaml\n{text}```"


def _method(config: About) -> str:
    """The method's name in conf/method that the user chose, else its class; "" if unknown."""
    of = str((config.get("method") or {}).get("_target_", "")).rpartition(".")[2].lower()
    return str((config.get("choices") or {}).get("method") or of)


def _times(size: Iterable[int]) -> str:
    return " x ".join(str(side) for side in size)


def _table(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
