"""DiT by the command line, under its authors' names and diffusers': quantized by both methods,
calibrated without data, and loaded into diffusers.
"""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import nibble
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.safetensors import tensor_bytes
from nibble.quant.files.source import Source
from nibble.quant.files.source_files import open_stored

diffusers = pytest.importorskip("diffusers")

import authors_dit  # noqa: E402
from nibble.quant import diffusers as models  # noqa: E402
from nibble.quant.job.measurement import Measurement  # noqa: E402
from nibble.quant.vq4dit.quantize import quantize_checkpoint  # noqa: E402
from nibble.quant.vq4dit.recipe import Recipe  # noqa: E402
from nibble.quant.weights.base import StoredLinear  # noqa: E402

BLOCK = "transformer_blocks.1."


@pytest.fixture(scope="module")
def state():
    return authors_dit.state()


@pytest.fixture(scope="module")
def authors(state, tmp_path_factory):
    """A file under the authors' names."""
    path = tmp_path_factory.mktemp("dit") / "DiT-tiny.safetensors"
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def folder(authors, tmp_path_factory):
    """The same model as diffusers saves it, a pipeline's folder."""
    folder = tmp_path_factory.mktemp("diffusers") / "DiT-tiny"
    model = models.dit_model(Source(authors))
    for block in model.transformer_blocks:  # as diffusers has them
        block.norm1.emb = copy.deepcopy(block.norm1.emb)
    model.save_pretrained(folder / "transformer")
    return folder


def called(model, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    t, labels = torch.tensor([700, 20]), torch.tensor([3, authors_dit.CLASSES])
    with torch.no_grad():
        if isinstance(model, dict):
            return authors_dit.forward(model, x, t, labels)
        return model(x, timestep=t, class_labels=labels).sample


def decibels(exact, other):
    return (10 * torch.log10(exact.square().sum() / (other - exact).square().sum())).item()


def test_the_authors_model_in_diffusers_computes_what_their_paper_says(authors, state):
    """Positions, frequencies of time and the eps of norms included, which diffusers' own
    conversion changes.
    """
    model = models.dit_model(Source(authors))
    torch.testing.assert_close(called(model), called(state), atol=2e-5, rtol=2e-5)


def test_names_there_and_back_are_the_same_bits(authors, state):
    stored = open_stored(authors)
    back = {"pos_embed": stored.read("pos_embed.pos_embed")}
    first = "transformer_blocks.0.norm1.emb."
    pairs = {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": f"{first}timestep_embedder.linear_1",
        "t_embedder.mlp.2": f"{first}timestep_embedder.linear_2",
        "y_embedder.embedding_table": f"{first}class_embedder.embedding_table",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    }
    for i in range(authors_dit.DEPTH):
        pairs |= {
            f"blocks.{i}.attn.proj": f"transformer_blocks.{i}.attn1.to_out.0",
            f"blocks.{i}.mlp.fc1": f"transformer_blocks.{i}.ff.net.0.proj",
            f"blocks.{i}.mlp.fc2": f"transformer_blocks.{i}.ff.net.2",
            f"blocks.{i}.adaLN_modulation.1": f"transformer_blocks.{i}.norm1.linear",
        }
        for kind in ("weight", "bias"):
            parts = [f"transformer_blocks.{i}.attn1.to_{part}.{kind}" for part in "qkv"]
            back[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat([stored.read(part) for part in parts])
    for theirs, ours in pairs.items():
        for kind in ("weight", "bias"):
            if f"{theirs}.{kind}" in state:
                back[f"{theirs}.{kind}"] = stored.read(f"{ours}.{kind}")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_rows_of_a_joined_matrix_are_sampled_where_they_lie(authors, state):
    stored, width = open_stored(authors), authors_dit.WIDTH
    keys = state["blocks.1.attn.qkv.weight"][width : 2 * width]
    wanted = bytes(tensor_bytes(keys.contiguous()))
    name = f"{BLOCK}attn1.to_k.weight"
    assert stored.tensors[name].nbytes == len(wanted)
    assert stored.sample(name, 0, 64) == wanted[:64]
    assert stored.sample(name, len(wanted) - 10, 64) == wanted[-10:]


@pytest.mark.parametrize(("method", "floor"), [("svdquant", 13), ("vq", 9)])
@pytest.mark.parametrize("kind", ["authors", "folder"])
def test_both_names_are_quantized_by_both_methods_and_load(
    kind, method, floor, request, state, tmp_path
):
    target = tmp_path / "q.safetensors"
    source = request.getfixturevalue(kind)
    report = nibble.quantize(source, target, method=method, memory_cap=0, quiet=True)
    assert report.architecture == "DiT (diffusers)"
    open_quantized(target).verify()
    model = nibble.load(target, torch.float32)
    layers = {name for name, module in model.named_modules() if isinstance(module, StoredLinear)}
    assert len(layers) == 7 * authors_dit.DEPTH
    assert f"{BLOCK}attn1.to_k" in layers
    exact = called(models.dit_model(Source(source)))
    assert decibels(exact, called(model)) > floor


def test_embedders_that_are_alike_are_stored_once(authors, folder, tmp_path):
    def stored(source) -> int:
        target = tmp_path / "q.safetensors"
        nibble.quantize(
            source, target, method="vq", memory_cap=0, quiet=True, keep=["*attn*"], overwrite=True
        )
        nibble.load(target)
        return sum(".norm1.emb." in name for name in open_quantized(target).units)

    assert stored(authors) == stored(folder) == 5
    path = tmp_path / "another" / "transformer"
    shutil.copytree(folder / "transformer", path)
    file = path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state[f"{BLOCK}norm1.emb.timestep_embedder.linear_1.bias"][0] += 1
    save_file(state, file, {"format": "pt"})
    assert stored(path) == 5 * authors_dit.DEPTH


def test_a_dit_is_calibrated_without_data_by_the_command_line_as_by_a_script(folder, tmp_path):
    line, script = tmp_path / "line.safetensors", tmp_path / "script.safetensors"
    options = {"method": "vq", "preset": "vq4dit", "bits": 2, "steps": 2}
    nibble.quantize(folder, line, quiet=True, **options)
    kind = diffusers.DiTTransformer2DModel
    model = kind.from_pretrained(folder / "transformer", low_cpu_mem_usage=False)
    teacher = models.dit_teacher(model.eval(), models.dit_scheduler())
    recipe = Recipe.from_preset("vq4dit", bits=2, steps=2)
    quantize_checkpoint(models.dit_source(model), script, recipe, Measurement(teacher=teacher))
    one, other = load_file(line), load_file(script)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert open_quantized(line).fact("calibration")["kind"] == "random classes"


def test_what_layers_read_is_recorded_on_random_classes(authors, tmp_path):
    target = tmp_path / "fast.safetensors"
    report = nibble.quantize(authors, target, quiet=True, steps=3)
    assert open_quantized(target).fact("calibration") == {
        "kind": "random classes", "pictures": 16, "steps": 3, "guidance": 4.0, "seed": 0,
    }  # fmt: skip
    assert {row.on for row in report.rows if row.action == "w4a4"} == {"pictures"}


@pytest.mark.parametrize("option", [{"width": 256}, {"shift": 1.0}, {"prompts": "p.safetensors"}])
def test_options_of_prompts_are_refused(authors, tmp_path, option):
    with pytest.raises(ValueError, match="is a DiT, which draws classes in one size; leave it out"):
        nibble.quantize(authors, tmp_path / "q.safetensors", quiet=True, **option)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("pos_embed"), "lacks pos_embed, so the file is not complete"),
        (
            lambda s: s.update({"blocks.0.attn.qkv.weight": torch.zeros(100, 128)}),
            "has 100 rows in blocks.0.attn.qkv.weight",
        ),
        (
            lambda s: s.update({"pos_embed": torch.zeros(1, 15, 128)}),
            "a width of 128 and 15 positions",
        ),
        (lambda s: s.pop("blocks.0.attn.proj.weight"), "lacks"),
    ],
)
def test_a_damaged_file_of_the_authors_is_refused(state, tmp_path, change, said):
    changed, path = dict(state), tmp_path / "DiT.safetensors"
    change(changed)
    save_file(changed, path)
    with pytest.raises(FileRefused, match=said):
        nibble.quantize(path, tmp_path / "q.safetensors", quiet=True, preset="best")


def test_a_file_without_its_config_is_quantized_from_its_weights_alone(folder, tmp_path):
    path, target = tmp_path / "lonely.safetensors", tmp_path / "q.safetensors"
    save_file(load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"), path)
    nibble.quantize(path, target, quiet=True)
    assert open_quantized(target).fact("calibration") == {"kind": "weights only"}
    with pytest.raises(FileRefused, match=r"diffusers' config\.json"):
        nibble.load(target)
    with pytest.raises(FileRefused, match="choose the folder that diffusers saved"):
        nibble.quantize(path, tmp_path / "b.safetensors", method="vq", preset="best", quiet=True)


def test_a_config_of_another_program_is_not_obeyed(authors, tmp_path):
    """A file names models of diffusers alone, whatever its metadata say."""
    target, other = tmp_path / "q.safetensors", tmp_path / "other.safetensors"
    nibble.quantize(authors, target, memory_cap=0, quiet=True)
    metadata = open_quantized(target).metadata
    config = {"_class_name": "DiffusionPipeline"}
    kept = {key: metadata[key] for key in ("format", "nibble_version", "method")}
    save_file(load_file(target), other, kept | {"config": json.dumps(config)})
    with pytest.raises(FileRefused, match="none of the models that load"):
        nibble.load(other)
