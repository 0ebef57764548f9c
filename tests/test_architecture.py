"""The house rules of ARCHITECTURE.md, held by reading the source with `ast`.

A rule is a function from source text to sentences about what breaks it; each is shown to find
a planted violation.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "dino_lite").rglob("*.py"))

# A room may import from rooms of lower rank and from itself, never from neighbors of its own rank.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("interrupts", "version", "wording"),
    ("errors",),
    ("contracts", "overrides"),
    ("distributed", "draws", "settings"),
    ("meter",),
    ("nn", "optim", "losses", "backbones", "data"),
    ("methods", "eval", "formats"),
    ("callbacks", "choices", "sweep", "machine"),
    ("config",),
    ("planning",),
    ("runs",),
    ("report",),
    ("commands",),
    ("cli",),
)
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}

# Heavy packages and the only files that may import them.
DOORS: dict[str, tuple[str, ...]] = {
    "hydra": ("choices.py", "config.py", "overrides.py", "sweep.py", "commands/*"),
    "omegaconf": ("config.py", "commands/*"),
    "pytorch_lightning": (
        "methods/module.py",
        "callbacks/*",
        "data/datamodule.py",
        "runs/build.py",
        "runs/trainer.py",
        "runs/training.py",
        "runs/metrics_file.py",
    ),
    "lightning": (),  # the same library by another name: one is enough
    "timm": ("backbones/*", "formats/fit.py", "formats/weights.py", "formats/timm_*.py"),
    "PIL": ("data/*", "eval/pictures*.py", "eval/sheets.py", "report/thumbnails.py"),
    "torchvision": ("data/*",),
}
LAZY = ("matplotlib", "sklearn")  # slow to import and seldom needed: inside functions only

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
LONG_FILES = {"dino_lite/contracts.py": "the nouns stand together, as each names others"}
LONG_FUNCTIONS: dict[str, str] = {}  # "dino_lite/a.py:function" -> why it cannot be shorter
VAGUE_NAMES = ("util", "utils", "misc", "common", "helper", "helpers")
PRINTING = ("cli.py", "config.py", "errors.py", "sweep.py", "commands/*", "runs/pretraining.py")

TOP_LEVEL = {
    *(".ci", ".dockerignore", ".github", ".gitignore", ".pre-commit-config.yaml"),
    *("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md"),
    *(
        "conf",
        "constraints.txt",
        "dino_lite",
        "docker",
        "docs",
        "pyproject.toml",
        "scripts",
        "tests",
    ),
}

# Written with [] so that this file does not match itself.
FORBIDDEN_TEXT = re.compile(
    r"""(?<![\w.~$}])/(?:[h]ome|[U]sers|[r]oot|[w]ork)/\w  # a path on somebody's machine
    | \b[A-Z]:\\[U]sers
    | \b[p]ypi\.|\b[p]ythonhosted\.|\bregistry\.[n]pmjs|\bconda\.[a]naconda  # registries
    | \bdownload\.[p]ytorch|\b(?:[d]ocker|[g]hcr|[n]vcr|[q]uay)\.io|\bdeb\.[d]ebian""",
    re.VERBOSE,
)

Rule = Callable[[str, str], list[str]]  # source text and path -> what is wrong


class Import(NamedTuple):
    """One imported name in full; `typing_only` under TYPE_CHECKING, `at_top` outside functions."""

    module: str
    line: int
    typing_only: bool
    at_top: bool


def imported_names(node: ast.AST, path: str) -> list[str]:
    """What one statement or call imports; `from a import b` gives a.b, as b may be a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        package = path.split("/")[: -node.level] if node.level else []
        stem = ".".join([*package, node.module] if node.module else package)
        return [f"{stem}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        return [name.value for name in node.args[:1] if isinstance(name, ast.Constant)]
    return []


def imports_of(source: str, path: str) -> Iterator[Import]:
    """Every import in `source`, wherever it stands."""

    def visit(node: ast.AST, typing_only: bool, at_top: bool) -> Iterator[Import]:
        for module in imported_names(node, path):
            yield Import(module, node.lineno, typing_only, at_top)
        guarded: list[ast.stmt] = []
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            guarded = node.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            at_top = False
        for child in ast.iter_child_nodes(node):
            yield from visit(child, typing_only or child in guarded, at_top)

    yield from visit(ast.parse(source), False, True)


def functions_of(source: str) -> dict[str, int]:
    """Name of each function -> its number of lines (the longest where a name is used twice)."""
    lines: dict[str, int] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            lines[node.name] = max(lines.get(node.name, 0), node.end_lineno - node.lineno + 1)
    return lines


def layer_rule(source: str, path: str) -> list[str]:
    """Imports go down; every room has its place in the order."""
    room = path.split("/")[1].removesuffix(".py")
    if room == "__init__":  # offers functions lazily: `init_rule`
        return []
    if room not in RANK:
        return [f"{path}: the layer order does not know the room {room}"]
    found = []
    for item in imports_of(source, path):
        top, _, rest = item.module.partition(".")
        other = rest.split(".")[0]
        if top != "dino_lite" or other in (room, ""):
            continue
        if RANK.get(other, len(LAYERS)) >= RANK[room]:
            found.append(f"{path}:{item.line}: {room} may not import {item.module}")
    return found


def command_rule(source: str, path: str) -> list[str]:
    """Commands import no commands: what two of them need lies below."""
    if not path.startswith("dino_lite/commands/"):
        return []
    return [
        f"{path}:{item.line}: a command imports {item.module}"
        for item in imports_of(source, path)
        if item.module.startswith("dino_lite.commands")
    ]


def door_rule(source: str, path: str) -> list[str]:
    """Heavy packages come in by their doors (for annotations anywhere), slow ones when needed."""
    found = []
    for item in imports_of(source, path):
        name = item.module.split(".")[0]
        doors = DOORS.get(name, ("*",))
        if item.typing_only:
            continue
        if not any(fnmatch(path, f"dino_lite/{door}") for door in doors):
            found.append(f"{path}:{item.line}: only {doors} may import {name}")
        if name in LAZY and item.at_top:
            found.append(f"{path}:{item.line}: {name} is to be imported inside a function")
    return found


def size_rule(source: str, path: str) -> list[str]:
    """A file is read in one sitting, a function on one screen."""
    found = [
        f"{path}: {name} has {lines} lines, more than {MAX_FUNCTION_LINES}"
        for name, lines in functions_of(source).items()
        if lines > MAX_FUNCTION_LINES and f"{path}:{name}" not in LONG_FUNCTIONS
    ]
    if (lines := len(source.splitlines())) > MAX_FILE_LINES and path not in LONG_FILES:
        found.append(f"{path}: {lines} lines, more than {MAX_FILE_LINES}")
    return found


def print_rule(source: str, path: str) -> list[str]:
    """Only commands speak to the user."""
    if any(fnmatch(path, f"dino_lite/{speaker}") for speaker in PRINTING):
        return []
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [f"{path}:{call.lineno}: print" for call in calls if ast.unparse(call.func) == "print"]


def name_rule(source: str, path: str) -> list[str]:
    """No module or folder is called by a word that fits everything."""
    parts = path.removesuffix(".py").split("/")
    return [f"{path}: {part} says nothing" for part in parts if part.strip("_") in VAGUE_NAMES]


def init_rule(source: str, path: str) -> list[str]:
    """`__init__.py` is empty; the package's own offers functions, importing rooms when asked."""
    if not path.endswith("/__init__.py"):
        return []
    if path != "dino_lite/__init__.py":
        return [f"{path}: not empty"] if source.strip() else []
    return [
        f"{path}:{item.line}: {item.module} is to be imported inside a function"
        for item in imports_of(source, path)
        if item.at_top
        and not item.typing_only
        and not item.module.startswith(("__future__", "importlib", "typing", "dino_lite.version"))
    ]


def text_rule(text: str, path: str) -> list[str]:
    """No registry's host and no absolute path of somebody's machine."""
    return [
        f"{path}:{number}: {match.group()}"
        for number, line in enumerate(text.splitlines(), 1)
        if (match := FORBIDDEN_TEXT.search(line))
    ]


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8", errors="ignore")


@pytest.fixture(scope="module")
def project_files() -> list[str]:
    """Files that are committed or about to be."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, capture_output=True, text=True, check=False)
    if listed.returncode or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the project is not known")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize(
    "rule", [layer_rule, command_rule, door_rule, size_rule, print_rule, name_rule, init_rule]
)
def test_every_module_keeps_the_rule(rule: Rule) -> None:
    """The whole package keeps its layers, doors, sizes, names, silence and empty `__init__.py`."""
    assert SOURCES
    assert [sentence for path in SOURCES for sentence in rule(read(path), path)] == []


def modules_imported(source: str, path: str, modules: set[str]) -> set[str]:
    """Those of `modules` that a file imports, for types only or not."""
    names = {item.module for item in imports_of(source, path)}
    return {name for each in names for name in (each, each.rpartition(".")[0]) if name in modules}


def circle(imports: dict[str, set[str]]) -> list[str]:
    """One circle of modules that import each other; empty where there is none."""
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return trail[trail.index(module) :]
        if module in done:
            return []
        for other in sorted(imports.get(module, ())):
            if found := visit(other, [*trail, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(imports) if (found := visit(module, []))), [])


def test_no_two_modules_import_each_other() -> None:
    """However long the way round; a planted circle is found."""
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []
    named = {path.removesuffix(".py").replace("/", "."): path for path in SOURCES}
    imports = {n: modules_imported(read(path), path, set(named)) - {n} for n, path in named.items()}
    assert circle(imports) == []


def test_no_two_modules_have_one_name() -> None:
    """An editor's tab and a traceback tell which file is meant."""
    names = Counter(Path(path).name for path in SOURCES if not path.endswith("__init__.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_the_root_holds_only_what_all_rooms_share() -> None:
    """Modules at the package's root."""
    root = {path.split("/")[1] for path in SOURCES if path.count("/") == 1}
    named = ["contracts", "distributed", "draws", "config", "machine", "meter", "cli", "version"]
    named += ["errors", "overrides", "sweep", "choices", "interrupts", "wording", "__init__"]
    assert root == {f"{name}.py" for name in named}


def test_exceptions_for_length_are_needed() -> None:
    """An exception that no file or function needs any more is taken off the list."""
    for path in LONG_FILES:
        assert len(read(path).splitlines()) > MAX_FILE_LINES, path
    for entry in LONG_FUNCTIONS:
        path, _, name = entry.partition(":")
        assert functions_of(read(path)).get(name, 0) > MAX_FUNCTION_LINES, entry


def test_top_level_holds_only_what_the_design_names(project_files: list[str]) -> None:
    """Nothing new appears at the top of the repository by accident."""
    assert {name.split("/")[0] for name in project_files} - TOP_LEVEL == set()


def test_no_file_names_a_registry_or_somebodys_machine(project_files: list[str]) -> None:
    """Every committed file is true on any machine."""
    assert [sentence for name in project_files for sentence in text_rule(read(name), name)] == []


TYPING = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import timm\n"
NN = "dino_lite/nn/a.py"


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (layer_rule, NN, "from dino_lite.methods import dino"),
        (layer_rule, NN, "from dino_lite import planning"),
        (layer_rule, NN, "from dino_lite.losses.koleo import KoLeo"),
        (layer_rule, NN, "from ..eval import knn"),
        (layer_rule, NN, "def f():\n    import dino_lite.eval.knn"),
        (layer_rule, NN, "import_module('dino_lite.callbacks.collapse')"),
        (layer_rule, NN, "if TYPE_CHECKING:\n    from dino_lite.methods.dino import Dino"),
        (layer_rule, "dino_lite/contracts.py", "from dino_lite import distributed"),
        (layer_rule, "dino_lite/attic/a.py", ""),
        (command_rule, "dino_lite/commands/a.py", "from dino_lite.commands.b import c"),
        (door_rule, "dino_lite/methods/dino.py", "import pytorch_lightning as pl"),
        (door_rule, "dino_lite/methods/dino.py", "import lightning.pytorch as pl"),
        (door_rule, "dino_lite/methods/dino.py", "from omegaconf import DictConfig"),
        (door_rule, "dino_lite/eval/knn.py", "def f():\n    from PIL import Image"),
        (door_rule, "dino_lite/eval/knn.py", TYPING + "else:\n    import timm"),
        (door_rule, "dino_lite/eval/pictures.py", "import matplotlib.pyplot as plt"),
        (size_rule, NN, "x = 1\n" * 301),
        (size_rule, NN, "class A:\n  def f():\n" + "    x = 1\n" * 60),
        (print_rule, NN, "def f():\n    print(1)"),
        (name_rule, "dino_lite/nn/utils.py", ""),
        (name_rule, "dino_lite/common/a.py", ""),
        (init_rule, "dino_lite/nn/__init__.py", "from dino_lite.nn.heads import Head"),
        (init_rule, "dino_lite/__init__.py", "from dino_lite.config import config_dir"),
        (text_rule, "a.md", "see /" + "home/me/data"),
        (text_rule, "a.sh", "pip install -i https://p" + "ypi.org/simple"),
    ],
)
def test_a_planted_violation_is_found(rule: Rule, path: str, source: str) -> None:
    """Each rule finds what breaks it."""
    assert rule(source, path)


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (layer_rule, NN, "from . import b\nfrom dino_lite.nn import c"),
        (layer_rule, NN, "from dino_lite.contracts import Tokens"),
        (layer_rule, NN, "from dino_lite.version import __version__"),
        (command_rule, "dino_lite/commands/a.py", "from dino_lite.runs.build import build"),
        (layer_rule, "dino_lite/callbacks/a.py", "from dino_lite.eval.knn import knn"),
        (door_rule, "dino_lite/eval/knn.py", TYPING),
        (door_rule, "dino_lite/backbones/vit.py", "import timm"),
        (door_rule, "dino_lite/eval/pictures.py", "def f():\n    import matplotlib"),
        (size_rule, NN, "def f():\n" + "    x = 1\n" * 59),
        (print_rule, "dino_lite/commands/a.py", "print(1)"),
        (name_rule, "dino_lite/nn/commons.py", ""),
        (init_rule, "dino_lite/__init__.py", "def f():\n    from dino_lite import config"),
        (text_rule, "a.md", "~/photos ../shared/golden /opt/dino_lite/bin at/home/alone"),
    ],
)
def test_an_honest_neighbor_passes(rule: Rule, path: str, source: str) -> None:
    """No rule fires on what it is meant to allow."""
    assert rule(source, path) == []
