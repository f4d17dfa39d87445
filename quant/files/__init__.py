"""Safetensors files on disk; knows no method.

errors.py       the error that tells a person what is wrong with a file
safetensors.py  header, tensors and checksums of any safetensors file, read and checked
checkpoint.py   a file of low-bit layers: one protocol, and Nibble's own format
writer.py       a file written layer by layer, atomic, resumable
source.py       the 16-bit model that is quantized
"""
