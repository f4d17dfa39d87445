"""No damaged file brings a reader down, and none of our own is taken for whole. More of them:
`python tests/fuzz/run.py --files 10000 --seed 1`.
"""

from fuzz import trials


def test_damaged_files_are_refused_by_name_and_our_own_are_never_taken(tmp_path):
    counts = trials.run(tmp_path, files=1500, seed=0, seconds=100)
    assert not counts.faults, "\n".join([*counts.lines(), *counts.faults[:20]])
    assert all(counts.files[kind] for kind in trials.KINDS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tried", "whole"]
