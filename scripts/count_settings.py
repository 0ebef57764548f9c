#!/usr/bin/env python3
"""Count the settings that several configs repeat: `count_settings.py [FOLDER] [--json FILE]`.

A setting is a dotted key with its value in one file below FOLDER (default: conf/experiment),
without the defaults list; it is repeated if another file sets the same key to the same value.
Prints the repeated settings and their share.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]


def settings(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every (dotted key, value) of a config except its defaults list; a list is one value."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from settings(value, f"{prefix}{key}.")
        elif prefix or key != "defaults":
            yield f"{prefix}{key}", value


def count(folder: Path) -> dict[str, Any]:
    """Count settings and repeated settings; also returns their share and the files of each."""
    files = defaultdict(list)
    for path in sorted(folder.rglob("*.yaml")):
        for key, value in settings(yaml.safe_load(path.read_text(encoding="utf-8")) or {}):
            files[f"{key}={json.dumps(value)}"].append(path.relative_to(folder).as_posix())
    num = sum(map(len, files.values()))
    repeated = {setting: names for setting, names in sorted(files.items()) if len(names) > 1}
    num_repeated = sum(map(len, repeated.values()))
    share = num_repeated / num if num else 0.0
    return {"num": num, "num_repeated": num_repeated, "share": share, "repeated": repeated}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "conf" / "experiment")
    parser.add_argument("--json", type=Path, help="also write the result there")
    args = parser.parse_args()
    found = count(args.folder)
    for setting, names in found["repeated"].items():
        print(f"{setting}: {', '.join(names)}")
    print(f"{found['num_repeated']} of {found['num']} settings ({found['share']:.1%}) repeated")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
