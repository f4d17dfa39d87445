"""quant/ - fewer bits. Algorithms: tensors in, tensors out; knows torch, not ComfyUI.

Methods, which do not import one another:
    svdquant/     4-bit weights and activations beside a low-rank branch
    vq4dit/       codebooks, 2 to 4 bits a weight
    intlora/      adapters whose merged weight is integer
What they share:
    files/        model files on disk: low-bit files, written and read; 16-bit sources
    weights/      what a low-bit layer holds and computes, a file for each format
    calibration/  what layers read while a model runs
    job/          a quantization: planned, measured, written
    training/     the loop of every trainer
    merge/        a change of low rank into a 4-bit layer's own integers
    modulation/   modulation layers outside of VRAM
    interop/      4-bit files of other programs, read and written
The terminal's and scripts':
    cli/          python -m nibble quantize, inspect, convert
    diffusers/    quantized files as diffusers models; the only room that imports diffusers
"""
