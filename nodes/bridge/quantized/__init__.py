"""A low-bit model inside ComfyUI.

loading.py      a file becomes a MODEL
linear.py       the Linear that ComfyUI builds its models with (custom_operations)
layouts/        every format as one of ComfyUI's quantized tensors
patches.py      ComfyUI's patches, read as changes of a weight
lora.py         those changes on a 4-bit layer: planned, absorbed, attached
lora_report.py  what the LoRAs on a model do, layer by layer
lora_stack.py   several LoRAs at once by ComfyUI's own loading
mlp.py          an MLP's two linears as one op
modulation.py   modulation layers in RAM
activations.py  how many bits those of 4-bit layers get
preparing.py    GPU kernels compiled before the first step
registration.py the formats in ComfyUI's own loaders of diffusion models
encoders.py     text encoders, in ComfyUI's own loaders and in ours
"""
