"""TeaCache's rule with published coefficients (accel/caching/coefficients.json), or with others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..caching.steps import Window
from ..caching.teacache import PAPER, Polynomial, TeaCache
from .families import family_of, published

AUTO, PLAIN = "auto", "plain"


def teacache(
    model: torch.nn.Module,
    coefficients: str | Sequence[float],
    preset: str,
    threshold: float | None,
    reference: bool,
) -> Callable[[torch.Tensor, Window], tuple[TeaCache, str]]:
    """What makes a run's rule, and the name of its F, of the latent that the model reads and the
    window that was asked for. Raises ValueError for a model whose blocks are not known, and for one
    of a size that nobody has fitted.
    """
    family = family_of(model)
    if not isinstance(coefficients, str):
        polynomial = Polynomial(tuple(float(number) for number in coefficients))
        allowed = PAPER[preset] if threshold is None else threshold
        return lambda x, window: (TeaCache(polynomial, allowed, window), family.feature)
    if coefficients not in (AUTO, PLAIN):
        raise ValueError(
            f"coefficients are {AUTO!r}, {PLAIN!r} or numbers, the highest power first; not"
            f" {coefficients!r}."
        )
    plain = coefficients == PLAIN
    if published(model, reference=reference, plain=plain) is None:
        raise ValueError(
            f"There are no published TeaCache coefficients for {type(model).__name__} of this"
            " size; give your own, or take the rule 'error', which needs none."
        )

    def rule_of(x: torch.Tensor, window: Window) -> tuple[TeaCache, str]:
        entry = published(model, x, reference, plain)
        assert entry is not None  # the size of a picture only chooses between two
        allowed = entry.thresholds[list(PAPER).index(preset)] if threshold is None else threshold
        return TeaCache(entry.polynomial, allowed, entry.window(window)), entry.feature

    return rule_of
