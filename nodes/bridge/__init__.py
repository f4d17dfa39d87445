"""nodes/bridge/ - the only place that imports ComfyUI: its operations, its loader, its progress
bar, its sampler.
"""
