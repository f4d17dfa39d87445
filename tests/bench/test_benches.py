import subprocess
import sys
from pathlib import Path

import pytest

BENCHES = sorted(Path(__file__).parent.glob("bench_*.py"))


@pytest.mark.parametrize("bench", BENCHES, ids=lambda path: path.stem)
def test_a_bench_starts_on_its_own_and_explains_itself(bench):
    result = subprocess.run([sys.executable, str(bench), "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--out" in result.stdout
