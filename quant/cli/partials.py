"""nibble partials: lists what stopped runs left unfinished, and removes it."""

import argparse
import time
from pathlib import Path


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
        print(f"{file.bytes / 1e9:8.2f} GB  {file.target}{_state(file.held_since)}")
        if options.remove and file.held_since is None:
            removed += unfinished.remove(file.target)
    if not found:
        print("no unfinished files")
    elif options.remove:
        print(f"{removed / 1e9:.2f} GB removed")
    else:
        print("the same command goes on from such a file; --remove gives its room back")


def _state(held_since: float | None) -> str:
    if held_since is None:
        return ""
    return f"  (being written since {time.strftime('%H:%M', time.localtime(held_since))})"
