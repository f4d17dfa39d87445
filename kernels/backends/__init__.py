"""What runs an op: compiled kernels, comfy-kitchen's, or the reference.

choose        which of the three, for a device and dtypes, with the reason in words
native        nibble_kernels: found if installed, what it can take, and operands for it
native_w4a4   tensors into pointers for the W4A4 ops
native_w4a16  the same for weights alone in 4 bits
native_vq     the same for codebook weights
kitchen       comfy-kitchen's CUDA kernels
"""
