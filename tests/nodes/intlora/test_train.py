"""Train IntLoRA on a MODEL: it learns, refuses wrong inputs in words, and leaves neither the model
nor ComfyUI otherwise than they were.
"""

import copy
import dataclasses
import gc

import comfy.model_management
import pytest
import torch

from intlora_training_runs import FP32, job, same, stopping_at, trained
from nibble.nodes.bridge.intlora import files
from nibble.nodes.bridge.intlora import train as intlora_training
from nibble.nodes.bridge.intlora.apply import apply_beside
from nibble.nodes.bridge.intlora.bases import Bases
from nibble.nodes.bridge.quantized import loading
from nibble.nodes.bridge.training import dataset
from nibble.nodes.bridge.training import session as training
from nibble.quant.files.errors import FileRefused
from nibble.quant.intlora import file
from nibble.quant.training import recompute
from nibble.quant.training.loop import Options
from training_runs import Stop, caption, latents


def session_of(model, work, settings=FP32, **data):
    pictures = dataset.dataset_of(
        model, data.get("latents", [latents()]), data.get("positive", [[caption()]])
    )
    return training.run(
        model,
        pictures.captions,
        pictures.latents[0].shape,
        settings,
        lambda session: work(session, pictures),
    )


# ---- what it does


def test_it_learns_and_the_file_holds_what_was_learned(model, home):
    one, long = {"latents": [latents(1)]}, {"steps": 24, "warmup": 0}
    idle, _ = trained(model, home, filename="idle", options=Options(lr=1e-9, **long), **one)
    done, adapter = trained(model, home, options=Options(lr=2e-2, **long), **one)
    assert sum(done.losses[-8:]) < 0.9 * sum(idle.losses[-8:]), "the same pictures, times and noise"
    bases = Bases(model)
    assert adapter.layers.keys() == {
        name for name, weight in bases.weights.items() if "SVDQuant" in weight._layout_cls
    }
    file.check_bases(adapter, bases, done.name)
    assert done.steps == adapter.facts["steps"] == 24
    assert done.name in files.adapter_files()
    assert not list(home.glob("*.state*"))
    assert done.lora.keys() == {
        f"diffusion_model.{name}.{part}"
        for name in adapter.layers
        for part in ("lora_up.weight", "lora_down.weight", "alpha")
    }


def test_the_loss_is_the_distance_of_the_denoised_picture(model):
    """Against one call of the model by hand: flow matching's |v - v*| times sigma."""
    data = latents(1)

    def by_hand(session, pictures):
        generator = torch.Generator().manual_seed(5)
        found = pictures.loss(session, torch.Generator().manual_seed(5))
        torch.randperm(1, generator=generator)
        t, noise = torch.rand(1, generator=generator), torch.randn(1, 16, 4, 4, generator=generator)
        sigma = torch.tensor([float(session.inner.model_sampling.percent_to_sigma(t.item()))])
        clean = (
            data["samples"] - session.inner.latent_format.shift_factor
        ) * session.inner.latent_format.scale_factor
        noisy = sigma * noise + (1 - sigma) * clean
        tokens, extras = caption()
        velocity = session.model(noisy, sigma, tokens, extras["pooled_output"], torch.tensor([3.5]))
        return found.item(), (sigma * (velocity - (noise - clean))).square().mean().item()

    found, wanted = session_of(model, by_hand, latents=[data])
    assert found == pytest.approx(wanted, rel=1e-4)


def test_pictures_of_one_prompt_go_together_and_every_other_keeps_its_own(model):
    batch = dataclasses.replace(FP32, batch=3)
    data = {"latents": [latents(2), latents(1, side=6)]}

    def losses(session, pictures):
        calls, plain = [], session.model.forward
        session.model.forward = lambda x, *args, **kwargs: (
            calls.append(tuple(x.shape)),
            plain(x, *args, **kwargs),
        )[1]
        try:
            return pictures.loss(session, torch.Generator().manual_seed(1)).item(), sorted(calls)
        finally:
            del session.model.forward

    together, calls = session_of(model, losses, batch, **data)
    assert calls == [(1, 16, 6, 6), (2, 16, 4, 4)]
    apart, calls = session_of(
        model, losses, batch, positive=[[caption(1)], [caption(1), caption(1)]], **data
    )
    assert len(calls) == 3
    assert apart == pytest.approx(together, rel=1e-4)
    others, _ = session_of(
        model, losses, batch, positive=[[caption(1), caption(2), caption(3)]], **data
    )
    assert abs(others - together) > 1e-4 * together


@pytest.mark.parametrize("variant", ["mul", "shift"])
def test_the_paper_s_variants_train_too(model, home, variant):
    done, adapter = trained(
        model, home, variant=variant, options=Options(steps=3, lr=1e-2, warmup=0)
    )
    assert {layer.rule.NAME for layer in adapter.layers.values()} == {variant}
    assert len(set(done.losses)) == 3
    patched = apply_beside(model, done.name, 1.0)
    assert len(patched.patches) == len(adapter.layers)


@pytest.mark.parametrize("optimizer", ["Adam", "SGD", "RMSprop"])
def test_other_optimizers_stop_and_go_on_as_well(model, home, monkeypatch, optimizer):
    options = Options(steps=4, lr=1e-2, warmup=0, optimizer=optimizer)
    _, whole = trained(model, home, options=options)
    stopping_at(monkeypatch, 2)
    with pytest.raises(Stop):
        intlora_training.run(job(model, filename="stopped", options=options))
    assert same(trained(model, home, filename="stopped", options=options)[1], whole)


def test_modulation_is_trained_when_asked_for(model, home):
    _, adapter = trained(model, home, layers=("*mod*",))
    assert adapter.layers and all("mod" in name for name in adapter.layers)


@pytest.mark.parametrize("loss", list(dataset.LOSSES))
def test_every_loss_is_finite_and_different(model, loss):
    draw = lambda session, pictures: pictures.loss(session, torch.Generator().manual_seed(1)).item()  # noqa: E731
    found = session_of(model, draw, dataclasses.replace(FP32, loss=loss))
    assert found > 0
    assert loss == "MSE" or found != session_of(model, draw)


# ---- memory, previews, checkpointing


def test_checkpointing_and_previews_change_no_number(model, home):
    plain, first = trained(model, home, settings=dataclasses.replace(FP32, checkpointing=False))
    twice, second = trained(model, home, filename="b", preview_every=2)
    assert plain.losses == twice.losses
    assert same(first, second)


def test_checkpointing_keeps_no_activation_of_a_block(model):
    def kept(session, pictures):
        layers = intlora_training.train.attach(
            session.model,
            ["double_blocks.0.img_attn.qkv"],
            intlora_training.train.AdapterOptions(rank=2),
            Bases(model),
        )
        with recompute.checkpointing(session.checkpointed()):
            value = pictures.loss(session, torch.Generator().manual_seed(1))
        found = sum(isinstance(thing, recompute._Saved) for thing in gc.get_objects())
        intlora_training.train.detach(session.model, layers)
        return value.isfinite().item() and found

    gc.collect()
    assert (
        session_of(model, kept)
        == 0
        < session_of(model, kept, dataclasses.replace(FP32, checkpointing=False))
    )


def test_a_preview_is_a_picture_and_the_same_each_time(model):
    preview = lambda session, pictures: session.preview(lambda: pictures.draw(session))  # noqa: E731
    kind, picture, _ = session_of(model, preview)
    assert kind == "JPEG"
    assert picture.size == (4, 4)
    assert picture.tobytes() == session_of(model, preview)[1].tobytes()


# ---- nothing is left behind


def weights_of(model) -> dict:
    return {
        name: tensor.clone() for name, tensor in model.model.diffusion_model.state_dict().items()
    }


@pytest.mark.parametrize("how", ["done", "stopped", "failed"])
def test_the_model_and_comfyui_are_as_before(model, home, monkeypatch, how):
    comfy.model_management.load_models_gpu([model])
    before, modules = weights_of(model), dict(model.model.diffusion_model.named_modules())
    wrappers = copy.deepcopy(model.wrappers)
    if how == "stopped":
        stopping_at(monkeypatch, 2)
    elif how == "failed":
        monkeypatch.setitem(dataset.LOSSES, "MSE", lambda *_: 1 / 0)
    if how == "done":
        intlora_training.run(job(model))
    else:
        with pytest.raises({"stopped": Stop, "failed": ZeroDivisionError}[how]):
            intlora_training.run(job(model))
    after = weights_of(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    now = dict(model.model.diffusion_model.named_modules())
    assert now == modules
    assert not any("forward" in vars(module) or module._forward_hooks for module in now.values())
    assert not any(
        parameter.requires_grad or parameter.grad is not None
        for parameter in model.model.parameters()
    )
    assert not model.patches
    assert model.wrappers == wrappers
    assert not model.object_patches
    assert not comfy.model_management.in_training
    mine = [
        loaded.model
        for loaded in comfy.model_management.current_loaded_models
        if loaded.model is not None
    ]
    assert all(patcher.model is model.model for patcher in mine if patcher.parent is model), (
        "the copy is unloaded"
    )
    assert torch.is_grad_enabled()
    assert not list(home.glob("*.partial"))


def test_it_runs_where_comfyui_runs_nodes_in_inference_mode(quantized_file, home):
    with torch.inference_mode():
        model = loading.load(quantized_file)
        comfy.model_management.load_models_gpu([model])
        data, words = latents(), caption()
        done, adapter = trained(model, home, latents=[data], positive=[[words]])
        comfy.model_management.load_models_gpu([model])  # it was unloaded outside of inference mode
        x = torch.randn(3, 128)
        assert model.model.diffusion_model.double_blocks[0].img_attn.qkv(x).shape == (3, 384)
    fresh, again = trained(model, home, filename="again")
    assert done.losses == fresh.losses
    assert same(adapter, again)


def test_loras_that_are_on_the_model_stay_and_the_file_belongs_to_the_base(model, home):
    done, _ = trained(model, home)
    patched = apply_beside(model, done.name, 3.0)
    more, adapter = trained(
        patched, home, filename="more", options=Options(steps=4, lr=1e-9, warmup=0)
    )
    plain, _ = trained(model, home, filename="plain", options=Options(steps=4, lr=1e-9, warmup=0))
    assert more.losses != plain.losses, "it trains beside the model as it was connected"
    file.check_bases(adapter, Bases(model), more.name)


# ---- what is refused before anything is loaded


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"latents": []}, "no latents"),
        ({"latents": [{"samples": torch.zeros(1, 16, 4, 4)}]}, "latents are empty"),
        (
            {"latents": [{"samples": torch.ones(1, 4, 4, 4)}]},
            "1 x 4 x 4 x 4, and this model's have 16 channels",
        ),
        ({"latents": [{"samples": torch.full((1, 16, 4, 4), torch.nan)}]}, "not finite"),
        ({"positive": [[caption(), caption(), caption()]]}, "2 latents and 3 prompts"),
        ({"positive": [[]]}, "2 latents and 0 prompts"),
        ({"rank": 0}, "rank 0 is not between"),
        ({"rank": 4000}, "rank 4000 is not between"),
        ({"layers": ("nothing.*",)}, "No 4-bit layer of the model is called nothing"),
        ({"filename": "../mine"}, "leads out of the folder"),
        ({"existing": "gone.intlora.safetensors"}, "gone.intlora.safetensors is not in"),
    ],
)
def test_wrong_inputs_are_refused_in_words(model, home, monkeypatch, changes, said):
    monkeypatch.setattr(training, "run", lambda *_: pytest.fail("loaded the model"))
    with pytest.raises((ValueError, FileRefused), match=said):
        intlora_training.run(job(model, **changes))
    assert not list(home.iterdir())


def test_a_16_bit_model_is_refused_with_the_fix(dense_model, home):
    with pytest.raises(FileRefused, match="in 16 bits and has no integers .* Load SVDQuant Model"):
        intlora_training.run(job(dense_model))


def test_a_model_that_cannot_be_loaded_again_is_refused(model, home):
    model.cached_patcher_init = None
    with pytest.raises(
        FileRefused, match="cannot load it a second time; connect Load SVDQuant Model"
    ):
        intlora_training.run(job(model))
