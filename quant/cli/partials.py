"""nibble partials: lists what stopped runs left unfinished, and removes it."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..files.unfinished import Unfinished


def add_command(commands) -> None:
    """Adds partials to a parser's subcommands."""
    parser = commands.add_parser(
        "partials", help="list the unfinished files of runs that were stopped, or remove them"
    )
    parser.add_argument(
        "folder",
        nargs="*",
        type=Path,
        default=[Path()],
        help="to look through, with all in it (default: this one)",
    )
    parser.add_argument(
        "--remove", action="store_true", help="remove those that no run is writing now"
    )
    parser.set_defaults(run=partials)


def partials(options: argparse.Namespace) -> None:
    """Prints a line for each file. Raises ValueError for what is no folder."""
    from ..files import unfinished

    for folder in options.folder:
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; name the one that the models are in.")
    found = unfinished.found_in(options.folder)
    removed = 0
    for file in found:
        print(f"{file.bytes / 1e9:8.2f} GB  {file.target}{_state(file)}")
        if options.remove and file.held_since is None:
            removed += unfinished.remove(file.target)
    if not found:
        print("no unfinished files")
    elif options.remove:
        print(f"{removed / 1e9:.2f} GB removed")
    else:
        print("the same command goes on from such a file; --remove gives its room back")


def _state(file: Unfinished) -> str:
    states = []
    if file.part_of is not None and file.target.exists():
        states.append(f"a finished part of {file.part_of.name}, joined by --parts")
    if file.held_since is not None:
        began = time.strftime("%H:%M", time.localtime(file.held_since))
        states.append(f"being written since {began}")
    return f"  ({'; '.join(states)})" if states else ""
