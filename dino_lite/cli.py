"""`dino-lite COMMAND ARGS`: becomes `python -m dino_lite.commands.COMMAND ARGS`, so that launchers
can run it again.
"""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys

COMMANDS = {
    "pretrain": "learn a backbone from a folder of images",
    "evaluate": "measure a frozen backbone",
    "export": "write the backbone in a format other programs read",
}
# Always strings, whatever they look like: `name=1`, `data.root=a,b`, `checkpoint=x=y`.
_VERBATIM = re.compile(r"(.*\.root|checkpoint|name|runs_dir|.*\.pretrained|.*\.labels|out)")
_PLAIN = re.compile(r"[\w./+-]*")

USAGE = "usage: dino-lite COMMAND [KEY=VALUE ...] [--help | --cfg job | --multirun]\n\n" + "".join(
    f"  {name:10s} {what}\n" for name, what in COMMANDS.items()
)


def quote(value: str) -> str:
    """`value` as a quoted string of Hydra's override grammar."""
    escaped = re.sub(r"(\\*)'", lambda m: m[1] * 2 + r"\'", value)
    escaped = re.sub(r"(\\+)$", lambda m: m[1] * 2, escaped)
    return "'" + escaped.replace("${", r"\${") + "'"


def quote_override(argument: str) -> str:
    """`argument` with its value quoted where Hydra's grammar would refuse or misread it."""
    match = re.fullmatch(r"([+~]{0,2}[\w./@:-]+)=(.*)", argument, re.DOTALL)
    if match is None or argument.startswith("-"):
        return argument
    key, value = match[1], match[2]
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if quoted or value in ("", "null"):
        return argument
    if _VERBATIM.fullmatch(key.lstrip("+~")):
        return f"{key}={quote(value)}"
    if _PLAIN.fullmatch(value):
        return argument
    from dino_lite.config import parses  # here, because most commands need no grammar

    return argument if parses(argument) else f"{key}={quote(value)}"


def main() -> None:
    """Entry point of the `dino-lite` script."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return
    if command == "--version":
        from dino_lite import __version__

        print(f"dino-lite {__version__}")
        return
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}."
        print(f"dino-lite: there is no command {command}: {hint}", file=sys.stderr)
        sys.exit(2)
    os.environ["PYTHONSAFEPATH"] = "1"  # else a stray timm.py in the user's folder is imported
    line = [sys.executable, "-m", f"dino_lite.commands.{command}", *map(quote_override, arguments)]
    if os.name == "posix":
        os.execv(sys.executable, line)
    sys.exit(subprocess.call(line))
