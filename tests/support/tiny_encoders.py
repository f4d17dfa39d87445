"""ComfyUI's own vision-language text encoders, so small that a test can run them: random weights,
its tokenizer, its CLIP object.
"""

import io
import re
from typing import ClassVar
from unittest import mock

import comfy.sd
import comfy.text_encoders.hunyuan_video
import comfy.text_encoders.llama
import comfy.text_encoders.lt
import comfy.text_encoders.lumina2
import comfy.text_encoders.qwen3vl
import comfy.text_encoders.qwen_image
import comfy.text_encoders.qwen_vl
import torch

LAYERS, WIDTH, HIDDEN = 8, 64, 96
SIZES = dict(
    hidden_size=WIDTH,
    intermediate_size=HIDDEN,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    num_key_value_heads=1,
)
QWEN3 = dict(hidden_size=64, intermediate_size=64, depth=3, deepstack_visual_indexes=[0, 1, 2])
TOWER = comfy.text_encoders.qwen_vl.Qwen2VLVisionTransformer
# Gemma 3: a picture of 8 x 8 tokens, and 5 of 6 layers that look back WINDOW positions
SIDE, WINDOW = 8, 80
SIGLIP = dict(
    num_channels=3,
    hidden_act="gelu_pytorch_tanh",
    hidden_size=64,
    image_size=14 * 2 * SIDE,
    intermediate_size=64,
    model_type="siglip_vision_model",
    num_attention_heads=2,
    num_hidden_layers=2,
    patch_size=14,
)
LLAVA_SIDE = 6


def small_tower(hidden_size, **sizes):
    """Qwen2.5-VL's vision tower with two narrow layers."""
    return TOWER(hidden_size=64, intermediate_size=64, num_heads=2, num_layers=2, **sizes)


class Target:
    """What comfy.sd.CLIP builds from."""

    def __init__(self, clip, tokenizer):
        self.clip, self.tokenizer, self.params = clip, tokenizer, {}


def build(target: Target, name: str, state: dict | None = None, **sizes):
    """A CLIP of these tensors, or with random weights, the same every time, that neither die nor
    grow.
    """
    with (
        mock.patch.object(comfy.text_encoders.qwen_vl, "Qwen2VLVisionTransformer", small_tower),
        mock.patch.dict(comfy.text_encoders.qwen3vl.QWEN3VL_VISION, {"qwen3vl_8b": QWEN3}),
    ):
        clip = comfy.sd.CLIP(
            target,
            model_options={f"{name}_model_config": SIZES | sizes, "dtype": torch.float32},
            state_dict=[] if state is None else [dict(state)],
        )
    if state is not None:
        return clip
    generator = torch.Generator().manual_seed(0)
    for key, weight in clip.cond_stage_model.named_parameters():
        if "norm" in key and key.endswith("weight"):
            weight.data.fill_(1)
        else:
            scale = 1 if "embed_tokens" in key or weight.ndim < 2 else 1 / weight[0].numel() ** 0.5
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return clip


def qwen_image(state: dict | None = None):
    """Qwen-Image-Edit's encoder: Qwen2.5-VL with 8 layers."""
    found = comfy.sd.llama_detect([state or {}])
    return build(
        Target(
            comfy.text_encoders.qwen_image.te(**found),
            comfy.text_encoders.qwen_image.QwenImageTokenizer,
        ),
        "qwen25_7b",
        state,
    )


def qwen3_vl():
    """Qwen3-VL with 8 layers, the first three of which get the picture again (DeepStack)."""
    return build(
        Target(comfy.text_encoders.qwen3vl.te(), comfy.text_encoders.qwen3vl.tokenizer()),
        "qwen3vl_8b",
    )


def _small_gemma(config):
    return mock.patch.multiple(
        config,
        vision_config=SIGLIP,
        mm_tokens_per_image=SIDE**2,
        sliding_attention=[WINDOW] * 5 + [False],
    )


def _gemma_tokenizer(base):
    """ComfyUI's tokenizer with a vocabulary of letters; not filled up to 1024 tokens."""
    import sentencepiece

    text, file = "a red cup and a blue cup stand on the table make it green".split(), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=file,
        model_type="char",
        vocab_size=25,
        hard_vocab_limit=False,
        pad_id=0,  # as Gemma's: 0 is padding to ComfyUI
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    model = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)

    def tokenizer(embedding_directory=None, tokenizer_data=None):
        made = base(embedding_directory, {"spiece_model": model})
        made.min_length = 1
        return made

    return tokenizer


def gemma3_12b():
    """Gemma 3 12B as CLIPLoader gives it, 8 layers: no part of a bigger model, but the model."""
    with _small_gemma(comfy.text_encoders.llama.Gemma3_12B_Config):
        return build(
            Target(
                lambda device, dtype, model_options: comfy.text_encoders.lt.Gemma3_12BModel(
                    device=device,
                    dtype=dtype,
                    model_options={**model_options, "model_name": "gemma3_12b"},
                ),
                _gemma_tokenizer(comfy.text_encoders.lt.Gemma3_12BTokenizer),
            ),
            "gemma3_12b",
        )


def ltx2():
    """LTX-2's encoder: Gemma 3 12B with 8 layers, all of whose states are projected to one. Prompts
    are filled up to 400 tokens at their left.
    """
    module = comfy.text_encoders.lt

    def tokenizer(**options):
        base = _gemma_tokenizer(module.Gemma3_12BTokenizer)
        with mock.patch.object(module, "Gemma3_12BTokenizer", base):
            made = module.LTXAVGemmaTokenizer(**options)
        made.gemma3_12b.min_length = 400
        return made

    with _small_gemma(comfy.text_encoders.llama.Gemma3_12B_Config):
        return build(Target(module.ltxav_te(video_projection_dim=WIDTH), tokenizer), "")


def gemma3_4b():
    """Gemma 3 4B with its vision tower, 8 layers."""
    with _small_gemma(comfy.text_encoders.llama.Gemma3_4B_Vision_Config):
        return build(
            Target(
                comfy.text_encoders.lumina2.te(model_type="gemma3_4b_vision"),
                _gemma_tokenizer(comfy.text_encoders.lumina2.NTokenizer),
            ),
            "gemma3_4b_vision",
        )


class Llama3Letters:
    """Llama 3's tokenizer with its marks, and of its vocabulary the letters alone."""

    MARKS: ClassVar[dict[str, int]] = {
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eot_id|>": 128009,
        "<image>": 128257,
        "\n\n": 271,
        "user": 882,
    }

    @classmethod
    def from_pretrained(cls, _path):
        return cls()

    def get_vocab(self) -> dict[str, int]:
        return self.MARKS

    def __call__(self, text: str) -> dict[str, list[int]]:
        pieces = re.split("(" + "|".join(map(re.escape, self.MARKS)) + ")", text)
        ids = [128000]
        for piece in pieces:
            ids += [self.MARKS[piece]] if piece in self.MARKS else list(piece.encode())
        return {"input_ids": ids}


def hunyuan_video():
    """HunyuanVideo's CLIP-L and LLaVA-Llama 3 with 8 layers."""
    module = comfy.text_encoders.hunyuan_video
    with mock.patch.object(module, "LlamaTokenizerFast", Llama3Letters):
        return build(Target(module.hunyuan_video_clip(), module.HunyuanVideoTokenizer), "llama")


def llava_output(seed: int = 0) -> torch.Tensor:
    """What a CLIP vision model with LLaVA's projector gives of one picture (1, tokens, width)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, LLAVA_SIDE**2, WIDTH, generator=generator)


def image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """A random picture (1, height, width, 3)."""
    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(seed))
