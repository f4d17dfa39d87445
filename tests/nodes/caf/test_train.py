"""Train CAF on a MODEL: two heads learn from couplings, and leave neither
the model nor ComfyUI otherwise than they were.
"""

import copy
import dataclasses
import json

import comfy.model_management
import comfy.samplers
import pytest
import torch

import tiny_models
from caf_training_runs import FP32, SHAPE, job, pairs, same, stopping_at, trained
from nibble.accel.caf import adapter as caf_adapter
from nibble.accel.caf import couplings, flow, heads_file
from nibble.nodes.bridge.caf import load as caf_model
from nibble.nodes.bridge.caf import sample as caf_sampling
from nibble.nodes.bridge.caf import train as caf_training
from nibble.nodes.bridge.caf.train import Student
from nibble.nodes.bridge.quantized import loading
from nibble.nodes.bridge.training import session as training
from nibble.nodes.bridge.training import watch as training_watch
from training_runs import Stop, caption


def in_session(model, data, work, settings=FP32, **options):
    """work(session, student of an untrained adapter) with the model loaded."""

    def entered(session):
        made = caf_adapter.CAFAdapter.create(
            session.model,
            caf_training._layers(job(model, data)),
            options.get("rank", 4),
            options.get("h", 1.5),
        )
        for seed, head in enumerate((made.velocity, made.acceleration)):
            draw = torch.Generator().manual_seed(seed)
            for name, tensor in head.tensors().items():
                if options.get("changed") and not name.endswith("down"):
                    tensor.data = 0.1 * torch.randn(tensor.shape, generator=draw)
        student = Student(session, made)
        try:
            return work(session, student)
        finally:
            student.close()

    return training.run(
        model, data.captions, (1, *data.shape), settings, entered, data.captions[:1]
    )


class Spy(comfy.samplers.Sampler):
    """A sampler that keeps its result, in the model's own units."""

    def __init__(self, inner, kept: list):
        self.inner, self.kept = inner, kept

    def sample(self, *args, **options):
        self.kept.append(self.inner.sample(*args, **options))
        return self.kept[-1]


# ---- what it does


def test_both_nets_learn_and_the_file_holds_what_was_learned(dense_model, data, folder):
    batch = dataclasses.replace(FP32, batch=4)
    idle, untrained = trained(
        dense_model, data, folder, filename="idle", steps=20, options={"lr": 1e-9}, settings=batch
    )
    done, adapter = trained(
        dense_model, data, folder, steps=20, options={"lr": 1e-2}, settings=batch
    )
    for first, last in ((12, 20), (32, 40)):  # the same pairs and times
        assert sum(done.losses[first:last]) < 0.9 * sum(idle.losses[first:last])
    held, before = adapter.facts["held_out"], untrained.facts["held_out"]
    assert held["pairs"] == 1
    assert held["euler"] == before["euler"]
    assert held["error"] < 0.95 * before["error"]
    assert adapter.h == 1.5
    assert adapter.rank == 4
    assert len(adapter.velocity.names) == 16
    assert done.steps == len(done.losses) == 40
    assert done.name in caf_model.files()
    assert not list(folder.glob("*.state*"))
    assert adapter.acceleration.extra.abs().max() > 0
    assert not same(adapter, untrained)


def test_the_sampler_draws_what_the_training_does(dense_model, data, folder):
    """Load CAF Model and CAF Sampler, with heads that change a lot, against the nets that are
    trained.
    """
    noise, drawn = data.pair(8)[0], []

    def here(session, student):
        heads_file.save_file(student.adapter, folder / "own.caf.safetensors")
        return student.sample(noise, [0])

    with torch.no_grad():
        wanted = in_session(dense_model, data, here, changed=True)
    worn = caf_model.load(dense_model, "own.caf.safetensors")
    worn.set_model_compute_dtype(torch.float32)
    guider = comfy.samplers.CFGGuider(worn)
    guider.set_conds([caption(1)], [])
    sigmas = caf_sampling.sigmas(worn, caf_training.STEPS)
    guider.sample(
        noise,
        torch.zeros_like(noise),
        Spy(caf_sampling.sampler(), drawn),
        sigmas,
        disable_pbar=True,
        seed=1,
    )
    assert (drawn[0] - wanted).norm() < 1e-3 * wanted.norm()


def test_the_velocity_net_is_h_times_what_the_model_says(model, data):
    """Against one call of the model by hand, at the noise level where the path is at that time; and
    at the very end.
    """

    def by_hand(session, student):
        x, t = torch.cat([couplings.noise(7, i, SHAPE) for i in range(2)]), torch.tensor([0.4, 1.0])
        sigma = torch.tensor([1 - (1.5 * 0.4 - 0.5 * 0.16), caf_model.LEAST_LEVEL])
        tokens, extras = caption(1)
        said = session.model(
            x,
            sigma,
            tokens.repeat(2, 1, 1),
            extras["pooled_output"].repeat(2, 1),
            torch.full((2,), 3.5),
        )
        return student.velocity(x, t, [0, 0]), -1.5 * said

    found, wanted = in_session(model, data, by_hand)
    assert torch.allclose(found[0], wanted[0], rtol=1e-4, atol=1e-4)
    assert torch.allclose(found[1], wanted[1], rtol=1e-2, atol=1e-2)


def test_prompts_of_one_length_go_together_and_every_pair_weighs_alike(model, tmp_path):
    short, long = [caption(1), caption(2)], caption(3)
    long[0] = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(4))
    data = pairs(tmp_path / "several", 6, [[prompt] for prompt in (*short, long)])

    def compare(session, student):
        calls, plain = [], session.model.forward
        session.model.forward = lambda x, *args, **kwargs: (
            calls.append(len(x)),
            plain(x, *args, **kwargs),
        )[1]
        try:
            noise, _, captions = data.batch(range(6))
            t = torch.linspace(0, 0.9, 6)
            start = student.velocity(noise, t, captions)
            together = student.acceleration(noise, t, start, captions)
            together, asked = (start, together), list(calls)
            alone = [
                student.velocity(noise[i : i + 1], t[i : i + 1], captions[i : i + 1])
                for i in range(6)
            ]
            alone = [
                torch.cat(alone),
                torch.cat(
                    [
                        student.acceleration(
                            noise[i : i + 1], t[i : i + 1], start[i : i + 1], captions[i : i + 1]
                        )
                        for i in range(6)
                    ]
                ),
            ]
        finally:
            del session.model.forward
        return together, alone, asked

    with torch.no_grad():
        together, alone, calls = in_session(model, data, compare, changed=True)
    assert calls[:2] == [4, 2], (
        "the velocity net; then v0 as far as the input layer, and the acceleration net"
    )
    assert calls == [4, 2, 4, 4, 2, 2], (
        "the velocity net; then v0 as far as the input layer, and the acceleration net"
    )
    for found, wanted in zip(together, alone, strict=True):
        assert (found - wanted).norm() < 1e-2 * wanted.norm()


def test_the_acceleration_head_sees_the_initial_velocity(dense_model, data):
    def two(session, student):
        noise, t = couplings.noise(3, 0, SHAPE), torch.tensor([0.9])
        return [
            student.acceleration(noise, t, start, [0]) + 2 / 1.9 * start
            for start in (noise * 0, noise)
        ]

    with torch.no_grad():
        blind, same_again = in_session(dense_model, data, two)
        assert torch.allclose(blind, same_again, atol=1e-4), "its layer for v0 begins at zero"
        seen, other = in_session(dense_model, data, two, changed=True)
    assert (seen - other).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["4-bit", "codewords", "no checkpointing", "bf16"])
def test_every_kind_of_model_is_trained(kind, model, dense_model, data, folder, request):
    if kind == "codewords":
        from nibble.nodes.bridge.quantize import vq4dit as vq
        from nibble.quant.vq4dit.quantize import quantize_checkpoint

        source = request.getfixturevalue("flux_file")
        quantize_checkpoint(source, folder / "vq.safetensors", vq.recipe_of("fast", 3, turns=0))
        model = loading.load(folder / "vq.safetensors")
    model = dense_model if kind in ("no checkpointing", "bf16") else model
    settings = dataclasses.replace(
        FP32, checkpointing=kind != "no checkpointing", dtype="bf16" if kind == "bf16" else "fp32"
    )
    done, adapter = trained(model, data, folder, settings=settings, steps=2)
    assert all(
        tensor.abs().max() > 0
        for kind in caf_training.PHASES
        for name, tensor in adapter.head(kind).tensors().items()
    ), "each is learned"
    assert adapter.velocity.tensors()["double_blocks.0.img_attn.qkv.down"].dtype == (
        torch.bfloat16 if kind == "bf16" else torch.float32
    )


def test_modulation_in_ram_changes_no_number(quantized_file, data, folder):
    plain, first = trained(loading.load(quantized_file), data, folder)
    done, second = trained(
        loading.load(quantized_file, modulation_in="ram"), data, folder, filename="ram"
    )
    assert done.losses == plain.losses
    assert same(first, second)
    assert "double_blocks.0.img_mod.lin" in second.velocity.names


def of_family(family: str, where):
    """(a tiny model that can be loaded again, two couplings for it)."""
    model = tiny_models.build(family)
    model.cached_patcher_init = (lambda disable_dynamic=False: tiny_models.build(family), ())
    return model, pairs(
        where, 2, [tiny_models.prompt(family)], shape=tuple(tiny_models.latent(family).shape[1:])
    )


@pytest.mark.parametrize("family", ["wan 2.1", "lumina 2"])
def test_other_architectures_are_trained(family, tmp_path, folder):
    """Videos by a 3-D convolution, and three lists of blocks."""
    done, adapter = trained(*of_family(family, tmp_path / "pairs"), folder, steps=2, rank=2)
    ends = [
        tensor
        for head in (adapter.velocity, adapter.acceleration)
        for name, tensor in head.tensors().items()
        if not name.endswith("down")
    ]
    assert len(ends) > 30, "each is learned"
    assert all(tensor.abs().max() > 0 for tensor in ends), "each is learned"


def test_a_model_without_gradients_is_refused_in_words(tmp_path, folder):
    with pytest.raises(
        ValueError, match="ErnieImageModel uses an operation for which ComfyUI has no gradient"
    ):
        caf_training.train(job(*of_family("ernie-image", tmp_path / "pairs"), rank=2))


def test_whole_differences_and_chosen_layers(dense_model, data, folder):
    done, adapter = trained(
        dense_model, data, folder, rank=0, layers=("double_blocks.*attn*", "final_layer.linear")
    )
    assert adapter.rank == 0
    assert adapter.velocity.names[-1] == "final_layer.linear"
    assert len(adapter.velocity.names) == 5
    assert all(
        set(tensors) == {"difference"} and tensors["difference"].abs().max() > 0
        for tensors in adapter.velocity.branches().values()
    )


def test_the_last_pairs_are_held_out_where_there_are_enough():
    assert [tuple(map(len, caf_training.split(pairs))) for pairs in (1, 7, 8, 32, 1000)] == [
        (1, 0),
        (7, 0),
        (7, 1),
        (30, 2),
        (938, 62),
    ]
    train, held = caf_training.split(40)
    assert [*train, *held] == list(range(40))


def test_held_out_pairs_are_not_trained_on(dense_model, data, tmp_path, folder, monkeypatch):
    seen, plain = set(), couplings.Couplings.batch
    monkeypatch.setattr(
        couplings.Couplings,
        "batch",
        lambda self, indices: (seen.update(indices), plain(self, indices))[1],
    )
    trained(dense_model, data, folder, steps=6, settings=dataclasses.replace(FP32, batch=4))
    assert seen == set(range(8))


# ---- memory, previews, checkpointing


def test_checkpointing_and_previews_change_no_number(dense_model, data, folder):
    plain, first = trained(
        dense_model, data, folder, settings=dataclasses.replace(FP32, checkpointing=False)
    )
    twice, second = trained(dense_model, data, folder, filename="b", preview_every=1)
    assert plain.losses == twice.losses
    assert same(first, second)
    assert first.facts["held_out"] == second.facts["held_out"]


def test_a_preview_is_a_picture(dense_model, data, folder, monkeypatch):
    seen = []
    monkeypatch.setattr(
        training_watch.Progress,
        "picture",
        lambda self, done, total, preview: seen.append((done, total, preview[1].size)),
    )
    trained(dense_model, data, folder, preview_every=4)
    assert seen == [(4, 6, (4, 4)), (6, 6, (4, 4))]


# ---- nothing is left behind


@pytest.mark.parametrize("how", ["done", "stopped", "failed"])
def test_the_model_and_comfyui_are_as_before(model, data, folder, monkeypatch, how):
    comfy.model_management.load_models_gpu([model])
    before = {
        name: tensor.clone() for name, tensor in model.model.diffusion_model.state_dict().items()
    }
    wrappers = copy.deepcopy(model.wrappers)
    if how == "stopped":
        stopping_at(monkeypatch, 4)
    elif how == "failed":
        monkeypatch.setattr(flow, "acceleration_loss", lambda *_: 1 / 0)
    if how == "done":
        caf_training.train(job(model, data))
    else:
        with pytest.raises({"stopped": Stop, "failed": ZeroDivisionError}[how]):
            caf_training.train(job(model, data))
    after = model.model.diffusion_model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(
        module._forward_hooks or module._forward_pre_hooks
        for module in model.model.diffusion_model.modules()
    )
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    assert not model.patches
    assert model.wrappers == wrappers
    assert not model.additional_models
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
    assert not list(folder.glob("*.partial"))


def test_it_runs_where_comfyui_runs_nodes_in_inference_mode(dense_model, data, folder):
    with torch.inference_mode():
        done, adapter = trained(dense_model, data, folder, preview_every=2)
    again, plain = trained(dense_model, data, folder, filename="again")
    assert done.losses == again.losses
    assert same(adapter, plain)


def test_huber_trains_other_heads_and_the_old_runs_stay_what_they_were(dense_model, data, folder):
    _, squares = trained(dense_model, data, folder)
    done, found = trained(
        dense_model,
        data,
        folder,
        filename="huber",
        settings=dataclasses.replace(FP32, loss="Huber"),
    )
    assert not same(found, squares)
    assert done.losses[0] < 0.2, "of a thousand numbers, the length of their error"
    assert json.loads(squares.facts["run"])[3]["loss"] == "MSE", "as before there was a choice"
