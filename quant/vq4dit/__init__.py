"""Vector quantization of diffusion transformers at 2 to 4 bits a weight: VQ4DiT (Deng et al., 2024,
arXiv:2408.17131), and better.

recipe.py          every choice of a run
quantize.py        a checkpoint: layer by layer in closed form, or block by block beside the teacher
layout.py          what becomes of each layer, and every tensor of the file
bit_allocation.py  which layer gets how many bits under a budget
sensitivity.py     how much each layer's error matters to the whole model
fit.py             one layer in closed form
codebook.py        k-means, nearest codewords, mixtures
gptq.py            codes that make up for one another's errors (GPTVQ)
calibrate.py       codewords fitted to what a block puts out
student.py         layers of codewords that can be trained
trajectory.py      the 16-bit model's calls, recorded and replayed
codebook_usage.py  how much of a file's codebooks is used
"""
