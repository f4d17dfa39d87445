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

from nibble.nodes.bridge.quantized import layouts, loading, lora, patches
from nibble.quant.weights.delta import WeightDelta

N, K = 192, 128
NAME = "double_blocks.0.img_mlp.0"
STEM = "lora_unet_" + NAME.replace(".", "_")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed + 7 * len(shape) + sum(shape))
    )


def tensors_of(
    kind: str, n: int, k: int, stem: str = STEM, seed: int = 0
) -> dict[str, torch.Tensor]:
    """A small adapter file of one layer."""
    a, b = normal(n, 4, seed=seed) * 0.15, normal(4, k, seed=seed) / k**0.5
    found = {
        "lora": {"lora_up.weight": a, "lora_down.weight": b, "alpha": torch.tensor(2.0)},
        "loha": {
            "hada_w1_a": a,
            "hada_w1_b": b * 8,
            "hada_w2_a": normal(n, 3, seed=seed + 1) * 0.1,
            "hada_w2_b": normal(3, k, seed=seed + 1),
            "alpha": torch.tensor(2.0),
        },
        "lokr": {
            "lokr_w1": normal(4, 4, seed=seed) * 0.1,
            "lokr_w2_a": normal(n // 4, 2, seed=seed) * 0.1,
            "lokr_w2_b": normal(2, k // 4, seed=seed),
            "alpha": torch.tensor(1.0),
        },
        "lokr of one matrix": {
            "lokr_w1": normal(n // 8, k // 16, seed=seed) * 0.1,
            "lokr_w2": normal(8, 1, seed=seed) @ normal(1, 16, seed=seed) * 0.1,
            "alpha": torch.tensor(9.0),
        },
        "oft": {"oft_blocks": normal(n // 8, 8, 8, seed=seed) * 0.1, "alpha": torch.tensor(1e-3)},
        "boft": {
            "oft_blocks": normal(2, n // 8, 8, 8, seed=seed) * 0.1,
            "alpha": torch.tensor(1e-3),
        },
        "glora": {
            "a1.weight": normal(k, 4, seed=seed) * 0.1,
            "a2.weight": normal(4, k, seed=seed) * 0.1,
            "b1.weight": normal(n, 4, seed=seed) * 0.1,
            "b2.weight": normal(4, k, seed=seed) * 0.1,
        },
    }
    scale = (
        {"dora_scale": torch.rand(n, 1, generator=torch.Generator().manual_seed(seed)) + 0.5}
        if kind.startswith("dora ")
        else {}
    )
    return {
        f"{stem}.{name}": tensor
        for name, tensor in (found[kind.removeprefix("dora ")] | scale).items()
    }


def adapter(kind: str, n: int = N, k: int = K, seed: int = 0):
    return comfy.lora.load_lora(tensors_of(kind, n, k, seed=seed), {STEM: "weight"})["weight"]


def error(entries: list[tuple], weight: torch.Tensor) -> float:
    """Relative error of the effect against the weight that ComfyUI computes."""
    expected = comfy.lora.calculate_weight(entries, weight.clone(), "weight")
    found = patches.effect_of(
        entries, tuple(weight.shape), lambda: weight, "a layer"
    ).delta.on_weight(weight)
    return float((found - expected).norm() / (expected - weight).norm())


EXACT, CUT = 1e-5, 1.1 * patches.ENERGY**0.5
KINDS = {
    "lora": EXACT,
    "dora lora": EXACT,
    "loha": CUT,
    "dora loha": CUT,
    "lokr": CUT,
    "dora lokr": CUT,
    "lokr of one matrix": CUT,
}


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
    assert error(entries, weight) < 1e-4 and error(entries[::-1], weight) < 1e-4


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


# ---- into a model


def layer(model, name: str = NAME):
    return model.model.diffusion_model.get_submodule(name)


def sampled(patcher, positive: dict | None = None, seed: int = 0) -> torch.Tensor:
    """Four steps of ComfyUI's own sampler."""
    draw = torch.Generator().manual_seed(seed)
    guider = comfy.samplers.CFGGuider(patcher)
    guider.inner_set_conds(
        {
            "positive": [
                [
                    torch.randn(1, 6, 64, generator=draw),
                    {"pooled_output": torch.randn(1, 64, generator=draw)} | (positive or {}),
                ]
            ]
        }
    )
    noise = torch.randn(1, 16, 8, 8, generator=draw)
    sampler, sigmas = (
        comfy.samplers.sampler_object("euler"),
        torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]),
    )
    return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True)


def with_file(model, tensors: dict, strength: float = 0.8):
    return comfy.sd.load_lora_for_models(
        model, None, comfy.lora_convert.convert_lora(tensors), strength, 0
    )[0]


def whole_load(patcher) -> None:
    """As a sampler has a model loaded."""
    lora.plan_patches(lambda model: comfy.model_management.load_models_gpu([model]), patcher)


def effective(linear) -> torch.Tensor:
    return layouts.effective_weight(linear.weight)


def test_a_sampler_loads_a_lora_s_own_factors(model, monkeypatch):
    monkeypatch.setattr(
        lora, "factors_of_lowest_rank", lambda *_: pytest.fail("nothing is to be factorised")
    )
    monkeypatch.setattr(
        layouts, "effective_weight", lambda *_: pytest.fail("no whole weight is needed")
    )
    linear = layer(model)
    rank, tensors = linear.weight.params.proj_up.shape[1], tensors_of("lora", *linear.weight.shape)
    sampled(with_file(model, tensors, 2.0))
    params = linear.weight.params
    assert params.proj_up.shape[1] == rank + 16 and not params.proj_up[:, rank + 4 :].any()
    assert torch.equal(
        params.proj_up[:, rank : rank + 4], tensors[f"{STEM}.lora_up.weight"].bfloat16()
    ), "2.0 * alpha / rank is 1"
    assert torch.equal(
        params.proj_down[:, rank : rank + 4], tensors[f"{STEM}.lora_down.weight"].T.bfloat16()
    )


@pytest.mark.parametrize(
    "name",
    [NAME, "double_blocks.0.img_mlp.2", "double_blocks.0.img_mod.lin", "single_blocks.0.linear2"],
)
@pytest.mark.parametrize("kind", [*KINDS, "oft", "boft", "glora"])
def test_every_kind_gives_comfyui_s_weight_and_comes_off_without_a_trace(model, kind, name):
    comfy.model_management.load_models_gpu([model])
    linear = layer(model, name)
    before, base = (
        {key: value.clone() for key, value in linear.state_dict().items()},
        effective(linear),
    )
    tensors = tensors_of(kind, *base.shape, stem="lora_unet_" + name.replace(".", "_"))
    patched = with_file(model, tensors)
    key = f"diffusion_model.{name}.weight"
    expected = comfy.lora.calculate_weight(patched.patches[key], base.clone(), key)
    whole_load(patched)
    assert (effective(linear) - expected).norm() / (expected - base).norm() < 8e-3
    assert torch.equal(linear.weight._qdata, before["weight"]) or name.endswith("linear2"), (
        "stored in another order there"
    )
    x = torch.randn(3, base.shape[1])
    assert torch.isfinite(linear(x)).all()
    whole_load(model)
    after = linear.state_dict()
    assert after.keys() == before.keys() and all(
        torch.equal(after[name], value) for name, value in before.items()
    )


STYLES = {
    "kohya": ("lora_unet_double_blocks_0_img_mlp_0", "lora_up.weight", "lora_down.weight"),
    "diffusers": (
        "transformer.transformer_blocks.0.ff.net.0.proj",
        "lora_B.weight",
        "lora_A.weight",
    ),
    "diffusers, default adapter": (
        "transformer.transformer_blocks.0.ff.net.0.proj",
        "lora_B.default.weight",
        "lora_A.default.weight",
    ),
    "BFL": ("diffusion_model.double_blocks.0.img_mlp.0", "lora_B.weight", "lora_A.weight"),
    "DiffSynth": ("transformer_blocks.0.ff.net.0.proj", "lora_B.weight", "lora_A.weight"),
    "OneTrainer": (
        "lora_transformer_transformer_blocks_0_ff_net_0_proj",
        "lora_up.weight",
        "lora_down.weight",
    ),
    "SimpleTuner": (
        "lycoris_transformer_blocks_0_ff_net_0_proj",
        "lora_up.weight",
        "lora_down.weight",
    ),
}


@pytest.mark.parametrize("style", STYLES)
def test_every_style_of_names_reaches_the_layer(model, style):
    stem, up, down = STYLES[style]
    base = effective(layer(model))
    factors = normal(base.shape[0], 4) * 0.1, normal(4, base.shape[1]) * 0.1
    whole_load(with_file(model, {f"{stem}.{up}": factors[0], f"{stem}.{down}": factors[1]}, 1.0))
    wanted = factors[0] @ factors[1]
    assert (effective(layer(model)) - base - wanted).norm() / wanted.norm() < 4e-3


@pytest.mark.parametrize(
    "part, rows",
    {
        "attn.to_q": (0, 128),
        "attn.to_k": (128, 256),
        "attn.to_v": (256, 384),
        "proj_mlp": (384, 896),
    }.items(),
)
def test_the_parts_of_a_fused_layer_are_its_own_rows(model, part, rows):
    linear = layer(model, "single_blocks.1.linear1")
    base, wanted = effective(linear), torch.zeros(896, 128)
    factors = normal(rows[1] - rows[0], 4) * 0.1, normal(4, 128) * 0.1
    wanted[slice(*rows)] = factors[0] @ factors[1]
    stem = f"transformer.single_transformer_blocks.1.{part}"
    whole_load(
        with_file(
            model, {f"{stem}.lora_B.weight": factors[0], f"{stem}.lora_A.weight": factors[1]}, 1.0
        )
    )
    change = effective(linear) - base
    assert (change - wanted).norm() / wanted.norm() < 4e-3
    outside = torch.ones(896, dtype=torch.bool)
    outside[slice(*rows)] = False
    assert not change[outside].any(), "not a bit of the other parts"


def test_a_change_of_strength_copies_no_codes(model):
    tensors = tensors_of("lora", *layer(model).weight.shape)
    sampled(with_file(model, tensors, 0.5))

    def codes():
        return [
            layer(model, name).weight._qdata.data_ptr()
            for name in (NAME, "double_blocks.0.txt_mlp.0")
        ]

    places = codes()
    first = effective(layer(model))
    sampled(with_file(model, tensors, 1.5))
    assert codes() == places
    sampled(model)
    base = effective(layer(model))
    sampled(with_file(model, tensors, -0.5))
    assert torch.allclose(base - first, effective(layer(model)) - base, atol=1e-5)


def test_a_refused_lora_leaves_the_model_as_it_was(model):
    plain = sampled(model)
    bad = tensors_of("lora", *layer(model).weight.shape) | {
        f"{STEM}.lora_up.weight": torch.full((512, 4), float("nan"))
    }
    with pytest.raises(patches.DoesNotFit, match="img_mlp.0 holds numbers that are not finite"):
        sampled(with_file(model, bad))
    with pytest.raises(patches.DoesNotFit, match="made for another model"):
        sampled(with_file(model, tensors_of("lora", 64, 256)))
    assert torch.equal(sampled(model), plain)


def test_a_lora_of_another_architecture_changes_nothing(model, caplog):
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    patched = with_file(model, tensors_of("lora", 640, 640, stem=stem))
    assert not patched.patches and "lora key not loaded" in caplog.text
    assert torch.equal(sampled(patched), sampled(model))


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "inference mode"])
def test_hooks_with_keyframes_switch_between_steps(quantized_file, inference):
    """Strength 0 and 1 by schedule: the picture lies between those without and with, and the model
    comes back bit for bit.
    """
    with torch.inference_mode(inference):  # as ComfyUI's server runs nodes
        draw_with_hooks(loading.load(quantized_file))


def draw_with_hooks(model):
    import comfy.hooks

    tensors = tensors_of("lora", *layer(model).weight.shape)
    plain, full, near = (
        sampled(model),
        *(sampled(with_file(model, tensors, strength)) for strength in (1.0, 1 + 2**-8)),
    )
    frames = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((0.0, 0.0), (1.0, 0.5)):
        frames.add(comfy.hooks.HookKeyframe(strength, start))

    def scheduled(keyframes):
        patcher, _, hooks = comfy.hooks.load_hook_lora_for_models(model, None, tensors, 1.0, 0)
        if keyframes is not None:
            hooks.set_keyframes_on_hooks(keyframes)
        return sampled(patcher, {"hooks": hooks})

    late = scheduled(frames)
    assert torch.equal(sampled(model), plain), "off again"
    always = scheduled(None)

    def distance(a, b):
        return float((a - b).norm() / b.norm())

    # A hook's factors come from the difference of weights, so they are rounded to 16 bits otherwise
    # than the file's. Such roundings flip
    # 4-bit codes of later layers, each by a whole step: a strength that is one rounding off moves
    # the picture as far.
    assert distance(always, full) < 1.5 * distance(near, full) < 0.5 * distance(full, plain)
    assert distance(always, full) < distance(late, plain) < distance(full, plain)
    assert torch.equal(sampled(model), plain)


@pytest.mark.parametrize("kind", ["lora", "dora lora", "lokr"])
def test_patched_layers_compile_without_a_graph_break(model, kind):
    torch._dynamo.reset()
    patched = with_file(model, tensors_of(kind, *layer(model).weight.shape))
    x = torch.randn(4, 128)
    whole_load(patched)
    with torch.no_grad():
        assert torch.allclose(
            torch.compile(layer(model), backend="aot_eager", fullgraph=True)(x),
            layer(model)(x),
            atol=1e-6,
        )


def test_a_lora_survives_the_torch_compile_node_and_a_deep_clone(model, quantized_file):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    torch._dynamo.reset()
    patched = with_file(model, tensors_of("dora lora", *layer(model).weight.shape))
    plain = sampled(patched)
    compiled = patched.clone()
    set_torch_compile_wrapper(
        model=compiled, backend="eager", keys=["diffusion_model.double_blocks.0"]
    )
    assert torch.equal(sampled(compiled), plain)
    assert torch.equal(sampled(patched.clone(force_deepcopy=True)), plain)
    assert torch.equal(
        sampled(
            with_file(
                loading.load(quantized_file), tensors_of("dora lora", *layer(model).weight.shape)
            )
        ),
        plain,
    )


def test_fifty_switches_leave_no_object_behind(model):
    """Patched weights, patchers and changes of LoRAs that were taken off are gone."""
    import gc

    from comfy.model_patcher import ModelPatcher
    from comfy.quant_ops import QuantizedTensor

    def counts():
        gc.collect()
        kinds = [type(thing) for thing in gc.get_objects()]
        return [
            sum(issubclass(kind, sought) for kind in kinds)
            for sought in (
                QuantizedTensor,
                ModelPatcher,
                WeightDelta,
                patches.PatchEffect,
                LoRAAdapter,
            )
        ]

    whole_load(model)
    files = [tensors_of(kind, *layer(model).weight.shape) for kind in ("lora", "dora lora", "oft")]

    def switch(turn):
        whole_load(with_file(model, files[turn % 3], 0.1 + turn / 50))

    switch(0)
    whole_load(model)
    before = counts()
    for turn in range(50):
        switch(turn)
    whole_load(model)
    assert counts() == before
