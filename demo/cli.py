"""nibble demo: its options, and a progress bar around `run.main`."""

import argparse
from pathlib import Path


def add_command(commands) -> None:
    """Adds demo to a parser's subcommands."""
    parser = commands.add_parser(
        "demo", help="quantize the demo model that is included, and draw with it"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo.png"), help="picture to write (default: %(default)s)"
    )
    parser.add_argument(
        "--target",
        type=Path,
        default=Path("demo-svdq-int4.safetensors"),
        help="4-bit file to write (default: %(default)s)",
    )
    parser.add_argument("--preset", choices=("fast", "best"), default="best")
    parser.set_defaults(run=demo)


def demo(options: argparse.Namespace) -> None:
    """Quantizes the included demo model and draws with 16 and with 4 bits."""
    from ..kernels.optional import optional
    from ..quant.cli.console import Bar

    run, why = optional(".run", __package__)
    if run is None:
        raise ValueError(
            f"the demo needs diffusers and Pillow, and {why}; pip install --upgrade diffusers"
            " pillow"
        )

    with Bar() as bar:
        run.main(options.out, options.preset, options.target, bar)
