"""Options of `quantize` that were not typed: by their names, for scripts, jobs files and nodes."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .options import quantize_options


def for_quantize(
    source: str | os.PathLike[str], target: str | os.PathLike[str], given: Mapping[str, Any]
) -> argparse.Namespace:
    """The options of `quantize` for a script, whose names have underscores. Raises TypeError for
    one that there is not, ValueError for a choice that there is not.
    """
    parser = argparse.ArgumentParser(add_help=False)
    quantize_options(parser)
    options = parser.parse_args([os.fspath(source), os.fspath(target)])
    choices = {action.dest: action.choices for action in parser._actions}
    for name, value in given.items():
        if name not in vars(options):
            raise TypeError(f"quantize has no option {name!r}")
        allowed = choices.get(name)
        if allowed is not None and value is not None and value not in allowed:
            raise ValueError(f"{name}={value!r} is none of {', '.join(allowed)}")
        setattr(options, name, value)
    if options.prompts is not None:
        options.prompts = Path(options.prompts)
    return options


def as_typed(given: Mapping[str, Any]) -> list[str]:
    """Options of `quantize` by their names, as they are typed; None: not given. Raises ValueError
    for one that there is not, or a value that it does not take.
    """
    known = {action.dest: action for action in _parser_of_quantize()._actions}
    words: list[str] = []
    for name, value in given.items():
        action = known.get(name.replace("-", "_"))
        if action is None or not action.option_strings:
            raise ValueError(f"quantize has no option {name!r}")
        if value is None:
            continue
        yes, no = action.option_strings[0], action.option_strings[-1]
        if isinstance(value, bool) and action.nargs == 0:
            words += [yes] if value else [no] * (no != yes)
        else:
            for each in value if isinstance(value, (list, tuple)) else [value]:
                words.append(f"{yes}={each}")
    parsed(words)
    return words


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """Options of `quantize` as they are typed, behind a source and a target, read. Raises
    ValueError.
    """
    try:
        options, unknown = _parser_of_quantize().parse_known_args(["source", "target", *words])
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    if unknown:
        raise ValueError(f"quantize has no option {unknown[0]!r}")
    return options


def _parser_of_quantize() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    quantize_options(parser)
    return parser
