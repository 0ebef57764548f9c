"""The model card of an export, README.md: how to use it, what it was trained on, what it is worth,
and how it was verified.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from textwrap import dedent, indent
from typing import Any

import yaml  # type: ignore[import-untyped]

from dino_lite.data.preprocessing import Preprocessing
from dino_lite.wording import count

About = dict[str, Any]  # the content of export.json


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
        _results(training.get("results") or []),
        f"## Verification\n\n{_verification(about['verification'])}",
        _configuration(training.get("config") or {}),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(about: About, library: str) -> str:
    """What the Hub reads; a license that is no identifier is told as its name."""
    said = about["license"]
    known = re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", said)
    rights = {"license": said} if known else {"license": "other", "license_name": said}
    method = _class_name(about["training"].get("config") or {}, "method").lower()
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
    parts = []
    for claim in about["claims"]:
        sizes = " or ".join(_times(size) for size in claim["sizes"])
        other = f", or any multiple of {patch} pixels per side" if claim["any_size"] else ""
        title = f"{claim['title']}, i" if claim["title"] else "I"
        if several:
            parts.append(f"{title}mages of {sizes} pixels{other}:")
        parts.append(f"```python\n{usage(about, claim)}\n```")
        if not several:
            parts.append(f"Images have {sizes} pixels{other}.")
    told = Preprocessing.read({k: v for k, v in about["preprocessing"].items() if k != "resize"})
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (told.mean, told.std))
    scaled = f"scaled to [0, 1], minus {mean}, divided by {std}"
    return "\n\n".join([*parts, f"Images are {told.said()}; their pixels {scaled}."])


def usage(about: About, claim: About) -> str:
    """Python that reads an image, and computes its tokens as the claim says."""
    load = dedent(claim["load"]).strip().splitlines()
    lines = [
        "import torch",
        f"folder = {about['folder']!r}  # with this file in it",
        *(line for line in load if line != "import torch"),
        *(claim["read"].splitlines() or _reading(about["preprocessing"], about["in_chans"])),
        "with torch.no_grad():",
        indent(dedent(claim["run"]).strip(), "    "),
        "print(cls.shape, patches.shape)",
    ]
    return "\n".join(lines)


def _reading(how: About, channels: int) -> list[str]:
    """Lines that define `pixels` of an image file."""
    rows, columns = how["size"]
    normalize = f"transforms.Normalize({how['mean']}, {how['std']})"
    if channels not in (1, 3):
        return [
            "import numpy as np",
            "from torchvision import transforms",
            "",
            f'image = np.load("image.npy")  # uint8, ({rows}, {columns}, {channels})',
            "pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255",
            f"pixels = {normalize}(pixels)",
        ]
    mode = "RGB" if channels == 3 else "L"
    lines = [*_resizing(how), *_cropping(how, mode)]
    if how["rule"] == "dino_lite":
        lines = [f"if image.size != ({columns}, {rows}):", *(f"    {line}" for line in lines)]
    return [
        "from PIL import Image",
        "from torchvision import transforms",
        "",
        f'image = Image.open("image.jpg").convert("{mode}")',
        *lines,
        f"pixels = {normalize}(transforms.ToTensor()(image)[None])",
    ]


def _resizing(how: About) -> list[str]:
    """Lines that do what `Preprocessing.resized` says."""
    kind = how["interpolation"].upper()
    if not isinstance(how["resize"], list) or how["squash"]:
        wanted = how["resize"] if isinstance(how["resize"], int) else tuple(how["resize"])
        return [f"image = transforms.Resize({wanted}, transforms.InterpolationMode.{kind})(image)"]
    rows, columns = how["resize"]
    least = "max" if how["border"] else "min"
    return [
        f"ratio = {least}(image.height / {rows}, image.width / {columns})",
        "size = (round(image.width / ratio), round(image.height / ratio))",
        f"image = image.resize(size, Image.Resampling.{kind})",
    ]


def _cropping(how: About, mode: str) -> list[str]:
    """Lines that do what `Preprocessing.corner` says."""
    rows, columns = how["size"]
    if how["border"]:
        color = [round(255 * value) for value in how["mean"]]
        fill = tuple(color) if mode == "RGB" else color[0]
        return [
            f'whole = Image.new("{mode}", ({columns}, {rows}), {fill})',
            f"whole.paste(image, (({columns} - image.width) // 2, ({rows} - image.height) // 2))",
            "image = whole",
        ]
    if how["rule"] == "hugging_face":
        return [
            f"left, top = (image.width - {columns}) // 2, (image.height - {rows}) // 2",
            f"image = image.crop((left, top, left + {columns}, top + {rows}))",
        ]
    return [f"image = transforms.CenterCrop(({rows}, {columns}))(image)"]


def told_preprocessing(how: Preprocessing) -> About:
    """Plain JSON of a preprocessing. "resize" is to how many pixels: the shorter side, else rows
    and columns, which with `border` hold the whole image, and without `squash` are filled by it.
    """
    rows, columns = how._replace(squash=True).resized(*how.size)
    one_side = rows == columns or how.rule == "hugging_face"
    resize = min(rows, columns) if one_side and not (how.squash or how.border) else [rows, columns]
    told = {key: list(v) if isinstance(v, tuple) else v for key, v in how._asdict().items()}
    return {"size": told.pop("size"), "resize": resize} | told


def _training(about: About) -> str:
    training = about["training"]
    config, data = training.get("config") or {}, training.get("data") or {}
    rows: dict[str, str] = {}
    if method := _class_name(config, "method"):
        losses = ", ".join(config.get("loss") or ())
        rows["method"] = f"{method}{f', losses {losses}' if losses else ''}"
        rows["teacher"] = "moving average of the student; its weights are these"
    if spec := about.get("backbone"):
        rows["backbone"] = ", ".join(f"{key}={value}" for key, value in spec.items())
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


def _starts(starts: list[dict[str, str]] | None) -> str:
    if starts is None:
        return "unknown"
    named = [f"{each['name']} (license of its weights: {each['license']})" for each in starts]
    return ", which began with ".join(named) or "random weights"


def _results(results: list[About]) -> str:
    """The measured numbers beside their baselines."""
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
    return f"## Results\n\n{_table(head, rows)}"


def _verification(found: About) -> str:
    where = "by dino_lite" if found["own"] else "in a process in which dino_lite cannot be imported"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    several = any(check["title"] for check in found["checks"])
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
        + _table(head, rows)
    )


def _configuration(config: About) -> str:
    if not config:
        return ""
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return f"## Configuration\n\n```yaml\n{text}```"


def _class_name(config: About, group: str) -> str:
    """The class of a group of the configuration, "" if there is none."""
    return str((config.get(group) or {}).get("_target_", "")).rpartition(".")[2]


def _times(size: Iterable[int]) -> str:
    return " x ".join(str(side) for side in size)


def _table(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
