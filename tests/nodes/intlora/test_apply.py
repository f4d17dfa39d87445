"""IntLoRA on a MODEL: converted from a stock LoRA and applied, it changes what the LoRA changes;
taken off, the base is back bit for bit.
"""

from types import SimpleNamespace

import comfy.model_management
import folder_paths
import pytest
import torch
from safetensors.torch import save_file

from flux_loras import (
    MLP,
    MODULATION,
    POST_GELU,
    QKV,
    assert_untouched,
    bits,
    changes,
    layer_of,
    lora_file,
    outputs,
    pair,
    with_lora,
)
from intlora_runs import OTHER, STYLE, adapter_path, apply, converted, handmade, on, refused
from nibble.nodes import intlora as nodes
from nibble.nodes.bridge.intlora import charts, files
from nibble.nodes.bridge.intlora.bases import Bases
from nibble.nodes.bridge.intlora.convert import ConvertJob, convert_lora
from nibble.nodes.bridge.quantized import loading
from nibble.quant.files.errors import FileRefused
from nibble.quant.intlora import file
from nibble.quant.intlora.merge import change
from nibble.quant.intlora.variants import Mul, Shift
from nibble.quant.merge.integer_grid import IntBase


@pytest.fixture
def loras(tmp_path, monkeypatch, model):
    """ComfyUI's LoRA folder, with two LoRAs of the model in it; the IntLoRA folder beside it is
    empty.
    """
    for kind in (files.LORAS, files.FOLDER):
        (tmp_path / kind).mkdir()
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], {".safetensors"})
        )
        folder_paths.filename_list_cache.pop(kind, None)
    save_file(lora_file(model), tmp_path / files.LORAS / STYLE)
    save_file(lora_file(model, seed=40), tmp_path / files.LORAS / OTHER)
    yield tmp_path / files.LORAS
    for kind in (files.LORAS, files.FOLDER):
        folder_paths.filename_list_cache.pop(kind, None)


# ---- convert


def test_a_lora_is_converted_with_its_parts_of_fused_layers_and_reported(model, loras):
    done = convert_lora(ConvertJob(model, STYLE))
    assert done.name == "style.intlora.safetensors"
    assert done.name in files.adapter_files()
    assert STYLE in files.ordinary_files()
    adapter = file.read(adapter_path(loras, done.name))
    assert adapter.layers.keys() == {MLP, POST_GELU, MODULATION, f"{QKV}@128-256"}
    assert not done.left_out
    assert all(row.retention > 0.975 for row in done.conversion.rows)
    chart = charts.conversion_chart(done, STYLE)
    assert chart["kind"] == "kept"
    assert {row["action"] for row in chart["rows"]} == {"w4a4", "w4a16"}
    assert all(
        row["kept"] > 0.975 > row["nearest"] and "k = " in row["why"] for row in chart["rows"]
    )
    assert chart["summary"][0][1].startswith("9")


@pytest.mark.parametrize("kind", ["dora", "loha"])
def test_other_kinds_of_lora_are_converted_too(model, loras, kind):
    (up, down), (up2, down2) = (
        pair(*layer_of(model, MLP).weight.shape),
        pair(*layer_of(model, MLP).weight.shape, rank=2, seed=5),
    )
    stem = "lora_unet_" + MLP.replace(".", "_")
    tensors = {
        "dora": {
            f"{stem}.lora_up.weight": up,
            f"{stem}.lora_down.weight": down,
            f"{stem}.dora_scale": torch.rand(up.shape[0], 1) + 0.5,
        },
        "loha": {
            f"{stem}.hada_w1_a": up[:, :2].contiguous(),
            f"{stem}.hada_w1_b": down[:2].contiguous(),
            f"{stem}.hada_w2_a": up2,
            f"{stem}.hada_w2_b": down2,
        },
    }[kind]
    save_file(tensors, loras / STYLE)
    before, stock = on(model), on(with_lora(model, tensors, 1.0))
    after = on(model, apply(model, converted(model), 1.0))
    wanted = stock[MLP][1] - before[MLP][1]
    # stock patches see the inputs as they are, integers see them in the layer's bits
    share = 0.03 if layer_of(model, MLP).weight.params.act_bits == 8 else 0.1
    assert (after[MLP][1] - stock[MLP][1]).norm() < share * wanted.norm()


def test_a_given_k_is_used_and_names_are_kept(model, loras):
    name = converted(model, k=3, filename="mine.safetensors")
    assert name == "mine.intlora.safetensors"
    assert {layer.rule.k for layer in file.read(adapter_path(loras, name)).layers.values()} == {3}
    written = adapter_path(loras, name).stat().st_mtime_ns
    assert converted(model, k=3, filename="mine") == name, "it is there already"
    assert adapter_path(loras, name).stat().st_mtime_ns == written, "it is there already"
    with pytest.raises(FileRefused, match="exists already; switch 'overwrite' on"):
        converted(model, filename="mine")
    assert converted(model, filename="mine", overwrite=True) == name
    with pytest.raises(FileRefused, match="leads out of the folder"):
        converted(model, filename="../mine")


# ---- apply


@pytest.mark.parametrize("strength", [0.8, -0.5])
def test_it_changes_what_the_stock_lora_changes_within_the_share_that_was_kept(
    model, loras, strength
):
    before = on(model)
    after = on(apply(model, converted(model), strength))
    for name, delta in changes(lora_file(model), strength).items():
        x, y = before[name]
        assert (after[name][1] - y - x @ delta.T).norm() < 0.03 * (x @ delta.T).norm(), name


def test_in_branch_mode_it_lies_in_the_low_rank_branch(model, loras):
    comfy.model_management.load_models_gpu([model])
    base = layer_of(model, MLP).weight
    on(apply(model, converted(model), 1.0))
    patched = layer_of(model, MLP).weight
    assert torch.equal(patched._qdata, base._qdata)
    assert patched.params.delta is None
    assert patched.params.proj_up.shape[1] == base.params.proj_up.shape[1] + 16


def test_strength_zero_is_the_base_bit_for_bit(model, loras):
    before = on(model)
    patched = apply(model, converted(model), 0.0)
    assert not patched.patches
    assert all(torch.equal(y, before[name][1]) for name, (_, y) in on(patched).items())


def test_taken_off_the_base_is_back_bit_for_bit(model, loras):
    comfy.model_management.load_models_gpu([model])
    before = bits(model)
    patched = apply(model, converted(model), 1.0)
    assert not model.patches
    assert not model.attachments
    assert_untouched(model, before)
    for _ in range(2):
        on(patched)
        on(model)
        assert_untouched(model, before)


def test_two_add_up_and_a_stock_lora_joins_them(model, loras):
    before, first, second = on(model), converted(model), converted(model, OTHER)
    after = on(with_lora(apply(apply(model, first, 0.5), second, 0.3), lora_file(model), 0.5))
    one, two = changes(lora_file(model), 1.0), changes(lora_file(model, seed=40), 0.3)
    for name in one:
        x, y = before[name]
        wanted = x @ (one[name] + two[name]).T
        assert (after[name][1] - y - wanted).norm() < 0.03 * wanted.norm(), name


def test_partly_loaded_it_runs_beside_the_layer(model, loras):
    model.patch_model(model.load_device, lowvram_model_memory=1)
    before = outputs(model)
    model.detach()
    patched = apply(model, converted(model), 0.8)
    patched.patch_model(patched.load_device, lowvram_model_memory=1)
    assert layer_of(model, MLP).weight_function, "the patch is attached, not merged"
    after = outputs(model)
    for name, delta in changes(lora_file(model), 0.8).items():
        x, y = before[name]
        assert (after[name][1] - y - x @ delta.T).norm() < 0.03 * (x @ delta.T).norm(), name
    patched.detach()


@pytest.mark.parametrize("rule", [Mul.anchored, Shift.fitting])
def test_mul_and_shift_are_applied_densely_and_not_twice(model, loras, rule):
    before, name = on(model), handmade(model, loras, rule, "trained.intlora.safetensors")
    patched = apply(model, name, 1.0)
    dense = change(Bases(model)[MLP], [(file.read(adapter_path(loras, name)).layers[MLP], 1.0)])
    x, y = before[MLP]
    assert ((on(patched)[MLP][1] - y) - x @ dense.T).norm() < 6e-3 * (x @ dense.T).norm()
    with pytest.raises(
        FileRefused,
        match=r"multiplies the integers of double_blocks.0.img_mlp.0, and so does trained",
    ):
        apply(patched, name, 0.5)
    apply(patched, converted(model), 0.5)


def test_it_fits_a_patched_model_too(model, loras):
    name = converted(model)
    patched = with_lora(model, lora_file(model, seed=40))
    comfy.model_management.load_models_gpu([patched])
    assert converted(patched, filename="again")
    assert apply(patched, name, 1.0).patches


# ---- refused


def test_another_4_bit_file_is_refused(model, rotated_file, loras):
    name, other = converted(model), loading.load(rotated_file)
    refused(
        other,
        "was made for another 4-bit file than the connected model",
        lambda: apply(other, name, 1.0),
    )


def test_a_model_without_integers_is_refused(dense_model, model, loras):
    name = converted(model)
    for work in (lambda: apply(dense_model, name, 1.0), lambda: converted(dense_model)):
        refused(
            dense_model,
            "The connected model is in 16 bits and has no integers for an IntLoRA; connect Load"
            " SVDQuant Model",
            work,
        )


def test_an_ordinary_lora_and_no_lora_are_refused(model, loras):
    refused(
        model,
        "is an ordinary LoRA; use Load LoRA, or Convert LoRA to IntLoRA",
        lambda: apply(model, STYLE, 1.0),
    )
    save_file({"a": torch.zeros(1)}, loras / "odd.safetensors")
    refused(model, "is no IntLoRA adapter", lambda: apply(model, "odd.safetensors", 1.0))
    refused(
        model,
        "not in ComfyUI's intlora folder; put it there",
        lambda: apply(model, "gone.safetensors", 1.0),
    )
    name = converted(model)
    (loras / name).write_bytes(adapter_path(loras, name).read_bytes())
    folder_paths.filename_list_cache.pop(files.LORAS, None)
    refused(
        model,
        "is an IntLoRA already; use Apply IntLoRA",
        lambda: converted(model, name, filename="x"),
    )


def test_a_lora_of_another_model_is_refused_and_nothing_is_written(model, loras):
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"  # SDXL
    save_file(
        {
            f"{stem}.lora_up.weight": torch.ones(640, 4),
            f"{stem}.lora_down.weight": torch.ones(4, 640),
        },
        loras / "sdxl.safetensors",
    )
    refused(
        model,
        "sdxl.safetensors has no key that this model .Flux. knows, such as"
        " lora_unet_input_blocks_4",
        lambda: converted(model, "sdxl.safetensors"),
    )
    stem = "lora_unet_" + MLP.replace(".", "_")
    save_file(
        {
            f"{stem}.lora_up.weight": torch.ones(640, 4),
            f"{stem}.lora_down.weight": torch.ones(4, 640),
        },
        loras / "wide.safetensors",
    )
    refused(
        model,
        "made for another model: it changes .* as 640 x 640, this model has 512 x 128",
        lambda: converted(model, "wide.safetensors"),
    )
    (loras / "cut.safetensors").write_bytes((loras / STYLE).read_bytes()[:-100])
    refused(
        model,
        "cut.safetensors cannot be read .* it is no LoRA",
        lambda: converted(model, "cut.safetensors"),
    )
    assert not files.adapter_files()


def test_what_is_not_in_4_bits_is_left_out_and_said(model, loras):
    up, down = pair(*layer_of(model, "img_in").weight.shape)
    extra = {"lora_unet_img_in.lora_up.weight": up, "lora_unet_img_in.lora_down.weight": down}
    save_file(lora_file(model) | extra, loras / STYLE)
    done = convert_lora(ConvertJob(model, STYLE))
    assert done.left_out == ["img_in.weight"]
    assert "left out" in dict(charts.conversion_chart(done, STYLE)["summary"])


# ---- nodes


def test_its_files_are_kept_from_the_stock_loader_and_found_in_both_folders(model, loras):
    name = converted(model)
    assert name not in folder_paths.get_filename_list(files.LORAS), (
        "Load LoRA would do nothing with it"
    )
    adapter_path(loras, name).rename(loras / name)
    for kind in (files.LORAS, files.FOLDER):
        folder_paths.filename_list_cache.pop(kind, None)
    assert files.adapter_files() == [name]
    assert files.path_of(name) == loras / name
    assert name not in files.ordinary_files()


def test_layers_are_hashed_once_for_as_long_as_they_live(model, loras, monkeypatch):
    name, counted = converted(model), []
    digest = IntBase.digest
    monkeypatch.setattr(IntBase, "digest", lambda base: counted.append(1) or digest(base))
    for model_again in (model, apply(model, name, 1.0), model):
        apply(model_again, name, 0.5)
    assert len(counted) == len(file.read(adapter_path(loras, name)).layers)


def test_the_nodes_do_the_work(model, loras, monkeypatch):
    for node in nodes.NODES:
        assert node.define_schema().node_id == node.__name__
    assert nodes.NibbleApplyIntLoRA.validate_inputs("gone.safetensors").startswith(
        "gone.safetensors is not in"
    )
    for node in nodes.NODES:
        monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id=None), raising=False)
    made = nodes.NibbleConvertIntLoRA.execute(model, STYLE, 0.02, "", False, -1)
    name = made.result[0]
    assert made.ui["nibble_chart"][0]["title"] == name
    assert nodes.NibbleApplyIntLoRA.execute(model, name, 1.0, "branch").result[0].patches
    assert nodes.NibbleApplyIntLoRA.validate_inputs(name) is True
    stamped = nodes.NibbleConvertIntLoRA.fingerprint_inputs(lora_name=STYLE, filename="")
    assert files.stamp(STYLE) in stamped
