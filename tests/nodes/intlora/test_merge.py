"""Merged in memory or into a file, a LoRA is what it was beside the layers, as far as the report
says; base, model and files stay as they were.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management
import folder_paths
import pytest
import torch
from safetensors.torch import save_file

from flux_loras import (
    MLP,
    MODULATION,
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
from intlora_runs import OTHER, adapter_path, apply, converted, handmade, on, refused
from nibble.nodes import intlora as nodes
from nibble.nodes.bridge.intlora import charts, fold, merge, save
from nibble.nodes.bridge.intlora.bases import Bases
from nibble.nodes.bridge.quantized import layouts, loading
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.files.errors import FileRefused
from nibble.quant.intlora import file
from nibble.quant.intlora.merge import change
from nibble.quant.intlora.variants import Mul, Shift


@pytest.fixture
def home(model, loras, tmp_path, monkeypatch):
    """ComfyUI's model folder, with the base file in it; the model is loaded from there."""
    folder = tmp_path / loading.FOLDER
    folder.mkdir()
    source = Path(model.cached_patcher_init[1][0])
    (folder / source.name).write_bytes(source.read_bytes())
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, loading.FOLDER, ([str(folder)], {".safetensors"})
    )
    folder_paths.filename_list_cache.pop(loading.FOLDER, None)
    yield folder
    folder_paths.filename_list_cache.pop(loading.FOLDER, None)


@pytest.fixture
def based(home):
    """The model, from that folder."""
    return loading.load(next(home.iterdir()))


def weights(patcher) -> dict[str, torch.Tensor]:
    """float32 (N, K) of each 4-bit layer, as raw inputs see it."""
    modules = patcher.model.diffusion_model.named_modules()
    ours = {
        name: module.weight
        for name, module in modules
        if layouts.is_ours(getattr(module, "weight", None))
    }
    return {name: layouts.effective_weight(weight) for name, weight in ours.items()}


def test_merged_in_memory_nothing_is_larger_and_the_base_is_not_touched(model, loras):
    before = bits(model)
    patched, done = merge.apply(model, converted(model), 1.0, "merge")
    assert_untouched(model, before)
    assert not model.patches
    assert patched.model is not model.model
    assert not patched.patches
    one, two = weights(model), weights(patched)
    merged = {row.name: row for row in done.layers}
    assert merged.keys() == {MLP, "double_blocks.0.img_mlp.2", MODULATION, QKV}
    for name in one:
        if name not in merged:
            assert torch.equal(one[name], two[name])
        elif merged[name].action == "w4a4":
            assert merged[name].rank == layer_of(model, name).weight.params.proj_up.shape[1]
            assert merged[name].bytes_before == merged[name].bytes_after
    assert merged[MODULATION].retention > 0.99
    assert all(row.retention > 0.3 for row in done.layers)
    chart = charts.merge_chart(done)
    assert chart["kind"] == "kept"
    assert chart["summary"][0][1].count("%") == 2


def test_it_does_what_the_branch_does_as_far_as_it_says(model, loras):
    name = converted(model)
    patched, done = merge.apply(model, name, 0.8, "merge")
    before, beside = weights(model), changes(lora_file(model), 0.8)
    for row in done.layers:
        delta, lost = beside[row.name], 1 - row.retention
        assert (weights(patched)[row.name] - before[row.name] - delta).norm() < (
            lost * 1.6 + 0.02
        ) * delta.norm(), row


def test_its_outputs_are_those_of_its_weights(model, loras):
    """Unsigned inputs fold a part of the codes into the bias: new codes need a new one."""
    comfy.model_management.load_models_gpu([model])
    # inputs that 4 bits hold, so that nothing hides a wrong bias
    before = outputs(model, exact=True)
    patched = apply(model, converted(model), 1.0, "merge")
    comfy.model_management.load_models_gpu([patched])
    old, new = weights(model), weights(patched)
    for name, (_, y) in outputs(patched, exact=True).items():
        x, was = before[name]
        change = x.float() @ (new[name] - old[name]).T
        assert (y - was - change).norm() < 0.01 * change.norm(), name


@pytest.mark.parametrize("width", ["4 bit", "8 bit"])
def test_layers_compute_with_the_width_that_was_chosen_for_the_model(home, loras, width):
    model = loading.load(next(home.iterdir()), activations=width)
    patched = apply(model, converted(model), 1.0, "merge")
    for name in (QKV, MLP):
        assert layer_of(patched, name).weight.params.act_bits == int(width[0])


def test_strength_zero_and_what_is_not_merged_is_the_base_bit_for_bit(model, loras):
    before = on(model)
    patched, done = merge.apply(model, converted(model), 0.0, "merge")
    assert done is None
    assert all(torch.equal(y, before[name][1]) for name, (_, y) in on(patched).items())


def test_switching_between_them_leaves_both_as_they_are(model, loras):
    patched = apply(model, converted(model), 1.0, "merge")
    one, two = bits(model), bits(patched)
    for _ in range(2):
        on(patched)
        on(model)
        assert_untouched(model, one)
        assert_untouched(patched, two)


def test_a_stack_is_merged_as_a_sum_whatever_the_order(model, loras):
    first, second = converted(model), converted(model, OTHER)
    stacks = [
        apply(apply(model, a, s, "merge"), b, t, "merge")
        for a, s, b, t in ((first, 0.5, second, 0.3), (second, 0.3, first, 0.5))
    ]
    one, two = weights(stacks[0]), weights(stacks[1])
    assert all(torch.equal(one[name], two[name]) for name in one)
    lone = weights(apply(model, first, 0.5, "merge"))
    assert (one[MLP] - lone[MLP]).norm() > 1e-3
    back = weights(apply(apply(model, first, 0.5, "merge"), first, -0.5, "merge"))
    # they cancel before anything is fitted
    torch.testing.assert_close(back, weights(model), rtol=0, atol=1e-6)


def test_patches_and_options_stay_on_a_merged_model(model, loras):
    styled = with_lora(model, lora_file(model, seed=40), 0.5)
    styled.model_options["transformer_options"]["kept"] = True
    patched = apply(styled, converted(model), 0.5, "merge")
    assert patched.patches.keys() == styled.patches.keys()
    assert patched.model_options["transformer_options"]["kept"]
    before, after = on(apply(model, converted(model, filename="again"), 0.5, "merge")), on(patched)
    for name, delta in changes(lora_file(model, seed=40), 0.5).items():
        x, y = before[name]
        assert (after[name][1] - y - x @ delta.T).norm() < 0.03 * (x @ delta.T).norm(), name
    on(apply(patched, converted(model, filename="third"), 0.2))  # beside a merged one


def test_comfyui_s_own_copies_are_merged_too(model, loras):
    patched = apply(model, converted(model), 1.0, "merge")
    factory, arguments = patched.cached_patcher_init[:2]
    again = factory(*arguments, disable_dynamic=True)
    assert_untouched(again, bits(patched))


@pytest.mark.parametrize("rule", [Mul.anchored, Shift.fitting])
def test_mul_and_shift_are_merged_as_near_as_the_layer_allows(model, loras, rule):
    name = handmade(model, loras, rule, "trained.intlora.safetensors")
    patched, done = merge.apply(model, name, 1.0, "merge")
    wanted = change(Bases(model)[MLP], [(file.read(adapter_path(loras, name)).layers[MLP], 1.0)])
    got = weights(patched)[MLP] - weights(model)[MLP]
    assert [row.name for row in done.layers] == [MLP]
    assert done.layers[0].retention > 0.2
    assert (got - wanted).norm() < (1 - done.layers[0].retention) * 1.6 * wanted.norm()
    refused(
        patched,
        "multiplies the integers of double_blocks.0.img_mlp.0, and so does trained",
        lambda: apply(patched, name, 0.5, "merge"),
    )


# ---- into a file


def saved(patcher, **options) -> fold.MergeReport:
    return save.save_merged(save.SaveJob(patcher, **options))


def reloaded(home, done) -> "loading.ModelPatcher":
    return loading.load(home / done.name)


@pytest.mark.parametrize("how", fold.BRANCHES)
def test_a_saved_merge_is_the_model_that_was_merged(based, home, how):
    base = (source := next(home.iterdir())).read_bytes()
    before, lora = on(based), lora_file(based)
    done = saved(with_lora(apply(based, converted(based), 0.5), lora, 0.3), branch=how)
    assert done.name == f"{source.stem}-merged.safetensors"
    assert source.read_bytes() == base
    assert not list(home.glob("*.partial*"))
    again, old = weights(reloaded(home, done)), weights(based)
    rows = {row.name: row for row in done.layers}
    for name, delta in changes(lora, 0.8).items():
        limit = (
            0.02
            if how == "wider" or name == MODULATION
            else (1 - rows[name].retention) * 1.6 + 0.02
        )
        assert (again[name] - old[name] - delta).norm() < limit * delta.norm(), name
    assert all(torch.equal(again[name], weight) for name, weight in old.items() if name not in rows)
    assert all(y.isfinite().all() for _, y in on(reloaded(home, done)).values())
    assert before
    codes = [
        torch.equal(
            layouts.unpack(layer_of(reloaded(home, done), name).weight).qweight,
            layouts.unpack(layer_of(based, name).weight).qweight,
        )
        for name, row in rows.items()
        if row.action == "w4a4"
    ]
    assert all(codes) if how == "wider" else not any(codes)


def test_same_size_in_a_file_is_what_merging_in_memory_gives_bit_for_bit(based, home):
    patched = apply(based, converted(based), 0.7, "merge")
    done = saved(patched, branch="same size")
    again, merged = bits(reloaded(home, done)), bits(patched)
    assert [name for name in merged if not torch.equal(again[name], merged[name])] == []


def test_the_file_says_what_is_in_it_and_a_second_run_is_done_at_once(based, home):
    name = converted(based)
    patched = apply(based, name, 0.7, "merge")
    done = saved(with_lora(patched, lora_file(based, seed=40), 0.5))
    opened = open_quantized(home / done.name)
    opened.verify()
    (entry,) = opened.fact("merged")
    assert entry["intlora"][0] == entry["intlora"][0] | {"name": name, "strength": 0.7}
    assert len(entry["intlora"][0]["sha256"]) == 64
    assert entry["patches"]["layers"] == 4
    assert opened.fact("source")
    assert any("merged" in row["why"] for row in opened.fact("report")["rows"])
    written = (home / done.name).stat().st_mtime_ns
    again = saved(with_lora(patched, lora_file(based, seed=40), 0.5))
    assert again == replace(done, layers=[replace(row, seconds=0.0) for row in done.layers])
    assert (home / done.name).stat().st_mtime_ns == written
    with pytest.raises(FileRefused, match="exists already; switch 'overwrite' on"):
        saved(with_lora(patched, lora_file(based, seed=40), 0.4))
    saved(with_lora(patched, lora_file(based, seed=40), 0.4), overwrite=True)
    more = reloaded(
        home, saved(with_lora(reloaded(home, done), lora_file(based), 0.1), filename="twice")
    )
    assert len(open_quantized(home / "twice.safetensors").fact("merged")) == 2
    assert weights(more)


def test_an_interrupted_run_goes_on_and_ends_in_the_same_file(based, home, monkeypatch):
    patched = with_lora(based, lora_file(based), 1.0)
    whole, made = (home / saved(patched, filename="whole").name).read_bytes(), []

    class Stop(Exception):
        pass

    make = save._EditedLayer.make

    def counted(layer):
        made.append(layer.name)
        if len(made) == 3:
            raise Stop
        return make(layer)

    monkeypatch.setattr(save._EditedLayer, "make", counted)
    with pytest.raises(Stop):
        saved(patched, filename="parts")
    assert not (home / "parts.safetensors").exists()
    saved(patched, filename="parts")
    assert len(made) == 5, "four layers; the third was begun twice"
    assert (home / "parts.safetensors").read_bytes() == whole, (
        "four layers; the third was begun twice"
    )


def test_other_patches_are_merged_as_comfyui_would(based, home):
    (up, down), (up2, down2) = (
        pair(*layer_of(based, MLP).weight.shape),
        pair(*layer_of(based, MLP).weight.shape, rank=2, seed=5),
    )
    stem = "lora_unet_" + MLP.replace(".", "_")
    kinds = {
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
        "diff": {
            f"{stem}.diff": torch.randn(up.shape[0], down.shape[1]) * 0.01,
            f"{stem}.diff_b": torch.randn(up.shape[0]) * 0.1,
        },
    }
    old = weights(based)[MLP]
    for kind, tensors in kinds.items():
        patched = with_lora(based, tensors, 1.0)
        entries = patched.patches[f"diffusion_model.{MLP}.weight"]
        wanted = fold.comfy.lora.calculate_weight(entries, old.clone(), "x")
        done = saved(patched, filename=kind)
        got = weights(reloaded(home, done))[MLP]
        kept_here = next(row.retention for row in done.layers if row.name == MLP)
        assert (got - wanted).norm() < ((1 - kept_here) * 1.6 + 0.03) * (wanted - old).norm(), kind
        assert kept_here > (0.5 if kind == "diff" else 0.98), kind
    real = [
        layouts.unpack(layer_of(m, MLP).weight, layer_of(m, MLP).bias).effective_bias()
        for m in (reloaded(home, done), based)
    ]
    torch.testing.assert_close(
        real[0] - real[1], kinds["diff"][f"{stem}.diff_b"], rtol=0.05, atol=0.01
    )


def test_16_bit_tensors_are_written_with_their_patches_and_unknown_ones_are_told(based, home):
    up, down = pair(*layer_of(based, "img_in").weight.shape)
    patched = with_lora(
        based,
        {"lora_unet_img_in.lora_up.weight": up, "lora_unet_img_in.lora_down.weight": down},
        1.0,
    )
    patched.patches["diffusion_model.gone.weight"] = [
        (1.0, ("diff", (torch.zeros(1),)), 1.0, None, None)
    ]
    done = saved(patched)
    got = (
        layer_of(reloaded(home, done), "img_in").weight.float()
        - layer_of(based, "img_in").weight.float()
    )
    assert (got - up @ down).norm() < 0.02 * (up @ down).norm()
    assert done.left_out == ("gone.weight",)
    assert "left out" in dict(charts.merge_chart(done)["summary"])


# ---- refused


def test_what_cannot_be_merged_is_refused(based, dense_model, home, loras):
    refused(based, "has no LoRA on it, so there is nothing to merge", lambda: saved(based))
    name = converted(based)
    with pytest.raises(FileRefused, match="does not come from Load SVDQuant Model"):
        saved(dense_model)
    with pytest.raises(FileRefused, match="has no integers for an IntLoRA"):
        merge.apply(dense_model, name, 1.0, "merge")
    patched = apply(based, name, 1.0)
    with pytest.raises(FileRefused, match="leads out of the folder"):
        saved(patched, filename="../escaped")
    base = next(home.iterdir())
    with pytest.raises(FileRefused, match="is the file that would be read; choose another name"):
        saved(patched, filename=base.name, overwrite=True)
    save_file({"a": torch.zeros(1)}, home / "odd.safetensors")
    with pytest.raises(FileRefused, match="exists and was not made by Nibble"):
        saved(patched, filename="odd", overwrite=True)
    assert {path.name for path in home.iterdir()} == {base.name, "odd.safetensors"}


def test_a_base_that_changed_on_disk_is_refused(based, home, rotated_file):
    name, path = converted(based), next(home.iterdir())
    path.write_bytes(rotated_file.read_bytes())
    with pytest.raises(FileRefused, match="was made for another 4-bit file than"):
        merge.apply(based, name, 1.0, "merge")


def test_the_nodes_do_the_work(based, home, monkeypatch):
    for node in nodes.NODES:
        monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id=None), raising=False)
    name = converted(based)
    applied = nodes.NibbleApplyIntLoRA.execute(based, name, 1.0, "merge")
    assert applied.ui["nibble_chart"][0]["kind"] == "kept"
    made = nodes.NibbleMergeIntLoRA.execute(applied.result[0], "made", "wider", False)
    assert made.result[0] == "made.safetensors" in loading.quantized_files()
    assert made.ui["nibble_chart"][0]["title"] == "made.safetensors"
    assert nodes.NibbleApplyIntLoRA.execute(based, name, 1.0, "branch").ui is None
    comfy.model_management.load_models_gpu([loading.load(home / "made.safetensors")])
    assert outputs(loading.load(home / "made.safetensors"))
