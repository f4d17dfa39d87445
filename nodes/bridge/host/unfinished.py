"""The page's way to the unfinished files in ComfyUI's model folders: listed, and removed by name.

GET  /nibble/unfinished         → {"files": [{"name", "bytes", "held_since": s since 1970 | null}]}
POST /nibble/unfinished/remove  {"names": [...]} → {"bytes": removed, "refused": [sentence, ...]}
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import folder_paths

from ....quant.files import unfinished
from ....quant.files.errors import FileRefused

KINDS = ("diffusion_models", "text_encoders")  # that nodes write large files to


def listed() -> dict[str, unfinished.Unfinished]:
    """Name relative to its folder → file, of every folder of those kinds."""
    homes = dict.fromkeys(
        Path(home).resolve() for kind in KINDS for home in folder_paths.get_folder_paths(kind)
    )
    return {
        _name(file.target, list(homes)): file
        for file in unfinished.found_in(home for home in homes if home.is_dir())
    }


def _name(target: Path, homes: list[Path]) -> str:
    home = max((home for home in homes if home in target.parents), key=lambda home: len(str(home)))
    return os.path.join(home.name, os.path.relpath(target, home))


def removed(names: list[str]) -> dict:
    """Removes files by the names that `listed` gives; others are not touched."""
    there, size, refused = listed(), 0, []
    for name in names:
        if name not in there:
            continue
        try:
            size += unfinished.remove(there[name].target)
        except FileRefused as refusal:
            refused.append(str(refusal))
    return {"bytes": size, "refused": refused}


def register() -> None:
    """Adds the routes to ComfyUI's server, where there is one."""
    try:
        from aiohttp import web
        from server import PromptServer
    except ImportError:  # ComfyUI's library without its server, as in a script
        return
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return

    @server.routes.get("/nibble/unfinished")
    async def _list(request: web.Request) -> web.Response:
        found = await asyncio.to_thread(listed)
        return web.json_response(
            {
                "files": [
                    {"name": name, "bytes": file.bytes, "held_since": file.held_since}
                    for name, file in found.items()
                ]
            }
        )

    @server.routes.post("/nibble/unfinished/remove")
    async def _remove(request: web.Request) -> web.Response:
        names = (await request.json()).get("names")
        if not isinstance(names, list):
            return web.json_response({"error": "names: a list of names is needed"}, status=400)
        return web.json_response(await asyncio.to_thread(removed, names))
