"""SVDQuant: 4-bit weights and activations beside a 16-bit low-rank branch (Li et al., 2024,
arXiv:2411.05007), fitted layer by layer.
"""
