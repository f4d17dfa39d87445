"""Text encoders in GGUF: llama.cpp's names of their tensors → ComfyUI's, and its order of rows →
that of the published weights.

    enc.blk.N.attn_q   T5 (general.architecture t5, t5encoder); of a whole T5 the decoder, dec.*,
                       is left out
    blk.N.attn_q       Llama, Qwen2, Qwen2-VL, Qwen3; each language model alone: a vision tower lies
                       in another file (mmproj), and pictures need it

For Llama's rotary embedding llama.cpp stores the two halves of each head's rows of q and k in turns
(convert_hf_to_gguf.py, LlamaModel.permute): row 2i + j of a head is row i + j·d/2 of the published
one, d rows a head.

Encoders whose tokenizer ComfyUI reads from the model's own file (Gemma, UMT5, Mistral) are refused:
GGUF keeps it in another form.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from .errors import FileRefused
from .gguf_file import GgufFile
from .stored_tensors import StoredTensor, StoredTensors
from .text_encoders import family_of

_T5 = {
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
    "token_embd": "shared",
    "enc.output_norm": "encoder.final_layer_norm",
}
_LANGUAGE_MODEL = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
# general.architecture → (its names, the stack in llama.cpp's names and in ComfyUI's)
_NAMES: dict[str, tuple[dict[str, str], str, str]] = {
    **dict.fromkeys(("t5", "t5encoder"), (_T5, "enc.blk", "encoder.block")),
    **dict.fromkeys(
        ("llama", "qwen2", "qwen2vl", "qwen3"), (_LANGUAGE_MODEL, "blk", "model.layers")
    ),
}
_OWN_TOKENIZER = ("UMT5", "Gemma", "Mistral", "Ministral")
_LEFT_OUT = ("dec.", "rope_freqs.")
_IN_TURNS = re.compile(r"blk\.\d+\.attn_([qk])\.(weight|bias)")


def in_comfyui_names(file: GgufFile) -> StoredTensors:
    """A text encoder's tensors as ComfyUI has them; any other file as it is. Raises FileRefused for
    an encoder that is not understood.
    """
    if not file.is_encoder:
        return file
    known = _NAMES.get(file.architecture)
    if known is None:
        raise FileRefused(_use_safetensors(file, f"({file.architecture}) in GGUF"))
    encoder = _Encoder(file, *known)
    family = family_of({name: info.shape for name, info in encoder.tensors.items()})
    if family is None:
        raise FileRefused(
            _use_safetensors(file, f"({file.architecture}) that Nibble does not know")
        )
    if family.name.startswith(_OWN_TOKENIZER):
        raise FileRefused(
            _use_safetensors(file, f"({family.name}) whose tokenizer ComfyUI cannot read in GGUF")
        )
    return encoder


def _use_safetensors(file: GgufFile, what: str) -> str:
    return (
        f"{file.name} is a text encoder {what}; choose the same encoder as .safetensors, in 16 bit"
        " or fp8."
    )


class _Encoder(StoredTensors):
    """The same tensors under ComfyUI's names, with rows in the published order."""

    def __init__(self, file: GgufFile, parts: Mapping[str, str], theirs: str, ours: str):
        self.path, self.name, self.metadata, self._file = file.path, file.name, {}, file
        self._theirs: dict[str, str] = {}
        for name in file.tensors:
            if not name.startswith(_LEFT_OUT):
                self._theirs[self._renamed(name, parts, theirs, ours)] = name
        self.tensors: dict[str, StoredTensor] = {
            name: file.tensors[stored] for name, stored in self._theirs.items()
        }
        self.decoded = {
            name: file.decoded[stored]
            for name, stored in self._theirs.items()
            if stored in file.decoded
        }

    def _renamed(self, name: str, parts: Mapping[str, str], theirs: str, ours: str) -> str:
        found = re.fullmatch(rf"(?:{re.escape(theirs)}\.(\d+)\.)?(.+)\.(weight|bias)", name)
        if found is None or found[2] not in parts:
            raise FileRefused(
                _use_safetensors(self._file, f"with a tensor {name} that it should not have")
            )
        block = "" if found[1] is None else f"{ours}.{found[1]}."
        return f"{block}{parts[found[2]]}.{found[3]}"

    def read(self, name: str) -> Tensor:
        stored = self._theirs[name]
        tensor = self._file.read(stored)
        found = _IN_TURNS.fullmatch(stored)
        if self._file.architecture != "llama" or found is None:
            return tensor
        heads = self._file.heads[found[1] == "k"]
        in_turns = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
        return in_turns.transpose(1, 2).reshape(tensor.shape)

    def sample(self, name: str, start: int, count: int) -> bytes:
        return self._file.sample(self._theirs[name], start, count)
