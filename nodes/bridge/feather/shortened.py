"""What a layer is given of a sequence that tokens were taken out of: rows, mask and positions.

Some of Gemma 3's layers attend to a window of the last W positions and turn by their own rotary
embedding. A window counts positions, not rows: between two rows that are left, all that were taken
out still count. The layer itself counts rows, so the window is added to its mask here.
"""

from __future__ import annotations

import torch


def window_of(layer: torch.nn.Module) -> int:
    """How many positions a layer looks back, itself included; 0: all."""
    return getattr(layer, "sliding_attention", 0) or 0


def positions_at(freqs: tuple | list, rows: torch.Tensor) -> tuple | list:
    """The rotary embedding (cos, sin, -sin), each (…, length, d), at some positions; of each kind
    of layer, where there are two.
    """
    if isinstance(freqs, list):
        return [positions_at(each, rows) for each in freqs]
    return tuple(part[..., rows, :] for part in freqs)


def positions_of(layer: torch.nn.Module, freqs: tuple | list) -> tuple:
    """The rotary embedding that a layer takes of what all are given."""
    if isinstance(freqs, list):
        return freqs[bool(window_of(layer))]
    return freqs


class Shortened:
    """What the layers of a stage are given: gathered once for each window, as all its layers get
    the same.
    """

    def __init__(self):
        self._source, self._kept, self._made = None, None, {}

    def forget(self) -> None:
        """Lets go of all tensors."""
        self.__init__()

    def of(self, rows: torch.Tensor, window: int, mask, freqs) -> tuple:
        """(mask, positions) at `rows` (n,). mask (…, length, length) additive, or None."""
        source = (len(rows), id(mask), id(freqs))
        if self._source != source:
            # the last stage's go before this one's are made; kept, so that the ids stay theirs
            self._made.clear()
            self._source, self._kept = source, (mask, freqs)
        if window not in self._made:
            short = None if mask is None else mask[..., rows[:, None], rows]
            beyond = rows[:, None] - rows >= window
            if window and beyond.any():
                short = _hidden(beyond, freqs) if short is None else short + _hidden(beyond, short)
            self._made[window] = short, positions_at(freqs, rows)
        return self._made[window]


def mask_of_next(rows: torch.Tensor, length: int, keys: int, window: int, like: torch.Tensor):
    """Mask (1, 1, 1, keys + 1) of one generated token in a layer with a window, whose cache has
    `keys` keys: those of `rows` (n,) of a prompt of `length` tokens, then of tokens generated
    since. None where the window holds all.
    """
    now = length + keys - len(rows)
    positions = torch.cat([rows, torch.arange(length, now + 1, device=rows.device)])
    beyond = now - positions >= window
    return _hidden(beyond, like)[None, None, None] if beyond.any() else None


def _hidden(where: torch.Tensor, like: torch.Tensor | tuple | list) -> torch.Tensor:
    while not isinstance(like, torch.Tensor):
        like = like[0]
    least = torch.finfo(like.dtype).min
    return torch.zeros(where.shape, dtype=like.dtype, device=where.device).masked_fill(where, least)
