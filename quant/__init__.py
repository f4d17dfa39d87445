"""quant/ - fewer bits. Algorithms: tensors in, tensors out; knows torch, not ComfyUI.

Methods, which do not import one another:
    svdquant/     4-bit weights and activations beside a low-rank branch
    vq4dit/       codebooks, 2 to 4 bits a weight
    intlora/      adapters whose merged weight is integer
What they share:
    files/        safetensors on disk: low-bit files, written and read; 16-bit sources
    weights/      what a low-bit layer holds and computes, a file for each format
    calibration/  what layers read while a model runs
    training/     the loop of every trainer
    merge/        a change of low rank into a 4-bit layer's own integers
    modulation/   modulation layers outside of VRAM
    interop/      4-bit files of other programs, read and written
    architectures.py  which model a file holds, and what becomes of each layer (architectures.json)
    recipe.py         every option of a quantization, and its presets
    checkpoint_run.py a run over a checkpoint: planned, done layer by layer, reported
    report.py         what a run did, layer by layer
For scripts:
    diffusers     quantized files as diffusers models; the only room that imports diffusers
"""
