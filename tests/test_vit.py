"""The vision transformer: timm's numbers, other sizes, positions, attention, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import oracle
from dino_lite.backbones.spec import build_backbone
from dino_lite.backbones.vit import ViT
from dino_lite.contracts import UserError
from dino_lite.formats.weights import load_pretrained

SMALL = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}


def randomize(module: nn.Module) -> None:
    """Generic weights, so that no part is hidden by an initial zero or one."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def small(**settings: Any) -> ViT:
    """Three blocks of width 16 in float64, 4×4 cells, generic weights, eval mode."""
    backbone = ViT(**SMALL | settings).double().eval()  # type: ignore[arg-type]
    randomize(backbone)
    return backbone


def images(*size: int, num: int = 2, channels: int = 3) -> Tensor:
    """Noise."""
    return torch.randn(num, channels, *size, dtype=torch.float64)


def timm_twin(backbone: ViT, name: str = "vit", **settings: Any) -> VisionTransformer:
    """The timm model with the same weights and timm's own forward."""
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    kwargs |= {"num_classes": 0, **settings}
    model = VisionTransformer(**kwargs) if name == "vit" else timm.create_model(name, **kwargs)
    assert isinstance(model, VisionTransformer)
    model = model.double().eval()
    model.load_state_dict(backbone.state_dict())
    return model


# ------------------------------------------------------------------------------------ forward


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit", {}),
        ("vit", {"qkv_bias": False, "mlp_ratio": 2.0}),
        ("vit", {"init_values": 0.1, "qk_norm": True}),
        ("vit_tiny_patch16_224", {}),
        ("vit_small_patch14_dinov2", {}),
    ],
)
def test_at_the_native_size_the_tokens_are_timms(name: str, settings: dict[str, Any]) -> None:
    """Class and patch tokens of timm's forward, for plain models and for timm's names."""
    backbone = small(name=name, **settings)
    wanted = timm_twin(backbone, name, **settings).forward_features(images_ := images(32, 32))
    tokens = backbone(images_)
    torch.testing.assert_close(tokens.cls, wanted[:, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(tokens.patches, wanted[:, 1:], rtol=1e-6, atol=1e-6)
    assert tokens.registers is None
    assert tokens.grid == (4, 4)


@pytest.mark.parametrize("size", [(8, 8), (24, 24), (64, 64), (16, 40), (8, 128), (64, 16)])
def test_other_sizes_are_timms_with_resampled_positions(size: tuple[int, int]) -> None:
    """Smaller, larger, not square, and as many patches as the native size in another shape."""
    backbone = small()
    model = timm_twin(backbone, dynamic_img_size=True)
    wanted = model.forward_features(images_ := images(*size))
    tokens = backbone(images_)
    assert tokens.grid == (size[0] // 8, size[1] // 8)
    assert tokens.patches.shape == (2, size[0] * size[1] // 64, 16)
    # timm resamples in float32
    torch.testing.assert_close(tokens.cls, wanted[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens.patches, wanted[:, 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(33, 32), (32, 12), (4, 4)])
def test_sizes_that_the_patch_does_not_divide_are_refused(size: tuple[int, int]) -> None:
    """In a sentence with the size and the patch."""
    with pytest.raises(UserError, match=rf"{size[0]}x{size[1]} pixels .* patches of 8"):
        small()(images(*size))


def test_one_channel_is_enough() -> None:
    """in_chans=1: gray images go through, color is what does not fit."""
    backbone = small(in_chans=1)
    assert backbone.in_chans == backbone.spec["in_chans"] == 1
    assert backbone(images(32, 32, channels=1)).cls.shape == (2, 16)


def test_published_sizes() -> None:
    """ViT-Ti, S and B with patches of 16 have the published numbers of parameters."""
    wanted = {"tiny": 5_524_416, "small": 21_665_664, "base": 85_798_656}
    for size, number in wanted.items():
        with torch.device("meta"):
            backbone = ViT(f"vit_{size}_patch16_224")
        assert sum(p.numel() for p in backbone.parameters()) == number


# ------------------------------------------------------------------- masks, registers, SwiGLU


def test_masks_are_refused_without_a_mask_token() -> None:
    """A mask that would be ignored is an error."""
    with pytest.raises(NotImplementedError, match="mask"):
        small()(images(32, 32), torch.zeros(2, 16, dtype=torch.bool))


@pytest.mark.parametrize("settings", [{}, {"num_registers": 3}])
def test_of_masked_patches_only_their_place_is_seen(settings: dict[str, Any]) -> None:
    """The mask token and a position stand for them; the others are as they were embedded."""
    backbone, images_ = small(mask_token=True, **settings), images(32, 32)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 5] = mask[1, [0, 15]] = True
    plain, masked = backbone.embed(images_)[0], backbone.embed(images_, mask)[0]
    first = 1 + backbone.num_registers
    wanted = plain[:, first:].clone()
    for image, patch in mask.nonzero().tolist():
        wanted[image, patch] = backbone.mask_token[0] + backbone.pos_embed[0, 1 + patch]
    torch.testing.assert_close(masked[:, first:], wanted)
    assert torch.equal(masked[:, :first], plain[:, :first])
    other = images_.clone()
    other[0, :, 8:16, 8:16] = 7.0  # patch 5 of the first image
    assert torch.equal(backbone(other, mask).patches[0], backbone(images_, mask).patches[0])
    none = torch.zeros_like(mask)
    assert torch.equal(backbone(images_, none).cls, backbone(images_).cls)
    backbone(images_, mask).patches.square().sum().backward()
    assert backbone.mask_token.grad.abs().sum() > 0


def test_registers_stand_between_class_token_and_patches_without_positions() -> None:
    """They are the same at every size, come back by themselves, and take part in attention."""
    backbone = small(num_registers=3)
    assert backbone.register_tokens.shape == (1, 3, 16)
    for size in ((32, 32), (16, 40)):
        tokens, grid = backbone.embed(images_ := images(*size))
        assert torch.equal(tokens[:, 1:4], backbone.register_tokens.expand(2, -1, -1))
        found = backbone(images_)
        assert found.registers is not None
        assert found.registers.shape == (2, 3, 16)
        assert found.patches.shape == (2, grid[0] * grid[1], 16)
        num = 4 + found.patches.shape[1]
        assert backbone.attention(images_).shape == (2, 2, num, num)
        middle = backbone.intermediate(images_, [1, -1])
        torch.testing.assert_close(middle[1].registers, found.registers)
        assert not torch.equal(middle[0].registers, found.registers)
    before = backbone(images_).cls.detach()
    with torch.no_grad():
        backbone.register_tokens.mul_(-2)
    assert not torch.allclose(backbone(images_).cls, before)


def test_class_features_alone_are_the_same_with_all_of_dinov2s_parts() -> None:
    """cls_only leaves out registers and patches of the last block, and changes nothing else."""
    backbone = small(num_registers=2, init_values=0.5, mlp="swiglu")
    whole, alone = backbone(images_ := images(24, 32)), backbone(images_, cls_only=True)
    torch.testing.assert_close(alone.cls, whole.cls)
    assert alone.registers is not None
    assert (alone.registers.shape, alone.patches.shape) == ((2, 0, 16), (2, 0, 16))


def test_a_gated_mlp_has_two_thirds_of_the_width_in_whole_eights() -> None:
    """16 wide: 2/3 of 64 is 42.7, rounded up 48; both halves of its first layer start alike."""
    torch.manual_seed(0)
    mlp = ViT(**SMALL | {"embed_dim": 16}, mlp="swiglu").blocks[0].mlp  # type: ignore[arg-type]
    assert (mlp.fc1.weight.shape, mlp.fc2.weight.shape) == ((96, 16), (16, 48))
    gate, value = mlp.fc1.weight.detach().chunk(2)
    assert 0.015 < gate.std() < 0.025
    assert 0.015 < value.std() < 0.025
    assert not mlp.fc1.bias.any()
    x = torch.randn(2, 5, 16)
    a, b = (x @ mlp.fc1.weight.T + mlp.fc1.bias).split(48, dim=-1)
    torch.testing.assert_close(mlp(x), (a * a.sigmoid() * b) @ mlp.fc2.weight.T + mlp.fc2.bias)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit_small_patch14_reg4_dinov2", {}),
        ("vit_giant_patch14_dinov2", {"embed_dim": 192, "num_heads": 3}),
        ("vit_giant_patch14_reg4_dinov2", {"embed_dim": 192, "num_heads": 3}),
        ("deit3_small_patch16_224", {}),
        ("vit", {"embed_dim": 16, "num_heads": 2, "num_registers": 2}),
    ],
)
def test_timms_models_with_registers_or_gates_are_built_in_our_form(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """With timm's weights, whose class token has its position in it, all tokens are timm's."""
    sizes = {"patch_size": 8, "depth": 2, **settings}
    backbone = ViT(name, image_size=32, **sizes).double().eval()
    kwargs = {"img_size": 32, "num_classes": 0, **sizes}
    if "num_registers" in kwargs:
        kwargs |= {"reg_tokens": kwargs.pop("num_registers"), "no_embed_class": True}
    model = VisionTransformer(**kwargs) if name == "vit" else timm.create_model(name, **kwargs)
    randomize(model)
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    load_pretrained(backbone, tmp_path / "timm.safetensors")
    wanted = model.double().eval().forward_features(images_ := images(32, 32))
    tokens = backbone(images_)
    found = [tokens.cls[:, None], tokens.patches]
    if tokens.registers is not None:
        found.insert(1, tokens.registers)
    assert backbone.num_registers == model.num_reg_tokens
    torch.testing.assert_close(torch.cat(found, dim=1), wanted, rtol=1e-6, atol=1e-6)


def test_a_plain_vit_has_the_keys_it_always_had() -> None:
    """Checkpoints of before load."""
    assert {name for name in small().state_dict() if not name.startswith("blocks.")} == {
        *("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"),
        *("norm.weight", "norm.bias"),
    }


# ------------------------------------------------------------------------------------ positions


def test_at_the_native_grid_positions_are_the_learned_ones() -> None:
    """Not resampled, under either rule."""
    for settings in ({}, {"position_offset": 0.1, "position_antialias": False}):
        backbone = small(**settings)
        assert backbone.positions((4, 4)) is backbone.pos_embed


@pytest.mark.parametrize("grid", [(2, 2), (3, 5), (7, 7), (2, 8), (1, 1)])
def test_the_references_rule_samples_by_scale_with_an_offset(grid: tuple[int, int]) -> None:
    """The scale (cells + 0.1) / own cells places the samples; the class position stays."""
    backbone = small(position_offset=0.1, position_antialias=False)
    found = backbone.positions(grid).detach()
    learned = backbone.pos_embed.detach()
    scale = ((grid[0] + 0.1) / 4, (grid[1] + 0.1) / 4)
    assert torch.equal(found[:, 0], learned[:, 0])
    for channel in (0, 7, 15):
        cells = learned[0, 1:, channel].reshape(4, 4)
        wanted = oracle.bicubic(cells, *grid, scale)
        torch.testing.assert_close(found[0, 1:, channel].reshape(grid), wanted)


def test_without_offset_samples_are_placed_by_size() -> None:
    """Where nothing shrinks there is nothing to antialias: plain bicubic by the ratio of sizes."""
    backbone = small(position_antialias=False)
    cells = backbone.pos_embed.detach()[0, 1:, 3].reshape(4, 4)
    found = backbone.positions((6, 9)).detach()[0, 1:, 3].reshape(6, 9)
    torch.testing.assert_close(found, oracle.bicubic(cells, 6, 9, (6 / 4, 9 / 4)))


def test_positions_of_one_value_stay_that_value() -> None:
    """However they are resampled, since weights sum to one."""
    for settings in ({}, {"position_antialias": False}, {"position_offset": 0.1}):
        backbone = small(**settings)
        with torch.no_grad():
            backbone.pos_embed.fill_(2.5)
        found = backbone.positions((3, 7)).detach()
        torch.testing.assert_close(found, torch.full((1, 22, 16), 2.5, dtype=torch.float64))


@examples(max_examples=60)
@given(own=st.integers(1, 20), rows=st.integers(1, 24), columns=st.integers(1, 24))
def test_every_grid_gets_as_many_positions_as_it_has_cells(
    own: int, rows: int, columns: int
) -> None:
    """No rounding of the scale makes a row too many or too few."""
    for offset in (0.0, 0.1):
        backbone = ViT(
            image_size=own, patch_size=1, embed_dim=2, depth=1, num_heads=1, position_offset=offset
        )
        assert backbone.positions((rows, columns)).shape == (1, 1 + rows * columns, 2)


def test_resampled_positions_learn() -> None:
    """Crops smaller than the native size reach the learned positions with their gradient."""
    backbone = small()
    backbone(images(16, 16)).cls.sum().backward()
    assert backbone.pos_embed.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------ inside


def test_intermediate_tokens_come_in_the_order_asked_for() -> None:
    """Each through the last norm; the last block's are the forward's; −2 is the last but one."""
    backbone, images_ = small(), images(24, 40)
    last, first, middle = backbone.intermediate(images_, [2, 0, -2])
    forward = backbone(images_)
    assert torch.equal(last.cls, forward.cls)
    assert torch.equal(last.patches, forward.patches)
    tokens, grid = backbone.embed(images_)
    model = timm_twin(backbone)
    for found, block in ((first, model.blocks[0]), (middle, model.blocks[1])):
        tokens = block(tokens)
        normed = backbone.norm(tokens)
        torch.testing.assert_close(found.cls, normed[:, 0])
        torch.testing.assert_close(found.patches, normed[:, 1:])
        assert found.grid == grid == (3, 5)


@pytest.mark.parametrize("settings", [{}, {"qk_norm": True}])
def test_attention_is_the_last_blocks_own(settings: dict[str, Any]) -> None:
    """What timm's last block multiplies its values by, from the same images; rows sum to one."""
    backbone, images_ = small(**settings), images(32, 32)
    model = timm_twin(backbone, **settings)
    last, seen = model.blocks[-1].attn, []
    last.fused_attn = False
    last.attn_drop.register_forward_hook(lambda module, args, output: seen.append(output))
    model.forward_features(images_)
    found = backbone.attention(images_)
    assert found.shape == (2, 2, 17, 17)
    torch.testing.assert_close(found, seen[0])
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 2, 17, dtype=torch.float64))


def test_every_parameter_knows_its_depth() -> None:
    """0 for patches, tokens and positions, i+1 for block i, one more for the last norm."""
    backbone = small(num_registers=2, mask_token=True)
    depths = {name: backbone.depth_of(name) for name, _ in backbone.named_parameters()}
    stem = {name for name, depth in depths.items() if depth == 0}
    assert stem == {
        *("cls_token", "pos_embed", "register_tokens", "mask_token"),
        *("patch_embed.proj.weight", "patch_embed.proj.bias"),
    }
    assert {name for name, depth in depths.items() if depth == 4} == {"norm.weight", "norm.bias"}
    for i in range(3):
        wanted = {name for name in depths if name.startswith(f"blocks.{i}.")}
        assert {name for name, depth in depths.items() if depth == i + 1} == wanted


def test_paths_are_dropped_in_train_mode_only() -> None:
    """Evaluation answers the same twice, as a network that drops nothing; training does not."""
    backbone = small(drop_path=0.5)
    images_ = images(32, 32, num=8)
    still = ViT(**SMALL).double().eval()  # type: ignore[arg-type]
    still.load_state_dict(backbone.state_dict())
    assert torch.equal(backbone(images_).cls, still(images_).cls)
    backbone.train()
    assert not torch.equal(backbone(images_).cls, backbone(images_).cls)


def test_dropped_paths_grow_linearly_with_depth() -> None:
    """0 in the first block, the whole of it in the last."""
    backbone = ViT(**SMALL | {"depth": 5}, drop_path=0.2)  # type: ignore[arg-type]
    probs = [getattr(block.drop_path1, "drop_prob", 0.0) for block in backbone.blocks]
    assert probs == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


def test_dropped_paths_may_be_uniform() -> None:
    """The same in both halves of all blocks."""
    backbone = ViT(**SMALL, drop_path=0.2, drop_path_uniform=True)  # type: ignore[arg-type]
    paths = [path for block in backbone.blocks for path in (block.drop_path1, block.drop_path2)]
    assert [path.drop_prob for path in paths] == [0.2] * 6


# ------------------------------------------------------------------------------------ spec


@pytest.mark.parametrize(
    "settings",
    [
        {
            **SMALL,
            "drop_path": 0.1,
            "drop_path_by": "batch",
            "drop_path_uniform": True,
            "position_offset": 0.1,
            "position_antialias": False,
            "in_chans": 1,
        },
        {"name": "vit_tiny_patch16_224", "image_size": 32, "depth": 2, "embed_dim": None},
        {**SMALL, "num_registers": 2, "mask_token": True, "mlp": "swiglu", "norm_eps": 1e-3},
        {"name": "vit_small_patch14_reg4_dinov2", "image_size": 32, "depth": 1},
    ],
)
def test_the_spec_is_json_and_rebuilds_the_backbone(settings: dict[str, Any]) -> None:
    """Through JSON and back the same weights fit and give the same tokens; no path is dropped."""
    backbone = ViT(**settings).eval()
    spec = json.loads(json.dumps(backbone.stored_spec()))
    assert not [key for key in spec if key.startswith("drop_path")]
    twin = build_backbone(spec)
    twin.load_state_dict(backbone.state_dict())
    images_ = images(48, 48, channels=backbone.in_chans).float()
    assert torch.equal(twin.train()(images_).cls, backbone(images_).cls)
    assert twin.spec == backbone.spec
    assert (twin.embed_dim, twin.patch_size, twin.in_chans) == (
        backbone.embed_dim,
        backbone.patch_size,
        backbone.in_chans,
    )


def test_a_size_that_is_none_is_the_models_own() -> None:
    """What plan() writes for timm's names."""
    backbone = ViT("vit_tiny_patch16_224", image_size=32, embed_dim=None, depth=1, num_heads=None)
    assert backbone.embed_dim == 192
    assert "embed_dim" not in backbone.spec


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image_size": 30, "patch_size": 8}, "image_size=30 must be a multiple of patch_size=8"),
        ({"name": "vit_of_dreams"}, "name=vit_of_dreams cannot be built: Unknown model"),
        ({"name": "resnet18"}, "name=resnet18 cannot be built"),
        ({"name": "beit_base_patch16_224", "depth": 1}, "not a plain vision transformer"),
        ({"name": "deit_tiny_distilled_patch16_224", "depth": 1}, "not a plain vision transformer"),
        ({"name": "vit_wee_patch16_reg1_gap_256", "depth": 1}, "not a plain vision transformer"),
        (
            {"name": "vit", "embed_dim": 8, "num_heads": 1, "mlp": "relu"},
            "mlp=relu: it must be one of gelu, swiglu",
        ),
        ({"name": "vit_base_patch16_siglip_224", "depth": 1}, "not a plain vision transformer"),
        ({"name": "vit_base_patch16_clip_224", "depth": 1}, "not a plain vision transformer"),
        ({"name": "vit", "embed_dim": 10, "num_heads": 3}, "name=vit cannot be built"),
        ({"name": "vit", "embed_dims": 10}, "name=vit cannot be built.*embed_dims"),
    ],
)
def test_what_our_forward_would_not_reproduce_is_refused(
    settings: dict[str, Any], words: str
) -> None:
    """Distilled, no class token, a norm before the blocks, other families, no model."""
    with pytest.raises(UserError, match=words) as error:
        ViT(**{"image_size": 32} | settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "vit_wee_patch16_reg1_gap_256",
        "test_vit2",
        "beit3_base_patch16_224",
        "vit_small_patch16_18x2_224",
        "vit_base_r50_s16_224",
    ],
)
def test_models_our_forward_would_not_reproduce_are_refused_with_a_reason(name: str) -> None:
    """No class token, no last norm, parallel blocks, a hybrid stem."""
    with pytest.raises(UserError) as error:
        ViT(name, image_size=32, depth=1)
    assert not str(error.value).rstrip(". ").endswith(":")


@pytest.mark.parametrize("settings", [{"pos_drop_rate": 0.5}, {"patch_drop_rate": 0.5}])
def test_what_our_forward_ignores_is_refused(settings: dict[str, float]) -> None:
    """A rate that would have no effect is no setting."""
    with pytest.raises(UserError):
        ViT(image_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1, **settings)
