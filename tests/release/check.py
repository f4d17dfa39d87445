"""`make release-check`: what the registry would take, installed where nothing can compile.

    python -m nibble cubins && python -m nibble libraries --platforms all
    python tests/release/check.py [--out FOLDER] [--torch "torch==2.13.0"] [--demo]

Writes the archive (archive.py), makes a new virtual environment with torch and the requirements,
unpacks the archive there as ComfyUI-Manager does, runs layers in it (in_package.py; under ComfyUI's
own imports where COMFYUI_PATH names it) and, with --demo, the README's demo, and prints the size of
every artefact. What runs there has a PATH without a compiler.
"""

import argparse
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import archive

HERE = Path(__file__).resolve().parent
BIN = "Scripts" if os.name == "nt" else "bin"


def environment(folder: Path, torch: str | None, index: str | None) -> Path:
    """A new virtual environment with torch, if any, and the pack's requirements; its Python."""
    venv.create(folder, with_pip=True, clear=True)
    python = folder / BIN / ("python.exe" if os.name == "nt" else "python")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if torch is not None:
        subprocess.run([*pip, torch, *(["--index-url", index] if index else [])], check=True)
    subprocess.run([*pip, "-r", str(archive.ROOT / "requirements.txt")], check=True)
    if "COMFYUI_PATH" in os.environ:
        comfyui = Path(os.environ["COMFYUI_PATH"]) / "requirements.txt"
        subprocess.run([*pip, "-r", str(comfyui)], check=True)
    return python


def without_compiler(folder: Path) -> dict[str, str]:
    """The environment of a process that finds no compiler: PATH is an empty folder."""
    empty = folder / "empty"
    empty.mkdir(exist_ok=True)
    kept = ("SYSTEMROOT", "TEMP", "TMP", "HOME", "USERPROFILE", "COMFYUI_PATH", "OMP_NUM_THREADS")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"PATH": str(empty)}


def unpack(packed: Path, pack: Path) -> None:
    """The archive as ComfyUI-Manager unpacks it, in place of what is there."""
    shutil.rmtree(pack, ignore_errors=True)
    zipfile.ZipFile(packed).extractall(pack)


def sizes(names: list[str], packed: Path) -> None:
    for folder in archive.included():
        for name in (name for name in names if name.startswith(f"{folder}/")):
            print(f"{(archive.ROOT / name).stat().st_size:>12,}  {name}")
    total = sum((archive.ROOT / name).stat().st_size for name in names)
    print(f"{total:>12,}  all {len(names)} files")
    print(f"{packed.stat().st_size:>12,}  {packed.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=archive.ROOT / "build" / "release")
    parser.add_argument("--torch", default="torch", help="as pip takes it (default: the newest)")
    parser.add_argument("--torch-index", help="where pip finds that (default: its own)")
    parser.add_argument(
        "--without-cubins", action="store_true", help="where the GPU's kernels were not compiled"
    )
    parser.add_argument("--demo", action="store_true", help="run the README's demo too: minutes")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    packed = options.out / "nibble.zip"
    names = archive.write(packed, ("kernels/cubins",) if options.without_cubins else ())
    sizes(names, packed)

    pack = options.out / "custom_nodes" / "nibble"
    unpack(packed, pack)
    python = environment(options.out / "venv", options.torch, options.torch_index)
    there = without_compiler(options.out)
    subprocess.run([str(python), str(HERE / "in_package.py"), str(pack)], env=there, check=True)
    if options.demo:
        pip = [str(python), "-m", "pip", "install", "--quiet", "diffusers"]
        subprocess.run(pip, check=True)
        demo = [str(python), "-m", "nibble", "demo", "--out", str(options.out / "demo.png")]
        demo += ["--target", str(options.out / "demo-svdq-int4.safetensors")]
        subprocess.run(demo, env=there, cwd=pack.parent, check=True)
    print("nothing was compiled, and nothing could be")


if __name__ == "__main__":
    sys.exit(main())
