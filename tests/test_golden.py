"""The golden runner: what holds holds, and what does not is seen."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dino_lite.config import compose
from golden.check import Bound, bound, compare

ROOT = Path(__file__).resolve().parents[1]
_SPEC = importlib.util.spec_from_file_location("check_golden", ROOT / "scripts" / "check_golden.py")
assert _SPEC is not None
assert _SPEC.loader is not None
check_golden = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(check_golden)


SLOW = ("A10", "B14", "B14b")


def cases(golden: Path) -> list[dict[str, Any]]:
    """All cases of a folder."""
    found: list[dict[str, Any]] = json.loads((golden / "cases.json").read_text())["cases"]
    return found


@pytest.mark.parametrize(
    "prefix",
    [
        pytest.param(prefix, marks=[pytest.mark.slow] if prefix in SLOW else [])
        for prefix in sorted(check_golden.ADAPTERS)
    ],
)
def test_golden_case_holds(golden: Path, prefix: str) -> None:
    """What the official code computed is what ours computes, within the stated tolerance."""
    (case,) = [case for case in cases(golden) if case["id"].startswith(f"{prefix}_")]
    held, line = check_golden.run_case(case, golden)
    assert held, line


def copy_with(golden: Path, tmp_path: Path, prefix: str, edit: Any) -> Path:
    """A folder with one case, edited: `edit(case, tensors)`."""
    (case,) = [case for case in cases(golden) if case["id"].startswith(prefix)]
    tensors = load_file(golden / case["file"])
    edit(case, tensors)
    save_file(tensors, tmp_path / case["file"])
    (tmp_path / "cases.json").write_text(json.dumps({"cases": [case]}))
    return tmp_path


def test_one_perturbed_value_fails(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Changing one expected number by a millionth is seen, and named."""

    def edit(case: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors["wd/out64.schedule"][3] *= 1 + 1e-6

    folder = copy_with(golden, tmp_path, "A03", edit)
    assert check_golden.main([str(folder)]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_unperturbed_copy_passes(golden: Path, tmp_path: Path) -> None:
    """The same copy without the change holds."""
    folder = copy_with(golden, tmp_path, "A03", lambda case, tensors: None)
    assert check_golden.main([str(folder), "--only", "A0"]) == 0


def test_other_hyper_parameters_are_read_from_the_case(golden: Path, tmp_path: Path) -> None:
    """Schedules of other lengths and values, computed here by the formula, hold as well."""

    def edit(case: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        case["hyper"] = {
            "cosine": {
                "odd": {
                    "base_value": 0.3,
                    "final_value": 0.1,
                    "epochs": 3,
                    "niter_per_ep": 11,
                    "warmup_epochs": 1,
                    "start_warmup_value": 0.2,
                }
            },
            "teacher_temp": {},
        }
        case["data"] = {"lr_scaling": []}
        tensors.clear()
        warm = torch.linspace(0.2, 0.3, 11, dtype=torch.float64)
        turn = torch.arange(22, dtype=torch.float64) * torch.pi / 22
        tensors["odd/out64.schedule"] = torch.cat([warm, 0.1 + 0.1 * (1 + turn.cos())])

    assert check_golden.main([str(copy_with(golden, tmp_path, "A03", edit))]) == 0


def test_case_without_an_adapter_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is passed over in silence."""
    (tmp_path / "cases.json").write_text(json.dumps({"cases": [{"id": "Z99_unknown"}]}))
    assert check_golden.main([str(tmp_path)]) == 1
    assert "not covered" in capsys.readouterr().out


def test_missing_folder_and_empty_selection_exit_with_2(tmp_path: Path) -> None:
    """A wrong path, and a prefix that no case has, are mistakes of their own."""
    assert check_golden.main([str(tmp_path)]) == 2
    (tmp_path / "cases.json").write_text(json.dumps({"cases": [{"id": "A01_x"}]}))
    assert check_golden.main([str(tmp_path), "--only", "Q"]) == 2


def test_missing_tensors_are_a_failure_not_a_crash(golden: Path, tmp_path: Path) -> None:
    """A file that is not there fails its case and leaves the others to run."""
    shutil.copy(golden / "cases.json", tmp_path)
    assert check_golden.main([str(tmp_path), "--only", "A03"]) == 1


@pytest.mark.parametrize(
    ("text", "subject", "expected"),
    [
        (
            "rtol 1e-4, atol 1e-5 on outputs; gradients rtol 1e-3, atol 2e-5 * max|grad|",
            "",
            Bound(1e-4, 1e-5),
        ),
        (
            "rtol 1e-4, atol 1e-5 on outputs; gradients rtol 1e-3, atol 2e-5 * max|grad|",
            "gradients",
            Bound(1e-3, 0, 2e-5),
        ),
        (
            "loss rtol 1e-5; centre rtol 1e-5 atol 1e-6; gradient atol 1e-6 * max|grad| * 50",
            "gradient",
            Bound(0, 0, 5e-5),
        ),
        (
            "loss rtol 2e-5 (5e-7); centre atol 1e-5 * max; weights atol 2e-5",
            "centre",
            Bound(0, 0, 1e-5),
        ),
        ("rtol 1e-10", "loss", Bound(1e-10)),
    ],
)
def test_tolerances_are_read_from_the_case(text: str, subject: str, expected: Bound) -> None:
    """The numbers of the clause that names the subject."""
    assert bound(text, subject) == pytest.approx(expected)


def test_comparison_finds_the_worst_element_and_wrong_shapes_and_nan() -> None:
    """Errors are held against the bound of their own element."""
    worst = compare("x", torch.tensor([1.0, 100.5]), torch.tensor([1.1, 100.0]), Bound(rtol=0.01))
    assert worst.error == pytest.approx(0.1, rel=1e-5)
    assert check_golden.nearness(worst) > 1
    assert check_golden.nearness(compare("x", torch.zeros(2), torch.zeros(3), Bound(atol=1))) > 1
    assert check_golden.nearness(compare("x", torch.tensor(float("nan")), 0.0, Bound(atol=1))) > 1


def test_compat_is_what_the_runner_runs_under() -> None:
    """The adapters take their switches from compat=dino."""
    from golden.adapters_core import compat_config

    assert compat_config() == compose("pretrain", ["compat=dino"])
