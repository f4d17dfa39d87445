"""Modulation layers (27 % of a 4-bit FLUX, 2 MB of results a step) outside of VRAM.

precompute.py  their results for a whole run, computed ahead
cpu_int4.py    torch's 4-bit matrix product on the CPU
"""
