"""ComfyUI itself; knows no system.

progress.py     bar, time left, live chart, Stop
file_names.py   what a file may be called, the same on every system
folders.py      find, list, name and place files; cache stamps
tensor_files.py  files of tensors, as ComfyUI reads them
demo_model.py   the demo in the lists of all loaders, and its previews
unfinished.py   files of stopped runs: the page's way to them
node_files.py   what nodes have made, and whether it is still there
fingerprint.py  tells models and their patches apart
samplers.py     the name of a SAMPLER, previews, the switch for training
prefix.py       what a model keeps of its prompt from call to call
keys.py         names of wrappers that several systems must know
charts.py       the JSON schema of what nodes draw, and what all charts share
"""
