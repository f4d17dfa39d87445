"""`python -m nibble cubins`: the package's cubins, compiled by NVRTC; needs no GPU and no nvcc.

NVRTC of CUDA 12.9 is what releases use: the newest whose cubins every driver of CUDA 12 loads
(Linux 525, Windows 528 and newer), and the first that compiles for families of Blackwell.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from . import kernels, library


def main(arguments: list[str]) -> int:
    """Compiles and writes; returns the exit code. Raises CompileError."""
    parser = argparse.ArgumentParser(prog="python -m nibble cubins", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=library.PACKAGE, help="folder (default: the package's own)"
    )
    parser.add_argument(
        "--archs",
        nargs="+",
        choices=kernels.ARCHITECTURES,
        default=kernels.ARCHITECTURES,
        metavar="ARCH",
        help=f"any of {' '.join(kernels.ARCHITECTURES)} (default: all)",
    )
    options = parser.parse_args(arguments)
    manifest = library.write_package(options.out, options.archs, print)
    files = [options.out / arch["file"] for arch in manifest["architectures"].values()]
    total = sum(path.stat().st_size for path in files)
    print(f"{options.out}: {total:,} bytes, by {manifest['compiler']}")
    return 0
