"""What this checkout makes, as hashes: every prompt of prompts/ is run in a fresh ComfyUI, and
every file and picture is hashed.

    COMFYUI_PATH=... python tests/comfyui/fingerprint.py --out before.json
    (change the code, or stand in another checkout)
    COMFYUI_PATH=... python tests/comfyui/fingerprint.py --out after.json --against before.json

Seeds are in the prompts, so two runs on one machine give equal hashes; other processors and
versions of torch round otherwise. A safetensors file's hash is of its header as sorted JSON and of
its tensors' bytes, as safetensors itself writes metadata in any order; a calibration's is without
its date.
"""

import argparse
import hashlib
import json
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401
import comfyui_server
from comfyui_launch import make_torchvision_importable
from comfyui_server import Server
from demo_prompts import SEEKER_FLAGS, add_seeker_nodes, furnish, prompts

COMMANDS = [
    "quantize flux-demo.safetensors cli.safetensors --rank 16 --rotation off",
    "quantize flux-demo.safetensors cli-vq.safetensors --method vq --bits 3",
    "convert four.safetensors four-kitchen.safetensors --to kitchen",
    "convert cli.safetensors svdq-int4_r16-cli.safetensors --to nunchaku",
    "convert svdq-int4_r16-cli.safetensors cli-back.safetensors",
]
SECONDS = re.compile(r"\b\d+(\.\d+)? ?(s|ms|min|h)\b")  # a run's own time is no result


def digest(path: Path) -> str:
    """The hash of a file's content; see the module's docstring for safetensors."""
    data = path.read_bytes()
    if path.parent.name == "nibble_cache":  # a calibration says when it was made
        data = json.dumps(json.loads(data) | {"created": None}, sort_keys=True).encode()
    if path.suffix != ".safetensors":
        return hashlib.sha256(data).hexdigest()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True).encode()
    return hashlib.sha256(header + data[8 + length :]).hexdigest()


def commands(folder: Path) -> None:
    """Runs COMMANDS in the folder of the models."""
    import os

    make_torchvision_importable()
    from nibble.__main__ import main

    os.chdir(folder)
    for command in COMMANDS:
        print(command, flush=True)
        if main(command.split()):
            raise SystemExit(f"failed: {command}")


def run(out: Path) -> dict[str, str]:
    """Runs every prompt; returns {"prompt: output" or "file": hash}."""
    comfyui_server.RUN_SECONDS = 3600  # a busy machine is no failure

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        add_seeker_nodes(home)
        with Server(home, *SEEKER_FLAGS) as server:
            furnish(server)
            for path in prompts():
                outputs = server.run(json.loads(path.read_text(encoding="utf-8")))
                for node, output in outputs.items():
                    if "images" in output:
                        picture = server.picture(output)
                        found[f"{path.stem}: picture"] = hashlib.sha256(
                            picture.tobytes()
                        ).hexdigest()
                    for chart in output.get("nibble_chart", ()):
                        text = SECONDS.sub("", json.dumps(chart, sort_keys=True))
                        found[f"{path.stem}: chart {node}"] = hashlib.sha256(
                            text.encode()
                        ).hexdigest()
                print(path.stem, flush=True)
        commands(home / "models" / "diffusion_models")
        for place in ("models", "output"):
            for path in sorted((home / place).rglob("*")):
                if path.is_file() and path.suffix != ".png":
                    found[str(path.relative_to(home))] = digest(path)
    out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--against",
        type=Path,
        help="an earlier run's --out: names what differs; exit code 1 if a file or a picture does",
    )
    options = parser.parse_args()
    found = run(options.out)
    if options.against is None:
        return 0
    before = json.loads(options.against.read_text(encoding="utf-8"))
    differing = sorted(
        name for name in before.keys() | found.keys() if before.get(name) != found.get(name)
    )
    results = [name for name in differing if ": chart" not in name]
    print(
        f"{len(before)} before, {len(found)} after, {len(results)} files and pictures differ,"
        f" {len(differing) - len(results)} charts differ"
    )
    for name in differing:
        print(f"  {name}: {before.get(name)} -> {found.get(name)}")
    return 1 if results else 0


if __name__ == "__main__":
    raise SystemExit(main())
