"""Safetensors files on disk; knows no method.

checkpoint.py  a file of low-bit layers: read, checked, verified
writer.py      written layer by layer, atomic, resumable
atomic.py      whole or not there; one run at a time
source.py      the 16-bit model that is quantized
"""
