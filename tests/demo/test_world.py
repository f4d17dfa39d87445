import numpy as np
import pytest

from nibble.demo import prompts, scorer, world


def pictures_of(count: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    scenes = [world.random_scene(rng) for _ in range(count)]
    return scenes, np.stack(
        [world.render(scene, world.random_pose(scene.place, rng)) for scene in scenes]
    )


def test_the_scorer_reads_what_the_world_draws():
    scenes, pictures = pictures_of(150)
    assert scorer.score(pictures, scenes)["all"] == 1.0


def test_the_scorer_survives_a_little_noise():
    scenes, pictures = pictures_of(100)
    noisy = np.clip(pictures + np.random.default_rng(1).normal(0, 0.03, pictures.shape), 0, 1)
    assert scorer.score(noisy, scenes)["all"] > 0.95


def test_wrong_and_empty_pictures_score_nothing():
    scenes, pictures = pictures_of(60)
    other = [
        world.Scene("green" if s.colour != "green" else "red", s.shape, s.place, s.background)
        for s in scenes
    ]
    assert scorer.score(pictures, other)["all"] == 0.0
    assert scorer.read(np.full((64, 64, 3), 0.5)) is None


@pytest.mark.parametrize(
    "kind, prompt",
    [
        ("color", "a circle left on black"),
        ("shape", "a red thing left on black"),
        ("place", "a red circle on black"),
        ("background", "a red circle left"),
    ],
)
def test_a_prompt_that_lacks_a_fact_is_refused_with_the_choices(kind, prompt):
    with pytest.raises(ValueError, match=f"no {kind}.*It knows"):
        world.parse(prompt)


def test_every_scored_prompt_is_read_back_word_for_word():
    assert [str(world.parse(prompt)) for prompt in prompts.SCORED] == list(prompts.SCORED)
    tokens, pooled = prompts.embed(prompts.word_indices(list(prompts.SCORED)))
    assert tokens.shape == (20, 4, 64)
    assert pooled.shape == (20, 64)
    assert len(tokens.flatten(1).unique(dim=0)) == 20


def test_the_word_table_never_changes():
    """The shipped weights were trained on these very vectors."""
    assert prompts.word_table()[0, :3].tolist() == pytest.approx(
        [-0.9414, 1.2632, -0.1838], abs=1e-3
    )
