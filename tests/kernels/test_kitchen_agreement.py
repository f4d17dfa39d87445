"""comfy-kitchen's own eager code as an independent oracle: the same tensors, through their ops and
through ours.
"""

import pytest
import torch

from cases import SMALL, make_input, make_w4a4, make_w4a16, options
from compare import relative_error, sqnr_db
from nibble.kernels import SHIFT, ops
from nibble.kernels.backends import kitchen
from nibble.kernels.params import W4A4Params, W4A16Params

comfy_kitchen = pytest.importorskip(
    "comfy_kitchen",
    reason="comfy_kitchen is not installed: its answers cannot be compared with ours",
)
from comfy_kitchen.tensor import QuantizedTensor  # noqa: E402
from comfy_kitchen.tensor.awq_w4a16 import TensorCoreAWQW4A16Layout  # noqa: E402
from comfy_kitchen.tensor.svdquant_w4a4 import TensorCoreSVDQuantW4A4Layout  # noqa: E402

FLOAT32_ROUNDING = 2e-6
BFLOAT16_ROUNDING = 8e-3
SHARED = [case for case in SMALL if not case.rotation]


@pytest.fixture(autouse=True)
def eager():
    with comfy_kitchen.use_backend("eager"):
        yield


def their_activations(case, dtype, parameters):
    x = make_input(case, dtype)
    main = x + SHIFT if case.act_unsigned else x
    return x, comfy_kitchen.quantize_svdquant_w4a4(
        main,
        smooth=parameters["smooth_factor"],
        lora_down=parameters["proj_down"],
        act_unsigned=case.act_unsigned,
        lora_x=x,
    )


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_quantize_down_gives_their_codes_and_scales_cut_back_to_m(case):
    parameters = make_w4a4(case, torch.float32)
    x, (q, ascales, h) = their_activations(case, torch.float32, parameters)
    ours = ops.quantize_down(
        x, parameters["smooth_factor"], parameters["proj_down"], **options(case)
    )
    assert len(q) % 256 == 0 and torch.equal(ours[0], q[: case.M])
    assert torch.equal(ours[1], ascales[:, : case.M])
    torch.testing.assert_close(ours[2], h[: case.M])


@pytest.mark.parametrize("case", SHARED, ids=str)
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, FLOAT32_ROUNDING), (torch.bfloat16, BFLOAT16_ROUNDING)],
    ids=str,
)
def test_gemm_w4a4_up_gives_their_product_on_their_codes(case, dtype, rounding):
    parameters = make_w4a4(case, dtype)
    _, (q, ascales, h) = their_activations(case, dtype, parameters)
    weight, scale, up, bias = (
        parameters[name] for name in ("weight", "weight_scale", "proj_up", "bias")
    )
    theirs = comfy_kitchen.scaled_mm_svdquant_w4a4(
        q, weight, ascales, scale, h, up, bias, case.act_unsigned
    )
    ours = ops.gemm_w4a4_up(
        q, ascales, h, weight, scale, up, bias, case.act_unsigned, out_dtype=dtype
    )
    assert ours.dtype == theirs.dtype == dtype
    assert relative_error(ours, theirs) < rounding


def their_layer(case, dtype, parameters):
    """Our parameters under comfy-kitchen's quantized tensor, as ComfyUI would hold them."""
    params = TensorCoreSVDQuantW4A4Layout.Params(
        scale=parameters["weight_scale"],
        orig_dtype=dtype,
        orig_shape=(case.N, case.K),
        proj_down=parameters["proj_down"],
        proj_up=parameters["proj_up"],
        smooth_factor=parameters["smooth_factor"],
        act_unsigned=case.act_unsigned,
    )
    return QuantizedTensor(parameters["weight"], "TensorCoreSVDQuantW4A4Layout", params)


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_our_layer_gives_the_same_through_their_layout_in_float32(case):
    parameters = make_w4a4(case, torch.float32)
    x = make_input(case)[None]
    theirs = torch.nn.functional.linear(
        x, their_layer(case, torch.float32, parameters), parameters["bias"]
    )
    assert (
        relative_error(ops.linear_w4a4(x, **parameters, **options(case)), theirs) < FLOAT32_ROUNDING
    )


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_our_layer_gives_the_same_through_their_layout_in_bfloat16(case):
    parameters = make_w4a4(case, torch.bfloat16)
    x = make_input(case, torch.bfloat16)
    theirs = torch.nn.functional.linear(
        x, their_layer(case, torch.bfloat16, parameters), parameters["bias"]
    )
    # They smooth, scale and round in bfloat16, we in float32: a code that lies near a half then
    # differs by one step.
    # That stays far below the noise of 4 bits (about 17 dB here).
    assert sqnr_db(ops.linear_w4a4(x, **parameters, **options(case)), theirs) > 27


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_way_through_their_ops_agrees_with_the_reference(case):
    if not case.R:
        pytest.skip("rank 0 never goes through comfy_kitchen")
    parameters = make_w4a4(case, torch.float32)
    x = make_input(case)
    theirs = kitchen.linear_w4a4(x, W4A4Params(**parameters, **options(case)))
    assert (
        relative_error(theirs, ops.linear_w4a4(x, **parameters, **options(case))) < FLOAT32_ROUNDING
    )


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, FLOAT32_ROUNDING), (torch.bfloat16, BFLOAT16_ROUNDING)],
    ids=str,
)
def test_w4a16_gives_their_answer(case, dtype, rounding):
    x, parameters = make_input(case, dtype), make_w4a16(case, dtype)
    scale, zeros = parameters["weight_scale"], parameters["weight_zeros"]
    params = TensorCoreAWQW4A16Layout.Params(
        scale=scale,
        zeros=torch.zeros_like(scale) if zeros is None else zeros,
        orig_dtype=dtype,
        orig_shape=(case.N, case.K),
    )
    theirs = torch.nn.functional.linear(
        x,
        QuantizedTensor(parameters["weight"], "TensorCoreAWQW4A16Layout", params),
        parameters["bias"],
    )
    assert relative_error(ops.linear_w4a16(x, **parameters), theirs) < rounding
    assert relative_error(kitchen.gemv_w4a16(x, W4A16Params(**parameters)), theirs) < rounding
