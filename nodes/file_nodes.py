"""What ComfyUI asks of a node that reads or makes a file: whether its inputs can be right, and
whether it has to run again.

It asks before the graph runs, and then gives a linked input as None (in a list, where the node
takes lists); an input from a prompt of the API can be of any type.
"""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from comfy_api.latest import io

from ..quant.files.errors import FileRefused
from .bridge.host import folders, node_files
from .bridge.quantize import sources
from .bridge.quantized import loading

# what a linked input does to a fingerprint: what it will be depends on the node that it comes
# from, whose own fingerprint ComfyUI adds
LINKED = "linked"

T = TypeVar("T")


def known(value: object, kind: type[T] | tuple[type[T], ...]) -> T | None:
    """A widget's value, taken out of the list of a node that takes lists; None for one that is
    linked, or of another type, which ComfyUI refuses in its own words.
    """
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return value if isinstance(value, kind) else None


def valid_file(check: Callable[[str], Any], name: object) -> bool | str:
    """The answer of a node's validate_inputs: True, or the sentence with which `check` refuses the
    file of that name. A linked name is known only when the graph runs.
    """
    if name is None:
        return True
    text = known(name, str)
    if text is None:
        return f"{name!r} is not the name of a file; choose one in the node's list."
    try:
        check(text)
    except FileRefused as refusal:
        return str(refusal)
    return True


class FileNode(io.ComfyNode):
    """A node that reads or makes a file. STAMPS: a widget that names a file → what gives that
    file's stamp. A node that makes one says so with `made`.
    """

    STAMPS: ClassVar[dict[str, Callable[[str], str]]] = {}

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> str:
        stamps = [_stamp(stamp, inputs.get(name)) for name, stamp in cls.STAMPS.items()]
        return repr([*stamps, node_files.changes(cls.node_id())])

    @classmethod
    def made(cls, name: str, folder: str = folders.DIFFUSION_MODELS) -> None:
        """The node's file, by its name in ComfyUI's lists, is there."""
        node_files.remember(cls.node_id(), folders.path_of(name, folder))

    @classmethod
    def node_id(cls) -> str | None:
        """The node's id in the graph; None where ComfyUI gave none."""
        return None if cls.hidden is None else cls.hidden.unique_id


def _stamp(stamp: Callable[[str], str], value: object) -> str:
    name = known(value, str)
    return LINKED if name is None else stamp(name)


class ModelFilePicker(FileNode):
    """A node that takes a quantized file by `model_name`. KIND: of `loading.LOADERS`; None: any."""

    KIND: str | None = None
    STAMPS = {"model_name": folders.stamp}

    @classmethod
    def validate_inputs(cls, model_name=None):
        return valid_file(lambda name: loading.opened(name, cls.KIND), model_name)


# what validate_inputs gets where nothing is connected; for a link it is None
_NOTHING = object()


class QuantizeNode(FileNode):
    """A node that quantizes the file `model_name`, or a connected `model` instead.

    ComfyUI tells a refusal once for every input that validate_inputs names, and leaves its own
    checks of them out. So the recipe's own values are not looked at here: the recipe refuses them
    when the node runs, before anything is read.
    """

    STAMPS = {"model_name": sources.stamp}

    @classmethod
    def validate_inputs(cls, model_name=None, model=_NOTHING):
        return valid_file(sources.path_of, model_name) if model is _NOTHING else True
