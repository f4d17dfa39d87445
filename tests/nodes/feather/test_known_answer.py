"""FEATHER on an encoder whose answer is known (bench/seeker.py)."""

import pytest

from nibble.accel import feather as accel
from nibble.accel.feather import Stage
from nibble.nodes.bridge.feather import prune as feather
from pruned_encoders import record


@pytest.fixture(scope="module")
def seeker():
    from bench import seeker

    return seeker, seeker.build()


@pytest.mark.parametrize("height, fastv_finds", [(0.0, False), (1.0, True)])
def test_feather_finds_the_square_wherever_it_stands_and_fastv_loses_it_at_the_top(
    seeker, height, fastv_finds
):
    """24 of 729 tokens are left, as in the paper; FastV's lie at the bottom (0.8 of the height in
    the paper).
    """
    world, clip = seeker
    pixels, (corner, *_) = world.picture(27, 27, 3, height)
    stages = (Stage(world.STAGES[0], 0.3, 3), Stage(world.STAGES[1], 0.09))
    finds, heights = {}, {}
    for criterion in (None, "feather", "fastv"):
        pruned = (
            clip
            if criterion is None
            else feather.prune(clip, feather.PruneSettings(stages, criterion))
        )
        found = pruned.encode_from_tokens(world.prompt(pixels), return_dict=True)
        finds[criterion] = world.right(world.answer(found["cond"], 27, 27), corner)
        if criterion:
            heights[criterion] = accel.mean_row(record(found)["pictures"][0]["masks"][-1], 27, 27)
    assert finds == {None: True, "feather": True, "fastv": fastv_finds}
    assert heights["fastv"] > 0.8 > heights["feather"]


def test_the_bench_gives_every_arm_as_many_tokens(monkeypatch):
    from bench import bench_feather

    monkeypatch.setattr(bench_feather, "KEEPS", (0.3,))
    rows = {row["arm"]: row for row in bench_feather.find(2, 15)["rows"]}
    assert rows["none"]["accuracy"] == rows["feather"]["accuracy"] == 1
    assert rows["fastv"]["accuracy_top"] == 0
    assert (
        len(
            {
                tuple(rows[arm]["tokens"])
                for arm in ("feather", "feather without grid", "fastv", "uniform")
            }
        )
        == 1
    )
