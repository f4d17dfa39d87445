"""The LoRA report: every layer named with how it is computed, and the figures true of what then
runs.
"""

import pytest
import torch

from adapter_tensors import NAME, STEM, layer, normal, tensors_of, whole_load, with_file
from nibble.nodes.bridge.quantized import lora, lora_report


def rows_of(model) -> dict[str, dict]:
    return {row["name"]: row for row in lora_report.lora_chart(model)["rows"]}


@pytest.mark.parametrize(
    "kind, how",
    {
        "lora": "branch",
        "loha": "branch",
        "lokr": "branch",
        "dora lora": "rows",
        "oft": "dense",
    }.items(),
)
def test_what_it_tells_is_what_the_layer_then_holds(model, kind, how):
    patched = with_file(model, tensors_of(kind, *layer(model).weight.shape))
    row, before = (
        rows_of(patched)[NAME],
        sum(tensor.nbytes for tensor in layer(model).state_dict().values()),
    )
    assert row["how"] == how
    whole_load(patched)
    params = layer(model).weight.params
    held = sum(tensor.nbytes for tensor in layer(model).state_dict().values())
    if how == "dense":
        assert (params.delta is None) == (params.proj_up.shape[1] > 16)
        assert held - before <= row["bytes"]
        return
    up = params.proj_up[:, 16:] if how == "branch" else params.side_up
    assert int(up.any(0).sum()) == row["rank"]
    assert held - before == row["bytes"]
    assert (params.row_scale is not None) == (how == "rows")


def test_a_loss_is_told_and_none_is_called_exact(model):
    first, second = torch.diag(torch.tensor([1.0, 1e-3])), normal(256, 1) @ normal(1, 64)
    kron = {f"{STEM}.lokr_w1": first, f"{STEM}.lokr_w2": second}
    row = rows_of(with_file(model, kron))[NAME]
    assert row["rank"] == 1
    assert row["lost"] == pytest.approx(1e-6, rel=1e-2)
    assert "leave out 1e-06" in row["why"]
    chart = lora_report.lora_chart(with_file(model, kron))
    assert dict(map(tuple, chart["summary"]))["left out"] == "at most 60 dB below the change"
    assert (
        "exact to 16 bits"
        in rows_of(with_file(model, tensors_of("lora", *layer(model).weight.shape)))[NAME]["why"]
    )


def test_a_stack_adds_up(model):
    shape = layer(model).weight.shape
    once = with_file(model, tensors_of("lora", *shape))
    assert rows_of(with_file(once, tensors_of("lora", *shape, seed=1)))[NAME]["rank"] == 8


def test_layers_in_16_bit_are_comfyui_s(model):
    tensors = tensors_of("lora", *layer(model, "img_in").weight.shape, stem="lora_unet_img_in")
    chart = lora_report.lora_chart(with_file(model, tensors))
    assert chart["rows"][0]["how"] == "comfyui"
    assert ["result", "No 4-bit layer is changed."] in chart["summary"]


def test_what_does_not_fit_is_named(model):
    chart = lora_report.lora_chart(with_file(model, tensors_of("lora", 64, 256)))
    assert chart["rows"][0]["how"] == "refused"
    assert "made for another model" in dict(map(tuple, chart["summary"]))["refused"]
    broken = tensors_of("lora", *layer(model).weight.shape)
    broken[f"{STEM}.lora_up.weight"][0] = float("nan")
    assert "not finite" in lora_report.lora_chart(with_file(model, broken))["rows"][0]["why"]


def test_a_model_without_loras_says_that_none_reaches_it(model, dense_model):
    for patcher in (
        model,
        with_file(
            model, tensors_of("lora", 640, 640, stem="lora_unet_down_blocks_1_attentions_0_proj_in")
        ),
    ):
        chart = lora_report.lora_chart(patcher)
        assert not chart["rows"]
        assert "none of its keys fit" in chart["summary"][0][1]
    assert lora_report.lora_chart(dense_model)["subtitle"].endswith("0 layers in 4 bits")


def test_reporting_changes_nothing(model):
    patched = with_file(model, tensors_of("dora lora", *layer(model).weight.shape))
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    lora_report.lora_chart(patched)
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items()
    )
    assert lora.WRAPPER in str(patched.wrappers)
