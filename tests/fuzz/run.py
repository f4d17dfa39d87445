"""The fuzz of test_fuzz.py, as large as asked for: prints its counts, and every fault.

python tests/fuzz/run.py --files 10000 --seed 1
"""

import argparse
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "support")]

import checkout  # noqa: E402, F401  (loads this checkout as `nibble`)
from fuzz import trials  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = trials.run(Path(folder), options.files, options.seed)
    print("\n".join([*counts.lines(), f"{len(counts.faults)} faults", *counts.faults]))
    return bool(counts.faults)


if __name__ == "__main__":
    sys.exit(main())
