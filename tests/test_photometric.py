"""Bytes to normalized floats."""

from __future__ import annotations

import pytest
import torch

from dino_lite.contracts import Crops, UserError
from dino_lite.data.photometric import Normalize


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_byte_follows_the_formula(dtype: torch.dtype) -> None:
    """(x/255 - mean)/std of all 256 values, as exact as the type allows."""
    mean, std = (0.1, 0.5, 0.9), (0.3, 0.2, 0.7)
    x = torch.arange(256, dtype=torch.uint8).expand(2, 3, 256).reshape(2, 3, 16, 16)
    found = Normalize(mean, std)(x, dtype)
    shape = (3, 1, 1)
    m, s = (torch.tensor(v, dtype=torch.float64).view(shape) for v in (mean, std))
    wanted = (x.double() / 255 - m) / s
    assert found.dtype == dtype
    # bfloat16: rounded once, after the arithmetic.
    bound = {torch.float64: 1e-15, torch.float32: 4e-7, torch.bfloat16: 2**-8}[dtype]
    assert (found.double() - wanted).abs().max() <= bound * wanted.abs().max()


def test_bytes_in_any_memory_order_become_contiguous() -> None:
    """Workers deliver height, width, channel: values stay in place, memory is put in order."""
    x = torch.randint(0, 256, (2, 5, 8, 8, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3)
    found = Normalize()(x)
    assert found.is_contiguous()
    assert torch.equal(found, Normalize()(x.contiguous()))


def test_all_crops_are_normalized_and_nothing_else() -> None:
    """Global, local and extra crops; index, labels, boxes and draws stay."""
    x = torch.randint(0, 256, (2, 4, 3, 8, 8), dtype=torch.uint8)
    crops = Crops(
        globals_=x,
        locals_=x[:, :, :, :4, :4],
        index=torch.arange(4),
        labels=torch.arange(4),
        boxes=torch.rand(4, 4, 4),
        draws=torch.rand(4, 4, 9),
        extra={"large": x},
    )
    normalize = Normalize()
    found = normalize.crops(crops, torch.float64)
    assert torch.equal(found.globals_, normalize(x, torch.float64))
    assert found.locals_ is not None
    assert torch.equal(found.locals_, normalize(x[:, :, :, :4, :4], torch.float64))
    assert torch.equal(found.extra["large"], found.globals_)
    for name in ("index", "labels", "boxes", "draws"):
        assert getattr(found, name) is getattr(crops, name)
    assert normalize.crops(crops._replace(locals_=None)).locals_ is None


def test_checkpoints_do_not_hold_it() -> None:
    """The constants are the configuration's, not the run's."""
    assert not Normalize().state_dict()


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.5, 0.5)), ((0.5,), (0.0,))])
def test_impossible_constants_are_refused(mean: tuple[float], std: tuple[float]) -> None:
    """A channel without its pair, or a division by zero."""
    with pytest.raises(UserError, match="std"):
        Normalize(mean, std)
