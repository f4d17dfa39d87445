"""A shape and a colour that the demo model never saw, added to its world for the benches of
fine-tuning: a brown crescent.

The world's tables are lengthened in this process only. The scorer reads them, so it then chooses
among seven shapes and nine colours in its usual way: the nearest template drawn by the world's own
renderer, and the nearest colour. The two words get vectors of their own at the end of the word
table; those of the known words stay what they were.
"""

import numpy as np
import torch

from nibble.demo import prompts, scorer, world

SHAPE, COLOUR, RGB = "crescent", "brown", (0.45, 0.26, 0.10)


def extend_world() -> None:
    """Adds the concept; before anything is scored."""
    if SHAPE in world.SHAPES:
        return
    before = prompts.word_table()
    known = world._distance

    def distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
        if shape != SHAPE:
            return known(shape, x, y, r)
        return np.maximum(np.hypot(x, y) - 0.98 * r, 0.72 * r - np.hypot(x - 0.5 * r, y))

    world._distance = distance
    world.SHAPES = (*world.SHAPES, SHAPE)
    world.COLOURS[COLOUR] = RGB
    world.WORDS = (*world.WORDS, COLOUR, SHAPE)
    scorer._templates.cache_clear()
    after = prompts.word_table()
    if not torch.equal(after[: len(before)], before):  # the vectors of known words must not move
        raise RuntimeError(
            "this torch draws other numbers for a longer word table; the concept cannot be added"
        )


def scenes() -> list[world.Scene]:
    """The concept at every place on every background: 36 scenes."""
    return [
        world.Scene(COLOUR, SHAPE, place, background)
        for background in world.BACKGROUNDS
        for place in world.PLACES
    ]


def batch(
    count: int, rng: np.random.Generator, share: float = 0.75
) -> tuple[list[world.Scene], torch.Tensor]:
    """Training pictures, float32 (count, 3, 64, 64) in [-1, 1]: `share` of them show the concept,
    the others the world as it was (the prior that is to be preserved).
    """
    known_shapes, known_colours = (
        world.SHAPES[:-1],
        [colour for colour in world.COLOURS if colour != COLOUR],
    )
    drawn = []
    for i in range(count):
        place, background = str(rng.choice(world.PLACES)), str(rng.choice(list(world.BACKGROUNDS)))
        concept = i < share * count
        drawn.append(
            world.Scene(
                COLOUR if concept else str(rng.choice(known_colours)),
                SHAPE if concept else str(rng.choice(known_shapes)),
                place,
                background,
            )
        )
    images = np.stack([world.render(scene, world.random_pose(scene.place, rng)) for scene in drawn])
    return drawn, torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
