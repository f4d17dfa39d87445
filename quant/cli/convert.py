"""nibble convert SOURCE TARGET: the same numbers in another program's format."""

import argparse

from ..interop import convert as converter
from .console import Bar, print_summary


def convert(options: argparse.Namespace) -> None:
    """SOURCE → TARGET with the same numbers, with a progress bar and a summary."""
    with Bar("layers") as bar:
        lines = converter.convert(options.source, options.target, options.to, bar)
    print_summary(options.target, lines)
