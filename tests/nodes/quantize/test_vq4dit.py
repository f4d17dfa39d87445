"""Codewords in ComfyUI: from a model to a file (measured, calibrated, interrupted), one tensor a
layer, LoRAs.
"""

import errno
import hashlib
import json
import os
import shutil

import comfy.memory_management
import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
from safetensors.torch import load_file, save_file

from nibble.nodes.bridge.host import charts
from nibble.nodes.bridge.quantize import charts as vq_charts
from nibble.nodes.bridge.quantize import job as quantizing
from nibble.nodes.bridge.quantize import record_inputs
from nibble.nodes.bridge.quantize import vq4dit as vq
from nibble.nodes.bridge.quantized import layouts, loading, lora
from nibble.nodes.bridge.quantized import linear as ops
from nibble.quant.files import checkpoint, writer
from nibble.quant.files.errors import FileRefused
from nibble.quant.monitor import BlockError
from nibble.quant.vq4dit.codebook_usage import inspect, use_of
from nibble.quant.weights.vq import VQWeight

LAYER = "double_blocks.0.img_mlp.0"
SMALL = {"samples": torch.zeros(1, 16, 8, 8)}


@pytest.fixture
def folder(tmp_path, monkeypatch, flux_file):
    """ComfyUI's diffusion_models folder, with the 16-bit model in it."""
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, loading.FOLDER, ([str(tmp_path)], {".safetensors"})
    )
    folder_paths.filename_list_cache.pop(loading.FOLDER, None)
    shutil.copy(flux_file, tmp_path / "flux.safetensors")
    yield tmp_path
    folder_paths.filename_list_cache.pop(loading.FOLDER, None)


@pytest.fixture
def unmeasured(monkeypatch):
    """No memory to run the 16-bit model: weights alone, which is quick."""
    monkeypatch.setattr(record_inputs, "fits_in_memory", lambda nbytes: False)


def request(
    preset: str = "fast", bits: int = 3, changes: dict | None = None, **options
) -> vq.VQRequest:
    few = {"steps": 12, "codewords": 16, "vector": 2}
    quick = {"fast": {}, "vq4dit": few, "best": few | {"turns": 1}}[preset]
    recipe = vq.recipe_of(preset, bits, **(quick | (changes or {})))
    return vq.VQRequest(
        **(
            {"model_name": "flux.safetensors", "recipe": recipe, "latent": SMALL, "steps": 2}
            | options
        )
    )


def prompts(count: int) -> list:
    draw = torch.Generator().manual_seed(1)
    return [
        [
            torch.randn(1, 6, 64, generator=draw),
            {"pooled_output": torch.randn(1, 64, generator=draw), "guidance": 3.5},
        ]
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def codeword_file(flux_file):
    """The random FLUX at 3 bits, from its weights."""
    from nibble.quant.vq4dit.quantize import quantize_checkpoint

    target = flux_file.with_name("codewords.safetensors")
    quantize_checkpoint(flux_file, target, vq.recipe_of("fast", 3, turns=0))
    return target


def output(patcher, seed: int = 0) -> torch.Tensor:
    """One call of the diffusion model, loaded as a sampler loads it."""
    comfy.model_management.load_models_gpu([patcher])
    draw = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=draw)

    with torch.no_grad():
        return patcher.model.diffusion_model(
            random(1, 16, 8, 8),
            torch.tensor([0.7]),
            random(1, 6, 64),
            random(1, 64),
            torch.tensor([3.5]),
        )


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).float().norm() / b.float().norm()).item()


# ---- one tensor a layer


@pytest.fixture(params=[dict(), dict(scale=False), dict(rank=16), dict(rotation=64)], ids=str)
def weight(request) -> VQWeight:
    """A random 3-bit layer, 256 outputs of 128 inputs, in each of the format's forms."""
    options = {"scale": True, "rank": 0, "rotation": 0} | request.param
    draw = torch.Generator().manual_seed(0)
    indices = torch.randint(0, 256, (256, 48), generator=draw, dtype=torch.uint8)

    def random(*shape):
        return torch.randn(*shape, generator=draw) * 0.1

    down, up = (
        (random(128, options["rank"]), random(256, options["rank"]))
        if options["rank"]
        else (None, None)
    )
    return VQWeight(
        indices,
        random(64, 2).half(),
        random(256).half() if options["scale"] else None,
        down,
        up,
        rotation=options["rotation"],
    )


def packed(weight: VQWeight, dtype=torch.float32):
    tensors = {key.removeprefix("a."): tensor for key, tensor in weight.tensors("a").items()}
    tensors.pop("a.comfy_quant", None)
    return layouts.pack(tensors, weight.facts(), dtype)


def test_a_layer_is_one_tensor_of_the_16_bit_shape_and_streams_whole(weight):
    tensor = packed(weight)
    assert tensor.shape == (256, 128)
    assert torch.equal(tensor.dequantize(), weight.dequantize())
    buffer = torch.empty(comfy.memory_management.vram_aligned_size(tensor), dtype=torch.uint8)
    view = comfy.memory_management.interpret_gathered_like([tensor], buffer)[0]
    view.copy_(tensor)
    assert torch.equal(view.dequantize(), weight.dequantize())
    assert view.params.codebook.data_ptr() - buffer.data_ptr() in range(len(buffer)), (
        "the codebook lies in the streamed buffer"
    )


def test_a_layer_computes_what_the_format_says_and_saves_what_it_was_made_of(weight):
    tensor, x = packed(weight), torch.randn(5, 128, generator=torch.Generator().manual_seed(3))
    assert torch.equal(
        layouts.linear(x, tensor, None),
        weight.forward(x) if weight.scale is not None else packed_forward(weight, x),
    )
    stored = tensor.state_dict("a.weight") | {"a.comfy_quant": layouts.settings_tensor(tensor)}
    again = VQWeight.from_tensors(stored, "a")
    assert torch.equal(again.indices, weight.indices)
    assert torch.equal(again.codebook, weight.codebook)
    assert again.facts() == weight.facts()


def packed_forward(weight: VQWeight, x: torch.Tensor) -> torch.Tensor:
    """The same with the scale of ones that a layer without one has in memory."""
    return VQWeight(
        weight.indices, weight.codebook, torch.ones(256).half(), rotation=weight.rotation
    ).forward(x)


def test_a_lora_joins_the_branch_and_leaves_codes_and_codebook_alone(weight):
    tensor = packed(weight)
    draw = torch.Generator().manual_seed(4)
    delta = torch.randn(256, 4, generator=draw) @ torch.randn(4, 128, generator=draw) * 0.02
    patched = lora.absorb_dense(tensor, weight.dequantize() + delta)
    assert patched._qdata is tensor._qdata or torch.equal(patched._qdata, tensor._qdata)
    assert torch.equal(patched.params.codebook, tensor.params.codebook)
    assert patched.params.proj_up.shape[1] == weight.rank + 16
    x = torch.randn(5, 128, generator=draw)
    assert relative(layouts.linear(x, patched, None), x @ (weight.dequantize() + delta).T) < 2e-2
    assert (
        relative(layouts.linear(x, patched, None) - layouts.linear(x, tensor, None), x @ delta.T)
        < 2e-2
    )


# ---- loading


def test_the_loaded_model_is_comfyui_s_own_and_saves_the_file_s_tensors(codeword_file):
    patcher, file = loading.load(codeword_file), checkpoint.open_quantized(codeword_file)
    saved = patcher.model.diffusion_model.state_dict()
    for name in file.layers:
        for key, tensor in file.layer(name).items():
            if not key.endswith("comfy_quant"):
                assert torch.equal(saved[key], tensor), key
    module = patcher.model.diffusion_model.get_submodule(LAYER)
    assert type(module) is ops.NibbleOperations.Linear
    assert (
        patcher.model_size()
        < 0.5 * checkpoint.open_quantized(codeword_file).fact("source")["bytes"]
    )


def test_its_output_is_that_of_the_dequantized_weights(codeword_file, flux_file, tmp_path):
    file, state = checkpoint.open_quantized(codeword_file), load_file(flux_file)
    for name in file.layers:
        state[f"{name}.weight"] = VQWeight.from_tensors(file.layer(name), name).dequantize()
    save_file(state, tmp_path / "dense.safetensors")
    dense = comfy.sd.load_diffusion_model(
        str(tmp_path / "dense.safetensors"), {"dtype": torch.float32}
    )
    ours = loading.load(codeword_file, dtype="fp32")
    assert relative(output(ours), output(dense)) < 1e-4


@pytest.mark.parametrize("memory", [0, 1], ids=["whole", "streamed"])
def test_a_stock_lora_acts_as_on_the_dequantized_model_and_leaves_no_trace(codeword_file, memory):
    draw = torch.Generator().manual_seed(2)
    name = f"diffusion_model.{LAYER}"
    up, down = torch.randn(512, 4, generator=draw), torch.randn(4, 128, generator=draw) * 0.1
    patch = {
        f"{name}.lora_up.weight": up,
        f"{name}.lora_down.weight": down,
        f"{name}.alpha": torch.tensor(4.0),
    }
    base = loading.load(codeword_file, dtype="fp32", disable_dynamic=True)
    module, given = (
        base.model.diffusion_model.get_submodule(LAYER),
        torch.randn(3, 128, generator=draw),
    )
    with torch.no_grad():
        plain, codes = module(given), module.weight._qdata.clone()
        patched, _ = comfy.sd.load_lora_for_models(base, None, patch, 0.7, 0)
        patched.patch_model(patched.load_device, lowvram_model_memory=memory)
        assert bool(module.weight_function) == bool(memory), (
            "attached to a streamed layer, else in its low-rank branch"
        )
        assert relative(module(given) - plain, given @ (0.7 * up @ down).T) < 1e-2
        assert torch.equal(module.weight._qdata, codes)
        patched.detach()
        assert torch.equal(module(given), plain), (
            "taken away, the output is the old one bit for bit"
        )


def test_each_loader_lists_its_own_files_and_names_the_right_node_for_the_other_s(
    folder, codeword_file, quantized_file
):
    from nibble.nodes import svdquant
    from nibble.nodes import vq4dit as nodes

    shutil.copy(codeword_file, folder / "codes.safetensors")
    shutil.copy(quantized_file, folder / "four.safetensors")
    folder_paths.filename_list_cache.pop(loading.FOLDER, None)
    assert loading.quantized_files("vq") == ["codes.safetensors"]
    assert loading.quantized_files("svdquant") == ["four.safetensors"]
    assert quantizing.sources() == ["flux.safetensors"]
    assert "load it with the node Load VQ Model" in svdquant.NibbleLoadSVDQuant.validate_inputs(
        "codes.safetensors"
    )
    assert "load it with the node Load SVDQuant Model" in nodes.NibbleLoadVQ.validate_inputs(
        "four.safetensors"
    )
    assert nodes.NibbleLoadVQ.validate_inputs("codes.safetensors") is True
    assert nodes.NibbleInspectVQ.validate_inputs("codes.safetensors") is True


# ---- making a file


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_fast_is_measured_on_noise_where_the_model_fits_and_written_beside_its_source(
    folder, monkeypatch
):
    monkeypatch.setattr(record_inputs, "RANDOM_PIXELS", 64)
    name, report = request().run()
    assert name == "flux-vq3-fast.safetensors"
    assert report.notes == [quantizing.MEASURED_ON_NOISE]
    assert (
        checkpoint.open_quantized(folder / name).fact("calibration")["kind"]
        == "random conditioning"
    )
    assert not comfy.model_management.current_loaded_models
    began = report.rows
    assert [row.db for row in request().run()[1].rows] == [row.db for row in began]


@pytest.mark.parametrize("preset", ["vq4dit", "best"])
def test_calibration_runs_under_comfyui_s_inference_mode_and_leaves_the_model_untouched(
    folder, preset
):
    with torch.inference_mode():
        patcher = comfy.sd.load_diffusion_model(str(folder / "flux.safetensors"))
        before = {
            key: tensor.clone()
            for key, tensor in patcher.model.diffusion_model.state_dict().items()
        }
        name, report = request(preset, model=patcher, filename="mine", positive=prompts(2)).run()
    after = patcher.model.diffusion_model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert before.keys() == after.keys()
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in patcher.model.modules()
    )
    assert any("block" in row.why and "→" in row.why for row in report.rows)
    assert checkpoint.open_quantized(folder / name).fact("calibration")["kind"] == "prompts"
    assert comfy.model_management.in_training is False


def test_zero_data_calibration_interrupted_goes_on_to_the_same_file(folder, monkeypatch):
    monkeypatch.setattr(vq, "PROMPTS", 2)
    name, _ = request("best", filename="whole").run()
    seen = []

    def stop_later(error):
        seen.append(error)
        if error.number == 1 and error.step > 5:
            comfy.model_management.interrupt_current_processing(True)

    monkeypatch.setattr(vq, "LiveBlocks", lambda *_: stop_later)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        request("best", filename="parts").run()
    assert not (folder / "parts.safetensors").exists()
    assert (folder / "parts.safetensors.partial").exists()
    first = len(seen)
    monkeypatch.setattr(vq, "LiveBlocks", lambda *_: seen.append)
    request("best", filename="parts").run()
    assert {error.number for error in seen[first:]} == {1, 2}, (
        "the finished block is not calibrated again"
    )
    assert digest(folder / "parts.safetensors") == digest(folder / name)


def test_a_calibrated_preset_without_memory_for_the_model_says_what_to_do(folder, unmeasured):
    with pytest.raises(ValueError, match="does not fit in memory.*'fast'"):
        request("best").run()
    assert [path.name for path in folder.iterdir()] == ["flux.safetensors"]


def test_under_a_budget_layers_get_different_bits_and_the_file_fits(folder, unmeasured):
    name, _ = request(changes=dict(budget_gb=0.00088)).run()
    file = checkpoint.open_quantized(folder / name)
    assert file.size <= 0.88e6
    assert len({(layer["codewords"], layer["vector"]) for layer in file.layers.values()}) > 1


# ---- bad input: clear words, nothing half-written


def test_k_that_is_no_multiple_of_the_vector_stays_in_16_bit_and_says_so(folder, unmeasured):
    _, report = request(changes=dict(codewords=64, vector=3)).run()
    whys = {row.name: row.why for row in report.rows}
    assert "K=128 is not a multiple of the sub-vector length 3" in whys[LAYER]


def test_nan_quantized_input_and_existing_files_are_refused_and_leave_nothing(
    folder, unmeasured, codeword_file, flux_file
):
    shutil.copy(codeword_file, folder / "codes.safetensors")
    state = load_file(flux_file)
    state[f"{LAYER}.weight"][3, 5] = float("nan")
    save_file(state, folder / "broken.safetensors")
    (folder / "taken.safetensors").write_bytes(codeword_file.read_bytes())
    folder_paths.filename_list_cache.pop(loading.FOLDER, None)
    before = sorted(folder.iterdir())
    for options, said in (
        ({"model_name": "broken.safetensors"}, "NaN"),
        ({"model_name": "codes.safetensors"}, "codes.safetensors"),
        ({"filename": "taken"}, "overwrite"),
        ({"filename": "../out"}, "outside"),
    ):
        with pytest.raises(ValueError, match=said):
            request(**options).run()
    with torch.inference_mode(), pytest.raises(FileRefused, match="quantized by Nibble already"):
        request(model=loading.load(codeword_file)).run()
    assert sorted(folder.iterdir()) == before


def test_a_full_disk_is_told_before_the_work_starts(folder, unmeasured, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer.os, "posix_fallocate", full)
    with pytest.raises(FileRefused, match="full"):
        request().run()
    assert not list(folder.glob("*vq3*"))


def rewritten(path, target, change) -> None:
    """A copy of a file of codewords with its tensors changed; its checksums are left out."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "checksums"}
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    change(tensors)
    save_file(tensors, target, metadata)


@pytest.mark.parametrize(
    "said, change",
    [
        (
            "weight_codebook",
            lambda t: t.update(
                {f"{LAYER}.weight_codebook": torch.zeros(48, 2, dtype=torch.float16)}
            ),
        ),
        (
            "weight_codebook",
            lambda t: t.update(
                {f"{LAYER}.weight_codebook": torch.zeros(64, 3, dtype=torch.float16)}
            ),
        ),
        (
            "weight_scale",
            lambda t: t.update({f"{LAYER}.weight_scale": torch.zeros(3, dtype=torch.float16)}),
        ),
        (
            "not uint8",
            lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"].view(torch.int8)}),
        ),
        (
            LAYER,
            lambda t: t.update(
                {
                    f"{LAYER}.comfy_quant": torch.tensor(
                        list(json.dumps({"format": "vq", "codewords": 100, "vector": 2}).encode()),
                        dtype=torch.uint8,
                    )
                }
            ),
        ),
    ],
    ids=["codewords", "vector", "scale", "dtype", "codes out of range"],
)
def test_a_damaged_file_of_codewords_is_refused_by_name(folder, codeword_file, said, change):
    from nibble.nodes import vq4dit as nodes

    rewritten(codeword_file, folder / "bad.safetensors", change)
    told = nodes.NibbleLoadVQ.validate_inputs("bad.safetensors")
    assert isinstance(told, str)
    assert "bad.safetensors" in told
    assert said in told


@pytest.mark.parametrize(
    "inputs, said",
    [
        (dict(codewords=100, vector=2), "power of two"),
        (dict(codewords=64), "go together"),
        (dict(codewords=64, vector=2, budget_gb=1.0), "budget_gb"),
    ],
)
def test_the_node_refuses_options_that_do_not_go_together(inputs, said):
    from nibble.nodes import vq4dit as nodes

    asked = dict(
        preset="fast",
        bits="3",
        codewords=0,
        vector=0,
        candidates=0,
        calibration_steps=0,
        budget_gb=0.0,
        rotation=False,
    )
    assert said in nodes.NibbleQuantizeVQ.validate_inputs(**(asked | inputs))
    assert nodes.NibbleQuantizeVQ.validate_inputs(**asked) is True


# ---- what is shown


def test_codebook_use_counts_codewords_and_entropy():
    even = torch.arange(64, dtype=torch.uint8).repeat(2, 1)
    codes = VQWeight(even, torch.randn(256, 2).half())
    use = use_of(codes)
    assert (use.used, use.codewords, use.entropy) == (64, 256, 6.0)
    assert use.share == 0.75
    assert (
        use_of(VQWeight(torch.zeros(2, 64, dtype=torch.uint8), torch.randn(256, 2).half())).entropy
        == 0
    )


def test_charts_have_the_agreed_shape(codeword_file):
    file, model = checkpoint.open_quantized(codeword_file), loading.load(codeword_file)
    facts = vq_charts.model_chart(file, loading.vram_needed(model), model.load_device)
    told = dict(facts["summary"])
    assert facts["kind"] == "facts"
    assert 3.0 < float(told["bits per weight"]) < 3.6
    assert "64 codewords of 2" in told["layers"]
    uses = inspect(file)
    mean = sum(use.bits_per_weight * use.weights for use in uses) / sum(use.weights for use in uses)
    assert vq_charts.bits_per_weight(file) == pytest.approx(mean)
    chart = vq_charts.inspect_chart(file, uses)
    assert chart["kind"] == "codebooks"
    assert len([row for row in chart["rows"] if "use" in row]) == len(file.layers)
    assert chart.keys() == charts.layers_chart(vq_charts._report(file), "", "").keys()


def test_the_live_chart_has_a_curve_for_each_block():
    shown = []

    class Shown:
        title = "calibrating"
        say = staticmethod(lambda text: None)
        show = shown.append

    live = vq_charts.LiveBlocks("model", "best", Shown)
    for number in range(2):
        for step, db in ((1, 10.0), (10, 12.0), (20, 14.0)):
            live(BlockError(number, 3, f"blocks.{number}", step, 20, db))
    last = shown[-1]
    assert last["kind"] == "blocks"
    assert last["blocks"] == 3
    assert [row["points"][-1] for row in last["rows"]] == [[1.0, 14.0]] * 2
    assert dict(last["summary"])["gain per block"] == "+4.0 dB"
