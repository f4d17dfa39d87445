"""Files that ComfyUI opens without this pack: its own low-bit formats under their published names,
fitted to recorded inputs.

formats.py   what each format is on disk, its grid, and what it makes of activations
fit.py       one linear into one format
recipe.py    the choices of a run
quantize.py  a whole checkpoint

There is no smoothing in them. Only nvfp4 has a place for it (`pre_quant_scale`), and factors folded
into the layers before would do elsewhere; but ComfyUI adds a LoRA to the weight as it lies in the
file, and so to one whose columns have been rescaled.
"""
