"""The cluster that *Quantize on a Farm* works on, as `nibble-farm.json` in ComfyUI's user folder
names it:

    {"address": "HOST:6379", "pack": "/opt/ComfyUI-Nibble", "python": "/opt/venv/bin/python"}

A workflow cannot: whoever connects to a Ray cluster trusts it with his machine, and a program that
a workflow names is a program that a stranger names.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import folder_paths

from ....farm import jobs
from ....quant.files.errors import FileRefused

NAME = "nibble-farm.json"
_NAMES = ("address", *jobs.WORKER)


@dataclass(frozen=True)
class Cluster:
    """Where a Ray cluster is, and what its workers are, as jobs files have it."""

    address: str
    worker: dict[str, Any] = field(default_factory=dict)


def path() -> Path:
    """The file, whether it is there or not."""
    return Path(folder_paths.get_user_directory(), NAME)


def read() -> Cluster:
    """What the file says. Raises FileRefused, with what to write into it."""
    example = f'write {{"address": "HOST:6379"}}, your cluster\'s, into {path()}'
    try:
        found = json.loads(path().read_text(encoding="utf-8"))
        address = found.pop("address")
    except FileNotFoundError as error:
        raise FileRefused(f"This ComfyUI knows of no cluster: {example}.") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise FileRefused(f"{NAME} names no cluster ({error}): {example}.") from error
    strange = sorted(found.keys() - set(jobs.WORKER))
    if strange or not isinstance(address, str) or not address.strip():
        what = f"there is no {strange[0]!r}" if strange else f"address is {address!r}"
        raise FileRefused(f"{NAME}: {what}; it may have {', '.join(_NAMES)}, and {example}.")
    return Cluster(address.strip(), found)
