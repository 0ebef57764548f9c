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
    "adapt": "go on from weights that exist, keeping what they knew",
    "distill": "train small backbones to match a large one",
    "evaluate": "evaluate a frozen backbone",
    "compare": "compare several backbones with each other and with baselines",
    "report": "write an HTML page about a run",
    "export": "write the backbone in a format that other programs read",
    "embed": "write the features of images to files",
    "runs": "list the runs: state, k-NN, age, size",
}
USAGE = (
    "usage: dino-lite COMMAND [PATH ...] [KEY=VALUE ...] [--help | --cfg job | --multirun]\n\n"
    + "".join(f"  {name:10s} {what}\n" for name, what in COMMANDS.items())
    + "\nWhat a command does, its settings and examples: dino-lite COMMAND --help\n"
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
    if command in ("-sc", "--shell-completion"):  # the command is in the line to complete
        command, arguments = _complete(os.environ.get("COMP_LINE", "")), [command, *arguments]
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        if not near and os.path.exists(os.path.expanduser(command)):
            near = [f"dino-lite pretrain {command}"]
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}."
        print(f"dino-lite: unknown command {command}: {hint}", file=sys.stderr)
        sys.exit(2)
    # What follows imports Hydra, but not torch, which takes seconds.
    from dino_lite.config import arguments_of, check_overrides
    from dino_lite.config import command as command_of
    from dino_lite.errors import user_errors
    from dino_lite.overrides import read_flags, shows_only

    with user_errors():
        arguments = arguments_of(command, arguments)
        flags = read_flags(arguments)
        if shows_only(flags):
            sys.argv[1:] = arguments
            command_of(command)(lambda config: None)()
            return
        check_overrides(command, flags)
    os.environ["PYTHONSAFEPATH"] = "1"  # do not import, say, timm.py from the user's folder
    line = [sys.executable, "-m", f"dino_lite.commands.{command}", *arguments]
    if os.name == "posix":
        os.execv(sys.executable, line)
    sys.exit(subprocess.call(line))


def _complete(line: str) -> str:
    """The command in the `line` that a shell completes; without it, `line` is as Hydra expects it.
    While the command itself is being typed, print those that fit and exit.
    """
    script, _, rest = line.partition(" ")
    command, space, rest = rest.lstrip().partition(" ")
    if script and not (space and command in COMMANDS):
        print(" ".join(name for name in COMMANDS if not space and name.startswith(command)))
        sys.exit()
    os.environ["COMP_LINE"] = f"{script} {rest}"
    return command or "pretrain"  # to install or uninstall, any
