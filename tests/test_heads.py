"""The projection head: unit bottleneck, prototypes, the reference's keys and initial values."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from dino_lite.nn.heads import DINOHead, LastLayer

KEYS = {
    (1, False): ["mlp"],
    (2, False): ["mlp.0", "mlp.2"],
    (3, False): ["mlp.0", "mlp.2", "mlp.4"],
    (1, True): ["mlp"],
    (2, True): ["mlp.0", "mlp.1", "mlp.3"],
    (3, True): ["mlp.0", "mlp.1", "mlp.3", "mlp.4", "mlp.6"],
}


@pytest.mark.parametrize(("num_layers", "batch_norm"), KEYS)
def test_keys_are_the_references(num_layers: int, batch_norm: bool) -> None:
    """Weights of the official head load under their own names."""
    head = DINOHead(6, 10, 8, 4, num_layers, batch_norm)
    wanted = {f"{k}.{kind}" for k in KEYS[num_layers, batch_norm] for kind in ("weight", "bias")}
    wanted |= {"last_layer.weight_g", "last_layer.weight_v"}
    assert {name for name, _ in head.named_parameters()} == wanted
    assert head.last_layer.weight_g.shape == (10, 1)
    assert head.last_layer.weight_v.shape == (10, 4)


@pytest.mark.parametrize(("num_layers", "batch_norm"), KEYS)
def test_the_bottleneck_has_unit_norm(num_layers: int, batch_norm: bool) -> None:
    """For any depth, in train and eval mode; K numbers a row are never made."""
    head = DINOHead(6, 10, 8, 4, num_layers, batch_norm)
    for mode in (True, False):
        z = head.train(mode)(50 * torch.randn(9, 6))
        assert z.shape == (9, 4)
        torch.testing.assert_close(z.norm(dim=1), torch.ones(9))


def test_the_head_is_linear_gelu_linear_and_a_weight_normalized_layer() -> None:
    """Logits equal the formula written out with torch's own weight normalization."""
    head = DINOHead(6, 10, 8, 4, 2, learn_norm=True).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    first, last, outer = head.mlp[0], head.mlp[2], head.last_layer
    x = torch.randn(5, 6, dtype=torch.float64)
    hidden = x @ first.weight.T + first.bias
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    bottleneck = hidden @ last.weight.T + last.bias
    bottleneck = bottleneck / bottleneck.square().sum(1, keepdim=True).sqrt()
    wanted = bottleneck @ torch._weight_norm(outer.weight_v, outer.weight_g, 0).T
    torch.testing.assert_close(head(x) @ head.prototypes().rows().T, wanted, rtol=1e-12, atol=1e-12)


def test_initial_values_are_the_references() -> None:
    """Maps from N(0, .02²), biases zero, lengths one, directions as a linear layer draws them."""
    head = DINOHead(64, 300, 128, 16, 3).requires_grad_(False)
    for i in (0, 2, 4):
        assert float(head.mlp[i].weight.std()) == pytest.approx(0.02, rel=0.1)
        assert not head.mlp[i].bias.any()
    directions = head.last_layer.weight_v
    assert float(directions.abs().max()) <= 1 / math.sqrt(16)
    assert float(directions.std()) == pytest.approx(1 / math.sqrt(3 * 16), rel=0.05)
    assert torch.equal(head.last_layer.weight_g, torch.ones(300, 1))


def train_prototypes(learn_norm: bool) -> LastLayer:
    """Five steps of a descent that also pulls on the lengths."""
    layer = LastLayer(4, 10, learn_norm)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.5)
    wanted = 3 * torch.randn(10, 4)
    for _ in range(5):
        optimizer.zero_grad()
        (layer().rows() - wanted).square().sum().backward()
        optimizer.step()
    return layer


@pytest.mark.parametrize("learn_norm", [False, True])
def test_prototypes_start_with_unit_rows(learn_norm: bool) -> None:
    """Whether or not their lengths will be trained."""
    torch.testing.assert_close(LastLayer(4, 10, learn_norm)().rows().norm(dim=1), torch.ones(10))


def test_held_lengths_stay_one_while_directions_learn() -> None:
    """learn_norm=False: weight_v moves and grows, the rows stay on the sphere."""
    layer = train_prototypes(learn_norm=False)
    assert layer.weight_g.grad is None
    assert float((layer.weight_v.detach().norm(dim=1) - 1).abs().max()) > 0.1
    torch.testing.assert_close(layer().rows().norm(dim=1), torch.ones(10))


def test_learned_lengths_are_those_of_weight_g_alone() -> None:
    """learn_norm=True: rows are as long as |g|, and the gradient of v is at right angles to v."""
    layer = train_prototypes(learn_norm=True)
    assert float((layer.weight_g.detach() - 1).abs().max()) > 0.1
    torch.testing.assert_close(layer().rows().norm(dim=1), layer.weight_g.detach().abs().squeeze(1))
    layer.zero_grad()
    (layer().rows() * torch.randn(10, 4)).sum().backward()
    across = (layer.weight_v.grad * layer.weight_v.detach()).sum(dim=1)
    torch.testing.assert_close(across, torch.zeros(10), rtol=0.0, atol=1e-5)


def test_a_deep_copy_is_equal_and_apart() -> None:
    """torch's own weight_norm could not be copied once; ours must, as the teacher is a copy."""
    head = DINOHead(6, 10, 8, 4)
    x = torch.randn(3, 6)
    head(x).sum().backward()
    twin = copy.deepcopy(head)
    assert torch.equal(twin(x), head(x))
    assert torch.equal(twin.prototypes().rows(), head.prototypes().rows())
    with torch.no_grad():
        twin.last_layer.weight_v.add_(1.0)
        twin.mlp[0].weight.zero_()
    assert not torch.equal(twin.prototypes().rows(), head.prototypes().rows())
    assert head.mlp[0].weight.any()


def test_double_precision_goes_through() -> None:
    """float64 in, float64 out, and unit norms to float64's own rounding."""
    head = DINOHead(6, 10, 8, 4).double()
    z = head(torch.randn(3, 6, dtype=torch.float64)).detach()
    assert z.dtype == head.prototypes().rows().dtype == torch.float64
    assert float((z.norm(dim=1) - 1).abs().max()) < 1e-14


def test_norms_are_exact_under_autocast() -> None:
    """Half precision inside the MLP, float32 where the length is divided out."""
    head = DINOHead(6, 10, 8, 4)
    x = torch.randn(7, 6)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        z = head(x)
    assert z.dtype == torch.float32
    assert float((z.norm(dim=1) - 1).abs().max()) < 1e-6
    torch.testing.assert_close(z, head(x).detach(), rtol=0.05, atol=0.05)


def test_a_bottleneck_of_zero_stays_finite() -> None:
    """An image that maps to nothing gives zeros and a finite gradient, not NaN."""
    head = DINOHead(6, 10, 8, 4, num_layers=1)
    x = torch.zeros(2, 6, requires_grad=True)
    z = head(x)
    z.sum().backward()
    assert torch.equal(z, torch.zeros(2, 4))
    assert torch.isfinite(x.grad).all()


def test_the_published_head_has_its_published_size() -> None:
    """ViT-S's head with 65,536 prototypes: 22,352,128 parameters."""
    with torch.device("meta"):
        head = DINOHead(384, 65_536)
    assert sum(p.numel() for p in head.parameters()) == 22_352_128


def test_logits_of_a_held_head_are_cosines() -> None:
    """z·Pᵀ lies in [−1, 1] and equals the cosine of bottleneck and direction."""
    head = DINOHead(6, 10, 8, 4)
    x = torch.randn(5, 6)
    logits = head(x) @ head.prototypes().rows().T
    bottleneck = head.mlp(x)
    cosines = F.cosine_similarity(bottleneck[:, None], head.last_layer.weight_v[None], dim=-1)
    torch.testing.assert_close(logits, cosines)
