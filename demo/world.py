"""The demo's picture world: one coloured shape at one of nine places on a plain background.

A prompt names four facts, ``"a red circle top left on black"``; a picture shows them, with the
size, the exact position and the tilt left to chance. Everything is drawn from signed distances, so
the edges are smooth and no image library is needed.
"""

from dataclasses import dataclass

import numpy as np

SIZE = 64  # pixels a side
COLOURS = {
    "red": (0.90, 0.12, 0.14),
    "green": (0.12, 0.70, 0.22),
    "blue": (0.13, 0.30, 0.92),
    "yellow": (0.98, 0.85, 0.10),
    "purple": (0.58, 0.16, 0.75),
    "orange": (1.00, 0.52, 0.05),
    "cyan": (0.10, 0.82, 0.86),
    "pink": (1.00, 0.55, 0.75),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "centre",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
BACKGROUNDS = {
    "black": (0.05, 0.05, 0.06),
    "white": (0.96, 0.96, 0.94),
    "grey": (0.50, 0.50, 0.52),
    "navy": (0.07, 0.10, 0.30),
}
# the vocabulary; a prompt is four of them, in this order of kinds
WORDS = (*COLOURS, *SHAPES, *PLACES, *BACKGROUNDS)


@dataclass(frozen=True)
class Scene:
    """What a prompt says."""

    colour: str
    shape: str
    place: str
    background: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape} {self.place} on {self.background}"

    @property
    def words(self) -> tuple[str, str, str, str]:
        return self.colour, self.shape, self.place, self.background


@dataclass(frozen=True)
class Pose:
    """What a prompt leaves open: centre (pixels), radius (pixels) and tilt (radians)."""

    x: float
    y: float
    radius: float
    tilt: float


def parse(prompt: str) -> Scene:
    """Reads a prompt; a ValueError says which fact is missing and what the world knows."""
    text = f" {' '.join(prompt.lower().replace(',', ' ').split())} "
    found = []
    for kind, names in (
        ("color", COLOURS),
        ("shape", SHAPES),
        ("place", PLACES),
        ("background", BACKGROUNDS),
    ):
        hits = [name for name in sorted(names, key=len, reverse=True) if f" {name} " in text]
        if not hits:
            raise ValueError(
                f"The demo world found no {kind} in {prompt!r}. It knows: {', '.join(names)}. "
                "Write for example: a red circle top left on black"
            )
        found.append(hits[0])
    return Scene(*found)


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene drawn uniformly from all 1728."""
    return Scene(
        *(str(rng.choice(list(names))) for names in (COLOURS, SHAPES, PLACES, BACKGROUNDS))
    )


def random_pose(place: str, rng: np.random.Generator) -> Pose:
    """A pose near the middle of the named ninth of the picture."""
    row, column = divmod(PLACES.index(place), 3)
    jitter = rng.uniform(-2.0, 2.0, 2)
    return Pose(
        x=14 + 18 * column + jitter[0],
        y=14 + 18 * row + jitter[1],
        radius=rng.uniform(9.0, 12.0),
        tilt=rng.uniform(-0.2, 0.2),
    )


def coverage(shape: str, pose: Pose, size: int = SIZE, grown: float = 0.0) -> np.ndarray:
    """How much of each pixel the shape covers, grown on all sides by so many pixels: float64 (size,
    size) in [0, 1].
    """
    grid = np.arange(size) + 0.5
    x, y = np.meshgrid(grid - pose.x, grid - pose.y)
    c, s = np.cos(pose.tilt), np.sin(pose.tilt)
    return np.clip(
        0.5 + grown - _distance(shape, c * x + s * y, c * y - s * x, pose.radius), 0.0, 1.0
    )


def render(scene: Scene, pose: Pose) -> np.ndarray:
    """The picture: float32 (SIZE, SIZE, 3) in [0, 1]."""
    alpha = coverage(scene.shape, pose)[..., None]
    picture = alpha * np.array(COLOURS[scene.colour]) + (1 - alpha) * np.array(
        BACKGROUNDS[scene.background]
    )
    return picture.astype(np.float32)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Signed distance in pixels (negative inside) to a shape of circumradius about r at the origin;
    y points down.
    """
    if shape == "circle":
        return np.hypot(x, y) - 0.95 * r
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.78 * r) - 0.24 * r
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.85 * r
    if shape == "cross":
        a, b = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(a - r, b - 0.32 * r), np.maximum(b - r, a - 0.32 * r))
    if shape == "triangle":
        return np.maximum(y - 0.62 * r, 0.866 * np.abs(x) - 0.5 * y - 0.62 * r)
    if shape == "star":
        return _star(x, y, 1.12 * r)
    raise ValueError(f"unknown shape {shape!r}; the world knows {', '.join(SHAPES)}")


def _star(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """A five-pointed star: fold the plane into one half-arm, then the distance to that
    arm's edge.
    """
    sector = np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)
    rho = np.hypot(x, y)
    px, py = rho * np.cos(angle), rho * np.sin(angle)
    inner = 0.45 * r
    tip, notch = np.array([r, 0.0]), inner * np.array([np.cos(sector), np.sin(sector)])
    edge = notch - tip
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    return (px - tip[0]) * normal[0] + (py - tip[1]) * normal[1]
