"""The node that has a checkpoint quantized by a farm."""

from comfy_api.latest import io

from . import file_nodes, menu, widgets
from .bridge.host import charts
from .bridge.quantize import farm

_METHODS = {
    "svdquant": "4-bit weights and activations",
    "vq": "codebooks of 2 to 4 bits a weight",
    "stock": "a format that ComfyUI opens without Nibble",
}


class NibbleQuantizeOnFarm(file_nodes.QuantizeNode):
    """Sends a checkpoint and a recipe to a Ray cluster."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleQuantizeOnFarm",
            display_name="Quantize on a Farm",
            category=menu.QUANTIZE,
            is_output_node=True,
            description=(
                "Has a model quantized on another machine, by a Ray cluster that shares this"
                " ComfyUI's model folders, or on this one in a process of its own, and charts the"
                " error of every layer. An interrupted run resumes where it stopped."
            ),
            search_aliases=[
                "nibble",
                "quantize",
                "farm",
                "ray",
                "cluster",
                "remote",
                "distributed",
                "several machines",
                "render farm",
            ],
            inputs=[*_main_inputs(), *_expert_options()],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Combo.Output(
                    "model_name", tooltip="The new file's name; connect it to a load node."
                ),
                io.String.Output("made_by", tooltip="Which worker made it, and in how long."),
            ],
        )

    @classmethod
    def execute(cls, method, preset, **request) -> io.NodeOutput:
        made = farm.FarmRequest(
            method=method, preset=preset, node_id=cls.hidden.unique_id, **request
        ).run()
        cls.made(made.name)
        chart = charts.layers_chart(made.report, made.name, f"{method}, {preset}")
        chart["summary"].append(["made by", made.by])
        return io.NodeOutput(made.name, made.by, ui=charts.ui(chart))


def _main_inputs() -> list[io.Input]:
    """What to quantize, how and where: the inputs that everyone sees."""
    filename, overwrite = widgets.target_inputs("-<method's ending>")
    overwrite.advanced = True
    return [
        widgets.source_input(" The cluster's machines read it from the same folder."),
        io.Combo.Input(
            "method",
            options=list(_METHODS),
            default="svdquant",
            tooltip=" ".join(f"{name}: {text}." for name, text in _METHODS.items()),
        ),
        widgets.preset_input(farm.PRESETS),
        io.String.Input(
            "options",
            default="",
            tooltip=(
                "More options, as typed behind `quantize` on the command line, such as --rank 64"
                " --keep double_blocks.0.* --device cuda"
            ),
        ),
        io.Combo.Input(
            "where",
            options=list(farm.PLACES),
            default=farm.HERE,
            tooltip=(
                "this machine: in a process of its own. cluster: the Ray cluster that"
                " nibble-farm.json in ComfyUI's user folder names."
            ),
        ),
        filename,
        overwrite,
    ]


def _expert_options() -> list[io.Input]:
    """What a worker is, collapsed."""
    return [
        io.String.Input(
            "worker",
            default="",
            advanced=True,
            tooltip=(
                "What the job takes of a machine, as NAME=VALUE, such as cpus=8 gpus=1 memory=24"
                " (GB) retries=5. Empty: reckoned from the model's size."
            ),
        ),
        io.Int.Input(
            "parts",
            default=1,
            min=1,
            max=64,
            advanced=True,
            tooltip=(
                "On how many workers this one file is made: each makes a range of layers (preset"
                " fast). The file is the same as from one worker."
            ),
        ),
    ]


NODES = [NibbleQuantizeOnFarm]
