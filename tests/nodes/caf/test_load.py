"""Load CAF Model on every flow family of ComfyUI: which head answers, what the initial velocity
changes, and that nothing is left on the model.
"""

import gc
import weakref

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.samplers
import folder_paths
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from safetensors.torch import save_file

import tiny_models
from caching_runs import traces
from caf_files import heads, linears, worn
from flux_loras import lora_file, with_lora
from nibble.accel.caf import adapter, heads_file
from nibble.accel.caf.coordinates import Coordinates
from nibble.nodes import caf as nodes
from nibble.nodes.bridge.caf import load as caf_model
from nibble.nodes.bridge.quantize import vq4dit as vq
from nibble.nodes.bridge.quantized import loading
from nibble.quant.files.errors import FileRefused
from what_families_can import LATENT_ELSEWHERE

SIGMA = 0.6
MUSIC = {"ace-step 1.5", "stable audio 3"}  # the latent comes in beside something else
NAME = "test.caf.safetensors"


def sampling(family: str):
    return tiny_models.build(family).get_model_object("model_sampling")


FLOW = [
    family
    for family in tiny_models.FAMILIES
    if isinstance(sampling(family), comfy.model_sampling.CONST)
]


def answers(
    model, family: str, requests: list, cfg: float = 1.0, batch: int = 1
) -> list[torch.Tensor]:
    """What a MODEL says inside ComfyUI's sampling at SIGMA, as dx/dt, to requests (x, initial
    velocity or None).
    """
    found = []

    def asked(model, x, sigmas, extra_args=None, **_):
        ask = caf_model.asking(model, extra_args, Coordinates())
        found.extend(ask(x, x.new_full((len(x),), SIGMA), start) for x, start in requests)
        return x

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(tiny_models.prompt(family), tiny_models.prompt(family, seed=3))
    guider.set_cfg(cfg)
    noise = tiny_models.latent(family, batch)
    guider.sample(
        noise,
        noise * 0,
        comfy.samplers.KSAMPLER(asked),
        torch.tensor([SIGMA, 0.0]),
        disable_pbar=True,
        seed=1,
    )
    return found


def tensors(family: str, batch: int = 1) -> list[torch.Tensor]:
    """x and two initial velocities, as a sampler holds them: several streams packed into one."""
    import comfy.utils

    made = [tiny_models.latent(family, batch, seed=seed) for seed in (1, 2, 3)]
    return [comfy.utils.pack_latents(one.unbind())[0] if one.is_nested else one for one in made]


@pytest.mark.parametrize("family", FLOW)
def test_each_head_answers_and_leaves_nothing_behind(family):
    if family in MUSIC:
        with pytest.raises(ValueError, match="cannot be given an initial velocity"):
            worn(tiny_models.build(family))
        return
    model, (x, v, w) = tiny_models.build(family), tensors(family)
    (plain,) = answers(model, family, [(x, None)])
    before = traces(model)
    for found in answers(worn(model, seed=None), family, [(x, None), (x, v)]):
        assert torch.equal(found, plain), "untrained heads change no bit"
    first, second, third, again = answers(
        worn(model), family, [(x, None), (x, v), (x, w), (x, None)]
    )
    assert torch.isfinite(torch.stack([first, second, third])).all()
    assert torch.equal(first, again)
    assert not torch.allclose(first, plain, rtol=1e-3)
    assert not torch.allclose(second, first, rtol=1e-3)
    assert not torch.allclose(third, second, rtol=1e-3)
    assert traces(model) == before
    assert torch.equal(answers(model, family, [(x, v)])[0], plain)


@pytest.mark.parametrize("family", [name for name in FLOW if name not in LATENT_ELSEWHERE | MUSIC])
def test_the_initial_velocity_enters_where_the_latent_does(family):
    """With the input layer's own weight for v0, what is linear up to there cannot tell (x, v0) from
    x + v0.
    """
    model, (x, v, _) = tiny_models.build(family), tensors(family)
    dressed = worn(model, seed=None)
    made = caf_model.heads_of(dressed).adapter
    layer = model.model.diffusion_model.get_submodule(made.input_layer)
    made.acceleration.extra.data = layer.weight.detach().clone()
    (found,) = answers(dressed, family, [(x, v)])
    (expected,) = answers(model, family, [(x + v, None)])
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("family", ["flux", "chroma", "sd3"])
def test_heads_fade_where_the_file_says_so(family):
    """middle + (1 - middle) (1 - 2 sigma)^2 of them at sigma: at 0.6 and 0.1, what a whole
    difference does at 0.136 of its size.
    """
    model, (x, v, _) = tiny_models.build(family), tensors(family, batch=2)
    faded, scaled = (worn(model, rank=0, middle=middle) for middle in (0.1, 1.0))
    for tensor in caf_model.heads_of(scaled).adapter.parameters():
        tensor.data *= 0.1 + 0.9 * (1 - 2 * SIGMA) ** 2
    for start in (None, v):
        (found,) = answers(faded, family, [(x, start)], cfg=3.0, batch=2)
        torch.testing.assert_close(
            found, answers(scaled, family, [(x, start)], cfg=3.0, batch=2)[0], rtol=1e-3, atol=1e-4
        )
    assert not torch.allclose(
        found, answers(worn(model, rank=0), family, [(x, v)], cfg=3.0, batch=2)[0], rtol=1e-2
    )


@pytest.mark.parametrize("family", ["flux", "wan 2.1", "sd3"])
def test_every_prompt_of_a_batch_gets_its_pictures_velocity(family, monkeypatch):
    """Both prompts in one call of the model, in two, and the pictures one by one: the same."""
    model, (x, v, _) = worn(tiny_models.build(family)), tensors(family, batch=2)
    (together,) = answers(model, family, [(x, v)], cfg=3.0, batch=2)
    single = torch.cat(
        [answers(model, family, [(x[i : i + 1], v[i : i + 1])], cfg=3.0)[0] for i in range(2)]
    )
    torch.testing.assert_close(together, single, rtol=1e-3, atol=1e-4)
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda *_: 0)
    torch.testing.assert_close(
        answers(model, family, [(x, v)], cfg=3.0, batch=2)[0], together, rtol=1e-3, atol=1e-4
    )


def test_caches_are_told_the_two_nets_apart_and_called_once_a_call():
    model, (x, v, _) = worn(tiny_models.build("flux")), tensors("flux")
    seen = {WrappersMP.APPLY_MODEL: [], WrappersMP.DIFFUSION_MODEL: []}
    for kind, calls in seen.items():

        def spy(executor, *args, calls=calls, **kwargs):
            options = next(
                value
                for value in (*args, *kwargs.values())
                if isinstance(value, dict) and "uuids" in value
            )
            calls.append(tuple(options["uuids"]))
            return executor(*args, **kwargs)

        model.add_wrapper_with_key(kind, "spy", spy)
    answers(model, "flux", [(x, None), (x, v), (x, v)])
    for calls in seen.values():
        assert len(calls) == 3
        assert calls[0] != calls[1] == calls[2]


def test_a_prompt_for_a_part_of_the_picture_is_refused_in_words():
    model, (x, v, _) = worn(tiny_models.build("flux")), tensors("flux")
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds(
        {
            "positive": [
                [cond, extras | {"area": (4, 6, 0, 0)}]
                for cond, extras in tiny_models.prompt("flux")
            ]
        }
    )

    def asked(model, x, sigmas, extra_args=None, **_):
        return caf_model.asking(model, extra_args, Coordinates())(x, x.new_full((1,), SIGMA), v)

    with pytest.raises(ValueError, match="in parts.*16 x 4 x 6 of 16 x 8 x 12.*areas"):
        guider.sample(
            x,
            x * 0,
            comfy.samplers.KSAMPLER(asked),
            torch.tensor([SIGMA, 0.0]),
            disable_pbar=True,
            seed=1,
        )


# ---- together with what else is on a model


def run(model, cfg: float = 1.0, sampler: str = "euler", steps: int = 2):
    """A picture of a flow model with one of ComfyUI's samplers: the velocity head's."""
    from caching_runs import draw

    return draw(model, cfg if cfg != 1 else None, sampler, steps)


@pytest.fixture
def codewords(flux_file):
    """The same FLUX as codewords of 3 bits."""
    from nibble.quant.vq4dit.quantize import quantize_checkpoint

    target = flux_file.with_name("codewords-caf.safetensors")
    if not target.exists():
        quantize_checkpoint(flux_file, target, vq.recipe_of("fast", 3, turns=0))
    return loading.load(target)


@pytest.mark.parametrize("kind", ["model", "dense_model", "codewords"])
def test_untrained_heads_change_no_bit_of_a_picture_with_a_lora_on_either_side(kind, request):
    model = request.getfixturevalue(kind)
    plain = run(model)
    assert torch.equal(run(worn(model, seed=None)), plain)
    changed = run(worn(model))
    assert not torch.equal(changed, plain)
    assert torch.equal(run(worn(model)), changed)
    factors = lora_file(request.getfixturevalue("model"))
    before, after = run(worn(with_lora(model, factors))), run(with_lora(worn(model), factors))
    assert torch.equal(before, after)
    assert not torch.equal(before, changed)
    assert torch.equal(run(model), plain)


def test_a_model_that_is_loaded_in_part_gives_the_same(dense_model, monkeypatch):
    """The base and the heads left in RAM and streamed, as on a card with no VRAM to spare."""
    model, loaded = worn(dense_model), []
    plain = run(model)

    def look(executor, *args, **kwargs):
        if not loaded:
            loaded.extend(
                (patcher.loaded_size(), patcher.model_size())
                for patcher in (model, *model.get_additional_models())
            )
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "look", look)
    comfy.model_management.unload_all_models()
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(
        comfy.model_management, "vram_state", comfy.model_management.VRAMState.NO_VRAM
    )
    assert torch.equal(run(model), plain)
    assert len(loaded) == 2, loaded
    assert all(here < 0.1 * whole for here, whole in loaded), loaded


def test_torch_compile_on_either_side(dense_model):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    plain, made = worn(dense_model), heads(dense_model)
    expected = run(plain, steps=1)
    keys = ["diffusion_model.double_blocks.0.img_mlp"]

    def compiled(model):
        model = model.clone()
        set_torch_compile_wrapper(model, backend=lambda module, inputs: module.forward, keys=keys)
        return model

    for model in (
        compiled(caf_model.with_heads(dense_model, made, NAME)),
        caf_model.with_heads(compiled(dense_model), made, NAME),
    ):
        torch._dynamo.reset()
        assert torch.equal(run(model, steps=1), expected)
    torch._dynamo.reset()


# ---- ComfyUI keeps house


def test_comfyui_counts_loads_and_frees_the_heads(dense_model):
    model = worn(dense_model)
    size = sum(tensor.nbytes for tensor in model.get_attachment(caf_model.KEY).adapter.parameters())
    run(model)
    loaded = [entry.model for entry in comfy.model_management.current_loaded_models]
    mine = [patcher for patcher in loaded if isinstance(patcher.model, adapter.CAFAdapter)]
    assert len(mine) == 1
    assert mine[0].model_size() == size
    assert mine[0].loaded_size() == size
    gone = weakref.ref(mine[0].model)
    del mine, loaded, model
    gc.collect()
    comfy.model_management.cleanup_models_gc()
    assert gone() is None
    assert not any(
        isinstance(entry.model.model, adapter.CAFAdapter)
        for entry in comfy.model_management.current_loaded_models
        if entry.model is not None
    )


# ---- files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """ComfyUI's folder of CAF files, empty."""
    (tmp_path / caf_model.FOLDER).mkdir()
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths,
        caf_model.FOLDER,
        ([str(tmp_path / caf_model.FOLDER)], {".safetensors"}),
    )
    folder_paths.filename_list_cache.pop(caf_model.FOLDER, None)
    yield tmp_path / caf_model.FOLDER
    folder_paths.filename_list_cache.pop(caf_model.FOLDER, None)


def saved(folder, model, name: str = NAME, **options) -> str:
    made = heads(model, **options)
    made.facts |= {"steps": 300, "pairs": 64}
    heads_file.save_file(made, folder / name)
    return name


def test_the_node_loads_a_file_and_shows_what_is_in_it(folder, dense_model):
    name = saved(folder, dense_model, h=1.5, rank=4)
    assert caf_model.files() == [name]
    output = nodes.NibbleLoadCAF.execute(model=dense_model, caf_name=name)
    found = caf_model.heads_of(output[0])
    assert found.name == name
    assert found.adapter.h == 1.5
    assert all(
        tensor.dtype == dense_model.model.get_dtype_inference() and not tensor.requires_grad
        for tensor in found.adapter.parameters()
    )
    rows = dict(output.ui["nibble_chart"][0]["summary"])
    assert rows["pace"] == "h = 1.5"
    assert rows["trained"] == "300 steps each on 64 pairs"
    assert (
        rows["heads"]
        == f"velocity and acceleration, rank 4, {len(linears(dense_model.model.diffusion_model))}"
        " layers each"
    )
    assert dense_model.get_attachment(caf_model.KEY) is None
    assert torch.equal(run(output[0]), run(caf_model.load(dense_model, name)))


def test_whole_differences_work_too(folder, dense_model):
    name = saved(folder, dense_model, rank=0)
    assert not torch.equal(run(caf_model.load(dense_model, name)), run(dense_model))


def test_what_is_no_caf_file_or_another_models_is_refused_by_name(folder, dense_model):
    save_file({"a": torch.zeros(1)}, folder / "lora.caf.safetensors")
    (folder / "torn.caf.safetensors").write_bytes(b"\x10\x00")
    other = tiny_models.build("flux")
    saved(folder, other, "other.caf.safetensors")
    for name, words in (
        ("lora.caf.safetensors", "lora.caf.safetensors is no CAF file.*Train CAF"),
        ("torn.caf.safetensors", "torn.caf.safetensors"),
        (
            "other.caf.safetensors",
            (
                r"other.caf.safetensors changes double_blocks.0.*\(.* x .*\), and the connected"
                r" model has .* there"
            ),
        ),
        ("gone.caf.safetensors", "gone.caf.safetensors is not in ComfyUI's caf folder"),
    ):
        with pytest.raises(FileRefused, match=words):
            caf_model.load(dense_model, name)
    assert "gone" in nodes.NibbleLoadCAF.validate_inputs(caf_name="gone.caf.safetensors")


def test_other_models_and_a_second_pair_of_heads_are_refused(folder, dense_model):
    name = saved(folder, dense_model)
    still = dense_model.clone()
    still.add_object_patch("model_sampling", comfy.model_sampling.IMG_TO_IMG())
    with pytest.raises(ValueError, match="Load CAF Model needs a model that leads from noise"):
        caf_model.load(still, name)
    once = caf_model.load(dense_model, name)
    with pytest.raises(ValueError, match=f"heads of {name} already"):
        caf_model.load(once, name)
    with pytest.raises(ValueError, match="no CAF heads.*Load CAF Model"):
        caf_model.heads_of(dense_model)
