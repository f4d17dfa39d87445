"""What the emulator assumes of a Hopper, held against one: the first thing to run on it.

kernels.cuh   a small kernel for each instruction
probes        their operands and expected results
on_gpu        compiled by NVRTC and started through CUDA's driver
entry.cpp     the same kernels in the emulator, which proves the expected results
"""
