"""What follows from how much data there is, and of which family the backbone is: `preset=`.

`preset=auto` takes the number of images there are; a word of `SIZES` the settings of a set of that
size, whatever there is. Between the sizes that were published, numbers are read off on a log scale.
Each can be given as KEY=VALUE all the same.
"""

from __future__ import annotations

import math

from dino_lite.checks import PRESETS
from dino_lite.config import Config, get

FEW, MANY = 20_000, 1_280_000  # where small ends, and ImageNet


def size_of(config: Config) -> int:
    """Images the settings are meant for."""
    preset = get(config, "preset")
    return PRESETS.get(preset) or int(preset)


def on_log_scale(num: int, low: float, high: float) -> float:
    """`low` up to FEW images, `high` from MANY on, between them in proportion to log(num)."""
    part = (math.log(max(num, 1)) - math.log(FEW)) / (math.log(MANY) - math.log(FEW))
    return low + (high - low) * min(1.0, max(0.0, part))
