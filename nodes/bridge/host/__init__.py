"""ComfyUI itself; knows no system.

progress.py     bar, text, live chart, Stop
folders.py      find, list, name and place files; cache stamps
fingerprint.py  tells models and their patches apart
samplers.py     the name of a SAMPLER, previews, the switch for training
patterns.py     patterns of layer names
charts.py       the JSON schema of what nodes draw, and what all charts share
"""
