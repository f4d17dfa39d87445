"""The published orders, against packers that follow their index formulas one number at a time; and
back, bit for bit.
"""

import pytest
import torch

from compare import assert_same
from nibble.quant.interop import swizzle
from nunchaku_packers import pack_awq, pack_down, pack_scale, pack_up, pack_vector, pack_weight

SIZES = [(128, 128), (256, 128), (128, 384), (384, 256)]


def bf16(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def int4(n, k, seed=0):
    return torch.randint(
        -128, 128, (n, k // 2), generator=torch.Generator().manual_seed(seed), dtype=torch.int8
    )


@pytest.mark.parametrize("n, k", SIZES)
@pytest.mark.parametrize("name", ["weight", "awq", "scale", "down", "up"])
def test_an_order_is_that_of_its_formula_and_comes_back(name, n, k):
    natural = {
        "weight": int4(n, k),
        "awq": int4(n, k),
        "scale": bf16(k // 64, n),
        "down": bf16(k, 32),
        "up": bf16(n, 48),
    }[name]
    packed = {
        "weight": pack_weight,
        "awq": pack_awq,
        "scale": pack_scale,
        "down": pack_down,
        "up": pack_up,
    }[name](natural)
    assert_same(getattr(swizzle, f"{name}_from_nunchaku")(packed), natural)
    assert_same(getattr(swizzle, f"{name}_to_nunchaku")(natural), packed)


def test_a_vector_is_a_scale_of_one_group():
    vector = bf16(384)
    assert_same(swizzle.vector_from_nunchaku(pack_vector(vector)), vector)
    assert_same(swizzle.vector_to_nunchaku(vector), pack_vector(vector))


def test_the_known_answer_of_the_packed_weight():
    """At K = 3072 the first byte of the second row holds the code of (48, 0) in its low nibble:
    seen in a published file's decoder.
    """
    codes = torch.zeros(128, 1536, dtype=torch.int8)
    codes[48, 0] = 5
    assert swizzle.weight_to_nunchaku(codes)[1, 0] == 5


@pytest.mark.parametrize("splits", [3, 6])
def test_interleaved_modulation_rows(splits):
    natural = torch.arange(splits * 10)
    stored = torch.tensor([s * 10 + c for c in range(10) for s in range(splits)])
    assert torch.equal(swizzle.rows_from_adanorm(natural[stored], splits), natural)
    assert torch.equal(swizzle.rows_to_adanorm(natural, splits), stored)


@pytest.mark.parametrize("k, rows", [(64, 16), (1024, 16), (1088, 32), (3072, 48)])
def test_padding_of_awq_groups(k, rows):
    assert swizzle.awq_groups(k) == rows


def test_kitchen_tiles():
    n, k = 256, 192
    natural, scale = int4(n, k), bf16(k // 64, n)
    tiled = swizzle.weight_to_kitchen(natural)
    assert tiled.shape == (2, 3, 32, 128)
    for row, byte in ((0, 0), (5, 31), (130, 33), (255, 95)):
        assert (
            tiled[row // 128, byte // 32, row % 128 // 4, row % 4 * 32 + byte % 32]
            == natural[row, byte]
        )
    assert_same(swizzle.weight_from_kitchen(tiled), natural)
    assert swizzle.scale_to_kitchen(scale)[1, 2, 7] == scale[2, 135]
    assert_same(swizzle.scale_from_kitchen(swizzle.scale_to_kitchen(scale)), scale)
