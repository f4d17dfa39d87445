"""What runs an op: compiled kernels, Triton's, comfy-kitchen's, or the reference.

choose          which of the four, for a device and dtypes, with the reason in words
native          compiled kernels: which serve a device, what they can take, and operands for them
compiled        an op's arguments by name -> the bytes that compiled code takes
cpu_library     the package's C library for the CPU; cpu_library_build makes it
native_w4a4     tensors into pointers for the W4A4 ops
native_w4a16    the same for weights alone in 4 bits
native_w4a8     the same for 4-bit weights that are read as int8
native_vq       the same for codebook weights
native_nvfp4    the same for 4-bit floats, tried on a small linear first
cubins          the interface of nibble_kernels for GPUs, with nothing compiled for this Python
triton          Triton: which GPUs it serves, tried on a small linear first
triton_w4a4     tensors into launches for the W4A4 ops
triton_kernels  their two kernels
triton_w4a8     the same for 4-bit weights that are read as int8
triton_w4a8_kernels  their two kernels
triton_vq       the same for codebooks
triton_vq_kernels  their kernel
triton_nvfp4    the same for 4-bit floats
triton_nvfp4_kernels  their two kernels
nvfp4           4-bit floats on Blackwell, through torch's scaled product; the trial of every way
kitchen         comfy-kitchen's kernels for NVIDIA and AMD
"""
