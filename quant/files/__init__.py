"""Model files on disk; knows no method.

errors.py         the error that tells a person what is wrong with a file, and the door of readers
header_limits.py  what a header may ask of its reader, found out before it is parsed
safetensors.py    header, tensors and checksums of any safetensors file, read and checked
checkpoint.py     a file of low-bit layers: one protocol, and Nibble's own format
layer_formats.py  what a low-bit linear is on disk: shapes, dtypes, options
metadata.py       what a header's metadata say: JSON, versions
modelspec.py      what a quantized file says to people and to other programs
writer.py         a file written layer by layer, atomic, resumable
atomic.py         whole or not there; one run at a time
unfinished.py     what stopped runs left, listed and removed
part_files.py     ranges of a target's layers, in files that wait to be joined
integrity.py      what tells that a file is damaged
small.py          small files: adapters, states, couplings
prompts.py        prompts to calibrate on, as text encoders gave them
source.py         the model that is quantized, decoded
read_when_built.py  what of a checkpoint ComfyUI needs beside the diffusion model
source_files.py   the files that it may be in: one, several, a folder, GGUF
source_layouts.py how ComfyUI's own quantized formats are read
gguf_file.py      how GGUF is read
gguf_encoders.py  llama.cpp's names of a text encoder's tensors
diffusers_names.py  diffusers' names of a model's tensors (diffusers_names.json)
unet_names.py     diffusers' names of SDXL's U-Net
dit_names.py      the names of DiT's authors
renamed.py        tensors under other names, joined or split by rows
pointwise.py      convolutions of 1 x 1 that are linears
stored_tensors.py tensors as they are stored, read one by one
architectures.py  which model a file holds, and what becomes of each layer (architectures.json)
text_encoders.py   which text encoder a file holds, and which of its layers get how many bits
                   (text_encoders.json)
kinds.py          what a file is that holds no diffusion model (kinds.json)
known_shapes.py   names and shapes of well-known models
universal_plan.py a plan guessed for a transformer of no known family
report.py         what a run did, layer by layer
memory/           what models, text encoders and VAEs will take at work, before anything is made
"""
