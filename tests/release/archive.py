"""The archive that the registry takes: the tracked files but those of .comfyignore, and the folders
that [tool.comfy] includes although git ignores them.
"""

import re
import subprocess
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def _git(*arguments: str) -> set[str]:
    done = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(filter(None, done.stdout.split("\0")))


def included() -> list[str]:
    """Folders that are built and not committed."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^includes = \[(.*)\]", text, re.M)
    return re.findall(r'"([^"]+)"', listed[1]) if listed else []


def files(without: tuple[str, ...] = ()) -> list[str]:
    """Every file of the archive, relative to the repository. Raises ValueError for a folder that is
    to be included, but for `without`, and was not built.
    """
    found = _git() - _git("--cached", "--ignored", "--exclude-from=.comfyignore")
    for folder in [folder for folder in included() if folder not in without]:
        built = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        if not built:
            raise ValueError(f"{folder} was not built")
        found |= {path.relative_to(ROOT).as_posix() for path in built}
    return sorted(name for name in found if (ROOT / name).is_file())


def write(path: Path, without: tuple[str, ...] = ()) -> list[str]:
    """Writes the archive; returns its files. Raises ValueError as `files` does."""
    names = files(without)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in names:
            archive.write(ROOT / name, name)
    return names
