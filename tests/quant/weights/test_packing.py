"""The int4 and index codecs and the group scales: every function against its inverse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compare import assert_same
from nibble.quant.weights.packing import (
    dequantize_groups,
    group_absmax,
    pack_indices,
    pack_int4,
    quantize_groups,
    unpack_indices,
    unpack_int4,
)

settings.register_profile("small", max_examples=40, deadline=None)
settings.load_profile("small")


def codes_of(low, high, columns):
    shapes = st.tuples(st.integers(0, 5), columns)
    return shapes.flatmap(
        lambda shape: st.integers(0, 2**31).map(lambda seed: random_codes(low, high, shape, seed))
    )


def random_codes(low, high, shape, seed):
    return torch.randint(
        low, high + 1, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8
    )


even = st.integers(0, 40).map(lambda half: 2 * half)
grouped = st.sampled_from([64, 128, 320])


@given(codes_of(-8, 7, even))
def test_signed_codes_come_back(codes):
    assert_same(unpack_int4(pack_int4(codes)), codes)


@given(codes_of(0, 15, even))
def test_unsigned_codes_come_back(codes):
    assert_same(unpack_int4(pack_int4(codes), signed=False), codes)


@given(codes_of(-128, 127, even))
def test_every_byte_comes_back(packed):
    for signed in (True, False):
        assert_same(pack_int4(unpack_int4(packed, signed)), packed)


def test_the_even_column_is_the_low_nibble():
    assert pack_int4(torch.tensor([[1, 2, -1, 0]])).tolist() == [[0x21, 0x0F]]
    assert unpack_int4(torch.tensor([[0x21, 0x0F]], dtype=torch.int8)).tolist() == [[1, 2, -1, 0]]


def test_strided_codes_pack_like_contiguous_ones():
    codes = torch.randint(-8, 8, (64, 6), dtype=torch.int8)
    assert_same(pack_int4(codes.t()), pack_int4(codes.t().contiguous()))
    assert_same(unpack_int4(codes.t()), unpack_int4(codes.t().contiguous()))


@given(codes_of(-8, 7, grouped), st.integers(0, 2**31))
def test_codes_survive_dequantizing_and_quantizing(codes, seed):
    scale = (
        torch.rand(
            codes.shape[1] // 64, codes.shape[0], generator=torch.Generator().manual_seed(seed)
        )
        + 0.01
    )
    for dtype in (torch.float32, torch.bfloat16):
        stored = scale.to(dtype)
        assert_same(quantize_groups(dequantize_groups(codes, stored), stored), codes)


def test_quantizing_is_off_by_half_a_step_at_most():
    weight = torch.randn(9, 192)
    scale = group_absmax(weight) / 7
    error = (
        (dequantize_groups(quantize_groups(weight, scale), scale) - weight)
        .unflatten(-1, (-1, 64))
        .abs()
    )
    assert (error <= scale.t()[..., None] * 0.5000001).all()


def test_a_scale_of_zero_gives_codes_of_zero():
    weight = torch.randn(3, 128)
    scale = group_absmax(weight) / 7
    scale[1, 2] = 0
    codes = quantize_groups(weight, scale)
    assert not codes[2, 64:].any()
    assert codes[2, :64].any()


def test_values_beyond_the_range_are_clamped():
    assert quantize_groups(torch.full((1, 64), 100.0), torch.ones(1, 1)).unique().tolist() == [7]
    assert quantize_groups(torch.full((1, 64), -100.0), torch.ones(1, 1)).unique().tolist() == [-8]


def test_group_absmax_is_the_largest_magnitude_of_64_columns():
    weight = torch.zeros(5, 256)
    weight[3, 64], weight[3, 127], weight[4, 255] = 2.0, -3.0, -0.5
    expected = torch.zeros(4, 5)
    expected[1, 3], expected[3, 4] = 3.0, 0.5
    assert torch.equal(group_absmax(weight), expected)


bits_and_rows = st.tuples(
    st.integers(1, 16), st.integers(0, 4), st.integers(0, 5), st.integers(0, 2**31)
)


@given(bits_and_rows)
def test_indices_come_back(case):
    bits, rows, eights, seed = case
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(
        0, 1 << bits, (rows, 8 * eights), generator=generator, dtype=torch.int32
    )
    packed = pack_indices(indices, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, eights * bits)
    assert_same(unpack_indices(packed, bits, 8 * eights), indices)


@given(bits_and_rows)
def test_every_byte_of_packed_indices_comes_back(case):
    bits, rows, eights, seed = case
    packed = torch.randint(
        0,
        256,
        (rows, eights * bits),
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.uint8,
    )
    assert_same(pack_indices(unpack_indices(packed, bits, 8 * eights), bits), packed)


@pytest.mark.parametrize("bits", range(1, 17))
def test_indices_are_the_bits_of_one_little_endian_integer(bits):
    indices = torch.randint(0, 1 << bits, (8,), generator=torch.Generator().manual_seed(bits))
    whole = sum(index << (i * bits) for i, index in enumerate(indices.tolist()))
    assert bytes(pack_indices(indices, bits).tolist()) == whole.to_bytes(bits, "little")


def test_four_indices_of_six_bits_share_three_bytes():
    assert pack_indices(torch.tensor([[0b000001, 0b100000, 0b111111, 0b010101]]), 6).tolist() == [
        [0b00000001, 0b11111000, 0b01010111]
    ]
    assert unpack_indices(
        torch.tensor([[0b00000001, 0b11111000, 0b01010111]], dtype=torch.uint8), 6, 4
    ).tolist() == [[1, 32, 63, 21]]


def test_strided_indices_pack_like_contiguous_ones():
    indices = torch.randint(0, 64, (8, 5))
    assert_same(pack_indices(indices.t(), 6), pack_indices(indices.t().contiguous(), 6))
    packed = pack_indices(indices.t(), 6)
    assert_same(
        unpack_indices(packed.t().contiguous().t(), 6, 8), indices.t().to(torch.int32).contiguous()
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: pack_int4(torch.zeros(2, 3, dtype=torch.int8)), "K=3 is odd"),
        (lambda: pack_int4(torch.zeros(2, 4)), "integers"),
        (lambda: unpack_int4(torch.zeros(2, 4, dtype=torch.uint8)), "int8"),
        (
            lambda: quantize_groups(torch.zeros(2, 100), torch.ones(1, 2)),
            "K=100 is not a multiple of the group size 64",
        ),
        (lambda: group_absmax(torch.zeros(2, 32)), "K=32"),
        (
            lambda: pack_indices(torch.zeros(2, 3, dtype=torch.int64), 6),
            "3 indices of 6 bits do not fill whole bytes",
        ),
        (lambda: pack_indices(torch.full((2, 4), 64), 6), "64..64 and must lie in 0..63"),
        (lambda: pack_indices(torch.full((2, 4), -1), 6), "-1..-1"),
        (lambda: pack_indices(torch.zeros(2, 4), 6), "integers"),
        (lambda: pack_indices(torch.zeros(2, 8, dtype=torch.int64), 17), "17 bits"),
        (lambda: unpack_indices(torch.zeros(2, 3, dtype=torch.int8), 6, 4), "uint8"),
        (
            lambda: unpack_indices(torch.zeros(2, 3, dtype=torch.uint8), 6, 8),
            "a row of 3 bytes does not hold 8 indices of 6 bits",
        ),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
