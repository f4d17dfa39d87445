"""SVDQuant's nodes: make a 4-bit file, load one."""

from comfy_api.latest import io

from ..quant.files.errors import FileRefused
from ..quant.svdquant.recipe import PRESET_HELP, Recipe
from .bridge.host import charts
from .bridge.host.patterns import patterns
from .bridge.quantize import job as quantizing
from .bridge.quantized import loading

NO_SOURCES = "(no models in models/diffusion_models)"
NO_FILES = "(no quantized models yet)"
KIND = "svdquant"
_CHOICE = {"auto": None, "on": True, "off": False}


class NibbleQuantizeSVDQuant(io.ComfyNode):
    """Quantizes a diffusion transformer to 4 bits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleQuantizeSVDQuant",
            display_name="SVDQuant Quantize Checkpoint",
            category="Nibble",
            is_output_node=True,
            description=(
                "Makes a 4-bit file of a diffusion model, beside the original, and draws what it"
                " cost layer by layer. An interrupted run goes on where it stopped."
            ),
            search_aliases=["nibble", "quantize", "int4", "4-bit", "nunchaku", "compress model"],
            inputs=_sources() + _expert_options(),
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Combo.Output(
                    "model_name", tooltip="The new file's name; connect it to Load SVDQuant Model."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, model_name, preset, rank):
        if rank % 16:
            return f"rank {rank} is not a multiple of 16; choose 16, 32, 48, 64 …"
        return (
            True
            if preset in PRESET_HELP
            else f"preset {preset!r} is not one of {', '.join(PRESET_HELP)}"
        )

    @classmethod
    def fingerprint_inputs(cls, model_name, filename, rank, **_):
        made = quantizing.file_name(model_name, filename, rank) in loading.quantized_files()
        # unequal to itself: the node runs until its file is there
        return loading.stamp(model_name) if made else float("nan")

    @classmethod
    def execute(
        cls,
        model_name,
        preset,
        filename,
        overwrite,
        rank,
        solver,
        rotation,
        gptq,
        modulation,
        keep_layers,
        w4a16_layers,
        steps,
        memory_gb,
        seed,
        model=None,
        positive=None,
        latent=None,
    ) -> io.NodeOutput:
        recipe = Recipe.from_preset(
            preset,
            rank=rank,
            solver=solver,
            rotation=rotation,
            gptq=_CHOICE[gptq],
            modulation=modulation,
            keep=patterns(keep_layers),
            w4a16=patterns(w4a16_layers),
            seed=seed,
        )
        job = quantizing.Job(
            model_name,
            recipe,
            filename,
            overwrite,
            model,
            positive,
            latent,
            steps,
            memory_gb,
            cls.hidden.unique_id,
        )
        name, report = quantizing.run(job)
        return io.NodeOutput(
            name,
            ui=charts.ui(
                charts.layers_chart(report, name, f"SVDQuant W4A4, rank {rank}, {preset}")
            ),
        )


def _sources() -> list:
    """What to quantize, and how thoroughly: the inputs that everyone sees."""
    help_text = " ".join(f"{name}: {text}" for name, text in PRESET_HELP.items())
    return [
        io.Combo.Input(
            "model_name",
            options=quantizing.sources() or [NO_SOURCES],
            tooltip=(
                "A 16-bit, fp8 or ComfyUI-quantized model in models/diffusion_models. Ignored when"
                " a model is connected."
            ),
        ),
        io.Combo.Input("preset", options=list(PRESET_HELP), default="fast", tooltip=help_text),
        io.String.Input(
            "filename",
            default="",
            tooltip="Name of the new file. Empty: the source's name + -svdq-int4-r<rank>.",
        ),
        io.Boolean.Input(
            "overwrite",
            default=False,
            tooltip="Replace a file of that name that was made with other options.",
        ),
        io.Model.Input(
            "model",
            optional=True,
            tooltip="Quantize this model, with its LoRAs and merges, in place of a file.",
        ),
        io.Conditioning.Input(
            "positive",
            optional=True,
            tooltip=(
                "Prompts to measure the model on (needed for 'best'). Join several with"
                " Conditioning (Combine)."
            ),
        ),
        io.Latent.Input(
            "latent",
            optional=True,
            tooltip="Picture size while measuring. Not connected: 512 × 512.",
        ),
    ]


def _expert_options() -> list:
    """Everything else, collapsed."""
    return [
        io.Int.Input(
            "rank",
            default=32,
            min=16,
            max=256,
            step=16,
            advanced=True,
            tooltip=(
                "Of the 16-bit low-rank branch that carries what 4 bits cannot. More: closer,"
                " larger and slower."
            ),
        ),
        io.Combo.Input(
            "solver",
            options=["alternating", "svd"],
            default="alternating",
            advanced=True,
            tooltip=(
                "alternating: fits branch and 4-bit part in turns and keeps the best. svd: once, as"
                " in the SVDQuant paper."
            ),
        ),
        io.Combo.Input(
            "rotation",
            options=["auto", "on", "off"],
            default="auto",
            advanced=True,
            tooltip=(
                "Mixes 64 channels at a time so that none stands out. auto: measured layer by"
                " layer."
            ),
        ),
        io.Combo.Input(
            "gptq",
            options=["auto", "on", "off"],
            default="auto",
            advanced=True,
            tooltip=(
                "Lets each rounded weight make up for those before it; needs measured inputs. auto:"
                " with 'best'."
            ),
        ),
        io.Combo.Input(
            "modulation",
            options=["w4a16", "keep"],
            default="w4a16",
            advanced=True,
            tooltip=(
                "Layers that see the prompt and not the picture: 4-bit weights, or kept in 16 bit."
            ),
        ),
        io.String.Input(
            "keep_layers",
            default="",
            multiline=True,
            advanced=True,
            tooltip="Layers to keep in 16 bit, a pattern a line, such as double_blocks.0.*",
        ),
        io.String.Input(
            "w4a16_layers",
            default="",
            multiline=True,
            advanced=True,
            tooltip=(
                "Layers to give 4-bit weights but 16-bit inputs, a pattern a line, such as"
                " *.linear2"
            ),
        ),
        io.Int.Input(
            "steps",
            default=8,
            min=1,
            max=100,
            advanced=True,
            tooltip="Sampling steps of each measured prompt.",
        ),
        io.Float.Input(
            "memory_gb",
            default=4.0,
            min=0.25,
            max=256.0,
            step=0.25,
            advanced=True,
            tooltip=(
                "Memory for measurements, in GB. Less: more passes over the prompts, the same"
                " result."
            ),
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**53,
            control_after_generate=False,
            advanced=True,
            tooltip="Of the measured pictures' noise and of every random choice.",
        ),
    ]


class NibbleLoadSVDQuant(io.ComfyNode):
    """Loads a quantized model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleLoadSVDQuant",
            display_name="Load SVDQuant Model",
            category="Nibble",
            has_intermediate_output=True,
            description=(
                "Loads a 4-bit model made by SVDQuant Quantize Checkpoint, or an INT4 file of"
                " Nunchaku or comfy-kitchen. It works as any other model: samplers, LoRA,"
                " ControlNet, low VRAM."
            ),
            search_aliases=["nibble", "nunchaku", "int4", "4-bit", "load quantized"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=loading.quantized_files(KIND) or [NO_FILES],
                    tooltip=(
                        "A 4-bit file in models/diffusion_models: Nibble's own, or a published"
                        " svdq-int4 file. Others are not listed."
                    ),
                ),
                io.Boolean.Input(
                    "verify",
                    default=True,
                    advanced=True,
                    tooltip="Compare every tensor with its checksum before use.",
                ),
                io.Combo.Input(
                    "compute_dtype",
                    options=list(loading.DTYPES),
                    default="default",
                    advanced=True,
                    tooltip=(
                        "What activations and 16-bit layers are computed in. default: what ComfyUI"
                        " chooses for this GPU."
                    ),
                ),
                io.Combo.Input(
                    "modulation_in",
                    options=list(loading.MODULATION),
                    default="vram",
                    advanced=True,
                    optional=True,
                    tooltip=(
                        "Where 4-bit modulation layers stay. ram: about 1.7 GB less VRAM for FLUX;"
                        " the CPU computes them."
                    ),
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="The model, ready for a sampler.")],
        )

    @classmethod
    def validate_inputs(cls, model_name=None):
        try:
            if model_name is not None:  # a linked name is known only when the graph runs
                loading.opened(model_name, KIND)
        except FileRefused as refusal:
            return str(refusal)
        return True

    @classmethod
    def fingerprint_inputs(cls, model_name, **_):
        return loading.stamp(model_name)

    @classmethod
    def execute(cls, model_name, verify, compute_dtype, modulation_in="vram") -> io.NodeOutput:
        file = loading.opened(model_name, KIND)
        model = loading.load(loading.model_path(model_name), verify, compute_dtype, modulation_in)
        chart = charts.model_chart(
            file, loading.vram_needed(model), model.load_device, loading.ram_kept(model)
        )
        return io.NodeOutput(model, ui=charts.ui(chart))


NODES = [NibbleQuantizeSVDQuant, NibbleLoadSVDQuant]
