"""A backbone family of another package: trained, measured, exported, and imported again only where
that package is trusted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dino_lite
from dino_lite.backbones.convnet import ConvNet
from dino_lite.backbones.rope import RoPEViT
from dino_lite.backbones.spec import build_backbone, check_spec
from dino_lite.backbones.vit import ViT
from dino_lite.commands.compare import run_compare
from dino_lite.commands.evaluate import run_evaluate
from dino_lite.commands.export import run_export
from dino_lite.commands.pretrain import main as pretrain_main
from dino_lite.commands.report import run_report
from dino_lite.config import Config, compose, config_dir, get, load, put, save
from dino_lite.contracts import Backbone, Tokens, Traits, UserError
from dino_lite.eval.baselines import untrained
from dino_lite.planning.plan import plan
from dino_lite.report.story import reproduce
from dino_lite.runs.begin import begin_config, build_method
from dino_lite.runs.identity import requested
from dino_lite.runs.pretraining import run_pretrain
from dino_lite.runs.trust import demand_trust
from test_conf import facts
from tiny import tiny, tiny_command

pytestmark = pytest.mark.slow

_CODE = '''
import torch
from torch import nn
from dino_lite.contracts import Backbone, Tokens

class Stripes(Backbone):
    """Linear layers of each patch; the class token is the patches' mean."""

    def __init__(self, width=16, depth=2, patch_size=8, in_chans=3, drop_path=0.0):
        super().__init__()
        self.spec = dict(width=width, depth=depth, patch_size=patch_size, in_chans=in_chans)
        self.embed_dim, self.num_blocks = width, depth
        self.patch_size, self.in_chans = patch_size, in_chans
        probs = [each.item() for each in torch.linspace(0, drop_path, depth)]  # never on meta
        self.stem = nn.Conv2d(in_chans, width, patch_size, patch_size)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in probs)

    def forward(self, images, mask=None, cls_only=False):
        return self.intermediate(images, [-1])[0]

    def intermediate(self, images, blocks):
        cells = self.stem(images)
        tokens, found = cells.flatten(2).transpose(1, 2), []
        for layer in self.layers:
            tokens = tokens + layer(tokens).relu()
            found.append(Tokens(tokens.mean(1), tokens, None, tuple(cells.shape[2:])))
        return [found[i] for i in blocks]

    def attention(self, images):
        num = 1 + images.shape[2] * images.shape[3] // self.patch_size**2
        return images.new_full((len(images), 1, num, num), 1 / num)

    def depth_of(self, name):
        first, *rest = name.split(".")
        return int(rest[0]) + 1 if first == "layers" else 0

class Whole(Stripes):
    def __init__(self):
        super().__init__(patch_size=8)
        self.spec = {}

class Other(nn.Module):
    pass
'''
_CONF = """
_target_: stripes.nets.Stripes
width: 16
depth: 2
patch_size: auto
in_chans: auto
drop_path: auto
"""
_NODE = {"_target_": "stripes.nets.Stripes", "width": 16, "depth": 2}
_VIT = "dino_lite.backbones.vit.ViT"
_REFUSED = r"stripes\.nets.*package stripes.*trust='\[stripes\]'"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH, and conf/ in it for --config-dir."""
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "stripes").mkdir()
    (folder / "stripes" / "__init__.py").write_text("")
    (folder / "stripes" / "nets.py").write_text(_CODE)
    (folder / "conf" / "backbone").mkdir(parents=True)
    (folder / "conf" / "backbone" / "stripes.yaml").write_text(_CONF)
    return folder


@pytest.fixture(autouse=True)
def installed(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package can be imported, and is not yet."""
    monkeypatch.syspath_prepend(str(package))
    for name in [name for name in sys.modules if name.partition(".")[0] == "stripes"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture(scope="module")
def run(package: Path, tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A tiny run of it by the command line, with baselines."""
    runs = tmp_path_factory.mktemp("runs")
    ours = ("backbone.embed_dim", "backbone.depth", "backbone.num_heads", "baselines")
    words = [word for word in tiny_command(runs) if word.partition("=")[0] not in ours]
    line = [sys.executable, "-m", "dino_lite.commands.pretrain"]
    line += ["--config-dir", str(package / "conf"), "backbone=stripes", *words]
    paths = os.pathsep.join([str(root), str(package)])
    done = subprocess.run(
        [*line, "baselines=true", "trust=[anything]"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (folder,) = (path.parent for path in runs.glob("*/config.yaml"))
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, package: Path) -> Path:
    """Its export."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(package))
        return Path(run_export(asked("export", run))["safetensors"]["directory"])


def asked(command: str, checkpoint: Path, trust: str = "[stripes]", *more: str) -> Config:
    """A configuration that trusts the package."""
    return compose(command, [f"checkpoint={checkpoint}", f"trust={trust}", *more])


def imported() -> bool:
    return "stripes" in sys.modules


def test_a_run_of_it_is_trained_and_held_against_baselines(run: Path) -> None:
    """With default settings, under its class's name; without trust, as the user named the class."""
    results = json.loads((run / "results.json").read_text())
    assert results["finished"]
    assert {"knn_raw_pixels", "knn_untrained", "knn_trained"} <= results.keys()
    assert run.name.startswith("dino_shapes_stripes_")


def test_trust_is_neither_saved_nor_part_of_the_request(run: Path) -> None:
    """Not in the configuration, not among the overrides, not in what a run's name hashes."""
    for file in ("config.yaml", "environment.json"):
        assert "trust" not in (run / file).read_text()
    plain = tiny(run.parent)
    assert requested(put(plain, "trust", ["stripes"])) == requested(plain)


def test_a_run_is_measured_where_its_package_is_trusted(run: Path) -> None:
    """Refused in a sentence otherwise, and nothing of it is imported; baselines are its own."""
    with pytest.raises(UserError, match=_REFUSED):
        run_evaluate(asked("evaluate", run, "[]"))
    with pytest.raises(UserError, match=_REFUSED):
        run_evaluate(asked("evaluate", run, "[strip,other]"))
    assert not imported()
    found = run_evaluate(asked("evaluate", run, "stripes", "baselines=true"))["knn"]
    assert imported()
    assert found["baselines"].keys() == {"raw pixels", "untrained"}


def test_a_report_imports_nothing_that_overrides_name(run: Path, tmp_path: Path) -> None:
    """They came with the run as its configuration did."""
    copy = tmp_path / "run"
    (copy / "checkpoints").mkdir(parents=True)
    os.link(run / "checkpoints" / "last.ckpt", copy / "checkpoints" / "last.ckpt")
    words = ["backbone._target_=stripes.nets.Stripes"]
    save(load(run / "config.yaml") | {"overrides": words}, copy / "config.yaml")
    os.link(run / "environment.json", copy / "environment.json")
    run_report(asked("report", copy, "[]"))
    assert not imported()


@pytest.mark.parametrize(
    "words",
    [
        ["method._target_=stripes.nets.Stripes"],
        ["method.head._target_=stripes.nets.Stripes"],
        ["hydra.searchpath=[pkg://stripes]"],
    ],
)
def test_reproducing_a_run_imports_nothing_that_any_group_names(words: list[str]) -> None:
    """Unless the package is trusted."""
    assert reproduce({"overrides": words}, {}) is None
    assert not imported()


def test_a_runs_own_word_about_trust_is_not_heard(run: Path, tmp_path: Path) -> None:
    """A configuration that came with a checkpoint cannot trust itself."""
    copy = tmp_path / "run"
    (copy / "checkpoints").mkdir(parents=True)
    os.link(run / "checkpoints" / "last.ckpt", copy / "checkpoints" / "last.ckpt")
    save(load(run / "config.yaml") | {"trust": ["stripes"]}, copy / "config.yaml")
    for command, main in (("evaluate", run_evaluate), ("export", run_export)):
        with pytest.raises(UserError, match=_REFUSED):
            main(asked(command, copy, "[]"))
    assert not imported()


@pytest.mark.parametrize("part", ["backbone", "method.head", "data"])
@pytest.mark.parametrize("target", ["posix.getpid", "dino_lite.machine.os.getpid"])
def test_no_part_of_a_runs_configuration_names_other_code(
    run: Path, tmp_path: Path, part: str, target: str
) -> None:
    """Wherever it stands, and also by way of a module of ours."""
    copy = tmp_path / "run"
    (copy / "checkpoints").mkdir(parents=True)
    os.link(run / "checkpoints" / "last.ckpt", copy / "checkpoints" / "last.ckpt")
    save(put(load(run / "config.yaml"), f"{part}._target_", target), copy / "config.yaml")
    with pytest.raises(UserError, match=rf"names {target}"):
        run_evaluate(asked("evaluate", copy, "[stripes]"))


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "dino_lite.settings.validate.locate", "path": "stripes.nets"},
        {
            "_target_": "dino_lite.backbones.spec.build_backbone",
            "spec": {"kind": "stripes.nets:Stripes"},
            "trust": ["stripes"],
        },
        {"_target_": "dino_lite.commands.pretrain.pretrain"},
        {"_target_": "dino_lite.config.instantiate", "config": _NODE},
        {"_target_": "dino_lite.eval.pictures_map.import_module", "name": "stripes"},
    ],
)
@pytest.mark.parametrize("part", ["backbone", "method", "method.head"])
def test_a_runs_configuration_names_no_function_of_ours(
    run: Path, tmp_path: Path, part: str, node: Config
) -> None:
    """It may import what its arguments name."""
    copy = tmp_path / "run"
    (copy / "checkpoints").mkdir(parents=True)
    os.link(run / "checkpoints" / "last.ckpt", copy / "checkpoints" / "last.ckpt")
    saved = put(load(run / "config.yaml"), "backbone", {"_target_": _VIT, "patch_size": 8})
    save(put(saved, part, node), copy / "config.yaml")
    with pytest.raises(UserError, match=rf"names {node['_target_']}"):
        run_evaluate(asked("evaluate", copy, "[]"))
    assert not imported()


@pytest.mark.parametrize("part", ["backbone", "method"])
def test_a_saved_backbone_or_method_is_a_class_of_its_kind(
    run: Path, tmp_path: Path, part: str
) -> None:
    """Another class of dino_lite is not built in its place."""
    copy = tmp_path / "run"
    (copy / "checkpoints").mkdir(parents=True)
    os.link(run / "checkpoints" / "last.ckpt", copy / "checkpoints" / "last.ckpt")
    node = {"_target_": "dino_lite.losses.koleo.KoLeoLoss"}
    save(put(load(run / "config.yaml"), part, node), copy / "config.yaml")
    with pytest.raises(UserError, match=rf"{part}\._target_=dino_lite.*must name a class derived"):
        run_evaluate(asked("evaluate", copy))


def test_every_target_of_conf_is_harmless() -> None:
    """Saved runs of every choice in conf/ are opened without trust."""
    files = [path for path in config_dir().rglob("*.yaml") if path.parent.name != "format"]
    found = {name for path in files for name in re.findall(r"_target_: ([\w.]+)", path.read_text())}
    assert {"torch.optim.SGD", "dino_lite.data.builtin.open_builtin", _VIT} <= found
    demand_trust(found, (), "conf")


def test_a_run_whose_saved_configuration_names_other_code_is_not_resumed(tmp_path: Path) -> None:
    """Only what the user's own configuration names, or trust, is imported."""
    config = tiny(tmp_path, "name=own", "baselines=false")
    folder = Path(run_pretrain(config)["run"])
    saved = load(folder / "config.yaml")
    save(put(saved, "normalize._target_", _NODE["_target_"]), folder / "config.yaml")
    with pytest.raises(UserError, match=_REFUSED):
        run_pretrain(config)
    save(put(saved, "callbacks.other", _NODE), folder / "config.yaml")
    assert run_pretrain(config)["finished"]  # callbacks are those of the command
    assert not imported()


def test_trust_in_a_file_of_the_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The key is for the command line only, where it replaces the value of a file."""
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ntrust: [stripes]\n"
    (tmp_path / "experiment" / "shared.yaml").write_text(text)
    words = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=shared"]
    with pytest.raises(UserError, match=r"trust=\['stripes'\] is set in a configuration file"):
        compose("pretrain", words)
    assert compose("pretrain", [*words, "trust=[other]"])["trust"] == ["other"]
    line = ["dino-lite", "--config-dir", str(tmp_path), "experiment=shared", "checkpoint=none"]
    for flags in ([], ["--multirun"]):
        monkeypatch.setattr(sys, "argv", [*line, *flags])
        with pytest.raises(SystemExit):
            pretrain_main()
        assert "is set in a configuration file" in capsys.readouterr().err


def test_an_export_is_loaded_where_its_package_is_trusted(exported: Path) -> None:
    """By its top package or a parent of the module, from Python as from a command."""
    spec = json.loads((exported / "config.json").read_text())["spec"]
    assert spec["kind"] == "stripes.nets:Stripes"
    for trust in ((), None, ["strip"], ["nets"], ["stripes.other"], "strip"):
        with pytest.raises(UserError, match=_REFUSED):
            dino_lite.load_backbone(exported, trust=trust)
    assert not imported()
    images = torch.randn(2, 3, 16, 16)
    first = dino_lite.load_backbone(exported, trust=["stripes"])
    for trust in (["stripes.nets"], "stripes", ("other", "stripes")):
        again = dino_lite.load_backbone(exported, trust=trust)
        assert torch.equal(again(images).cls, first(images).cls)
    assert type(untrained(first)) is type(first)


def test_an_export_is_measured_compared_and_reported(run: Path, exported: Path) -> None:
    """By every command, with trust and not without."""
    data = ("data=shapes", "data.num_train=44", "data.num_test=20")
    evaluated = asked("evaluate", exported, "[stripes]", *data)
    assert run_evaluate(evaluated)["knn"]["value"] >= 0
    both = [f"checkpoints=[{run},{exported}]", *data]
    compared = run_compare(compose("compare", [*both, "trust=[stripes]"]))
    assert len(compared["rows"]) == 4
    for checkpoint in (run, exported):
        page = run_report(asked("report", checkpoint))
        assert "stripes" in page.read_text(encoding="utf-8").lower()
    with pytest.raises(UserError, match=_REFUSED):
        run_compare(compose("compare", both))
    with pytest.raises(UserError, match=_REFUSED):
        run_report(asked("report", exported, "[]"))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            "swin",
            r"unknown backbone kind=swin: known are vit, rope, convnet, compact, and module:Class",
        ),
        (["vit"], "unknown backbone kind"),
        ("stripes.nets:Other", r"is not a subclass of dino_lite\.contracts\.Backbone"),
        ("stripes.nets:Missing", "cannot be imported"),
        ("stripes.missing:Stripes", "install its package, or put it on PYTHONPATH"),
        ("stripes.nets:", "cannot be imported|not a subclass"),
        ("absent.nets:Stripes", r"package absent.*trust='\[absent\]'"),
    ],
)
def test_a_kind_that_names_no_backbone_is_a_sentence(kind: Any, said: str) -> None:
    """Unknown, missing, or something else."""
    with pytest.raises(UserError, match=said) as caught:
        build_backbone({"kind": kind}, trust=["stripes"])
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------- the spec is proven


class Narrow(Backbone):
    """A network of one layer, whose spec is what a test makes of it."""

    def __init__(self, width: int = 4, depth: int = 1, meta: bool = True) -> None:
        super().__init__()
        self.spec = {"width": width, "depth": depth}
        self.embed_dim, self.patch_size, self.in_chans, self.num_blocks = width, 8, 3, depth
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))


class Forgets(Narrow):
    def __init__(self, width: int = 4, depth: int = 1) -> None:
        super().__init__(width, depth)
        del self.spec["depth"]


class Counts(Narrow):
    def __init__(self, width: int = 4, blocks: int = 1) -> None:
        super().__init__(width)
        self.num_blocks = blocks
        self.spec = {"width": width}


class Widens(Narrow):
    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.spec = {"width": width + 1}


class Renames(Narrow):
    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.spec = {"size": width}


class Keeps(Narrow):
    def __init__(self, width: int = 4, act: Any = nn.ReLU) -> None:
        super().__init__(width)
        self.spec = {"width": width, "act": act}


class Steps(Narrow):
    """A network whose spec lacks the arguments that change no weight."""

    def __init__(self, width: int = 4, act: str = "relu", step: int = 8) -> None:
        super().__init__(width)
        self.spec = {"width": width}
        self.act = act
        self.stem = nn.Conv2d(3, width, 8, step)
        self.drop = nn.Dropout(0.5)

    def forward(self, images: Tensor, mask: Any = None, cls_only: bool = False) -> Tokens:
        cells = self.stem(images)
        tokens = self.drop(self.layers[0](cells.flatten(2).transpose(1, 2)))
        tokens = getattr(torch, self.act)(tokens)
        return Tokens(tokens.mean(1), tokens, None, (cells.shape[2], cells.shape[3]))


class Lacks(Narrow):
    def __init__(self) -> None:
        super().__init__()
        del self.in_chans


def within() -> Backbone:
    """Of a class that cannot be imported."""

    class Local(Narrow):
        pass

    return Local()


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Forgets(depth=2), r"Forgets.*layers\.1\.weight is missing and not \(4, 4\)"),
        (lambda: Counts(blocks=3), r"Counts.*num_blocks is 1 and not 3"),
        (lambda: Steps(act="sigmoid"), r"Steps\(\*\*spec\) builds a different network, whose cls"),
        (
            lambda: Steps(step=4),
            r"Steps\(\*\*spec\) builds a different network, whose \w+ of the",
        ),
        (Widens, r"Widens.*layers\.0\.weight is \(5, 5\) and not \(4, 4\)"),
        (Renames, r"Renames cannot be built from its own spec \(TypeError.*size"),
        (Keeps, r"Keeps cannot be built from its own spec \(TypeError.*plain JSON"),
        (Lacks, r"Lacks has no attribute in_chans"),
        (within, r"Local cannot be imported by this name"),
        (lambda: nn.Linear(1, 1), r"Linear is not a backbone"),
    ],
)
def test_a_spec_that_does_not_rebuild_its_backbone_is_a_sentence(build: Any, said: str) -> None:
    """It names the class and the first difference."""
    with pytest.raises(UserError, match=said) as caught:
        check_spec(build())
    assert "\n" not in str(caught.value)


SIZES: dict[str, Any] = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    "build",
    [
        lambda: ViT(**SIZES, image_size=16, drop_path=0.2),
        lambda: RoPEViT(**SIZES, qkv_bias=True),
        lambda: ConvNet(widths=(8, 16), depths=(1, 1), patch_size=8, drop_path=0.1),
        lambda: ConvNet("convnext_atto", norm="layer"),
    ],
)
def test_a_spec_is_proven_without_storage_or_random_numbers(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network itself comes back, the generator stands where it stood, nothing is allocated."""
    backbone = build()
    state, made = torch.get_rng_state(), []
    plain = nn.Module.register_parameter

    def seen(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        made.append(None if parameter is None else parameter.device.type)
        plain(module, name, parameter)

    monkeypatch.setattr(nn.Module, "register_parameter", seen)
    assert check_spec(backbone) is backbone
    assert torch.equal(torch.get_rng_state(), state)
    assert set(made) - {None} == {"meta"}


def test_a_family_that_cannot_be_built_without_storage_is_proven_with_it() -> None:
    """Also without a random number of the run's."""
    from stripes.nets import Stripes  # type: ignore[import-not-found]

    backbone = Stripes(depth=3)
    state = torch.get_rng_state()
    assert check_spec(backbone) is backbone
    assert torch.equal(torch.get_rng_state(), state)


def test_comparing_tokens_changes_nothing() -> None:
    """Neither modes of single modules, nor weights, nor the generator; noise is not compared."""
    backbone = Steps()
    backbone.drop.eval()
    modes = [part.training for part in backbone.modules()]
    weights = {name: value.clone() for name, value in backbone.state_dict().items()}
    state = torch.get_rng_state()
    assert check_spec(backbone) is backbone
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in backbone.modules()] == modes
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, weights[name])


class Wide(Narrow):
    def __init__(self, embed_dim: int = 768, drop_path: float = 0.0) -> None:
        super().__init__(embed_dim)


class Mixes(Steps):
    """With batch normalization, which its traits do not declare."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.norm = nn.SyncBatchNorm(width)


class Declares(Mixes):
    @classmethod
    def traits(cls, **settings: Any) -> Traits:
        return Traits(mixes_images=True)


def test_batch_normalization_that_traits_do_not_declare_is_refused(tmp_path: Path) -> None:
    """Otherwise a run that is out of memory would change its results without a word."""
    config = plan(tiny(tmp_path, "trainer.max_time=null"), facts(source="shapes")).config
    node = {"_target_": f"{__name__}.Mixes", "width": 4}
    with pytest.raises(UserError, match=r"Mixes contains batch norm.*mixes_images=True") as caught:
        build_method(config | {"backbone": node})
    assert "\n" not in str(caught.value)
    build_method(config | {"backbone": node | {"_target_": f"{__name__}.Declares"}})


def test_a_run_whose_backbone_its_spec_does_not_rebuild_never_starts(tmp_path: Path) -> None:
    """It would be trained, and could be neither measured nor exported."""
    config = plan(tiny(tmp_path, "trainer.max_time=null"), facts(source="shapes")).config
    node = {"_target_": f"{__name__}.Forgets", "width": 4, "depth": 2}
    with pytest.raises(UserError, match="Forgets"):
        build_method(config | {"backbone": node})


@pytest.mark.parametrize("outer", ["", "whole.", "state_dict.method.teachers.ema."])
def test_a_backbone_of_any_family_starts_from_weights_by_its_own_names(
    tmp_path: Path, outer: str
) -> None:
    """Of an export, of a compact one, of a run's checkpoint, where the teacher's are taken."""
    config = plan(tiny(tmp_path, "trainer.max_time=null"), facts(source="shapes")).config
    convnet = {"_target_": "dino_lite.backbones.convnet.ConvNet", "widths": [8], "depths": [1]}
    for node in (_NODE, convnet):
        config["backbone"] = node | {"patch_size": 8}
        weights = build_method(config | {"seed": 7}).export_backbone().state_dict()
        saved = {outer + name: value for name, value in weights.items()}
        if outer.startswith("state"):
            student = {name: torch.zeros_like(value) for name, value in weights.items()}
            saved = {f"state_dict.method.student.{n}": v for n, v in student.items()} | saved
        torch.save(saved | ({"reduce.bias": torch.zeros(2)} if outer else {}), tmp_path / "w.pt")
        config["backbone"]["pretrained"] = str(tmp_path / "w.pt")
        begun = build_method(config).export_backbone().state_dict()
        assert all(torch.equal(begun[name], value) for name, value in weights.items())
        name = next(iter(weights))
        torch.save({name: weights[name]}, tmp_path / "w.pt")
        with pytest.raises(UserError, match=r"w\.pt does not fit .*weights? missing"):
            build_method(config)


# ------------------------------------------------------------------------------------- planning


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_automatic_settings_of_a_family_that_declares_nothing(accelerator: str) -> None:
    """Those of a network that is no convolutional one and has no recipe of its own."""
    config = compose("pretrain", []) | {"backbone": _NODE | dict.fromkeys(("patch_size",), "auto")}
    config = put(config, "backbone.in_chans", "auto")
    config = put(config, "backbone.drop_path", "auto")
    planned = plan(config, facts(accelerator=accelerator)).config
    expected: dict[str, Any] = {
        "backbone.in_chans": 3,
        "backbone.drop_path": 0.1,
        "augment.global_scale": [0.4, 1.0],
        "augment.local_scale": [0.05, 0.4],
        "optim.rate": 5e-4,
    }
    assert {key: get(planned, key) for key in expected} == expected
    assert planned["augment"]["global_size"] % planned["backbone"]["patch_size"] == 0


def test_a_family_may_take_neither_patch_size_nor_channels() -> None:
    """Its network then has one of each."""
    node = {"_target_": "stripes.nets.Whole"}
    config = compose("pretrain", []) | {"backbone": node}
    planned = plan(config, facts()).config
    assert planned["backbone"] == node
    assert planned["augment"]["local_size"] < planned["augment"]["global_size"]


def test_a_name_that_a_family_does_not_take_is_a_sentence() -> None:
    """Also name=auto, which stands for something only where a family says for what."""
    config = compose("pretrain", [])
    node = _NODE | {"name": "auto", "patch_size": 8, "in_chans": 3}
    with pytest.raises(UserError, match=r"backbone\.name: there is no such key"):
        plan(config | {"backbone": node}, facts())


def test_a_width_does_not_make_a_family_a_small_one() -> None:
    """A large network of another package gets DINO's stochastic depth and rate."""
    node = {"_target_": f"{__name__}.Wide", "embed_dim": 768, "drop_path": "auto"}
    planned = plan(compose("pretrain", []) | {"backbone": node}, facts(accelerator="cuda")).config
    assert planned["backbone"]["drop_path"] == 0.1
    assert planned["optim"]["rate"] == 5e-4


@pytest.mark.parametrize("target", ["torch.nn.Linear", "dino_lite.backbones.spec.build_backbone"])
def test_a_target_that_is_no_backbone_is_refused_by_the_plan(target: str) -> None:
    """Functions too: what a family declares is read from its class."""
    keys = {"in_features": 3, "out_features": 3} if "Linear" in target else {"spec": {}}
    config = compose("pretrain", []) | {"backbone": {"_target_": target} | keys}
    with pytest.raises(UserError, match=r"must name a class derived from dino_lite\.contracts"):
        plan(config, facts())


def test_a_run_begins_with_another_of_the_same_family(run: Path, tmp_path: Path) -> None:
    """The user's own configuration names the class; where it does not, trust does."""
    ours = tiny(tmp_path, f"checkpoint={run}")
    with pytest.raises(UserError, match=_REFUSED):
        begin_config(ours)
    assert not imported()
    for config in (ours | {"trust": ["stripes"]}, ours | {"backbone": _NODE}):
        begun = begin_config(config)
        assert begun["backbone"]["_target_"] == _NODE["_target_"]
        assert "trust" not in begun


def test_a_start_whose_method_is_foreign_is_refused_unseen(run: Path, tmp_path: Path) -> None:
    """The method's class is compared by name."""
    copy = tmp_path / "run"
    (copy / "checkpoints").mkdir(parents=True)
    os.link(run / "checkpoints" / "last.ckpt", copy / "checkpoints" / "last.ckpt")
    saved = put(load(run / "config.yaml"), "method._target_", "stripes.nets.Method")
    save(saved, copy / "config.yaml")
    with pytest.raises(UserError, match=r"is a run of stripes\.nets\.Method"):
        begin_config(tiny(tmp_path, f"checkpoint={copy}"))
    assert not imported()
