"""Golden cases B15 and B15b: DINOv2's ViT, its weights read from a file as DINOv2 writes them, and
a block that drops paths.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dino_lite.backbones.blocks import draw_drops, run_blocks
from dino_lite.backbones.vit import ViT
from dino_lite.contracts import Tokens
from dino_lite.formats.weights import open_weights
from golden.check import Bound, Check, below, bound, compare

Case = dict[str, Any]
Tensors = dict[str, Tensor]


def our_name(name: str) -> str:
    """What we call a weight of the reference."""
    return name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")


def open_variant(case: Case, weights: Tensors, variant: Case) -> ViT:
    """The backbone that our importer makes of the reference's state dict."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(weights, Path(folder, "dinov2.pth"))
        backbone = open_weights(
            Path(folder, "dinov2.pth"),
            num_heads=case["hyper"]["num_heads"],
            norm_eps=case["hyper"]["layer_norm_eps"],
            position_offset=variant["interpolate_offset"],
            position_antialias=variant["interpolate_antialias"],
        ).backbone
    return backbone


def compare_tokens(
    label: str, found: Tokens, own: Tensors, kinds: dict[str, Bound], masked: str = ""
) -> Iterator[Check]:
    """All kinds of tokens that the case has under `masked`, each kind within its bound."""
    parts = {"clstoken": found.cls, "regtokens": found.registers, "patchtokens": found.patches}
    for kind, limit in kinds.items():
        for part, tokens in parts.items():
            wanted = own.get(f"{kind}.{masked}x_norm_{part}")
            if wanted is not None:
                assert tokens is not None
                yield compare(f"{label}.{masked}{part}", tokens, wanted, limit)


def b15(case: Case, tensors: Tensors, folder: Path) -> Iterator[Check]:
    """DINOv2's ViT at every size and rule: tokens with and without masks, positions, single blocks,
    gradients.
    """
    exact = case["tolerance"]["f64"].replace(",", ";")
    loose = bound(case["tolerance"]["f32"])
    tight = {"out64": bound(exact, "(out64)"), "out64r": bound(exact, "out64r")}
    # what float64 itself leaves near zero, where a relative bound alone allows nothing
    tight["out64r"] = tight["out64r"]._replace(atol=1e-9)
    for name, variant in case["data"]["variants"].items():
        size = "x".join(map(str, variant["hw"]))
        own = below(tensors, f"{name}/")
        weights = below(tensors, f"{variant['weights']}/w.")
        images, mask = tensors[f"in.x_i8.{size}"], tensors[f"in.mask.{size}"]
        for dtype, kinds in (
            (torch.float64, tight),
            (torch.float32, {"out": loose, "out64": loose, "out64r": loose}),
        ):
            vit = open_variant(case, weights, variant).to(dtype)
            x, label = images.to(dtype) / 32, f"{name}.{str(dtype)[-2:]}"
            tokens, masked = vit(x), vit(x, mask)
            yield compare(
                f"{label}.positions",
                vit.positions(tokens.grid),
                own["out64.pos_embed"],
                kinds["out64"],
            )
            yield from compare_tokens(label, tokens, own, kinds)
            yield from compare_tokens(label, masked, own, kinds, "masked.")
            yield from intermediate(label, vit, x, own, kinds)
            wanted = below(own, "grad64.")
            if wanted and dtype == torch.float64:
                objective = (masked.cls * tensors["in.grad_cls"].to(dtype)).sum()
                (objective + 0.01 * masked.patches[..., 0].square().sum()).backward()
                for weight, value in wanted.items():
                    slope = vit.get_parameter(our_name(weight)).grad
                    yield compare(f"{label}.grad.{weight}", slope, value, kinds["out64"])


def intermediate(
    label: str, vit: ViT, x: Tensor, own: Tensors, kinds: dict[str, Bound]
) -> Iterator[Check]:
    """Class token and patches after each block, before and after the last norm."""
    first = 1 + vit.num_registers
    for i, normed in enumerate(vit.intermediate(x, list(range(vit.num_blocks)))):
        raw = run_blocks(list(vit.blocks)[: i + 1], vit.embed(x)[0])
        for norm, cls, patches in ((1, normed.cls, normed.patches), (0, raw[:, 0], raw[:, first:])):
            for kind, part, found in (("out64", "cls", cls), ("out64r", "patch", patches)):
                wanted = own.get(f"{kind}.intermediate{i}_norm{norm}.{part}")
                if wanted is not None:
                    title = f"{label}.block{i}.norm{norm}.{part}"
                    yield compare(title, found, wanted, kinds[kind])
        wanted = own.get("out64r.intermediate_reshaped_last")
        if wanted is not None and i == vit.num_blocks - 1:
            maps = normed.patches.transpose(1, 2).unflatten(2, normed.grid)
            yield compare(f"{label}.maps", maps, wanted, kinds["out64r"])


def b15b(case: Case, tensors: Tensors, folder: Path) -> Iterator[Check]:
    """A block that drops paths by parts of the batch, with the reference's permutations: computed
    for a part, and with factors for all, as a compiled block has it.
    """
    hyper = case["hyper"]
    for dtype, precision, suffix in ((torch.float64, "f64", "64"), (torch.float32, "f32", "")):
        vit = ViT(
            depth=1,
            embed_dim=hyper["embed_dim"],
            num_heads=hyper["num_heads"],
            mlp_ratio=hyper["mlp_ratio"],
            init_values=1.0,
            norm_eps=hyper["layer_norm_eps"],
            drop_path=hyper["drop_path"],
            drop_path_by="batch",
            drop_path_uniform=True,
        )
        vit.blocks[0].load_state_dict(below(tensors, "w."))
        block, x = vit.blocks[0].to(dtype), tensors["in.x"].to(dtype)
        limit = bound(case["tolerance"][precision])
        orders = [tensors["in.perm_attn"], tensors["in.perm_mlp"]]
        for name, factors in (("part", False), ("factors", True)):
            with mock.patch("torch.randperm", side_effect=orders):
                drops = draw_drops(block, x, "batch", factors)
            found = block(x, drops=drops)
            yield compare(f"{precision}.{name}", found, tensors[f"out{suffix}.train"], limit)
        for memory in ("high", "normal", "low"):
            with mock.patch("torch.randperm", side_effect=orders):
                found = run_blocks([block], x, None, memory, drop_path_by="batch")
            yield compare(f"{precision}.{memory}", found, tensors[f"out{suffix}.train"], limit)
        found = run_blocks([block.eval()], x, drop_path_by="batch")
        yield compare(f"{precision}.eval", found, tensors[f"out{suffix}.eval"], limit)
