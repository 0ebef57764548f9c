"""The report in a real browser: Debian's chromium, without a window."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dino_lite.commands.report import run_report
from dino_lite.config import compose
from test_report import result, write_run

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--v=0", "--allow-file-access-from-files"),
)
# In the page itself: opens what is folded, looks, and writes into the page around it.
LOOK = """
<script>
const parts = (selector) => [...document.querySelectorAll(selector)];
addEventListener("error", (event) => { window.failed = String(event.message); });
addEventListener("load", () => {
  for (const details of parts("details")) details.open = true;
  const images = [...document.images];
  const page = document.documentElement, chart = document.querySelector(".chart svg");
  const box = chart.getBoundingClientRect(), output = document.querySelector(".chart output");
  const before = output.textContent;
  chart.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width * .5}));
  const hovered = output.textContent;
  chart.dispatchEvent(new PointerEvent("pointerleave"));
  document.querySelector(".picture button").click();
  const enlarged = document.querySelector("dialog[open] img");
  const told = {
    failed: window.failed || null,
    undrawn: images.filter((image) => image.naturalWidth === 0).map((image) => image.alt),
    images: images.length,
    width: innerWidth,
    scrolled: Math.max(page.scrollWidth, document.body.scrollWidth),
    wide: parts("body *").filter((part) => !part.closest(".scroll, pre, svg, dialog")
      && part.getBoundingClientRect().right > innerWidth + 0.5)
      .map((part) => part.tagName + "." + part.className),
    background: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
    requests: performance.getEntriesByType("resource").map((entry) => entry.name)
      .filter((name) => !name.startsWith("data:")),
    curves: parts(".curve").filter((path) => path.getTotalLength() > 0).length,
    tall: Math.min(...parts(".chart svg").map((svg) => svg.getBoundingClientRect().height)),
    hover: [before, hovered, output.textContent],
    enlarged: enlarged.src === images[0].src,
  };
  parent.document.querySelector("pre").textContent = JSON.stringify(told);
});
</script>
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run that has everything: every picture, long names, several evaluations."""
    folder = tmp_path_factory.mktemp("browser") / ("a_run_with_a_long_name_" * 5)
    generator = np.random.default_rng(0)
    names = ("crops", "attention", "neighbors", "pca", "confusion", "map", "segmentation")
    pictures = {
        f"{name}.png": Image.fromarray(generator.integers(0, 256, (900, 1900, 3), dtype=np.uint8))
        for name in names
    }
    floors = {"raw pixels": {"value": 24.0}, "untrained": {"value": 58.0, "interval": [57.0, 59.0]}}
    warning = {"kind": "path", "text": "/a/path/without/a/space" * 12, "step": 7}
    table = [{f"a column {i}": i * 1.5 for i in range(12)}]
    results = {
        **{"steps": 500, "train_seconds": 83.0, "warnings": [warning]},
        "last": {
            "knn": result(49.7, baselines=floors, table=table),
            "retrieval": result(0.31, metric="mAP", unit="", interval=None),
        },
    }
    columns = ("loss", "knn", "rankme", "learning_rate", "data_wait", "some_unknown_column")
    lines = [f"{n},{','.join(str(i - n / 300) for i in range(6))}" for n in range(2000)]
    metrics = "\n".join([",".join(["step", *columns]), *lines])
    bad = "path,reason\n" + "\n".join(f"{'/long' * 40}/{i}.png,truncated" for i in range(30))
    changes = {"results.json": results, "metrics.csv": metrics, "bad_files.csv": bad} | pictures
    checkpoint = write_run(folder, **changes)
    return run_report(compose("report", [f"checkpoint={checkpoint}", "draw=false"]))


def look(report: Path, folder: Path, width: int, dark: bool = False) -> dict[str, Any]:
    """What a browser finds in a frame of `width` pixels: its own windows cannot be so narrow."""
    if CHROMIUM is None:
        pytest.skip("no chromium: scripts/test.sh --browser installs it (Debian, as root)")
    copy, frame = folder / "copy.html", folder / "frame.html"
    text = report.read_text(encoding="utf-8").replace("</head>", f"{LOOK}</head>")
    copy.write_text(text, encoding="utf-8")
    frame.write_text(
        "<pre></pre>"
        f"<iframe src='copy.html' style='width:{width}px;height:800px;border:0'></iframe>"
    )
    line = [
        *(CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}"),
        *(f"--window-size={max(width, 500) + 40},900",),
        *(f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom"),
        frame.as_uri(),
    ]
    environment = os.environ | {"HOME": str(folder)}
    done = subprocess.run(
        line, capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    found = re.search(r"<pre>(\{.*?\})</pre>", done.stdout, re.DOTALL)
    assert found, done.stderr
    console = [said for said in done.stderr.splitlines() if "CONSOLE" in said]
    return json.loads(unescape(found[1])) | {"console": console}


def luminance(color: str) -> float:
    """0 is black, 1 is white, of "rgb(r, g, b)" (ITU-R 601)."""
    red, green, blue = (int(part) for part in re.findall(r"\d+", color)[:3])
    return (0.299 * red + 0.587 * green + 0.114 * blue) / 255


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(360, False), (1200, True)])
def test_the_page_is_whole_in_a_browser(
    report: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    """No error, every picture and curve drawn, nothing wider than the window, nothing fetched; at
    phone width and in the dark."""
    found = look(report, tmp_path, width, dark)
    assert found["console"] == []
    assert found["failed"] is None
    assert (found["images"], found["undrawn"]) == (7, [])
    assert found["curves"] == 6
    assert found["tall"] > 100
    assert found["width"] == width
    assert found["scrolled"] <= found["width"]
    assert found["wide"] == []
    assert found["requests"] == []
    assert (luminance(found["background"]) < 0.15) is dark
    assert (luminance(found["ink"]) > 0.7) is dark
    before, hovered, after = found["hover"]
    assert hovered.startswith("step ")
    assert before == after
    assert found["enlarged"] is True


def test_the_page_stays_below_five_megabytes(report: Path) -> None:
    """With seven pictures of noise, which nothing makes small."""
    assert 500_000 < report.stat().st_size < 5_000_000
