"""The memory plan: what encoding the prompt, sampling and decoding take, before anything is made.

comfyui.py      ComfyUI's own arithmetic: what it sets aside, and what of a model it then loads
decoders.py     the same of VAEs
published.py    models and text encoders in their published sizes, and what a model is to the plan
published.json  their numbers
weights.py      what a file will hold in memory
stages.py       the three stages, on a card or on the CPU
switches.py     what makes a plan fit, in the order of what it costs
"""
