"""The one error that tells a person what is wrong with a file, and the door through which every
reader raises it.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

_Reader = TypeVar("_Reader", bound=Callable[..., Any])
# what parsing a damaged file raises: RecursionError, NotImplementedError and torch's own are
# RuntimeErrors, UnicodeError and JSONDecodeError are ValueErrors
_DAMAGE = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    AssertionError,
)
FORMS = "16 bit, fp8, int8, mxfp8, nvfp4, W4A8, W4A4 or GGUF"
"""What a model may be stored in that is to be quantized, for people."""
# of a GPU: no fault of the file, and ComfyUI knows what to do
_OUT_OF_MEMORY = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)


class FileRefused(ValueError):
    """A file that cannot be used: the message is one sentence that names the file, what is wrong
    and what to do.
    """


class DiskRefused(FileRefused):
    """The disk does not take what would be written; the same work may succeed another time."""


class TargetBusy(FileRefused):
    """Another run is writing the target; the same work may succeed when that has ended."""


@contextlib.contextmanager
def reading(path: str | os.PathLike, remedy: str = "download or copy it again") -> Iterator[None]:
    """Whatever is raised inside while a file is read becomes a FileRefused that names it. A reader
    raises FileRefused itself where it can say more.
    """
    name = Path(path).name
    try:
        yield
    except (FileRefused, _OUT_OF_MEMORY):
        raise
    except OSError as error:
        raise FileRefused(
            f"{name} cannot be read ({error.strerror or error}); check the disk and the file's"
            " permissions."
        ) from error
    except _DAMAGE as error:
        raise FileRefused(f"{name} cannot be read ({_said(error)}); {remedy}.") from error


def reader(method: _Reader) -> _Reader:
    """A method that reads `self.path`, through `reading`; `self.remedy` says what to do."""

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        with reading(self.path, self.remedy):
            return method(self, *args, **kwargs)

    return cast(_Reader, guarded)


def _said(error: Exception) -> str:
    """What an error says, in one line of bounded length."""
    kind = type(error).__name__
    words = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    if isinstance(error, KeyError):
        words = f"{words} is missing"
    text = f"{kind}: {words}" if words else kind
    return text if len(text) <= 300 else f"{text[:300]}…"
