"""DINOv3's ViT: timm's numbers, rotations in plain loops, coordinates that move, a whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.layers.pos_embed_sincos as timm_rope
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor, nn

import oracle
from dino_lite.backbones.layers import prepare
from dino_lite.backbones.rope import RoPEViT, RotaryPositions
from dino_lite.backbones.spec import build_backbone
from dino_lite.backbones.vit import ViT
from dino_lite.commands.evaluate import run_evaluate
from dino_lite.commands.export import run_export
from dino_lite.config import compose
from dino_lite.contracts import Backbone, Memory, Tokens, UserError
from dino_lite.eval.features import frozen
from dino_lite.eval.pictures import attention_picture
from dino_lite.formats.safetensors import load_backbone
from dino_lite.formats.timm_names import read_eva
from dino_lite.nn.teachers import frozen_copy
from dino_lite.planning.plan import plan
from dino_lite.runs.pretraining import run_pretrain
from test_conf import facts
from test_pretrain import assert_same
from test_vit import images, randomize
from tiny import checkpoint, tiny_command

SMALL = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
NAMES = [
    "vit_small_patch16_dinov3",
    "vit_small_patch16_dinov3_qkvb",
    "vit_small_plus_patch16_dinov3",
]
SIZES = [(32, 32), (24, 40), (8, 8), (64, 16), (56, 56)]


def small(**settings: Any) -> RoPEViT:
    """Three blocks of width 24 in float64, generic weights, eval mode."""
    backbone = RoPEViT(**SMALL | settings).double().eval()  # type: ignore[arg-type]
    randomize(backbone)
    return backbone


def timm_twin(name: str, monkeypatch: pytest.MonkeyPatch | None = None, **sizes: Any) -> Any:
    """timm's model with generic weights, in float64; so are its periods and, with `monkeypatch`,
    its coordinates, which timm rounds to float32.
    """
    if monkeypatch is not None:
        build = timm_rope._build_grid

        def exact(feat_shape: list[int], **kwargs: Any) -> Tensor:
            axes = [(torch.arange(n).double() + 0.5) / n * 2 - 1 for n in feat_shape]
            wanted = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
            rounded = build(feat_shape, **kwargs).double()
            torch.testing.assert_close(rounded, wanted, rtol=1e-6, atol=1e-6)
            return wanted

        monkeypatch.setattr(timm_rope, "_build_grid", exact)
    model: Any = timm.create_model(name, num_classes=0, **SMALL | sizes).double().eval()
    randomize(model)
    width = model.rope.dim
    model.rope.periods = 100.0 ** (torch.arange(width // 4).double() * 4 / width)
    return model


def ours(model: Any, name: str, **settings: Any) -> RoPEViT:
    """Our backbone with the timm model's weights."""
    backbone = RoPEViT(name, **SMALL | settings).double().eval()  # type: ignore[arg-type]
    renamed = read_eva(dict(model.state_dict()), {})
    assert renamed is not None
    backbone.load_state_dict(renamed.weights, strict="mask_token" not in settings)
    return backbone


def joined(tokens: Tokens) -> Tensor:
    """All tokens in a row, as timm has them."""
    registers = [] if tokens.registers is None else [tokens.registers]
    return torch.cat([tokens.cls[:, None], *registers, tokens.patches], dim=1)


# ------------------------------------------------------------------------------------ timm's


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_timms_at_every_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With biases, gates and neither; square, oblong, of one patch."""
    backbone = ours(model := timm_twin(name, monkeypatch), name)
    for size in SIZES:
        tokens, wanted = backbone(x := images(*size)), model.forward_features(x)
        torch.testing.assert_close(joined(tokens), wanted, rtol=1e-9, atol=1e-10)
        assert tokens.grid == (size[0] // 8, size[1] // 8)
        assert tokens.registers is not None
        assert tokens.registers.shape == (2, 4, 24)


@pytest.mark.parametrize("memory", ["high", "normal", "low"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_timms(name: str, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every weight and of the pixels, whatever is kept in between."""
    backbone = ours(model := timm_twin(name, monkeypatch), name)
    backbone.memory = memory
    found, wanted = (images(24, 40).requires_grad_() for _ in range(2))
    wanted.data.copy_(found.data)
    out = joined(backbone(found))
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * weights).sum().backward()
    (model.forward_features(wanted) * weights).sum().backward()
    torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-8, atol=1e-10)
    slopes = read_eva({n: p.grad for n, p in model.named_parameters()}, {})
    assert slopes is not None
    assert slopes.weights.keys() == dict(backbone.named_parameters()).keys()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, slopes.weights[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_attention_is_timms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What timm's last block multiplies its values by; rows sum to one."""
    backbone = ours(model := timm_twin(name, monkeypatch), name)
    last, seen = model.blocks[-1].attn, []
    last.fused_attn = False
    last.attn_drop.register_forward_hook(lambda module, args, output: seen.append(output))
    model.forward_features(x := images(24, 16))
    found = backbone.attention(x)
    assert found.shape == (2, 2, 11, 11)
    torch.testing.assert_close(found, seen[0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 2, 11, dtype=torch.float64))


def test_intermediate_tokens_are_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    """After each block, through the last norm, in the order asked for."""
    backbone = ours(model := timm_twin(NAMES[0], monkeypatch), NAMES[0])
    x = images(40, 24)
    wanted = model.forward_intermediates(
        x, norm=True, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )
    for found, block in zip(backbone.intermediate(x, [2, 0, -2]), (2, 0, 1), strict=True):
        patches, first = wanted[block]
        torch.testing.assert_close(found.patches, patches, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(found.cls, first[:, 0], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(found.registers, first[:, 1:], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("settings", [{}, {"qkv_bias": True}, {"num_registers": 0}])
def test_class_features_alone_are_those_of_a_whole_pass(settings: dict[str, Any]) -> None:
    """cls_only leaves patches and registers of the last block out, and changes nothing else."""
    backbone, x = small(mlp="swiglu", **settings), images(24, 32)
    whole, alone = backbone(x), backbone(x, cls_only=True)
    torch.testing.assert_close(alone.cls, whole.cls, rtol=1e-11, atol=1e-12)
    assert alone.patches.shape == (2, 0, 24)
    assert alone.grid == whole.grid == (3, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "millions"), [("small", 21.6), ("base", 85.6), ("large", 303.1), ("7b", 6_716.0)]
)
def test_published_sizes(name: str, millions: float) -> None:
    """As many weights as timm's models have, and as its model cards say."""
    with torch.device("meta"):
        backbone = RoPEViT(f"vit_{name}_patch16_dinov3")
        model = timm.create_model(f"vit_{name}_patch16_dinov3", num_classes=0)
    found, wanted = (sum(p.numel() for p in m.parameters()) for m in (backbone, model))
    assert found == wanted
    assert found / 1e6 == pytest.approx(millions, abs=0.05)


# ------------------------------------------------------------------------------------ rotations


def no_norms() -> nn.Module:
    """An attention that norms neither queries nor keys."""
    attn = nn.Module()
    attn.q_norm = attn.k_norm = nn.Identity()
    return attn


@examples(max_examples=30)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    quarter=st.integers(1, 4),
    base=st.sampled_from([100.0, 7.0]),
    num_first=st.integers(0, 3),
    num_queries=st.integers(1, 30),
)
def test_rotations_are_those_of_a_plain_loop(
    rows: int, columns: int, quarter: int, base: float, num_first: int, num_queries: int
) -> None:
    """Patches turn by row and column, what stands before them stays; few queries are the first."""
    grid, num = (rows, columns), num_first + rows * columns
    x = torch.randn(2, 3, num, 4 * quarter).double()
    rotation = RotaryPositions(4 * quarter, base)(grid, x)
    query, key = prepare(no_norms(), x[:, :, :num_queries], x, rotation)
    wanted = x.clone()
    for image in range(2):
        for head in range(3):
            patches = x[image, head, num_first:]
            wanted[image, head, num_first:] = oracle.turned(patches, grid, base)
    torch.testing.assert_close(key, wanted, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(query, wanted[:, :, :num_queries], rtol=1e-10, atol=1e-11)


def test_only_differences_of_places_are_seen_among_patches() -> None:
    """Shifting all coordinates alike changes no product of two patches, stretching them does."""
    query, key = torch.randn(2, 1, 1, 12, 8).double().unbind(0)
    found = []
    for move in (None, {"shift": 0.7}, {"rescale": 3.0}):
        positions = RotaryPositions(8, 100.0, **move or {}).train(move is not None)
        turned = prepare(no_norms(), query, key, positions((3, 4), query))
        found.append(turned[0] @ turned[1].transpose(-2, -1))
    torch.testing.assert_close(found[1], found[0])
    assert float((found[2] - found[0]).abs().max()) > 0.1


def test_half_precision_reaches_no_angle() -> None:
    """Under autocast, and with weights of half precision, angles are float32's; of float64 weights
    they are float64's.
    """
    positions, grid = RotaryPositions(16, 100.0), (5, 7)
    exact = positions(grid, torch.zeros(1, dtype=torch.float64))
    assert exact[0].dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for part, wanted in zip(
                positions(grid, torch.zeros(1, dtype=dtype)), exact, strict=True
            ):
                assert part.dtype == torch.float32
                torch.testing.assert_close(part.double(), wanted, rtol=1e-5, atol=2e-6)
    low = torch.randn(1, 1, 35, 16).bfloat16()
    query, _ = prepare(no_norms(), low, low, positions(grid, low))
    assert query.dtype == torch.bfloat16
    wide, _ = prepare(no_norms(), low.double(), low.double(), exact)
    assert float((query.double() - wide).abs().max()) < 2**-7 * float(wide.abs().max())


def test_under_autocast_tokens_are_near_float32s() -> None:
    """A whole pass, as far as half precision goes."""
    backbone, x = small(qkv_bias=True).float().requires_grad_(False), images(24, 24).float()
    exact = backbone(x).patches
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = backbone(x).patches
    assert float((found - exact).norm()) < 0.05 * float(exact.norm())


# ------------------------------------------------------------------------- moving coordinates

MOVES = {"rope_shift": 0.3, "rope_jitter": 1.5, "rope_rescale": 2.0}


@pytest.mark.parametrize(
    "names", [["shift"], ["jitter"], ["rescale"], ["shift", "jitter", "rescale"]]
)
def test_coordinates_move_as_timms_do(names: list[str]) -> None:
    """In training, with the same seed: a shift, a stretch of each axis, one of both."""
    model = timm_twin(NAMES[0], **{f"rope_{name}_coords": MOVES[f"rope_{name}"] for name in names})
    backbone = ours(model, NAMES[0], **{f"rope_{name}": MOVES[f"rope_{name}"] for name in names})
    x = images(32, 64)
    plain = joined(backbone(x))
    torch.manual_seed(5)
    wanted = model.train().forward_features(x)
    torch.manual_seed(5)
    found = joined(backbone.train()(x))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)  # timm's angles are float32
    assert not torch.allclose(found, plain, rtol=1e-2)


@pytest.mark.parametrize(
    ("moves", "most_offset", "most_factor"),
    [
        ({"shift": 0.3}, 0.3, 1.0),
        ({"jitter": 1.5}, 0.0, 1.5),
        ({"rescale": 2.0}, 0.0, 2.0),
        ({"shift": 0.3, "jitter": 1.5, "rescale": 2.0}, 0.3, 3.0),
    ],
)
def test_moves_are_as_large_as_is_said_and_as_likely_up_as_down(
    moves: dict[str, float], most_offset: float, most_factor: float
) -> None:
    """Of 2,000 draws: bounds, means, and which axes go together."""
    positions = RotaryPositions(8, 100.0, **moves)
    offset, factor = torch.stack([positions._draw() for _ in range(2000)], dim=1)
    assert 0.95 * most_offset <= float(offset.abs().max()) <= most_offset
    logs = factor.log()
    most = torch.tensor(most_factor).log()
    assert 0.9 * most - 1e-6 <= float(logs.abs().max()) <= most + 1e-6
    assert float(offset.mean().abs()) <= 0.05 * most_offset
    assert float(logs.mean().abs()) <= 0.05 * most
    assert torch.equal(factor[:, 0], factor[:, 1]) == ("jitter" not in moves)


def test_one_pass_draws_once_and_only_a_student_in_training_draws() -> None:
    """Not once a block; none in evaluation, in a teacher's copy, or where nothing is to move."""
    backbone, x = small(**MOVES).train(), images(16, 24)
    calls: list[int] = []
    draw = backbone.positions._draw
    backbone.positions._draw = lambda: calls.append(1) or draw()  # type: ignore[method-assign]
    backbone(x)
    assert len(calls) == 1
    twin = frozen_copy(backbone)
    for network in (twin, small().train(), small(**MOVES)):
        state = torch.random.get_rng_state()
        first = network(x)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.equal(network(x).patches, first.patches)
    assert twin.training
    assert len(calls) == 1
    with frozen(backbone):
        backbone(x)
    assert len(calls) == 1
    assert not torch.equal(backbone(x).patches, backbone(x).patches)


def test_a_teacher_sees_the_places_as_they_are() -> None:
    """Its tokens are those of the student at rest."""
    backbone, x = small(**MOVES), images(16, 24)
    wanted = backbone(x).patches
    assert torch.equal(frozen_copy(backbone.train())(x).patches, wanted)


# ------------------------------------------------------------------------------------ parts


def test_of_masked_patches_nothing_is_seen() -> None:
    """The mask token stands for them before anything else; none masked is no mask."""
    backbone, x = small(mask_token=True), images(24, 24)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 4] = mask[1, [0, 8]] = True
    plain, masked = backbone.embed(x)[0], backbone.embed(x, mask)[0]
    wanted = plain.clone()
    for image, patch in mask.nonzero().tolist():
        wanted[image, 5 + patch] = backbone.mask_token[0]
    assert torch.equal(masked, wanted)
    other = x.clone()
    other[0, :, 8:16, 8:16] = 7.0  # patch 4 of the first image
    assert torch.equal(backbone(other, mask).patches[0], backbone(x, mask).patches[0])
    assert torch.equal(backbone(x, torch.zeros_like(mask)).cls, backbone(x).cls)
    backbone(x, mask).patches.square().sum().backward()
    assert backbone.mask_token.grad.abs().sum() > 0
    with pytest.raises(NotImplementedError, match="mask"):
        small()(x, mask)


def test_weights_start_as_dinov3s() -> None:
    """Tokens and products with a deviation of 0.02, patches by their fan-in, scales of 1e-5, zero
    for biases and the mask token.
    """
    backbone = RoPEViT(
        embed_dim=256, depth=2, num_heads=4, mlp="swiglu", mask_token=True, qkv_bias=True
    )
    for name, weight in backbone.state_dict().items():
        if name == "mask_token" or (name.endswith("bias") and "patch_embed" not in name):
            assert not weight.any(), name
        elif name.startswith("patch_embed"):
            bound = (3 * 16 * 16) ** -0.5
            assert 0.95 * bound < float(weight.abs().max()) <= bound, name
        elif name.endswith("gamma"):
            assert torch.equal(weight, torch.full_like(weight, 1e-5)), name
        elif "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
        else:
            assert 0.017 < float(weight.std()) < 0.023, name


def test_keys_have_no_bias_and_a_layers_number_is_that_of_its_block() -> None:
    """With biases only queries and values have some; layer-wise rates find every parameter."""
    backbone = small(qkv_bias=True)
    names = [
        name for name, _ in backbone.named_parameters() if name.startswith("blocks.1.attn.qkv")
    ]
    assert names == [f"blocks.1.attn.qkv.{part}" for part in ("weight", "q_bias", "v_bias")]
    bias = backbone.blocks[1].attn.qkv.bias
    assert bias.shape == (72,)
    assert not bias[24:48].any()
    assert bias[:24].all()
    depths = {name: backbone.depth_of(name) for name, _ in backbone.named_parameters()}
    assert depths["blocks.1.attn.qkv.v_bias"] == 2
    assert depths["norm.weight"] == 4
    assert depths["register_tokens"] == depths["patch_embed.proj.weight"] == 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mlp": "swiglu", "num_registers": 0, "init_values": 0.0, "mask_token": True},
        {"qkv_bias": True, "rope_base": 7.0, "mlp_ratio": 2.0, "in_chans": 1},
        {"name": NAMES[2], "depth": 1},
    ],
)
def test_the_spec_rebuilds_the_backbone(settings: dict[str, Any]) -> None:
    """From plain JSON, by its kind: the same tokens; what training alone knows is not in it."""
    backbone = small(**settings, drop_path=0.2, **MOVES)
    assert isinstance(backbone, Backbone)
    spec = json.loads(json.dumps(backbone.stored_spec()))
    assert spec["kind"] == "rope"
    assert not {"drop_path", *MOVES} & spec.keys()
    twin: Any = build_backbone(spec).double().eval()
    twin.load_state_dict(backbone.state_dict())
    x = images(16, 24, channels=backbone.in_chans)
    assert torch.equal(twin(x).patches, backbone(x).patches)
    assert (twin.embed_dim, twin.num_blocks, twin.num_registers) == (
        *(backbone.embed_dim, backbone.num_blocks, backbone.num_registers),
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "vit_of_dreams"}, "name=vit_of_dreams cannot be built: Unknown model"),
        ({"name": "vit_small_patch16_224"}, "is not a DINOv3 ViT.*vit_small_patch16_dinov3"),
        ({"name": "eva02_tiny_patch14_224"}, "is not a DINOv3 ViT"),
        ({"name": "vit_base_patch16_sapiens2"}, "is not a DINOv3 ViT"),
        ({"name": "vit_small_patch16_rope_224"}, "is not a DINOv3 ViT"),
        ({"num_heads": 4}, "width of a head is 6, but RoPE needs a multiple of 4"),
        ({"num_heads": 5}, "cannot be built"),
        ({"mlp": "relu"}, "mlp=relu: it must be one of gelu, swiglu"),
        ({"embed_dims": 8}, "cannot be built.*embed_dims"),
        ({"class_token": False, "global_pool": "avg"}, "is not a DINOv3 ViT: change only"),
        ({"patch_drop_rate": 0.5}, "patch_drop_rate.* is not a DINOv3 ViT: change only"),
        ({"rope_rescale": 0.5}, "rope_rescale=0.5"),
        ({"rope_shift": -1.0}, "rope_shift=-1.0"),
    ],
)
def test_what_is_no_dinov3_is_a_sentence(settings: dict[str, Any], words: str) -> None:
    """Other networks of timm's, other parts, heads that cannot turn, moves that mean nothing."""
    with pytest.raises(UserError, match=words) as error:
        RoPEViT(**SMALL | settings)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_a_dinov3_asked_for_as_a_plain_vit_is_told_where_it_is() -> None:
    """backbone=auto with its name."""
    with pytest.raises(UserError, match="for a DINOv3 model, backbone=rope with this name"):
        ViT(NAMES[0])


def test_sizes_that_the_patch_does_not_divide_are_refused() -> None:
    """In a sentence with the size and the patch."""
    with pytest.raises(UserError, match=r"33x32 pixels .* patches of 8"):
        small()(images(33, 32))


def test_the_plan_chooses_a_small_one_for_a_cpu_and_dinov3s_smallest_for_a_gpu() -> None:
    """backbone=rope alone; coordinates move as DINOv3's do."""
    planned = {
        device: plan(
            compose("pretrain", ["backbone=rope"]),
            facts(accelerator=device, device_name=device, bf16=device == "cuda"),
        ).config["backbone"]
        for device in ("cpu", "cuda")
    }
    assert (planned["cpu"]["name"], planned["cpu"]["embed_dim"]) == ("rope", 128)
    assert (planned["cuda"]["name"], planned["cuda"]["embed_dim"]) == (NAMES[0], None)
    named = compose("pretrain", ["backbone=vit_base_dinov3"])["backbone"]
    assert (named["name"], named["rope_rescale"]) == ("vit_base_patch16_dinov3", 2.0)


# ------------------------------------------------------------------------------------ whole


def request(runs_dir: Path, *overrides: str) -> dict[str, Any]:
    """A tiny run of a RoPE ViT whose coordinates move."""
    asked = ["backbone=rope", *tiny_command(runs_dir, "backbone.rope_rescale=2.0", *overrides)]
    return compose("pretrain", asked)


@pytest.mark.slow
def test_a_run_trains_resumes_bit_equal_and_is_evaluated(tmp_path: Path) -> None:
    """DINO of it from end to end, interrupted and not; the export gives the same tokens."""
    options = ["trainer.max_steps=6", "backbone.drop_path=0.3", "trainer.micro_batch_size=5"]
    whole = Path(run_pretrain(request(tmp_path / "whole", *options))["run"])
    stop = "+callbacks.stop={_target_: tiny.StopAt, step: 3}"
    with pytest.raises(UserError, match="run the same command to resume"):
        run_pretrain(request(tmp_path / "parts", *options, stop))
    resumed = Path(run_pretrain(request(tmp_path / "parts", *options))["run"])
    assert whole.name.startswith("dino_shapes_rope_")
    a, b = checkpoint(whole), checkpoint(resumed)
    assert a["global_step"] == b["global_step"] == 6
    assert_same(a["state_dict"], b["state_dict"])
    assert_same(a["optimizer_states"], b["optimizer_states"])

    asked = [f"checkpoint={whole}", f"runs_dir={tmp_path}", "accelerator=cpu"]
    results = run_evaluate(compose("evaluate", [*asked, "eval=[knn,linear]"]))
    assert all(0 <= results[name]["value"] <= 100 for name in ("knn", "linear"))
    written = run_export(compose("export", [*asked[:2], f"out={tmp_path / 'out'}"]))["safetensors"]
    assert written["largest_difference"] <= 1e-6
    again: Any = load_backbone(tmp_path / "out")
    assert isinstance(again, RoPEViT)
    name = "method.teachers.ema.module.backbone.blocks.1.attn.qkv.weight"
    assert torch.equal(again.blocks[1].attn.qkv.weight, a["state_dict"][name])
    attention_picture(again, torch.randn(2, 3, 16, 24), tmp_path / "attention.png")
    assert (tmp_path / "attention.png").stat().st_size > 1000
