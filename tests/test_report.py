"""The report's content: what is told, what is missing, what is escaped."""

from __future__ import annotations

import json
import re
import shlex
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dino_lite.commands.export import run_export
from dino_lite.commands.report import run_report
from dino_lite.config import compose, put, save
from dino_lite.contracts import UserError
from dino_lite.eval.curves import number, read_curves
from dino_lite.eval.gallery import PICTURES
from dino_lite.overrides import quote_override, unquote
from dino_lite.report.charts import line_chart
from dino_lite.report.markup import Markup, join, tag
from dino_lite.report.page import page
from dino_lite.report.story import read_story, reproduce, results_of
from dino_lite.report.thumbnails import data_uri, find_pictures
from dino_lite.report.worth import worth_section
from dino_lite.runs.checkpoint import find_checkpoint
from dino_lite.runs.identity import absolute_paths, requested
from dino_lite.runs.run import Run
from ranks import command
from test_importers import pretend_download, saved, small
from tiny import photos, train

_EVIL = "<script>alert(1)</script> & é"
_NOW = datetime(2026, 1, 2, 3, 4)


class Text(HTMLParser):
    """The tags of a page, its visible text, and whether elements are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.said.append(data)


def read(html: str) -> tuple[Text, str]:
    parser = Text()
    parser.feed(html)
    assert parser.open == []
    return parser, re.sub(r"[ \n]+", " ", " ".join(parser.said))


def result(value: float, **more: Any) -> dict[str, Any]:
    """What an evaluation leaves in results.json."""
    return {
        **{"metric": "k-NN top-1", "value": value, "unit": "%", "interval": [value - 1, value + 1]},
        **{"protocol": "by hand", "settings": {"k": 20}, "num_train": 900, "num_test": 100},
        **{"seconds": 1.5, "unreadable": 0},
        **more,
    }


def write_run(folder: Path, **changes: Any) -> Path:
    """A run's folder as `pretrain` leaves it, without having trained; None leaves a file out."""
    overrides = ["data=shapes", "trainer.max_steps=500"]
    config = absolute_paths(compose("pretrain", overrides))
    floors = {"raw pixels": {"value": 24.0}, "untrained": {"value": 28.0, "interval": [27.0, 29.0]}}
    files = {
        "results.json": {
            **{"finished": True, "steps": 500, "train_seconds": 83.0},
            "last": {"knn": result(49.7, baselines=floors)},
        },
        "environment.json": {
            **{"dino_lite": "0.1.0", "git": "abc123", "python": "3.11", "versions": {"torch": "2"}},
            "machine": {"platform": "Linux", "device": "cpu", "cores": 2},
            "data": {
                **{"name": "shapes", "num_images": 4000, "num_test": 1000, "size": [32, 32, 3]},
                **{"num_classes": 2, "classes": ["rings", _EVIL]},
            },
            "request": requested(config),
        },
        "metrics.csv": "step,loss,knn,learning_rate,odd\n"
        + "".join(
            f"{step},{6 - step / 100},{40 + step / 50 if step % 50 == 9 else ''},1e-3,{step}\n"
            for step in range(9, 500, 10)
        ),
        "crops.png": Image.fromarray(np.zeros((20, 30, 3), np.uint8)),
    } | changes
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").write_text("never opened")
    save(put(config, "loader.batch_size", 64), folder / "config.yaml")
    for name, content in files.items():
        path = folder / name
        if isinstance(content, Image.Image):
            content.save(path)
        elif content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            path.write_text(text, encoding="utf-8")
    return folder / "checkpoints" / "last.ckpt"


def told(checkpoint: Path) -> tuple[Text, str]:
    return read(page(read_story(find_checkpoint(str(checkpoint), "runs")), _NOW))


def test_a_page_tells_what_was_run_and_what_came_of_it(tmp_path: Path) -> None:
    """Name, state, data, device, versions, numbers with their floors, and when it was written."""
    html, text = told(write_run(tmp_path / "my run"))
    for words in (
        *("my run", "finished", "shapes: 4,000 images", "2 classes", "rings", "0.1.0 at commit"),
        *(
            "abc123",
            "torch 2",
            "49.70\u00a0%",
            "48.70 to 50.70",
            "raw pixels",
            "24.00\u00a0%",
            "by hand",
        ),
        *("28.00\u00a0%", "500", "1 min 23 s", "on cpu", "2026-01-02 at 03:04", "k = 20"),
        *("dino-lite pretrain data=shapes trainer.max_steps=500", "loader.batch_size 64"),
    ):
        assert words in text, words
    assert "Caveats" not in text
    assert [attrs["alt"] for name, attrs in html.tags if name == "img"] == [
        "Crops. Inputs of student and teacher in the first step, one row per image."
    ]


def test_nothing_on_the_page_comes_from_elsewhere(tmp_path: Path) -> None:
    """No address but data: and those within the page, and the browser is told to allow none."""
    html, _ = told(write_run(tmp_path / "run"))
    for _, attrs in html.tags:
        for key in ("src", "href", "action", "data"):
            if attrs.get(key):
                assert str(attrs[key]).startswith(("data:", "#"))
    policies = [attrs["content"] for name, attrs in html.tags if "http-equiv" in attrs]
    assert policies[0].startswith("default-src 'none'")
    assert "url(" not in page(read_story(find_checkpoint(str(tmp_path / "run"), "runs")), _NOW)


def test_names_are_text_wherever_they_come_from(tmp_path: Path) -> None:
    """Classes, paths, reasons, protocols, columns, tables, data and the run's own name."""
    records = [{_EVIL: _EVIL, "n": 3}]
    found = result(50.0, metric=_EVIL, protocol=_EVIL, settings={_EVIL: _EVIL}, table=records)
    found["baselines"] = {_EVIL: {"value": 60.0}}
    files = {
        "results.json": {
            "warnings": [{"kind": _EVIL, "text": _EVIL, "step": 1}],
            "finished": True,
            "last": {_EVIL: found},
        },
        "metrics.csv": f"step,{_EVIL}\n1,2\n2,3\n",
        "bad_files.csv": f'path,reason\n"{_EVIL}","{_EVIL}"\n',
    }
    checkpoint = write_run(tmp_path / _EVIL.replace("/", "|"), **files)
    html, text = told(checkpoint)
    assert [name for name, _ in html.tags].count("script") == 1
    assert text.count(_EVIL) >= 12


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"results.json": None}, "The run is not finished: it is at step 500"),
        ({"results.json": None, "metrics.csv": None}, "it is before its first logged step"),
        ({"metrics.csv": None}, "metrics.csv cannot be read (No such file or directory)"),
        ({"environment.json": None}, "environment.json cannot be read"),
        ({"results.json": "{"}, "results.json cannot be read"),
        (
            {
                "metrics.csv": "step,loss,skipped,skipped_total\n1,2,0,0\n2,2,2,2\n3,2,0,2\n",
                "results.json": {},
            },
            "2 of 4 steps had a gradient that is not finite and were skipped",
        ),
        ({"crops.png": "no picture"}, "crops.png cannot be shown"),
        (
            {"bad_files.csv": "path,reason\na,b\nc,d\n"},
            "2 images could not be read (bad_files.csv): training used others",
        ),
        ({"bad_files.csv": "path,reason\na,b\n"}, "1 image could not be read (bad_files.csv)"),
        (
            {"results.json": {"finished": True, "last": {"knn": result(9, unreadable=3)}}},
            "k-NN top-1 (knn) excludes 3 images that could not be read.",
        ),
    ],
)
def test_doubts_stand_first(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    """What is missing or unfinished is said, and the page is whole."""
    _, text = told(write_run(tmp_path / "run", **changes))
    assert "Caveats" in text
    assert words in text
    assert text.index(words) < text.rindex("Settings of the run")


def test_the_verdict_is_the_first_sentence(tmp_path: Path) -> None:
    """What a run measured of itself, and each other result with baselines, by its metric."""
    floors = {"raw pixels": {"value": 2.0, "interval": [1.0, 3.0]}}
    results = {
        **{"finished": True, "knn_trained": 17.6, "knn_untrained": 17.9, "knn_raw_pixels": 44.2},
        **{"labels": "no labels: x", "epochs": 3.5},
        "last": {"linear@cars": result(50.0, metric="linear top-1", baselines=floors)},
    }
    _, text = told(write_run(tmp_path / "run", **{"results.json": results}))
    text = text.replace("\u00a0", " ")
    first = (
        "Nothing was learned yet: 17.6 % against 17.9 % untrained and 44.2 % raw pixels (k-NN "
        "top-1). Next: train longer (this one saw each image 3.5 times)"
    )
    assert text.index(first) < text.index("17.60 %")
    assert "No labels: x." in text
    assert "Learned: 50.0 % against 2.0 % raw pixels (linear top-1 on cars, 95 % interval" in text


def test_the_loss_is_not_shown_as_a_success_or_a_failure(tmp_path: Path) -> None:
    """No first value beside the last; what to expect of it stands with its curve. One number of
    prototypes, by one name.
    """
    rows = "".join(f"{step},{5 + step},{4 + step},2,1,{step}\n" for step in range(3))
    columns = "step,loss,teacher_entropy,prototype_perplexity,kl_to_uniform,prototypes_used\n"
    html, text = told(write_run(tmp_path / "run", **{"metrics.csv": columns + rows}))
    assert "Loss 7 not a measure of quality" in text
    assert "at the start" not in text
    assert "which grows while these spread over the prototypes: the loss may rise at first" in text
    assert "Effective number of prototypes 2 of 5" in text
    charts = [attrs["aria-label"] for name, attrs in html.tags if name == "svg" and "role" in attrs]
    (chart,) = [label for label in charts if "ffective" in str(label)]
    assert str(chart).startswith("Effective number of prototypes, of 5: 2 at step")


def test_alarms_are_sentences_with_their_step(tmp_path: Path) -> None:
    """As a run keeps them."""
    checkpoint = write_run(tmp_path / "run")
    alarm = {"kind": "uniform_teacher", "text": "collapse: it fell asleep.", "step": 1200}
    Run(tmp_path / "run").add_warnings([alarm])
    _, text = told(checkpoint)
    assert "At step 1,200, collapse: it fell asleep." in text
    assert "uniform_teacher" not in text


def test_a_run_without_labels_has_a_page(tmp_path: Path) -> None:
    """Nothing was measured, and what to do is said."""
    environment = {"data": {"name": "photos", "num_images": 7, "num_classes": 0, "classes": []}}
    results = {"finished": True, "steps": 5, "train_seconds": 4000, "estimate": {"memory": 2**31}}
    changes = {"environment.json": environment, "results.json": results}
    _, text = told(write_run(tmp_path / "run", **changes))
    assert "photos: 7 images, no labels" in text
    assert f"No results yet: with labels, dino-lite evaluate checkpoint={tmp_path}/run" in text
    assert f"was not compared with baselines: dino-lite evaluate checkpoint={tmp_path}" in text
    assert "K-NN" not in text
    assert "1 h 6 min" in text
    assert "2,048 MiB" in text


def test_every_column_with_numbers_is_drawn_once(tmp_path: Path) -> None:
    """Known ones in their groups, unknown ones folded, a loss term that is the whole loss not."""
    rows = "".join(f"{step},{step},{step},3,x,{step / 7},{step}\n" for step in range(1, 30))
    text = "step,loss,dino,rankme,words,my_column,progress\n" + rows
    html, said = told(write_run(tmp_path / "run", **{"metrics.csv": text}))
    charts = [attrs["aria-label"] for name, attrs in html.tags if name == "svg" and "role" in attrs]
    assert [str(label).split(":")[0] for label in charts] == ["Loss", "RankMe", "my column"]
    assert said.index("More curves") < said.index("my column")


def test_a_chart_shows_its_points(tmp_path: Path) -> None:
    """Few as dots; many are thinned, the last and the extremes kept; one, and constants, too."""
    few = line_chart(np.array([[0, 1.0], [10, 3.0]]), "loss")
    assert few.count('class="dot"') == 2
    steps = np.arange(5000.0)
    values = np.sin(steps / 100)
    values[1234] = 9.0
    many = line_chart(np.stack([steps, values], axis=1), "loss")
    assert len(many) < 40_000
    points = json.loads(re.search(r'data-points="([^"]+)"', many)[1].replace("&quot;", '"'))
    assert points[-1][2] == "4,999"
    heights = [float(y) for y in re.findall(r" ([\d.]+)L", many)]
    assert min(heights) < 30  # the spike reaches the top of the area
    for y in (0.0, 5.0, -2e-9):
        assert "nan" not in line_chart(np.array([[3, y]]), "x")
        assert "nan" not in line_chart(np.array([[3, y], [4, y]]), "x")


def test_half_written_rows_are_passed_over(tmp_path: Path) -> None:
    """A run that is still writing; words are no numbers."""
    (tmp_path / "m.csv").write_text("step,loss,knn\n20,2,\n10,1,nan\n30,x,5\n4")
    curves = read_curves(tmp_path / "m.csv")
    assert {name: points.tolist() for name, points in curves.items()} == {
        "loss": [[10, 1], [20, 2]],
        "knn": [[30, 5]],
    }


def test_every_known_picture_is_taken_and_no_other(tmp_path: Path) -> None:
    """Also numbered ones; curves are drawn anew and strangers stay out."""
    for name in ("pca", "crops", "map_2", "confusion", "curves", "mapping", "cat", "attention"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    names = [picture.path.stem for picture in find_pictures(tmp_path)]
    assert names == ["crops", "attention", "pca", "map_2", "confusion"]


@pytest.mark.slow
def test_a_large_picture_is_made_small(tmp_path: Path) -> None:
    """It keeps to its bytes and its shape; a small one is left as large as it is."""
    noise = np.random.default_rng(0).integers(0, 256, (1500, 3000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    Image.new("RGBA", (30, 20)).save(tmp_path / "small.png")
    uri, width, height = data_uri(tmp_path / "large.png", 300_000)
    assert uri.startswith("data:image/webp;base64,")
    assert len(uri) < 420_000
    assert width == 2 * height
    assert data_uri(tmp_path / "small.png", 300_000)[1:] == (30, 20)


@pytest.mark.parametrize("name", ["x y", "it's", "é=1", "a,b", "[x]", "$HOME", "-n", "plain"])
def test_the_command_asks_for_the_same_again(tmp_path: Path, name: str) -> None:
    """As a shell reads it, from any folder, whatever the path."""
    (tmp_path / name).mkdir()
    overrides = [
        "data=folder",
        f"data.root={tmp_path / name}",
        "trainer.max_steps=7",
        f"name={name}",
    ]
    config = absolute_paths(compose("pretrain", overrides))
    line = reproduce(config, json.loads(json.dumps(requested(config))))
    assert line is not None
    program, command, *words = shlex.split(line)
    assert (program, command) == ("dino-lite", "pretrain")
    again = absolute_paths(compose("pretrain", [quote_override(word) for word in words]))
    assert requested(again) == requested(config)
    assert again["name"] == name


def test_relative_paths_are_whole_in_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One, and several; it was typed in another folder than it will be read in."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    for typed, whole in (("a", f"{tmp_path}/a"), ("[a,b]", f"[{tmp_path}/a,{tmp_path}/b]")):
        config = absolute_paths(compose("pretrain", [f"data.root={typed}"]))
        line = reproduce(config, requested(config))
        assert shlex.split(line or "") == ["dino-lite", "pretrain", f"data.root={whole}"]


def test_a_command_that_asks_for_something_else_is_not_shown(tmp_path: Path) -> None:
    """Where a configuration was changed after it was composed, or defaults have changed since."""
    checkpoint = write_run(tmp_path / "run")
    path = tmp_path / "run" / "environment.json"
    environment = json.loads(path.read_text())
    environment["request"]["seed"] = 5
    path.write_text(json.dumps(environment))
    _, text = told(checkpoint)
    assert "The command line was not saved, or would give a different configuration now" in text
    assert "dino-lite pretrain data=shapes" not in text
    assert reproduce({"overrides": ["no.such=key"]}, {}) is None


def test_quotes_that_come_back_by_themselves_are_taken_off() -> None:
    """And only those."""
    for override in ("data.root=/a b", "name=it's", "seed=3", "experiment=null"):
        assert unquote(quote_override(override)) == override
    assert unquote("augment.note='1'") == "augment.note='1'"


def test_markup_escapes_all_but_markup() -> None:
    """Children and values; attributes that are false are left out."""
    made = tag("p", "<b>", tag("i", "&"), class_='a"b', hidden=False, aria_label="<")
    assert made == '<p class="a&quot;b" aria-label="&lt;">&lt;b&gt;<i>&amp;</i></p>'
    assert tag("img", alt="") == '<img alt=""/>'
    assert join("<", Markup("<br>")) == "&lt;<br>"


def test_results_are_found_at_the_top_and_below_checkpoints() -> None:
    """An export's, a run's of last and best, and what a run measured of itself, once."""
    floors = {"knn_trained": 5.0, "knn_untrained": 4.0}
    plain, full = result(1.0), result(1.0, baselines={"untrained": {"value": 0.5}})
    assert [(r.name, r.checkpoint) for r in results_of({"knn": plain})] == [("knn", "")]
    both = {"best": {"knn": plain}, "last": {"knn": full}, **floors}
    assert [r.checkpoint for r in results_of(both)] == ["last", "best"]
    chosen = result(3.0, reference_choice={"value": 2.0, "rate": 0.1})
    assert [r.name for r in results_of({"linear": chosen})] == ["linear"]
    assert results_of({"last": {"odd": {"value": 1.0}}}) == []
    alone = results_of(floors)[0].found
    assert (alone["value"], alone["baselines"]) == (
        5.0,
        {"untrained": {"value": 4.0, "interval": None}},
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12000, "12,000"),
        (49.7, "49.7"),
        (0.04225, "0.04225"),
        (2e-6, "2e-6"),
        (-1.5, "-1.5"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    """As people write them."""
    assert number(value) == text


def test_counts_and_baselines_have_the_unit_of_their_result() -> None:
    """A large count is written out."""
    pairs = result(12345, unit="pairs", interval=None, baselines={"chance": {"value": 3}})
    _, text = read(worth_section(results_of({"duplicates": pairs})))
    assert "12,345\u00a0pairs" in text
    assert "3\u00a0pairs" in text


@pytest.mark.slow
def test_a_real_run_and_its_export_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a run to its page beside it; an export without its run tells what it holds."""
    run = train(tmp_path, "baselines=true")
    path = run_report(compose("report", ["checkpoint=latest", f"runs_dir={tmp_path}"]))
    assert path == run / "report.html"
    assert f"written to {path}" in capsys.readouterr().out
    _, text = read(path.read_text(encoding="utf-8"))
    assert "shapes: 44 images" in text
    assert "waves, checks" in text
    for title in ("Map of the images", "Confusion", "Patch features as colors"):
        assert title in text
    drawn = {name: (run / f"{name}.png").stat().st_mtime_ns for name in PICTURES}
    (run / "map.png").unlink()
    run_report(compose("report", [f"checkpoint={run}", f"runs_dir={tmp_path}", "draw=false"]))
    assert not (run / "map.png").exists()
    run_report(compose("report", [f"checkpoint={run}", f"runs_dir={tmp_path}"]))
    again = {name: (run / f"{name}.png").stat().st_mtime_ns for name in PICTURES}
    assert [name for name in PICTURES if again[name] != drawn[name]] == ["map"]
    run_export(compose("export", [f"checkpoint={run}"]))
    export = (run / "export" / "safetensors").rename(tmp_path / "export")
    (export / "results.json").write_text(json.dumps({"knn": result(33.0)}))
    out = tmp_path / "pages" / "é.html"
    assert run_report(compose("report", [f"checkpoint={export}", f"out={out}"])) == out
    _, text = read(out.read_text(encoding="utf-8"))
    for words in (run.name, "33.00\u00a0%", '"embed_dim": 32', "Parameters", "not finished"):
        assert (words in text) is (words != "not finished"), words


def test_data_that_is_gone_costs_the_pictures_and_no_more(tmp_path: Path) -> None:
    """A sentence says so."""
    root = photos(tmp_path / "photos", [f"{c}/{i}.png" for c in "xy" for i in range(6)])
    run = train(tmp_path, f"data.root={root}", "trainer.max_steps=2", data="folder")
    for name in PICTURES:
        (run / f"{name}.png").unlink(missing_ok=True)
    root.rename(tmp_path / "elsewhere")
    path = run_report(compose("report", [f"checkpoint={run}", f"runs_dir={tmp_path}"]))
    _, text = read(path.read_text(encoding="utf-8"))
    assert "Pictures could not be drawn: " in text
    assert "photos: 12 images" in text


def test_foreign_weights_have_a_page_each_with_their_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files beside each other, and a name of timm."""
    pretend_download(monkeypatch)
    files = [saved(small().state_dict(), tmp_path, name) for name in ("a.pth", "b.pth")]
    pages = []
    for place, checkpoint in enumerate([*files, "timm:test_vit"]):
        results = find_checkpoint(str(checkpoint), tmp_path).results_file
        results.write_text(json.dumps({"knn@shapes": result(31.0 + place)}))
        asked = compose("report", [f"checkpoint='{checkpoint}'", f"runs_dir={tmp_path}"])
        pages.append(run_report(asked))
    names = ["a.pth.report.html", "b.pth.report.html", "timm_test_vit.report.html"]
    assert [page.name for page in pages] == names
    for place, page_file in enumerate(pages):
        assert f"3{1 + place}.00\u00a0%" in read(page_file.read_text(encoding="utf-8"))[1]


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    """No checkpoint, and a place that cannot be written."""
    with pytest.raises(UserError, match="checkpoint= is missing"):
        run_report(compose("report", []))
    checkpoint = write_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "x.html"
    with pytest.raises(UserError, match="cannot be written"):
        run_report(compose("report", [f"checkpoint={checkpoint}", f"out={out}"]))


def test_the_command_line_writes_the_page(tmp_path: Path, root: Path) -> None:
    """As a user calls it."""
    write_run(tmp_path / "a run")
    done = command("report", f"checkpoint={tmp_path}/a run", cwd=root)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a run" / "report.html").is_file()
