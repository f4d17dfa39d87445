"""ComfyUI's patches on a 4-bit model that a sampler loads: ComfyUI's weight, and no trace once they
are off.
"""

import comfy.lora
import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.weight_adapter import LoRAAdapter

from adapter_tensors import (
    KINDS,
    NAME,
    STEM,
    effective,
    layer,
    normal,
    sampled,
    tensors_of,
    whole_load,
    with_file,
)
from nibble.nodes.bridge.quantized import layouts, loading, lora, patches
from nibble.quant.weights.delta import WeightDelta


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
    assert params.proj_up.shape[1] == rank + 16
    assert not params.proj_up[:, rank + 4 :].any()
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
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


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
    assert not patched.patches
    assert "lora key not loaded" in caplog.text
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


def test_a_lora_stored_in_fp8_does_what_its_numbers_say(model):
    linear = layer(model)
    tensors = {
        name: tensor.to(torch.float8_e4m3fn) if tensor.dim() == 2 else tensor
        for name, tensor in tensors_of("lora", *linear.weight.shape).items()
    }
    base = effective(linear)
    changed = []
    for stored in (tensors, {name: tensor.float() for name, tensor in tensors.items()}):
        patched = with_file(model, stored)
        whole_load(patched)
        changed.append(effective(layer(patched)))
        patched.detach()
    assert torch.equal(changed[0], changed[1])
    assert not torch.equal(changed[0], base)
