"""Inspect Model File: what any file in ComfyUI's folders is."""

from comfy_api.latest import io

from ..quant.files.kinds import Kind
from ..quant.interop.identify import identify
from . import file_nodes, menu
from .bridge.host import charts, folders

NO_FILES = "(no model files yet)"


def _stamp(choice: str) -> str:
    kind, _, name = choice.partition("/")
    return folders.stamp(name, kind)


class NibbleInspectFile(file_nodes.FileNode):
    """Names a file."""

    STAMPS = {"file": _stamp}

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleInspectFile",
            display_name="Inspect Model File",
            category=menu.LOAD,
            is_output_node=True,
            description=(
                "Says what a model file is (a diffusion model and its format, a VAE, a LoRA, a text"
                " encoder, an upscaler, …), where it belongs and what opens it."
            ),
            search_aliases=[
                "nibble",
                "what is this file",
                "wrong folder",
                "model info",
                "metadata",
            ],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folders.everywhere() or [NO_FILES],
                    tooltip="A file in any of ComfyUI's model folders. Its weights are not read.",
                )
            ],
            outputs=[io.String.Output("kind", tooltip="What the file is, in one line.")],
        )

    @classmethod
    def validate_inputs(cls, file=None):
        return file_nodes.valid_file(folders.of_everywhere, file)

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        path, folder = folders.of_everywhere(file)
        kind = identify(path)
        lines = [["is", kind.what], ["opened by", kind.opens], *_place(kind, folder)]
        lines.append(["size", charts.size(path.stat().st_size)])
        chart = {"kind": "facts", "title": path.name, "summary": lines}
        return io.NodeOutput(kind.line, ui=charts.ui(chart))


def _place(kind: Kind, folder: str) -> list[list[str]]:
    """Whether it lies where it belongs."""
    if not kind.folder:
        return []
    if kind.folder == folder:
        return [["folder", f"models/{folder}, where it belongs"]]
    return [["folder", f"models/{folder}; move it to models/{kind.folder}"]]


NODES = [NibbleInspectFile]
