"""Whatever is trained beside a frozen MODEL.

session.py  the model loaded, frozen, called; pictures and captions, the loss
watch.py    progress, previews, what is kept after an error
curve.py    the chart of the loss
"""
