"""The Hopper product's source, run on the CPU: wgmma, mbarriers and the copy engine as the PTX
manual describes them.

The emulator has four multiprocessors, so small shapes already choose among the three tiles (256 x
128, 128 x 128, 128 x 64 weight rows by tokens), and blocks take more than one.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cases import SMALL, Case, make_input, make_w4a4, plain_w4a4
from compare import assert_same, assert_twice_plain
from nibble.kernels import reference
from nibble.quant.weights.packing import pack_int4, unpack_int4

HOPPER = 90
INT8 = 2

TILES = [
    Case("tile_256x128", 200, 192, 300, R=40),
    Case("tile_256x128_twice_one_group", 130, 64, 1001, R=8, act_unsigned=True),
    Case("tile_256x128_rank_160", 129, 128, 500, R=160),
    Case("tile_128x128", 200, 320, 136, R=32, act_unsigned=True),
    Case("tile_128x64", 64, 704, 256, R=32),
]


def make_operands(case: Case, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor | None]:
    """Every code at every place, scales of both signs, under the reference's argument names."""
    generator = torch.Generator().manual_seed(seed)
    parameters = make_w4a4(case, dtype, seed + 1)
    del parameters["smooth_factor"], parameters["proj_down"]
    signs = 1 - 2 * torch.randint(0, 2, parameters["weight_scale"].shape, generator=generator)
    parameters["weight_scale"] = parameters["weight_scale"] * signs.to(dtype)
    low, high = (0, 16) if case.act_unsigned else (-7, 8)
    return parameters | {
        "q": pack_int4(
            torch.randint(low, high, (case.M, case.K), generator=generator, dtype=torch.int8)
        ),
        "ascales": torch.rand(case.K // 64, case.M, generator=generator) + 0.01,
        "h": torch.randn(case.M, case.R, generator=generator),
    }


def widen(q: Tensor, unsigned: bool) -> Tensor:
    """Codes::e4m3: of every 8 columns, the first four lie in the lower half of a block of 32 bytes,
    the last four in the upper.
    """
    codes = unpack_int4(q, not unsigned)
    m, k = codes.shape
    return (
        codes.view(m, k // 32, 4, 2, 4)
        .transpose(2, 3)
        .reshape(m, k)
        .float()
        .to(torch.float8_e4m3fn)
        .view(torch.int8)
    )


def product(
    emulated,
    operands: dict[str, Tensor | None],
    unsigned: bool,
    out_dtype: torch.dtype,
    wide: bool = True,
    form: int = 0,
) -> Tensor:
    """`wide`: packed codes are widened first; otherwise they are given as they are, in `form`."""
    if wide:
        operands, form = operands | {"q": widen(operands["q"], unsigned)}, emulated.E4M3
    return emulated.gemm_w4a4_up(
        **operands, act_unsigned=unsigned, out_dtype=out_dtype, capability=HOPPER, form=form
    )


def truth(operands: dict[str, Tensor | None], unsigned: bool) -> Tensor:
    exact = {
        name: tensor.double() if tensor is not None and tensor.is_floating_point() else tensor
        for name, tensor in operands.items()
    }
    return reference.gemm_w4a4_up(**exact, act_unsigned=unsigned)


@pytest.mark.parametrize("case", [*SMALL, *TILES], ids=str)
@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_error_is_at_most_twice_that_of_plain_torch(emulated, case, dtype, out_dtype):
    operands = make_operands(case, dtype)
    ours = product(emulated, operands, case.act_unsigned, out_dtype)
    parameters = {name: operands[name] for name in ("weight", "weight_scale", "proj_up", "bias")}
    plain = plain_w4a4(
        operands["q"], operands["ascales"], operands["h"], parameters, case.act_unsigned, out_dtype
    )
    assert_twice_plain(ours, truth(operands, case.act_unsigned), plain)


@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
def test_group_sums_are_exact(emulated, unsigned):
    """The largest sums that there are, and scales of one: the result is an integer and has to be
    that integer.
    """
    case = Case("extreme", 17, 192, 130, R=0, bias=False, act_unsigned=unsigned)
    operands = make_operands(case, torch.bfloat16)
    operands["q"][:8] = -1 if unsigned else 0x77  # codes 15, or 7
    operands["weight"][:64] = -120  # codes -8
    operands["ascales"], operands["weight_scale"] = (
        torch.ones_like(operands["ascales"]),
        torch.ones_like(operands["weight_scale"]),
    )
    assert_same(
        product(emulated, operands, unsigned, torch.float32), truth(operands, unsigned).float()
    )


@pytest.mark.parametrize("case", TILES, ids=str)
def test_activations_of_8_bits_are_exact_in_every_tile_and_order_of_warps(emulated, case):
    """Scales are powers of two of either sign, so the result is known to the last bit."""
    generator = torch.Generator().manual_seed(7)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    m, k, n = case.M, case.K, case.N
    q, weight = whole(-127, 128, m, k), whole(-8, 8, n, k)
    ascales = 2.0 ** whole(0, 3, k // 64, m)
    weight_scale = 2.0 ** whole(-1, 1, k // 64, n) * (1 - 2 * whole(0, 2, k // 64, n))
    given = (q.to(torch.int8), ascales, torch.zeros(m, 0), pack_int4(weight.to(torch.int8)))
    scaled = q.double() * ascales.double().t().repeat_interleave(64, 1)
    exact = scaled @ (weight * weight_scale.double().t().repeat_interleave(64, 1)).t()
    for seed in range(2):
        emulated.seed(seed)
        ours = emulated.gemm_w4a4_up(
            *(*given, weight_scale.bfloat16(), torch.zeros(n, 0).bfloat16()),
            out_dtype=torch.float32,
            capability=HOPPER,
            form=INT8,
        )
        assert_same(ours, exact.float())


@pytest.mark.parametrize("case", TILES, ids=str)
def test_packed_codes_give_the_same_bits(emulated, case):
    operands = make_operands(case, torch.bfloat16)
    wide = product(emulated, operands, case.act_unsigned, torch.bfloat16)
    assert_same(product(emulated, operands, case.act_unsigned, torch.bfloat16, wide=False), wide)


@pytest.mark.parametrize("case", [replace(TILES[0], K=448), TILES[3], TILES[4]], ids=str)
def test_every_order_of_warps_gives_the_same_bits(emulated, case):
    operands = make_operands(case, torch.float16)
    first = product(emulated, operands, case.act_unsigned, torch.float16)
    for seed in range(1, 4):
        emulated.seed(seed)
        assert_same(product(emulated, operands, case.act_unsigned, torch.float16), first)


@pytest.mark.parametrize("case", [TILES[0], TILES[3], TILES[4]], ids=str)
@pytest.mark.parametrize("broken", [float("nan"), float("inf")], ids=str)
def test_a_broken_token_stays_alone(emulated, case, broken):
    operands = make_operands(case, torch.bfloat16)
    whole = product(emulated, operands, case.act_unsigned, torch.bfloat16)
    sick = operands | {"ascales": operands["ascales"].clone(), "h": operands["h"].clone()}
    tokens = [1, case.M - 1]
    sick["ascales"][-1, tokens[0]], sick["ascales"][0, tokens[1]], sick["h"][tokens[1]] = (
        broken,
        broken,
        broken,
    )
    result = product(emulated, sick, case.act_unsigned, torch.bfloat16)
    assert not result[tokens].isfinite().any()
    well = torch.ones(case.M, dtype=torch.bool)
    well[tokens] = False
    assert_same(result[well], whole[well])


@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
def test_the_codes_that_quantize_down_writes_are_read(emulated, unsigned):
    case = replace(TILES[4], act_unsigned=unsigned)
    operands, parameters = make_operands(case, torch.bfloat16), make_w4a4(case)
    x = make_input(case, torch.bfloat16)
    results = []
    for form in (emulated.E4M3, emulated.PACKED):
        given = dict(
            zip(
                ("q", "ascales", "h"),
                emulated.quantize_down(
                    x,
                    parameters["smooth_factor"],
                    parameters["proj_down"],
                    unsigned,
                    capability=HOPPER,
                    form=form,
                ),
                strict=True,
            )
        )
        results.append(
            product(emulated, operands | given, unsigned, torch.bfloat16, wide=False, form=form)
        )
    assert_same(*results)


def test_a_slice_of_a_wider_h_is_read_in_place(emulated):
    case = replace(TILES[4], R=12)
    operands = make_operands(case, torch.bfloat16)
    wide = torch.full((case.M, 36), float("nan"))
    wide[:, 12:24] = operands["h"]
    expected = product(emulated, operands, False, torch.bfloat16)
    assert_same(
        product(emulated, operands | {"h": wide[:, 12:24]}, False, torch.bfloat16), expected
    )


def test_a_large_h_does_not_overflow_in_float16(emulated):
    operands = make_operands(Case("large_h", 8, 64, 64, R=16), torch.float16)
    operands["h"] = operands["h"] * 1e6
    operands["proj_up"] = operands["proj_up"] * 1e-3
    ours = product(emulated, operands, False, torch.float16)
    exact = truth(operands, False)
    assert ours.isfinite().all()
    assert_twice_plain(ours, exact, exact.to(torch.float16))


@pytest.mark.parametrize("size", [1e-4, 1e-6, 1e5])
def test_an_h_of_any_size_keeps_its_digits_beside_float16(emulated, size):
    """Where the sums are the low-rank branch alone: float16 has 11 bits from 6e-5 to 65504."""
    operands = make_operands(Case("any_h", 8, 64, 64, R=24), torch.float16)
    operands["ascales"].zero_()
    operands["bias"] = None
    operands["h"] *= size / operands["h"].abs().max()
    operands["proj_up"] *= min(max(1 / size, 1e-3), 1e3) / operands["proj_up"].abs().max()
    exact = operands["h"].double() @ operands["proj_up"].double().t()
    ours = product(emulated, operands, False, torch.float16).double()
    bound = 2.0**-11 * (operands["h"].abs().double() @ operands["proj_up"].abs().double().t())
    assert ((ours - exact).abs() <= bound + 2.0**-24 + 2.0**-11 * exact.abs()).all()


def test_float32_parameters_are_refused(emulated):
    with pytest.raises(emulated.Failed, match="bfloat16 or float16"):
        product(emulated, make_operands(SMALL[0], torch.float32), False, torch.float32)
