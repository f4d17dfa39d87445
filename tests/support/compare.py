"""The three tolerances, and no others.

- codecs, packing, integers: `assert_same` (torch.equal);
- an op against the float64 reference on the same operands: `assert_twice_plain` (within 2x plain
  torch's own error in that dtype);
- an algorithm against the layer it replaces: `assert_sqnr` (decibels, the floor written in the
  case).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Same dtype, same shape, same bits (of values: -0.0 equals 0.0)."""
    assert actual.dtype == expected.dtype, (
        f"{actual.dtype} {tuple(actual.shape)} is not {expected.dtype} {tuple(expected.shape)}"
    )
    assert actual.shape == expected.shape, (
        f"{actual.dtype} {tuple(actual.shape)} is not {expected.dtype} {tuple(expected.shape)}"
    )
    if not torch.equal(actual, expected):
        wrong = (actual != expected).nonzero()
        first = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{len(wrong)} of {actual.numel()} differ, first at {first}: {actual[first]} is not"
            f" {expected[first]}"
        )


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact||, in float64; 0 for two empty or two zero tensors."""
    exact = exact.double()
    distance = (actual.double() - exact).norm().item()
    return distance / exact.norm().item() if distance else 0.0


def assert_twice_plain(actual: Tensor, exact: Tensor, plain: Tensor) -> None:
    """error(actual, exact) <= 2 * error(plain, exact), where `plain` is ordinary torch in the dtype
    under test.
    """
    ours, theirs = relative_error(actual, exact), relative_error(plain, exact)
    # One rounding of the result is allowed to any op, also where plain torch happens to be exact.
    allowed = 2 * max(theirs, torch.finfo(actual.dtype).eps / 4)
    assert ours <= allowed, (
        f"relative error {ours:.3g} is more than {allowed:.3g}; plain torch has {theirs:.3g}"
    )


def sqnr_db(actual: Tensor, exact: Tensor) -> float:
    """10 log10(||exact||^2 / ||actual - exact||^2), in decibels; infinite where they are equal."""
    noise = (actual.double() - exact.double()).square().sum()
    return (10 * torch.log10(exact.double().square().sum() / noise)).item()


def assert_sqnr(actual: Tensor, exact: Tensor, floor_db: float) -> None:
    """At least `floor_db` decibels."""
    found = sqnr_db(actual, exact)
    assert found >= floor_db, f"SQNR {found:.2f} dB is below the floor of {floor_db} dB"


def assert_same_state(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """The tensors of two models or files, but for a layer's JSON, whose trailing blanks fill it
    up in a file.
    """
    assert one.keys() == other.keys()
    different = [
        name
        for name, tensor in one.items()
        if not name.endswith("comfy_quant") and not torch.equal(tensor, other[name])
    ]
    assert not different
