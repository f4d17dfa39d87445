"""The LoRA node: stock Load LoRA applies them, LoRA Report shows what they do to a 4-bit model."""

from comfy_api.latest import io

from . import menu
from .bridge.host import charts
from .bridge.quantized import lora_report


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


NODES = [NibbleLoRAReport]
