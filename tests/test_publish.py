"""What `dino-lite export` promises of every format: read back elsewhere, whole or not at all, and
told in a card. The formats here are small, and wrong in one way each.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from dino_lite.commands.export import run_export
from dino_lite.config import compose, put
from dino_lite.contracts import Backbone, Tokens, UserError
from dino_lite.data.clean import clean
from dino_lite.data.photometric import Normalize
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.formats import foreign_process, swap, verify
from dino_lite.formats.card import usage
from dino_lite.formats.format import Claim, Format
from dino_lite.formats.opened import Opened
from dino_lite.formats.portable import portable
from dino_lite.formats.publish import publish
from dino_lite.formats.reading import told_preprocessing
from dino_lite.formats.safetensors import SafeTensors
from dino_lite.report.origin import license_beside
from tiny import photos, train

READ = "from safetensors.torch import load_file\nweight = load_file(f'{folder}/w.safetensors')['w']"
RUN = """
patches = torch.nn.functional.avg_pool2d(pixels, 8).flatten(2).transpose(1, 2) @ weight.T
cls = patches.mean(dim=1)
"""
HIDDEN = """
try:
    import dino_lite
except ImportError:
    pass
else:
    raise RuntimeError('found dino_lite')
"""


class Means(Backbone):
    """Patch tokens are linear in the mean color."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = {}
        self.embed_dim, self.patch_size, self.in_chans, self.num_blocks = 5, 8, 3, 1
        self.weight = torch.nn.Parameter(torch.randn(5, 3))

    def forward(self, images: Tensor, mask: Any = None, cls_only: bool = False) -> Tokens:
        """Mean colors of patches, mapped."""
        patches = F.avg_pool2d(images, 8).flatten(2).transpose(1, 2) @ self.weight.T
        grid = (images.shape[2] // 8, images.shape[3] // 8)
        return Tokens(patches.mean(dim=1), patches, None, grid)


class Plain(Format):
    """One file of safetensors, read without dino_lite by what stands in `run`."""

    name = "plain"
    library = "torch"

    def __init__(self, run: str = RUN, load: str = READ, here: bool = True, **claim: Any) -> None:
        self.load, self.run, self.told = load, run, claim
        self.own = here  # type: ignore[misc]  # no process: the comparison is the same

    def write(self, opened: Opened, folder: Path) -> list[Claim]:
        """Write the weight."""
        save_file({"w": opened.backbone.weight.detach()}, folder / "w.safetensors")
        load = f"import torch\n{self.load}"
        return [Claim(load, self.run, (opened.preprocessing.size,), **self.told)]


HOW = Preprocessing((32, 32), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


@pytest.fixture
def opened() -> Opened:
    """A backbone with what is known of it."""
    return Opened(Means().eval(), HOW, {"run": "test"})


def export(form: Format, opened: Opened, target: Path, num: int = 3, **more: Any) -> dict[str, Any]:
    """Publish it, held against noise."""
    return publish(form, opened, target, verify.Original(opened, pictures(num)), **more)


def pictures(num: int, size: tuple[int, int] = (50, 40)) -> list[np.ndarray]:
    """Smooth noise, as photographs are, of rows and columns `size`."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(num):
        coarse = Image.fromarray(random.integers(0, 256, (7, 7, 3), dtype=np.uint8))
        found.append(np.asarray(coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC)))
    return found


def left(folder: Path) -> set[str]:
    """All that is there."""
    return {path.name for path in folder.iterdir()}


def blocks(card: Path) -> list[str]:
    """The Python that a card shows."""
    return re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An export that was read in a process of its own, where it looked for dino_lite."""
    torch.manual_seed(0)
    target = tmp_path_factory.mktemp("runs") / "export" / "plain"
    form = Plain(load=HIDDEN + READ, here=False, any_size=True)
    return target, export(form, Opened(Means().eval(), HOW, {}), target)


def test_a_format_is_read_back_where_dino_lite_cannot_be_imported(elsewhere: Any) -> None:
    """At two batch sizes, at the size of the training and three others, one rectangular."""
    target, told = elsewhere
    checks = told["verification"]["checks"]
    asked = {(tuple(check["size"]), check["batch"]) for check in checks}
    assert asked == {((32, 32), 1), ((32, 32), 3)} | {
        (size, batch) for size in ((16, 16), (40, 40), (40, 56)) for batch in (1, 2)
    }
    assert told["largest_difference"] < 1e-5
    assert json.loads((target / "export.json").read_text())["verification"]["checks"] == [
        check | {"size": list(check["size"])} for check in checks
    ]


def test_the_cards_lines_give_the_originals_tokens(
    elsewhere: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Executed as they stand, where dino_lite cannot be imported; images are read as the
    evaluations read them.
    """
    target, _ = elsewhere
    photos(tmp_path, ["image.jpg"], size=(90, 71))
    (code,) = blocks(target / "README.md")
    names: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "dino_lite", None)
        patch.chdir(tmp_path)
        exec(code.replace("'plain'", repr(str(target))), names)
    expected = as_evaluated(tmp_path / "image.jpg", HOW)
    torch.testing.assert_close(names["pixels"], expected, rtol=0, atol=1e-5)
    weight = load_file(target / "w.safetensors")["w"]
    patches = F.avg_pool2d(expected, 8).flatten(2).transpose(1, 2) @ weight.T
    torch.testing.assert_close(names["patches"], patches, rtol=0, atol=1e-5)
    torch.testing.assert_close(names["cls"], patches.mean(dim=1), rtol=0, atol=1e-5)


def as_evaluated(path: Path, how: Preprocessing) -> Tensor:
    """The image as evaluations give it to a network."""
    image = clean(np.asarray(Image.open(path).convert("RGB")), how)
    return Normalize(how.mean, how.std)(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])


@pytest.mark.parametrize(
    "how",
    [
        HOW,
        HOW._replace(size=(24, 40)),
        HOW._replace(squash=True, interpolation="bilinear", crop=1.0),
        HOW._replace(size=(30, 30), crop=0.9, rule="timm"),
        HOW._replace(size=(31, 31), crop=0.9, rule="hugging_face"),
        HOW._replace(size=(24, 32), crop=0.8, rule="hugging_face"),
        HOW._replace(border=True, crop=1.0),
        HOW._replace(border=True, crop=0.9, rule="timm"),
    ],
)
@pytest.mark.parametrize("size", [(90, 71), (50, 81), (32, 32)])
def test_the_cards_lines_read_an_image_as_evaluations_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Preprocessing, size: tuple[int, int]
) -> None:
    """By every rule of resizing and cropping, up to rounding."""
    photos(tmp_path, ["image.png"], size=size)
    Image.open(tmp_path / "image.png").save(tmp_path / "image.jpg", quality=95)
    claim = Claim("", "", (how.size,))._asdict()
    about = {"preprocessing": told_preprocessing(how), "in_chans": 3, "folder": "x"}
    code = usage(about, claim).partition("with torch")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    expected = as_evaluated(tmp_path / "image.jpg", how)
    torch.testing.assert_close(names["pixels"], expected, rtol=0, atol=1e-5)


def test_what_dino_lite_reads_is_shown_with_it(tmp_path: Path) -> None:
    """The card of its own format, and its lines."""
    from test_export import vit

    opened = Opened(vit().eval(), HOW, {})
    told = export(SafeTensors(), opened, tmp_path / "own")
    assert {check["batch"] for check in told["verification"]["checks"]} == {1, 2, 3}
    photos(tmp_path, ["image.jpg"])
    names: dict[str, Any] = {}
    (code,) = blocks(tmp_path / "own" / "README.md")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        exec(code, names)
    with torch.no_grad():
        assert torch.equal(names["cls"], opened.backbone(names["pixels"]).cls)


def test_a_process_in_which_dino_lite_can_be_imported_is_no_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As here, where it is imported already: the answer is an error."""
    (tmp_path / "job.json").write_text(json.dumps({"path": []}))
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit):
        foreign_process.main(tmp_path)
    assert "can be imported there" in json.loads((tmp_path / "answer.json").read_text())["error"]


def test_the_process_does_not_find_the_folders_of_dino_lite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of an editable install or PYTHONPATH; and what is imported nevertheless is told."""
    (tmp_path / "mine" / "dino_lite").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    came = "import sys, types\nsys.modules['dino_lite'] = types.ModuleType('dino_lite')"
    job = {
        "folder": str(tmp_path),
        "path": [str(tmp_path / "mine"), str(tmp_path / "other")],
        "claims": [{"load": came, "run": "", "sizes": [], "read": "", "pictures": [], "file": ""}],
        "repeats": 1,
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    save_file({"32x32": torch.zeros(1)}, tmp_path / "pixels.safetensors")
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [each for each in sys.modules if each.partition(".")[0] == "dino_lite"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit):
        foreign_process.main(tmp_path)
    assert str(tmp_path / "other") in sys.path
    assert str(tmp_path / "mine") not in sys.path
    having = {each for each in sys.path if (Path(each) / "dino_lite").exists()}
    assert having <= {str(Path(torch.__file__).parents[1])}
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert answer["error"] == "its lines have imported dino_lite"
    monkeypatch.delitem(sys.modules, "dino_lite")


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (Plain(RUN + "cls = cls * 1.01"), r"differs .* by 1\.\de-02 .*32x32 pixels"),
        (Plain(RUN + "patches = patches.clone()\npatches[0, 0, 0] = float('nan')"), "by nan"),
        (Plain(RUN + "if len(pixels) > 1:\n    cls[1] += 1"), "a batch of 3"),
        (Plain(RUN + "if pixels.shape[2] > 32:\n    cls += 1", any_size=True), "40x40 pixels"),
        (Plain(RUN + "if pixels.shape[3] > 40:\n    cls += 1", any_size=True), "40x56 pixels"),
        (Plain(RUN + "patches = patches[:, 1:]"), r"shape \(1, 15, 5\) instead of \(1, 16"),
        (Plain("cls = pixels.mean((2, 3)) @ weight.T"), r"patches of shape \(0,\)"),
        (Plain(load="import nonsense_of_mine"), "loading it: ModuleNotFoundError: No module named"),
        (Plain("raise ValueError('wrong\\nhere')"), "reading 1 of 32x32 pixels: ValueError: wrong"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_and_leaves_nothing(
    tmp_path: Path, opened: Opened, form: Plain, words: str
) -> None:
    """Other numbers, NaN, one image of a batch, another size, shape, and what cannot be read."""
    with pytest.raises(UserError, match=words):
        export(form, opened, tmp_path / "export" / "plain")
    assert left(tmp_path) == set()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGABRT)",
            r"was ended by SIGABRT; is there enough memory\?$",
        ),
        ("raise SystemExit('no such instruction')", r"ended with code 1 \(no such instruction\)"),
    ],
)
def test_a_process_that_ends_before_it_answers_is_told(
    tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch, code: str, words: str
) -> None:
    """As when a library in C aborts, or memory runs out."""
    (tmp_path / "script.py").write_text(code)
    monkeypatch.setattr(foreign_process, "__file__", str(tmp_path / "script.py"))
    with pytest.raises(UserError, match=f"format=plain cannot be read back, .* {words}"):
        export(Plain(here=False), opened, tmp_path / "plain")
    assert left(tmp_path) == {"script.py"}


def until(holds: Callable[[], bool]) -> None:
    """Wait for it, a minute at most."""
    last = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < last
        time.sleep(0.02)


def runs(pid: int) -> bool:
    """Whether a process is there, and has not ended without anybody who asked for it."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_killed_export_ends_the_other_process_and_leaves_nothing_elsewhere(
    tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By SIGKILL, after which no line of ours runs; the next export removes what is beside it."""
    target, begun = tmp_path / "runs" / "plain", tmp_path / "begun"
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    told = f"import os, time\nprint(os.getpid(), file=open({str(begun)!r}, 'w'), flush=True)"
    if not (pid := os.fork()):
        with suppress(BaseException):
            export(Plain(load=f"{told}\ntime.sleep(600)", here=False), opened, target)
        os._exit(1)
    until(lambda: begun.is_file() and begun.read_text().endswith("\n"))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    until(lambda: not runs(int(begun.read_text())))
    assert left(tmp_path / "tmp") == set()
    assert left(tmp_path / "runs") == {".plain.part"}
    export(Plain(), opened, target)
    assert left(tmp_path / "runs") == {"plain"}


def test_a_process_that_takes_much_longer_than_the_original_is_ended(
    tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a sentence, with nothing left."""
    (tmp_path / "script.py").write_text("import time; time.sleep(100)")
    monkeypatch.setattr(foreign_process, "__file__", str(tmp_path / "script.py"))
    monkeypatch.setattr(verify, "_LEAST_SECONDS", 0.2)
    with pytest.raises(UserError, match=r"was ended after \d seconds without an answer"):
        export(Plain(here=False), opened, tmp_path / "plain")
    assert left(tmp_path) == {"script.py"}


def test_a_format_without_claims_is_refused(tmp_path: Path, opened: Opened) -> None:
    """Nothing would be verified."""

    class Silent(Plain):
        def write(self, opened: Opened, folder: Path) -> list[Claim]:
            return [claim._replace(sizes=()) for claim in super().write(opened, folder)][
                self.skip :
            ]

    for skip in (0, 1):
        form = Silent()
        form.skip = skip  # type: ignore[attr-defined]
        with pytest.raises(UserError, match="format=plain claims nothing that could be checked"):
            export(form, opened, tmp_path / "plain")
    assert left(tmp_path) == set()


def test_one_image_makes_two_batch_sizes(tmp_path: Path, opened: Opened) -> None:
    """It is shown mirrored, too, and counted once."""
    told = export(Plain(), opened, tmp_path / "plain", num=1)
    assert [check["batch"] for check in told["verification"]["checks"]] == [1, 2]
    assert told["verification"]["num_images"] == 1
    assert "on 1 real image (" in (tmp_path / "plain" / "README.md").read_text()


def test_a_card_names_the_users_method_and_what_is_reduced(tmp_path: Path, opened: Opened) -> None:
    """As conf/method has it; results are of the whole network."""
    result = {"name": "knn", "metric": "k-NN top-1", "value": 50.0}
    card = {
        "config": {"method": {"_target_": "a.DINOv2"}, "choices": {"method": "dinov3"}},
        "compact": {"width": 5, "of": 384, "whiten": True},
        "results_of": 384,
        "results": [result],
    }
    whole = {"kind": "vit", "depth": 2, "more": {"a": 1}}
    opened.backbone.spec = {"whole": whole, "width": 5}
    export(Plain(), opened._replace(card=card), tmp_path / "plain")
    text = (tmp_path / "plain" / "README.md").read_text()
    assert "dinov3" in yaml.safe_load(text.split("---\n")[1])["tags"]
    for words in (
        "| method | dinov3 |",
        "| class token | 5 of 384 numbers, by PCA of the class tokens of training images, whitened",
        "| backbone | kind=vit, depth=2, more.a=1 |",
        "Of the whole network's class token of 384 numbers.",
    ):
        assert words in text, words


@pytest.mark.parametrize(
    ("free", "words"),
    [
        (True, "Images have any multiple of 8 pixels per side; trained at 32 x 32."),
        (False, "Images have 32 x 32 pixels."),
    ],
)
def test_a_card_tells_the_sizes_of_images(
    tmp_path: Path, opened: Opened, free: bool, words: str
) -> None:
    """Once."""
    export(Plain(any_size=free), opened, tmp_path / "plain")
    assert words in (tmp_path / "plain" / "README.md").read_text()


class Fails(Plain):
    """Writes half, then raises."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def write(self, opened: Opened, folder: Path) -> list[Claim]:
        """Fail halfway."""
        (folder / "half").write_bytes(b"half")
        raise self.error


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (OSError(28, "No space left on device"), UserError, "Cannot write to .*plain: No space"),
        (RuntimeError("failed (os error 28)"), UserError, "Cannot write to .*: the disk is full"),
        (UserError("format=plain cannot hold it."), UserError, "cannot hold it"),
        (RuntimeError("a bug"), RuntimeError, "a bug"),
        (KeyboardInterrupt("SIGINT"), KeyboardInterrupt, "SIGINT"),
    ],
)
def test_a_failed_export_leaves_the_former_one(
    tmp_path: Path, opened: Opened, error: BaseException, raised: Any, words: str
) -> None:
    """Whole, and nothing beside it."""
    export(Plain(), opened, tmp_path / "plain")
    before = {path: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    with pytest.raises(raised, match=words):
        export(Fails(error), opened, tmp_path / "plain")
    assert {path: path.read_bytes() for path in (tmp_path / "plain").iterdir()} == before
    assert left(tmp_path) == {"plain"}


@pytest.mark.parametrize("in_one_step", [True, False])
def test_an_export_replaces_the_former_one_whole(
    tmp_path: Path, opened: Opened, in_one_step: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what a killed process left; what others put there stays, such as results."""
    if not in_one_step:
        monkeypatch.setattr(swap, "_exchange", lambda one, two: False)
    target = tmp_path / "plain"
    export(SafeTensors(), _vit(), target)
    (target / "results.json").write_text("{}")
    killed(swap.replaced(target))
    (tmp_path / ".plain.part" / "new" / "w.safetensors").write_text("half")
    told = export(Plain(), opened, target)
    assert left(target) == {"w.safetensors", "README.md", "export.json", "results.json"}
    assert set(told["files"]) == left(target) - {"results.json"}
    assert left(tmp_path) == {"plain"}


def killed(context: Any) -> None:
    """Enter a context as a process does that is killed inside, whose locks the system drops."""
    pid = os.fork()
    if not pid:
        context.__enter__()
        os._exit(0)
    os.waitpid(pid, 0)


@pytest.mark.parametrize("exchange", [True, False])
def test_what_a_process_left_that_was_killed_after_the_exchange_is_no_loss(
    tmp_path: Path, opened: Opened, exchange: bool
) -> None:
    """The former export is removed if the new one is in place, else it is put back."""
    target = tmp_path / "plain"
    export(Plain(), opened, target)
    killed(swap.replaced(target))
    target.rename(tmp_path / ".plain.part" / "former")
    if exchange:
        (tmp_path / ".plain.part" / "new").rename(target)
    with pytest.raises(UserError, match="not now"):
        export(Fails(UserError("not now.")), opened, target)
    assert left(tmp_path) == {"plain"}
    assert ("w.safetensors" in left(target)) != exchange


def test_the_former_export_is_locked_until_it_is_removed(
    tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a second process cannot take the place where it is being removed."""
    target, told = tmp_path / "plain", []
    export(Plain(), opened, target)
    real = swap._empty

    def empty(hidden: Path) -> None:
        with pytest.raises(UserError, match="Another process is writing") as error:
            swap._locked(hidden, target)
        told.append(error.value)
        real(hidden)

    monkeypatch.setattr(swap, "_empty", empty)
    export(Plain(), opened, target)
    assert len(told) == 2
    assert left(tmp_path) == {"plain"}


def a_folder(hidden: Path) -> None:
    (hidden / "sub").mkdir(parents=True)
    (hidden / "sub" / "data.txt").write_text("mine")


def a_link(hidden: Path) -> None:
    a_folder(hidden.with_name("elsewhere"))
    hidden.symlink_to("elsewhere")


@pytest.mark.parametrize(
    "make",
    [a_folder, a_link, lambda hidden: hidden.write_text("x"), lambda h: h.symlink_to("nowhere")],
)
def test_a_hidden_folder_of_somebody_else_is_left_alone(
    tmp_path: Path, opened: Opened, make: Callable[[Path], Any]
) -> None:
    """A folder, a link to one, a file, a link to nothing."""
    make(tmp_path / ".plain.part")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(UserError, match=r"\.plain\.part was not made by dino-lite.*: rename it"):
        export(Plain(), opened, tmp_path / "plain")
    after = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    assert after == before


def test_everybody_may_read_an_export_as_other_files(tmp_path: Path, opened: Opened) -> None:
    """All its files have the mode of the umask; others keep theirs."""
    target = tmp_path / "plain"
    before = os.umask(0o027)
    try:
        export(Plain(), opened, target)
        (target / "mine").touch(0o600)
        export(Plain(), opened, target)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in target.iterdir()}
    assert modes.pop("mine") == 0o600
    assert {*modes.values()} == {0o640}
    assert target.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("about", [None, {"files": ["model.safetensors"]}, {"written_by": "x"}])
def test_a_model_of_another_program_is_no_former_export(
    tmp_path: Path, opened: Opened, about: Any
) -> None:
    """Although it has files of the same names."""
    target = tmp_path / "plain"
    target.mkdir()
    save_file({"w": torch.zeros(1)}, target / "model.safetensors")
    (target / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
    if about is not None:
        (target / "export.json").write_text(json.dumps(about))
    before = {path: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(UserError, match=r"holds other files than an export's, such as config"):
        export(Plain(), opened, target)
    assert {path: path.read_bytes() for path in target.iterdir()} == before


def test_an_export_of_a_former_version_is_replaced(tmp_path: Path, opened: Opened) -> None:
    """Which its config.json tells."""
    export(SafeTensors(), _vit(), tmp_path / "plain")
    for name in ("export.json", "README.md"):
        (tmp_path / "plain" / name).unlink()
    export(Plain(), opened, tmp_path / "plain")
    assert left(tmp_path / "plain") == {"w.safetensors", "README.md", "export.json"}


def test_a_file_of_the_users_is_not_replaced_by_a_new_one(tmp_path: Path, opened: Opened) -> None:
    """Beside an export that had none of this name."""
    target = tmp_path / "own"
    export(SafeTensors(), _vit(), target)
    (target / "w.safetensors").write_text("mine")
    with pytest.raises(UserError, match=r"holds a w\.safetensors that is no file of the export"):
        export(Plain(), opened, target)
    assert (target / "w.safetensors").read_text() == "mine"


def _vit() -> Opened:
    from test_export import vit

    return Opened(vit().eval(), HOW, {})


def test_two_processes_do_not_write_one_folder(tmp_path: Path, opened: Opened) -> None:
    """The second is told."""
    target = tmp_path / "plain"
    with swap.replaced(target), pytest.raises(UserError, match=f"writing {target}: wait"):
        export(Plain(), opened, target)
    assert left(tmp_path) == {"plain"}


def test_folders_of_others_are_not_replaced(tmp_path: Path, opened: Opened) -> None:
    """One with photographs, the current one, a file; a link leads where it leads."""
    photos(tmp_path / "mine", ["cat.png"])
    with pytest.raises(UserError, match=r"mine holds other files .* such as cat\.png"):
        export(Plain(), opened, tmp_path / "mine")
    with pytest.raises(UserError, match=r"Cannot write to .*cat\.png: it is a file"):
        export(Plain(), opened, tmp_path / "mine" / "cat.png")
    with pytest.raises(UserError, match=r"Cannot write to .*below: File exists"):
        export(Plain(), opened, tmp_path / "mine" / "cat.png" / "below")
    (tmp_path / "empty").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "empty")
        with pytest.raises(UserError, match="current folder"):
            export(Plain(), opened, Path())
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    export(Plain(), opened, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty" / "w.safetensors").is_file()
    assert left(tmp_path) == {"mine", "empty", "link"}


def test_missing_packages_are_told_before_anything_is_read(tmp_path: Path) -> None:
    """With the command that installs them."""
    form = Plain()
    form.packages = ("torch", "no-such-thing")  # type: ignore[misc]
    with pytest.raises(
        UserError, match=r"format=a needs no-such-thing: pip install 'dino-lite\[exp"
    ):
        verify.demand_packages({"a": form})


def test_settings_are_told_without_folders_hosts_and_queries() -> None:
    """What is no path stays."""
    home = str(Path.home())
    told = portable(
        {
            "data": {"root": ["/mnt/photos/train", "s3://bucket.of.mine/set/a.tar?key=1", home]},
            "runs_dir": "../mine/runs",
            "labels": "auto",
            "overrides": ["data.root=/mnt/my photos/x", "trainer.max_steps=2", "+eval=[knn]"],
            "_target_": "dino_lite.data.auto.open_auto",
            "checkpoint": "timm:vit_small_patch16_224",
            "note": "read from /mnt/photos/a b, C:\\Users\\me\\x, ~/y; 3 images/s, and/or 1/2",
        }
    )
    assert told["data"]["root"] == ["train", "a.tar", "~"]
    assert (told["runs_dir"], told["labels"]) == ("runs", "auto")
    assert told["overrides"] == ["data.root=x", "trainer.max_steps=2", "+eval=[knn]"]
    assert told["_target_"] == "dino_lite.data.auto.open_auto"
    assert told["checkpoint"] == "timm:vit_small_patch16_224"
    assert told["note"] == "read from a b, x, y; 3 images/s, and/or 1/2"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run on photographs, begun with weights that have a license."""
    folder = tmp_path_factory.mktemp("somebody")
    names = [
        f"{split}/{kind}/{i}.png" for split in ("train", "test") for kind in "ab" for i in "123"
    ]
    photos(folder / "photos", names)
    words = [f"data.root={folder / 'photos'}", "trainer.max_steps=2", "loader.batch_size=4"]
    first = train(folder / "first", *words, data="folder")
    out = folder / "begun"
    run_export(compose("export", [f"checkpoint={first}", f"out={out}", "license=cc-by-nc-4.0"]))
    begun = f"backbone.pretrained={out}"
    run = train(folder / "runs", *words, begun, "baselines=true", data="folder")
    return run


@pytest.mark.slow
def test_a_card_tells_a_run_without_its_makers_folders(run: Path) -> None:
    """Data, length, start with its license, numbers with baselines; the hub reads its beginning."""
    found = run_export(compose("export", [f"checkpoint={run}", "license=My own terms"]))
    folder = Path(found["safetensors"]["directory"])
    for path in folder.rglob("*"):
        content = path.read_bytes()
        for secret in (str(run.parents[1]), str(Path.home()) + "/", "runs_dir: /", "somebody"):
            assert secret.encode() not in content, (path.name, secret)
    card = (folder / "README.md").read_text()
    begin = yaml.safe_load(card.split("---\n")[1])
    assert begin["library_name"] == "dino-lite"
    assert (begin["license"], begin["license_name"]) == ("other", "My own terms")
    assert {"dino", "dino-lite", "safetensors"} <= set(begin["tags"])
    digest = json.loads((run / "environment.json").read_text())["data"]["digest"]
    for words in (
        f"photos: 6 training images, digest {digest}, 6 test images, 2 classes",
        "2 steps, 8 images seen",
        "begun (license of its weights: cc-by-nc-4.0)",
        "license of these weights | My own terms",
        "dino, losses dino",
        "16 x 16 pixels becomes a class token of 32 numbers",
        "root: photos",
    ):
        assert words in card, words
    number = r"[\d.]+"
    row = (
        rf"knn: k-NN top-1 \| {number} % \| {number} to {number} \| untrained {number}, raw pixels"
    )
    assert re.search(row, card)
    again = json.loads((folder / "export.json").read_text())
    assert again["training"]["start"] == [{"name": "begun", "license": "cc-by-nc-4.0"}]
    assert again["preprocessing"]["resize"] == 18

    out = folder.with_name("again")  # of the export, without the run
    told = run_export(compose("export", [f"checkpoint={folder}", f"out={out}", "data=shapes"]))
    kept = ("start", "data", "images_seen", "config", "results")
    found = told["safetensors"]["training"]
    assert {k: found[k] for k in kept} == {k: again["training"][k] for k in kept}


def test_a_license_is_what_stands_beside_weights(tmp_path: Path) -> None:
    """In a model card or timm's config.json; a repository's is not that of weights."""
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    (tmp_path / "LICENSE").write_text("Apache-2.0")
    (tmp_path / "README.md").write_text("# A model\nlicense: mit\n")
    assert license_beside(file) == license_beside(tmp_path) == "unknown"
    (tmp_path / "config.json").write_text('{"pretrained_cfg": {"license": "cc-by-nc-4.0"}}')
    assert license_beside(file) == license_beside(tmp_path) == "cc-by-nc-4.0"
    (tmp_path / "README.md").write_text("---\ntags: [a]\nlicense: apache-2.0\n---\n# A model\n")
    assert license_beside(file) == "apache-2.0"
    assert license_beside(tmp_path / "gone.pth") == "apache-2.0"
    assert license_beside(tmp_path / "gone" / "gone.pth") == license_beside(None) == "unknown"


@pytest.mark.slow
def test_formats_are_written_although_another_is_refused(run: Path, tmp_path: Path) -> None:
    """The sentence names both; what can be known before is refused before."""
    config = compose("export", [f"checkpoint={run}", f"out={tmp_path / 'out'}"])
    wrong = {"_target_": "test_publish.Fails", "error": UserError("not this one.")}
    config = put(config, "format", {"plain": wrong} | config["format"])
    with pytest.raises(UserError, match=r"1 format failed, safetensors written: plain: not this o"):
        run_export(config)
    assert left(tmp_path / "out") == {"safetensors"}
    photos(tmp_path / "out" / "plain", ["mine.png"])
    with pytest.raises(UserError, match=r"holds other files than an export's, such as mine\.png"):
        run_export(config)


def test_an_export_does_not_replace_what_it_is_made_of(tmp_path: Path) -> None:
    """Given as its folder, its file, or by a link."""
    export(SafeTensors(), _vit(), tmp_path / "own")
    (tmp_path / "link").symlink_to("own")
    config = put(compose("export", ["data=shapes"]), "out", str(tmp_path / "own"))
    for checkpoint in ("own", "link", "own/model.safetensors"):
        with pytest.raises(UserError, match=r"own is the folder of checkpoint=.* itself"):
            run_export(put(config, "checkpoint", str(tmp_path / checkpoint)))
    assert left(tmp_path) == {"own", "link"}
