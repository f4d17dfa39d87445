"""Starts ComfyUI where torch has no CUDA but torchvision was built for it (the case of a plain `pip
install` without a GPU).

    python launch.py /path/to/ComfyUI/main.py --cpu …

Such a torchvision asks for operators that only its CUDA library defines; their schemas are enough
for it to be imported.
"""

import runpy
import sys
from pathlib import Path

import torch

_libraries = []  # a torch.library.Library undoes its definitions when it is collected


def make_torchvision_importable() -> None:
    """Defines the two operators that torchvision looks for on import, where importing it fails
    without them.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _libraries.append(torch.library.Library("torchvision", "FRAGMENT"))
        for op in ("nms", "qnms"):
            _libraries[0].define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


if __name__ == "__main__":
    main = Path(sys.argv[1])
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(main.parent))
    make_torchvision_importable()
    runpy.run_path(str(main), run_name="__main__")
