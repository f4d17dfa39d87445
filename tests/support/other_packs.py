"""Templates that need another pack beside Nibble: which of their nodes are its, by the names of the
version that was read (ComfyUI-Distributed 1.4.4). A server of these tests has none of them.
"""

ADDRESSES = {"ComfyUI-Distributed": "https://github.com/robertvoy/ComfyUI-Distributed"}
# template → (pack, its nodes)
NEEDED = {
    "24 Several machines": ("ComfyUI-Distributed", {"DistributedSeed", "DistributedCollector"})
}


def nodes_in(template: str) -> set[str]:
    """Nodes of another pack in a template."""
    return NEEDED[template][1] if template in NEEDED else set()
