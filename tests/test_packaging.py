"""What is shipped and how it is installed: wheel, editable install, scripts, container, CI."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"])


def files_below(folder: Path) -> set[str]:
    """Relative paths of the files that belong to the project."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if "__pycache__" not in path.parts}


def build(kind: str, folder: Path) -> Path:
    """Ask the build backend for a `wheel` or an `editable` one of this checkout: no network."""
    code = f"import sys, hatchling.build as b; b.build_{kind}(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, check=True, capture_output=True
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def config_dir_seen_by(site: Path, elsewhere: Path) -> Path:
    """Where the dino_lite in folder `site` finds its configs, asked from another folder."""
    code = (
        "import os, site, sys\n"
        "held = [os.path.isfile(f'{path}/dino_lite/__init__.py') for path in sys.path]\n"
        "sys.path[:] = [path for path, is_held in zip(sys.path, held) if not is_held]\n"
        "site.addsitedir(sys.argv[1])\n"
        "from dino_lite.config import config_dir\n"
        "print(config_dir())"
    )
    command = [sys.executable, "-I", "-c", code, str(site)]
    said = subprocess.run(command, cwd=elsewhere, check=True, capture_output=True, text=True)
    return Path(said.stdout.strip())


@pytest.mark.slow
def test_wheel_holds_every_module_and_config_and_nothing_else(tmp_path: Path) -> None:
    """The wheel is the package with conf/ inside it, and this is the conf/ that it reads."""
    site = tmp_path / "site"
    with zipfile.ZipFile(build("wheel", tmp_path)) as wheel:
        wheel.extractall(site)
        names = set(wheel.namelist())
    configs = {f"dino_lite/conf/{name}" for name in files_below(ROOT / "conf")}
    modules = {f"dino_lite/{name}" for name in files_below(ROOT / "dino_lite")}
    assert "dino_lite/conf/pretrain.yaml" in configs
    assert {name for name in names if ".dist-info/" not in name} == configs | modules
    assert config_dir_seen_by(site, tmp_path) == site / "dino_lite" / "conf"


@pytest.mark.slow
def test_editable_install_reads_the_configs_of_the_checkout(tmp_path: Path) -> None:
    """Edited configs take effect from any folder, whatever copy lies in site-packages."""
    with zipfile.ZipFile(build("editable", tmp_path)) as wheel:
        wheel.extractall(tmp_path / "site")
    assert config_dir_seen_by(tmp_path / "site", tmp_path) == ROOT / "conf"


def test_sdist_can_be_built_into_a_wheel(tmp_path: Path) -> None:
    """The source archive carries conf/, without which it could not become a wheel."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "source")
    (source,) = (tmp_path / "source").iterdir()
    assert files_below(source / "conf") == files_below(ROOT / "conf")
    assert files_below(source / "dino_lite") == files_below(ROOT / "dino_lite")


def test_every_import_of_the_package_is_a_declared_dependency() -> None:
    """A plain `pip install .` brings what dino_lite imports; functions may import an extra's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    provides = {"hydra-core": "hydra", "pillow": "PIL", "scikit-learn": "sklearn", "pyyaml": "yaml"}

    def packages(lines: list[str]) -> set[str]:
        names = [re.split(r"[<>=~! \[]", line)[0] for line in lines]
        return {provides.get(name, name.replace("-", "_")) for name in names}

    plain = packages(project["dependencies"])
    extras = project["optional-dependencies"].items()
    optional = set().union(*(packages(lines) for extra, lines in extras if extra != "test"))
    imported, in_functions = set(), set()
    for path in (ROOT / "dino_lite").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        inside = {id(node) for function in functions for node in ast.walk(function)}
        for node in ast.walk(tree):
            found = in_functions if id(node) in inside else imported
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    own = set(sys.stdlib_module_names) | {"dino_lite"}
    assert "torch" in imported
    assert imported - own - plain == set()
    assert in_functions - own - plain - optional == set()


def test_constraints_hold_every_dependency_within_its_bounds() -> None:
    """Each direct dependency, of tests too, has one exact version that its bounds allow."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    exact = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        bound, *excluded = re.sub(r"\[.*\]", "", requirement.lower()).split(",!=")
        name, lowest = bound.split(">=")
        assert version(exact[name]) >= version(lowest), requirement
        assert exact[name] not in excluded, requirement


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_strict_executable_and_parse(script: Path) -> None:
    """A script stops at its first failing command, can be run as it stands, and is bash."""
    assert os.access(script, os.X_OK)
    assert "\nset -euo pipefail\n" in script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)


class Checkout:
    """A copy of what install.sh reads, and a stand-in for Python that writes down what it does."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout (é)"
        (self.root / "scripts").mkdir(parents=True)
        scripts = ("scripts/install.sh", "scripts/test_versions.sh")
        for name in ("pyproject.toml", "constraints.txt", *scripts):
            shutil.copy(ROOT / name, self.root / name)
        self.log = folder / "log"
        self.python = folder / "python"
        self.python.write_text(
            "#!/usr/bin/env bash\n"
            'case "$*" in\n'
            "-c*) echo 3.11; exit ${FAKE_UNFIT:-0} ;;\n"
            "-V) echo Python 3.11.0 ;;\n"
            f'"-m venv"*) echo venv >> "{self.log}"\n'
            '    mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;\n'
            f'"-m pip freeze") echo torch==9.9 ;;\n'
            f'"-m pip"*) echo "pip ${{@: -1}}" >> "{self.log}"; exit ${{FAKE_PIP:-0}} ;;\n'
            f'"-m pytest"*) echo "$*" >> "{self.log}"\n'
            f'    cat "$DINO_LITE_CONSTRAINTS" >> "{self.log}"; exit ${{FAKE_PYTEST:-0}} ;;\n'
            "esac\n"
        )
        self.python.chmod(0o755)

    def install(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run install.sh from another folder."""
        return self.run("install.sh", *arguments, **environment)

    def run(
        self, script: str, *arguments: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run one of the scripts from another folder."""
        kept = {name: value for name, value in os.environ.items() if "DINO_LITE" not in name}
        return subprocess.run(
            ["bash", str(self.root / "scripts" / script), *arguments],
            cwd=self.root.parent,
            env={**kept, "PYTHON": str(self.python), **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    def did(self) -> list[str]:
        """What the stand-in was asked since the last time."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [line.replace(str(self.root), "ROOT") for line in lines]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_install_makes_the_environment_once(checkout: Checkout) -> None:
    """The second run installs nothing; test tools are no harm where they are not asked for."""
    first = checkout.install("test")
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"{checkout.root}/.venv/bin/python\n"
    assert checkout.did() == ["venv", "pip ROOT[test]"]
    for arguments in (["test"], []):
        again = checkout.install(*arguments)
        assert (again.stdout, again.stderr) == (first.stdout, "")
        assert checkout.did() == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_install_follows_a_change_of_requirements(checkout: Checkout, name: str) -> None:
    """Where requirements changed, pip runs again in the environment that is there."""
    checkout.install()
    checkout.did()
    with (checkout.root / name).open("a") as file:
        file.write("\n# changed\n")
    assert checkout.install().returncode == 0
    assert checkout.did() == ["pip ROOT"]


def test_install_adds_the_test_tools_to_an_environment_without(checkout: Checkout) -> None:
    """demo.sh first, test.sh afterwards: the same environment grows."""
    checkout.install()
    checkout.did()
    checkout.install("test")
    assert checkout.did() == ["pip ROOT[test]"]


def test_install_remakes_what_is_half_made_or_broken(checkout: Checkout) -> None:
    """An interrupted installation, or an interpreter that is gone, ends in a fresh environment."""
    failed = checkout.install(FAKE_PIP="1")
    assert failed.returncode == 2
    assert "pip could not install" in failed.stderr
    assert checkout.did() == ["venv", "pip ROOT"]
    assert checkout.install().returncode == 0
    assert checkout.did() == ["venv", "pip ROOT"]
    (checkout.root / ".venv" / "bin" / "python").unlink()
    assert checkout.install().returncode == 0
    assert checkout.did() == ["venv", "pip ROOT"]


def test_install_never_removes_a_folder_that_it_did_not_make(checkout: Checkout) -> None:
    """DINO_LITE_VENV may name a folder by mistake: nothing in it is touched."""
    photos = checkout.root.parent / "photos"
    photos.mkdir()
    (photos / "cat.jpg").touch()
    refused = checkout.install(DINO_LITE_VENV="photos")
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    assert "photos is in the way" in refused.stderr
    assert [path.name for path in photos.iterdir()] == ["cat.jpg"]


def test_install_without_a_fitting_python_says_so_in_one_sentence(checkout: Checkout) -> None:
    """Python 3.10 or 3.14 alone: one sentence, exit 2, nothing written."""
    refused = checkout.install(FAKE_UNFIT="1")
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert len(refused.stderr.splitlines()) == 1
    assert "no Python 3.11, 3.12 or 3.13" in refused.stderr
    assert not (checkout.root / ".venv").exists()


def test_versions_are_tried_in_environments_that_are_removed(
    checkout: Checkout, tmp_path: Path
) -> None:
    """First with every lower bound of the package's dependencies, then with no constraint; both are
    tried where one fails, and arguments go to pytest.
    """
    folder = tmp_path / "temporary"
    folder.mkdir()
    ended = checkout.run("test_versions.sh", "-k", "vit", TMPDIR=str(folder), FAKE_PYTEST="1")
    assert ended.returncode == 1
    assert ended.stdout.splitlines() == ["oldest: torch==9.9", "newest: torch==9.9"]
    lines = checkout.did()
    assert lines[:3] == ["venv", "pip ROOT[test]", "-m pytest -q -k vit"]
    assert lines[-3:] == ["venv", "pip ROOT[test]", "-m pytest -q -k vit"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"]
    exact = {re.sub(r"\[.*\]|,.*", "", line).replace(">=", "==") for line in asked}
    assert set(lines[3:-3]) == exact
    assert list(folder.iterdir()) == []


def test_versions_of_one_kind_are_tried_by_its_word(checkout: Checkout) -> None:
    """`newest` alone makes one environment."""
    assert checkout.run("test_versions.sh", "newest").returncode == 0
    assert checkout.did() == ["venv", "pip ROOT[test]", "-m pytest -q"]


def test_dockerfile_takes_its_choices_as_arguments_and_runs_without_root() -> None:
    """Base image, variant and package index are arguments; no root; `dino-lite` is the entry."""
    text = (ROOT / "docker" / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(None, 1) for line in text.splitlines() if line and line[0] not in "# "]
    arguments = dict((value + "=").split("=")[:2] for word, value in lines if word == "ARG")
    assert {"BASE_IMAGE", "VARIANT", "EXTRA_INDEX_URL", "UID"} <= set(arguments)
    assert arguments["EXTRA_INDEX_URL"].strip('"') == ""
    assert "://" not in text
    stages = [value for word, value in lines if word == "FROM"]
    assert stages[-1] == "${VARIANT}"
    assert {"installed AS cpu", "installed AS cuda"} <= set(stages)
    users = [value for word, value in lines if word == "USER"]
    assert users[-1] == "${UID}"
    assert int(arguments["UID"]) > 0
    assert [value for word, value in lines if word == "ENTRYPOINT"] == ['["dino-lite"]']


def test_dockerfile_copies_only_what_exists_and_is_let_in() -> None:
    """Every source of a COPY is in the repository and on .dockerignore's list of exceptions."""
    text = (ROOT / "docker" / "Dockerfile").read_text()
    sources = " ".join(re.findall(r"^COPY (.+) \S+$", text, re.M)).split()
    let_in = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.M)
    assert set(sources) == set(let_in)
    assert all((ROOT / name).exists() for name in sources)


def test_continuous_integration_covers_the_versions_that_are_promised() -> None:
    """CI runs scripts/test.sh on each Python that pyproject allows."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["test"]
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    promised = [line.split(" :: ")[-1] for line in classifiers if "Python :: 3." in line]
    assert job["strategy"]["matrix"]["python"] == promised
    assert "scripts/test.sh" in [step.get("run") for step in job["steps"]]
