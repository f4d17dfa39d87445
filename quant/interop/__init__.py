"""Low-bit files of other programs (Nunchaku's, comfy-kitchen's), read as if they were Nibble's own,
and written for those programs.

opening.py         which program wrote a file; the file opened
identify.py        what any file of ComfyUI's folders is, in one line
nunchaku_read.py   Nunchaku's INT4 files, and diffusers' dialect of them
nunchaku_fp4.py    Nunchaku's NVFP4 files; nunchaku_fp4_write.py the way back
nunchaku_folder.py those of them that are a folder
nunchaku_check.py  what can be wrong with one of their linears
nunchaku_affine.py their zero points, and the 1 of "1 + scale"
kitchen.py         SVDQuant files under comfy-kitchen's names
in_memory.py       such a model whose tensors another program read
names.py           what each program calls the layers of each model (names.json)
swizzle.py         orders of a linear's numbers, to and from natural order
unfuse_norms.py    smoothing that was fused upstream, taken out again
convert.py         one file from another, whatever their formats
export.py          what a converted file holds, for each target format
edits.py           a file with some of its layers changed
nunchaku_write.py  the target format of Nunchaku
nunchaku_lora.py   LoRAs in Nunchaku's form, made ordinary ones
"""
