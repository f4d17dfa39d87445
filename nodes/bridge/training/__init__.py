"""Whatever is trained beside a frozen MODEL.

session.py  a model loaded, frozen, called
dataset.py  pictures and captions, the loss
watch.py    progress, previews, what is kept after an error
curve.py    the chart of the loss
"""
