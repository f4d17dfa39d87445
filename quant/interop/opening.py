"""A low-bit file opened, whichever program wrote it: Nibble, Nunchaku or comfy-kitchen."""

import os
import threading
from collections import OrderedDict
from contextlib import ExitStack
from pathlib import Path

from ..files.checkpoint import NibbleFile, QuantizedFile
from ..files.errors import FileRefused, reading
from ..files.header_limits import LISTED_HEADER
from ..files.safetensors import Header, SafetensorsFile
from .kitchen import KitchenFile, has_codebooks, is_kitchen
from .nunchaku_folder import BLOCKS, OTHERS, SAVED, parts_of
from .nunchaku_fp4 import NunchakuFp4File, is_fp4
from .nunchaku_read import NunchakuFile, is_nunchaku


def is_4bit(path: str | os.PathLike) -> bool:
    """Whether a file or folder holds a low-bit model in any format that can be read, from headers
    alone; False for what cannot be read.

    For a folder of the first version, the file with the transformer blocks stands for the whole.
    """
    path = Path(path)
    if path.is_dir():
        # one that is not complete is refused by whoever opens it
        if any((path / name).is_file() for name in (BLOCKS, OTHERS)):
            return True
        return any(is_4bit(part) for part in sorted(path.glob(f"{SAVED}*.safetensors")))
    try:
        with SafetensorsFile(path, largest_header=LISTED_HEADER) as stored:
            return _is_low_bit(stored.header)
    except FileRefused:
        return False


def open_4bit(path: str | os.PathLike) -> QuantizedFile:
    """Opens a low-bit model, whoever wrote it: a file, or a folder of Nunchaku's first version.
    Raises FileRefused with the reason.
    """
    path = Path(path)
    with reading(path):
        if path.is_dir() or path.name == OTHERS:
            return open_nunchaku(path)
        with SafetensorsFile(path) as stored:
            return _opened(stored)


def _opened(stored: SafetensorsFile) -> QuantizedFile:
    header, path = stored.header, stored.path
    if _is_own(header):
        return NibbleFile(stored)
    if is_nunchaku(header):
        return open_nunchaku(path, None if path.name == BLOCKS else stored)
    if is_kitchen(header):
        return KitchenFile(stored)
    return NibbleFile(stored)  # which says that it is none of these


def _is_own(header: Header) -> bool:
    return header.metadata.get("format") == "nibble"


def _is_low_bit(header: Header) -> bool:
    return _is_own(header) or is_nunchaku(header) or is_kitchen(header)


def method_of(header: Header) -> str:
    """'svdquant' or 'vq', from a low-bit file's header: other programs name no method, and write
    SVDQuant's; ComfyUI saves either without Nibble's metadata.
    """
    return "vq" if header.metadata.get("method") == "vq" or has_codebooks(header) else "svdquant"


def open_nunchaku(path: Path, stored: SafetensorsFile | None = None) -> NunchakuFile:
    """Opens a file (`stored`: that file, where its header is read already), or a folder of the
    first version. Raises FileRefused with the reason.
    """
    parts = parts_of(path)
    if parts is not None:
        files, folder = [SafetensorsFile(part) for part in parts], parts[0].parent
    else:
        files, folder = [stored or SafetensorsFile(path)], None
    with ExitStack() as opened:
        for file in files:
            opened.enter_context(file)
        fp4 = any(is_fp4(file.header) for file in files)
    return (NunchakuFp4File if fp4 else NunchakuFile)(files, folder)


class OpenedFiles:
    """Low-bit files that are opened once, until they change on disk: modification time and size
    tell. No handle stays open, so that a file can be replaced at any time.

    limit  how many opened files are remembered, those used last; a header takes about 1 MB
    """

    def __init__(self, limit: int = 16):
        self._limit = limit
        self._lock = threading.Lock()  # prompts are checked while others run
        self._files: OrderedDict[Path, QuantizedFile] = OrderedDict()
        # for every listed path: (modification time, size), method; they outlive the files
        self._methods: dict[Path, tuple[tuple[int, int], str | None]] = {}

    def open(self, path: str | os.PathLike) -> QuantizedFile:
        """The file at a path. Raises FileRefused with the reason."""
        path = Path(path)
        with reading(path):
            file = self._files.get(path)
            if file is None or not file.is_current():
                file = open_4bit(path)
        return self._remembered(path, file)

    def methods(self, paths: list[str]) -> list[str | None]:
        """For each path what made its file, 'svdquant' or 'vq'; None for what is no low-bit model.

        Reads headers, and of Nibble's own files the layers' JSON; each once. Forgets other paths.
        """
        known = {}
        for path in map(Path, paths):
            known[path] = self._method(path)
        self._methods = known
        return [known[Path(path)][1] for path in paths]

    def _method(self, path: Path) -> tuple[tuple[int, int], str | None]:
        try:
            status = os.stat(path)
        except OSError:
            return (0, 0), None
        identity = (status.st_mtime_ns, status.st_size)
        known = self._methods.get(path)
        if known is not None and known[0] == identity:
            return known
        try:
            with SafetensorsFile(path, largest_header=LISTED_HEADER) as stored:
                return identity, self._found(stored)
        except FileRefused:
            return identity, None

    def _found(self, stored: SafetensorsFile) -> str | None:
        if not _is_low_bit(stored.header):
            return None
        if _is_own(stored.header):
            try:
                self._remembered(stored.path, NibbleFile(stored))
            except FileRefused:
                pass  # whoever chooses the damaged file is told why
        return method_of(stored.header)

    def _remembered(self, path: Path, file: QuantizedFile) -> QuantizedFile:
        with self._lock:
            self._files[path] = file
            self._files.move_to_end(path)
            while len(self._files) > self._limit:
                self._files.popitem(last=False)
        return file
