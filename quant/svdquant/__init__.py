"""SVDQuant: 4-bit weights and activations beside a 16-bit low-rank branch (Li et al., 2024,
arXiv:2411.05007), fitted layer by layer.

recipe.py          every choice of a run
quantize.py        a checkpoint: layout, layer by layer
decompose.py       one layer: 4-bit part + low rank, in turns
one_layer.py       one layer from its weights alone, for whoever streams a model
problem.py         a layer's weight and what is known of its inputs
space_search.py    which space: by a quick score
smooth.py          smoothing, rotation and signs: the space in which it is rounded
learned_smoothing.py  smoothing factors of each channel, learned
lowrank_metric.py  the best low rank under a metric
gptq.py            rounding column by column
grid.py            the numbers that 4-bit weights can be, and their scales: int4, tables of 16
published_grids.py the grids of formats that others publish: 4-bit floats, int8, their tables
nvfp4.py           4-bit floats in the place of int4
stock/             files that ComfyUI opens without this pack
widths.py          which layers get activations of 8 bits, where some may
w4a16.py           layers of 4-bit weights only: of few tokens, and of text encoders
rows8.py           8-bit rows: text encoders' tables of embeddings
"""
