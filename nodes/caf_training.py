"""The CAF training nodes: couplings of noise and a teacher's pictures, and the heads that learn
from them.
"""

from comfy_api.latest import io

from ..accel.caf.objectives import DISTANCES
from . import file_nodes, menu, training_inputs
from .bridge.caf import load as caf_model
from .bridge.caf.couplings import folder_of, make_couplings
from .bridge.caf.teacher import DEFAULT, CouplingsJob
from .bridge.caf.train import OPTIMIZERS, RECIPE, Options, TrainingJob, train
from .bridge.host import charts, node_files
from .bridge.training.session import Settings
from .widgets import patterns


class NibbleMakeCAFCouplings(file_nodes.FileNode):
    """Pairs of noise and the picture that the connected model makes of it, for Train CAF."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleMakeCAFCouplings",
            display_name="Make CAF Couplings",
            category=menu.FEW_STEPS,
            is_output_node=True,
            is_input_list=True,
            description=(
                "Generates pictures with a flow model, its sampler and all of its steps,"
                " and stores each with the noise that it came from, for Train CAF. Stop"
                " whenever you like: the next run resumes, and a larger count adds pairs."
            ),
            search_aliases=[
                "nibble",
                "caf",
                "couplings",
                "reflow",
                "rectified flow",
                "distill",
                "pairs",
                "constant acceleration flow",
            ],
            inputs=_couplings_inputs(),
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Custom("CAF_COUPLINGS").Output(
                    "couplings", tooltip="The stored pairs, for Train CAF."
                )
            ],
        )

    @classmethod
    def execute(cls, positive, latent_image, negative=None, **widgets) -> io.NodeOutput:
        # the node takes lists of prompts, so everything comes as a list
        one = {name: values[0] for name, values in widgets.items()}
        job = CouplingsJob(
            model=one["model"],
            positive=positive,
            latents=latent_image,
            sampler=one["sampler"],
            sigmas=one["sigmas"],
            count=one["count"],
            seed=one["seed"],
            filename=one["filename"],
            negative=negative,
            cfg=one["cfg"],
            batch=one["batch_size"],
            overwrite=one["overwrite"],
            node_id=cls.hidden.unique_id,
        )
        couplings, chart = make_couplings(job)
        node_files.remember(job.node_id, folder_of(job.filename))
        return io.NodeOutput(couplings, ui=charts.ui(chart))


class NibbleTrainCAF(file_nodes.FileNode):
    """Both heads of Constant Acceleration Flow, learned from couplings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleTrainCAF",
            display_name="Train CAF",
            category=menu.FEW_STEPS,
            is_output_node=True,
            description=(
                "Teaches a flow model to do in two or three calls what its sampler does"
                " in many: trains the two heads of Constant Acceleration Flow on"
                " couplings and saves them as a CAF file. Stop whenever you like: the"
                " next run resumes where it stopped."
            ),
            search_aliases=[
                "nibble",
                "caf",
                "constant acceleration flow",
                "distill",
                "few steps",
                "turbo",
                "lightning",
                "rectified flow",
                "train",
            ],
            inputs=_training_inputs(),
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Combo.Output(
                    "caf_name", tooltip="The new file's name; connect it to Load CAF Model."
                ),
                io.Custom("LOSS_MAP").Output(
                    "loss_map",
                    tooltip=(
                        "The loss of every step, first of the velocity net, then of the"
                        " acceleration net, for Plot Loss Graph."
                    ),
                ),
                io.Int.Output("steps", tooltip="Total steps trained, both nets together."),
            ],
        )

    @classmethod
    def execute(  # noqa: PLR0913 (the inputs)
        cls,
        model,
        couplings,
        filename,
        overwrite,
        steps,
        learning_rate,
        rank,
        h,
        batch_size,
        grad_accumulation_steps,
        optimizer,
        seed,
        training_dtype,
        gradient_checkpointing,
        offloading,
        layers,
        preview_every,
        loss_function="MSE",
    ) -> io.NodeOutput:
        options = Options(
            steps=steps,
            lr=learning_rate,
            optimizer=optimizer,
            accumulate=grad_accumulation_steps,
            seed=seed,
            save_every=250,
            **RECIPE,
        )
        settings = Settings(
            batch=batch_size,
            loss=loss_function,
            dtype=training_dtype,
            checkpointing=gradient_checkpointing,
            offloading=offloading,
            seed=seed,
        )
        trained = train(
            TrainingJob(
                model=model,
                couplings=couplings,
                filename=filename,
                options=options,
                settings=settings,
                rank=rank,
                h=h,
                overwrite=overwrite,
                layers=patterns(layers),
                preview_every=preview_every,
                node_id=cls.hidden.unique_id,
            )
        )
        cls.made(trained.name, caf_model.FOLDER)
        return io.NodeOutput(
            trained.name, {"loss": trained.losses}, trained.steps, ui=charts.ui(trained.chart)
        )


def _couplings_inputs() -> list:
    return [
        io.Model.Input(
            "model",
            tooltip=(
                "The teacher: a model such as FLUX, SD3, Qwen-Image, Wan or SDXL, with its LoRAs."
            ),
        ),
        io.Conditioning.Input(
            "positive",
            tooltip=(
                "One prompt or many, combined or as a list. They take turns: pair i uses"
                " prompt i modulo their number."
            ),
        ),
        io.Latent.Input(
            "latent_image", tooltip="An empty latent of the size that the pictures should have."
        ),
        io.Sampler.Input(
            "sampler",
            tooltip=(
                "The teacher's sampler. It must not add noise along the way: euler, heun,"
                " dpmpp_2m, uni_pc."
            ),
        ),
        io.Sigmas.Input(
            "sigmas",
            tooltip=(
                "The teacher's schedule, down to 0: all the steps of a good picture, such as 28."
            ),
        ),
        io.Conditioning.Input(
            "negative",
            optional=True,
            tooltip=(
                "For a cfg other than 1. The guidance is learned with the pictures:"
                " sample the result without CFG."
            ),
        ),
        io.Int.Input(
            "count",
            default=1000,
            min=1,
            max=10_000_000,
            tooltip=(
                "Total number of pairs. Existing ones are not made again; a larger count"
                " adds to them."
            ),
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**53,
            control_after_generate=False,
            tooltip="Pair i starts from the noise of seed + i.",
        ),
        io.String.Input(
            "filename", default=DEFAULT, tooltip="Name of the folder in output/caf_couplings."
        ),
        io.Boolean.Input(
            "overwrite",
            default=False,
            tooltip="Delete existing pairs of this name that were made with other inputs.",
        ),
        io.Float.Input(
            "cfg",
            default=1.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            advanced=True,
            tooltip=(
                "The teacher's guidance, for models that need it. The guided picture is"
                " what is learned: sample the result of Train CAF with cfg 1."
            ),
        ),
        io.Int.Input(
            "batch_size",
            default=1,
            min=1,
            max=4096,
            advanced=True,
            tooltip=(
                "Pictures of one prompt that are generated together. More is faster if"
                " there is memory."
            ),
        ),
    ]


def _training_inputs() -> list:
    return [
        io.Model.Input(
            "model",
            tooltip=(
                "The model to teach, 16-bit or quantized: the one that made the"
                " couplings, or a quantized version of it. It is not changed."
            ),
        ),
        io.Custom("CAF_COUPLINGS").Input(
            "couplings",
            tooltip="Pairs of noise and the teacher's picture, from Make CAF Couplings.",
        ),
        io.String.Input(
            "filename",
            default="trained",
            tooltip="Name of the new file in models/caf. Ends in .caf.safetensors.",
        ),
        training_inputs.overwrite(),
        io.Int.Input(
            "steps",
            default=1000,
            min=1,
            max=1000000,
            tooltip="Training steps for each of the two nets.",
        ),
        io.Float.Input(
            "learning_rate",
            default=0.001,
            min=0.0000001,
            max=1.0,
            step=0.0000001,
            round=0.0000001,
            tooltip=(
                "How much each step changes at first; it falls to zero over each net's"
                " steps. Too high: the loss jumps. May be changed when a run is resumed."
            ),
        ),
        io.Int.Input(
            "rank",
            default=16,
            min=0,
            max=1024,
            tooltip=(
                "How much can be learned, and how large the file is. 0: trains whole"
                " layers, for small models."
            ),
        ),
        io.Float.Input(
            "h",
            default=1.0,
            min=0.0,
            max=2.0,
            step=0.05,
            round=0.001,
            tooltip=(
                "Speed at the start of a path, relative to its mean. 1: constant. Above"
                " 1: fast through the noise, slower toward the picture (the paper: 1.5)."
                " Below 1: the reverse."
            ),
        ),
        io.Int.Input(
            "batch_size",
            default=1,
            min=1,
            max=10000,
            advanced=True,
            tooltip="Pairs per batch. They go through the model together.",
        ),
        training_inputs.accumulation(),
        io.Combo.Input(
            "optimizer",
            options=list(OPTIMIZERS),
            default="AdamW",
            advanced=True,
            tooltip="The rule that updates the heads at each step.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**53,
            control_after_generate=False,
            advanced=True,
            tooltip=(
                "Seed for the heads' initial values and for the order of the pairs and times."
            ),
        ),
        *training_inputs.memory(),
        io.String.Input(
            "layers",
            default="",
            multiline=True,
            advanced=True,
            tooltip=(
                "Layers to train, one pattern per line, such as double_blocks.*attn*."
                " Empty: all linear layers of the blocks."
            ),
        ),
        io.Int.Input(
            "preview_every",
            default=50,
            min=0,
            max=100000,
            advanced=True,
            tooltip=(
                "Steps between previews: a pair that is not trained on, sampled in 3"
                " calls, and the error of such pairs. 0: none."
            ),
        ),
        io.Combo.Input(
            "loss_function",
            options=list(DISTANCES),
            default="MSE",
            optional=True,
            advanced=True,
            tooltip=(
                "How the distance to the teacher is measured. Huber: pairs that do not fit the"
                " others count less."
            ),
        ),
    ]


NODES = [NibbleMakeCAFCouplings, NibbleTrainCAF]
