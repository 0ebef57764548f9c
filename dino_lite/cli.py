"""`dino-lite COMMAND ARGS`: becomes `python -m dino_lite.commands.COMMAND ARGS`, so that launchers
can run it again.
"""

from __future__ import annotations

import difflib
import os
import subprocess
import sys

COMMANDS = {
    "check": "look at the data before a run is paid for",
    "pretrain": "learn a backbone from a folder of images",
    "evaluate": "measure a frozen backbone",
    "compare": "hold several backbones against each other and against none",
    "report": "tell a run on one HTML page",
    "export": "write the backbone in a format other programs read",
}
USAGE = "usage: dino-lite COMMAND [KEY=VALUE ...] [--help | --cfg job | --multirun]\n\n" + "".join(
    f"  {name:10s} {what}\n" for name, what in COMMANDS.items()
)


def main() -> None:
    """Entry point of the `dino-lite` script."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return
    if command == "--version":
        from dino_lite.version import __version__

        print(f"dino-lite {__version__}")
        return
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}."
        print(f"dino-lite: there is no command {command}: {hint}", file=sys.stderr)
        sys.exit(2)
    from dino_lite.config import quote_override  # not for --help: it imports Hydra

    os.environ["PYTHONSAFEPATH"] = "1"  # else a stray timm.py in the user's folder is imported
    line = [sys.executable, "-m", f"dino_lite.commands.{command}", *map(quote_override, arguments)]
    if os.name == "posix":
        os.execv(sys.executable, line)
    sys.exit(subprocess.call(line))
