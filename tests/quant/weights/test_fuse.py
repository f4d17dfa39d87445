"""Linears joined and split: the same results, the same bits, and what cannot be one."""

from dataclasses import fields, replace

import pytest
import torch

from compare import assert_same
from nibble.quant.weights.fuse import join_columns, join_rows, split_columns, split_rows
from nibble.quant.weights.svdquant_w4a4 import SVDQuantWeight
from published_files import random_linear


def weight(n, k, seed, unsigned=False, rank=16, **changes):
    part = random_linear(n, k, seed, rank, torch.float32)
    return replace(
        SVDQuantWeight(
            part["weight"],
            part["weight_scale"],
            part["weight_proj_down"],
            part["weight_proj_up"],
            part["weight_smooth_factor"],
            part["bias"],
            unsigned,
        ),
        **changes,
    )


def assert_same_weights(one, other):
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        (
            assert_same(a, b)
            if isinstance(b, torch.Tensor)
            else pytest.fail(field.name)
            if a != b
            else None
        )


def test_rows_joined_compute_what_their_pieces_do_and_come_apart():
    first = weight(64, 128, 1)
    second = weight(192, 128, 2, smooth_factor=first.smooth_factor)
    joined, x = join_rows([first, second]), torch.randn(5, 128)
    assert joined.rank == 32
    assert joined.shape == (256, 128)
    assert torch.allclose(
        joined.forward(x), torch.cat([first.forward(x), second.forward(x)], -1), atol=1e-5
    )
    for piece, back in zip((first, second), split_rows(joined, [64, 192]), strict=True):
        assert_same_weights(back, piece)


def test_rows_that_share_a_factor_keep_its_rank():
    first = weight(64, 128, 1)
    joined = join_rows(
        [first, weight(64, 128, 2, smooth_factor=first.smooth_factor, proj_down=first.proj_down)]
    )
    assert joined.rank == 16
    assert all(piece.rank == 16 for piece in split_rows(joined, [64, 64]))


@pytest.mark.parametrize(
    "signs, unsigned_from", [((False, True), 128), ((False, False), 0), ((True, True), 0)]
)
def test_columns_joined_compute_the_sum_and_come_apart(signs, unsigned_from):
    first, second = weight(64, 128, 1, signs[0], bias=torch.zeros(64)), weight(64, 256, 2, signs[1])
    joined = join_columns([first, second])
    draw = torch.Generator().manual_seed(0)
    x = torch.nn.functional.gelu(torch.randn(5, 384, generator=draw))
    assert (joined.unsigned_from, joined.act_unsigned) == (unsigned_from, all(signs))
    assert joined.rank == 32
    assert torch.allclose(
        joined.forward(x), first.forward(x[:, :128]) + second.forward(x[:, 128:]), atol=1e-5
    )
    dense = torch.nn.functional.linear(x, joined.dequantize(), joined.effective_bias())
    assert (joined.forward(x) - dense).norm() < 0.15 * dense.norm()
    for piece, back in zip((first, second), split_columns(joined, [128, 256]), strict=True):
        assert_same_weights(back, piece)


def test_biases_of_columns_are_added():
    first, second = weight(64, 128, 1), weight(64, 128, 2)
    assert_same(
        join_columns([first, second]).bias, (first.bias.double() + second.bias.double()).float()
    )
    assert join_columns([replace(first, bias=None), replace(second, bias=None)]).bias is None


@pytest.mark.parametrize(
    "join, pieces",
    [
        (join_rows, [weight(64, 128, 1), weight(64, 192, 2)]),
        (join_rows, [weight(64, 128, 1), weight(64, 128, 2, True)]),
        (join_columns, [weight(64, 128, 1, True), weight(64, 128, 2)]),
        (join_columns, [weight(64, 128, 1), weight(128, 128, 2)]),
        (join_columns, [weight(64, 128, 1), weight(64, 128, 2, rotation=64)]),
    ],
)
def test_what_cannot_be_one_linear_is_refused(join, pieces):
    with pytest.raises(ValueError, match="cannot be one"):
        join(pieces)


def test_a_split_within_a_piece_is_refused():
    joined = join_columns([weight(64, 128, 1), weight(64, 128, 2, True)])
    with pytest.raises(ValueError, match="cannot be split"):
        split_columns(joined, [64, 192])


@pytest.mark.parametrize(
    "change",
    [
        {"unsigned_from": 100},
        {"unsigned_from": 128},
        {"unsigned_from": 64, "act_unsigned": True},
        {"unsigned_from": 64, "rotation": 64},
    ],
)
def test_a_column_of_change_must_fit(change):
    with pytest.raises(ValueError, match="unsigned_from"):
        weight(64, 128, 1, **change)


def test_the_column_is_part_of_the_layer_s_json_and_comes_back():
    joined = join_columns([weight(64, 128, 1), weight(64, 128, 2, True)])
    assert joined.facts()["unsigned_from"] == 128
    assert_same_weights(SVDQuantWeight.from_tensors(joined.tensors("x"), "x"), joined)
