"""Executes the lines of claims. As a script it does so where dino_lite cannot be imported:

    python -I foreign_process.py FOLDER PROCESS

reads job.json and pixels.safetensors in FOLDER, and writes tokens.safetensors and answer.json.
PROCESS is the number of the process that started it, with which it ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_PR_SET_PDEATHSIG = 1  # of prctl(2)


class _Refuse(MetaPathFinder):
    """Makes a package impossible to import."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Raise ImportError for the package and its modules."""
        if name.partition(".")[0] == self.package:
            raise ImportError(f"{self.package} is not available to those who read an export")


def execute(job: dict[str, Any], pixels: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
    """The tokens, by "claim/size/batch/output", with the pixels of pictures, by
    "claim/picture/number"; and seconds, by "claim/size/batch".

    `job`: "folder"; "claims", each with "load", "run" and its "sizes": names in `pixels` with batch
    sizes; with "read", which names "file", and "pictures", paths to put in its place; "repeats" of
    the runs at the first size, the fastest of which counts. Raises RuntimeError that says what
    failed.
    """
    tokens: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    for number, claim in enumerate(job["claims"]):
        names: dict[str, Any] = {"folder": job["folder"]}
        _lines(claim["load"], names, "loading it")
        for index, path in enumerate(claim["pictures"]):
            given = {**names, "torch": torch}
            code = claim["read"].replace(f'"{claim["file"]}"', repr(path))
            _lines(code, given, "preparing an image")
            made = torch.as_tensor(given.get("pixels", torch.empty(0)))
            tokens[f"{number}/picture/{index}"] = made.detach().float().clone().contiguous()
        for index, (size, batches) in enumerate(claim["sizes"]):
            for batch in batches:
                key, times = f"{number}/{size}/{batch}", []
                for _ in range(1 if index else job["repeats"]):
                    names["pixels"] = pixels[size][:batch].clone()
                    began = time.perf_counter()
                    with torch.no_grad():
                        _lines(claim["run"], names, f"reading {batch} of {size} pixels")
                    times.append(time.perf_counter() - began)
                seconds[key] = min(times)
                for output in ("cls", "patches"):
                    found = torch.as_tensor(names.pop(output, torch.empty(0)))
                    tokens[f"{key}/{output}"] = found.detach().float().clone().contiguous()
    return tokens, seconds


def _lines(code: str, names: dict[str, Any], doing: str) -> None:
    """Execute lines of a claim with the variables `names`."""
    try:
        exec(compile(code, "<claim>", "exec"), names)
    except Exception as error:
        told = str(error).strip().partition("\n")[0]
        raise RuntimeError(f"{doing}: {type(error).__name__}: {told}".rstrip(": ")) from error


def _end_with(parent: int) -> None:
    """Let the system kill this process when the one that started it ends (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # ended before
            os._exit(1)


def main(folder: Path) -> NoReturn:
    """Answer the job in `folder`."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    sys.meta_path.insert(0, _Refuse("dino_lite"))
    # An editable install and PYTHONPATH have folders of their own; other packages are beside torch.
    packages = Path(torch.__file__).parents[1]
    sys.path[:] = [
        each
        for each in [*sys.path, *job["path"]]
        if Path(each) == packages or not (Path(each) / "dino_lite").exists()
    ]
    answer: dict[str, Any] = {}
    try:
        import dino_lite.version  # must fail
    except ImportError:
        try:
            tokens, answer["seconds"] = execute(job, load_file(folder / "pixels.safetensors"))
            save_file(tokens, folder / "tokens.safetensors")
            if "dino_lite" in sys.modules:
                answer["error"] = "its lines have imported dino_lite"
        except Exception as error:
            answer["error"] = str(error)
    else:
        answer["error"] = f"dino_lite {dino_lite.version.__version__} can be imported there"
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")
    sys.exit()


if __name__ == "__main__":
    _end_with(int(sys.argv[2]))
    main(Path(sys.argv[1]))
