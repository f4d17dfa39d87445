"""SVDQuant on 4-bit floats (NVFP4) in the place of integers.

decompose.py  one layer: 4-bit part + low rank, in turns
quantize.py   a checkpoint, and the choices of its run
"""
