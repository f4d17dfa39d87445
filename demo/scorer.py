"""Reads a picture of the demo world back: which colour, which shape, which place, on which
background.

Nothing is learned: the background is the border's median colour; the shape is what differs from it,
each pixel by how far it has gone from the background's colour to the shape's; and its name is that
of the nearest template, drawn by `world` itself at several sizes, tilts and weights of the outline.
"""

from functools import lru_cache

import numpy as np

from . import world

MIN_AREA = 40  # pixels: less than this is no shape


def read(picture: np.ndarray) -> world.Scene | None:
    """The scene that a picture (SIZE, SIZE, 3) in [0, 1] shows, or None where no shape
    stands out.
    """
    border = np.concatenate(
        [
            picture[:2].reshape(-1, 3),
            picture[-2:].reshape(-1, 3),
            picture[:, :2].reshape(-1, 3),
            picture[:, -2:].reshape(-1, 3),
        ]
    )
    background = np.median(border, axis=0)
    difference = np.linalg.norm(picture - background, axis=-1)
    mask = difference > max(0.12, 0.5 * np.quantile(difference, 0.98))
    if mask.sum() < MIN_AREA:
        return None
    y, x = np.nonzero(mask)
    centre = (x.min() + x.max() + 1) / 2, (y.min() + y.max() + 1) / 2
    core = np.median(picture[difference >= np.quantile(difference[mask], 0.5)], axis=0)
    towards = (core - background) / np.square(core - background).sum()
    covered = np.clip((picture - background) @ towards, 0, 1)
    return world.Scene(
        _nearest(core, world.COLOURS),
        _shape(covered, mask),
        _place(centre),
        _nearest(background, world.BACKGROUNDS),
    )


def score(pictures: np.ndarray, scenes: list[world.Scene]) -> dict[str, float]:
    """Share of pictures (batch, SIZE, SIZE, 3) that show what was asked: each fact, and 'all' for
    colour, shape and place at once.
    """
    found = [read(picture) for picture in pictures]
    facts = {
        fact: np.array(
            [
                bool(seen) and getattr(seen, fact) == getattr(asked, fact)
                for seen, asked in zip(found, scenes, strict=True)
            ]
        )
        for fact in ("colour", "shape", "place", "background")
    }
    everything = facts["colour"] & facts["shape"] & facts["place"]
    return {fact: float(hits.mean()) for fact, hits in facts.items()} | {
        "all": float(everything.mean())
    }


def _nearest(colour: np.ndarray, palette: dict[str, tuple]) -> str:
    return min(palette, key=lambda name: float(np.square(colour - np.array(palette[name])).sum()))


def _place(centre: tuple[float, float]) -> str:
    column, row = (int(np.clip(round((c - 14) / 18), 0, 2)) for c in centre)
    return world.PLACES[3 * row + column]


@lru_cache(maxsize=1)
def _templates() -> tuple[list[str], np.ndarray]:
    """Every shape at several sizes and tilts, as drawn and with a fatter outline, in a window about
    its box: names, float32 (count, 32 * 32).
    """
    names, drawn = [], []
    for shape in world.SHAPES:
        for radius in np.arange(8.5, 13.0, 0.5):
            for tilt in (-0.2, -0.1, 0.0, 0.1, 0.2):
                for grown in (0.0, 1.0):
                    covered = world.coverage(shape, world.Pose(32, 32, radius, tilt), grown=grown)
                    names.append(shape)
                    drawn.append(_window(covered, covered > 0.5).ravel())
    return names, np.stack(drawn).astype(np.float32)


def _window(
    covered: np.ndarray, mask: np.ndarray, dx: int = 0, dy: int = 0, size: int = 32
) -> np.ndarray:
    """What is covered, in a window about the middle of the mask's box moved by (dx, dy)."""
    y, x = np.nonzero(mask)
    top, left = (y.min() + y.max() + 1 - size) // 2 + dy, (x.min() + x.max() + 1 - size) // 2 + dx
    return np.pad(covered, size)[top + size : top + 2 * size, left + size : left + 2 * size]


def _shape(covered: np.ndarray, mask: np.ndarray) -> str:
    """The template with the least squared difference, each tried a pixel to every side."""
    names, templates = _templates()
    seen = np.stack(
        [_window(covered, mask, dx, dy).ravel() for dx in (-1, 0, 1) for dy in (-1, 0, 1)]
    ).astype(np.float32)
    distance = (
        np.square(templates).sum(1)[:, None] - 2 * templates @ seen.T + np.square(seen).sum(1)
    )
    return names[int(distance.min(1).argmin())]
