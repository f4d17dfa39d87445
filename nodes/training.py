"""Train IntLoRA: teach a 4-bit model, or a rounded 16-bit one, a concept from pictures."""

from comfy_api.latest import io

from . import file_nodes, menu, training_inputs
from .bridge.host import charts
from .bridge.intlora import files as intlora
from .bridge.intlora.train import BASES, INTEGERS, NONE, OPTIMIZERS, Job, Options, run
from .bridge.training.dataset import LOSSES
from .bridge.training.session import Settings
from .widgets import patterns

VARIANTS = ["shift_add", "mul", "shift"]


class NibbleTrainIntLoRA(file_nodes.FileNode):
    """An adapter of a 4-bit model's integers, learned from pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleTrainIntLoRA",
            display_name="Train IntLoRA",
            category=menu.LORA,
            is_output_node=True,
            is_input_list=True,
            description=(
                "Teaches a 4-bit model a style or a subject from pictures and saves what"
                " it learned as an IntLoRA. Stop whenever you like: the next run resumes"
                " where it stopped."
            ),
            search_aliases=[
                "nibble",
                "intlora",
                "train lora",
                "fine-tune",
                "qlora",
                "finetune 4-bit",
            ],
            inputs=_main_inputs() + _expert_inputs(),
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Combo.Output(
                    "intlora_name", tooltip="The new file's name; connect it to Apply IntLoRA."
                ),
                io.Custom("LORA_MODEL").Output(
                    "lora",
                    tooltip=(
                        "The same adapter as an ordinary LoRA, for Load LoRA Model and Save LoRA"
                        " Weights. With shift_add on a 4-bit model it gives the same result as the"
                        " file; all else is exact only in the file."
                    ),
                ),
                io.Custom("LOSS_MAP").Output(
                    "loss_map", tooltip="The loss of every step, for Plot Loss Graph."
                ),
                io.Int.Output(
                    "steps", tooltip="Total steps trained, including those of existing_lora."
                ),
            ],
        )

    @classmethod
    def execute(cls, model, latents, positive, **widgets) -> io.NodeOutput:
        # the node takes lists of pictures and prompts, so everything comes as a list
        one = {name: values[0] for name, values in widgets.items()}
        options = Options(
            steps=one["steps"],
            lr=one["learning_rate"],
            optimizer=one["optimizer"],
            accumulate=one["grad_accumulation_steps"],
            seed=one["seed"],
            save_every=250,
        )
        settings = Settings(
            batch=one["batch_size"],
            loss=one["loss_function"],
            dtype=one["training_dtype"],
            checkpointing=one["gradient_checkpointing"],
            offloading=one["offloading"],
            seed=one["seed"],
        )
        trained = run(
            Job(
                model=model[0],
                latents=latents,
                positive=positive,
                filename=one["filename"],
                options=options,
                settings=settings,
                variant=one["variant"],
                rank=one["rank"],
                overwrite=one["overwrite"],
                existing=one["existing_lora"],
                layers=patterns(one["layers"]),
                preview_every=one["preview_every"],
                node_id=cls.hidden.unique_id,
                base=one.get("base", INTEGERS),
            )
        )
        cls.made(trained.name, intlora.FOLDER)
        return io.NodeOutput(
            trained.name,
            trained.lora,
            {"loss": trained.losses},
            trained.steps,
            ui=charts.ui(trained.chart),
        )


def _main_inputs() -> list:
    """What to learn, and how long: the inputs that everyone sees."""
    return [
        io.Model.Input(
            "model",
            tooltip=(
                "The 4-bit model to teach, from Load SVDQuant Model; or a 16-bit model, with base"
                " set to round to nearest. It is not changed."
            ),
        ),
        io.Latent.Input(
            "latents",
            tooltip=(
                "The pictures to learn from, encoded with VAE Encode. Different sizes may be mixed."
            ),
        ),
        io.Conditioning.Input(
            "positive",
            tooltip="One prompt for all pictures, or one per picture, in the same order.",
        ),
        io.String.Input(
            "filename",
            default="trained",
            tooltip="Name of the new file in models/intlora. Ends in .intlora.safetensors.",
        ),
        training_inputs.overwrite(),
        io.Int.Input(
            "steps",
            default=500,
            min=1,
            max=100000,
            tooltip="Training steps: how often the adapter is updated.",
        ),
        io.Float.Input(
            "learning_rate",
            default=0.0005,
            min=0.0000001,
            max=1.0,
            step=0.0000001,
            round=0.0000001,
            tooltip=(
                "How much each step changes. Too high: the loss jumps. Too low: nothing"
                " is learned. May be changed when a run is resumed."
            ),
        ),
        io.Int.Input(
            "rank",
            default=8,
            min=1,
            max=128,
            tooltip=(
                "How much can be learned, and how large the file is. 8 to 16 for a"
                " subject, more for a style."
            ),
        ),
        io.Combo.Input(
            "variant",
            options=VARIANTS,
            default="shift_add",
            tooltip=(
                "How the adapter joins the integers. shift_add: adds below them; fastest,"
                " and several can be combined. mul, shift: multiply or shift them; only one at"
                " a time. The IntLoRA paper has mul and shift on a base that is rounded to"
                " nearest."
            ),
        ),
    ]


def _expert_inputs() -> list:
    """Everything else, collapsed."""
    return [
        io.Int.Input(
            "batch_size",
            default=1,
            min=1,
            max=10000,
            advanced=True,
            tooltip=(
                "Pictures per batch. Those with the same prompt and size go through the"
                " model together."
            ),
        ),
        training_inputs.accumulation(),
        io.Combo.Input(
            "optimizer",
            options=list(OPTIMIZERS),
            default="AdamW",
            advanced=True,
            tooltip="The rule that updates the adapter at each step.",
        ),
        io.Combo.Input(
            "loss_function",
            options=list(LOSSES),
            default="MSE",
            advanced=True,
            tooltip="How the distance to the picture is measured.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**53,
            control_after_generate=False,
            advanced=True,
            tooltip=(
                "Seed for the adapter's initial values, the order of the pictures, the"
                " times, the noise and the previews."
            ),
        ),
        *training_inputs.memory(),
        io.Combo.Input(
            "existing_lora",
            options=[*intlora.adapter_files(), NONE],
            default=NONE,
            advanced=True,
            tooltip=("An IntLoRA of this model to continue from, with the same rank and variant."),
        ),
        io.String.Input(
            "layers",
            default="",
            multiline=True,
            advanced=True,
            tooltip=(
                "Layers to train, one pattern per line, such as double_blocks.*attn*."
                " Empty: all W4A4 layers. *: modulation too."
            ),
        ),
        io.Int.Input(
            "preview_every",
            default=50,
            min=0,
            max=100000,
            advanced=True,
            tooltip=(
                "Steps between previews of the first prompt, always from the same noise. 0: none."
            ),
        ),
        io.Combo.Input(
            "base",
            options=list(BASES),
            default=INTEGERS,
            optional=True,
            advanced=True,
            tooltip=(
                "The integers to teach. round to nearest: those of a connected 16-bit model, in 8"
                " or 4 bits, with the IntLoRA paper's auxiliary matrix; mul and shift can then"
                " change nearly all (8 bits) or about four fifths (4 bits) of the weights. round"
                " to odd: none of the integers is 0, so that all can change."
            ),
        ),
    ]


NODES = [NibbleTrainIntLoRA]
