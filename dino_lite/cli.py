"""`dino-lite COMMAND ARGS`: executes `python -m dino_lite.commands.COMMAND ARGS`, so that launchers
can start the same command line on other ranks.
"""

from __future__ import annotations

import difflib
import os
import subprocess
import sys

COMMANDS = {
    "check": "check the data before a run",
    "pretrain": "train a backbone on a folder of images",
    "evaluate": "evaluate a frozen backbone",
    "compare": "compare several backbones with each other and with baselines",
    "report": "write an HTML page about a run",
    "export": "write the backbone in a format that other programs read",
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
        print(f"dino-lite: unknown command {command}: {hint}", file=sys.stderr)
        sys.exit(2)
    from dino_lite.config import quote_override  # imports Hydra, which --help does not need

    os.environ["PYTHONSAFEPATH"] = "1"  # do not import, say, timm.py from the user's folder
    line = [sys.executable, "-m", f"dino_lite.commands.{command}", *map(quote_override, arguments)]
    if os.name == "posix":
        os.execv(sys.executable, line)
    sys.exit(subprocess.call(line))
