"""A writer that is killed at any moment is gone on with to the same bytes, and leaves nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parent / "support"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks of a process")
@pytest.mark.parametrize(
    "writer, every, least",
    [
        ("layers", 1, 12),
        ("adapter", 2, 7),
        ("training", 3, 7),
        ("couplings", 3, 7),
        ("parts", 5, 7),
    ],
)
def test_a_killed_writer_is_gone_on_with_and_nothing_is_left(tmp_path, writer, every, least):
    """At every file operation, or every second or third: opening, renaming, removing."""
    run = subprocess.run(
        [sys.executable, "killed_writers.py", writer, str(tmp_path / "out"), str(every)],
        cwd=SUPPORT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= least
