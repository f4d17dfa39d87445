"""demo/ - the embedded default: a small FLUX and its autoencoder (`weights/`), trained here, and
what tells whether their pictures obey their prompts.

world.py     the pictures: one coloured shape at one of nine places
prompts.py   the stand-in for a text encoder
train.py     how the weights were made
pictures.py  both models outside ComfyUI, with a sampler
taesd.py     the autoencoder's names
run.py       quantize, sample with both, compare
cli.py       python -m nibble demo
scorer.py    reads colour, shape, place and background off a picture
metrics.py   PSNR and SSIM
"""
