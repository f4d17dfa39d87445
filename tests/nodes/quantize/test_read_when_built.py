"""What ComfyUI reads from a checkpoint beside its diffusion model is in the 4-bit file, too: Stable
Audio's tables of seconds, and what an SDXL predicts.
"""

import comfy.model_base
import comfy.model_detection
import comfy.sd
import comfy.supported_models
import pytest
import torch
from safetensors.torch import load_file, save_file

import class_walk
import tiny_models
from class_walk import TINY, VQ_3, draw, relative
from nibble.nodes.bridge.quantize.patched_weights import PatchedWeights, metadata_of
from nibble.nodes.bridge.quantized import loading, registration
from nibble.quant.files import read_when_built
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.source import Source, StateDictSource
from nibble.quant.svdquant.quantize import SVDQuantJob
from nibble.quant.svdquant.stock.quantize import StockJob
from nibble.quant.svdquant.stock.recipe import StockRecipe
from nibble.quant.vq4dit.quantize import VQJob

PREFIX = {"sdxl": "model.diffusion_model."}  # of all-in-one checkpoints; others: Stable Audio's
EMPTY = torch.tensor([])
V_PREDICTION = {"v_pred": EMPTY, "ztsnr": EMPTY}
EDM_V = {"edm_vpred.sigma_max": torch.tensor(100.0), "edm_vpred.sigma_min": torch.tensor(0.5)}
PLAYGROUND = {"edm_mean": torch.zeros(1, 4, 1, 1), "edm_std": torch.ones(1, 4, 1, 1)}
METHODS = {
    "svdquant": (SVDQuantJob, TINY),
    "vq": (VQJob, VQ_3),
    "stock": (StockJob, StockRecipe.from_preset("fast")),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """ComfyUI finds the tiny models' options, of which it takes some from the published sizes."""
    class_walk.widen(monkeypatch)
    detect = comfy.model_detection.detect_unet_config

    def told(state, prefix, metadata=None):
        found = detect(state, prefix, metadata)
        heads = {"num_heads": 2} if found and "audio_model" in found else {}
        return None if found is None else found | heads

    monkeypatch.setattr(comfy.model_detection, "detect_unet_config", told)
    registration.register()


def checkpoint(name: str, folder, beside: dict[str, torch.Tensor] | None = None):
    """An all-in-one checkpoint of a tiny model, with a VAE."""
    model = tiny_models.build(name)
    prefix = PREFIX.get(name, "model.model.")
    tensors = {
        f"{prefix}{key}": value for key, value in model.model.diffusion_model.state_dict().items()
    }
    beside = tiny_models.FAMILIES[name].beside() if beside is None else beside
    path = folder / "all in one.safetensors"
    save_file(tensors | beside | {"pretransform.model.bottleneck.w": torch.ones(2)}, path)
    return path, model


def made(source, folder, method: str = "svdquant"):
    job, recipe = METHODS[method]
    path = folder / f"{method}.safetensors"
    job.prepare(source, path, recipe).write()
    return path


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["stable audio", "stable audio 3"])
def test_a_4_bit_stable_audio_sounds_as_its_checkpoint(name, method, tmp_path):
    path, dense = checkpoint(name, tmp_path)
    file = made(path, tmp_path, method)
    stored = load_file(file)
    for key, table in tiny_models.FAMILIES[name].beside().items():
        assert torch.equal(stored[key], table), key
    wanted = draw(dense, name)
    stock = comfy.sd.load_diffusion_model(str(file), model_options={"dtype": torch.float32})
    loaded = [stock] if method == "stock" else [stock, loading.load(file, dtype="fp32")]
    for model in loaded:
        assert type(model.model) is type(dense.model)
        assert relative(draw(model, name), wanted) < 0.5
        for key, table in model.model.state_dict_for_saving({}).items():
            assert torch.equal(table.float(), stored[key]), key


def test_a_connected_stable_audio_keeps_its_tables(tmp_path):
    path, dense = checkpoint("stable audio", tmp_path)
    live = StateDictSource(PatchedWeights(dense), metadata=metadata_of(dense))
    from_model, from_file = load_file(made(live, tmp_path)), load_file(made(path, tmp_path))
    assert from_model.keys() == from_file.keys()
    assert all(torch.equal(from_model[key], value) for key, value in from_file.items())


def test_a_stable_audio_without_tables_is_refused(tmp_path):
    path, _ = checkpoint("stable audio", tmp_path, beside={})
    with pytest.raises(FileRefused, match=r"lacks the tables of seconds .* all-in-one checkpoint"):
        made(path, tmp_path)


@pytest.mark.parametrize(
    "marks, kind, prefix",
    [
        ({}, "EPS", "model.diffusion_model."),
        ({"v_pred": EMPTY}, "V_PREDICTION", "model.diffusion_model."),
        (V_PREDICTION, "V_PREDICTION", ""),
        (EDM_V, "V_PREDICTION_EDM", "model.diffusion_model."),
        (PLAYGROUND, "EDM", "model.diffusion_model."),
    ],
    ids=["epsilon", "v", "v with zero terminal SNR", "EDM v", "Playground"],
)
def test_a_4_bit_sdxl_predicts_what_its_checkpoint_does(marks, kind, prefix, tmp_path, monkeypatch):
    monkeypatch.setitem(PREFIX, "sdxl", prefix)
    path, _ = checkpoint("sdxl", tmp_path, marks)
    file = made(path, tmp_path)
    model = class_walk.load("sdxl", file, monkeypatch)
    assert model.model.model_type is getattr(comfy.model_base.ModelType, kind)
    sampling = model.model.model_sampling
    assert getattr(sampling, "zsnr", False) == ("ztsnr" in marks)
    if marks is EDM_V:
        limits = [float(sampling.sigma_max), float(sampling.sigma_min)]
        assert limits == pytest.approx([100, 0.5], rel=1e-5)


@pytest.mark.parametrize(
    "marks", [{}, {"v_pred": EMPTY}, V_PREDICTION, EDM_V, PLAYGROUND], ids="-".join
)
def test_a_connected_sdxl_says_what_it_predicts(marks):
    weights = PatchedWeights(dense_of(marks))
    found = {name: weights[name] for name in read_when_built.names(weights)}
    assert found.keys() == marks.keys()
    for name in EDM_V.keys() & marks.keys():
        assert found[name].item() == pytest.approx(marks[name].item(), rel=1e-5)


def dense_of(marks: dict[str, torch.Tensor]):
    """A tiny 16-bit SDXL with these marks in its checkpoint."""
    family = tiny_models.FAMILIES["sdxl"]
    config = getattr(comfy.supported_models, family.config)(dict(family.options))
    config.unet_config.update(family.options)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(dict(marks), "")
    tiny_models.fill(model.diffusion_model, 0)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def test_what_is_read_beside_the_model_is_no_vae(tmp_path):
    path, _ = checkpoint("sdxl", tmp_path, V_PREDICTION)
    source = Source(path)
    assert source.left_out.startswith("1 other tensors")
    assert not source.is_one_file  # ComfyUI would load it without
