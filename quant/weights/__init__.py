"""What a low-bit layer holds and computes, a file for each format.

base.py           what all formats share
svdquant_w4a4.py  4-bit weights and activations, a low-rank branch
svdquant_w4a8.py  4-bit weights read as int8, 8-bit activations, a low-rank branch
svdquant_nvfp4.py 4-bit floats for weights and activations, a low-rank branch
awq_w4a16.py      4-bit weights, 16-bit activations
vq.py             codebooks and indices
lowrank.py        the randomized SVD, and what else is done to low-rank factors
delta.py          the change of a weight: row scale, low rank, dense
packing.py        4-bit and index codecs, each with its inverse beside it
fuse.py           several linears as one, and back
linears.py        one layer of a module put in place of another
modules.py        the formats as nn.Modules, for scripts
formats.py        all formats by name; a file's layer as its dataclass
"""
