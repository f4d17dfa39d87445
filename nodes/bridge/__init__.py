"""nodes/bridge/ - the only place that imports ComfyUI: its operations, its loader, its progress
bar, its sampler. Each system has a room of its name; what they share lies below.

quantize/   16 bit becomes a low-bit file (SVDQuant, VQ)
intlora/    IntLoRA trained, converted, applied, merged
caching/    TeaCache and SmoothCache
caf/        Constant Acceleration Flow
feather/    visual tokens pruned
training/   whatever is trained beside a frozen MODEL
quantized/  a low-bit model, its LoRAs and its modulation
host/       ComfyUI itself; knows no system
"""
