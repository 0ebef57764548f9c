"""The report as one self-contained HTML file."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from string import Template
from typing import Any

from dino_lite.eval.curves import PROTOTYPES, number
from dino_lite.eval.verdict import judge, prototypes_text, verdict
from dino_lite.meter import duration
from dino_lite.report.charts import curve_sections
from dino_lite.report.doubts import doubts
from dino_lite.report.markup import Markup, folded, join, listing, table, tag
from dino_lite.report.story import Story, results_of
from dino_lite.report.thumbnails import find_pictures, picture_figures
from dino_lite.report.worth import adaptation_section, title_of, value_of, worth_section
from dino_lite.version import __version__
from dino_lite.wording import count

_LISTED = 20  # unreadable files shown
_TEMPLATE = Path(__file__).with_name("page.html")


def page(story: Story, now: datetime) -> str:
    """Render a story as HTML."""
    figures, unreadable = picture_figures(find_pictures(story.folder))
    warnings = doubts(story._replace(missing=[*story.missing, *unreadable]))
    sections = [
        (
            "worth",
            "Results",
            join(
                adaptation_section(story.results.get("adaptation")),
                worth_section(results_of(story.results), story.folder),
            ),
        ),
        ("curves", "Training curves", curves(story)),
        (
            "pictures",
            "Pictures",
            tag("div", figures, class_="pictures") if figures else figures,
        ),
        ("run", "Settings of the run" if story.config else "Metadata", _run_section(story)),
    ]
    head = join(_headline(story), told_verdict(story), tiles(story))
    return document(story.title, head, sections, caveats(warnings, story), now)


def document(
    title: str,
    head: Markup,
    sections: list[tuple[str, str, Markup]],
    before: Markup,
    now: datetime,
) -> str:
    """The page with its header, links to the sections (key, title, content) that have content,
    what comes `before` these, and the footer.
    """
    shown = [(key, title, content) for key, title, content in sections if content]
    links = [tag("a", title, href=f"#{key}") for key, title, _ in shown]
    body = join(
        tag("header", head, tag("nav", *links, aria_label="Sections")),
        tag("main", before, *(_section(*section) for section in shown)),
        tag("footer", f"Written by dino_lite {__version__} on {now:%Y-%m-%d at %H:%M}."),
    )
    template = Template(_TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=tag("title", f"{title} · dino_lite"), body=body)


def _section(key: str, title: str, content: Markup) -> Markup:
    return tag("section", tag("h2", title), content, id=key)


def _headline(story: Story) -> Markup:
    """Name, one-line description, and whether the run is finished."""
    state = Markup()
    if story.is_run:
        done = bool(story.results.get("finished"))
        state = tag("span", "finished" if done else "not finished", class_="done" if done else "on")
    data = _data(story)
    parts = [_method(story), _backbone(story), data and f"on {data}"]
    line = ", ".join(part for part in parts if part)
    return join(
        tag("p", "dino_lite report ", state, class_="over"),
        tag("h1", story.title),
        tag("p", line, class_="line") if line else Markup(),
    )


def told_verdict(story: Story) -> Markup:
    """The sentences with which a run ended, and those about other results with baselines."""
    done = story.results.get("trained") or story.results.get("finished")
    lines = verdict(story.results, story.curves, str(story.folder)) if done else []
    results = results_of(story.results)
    several = len({result.checkpoint for result in results}) > 1
    for result in results:
        judgment = judge(result.found | {"metric": title_of(result, several)})
        if judgment is not None and f"{judgment.text}." not in lines:
            lines.append(f"{judgment.text}.")
    lines = [line if line.startswith("k-NN") else line[0].upper() + line[1:] for line in lines]
    told = [tag("p", line.replace(" %", "\u00a0%")) for line in lines]
    return tag("div", *told, class_="verdict") if told else Markup()


def tiles(story: Story) -> Markup:
    """The most important numbers."""
    found_tiles: list[tuple[str, str, str]] = []
    results: dict[str, dict[str, Any]] = {}
    for result in results_of(story.results):
        results.setdefault(result.name, result.found)  # of the last checkpoint, if any
    for name, found in list(results.items())[:2]:
        others = (found.get("baselines") or {}).items()
        beside = ", ".join(f"{title} {value_of(o, found)}" for title, o in others)
        found_tiles.append((found.get("metric", name), value_of(found, found), beside))
    steps, batch = story.results.get("steps"), story.at("loader.batch_size")
    if isinstance(steps, int):
        found_tiles.append(
            ("Optimizer steps", f"{steps:,}", f"of {count(batch, 'image')}" if batch else "")
        )
    if isinstance(seconds := story.results.get("train_seconds"), int | float):
        device = (story.environment.get("machine") or {}).get("device") or ""
        found_tiles.append(("Trained for", duration(seconds), f"on {device}" if device else ""))
    if "prototype_perplexity" in story.curves:
        value, _, total = prototypes_text(story.curves).partition(" ")
        found_tiles.append((PROTOTYPES, value, total))
    if "loss" in story.curves:
        last = number(story.curves["loss"][-1, 1])
        found_tiles.append(("Loss", last, "not a measure of quality"))
    told = [
        tag("div", tag("dt", name), tag("dd", tag("b", value), tag("small", text)))
        for name, value, text in found_tiles
    ]
    return tag("dl", *told, class_="tiles") if told else Markup()


def curves(story: Story) -> Markup:
    told = "Over optimizer steps. The last value is next to the name; point at a curve for others."
    return (
        join(tag("p", told, class_="note"), drawn)
        if (drawn := curve_sections(story.curves))
        else Markup()
    )


def caveats(warnings: list[str], story: Story) -> Markup:
    if not warnings:
        return Markup()
    rows = [row[:2] for row in story.bad_files[:_LISTED]]
    told = [tag("ul", *(tag("li", warning) for warning in warnings))]
    if rows:
        title = f"Images that could not be read, {len(rows)} of {len(story.bad_files):,}"
        told.append(folded(title, table(["path", "reason"], rows, numeric=2)))
    return tag("aside", tag("h2", "Caveats"), *told, aria_label="Warnings")


def _run_section(story: Story) -> Markup:
    """Settings, data, machine, and the command that reproduces the run."""
    parts = [_command(story), listing(settings(story)), _classes(story), _automatic(story)]
    if story.config_text:
        title = "Full configuration" if story.is_run else "Stored metadata"
        parts.append(folded(title, tag("pre", story.config_text, tabindex=0)))
    return join(*parts)


def _command(story: Story) -> Markup:
    if not story.config:
        return Markup()
    if story.command is None:
        told = (
            "The command line was not saved, or would give a different configuration now: the "
            "full configuration below is the one that was run."
        )
        return tag("p", told, class_="note")
    box = tag("div", tag("pre", story.command, tabindex=0, id="command"), class_="command")
    told = "The same command resumes this run; with another name=… it starts a new one."
    return join(tag("h3", "Reproduce this run"), box, tag("p", told, class_="note"))


def settings(story: Story) -> list[tuple[str, str]]:
    """Terms and values; unknown values are empty."""
    at, machine = story.at, story.environment.get("machine") or {}
    versions = story.environment.get("versions") or {}
    about, git = story.about, str(story.environment.get("git") or "")[:12]
    spec = about.get("spec")
    local = f" and {at('augment.num_local')} of {at('augment.local_size')}"
    crops = f"2 of {at('augment.global_size')}{local if at('augment.num_local') else ''} pixels"
    lengths = {"max_time": "", "max_steps": " steps", "max_epochs": " epochs"}
    length = next((f"{v}{u}" for k, u in lengths.items() if (v := at(f"trainer.{k}"))), "")
    rate = at("optim.learning_rate.base")
    last = story.curves.get("images_per_second")
    memory = (story.results.get("estimate") or {}).get("memory")
    return [
        ("Data", _data(story, long=True)),
        ("Root", _text(at("data.root"))),
        ("Method", _method(story)),
        ("Backbone", _backbone(story)),
        ("Network", json.dumps(spec) if spec else ""),
        ("Parameters", f"{n:,}" if (n := about.get("num_parameters")) else ""),
        ("Image size", _text(about.get("image_size"))),
        ("Mean", _text(about.get("mean"))),
        ("Standard deviation", _text(about.get("std"))),
        ("From", _text(about.get("path"))),
        ("Optimizer steps", number(s) if (s := about.get("steps")) else ""),
        ("Crops", crops if at("augment.global_size") else ""),
        ("Batch", count(b, "image") if (b := at("loader.batch_size")) else ""),
        ("Length", length),
        ("Learning rate", number(rate) if isinstance(rate, float) else ""),
        ("Precision", _text(at("trainer.precision"))),
        ("Seed", _text(at("seed"))),
        ("Device", " · ".join(_text(machine[k]) for k in ("device", "platform") if k in machine)),
        ("Cores", _text(machine.get("cores"))),
        ("Speed", f"{number(float(last[-1, 1]))} images per second" if last is not None else ""),
        ("Peak memory", f"{memory / 2**20:,.0f} MiB in the first steps" if memory else ""),
        ("dino_lite", " at commit ".join(filter(None, [story.environment.get("dino_lite"), git]))),
        ("Python", _text(story.environment.get("python"))),
        ("Packages", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]


def _classes(story: Story) -> Markup:
    """Names of the classes, if any."""
    data = story.environment.get("data") or {}
    names = data.get("classes") or []
    more = int(data.get("num_classes") or 0) - len(names)
    if not names:
        return Markup()
    told = ", ".join(map(str, names)) + (f" and {more:,} more" if more > 0 else "")
    return folded("Classes", tag("p", told))


def _automatic(story: Story) -> Markup:
    """The keys that were "auto" in the request, and their chosen values."""
    request = story.environment.get("request") or {}
    rows = [
        [key, _text(story.at(key))]
        for key, value in request.items()
        if value == "auto" and story.at(key) not in (None, "auto")
    ]
    return folded("Chosen automatically", table(["key", "value"], rows)) if rows else Markup()


def _data(story: Story, long: bool = False) -> str:
    data: dict[str, Any] = story.environment.get("data") or {}
    if not data:
        return ""
    told = [f"{data.get('name')}: {count(data.get('num_images', 0), 'image')}"]
    if long and (size := data.get("size")):
        shown = data.get("sizes") or f"about {size[0]}x{size[1]} pixels"
        told.append(f"{shown.replace('x', '×', 2)}, {count(size[2], 'channel')}")
    if num := data.get("num_test"):
        told.append(count(num, "test image"))
    if "num_classes" in data:
        told.append(count(data["num_classes"], "class") if data["num_classes"] else "no labels")
    return ", ".join(told)


def _method(story: Story) -> str:
    return str(story.at("method._target_") or "").rpartition(".")[2]


def _backbone(story: Story) -> str:
    """Name and sizes of the backbone, as far as known."""
    spec = story.about.get("spec") or {}
    name, width, depth, patch = (
        story.at(f"backbone.{key}") or spec.get(key)
        for key in ("name", "embed_dim", "depth", "patch_size")
    )
    sizes = [f"{width} wide" if width else "", f"{depth} blocks" if depth else ""]
    told = ", ".join(filter(None, [*sizes, f"patch {patch}" if patch else ""]))
    return " ".join(filter(None, [_text(name), f"({told})" if told else ""]))


def _text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)
