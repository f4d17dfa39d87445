"""Vector quantization of diffusion transformers at 2 to 4 bits a weight: VQ4DiT (Deng et al., 2024,
arXiv:2408.17131), and better.
"""
