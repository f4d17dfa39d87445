"""ComfyUI's patches read as factors and row scales: the same weight as ComfyUI computes, for every
kind, order, part and strength.
"""

import comfy.lora
import comfy.lora_convert
import comfy.model_management
import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy.weight_adapter import LoRAAdapter

from adapter_tensors import KINDS, NAME, STEM, normal, tensors_of
from nibble.nodes.bridge.quantized import patches

N, K = 192, 128


def adapter(kind: str, n: int = N, k: int = K, seed: int = 0):
    return comfy.lora.load_lora(tensors_of(kind, n, k, seed=seed), {STEM: "weight"})["weight"]


def error(entries: list[tuple], weight: torch.Tensor) -> float:
    """Relative error of the effect against the weight that ComfyUI computes."""
    expected = comfy.lora.calculate_weight(entries, weight.clone(), "weight")
    found = patches.effect_of(
        entries, tuple(weight.shape), lambda: weight, "a layer"
    ).delta.on_weight(weight)
    return float((found - expected).norm() / (expected - weight).norm())


@pytest.mark.parametrize("strength", [1.0, 0.6, -1.5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_comfyui_s(kind, strength):
    assert (
        error([(strength, adapter(kind), 1.0, None, None)], normal(N, K, seed=3) * 0.1)
        < KINDS[kind]
    )


@pytest.mark.parametrize("strength_model", [1.0, 0.5])
def test_patches_of_several_kinds_and_parts_in_any_order(strength_model):
    rows, columns = (0, 64, 64), (1, 32, 64)
    entries = [
        (0.7, adapter("lora"), 1.0, None, None),
        (0.8, adapter("dora lora", 64, K), strength_model, rows, None),
        (-0.5, adapter("lora", N, 64, seed=2), 1.0, columns, None),
        (1.0, ("diff", (normal(N, K, seed=8) * 0.01,)), strength_model, None, None),
        (0.9, adapter("dora lokr", seed=4), strength_model, None, None),
        (0.4, ("diff", (normal(64, K, seed=5) * 0.1,)), 1.0, rows, None),
    ]
    weight = normal(N, K, seed=3) * 0.1
    assert error(entries, weight) < 1e-4
    assert error(entries[::-1], weight) < 1e-4


def test_strength_zero_has_no_effect_and_costs_no_rank():
    effect = patches.effect_of(
        [(0.0, adapter("dora lora"), 1.0, None, None)],
        (N, K),
        lambda: pytest.fail("the weight is not needed"),
        "a layer",
    )
    assert effect.delta.is_empty


@pytest.mark.parametrize("kind", ["oft", "boft", "glora"])
def test_what_is_no_sum_of_factors_is_left_to_comfyui(kind):
    assert (
        patches.effect_of([(1.0, adapter(kind), 1.0, None, None)], (N, K), lambda: None, "a layer")
        is None
    )


def test_a_lokr_of_known_rank_gets_that_rank_and_the_loss_is_the_one_that_is_told():
    first, second = (
        torch.diag(torch.tensor([1.0, 0.5, 0.0, 0.0])),
        torch.diag(torch.tensor([1.0, 1e-3, 0.0, 0.0])),
    )
    kron = comfy.lora.load_lora(
        {f"{STEM}.lokr_w1": first, f"{STEM}.lokr_w2": torch.kron(second, torch.ones(8, 8) / 8)},
        {STEM: "weight"},
    )["weight"]
    effect = patches.effect_of([(1.0, kron, 1.0, None, None)], (128, 128), lambda: None, "a layer")
    whole = torch.kron(first, torch.kron(second, torch.ones(8, 8) / 8))
    assert effect.delta.rank == 2, (
        "singular values 1, 0.5, 0.001, 0.0005: the last two are below the stated energy"
    )
    assert effect.lost == pytest.approx((1e-3**2 + 5e-4**2) / (1.25 * (1 + 1e-6)), rel=1e-3)
    assert float(
        (effect.delta.on_weight(torch.zeros(128, 128)) - whole).square().sum()
        / whole.square().sum()
    ) == pytest.approx(effect.lost, rel=1e-2)


def test_a_loha_of_full_rank_is_left_dense():
    whole = {
        f"{STEM}.hada_w{i}_{part}": normal(128, 128, seed=i + ord(part))
        for i in (1, 2)
        for part in "ab"
    }
    assert (
        patches.effect_of(
            [(1.0, comfy.lora.load_lora(whole, {STEM: "weight"})["weight"], 1.0, None, None)],
            (128, 128),
            lambda: None,
            "a layer",
        )
        is None
    )


# ---- refusals


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_another_model_s_shapes_are_refused_by_name(kind):
    with pytest.raises(
        patches.DoesNotFit,
        match=(
            r"img_mlp.0 has 192 x 128 weights there, but a Lo\w+ in the workflow changes 64 x 256"
        ),
    ):
        patches.check([(1.0, adapter(kind, 64, 256), 1.0, None, None)], (N, K), NAME)
    patches.check([(1.0, adapter(kind), 1.0, None, None)], (N, K), NAME)


def test_rank_zero_is_refused():
    empty = LoRAAdapter(set(), (torch.zeros(N, 0), torch.zeros(0, K), 1.0, None, None, None))
    with pytest.raises(patches.DoesNotFit, match="rank 0"):
        patches.check([(1.0, empty, 1.0, None, None)], (N, K), NAME)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(value):
    broken = adapter("dora lora")
    broken.weights[4][3] = value
    with pytest.raises(patches.DoesNotFit, match="not finite"):
        patches.check_finite(
            [(1.0, adapter("lora"), 1.0, None, None), (1.0, broken, 1.0, None, None)], NAME
        )
    patches.check_finite([(1.0, adapter("lora"), 1.0, None, None)], NAME)


def test_a_lora_stored_in_fp8_is_looked_at_as_any_other():
    stored = adapter("lora")
    stored.weights = tuple(
        part.to(torch.float8_e4m3fn) if isinstance(part, torch.Tensor) else part
        for part in stored.weights
    )
    patches.check_finite([(1.0, stored, 1.0, None, None)], NAME)
    stored.weights[0].view(torch.uint8)[0, 0] = 0x7F  # e4m3fn's NaN
    with pytest.raises(patches.DoesNotFit, match="not finite"):
        patches.check_finite([(1.0, stored, 1.0, None, None)], NAME)


# ---- into a model
