"""Tiny files of every format that the library reads, whole."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import small_files
from calibrations import calibration
from intlora_bases import N, adapters, bases, paper, svdquant, w4a16
from nibble.accel.caf import heads_file
from nibble.quant.files.known_shapes import flux1_shapes
from nibble.quant.files.report import LayerRow, Report
from nibble.quant.files.safetensors import TensorSpec, read_header
from nibble.quant.files.writer import Writer, metadata_room
from nibble.quant.intlora import file as intlora
from nibble.quant.intlora.adapter import Adapter
from nibble.quant.vq4dit.fit import Fitted
from nibble.quant.weights.base import json_tensor
from published_files import RandomFlux


def _written(path: Path, method: str, tensors: dict[str, Tensor]) -> None:
    row = LayerRow("a", "w4a4", "in a block", 40.0, 100, 30)
    metadata = {
        "format": "nibble",
        "nibble_version": "1",
        "method": method,
        "source": json.dumps({"name": "m.safetensors", "bytes": 100, "fingerprint": "0" * 64}),
        "recipe": json.dumps({"preset": "fast", "rank": 16}),
        "calibration": json.dumps({"kind": "weights only"}),
        "report": Report("FLUX.1", [row]).to_json(seconds=False),
    }
    specs = [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    with Writer(path, specs, "sample", metadata_room(metadata)) as writer:
        writer.write("all", tensors, {})
        writer.finish([metadata])


def svdquant_file(path: Path) -> None:
    """Nibble's own: a layer of each 4-bit format, and what stays in 16 bit."""
    plain = {"norm.scale": torch.ones(8).bfloat16()}
    layers = svdquant(act_unsigned=True).tensors("a") | w4a16().tensors("b")
    _written(path, "svdquant", plain | layers)


def vq_file(path: Path) -> None:
    """Nibble's own: a layer of codewords."""
    codebook = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    codes = torch.arange(N * 16).reshape(N, 16) % 16
    fitted = Fitted(codes, codebook, torch.ones(N), torch.zeros(N), 64)
    _written(path, "vq", fitted.pack().tensors("a"))


def intlora_file(path: Path) -> None:
    """An adapter with a layer of each variant, and one with the auxiliary matrix."""
    layers = {f"layer.{name}": layer for name, layer in adapters(bases()["int4"]).items()}
    intlora.save(Adapter(layers | {"paper": paper("mul")[1]}, {"steps": 7}), path)


def older(make: Callable[[Path], None]) -> Callable[[Path], None]:
    """The same as it was written before headers had a checksum: what that covers must be refused
    for itself.
    """

    def written(path: Path) -> None:
        make(path)
        metadata = dict(read_header(path).metadata)
        metadata.pop("header_checksum")
        save_file(load_file(path), path, metadata)

    return written


def nunchaku_file(path: Path) -> None:
    """Nunchaku's, in one file."""
    blocks, others = RandomFlux(single=1).nunchaku(modern=True)
    _save(blocks | others, path, {"model_class": "NunchakuFlux", "config": '{"num_layers": 1}'})


def kitchen_file(path: Path) -> None:
    """comfy-kitchen's: the same layers under its names."""
    _save(RandomFlux(single=1).nibble(), path)


def source_file(path: Path) -> None:
    """A 16-bit model, as it is downloaded."""
    _save(_flux(), path, {"config": "{}"})


def fp8_file(path: Path) -> None:
    """The same in fp8, with a scale for each matrix, told by layer and in the metadata."""
    state = _flux()
    said = {}
    for name in [name for name, tensor in state.items() if tensor.dim() == 2]:
        module = name.removesuffix(".weight")
        state[name] = state[name].to(torch.float8_e4m3fn)
        state[f"{module}.weight_scale"] = torch.tensor(0.5)
        said[module] = {"format": "float8_e4m3fn"}
    first = min(said)
    state[f"{first}.comfy_quant"] = json_tensor(said.pop(first))
    _save(state, path, {"_quantization_metadata": json.dumps({"layers": said})})


def _flux() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(shape, generator=draw) * 0.05).bfloat16()
        for name, shape in flux1_shapes(1, 1, 128, 64, 64).items()
    }


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def caf_file(path: Path) -> None:
    heads_file.save_file(small_files.heads(), path)


def state_file(path: Path) -> None:
    """Of a training of four steps."""
    small_files.train(path)


def calibration_file(path: Path) -> None:
    calibration().save(path)
