"""IntLoRA's own form through the nodes' bridge: a 16-bit MODEL, rounded, trained, saved, applied;
and everything else refused in words.
"""

import comfy.model_management
import comfy.sd
import pytest
import torch

from flux_loras import MLP, bits, layer_of, with_lora
from intlora_training_runs import FP32, job, same, stopping_at, trained
from nibble.nodes.bridge.intlora import merge, rounded, save
from nibble.nodes.bridge.intlora import train as intlora_training
from nibble.nodes.bridge.intlora.apply import apply_beside
from nibble.nodes.bridge.training import session as training
from nibble.quant.files.errors import FileRefused
from nibble.quant.intlora import file
from nibble.quant.training.loop import Options
from training_runs import Stop, caption, latents

EIGHT, FOUR, ODD = rounded.BASES
ONE = {"latents": [latents(1)]}
SHORT = {"options": Options(steps=2, lr=1e-2, warmup=0), "layers": ("double_blocks.*mlp*",)}


def velocity(model) -> torch.Tensor:
    """What the model with all that is on it answers to one noisy picture."""
    comfy.model_management.load_models_gpu([model])
    draw = torch.Generator().manual_seed(4)
    noisy = torch.randn(1, 16, 8, 8, generator=draw)
    tokens, extras = caption()
    with torch.no_grad():
        return model.model.diffusion_model(
            noisy, torch.tensor([0.6]), tokens, extras["pooled_output"], torch.tensor([3.5])
        )


def fresh(flux_file):
    return comfy.sd.load_diffusion_model(str(flux_file))


@pytest.mark.parametrize("variant, base", [("mul", EIGHT), ("shift", FOUR), ("mul", ODD)])
def test_it_learns_on_a_rounded_base_and_applies_bit_for_bit(
    dense_model, flux_file, home, variant, base
):
    settings = {"variant": variant, "base": base, "settings": FP32, **ONE}
    long = {"steps": 24, "warmup": 0}
    idle, _ = trained(
        dense_model, home, filename="idle", options=Options(lr=1e-9, **long), **settings
    )
    done, adapter = trained(dense_model, home, options=Options(lr=4e-2, **long), **settings)
    assert sum(done.losses[-8:]) < 0.9 * sum(idle.losses[-8:])
    assert rounded.base_of(adapter) == base
    assert all(layer.rule.noise is not None for layer in adapter.layers.values())
    assert all("mod" not in name and "blocks" in name for name in adapter.layers)

    before = bits(dense_model)
    patched = apply_beside(dense_model, done.name, 1.0)
    found = velocity(patched)
    weight = layer_of(patched, MLP).weight
    layer = adapter.layers[MLP]
    expected = merge_of(layer, before[f"diffusion_model.{MLP}.weight"])
    assert torch.equal(weight, expected)
    assert torch.equal(velocity(apply_beside(fresh(flux_file), done.name, 1.0)), found)
    plain = velocity(dense_model)
    assert not torch.equal(plain, found)
    after = bits(dense_model)
    assert all(torch.equal(before[name], after[name]) for name in before), "taken off again"
    assert torch.equal(velocity(apply_beside(dense_model, done.name, 0.0)), plain)


def merge_of(layer, weight: torch.Tensor) -> torch.Tensor:
    """W' = s t (U . Z) by hand, from the integers, rounded once to the weight's dtype."""
    base = layer.rounded(weight)
    product = layer.rule.product(base, layer.factors.delta())
    return (product.p.double() * product.scale.double().T).to(weight.dtype)


@pytest.mark.parametrize("variant", ["mul", "shift"])
def test_on_the_odd_base_every_weight_can_change_and_nearest_leaves_a_fifth(
    dense_model, home, variant
):
    stuck = {}
    for base in (FOUR, ODD):
        _, adapter = trained(
            dense_model, home, base=base, variant=variant, filename=base[9:12], **SHORT
        )
        layer = adapter.layers[MLP]
        integers = layer.rounded(layer_of(dense_model, MLP).weight.detach()).integers()
        stuck[base] = (integers == 0).float().mean().item()
        assert integers.abs().max() <= (15 if base == ODD else 8)
    assert stuck[ODD] == 0
    assert 0.1 < stuck[FOUR] < 0.3


def test_what_is_applied_is_what_was_trained(dense_model, home):
    """The layer that trains, in float32, against the integers that Apply finds in float64."""
    _, adapter = trained(dense_model, home, base=EIGHT, variant="mul", **SHORT)
    weight = layer_of(dense_model, MLP).weight.detach()
    model = torch.nn.Sequential(torch.nn.Linear(*reversed(weight.shape), bias=False))
    model[0].weight = torch.nn.Parameter(weight.float())
    layer = adapter.layers[MLP]
    layers = rounded.train.attach(
        model,
        ["0"],
        rounded.options_of(EIGHT, "mul", layer.rank, 0),
        made=lambda name: (layer.rounded(weight), layer.rule),
    )
    with torch.no_grad():
        down, up = layer.factors.floats()
        layers["0"].lora_down.copy_(down.T)
        layers["0"].lora_up.copy_(up)
        dense = torch.cat([m for _, m, _ in layers["0"].blocks(up, down.T)])
    expected = merge_of(layer, weight).float()
    assert (dense != expected).double().mean() < 1e-3, "a U that lies between two levels"
    assert (dense - expected).norm() < 1e-3 * expected.norm()


def test_loras_before_and_after_it_give_the_same(dense_model, home):
    done, _ = trained(dense_model, home, base=EIGHT, variant="mul", **SHORT)
    n, k = layer_of(dense_model, MLP).weight.shape
    stem = "lora_unet_" + MLP.replace(".", "_")
    draw = torch.Generator().manual_seed(1)
    lora = {
        f"{stem}.lora_up.weight": torch.randn(n, 2, generator=draw) * 0.1,
        f"{stem}.lora_down.weight": torch.randn(2, k, generator=draw),
    }
    one = velocity(apply_beside(with_lora(dense_model, lora), done.name, 1.0))
    other = velocity(with_lora(apply_beside(dense_model, done.name, 1.0), lora))
    assert torch.equal(one, other)
    assert not torch.equal(one, velocity(apply_beside(dense_model, done.name, 1.0)))


def test_a_stopped_run_goes_on_and_a_finished_one_can_be_continued(dense_model, home, monkeypatch):
    settings = {"base": FOUR, "variant": "mul", "layers": SHORT["layers"]}
    options = Options(steps=4, lr=1e-2, warmup=0)
    _, whole = trained(dense_model, home, options=options, **settings)
    layers = len(whole.layers)
    stopping_at(monkeypatch, layers + 2)
    with pytest.raises(Stop):
        intlora_training.run(job(dense_model, filename="stopped", options=options, **settings))
    stopping_at(monkeypatch, 0)
    assert same(
        trained(dense_model, home, filename="stopped", options=options, **settings)[1], whole
    )
    more, adapter = trained(
        dense_model,
        home,
        filename="more",
        existing="mine.intlora.safetensors",
        options=Options(steps=2, lr=1e-9, warmup=0, seed=5),
        **settings,
    )
    assert more.steps == 6
    assert {name: layer.base for name, layer in adapter.layers.items()} == {
        name: layer.base for name, layer in whole.layers.items()
    }
    with pytest.raises(FileRefused, match=f"trained on the base '{FOUR}'; set base as it was"):
        again = {**settings, "base": ODD}
        intlora_training.run(job(dense_model, existing="mine.intlora.safetensors", **again))


# ---- what is refused


def test_models_that_cannot_be_rounded_are_refused(model, dense_model, home, monkeypatch):
    monkeypatch.setattr(training, "run", lambda *_: pytest.fail("loaded the model"))
    with pytest.raises(FileRefused, match="is quantized, and rounding .* Load Diffusion Model"):
        intlora_training.run(job(model, base=EIGHT))
    with pytest.raises(FileRefused, match="in 16 bits and has no integers"):
        intlora_training.run(job(dense_model))
    with pytest.raises(ValueError, match="base 'two bits' is not one of"):
        intlora_training.run(job(dense_model, base="two bits"))
    with pytest.raises(ValueError, match="No 16-bit linear layer of the model is called nothing"):
        intlora_training.run(job(dense_model, base=EIGHT, layers=("nothing",)))
    stem = "lora_unet_" + MLP.replace(".", "_")
    n, k = layer_of(dense_model, MLP).weight.shape
    lora = {
        f"{stem}.lora_up.weight": torch.ones(n, 1),
        f"{stem}.lora_down.weight": torch.ones(1, k),
    }
    with pytest.raises(FileRefused, match=f"has a LoRA on {MLP}.* train without it"):
        intlora_training.run(job(with_lora(dense_model, lora), base=EIGHT))
    small = layer_of(dense_model, MLP)
    small.weight = torch.nn.Parameter(small.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(FileRefused, match="in float8_e4m3fn, and .* weight_dtype to default"):
        intlora_training.run(job(dense_model, base=EIGHT))


def test_a_file_goes_onto_its_own_model_alone(model, dense_model, home):
    done, _ = trained(dense_model, home, base=EIGHT, variant="mul", **SHORT)
    with pytest.raises(FileRefused, match="is quantized, and rounding"):
        apply_beside(model, done.name, 1.0)
    with pytest.raises(FileRefused, match="no 4-bit weights to merge it into; set mode to branch"):
        merge.apply(dense_model, done.name, 1.0, "merge")
    with pytest.raises(FileRefused, match="rounds the layers of a 16-bit model, and .* in 4 bits"):
        intlora_training.run(job(model, existing=done.name, filename="x", variant="mul"))
    with pytest.raises(FileRefused, match="trained on the base .round to nearest, 8 bits."):
        intlora_training.run(
            job(dense_model, base=FOUR, existing=done.name, filename="x", variant="mul", **SHORT)
        )
    twice = apply_beside(dense_model, done.name, 1.0)
    with pytest.raises(FileRefused, match="cannot be merged; .*ModelSave"):
        save.save_merged(save.SaveJob(twice))
    with pytest.raises(FileRefused, match="rounds .*, and so does"):
        apply_beside(twice, done.name, 1.0)
    with torch.no_grad():
        layer_of(dense_model, MLP).weight[0, 0] += 1
    with pytest.raises(FileRefused, match="another 16-bit model .* another dtype"):
        apply_beside(dense_model, done.name, 1.0)
    assert not dense_model.patches


def test_an_adapter_of_integers_is_refused_on_16_bits(model, dense_model, home):
    done, _ = trained(model, home, **SHORT)
    with pytest.raises(FileRefused, match="in 16 bits"):
        apply_beside(dense_model, done.name, 1.0)
    with pytest.raises(FileRefused, match="acts on the integers of a 4-bit model"):
        intlora_training.run(
            job(dense_model, base=EIGHT, existing=done.name, filename="x", **SHORT)
        )


def test_a_file_of_missing_layers_is_refused(dense_model, home):
    done, adapter = trained(dense_model, home, base=EIGHT, variant="mul", **SHORT)
    path = home / done.name
    renamed = {f"other.{name}": layer for name, layer in adapter.layers.items()}
    file.save(type(adapter)(renamed, adapter.facts), path)
    with pytest.raises(FileRefused, match="rounds the layer other.*lacks it"):
        apply_beside(dense_model, done.name, 1.0)
