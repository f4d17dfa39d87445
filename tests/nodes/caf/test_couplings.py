"""Make CAF Couplings inside ComfyUI: pairs in the model's own units, the same in any batch and
after any stop; and what it shows.
"""

import dataclasses

import comfy.latent_formats
import comfy.model_sampling
import comfy.samplers
import pytest
import torch

import tiny_models
from coupling_runs import SIGMAS, calls_of, euler, everything, job, made, prompts
from nibble.accel.caf import couplings
from nibble.nodes import caf_training as nodes
from nibble.nodes.bridge.caf import couplings as caf_couplings
from nibble.quant.files import atomic
from nibble.quant.files.errors import FileRefused

pytestmark = pytest.mark.usefixtures("output")


@pytest.fixture(scope="module")
def model():
    return tiny_models.build("flux")


class Stop(Exception):
    """Stands for ComfyUI's interrupt."""


# ---- what it makes


def test_a_pair_is_euler_by_hand_in_the_models_own_units(model):
    """x -= step * velocity of the network, without ComfyUI's samplers; and that is what ComfyUI's
    own result is, brought into those units.
    """
    found = made(model, positive=[prompts(2)], count=2)
    noise, data, caption = found.pair(1)
    assert torch.equal(noise, torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(8)))
    assert caption == 0
    tokens, extras = prompts(2)[0]
    x = noise
    for sigma, after in zip(SIGMAS, SIGMAS[1:], strict=False):
        x = x + (after - sigma) * model.model.diffusion_model(
            x, sigma.reshape(1), tokens, extras["pooled_output"], torch.tensor([3.5])
        )
    torch.testing.assert_close(data, x, rtol=1e-4, atol=1e-4)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(prompts(2), prompts(2))
    latent = guider.sample(
        noise, torch.zeros_like(noise), euler(), SIGMAS, disable_pbar=True, seed=1
    )
    torch.testing.assert_close(data, model.model.process_latent_in(latent), rtol=1e-5, atol=1e-5)
    assert (latent - data).abs().max() > 0.05, "the VAE's units are others"


def test_prompts_take_turns_and_those_of_one_go_together(model, monkeypatch):
    one_by_one = made(model, filename="single")
    assert [one_by_one.pair(i)[2] for i in range(5)] == [0, 1, 0, 1, 0]
    assert len(one_by_one.captions) == 2
    calls = calls_of(model, monkeypatch)
    together = made(model, batch=2)
    assert calls == [2] * 6 + [1] * 3, "pairs 0 and 2, 1 and 3, 4; three steps each"
    for i in range(5):
        (noise, data, caption), (other_noise, other_data, other_caption) = (
            one_by_one.pair(i),
            together.pair(i),
        )
        assert torch.equal(noise, other_noise)
        assert caption == other_caption
        torch.testing.assert_close(data, other_data, rtol=1e-4, atol=1e-4)
    assert (
        one_by_one.pair(0)[1] - made(model, positive=[prompts(3, 2)], filename="other").pair(0)[1]
    ).abs().max() > 1e-3, "the prompt matters"


def test_prompts_come_back_as_comfyui_s_conditioning(model):
    found = made(model, count=1)
    for (tokens, extras), (wanted, more) in zip(found.captions, prompts(2, 3), strict=True):
        assert torch.equal(tokens, wanted)
        assert torch.equal(extras["pooled_output"], more["pooled_output"])
        assert extras.keys() == more.keys()


@pytest.mark.parametrize("batch", [1, 2])
def test_stopped_anywhere_it_goes_on_and_ends_as_if_it_had_not_been(model, monkeypatch, batch):
    whole = made(model, filename="whole", batch=batch)
    plain, steps = caf_couplings.Progress.__call__, 0

    def report(self, done, total, name=""):
        nonlocal steps
        steps += 1
        if steps % 4 == 0:  # in the middle of a batch of three steps, and now and then at its end
            raise Stop
        plain(self, done, total, name)

    kept, stops = [], 0
    with monkeypatch.context() as patch:
        patch.setattr(caf_couplings.Progress, "__call__", report)
        while True:
            try:
                found = made(model, batch=batch)
                break
            except Stop:
                stops += 1
                kept.append(len(list((caf_couplings.folder_of("mine")).glob("pairs-*"))))
    assert stops >= 2
    assert kept == sorted(kept)
    assert kept[0] == 1
    assert found.digest() == whole.digest()
    assert everything(found) == everything(whole)


def test_what_is_there_is_not_made_again_and_more_are_added(model, monkeypatch):
    first = everything(made(model, count=2))
    calls = calls_of(model, monkeypatch)
    again, chart = caf_couplings.make_couplings(job(model, count=2))
    assert not calls
    assert everything(again) == first
    assert ["time per pair", "made already, with the same inputs"] in chart["summary"]
    more = made(model, count=4)
    assert calls == [1] * 6
    assert everything(more)[:2] == first
    assert len(more) == 4
    few = made(model, count=1)
    assert len(calls) == 6
    assert everything(few) == first[:1]
    assert few.digest() != more.digest()
    assert len(couplings.read(more.folder)) == 4


def test_cfg_puts_the_guidance_into_the_picture(model):
    plain, guided = (
        made(model, filename="plain", count=1),
        made(model, count=1, cfg=3.0, negative=[prompts(5)]),
    )
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(prompts(2), prompts(5))
    guider.set_cfg(3.0)
    latent = guider.sample(
        plain.pair(0)[0], torch.zeros(1, 16, 4, 4), euler(), SIGMAS, disable_pbar=True, seed=1
    )
    torch.testing.assert_close(
        guided.pair(0)[1], model.model.process_latent_in(latent), rtol=1e-4, atol=1e-4
    )
    assert (guided.pair(0)[1] - plain.pair(0)[1]).abs().max() > 1e-3
    for changes, said in (
        ({"negative": [prompts(6)], "cfg": 3.0}, "negative prompt is"),
        ({"cfg": 1.0, "negative": None}, "cfg is 3.0, and 1.0 is asked for"),
    ):
        with pytest.raises(FileRefused, match=f"^mine holds couplings of another run: its {said}"):
            made(model, count=1, **changes)


def patched(model, strength: float, seed: int = 0):
    own, key = model.clone(), "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    shape = own.model.state_dict()[key].shape
    own.add_patches(
        {key: ("diff", (torch.randn(shape, generator=torch.Generator().manual_seed(seed)),))},
        strength,
    )
    return own


def test_loras_are_in_the_pictures_and_in_the_identity(model):
    plain, taught = made(model, filename="plain", count=1), made(patched(model, 0.3), count=1)
    assert (plain.pair(0)[1] - taught.pair(0)[1]).abs().max() > 1e-3
    assert taught.digest() == made(patched(model, 0.3), count=1).digest(), (
        "the same LoRA loaded again"
    )
    for other in (model, patched(model, 0.2), patched(model, 0.3, seed=1)):
        with pytest.raises(FileRefused, match="its LoRAs is"):
            made(other, count=1)
    with pytest.raises(FileRefused, match="its weights is"):
        made(patched(tiny_models.build("flux", seed=1), 0.3), count=1)
    assert made(model, count=1, overwrite=True).digest() == plain.digest()


@pytest.mark.parametrize(
    "name", ["flux2", "chroma", "sd3", "wan 2.1", "lumina 2", "qwen-image", "ltxv", "z-image pixel"]
)
def test_models_of_every_kind_make_couplings(name):
    own, shape = tiny_models.build(name), tiny_models.FAMILIES[name].latent
    found = made(
        own,
        positive=[prompts(2, name=name)],
        latents=[{"samples": torch.zeros(3, *shape)}],
        count=1,
    )
    noise, data, _ = found.pair(0)
    assert found.shape == shape
    assert data.isfinite().all()
    assert (data - noise).abs().mean() > 1e-3


def test_a_4_bit_model_is_a_teacher_too(quantized_file):
    from nibble.nodes.bridge.quantized import loading

    entry = [torch.randn(1, 5, 64), {"pooled_output": torch.randn(1, 64), "guidance": 3.5}]
    found = made(loading.load(quantized_file), positive=[[entry]], count=1)
    assert found.pair(0)[1].isfinite().all()
    assert (
        found.digest() == made(loading.load(quantized_file), positive=[[entry]], count=1).digest()
    )


def test_an_empty_latent_of_another_model_is_brought_into_shape():
    """As samplers do: four channels become sixteen, and a model of videos gets a picture of one
    frame.
    """
    own = tiny_models.build("wan 2.1")
    assert made(
        own,
        positive=[prompts(2, name="wan 2.1")],
        latents=[{"samples": torch.zeros(1, 4, 4, 4)}],
        count=1,
    ).shape == (16, 1, 4, 4)


def test_the_scale_of_the_noise_is_in_the_pair(model, monkeypatch):
    """Some models begin at noise of another size; what they begin with is what is stored."""
    own = model.clone()
    sampling = type(
        "Sampling",
        (comfy.model_sampling.ModelSamplingFlux, comfy.model_sampling.CONST),
        {"noise_scale": 8.0},
    )()
    own.add_object_patch("model_sampling", sampling)
    assert torch.equal(
        made(own, count=1).pair(0)[0],
        8 * torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(7)),
    )


# ---- what it shows


def test_steps_pictures_and_facts_are_shown(model, monkeypatch):
    bars, charts, pictures = [], [], []
    monkeypatch.setattr(caf_couplings.Progress, "__call__", lambda self, *state: bars.append(state))
    monkeypatch.setattr(caf_couplings.Progress, "show", lambda self, chart: charts.append(chart))
    monkeypatch.setattr(
        caf_couplings.Progress,
        "picture",
        lambda self, done, total, preview: pictures.append((done, total, preview[1].size)),
    )
    found, chart = caf_couplings.make_couplings(job(model, batch=2, count=3))
    assert [bar[:2] for bar in bars] == [(2, 9), (4, 9), (6, 9), (7, 9), (8, 9), (9, 9)]
    assert bars[0][2] == "pairs 1 to 2 of 3, step 1 of 3"
    assert bars[3][2] == "pair 3 of 3, step 1 of 3"
    assert pictures == [(6, 9, (4, 4)), (9, 9, (4, 4))]
    facts = dict(chart["summary"])
    assert chart["kind"] == "facts"
    assert chart["title"] == "mine"
    assert dict(charts[0]["summary"])["pairs"] == "2 of 3"
    assert facts | {"time per pair": ""} == {
        "pairs": "3 of 3",
        "prompts": "2",
        "latent": "16 x 4 x 4",
        "teacher": "euler, 3 steps",
        "time per pair": "",
        "size": caf_couplings.size(found.nbytes),
        "folder": "output/caf_couplings/mine",
    }
    assert float(facts["time per pair"].removesuffix(" s")) > 0


@pytest.mark.parametrize(
    "elapsed, said", [(10, "about 10 s left"), (1000, "about 17 min left"), (0.1, "")]
)
def test_it_says_how_long_it_will_take(model, monkeypatch, elapsed, said):
    """Half is made, in so many seconds."""
    watch = caf_couplings._Watch(job(model, count=8), None, 8)
    assert watch.left(2) == "", "the first batch waits for the model"
    watch.made, watch.began = 4, 0.0
    monkeypatch.setattr(caf_couplings.time, "monotonic", lambda: elapsed)
    assert watch.left(4).removeprefix(", ") == said


def test_nothing_is_left_on_the_model(model):
    before = (
        dict(model.model_options["transformer_options"]),
        len(model.wrappers),
        model.patches_uuid,
    )
    made(model, count=1)
    assert before == (
        model.model_options["transformer_options"],
        len(model.wrappers),
        model.patches_uuid,
    )


def test_the_node_hands_lists_on(model, monkeypatch):
    seen = []
    facts = {"kind": "facts"}
    monkeypatch.setattr(nodes, "make_couplings", lambda job: (seen.append(job), facts))
    monkeypatch.setattr(
        nodes.NibbleMakeCAFCouplings,
        "hidden",
        type("Hidden", (), {"unique_id": "5"}),
        raising=False,
    )
    latent = {"samples": torch.zeros(1, 16, 4, 4)}
    nodes.NibbleMakeCAFCouplings.execute(
        model=[model],
        positive=[prompts(2), prompts(3)],
        latent_image=[latent],
        sampler=[euler()],
        sigmas=[SIGMAS],
        count=[4],
        seed=[9],
        filename=["f"],
        overwrite=[True],
        cfg=[2.0],
        batch_size=[3],
        negative=[prompts(4)],
    )
    given = dataclasses.asdict(
        dataclasses.replace(
            seen[0],
            model=None,
            sampler=None,
            sigmas=None,
            positive=len(seen[0].positive),
            negative=None,
            latents=[],
        )
    )
    assert given == {
        "model": None,
        "positive": 2,
        "latents": [],
        "sampler": None,
        "sigmas": None,
        "count": 4,
        "seed": 9,
        "filename": "f",
        "negative": None,
        "cfg": 2.0,
        "batch": 3,
        "overwrite": True,
        "node_id": "5",
    }


def test_a_second_run_is_refused_before_anything_is_touched(model):
    folder = made(model, filename="mine", count=2).folder
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with (
        atomic.exclusive(folder),
        pytest.raises(FileRefused, match="mine is being written by another run"),
    ):
        made(model, filename="mine", count=2, seed=9, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]
