"""The node that makes files for ComfyUI without this pack."""

from comfy_api.latest import io

from ..quant.svdquant.stock.recipe import PRESET_HELP, StockRecipe
from . import file_nodes, menu, widgets
from .bridge.host import charts
from .bridge.quantize.stock import StockRequest

_FORMATS = {
    "asym_w4a8_int8": "4.5 bits a weight, 8-bit activations: the smallest that stays close",
    "int8_convrot": "8 bits for both: hardly to be told from 16 bits",
    "nvfp4": "4.5 bits for both, computed by RTX 50",
}


class NibbleQuantizeStock(file_nodes.QuantizeNode):
    """Quantizes a diffusion transformer into a format of ComfyUI's own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleQuantizeStock",
            display_name="Quantize for Stock ComfyUI",
            category=menu.QUANTIZE,
            is_output_node=True,
            description=(
                "Makes a smaller copy of a diffusion model that every ComfyUI opens with Load"
                " Diffusion Model, without Nibble, and charts the error of every layer. An"
                " interrupted run resumes where it stopped."
            ),
            search_aliases=[
                "nibble",
                "quantize",
                "int8",
                "w4a8",
                "4bit",
                "nvfp4",
                "convrot",
                "share",
            ],
            inputs=[
                widgets.source_input(),
                io.Combo.Input(
                    "format",
                    options=list(_FORMATS),
                    default="asym_w4a8_int8",
                    tooltip=" ".join(f"{name}: {text}." for name, text in _FORMATS.items()),
                ),
                widgets.preset_input(PRESET_HELP),
                *widgets.target_inputs("-<format>"),
                *widgets.measuring_sockets(
                    positive=(
                        "Prompts to calibrate on (required by 'best'). Join several with"
                        " Conditioning (Combine)."
                    ),
                    latent="Picture size for calibration. Not connected: 512 × 512.",
                ),
                io.Combo.Input(
                    "modulation",
                    options=["quantize", "keep"],
                    default="quantize",
                    advanced=True,
                    tooltip=(
                        "Layers that read the prompt but not the picture: in the same format, or"
                        " kept in 16 bits (keep)."
                    ),
                ),
                widgets.keep_layers_input(),
                *widgets.measuring_options(
                    steps="Sampling steps for each calibration prompt.",
                    memory_gb=4.0,
                    memory=(
                        "Memory for the measurements, in GB. With less, the prompts are run more"
                        " often; the result is the same."
                    ),
                    seed="Seed for the noise of the calibration pictures.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Combo.Output(
                    "model_name", tooltip="The new file's name; connect it to Load Diffusion Model."
                )
            ],
        )

    @classmethod
    def execute(cls, format, preset, modulation, keep_layers, seed, **request) -> io.NodeOutput:
        recipe = StockRecipe.from_preset(
            preset,
            format=format,
            modulation=modulation,
            keep=widgets.patterns(keep_layers),
            seed=seed,
        )
        name, report = StockRequest(recipe=recipe, node_id=cls.hidden.unique_id, **request).run()
        cls.made(name)
        chart = charts.layers_chart(report, name, f"{format}, {preset}")
        return io.NodeOutput(name, ui=charts.ui(chart))


NODES = [NibbleQuantizeStock]
