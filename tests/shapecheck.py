"""What `--jaxtyping-packages` checks annotations with: beartype, where an int is a float too."""

from __future__ import annotations

from beartype import BeartypeConf
from beartype import beartype as _beartype

beartype = _beartype(conf=BeartypeConf(is_pep484_tower=True))
