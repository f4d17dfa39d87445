"""Says aloud when the tests beside this one cannot run (they import ComfyUI, so without it they are
not even collected).
"""

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_comfyui_was_found():
    if not os.environ.get("COMFYUI_PATH"):
        files = sorted(str(path.relative_to(HERE)) for path in HERE.glob("*/test_*.py"))
        pytest.skip(
            f"COMFYUI_PATH is not set: the tests inside ComfyUI did NOT run ({', '.join(files)})"
        )
    import comfy.sd  # noqa: F401
