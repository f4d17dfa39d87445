"""The picture of the front page: what the demo model draws in 16 bit, and below it how far
from that each 4-bit file's pictures are: |difference| x 16 in every channel, black where there is
none.

    python tests/bench/error_sheet.py --out web/docs/errors.png

The peers are those of bench_pictures.py. The same noise for all; the figure beside a row is the
mean PSNR of the very pictures that are shown.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401
from bench.bench_pictures import baseline, ours
from nibble.demo import metrics, pictures, run

TIMES = 16
MARGIN = 290  # pixels, for the names
NAMES, FIGURES, BACK = (236, 236, 236), (150, 150, 150), (24, 24, 24)


def sheet(rows: dict[str, tuple[torch.Tensor, str]]) -> Image.Image:
    """Rows of pictures (batch, 64, 64, 3) in [0, 1] beside their names and a figure each."""
    strip = run.side_by_side([drawn for drawn, _ in rows.values()], columns=8)
    image = Image.new("RGB", (strip.width + MARGIN, strip.height), BACK)
    image.paste(strip, (MARGIN, 0))
    draw, high = ImageDraw.Draw(image), strip.height // len(rows)
    for row, (name, (_, figure)) in enumerate(rows.items()):
        top = row * high + high // 2
        draw.text((16, top - 14), name, NAMES, ImageFont.load_default(20), anchor="lm")
        draw.text((16, top + 14), figure, FIGURES, ImageFont.load_default(16), anchor="lm")
    return image


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("errors.png"))
    parser.add_argument("--prompts", type=int, default=8)
    options = parser.parse_args()
    vae = pictures.load_vae()
    full, _ = run.draw(pictures.load_flux(), vae, options.prompts, range(1))
    rows = {"16 bit": (full, "18.4 MB")}
    with tempfile.TemporaryDirectory() as folder:
        makers = {
            "convrot_w4a4": lambda: baseline("convrot"),
            "Nibble, 4-bit activations": lambda: ours("best", Path(folder)),
            "Nibble, 8-bit activations": lambda: ours("best", Path(folder), act_bits=8),
        }
        for name, make in makers.items():
            drawn, _ = run.draw(make(), vae, options.prompts, range(1))
            decibels = metrics.psnr(drawn, full).mean().item()
            print(f"{name}: {decibels:.1f} dB")
            rows[name] = (
                (TIMES * (drawn - full).abs()).clamp(max=1),
                f"error x {TIMES}: {decibels:.1f} dB",
            )
    sheet(rows).save(options.out)


if __name__ == "__main__":
    main()
