"""ComfyUI's own per-layer formats, as a source may be stored in: how comfy-kitchen's layouts read
them.
"""

from typing import Any

# format → comfy-kitchen's layout, its fields → names on disk, its options → their defaults
LAYOUTS: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "mxfp8": ("TensorCoreMXFP8Layout", {"scale": "weight_scale"}, {}),
    "nvfp4": (
        "TensorCoreNVFP4Layout",
        {"scale": "weight_scale_2", "block_scale": "weight_scale"},
        {},
    ),
    "int8_tensorwise": (
        "TensorWiseINT8Layout",
        {"scale": "weight_scale"},
        {"convrot": False, "convrot_groupsize": 256},
    ),
    "convrot_w4a4": (
        "TensorCoreConvRotW4A4Layout",
        {"scale": "weight_scale"},
        {"convrot_groupsize": 256, "linear_dtype": "int4"},
    ),
    "asym_w4a8_int8": (
        "AsymW4A8Int8Layout",
        {"scale": "weight_s_rel", "s_channel": "weight_s_channel", "codebook": "weight_codebook"},
        {"group_size": 16, "convrot_groupsize": 256},
    ),
    "awq_w4a16": (
        "TensorCoreAWQW4A16Layout",
        {"scale": "weight_scale", "zeros": "weight_zeros"},
        {},
    ),
}
PACKED = {"nvfp4", "convrot_w4a4", "asym_w4a8_int8", "awq_w4a16"}  # two weights a byte
# (format, suffix) → the dtype that its bytes may be stored without
VIEWS = {
    ("mxfp8", "weight_scale"): "float8_e8m0fnu",
    ("nvfp4", "weight_scale"): "float8_e4m3fn",
    ("asym_w4a8_int8", "weight_s_rel"): "float8_e4m3fn",
}
# what lies beside X.weight
ACCESSORIES = (
    "weight_scale",
    "weight_scale_2",
    "scale_weight",
    "scale_input",
    "input_scale",
    "pre_quant_scale",
    "weight_zeros",
    "weight_s_rel",
    "weight_s_channel",
    "weight_codebook",
    "comfy_quant",
)
