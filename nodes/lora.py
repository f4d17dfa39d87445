"""The LoRA nodes: LoRA Report shows what stock Load LoRA's do to a 4-bit model, LoRA Stack puts
several on any model.
"""

from comfy_api.latest import io

from . import file_nodes, menu
from .bridge.host import charts
from .bridge.quantized import lora_report, lora_stack

ROWS = 8
_SHOWN = 2  # rows; the others are behind the advanced inputs
_NAMES = [f"lora_{number}" for number in range(1, ROWS + 1)]


class NibbleLoRAReport(io.ComfyNode):
    """What the LoRAs on a model do to each layer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleLoRAReport",
            display_name="LoRA Report",
            category=menu.LORA,
            is_output_node=True,
            description=(
                "Shows what the LoRAs on a 4-bit model do: which layers they reach, how"
                " each layer computes them, how much memory they take, and what is left"
                " out. The model passes through unchanged."
            ),
            search_aliases=["nibble", "lora", "lora check", "lora info", "lora not working"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "A 4-bit model with LoRAs on it: place this node after the last Load LoRA."
                    ),
                )
            ],
            outputs=[io.Model.Output("model", tooltip="The same model.")],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        return io.NodeOutput(model, ui=charts.ui(lora_report.lora_chart(model)))


class NibbleLoRAStack(file_nodes.FileNode):
    """Up to eight LoRAs in one node."""

    STAMPS = dict.fromkeys(_NAMES, lora_stack.stamp)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleLoRAStack",
            display_name="LoRA Stack",
            category=menu.LORA,
            has_intermediate_output=True,
            description=(
                "Puts up to eight LoRAs on any model, 16-bit or quantized, and on its text encoder,"
                " as Load LoRA does, and shows what each of them reached."
            ),
            search_aliases=[
                "nibble",
                "lora",
                "lora stack",
                "lora loader",
                "load lora",
                "multi lora",
                "several loras",
                "power lora loader",
            ],
            inputs=[
                io.Model.Input("model", tooltip="Any MODEL, quantized or not."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Its text encoder, for LoRAs that change that too.",
                ),
                *(widget for number in range(1, ROWS + 1) for widget in _row(number)),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model with the LoRAs."),
                io.Clip.Output("clip", tooltip="The text encoder with them, if one is connected."),
            ],
        )

    @classmethod
    def execute(cls, model, clip=None, **widgets) -> io.NodeOutput:
        rows = [
            lora_stack.Row(
                widgets.get(f"lora_{number}", lora_stack.NONE),
                widgets.get(f"strength_{number}", 1.0),
                widgets.get(f"on_{number}", True),
            )
            for number in range(1, ROWS + 1)
        ]
        model, clip, chart = lora_stack.apply(model, clip, rows)
        return io.NodeOutput(model, clip, ui=charts.ui(chart))


def _row(number: int) -> list[io.Input]:
    """The three widgets of one LoRA."""
    hidden = {"optional": True, "advanced": number > _SHOWN}
    return [
        io.Combo.Input(
            f"lora_{number}",
            options=lora_stack.names(),
            default=lora_stack.NONE,
            tooltip="A file in models/loras. None: this row is empty.",
            **hidden,
        ),
        io.Float.Input(
            f"strength_{number}",
            default=1.0,
            min=-20.0,
            max=20.0,
            step=0.05,
            round=0.001,
            tooltip="How strongly it changes model and text encoder. Negative: the opposite.",
            **hidden,
        ),
        io.Boolean.Input(
            f"on_{number}", default=True, tooltip="Off: as if the row were empty.", **hidden
        ),
    ]


NODES = [NibbleLoRAReport, NibbleLoRAStack]
