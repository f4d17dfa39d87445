"""ComfyUI itself; knows no system.

progress.py  bar, text, live chart, Stop
charts.py    the JSON schema of what nodes draw, and what all charts share
"""
