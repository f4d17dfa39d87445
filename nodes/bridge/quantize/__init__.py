"""16 bit becomes a low-bit file.

job.py              a node's request: find, prepare, measure or not, write; the same for all methods
sources.py          the models that can be quantized: listed, found, loaded to be measured
svdquant.py         what only SVDQuant needs: prompts for 'best', its file's name
stock.py            the same for files of stock ComfyUI
vq4dit.py           what only VQ needs: a teacher, blocks drawn while they are trained
farm.py             a farm's request: what a cluster, or a process here, is to make
farm_process.py     that farm as a process: its lines, its sentences, Stop
farm_settings.py    the cluster that this ComfyUI's own settings name
text_encoder.py     a text encoder: prompts encoded in place of pictures drawn
prompts.py          prompts of Nibble's own, and files of prompts for the command line
record_inputs.py    what layers read while ComfyUI samples
patched_weights.py  a MODEL's weights with its LoRAs
charts.py           blocks and codebooks
get_started.py      a model that fits, and what is missing for it
vram_plan.py        what a picture will take of a card and of RAM, before anything is made
"""
