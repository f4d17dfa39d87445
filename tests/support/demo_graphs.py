"""The demo model in a server's folders, and the graphs that the tests send to it."""

import os
import shutil
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from comfyui_server import ROOT, Server

WEIGHTS = Path(os.environ.get("NIBBLE_DEMO_WEIGHTS", ROOT / "demo" / "weights"))
FLUX, VAE = "flux-demo.safetensors", "vae-demo.safetensors"
QUANTIZED = "flux-demo-4bit.safetensors"


def furnish(server: Server) -> Server:
    """Puts the demo's files into a server's model folders."""
    shutil.copy(WEIGHTS / "diffusion_models" / FLUX, server.folder("diffusion_models"))
    shutil.copy(WEIGHTS / "vae" / VAE, server.folder("vae"))
    server.folder("loras")
    return server


def all_in_one(server: Server, quantized: str) -> str:
    """A file for Load Checkpoint of one in models/diffusion_models; returns its name."""
    state = load_file(server.folder("diffusion_models") / quantized)
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    save_file(whole, server.folder("checkpoints") / "whole.safetensors")
    return "whole.safetensors"


class Graph:
    """Builds graphs in API format. Each method adds nodes and remembers what the next one needs."""

    def __init__(self):
        self.nodes: dict[str, dict] = {}

    def add(self, kind: str, **inputs) -> str:
        """One node; returns its id."""
        self.nodes[name := str(len(self.nodes) + 1)] = {"class_type": kind, "inputs": inputs}
        return name

    def quantize(self, **changes) -> "Graph":
        """SVDQuant Quantize Checkpoint at its defaults, with changes."""
        defaults = dict(
            model_name=FLUX,
            preset="fast",
            filename="",
            overwrite=False,
            rank=32,
            solver="svd",
            rotation="off",
            gptq="auto",
            modulation="w4a16",
            keep_layers="",
            w4a16_layers="",
            steps=2,
            memory_gb=4.0,
            seed=0,
        )
        self.quantizer = self.add("NibbleQuantizeSVDQuant", **(defaults | changes))
        return self

    def quantize_encoder(self, name: str) -> str:
        """Quantize Text Encoder, W4A8 from the weights alone; returns its id."""
        return self.add(
            "NibbleQuantizeTextEncoder",
            clip_name=name,
            preset="fast",
            filename="",
            overwrite=False,
            format="w4a8",
            type="sd3",
            prompts="",
            keep_layers="",
            memory_gb=1.0,
            seed=0,
        )

    def vector_quantize(self, **changes) -> str:
        """VQ Quantize Checkpoint at its defaults, with changes; returns its id."""
        defaults = dict(
            model_name=FLUX,
            bits="3",
            preset="fast",
            filename="",
            overwrite=False,
            codewords=0,
            vector=0,
            candidates=0,
            calibration_steps=0,
            keep_layers="",
            budget_gb=0.0,
            rotation=False,
            modulation="vq",
            steps=2,
            memory_gb=2.0,
            seed=0,
        )
        return self.add("NibbleQuantizeVQ", **(defaults | changes))

    def load(self, name: str) -> str:
        """The MODEL of a quantized or an ordinary file."""
        if name == FLUX:
            return self.add("UNETLoader", unet_name=name, weight_dtype="default")
        return self.add("NibbleLoadSVDQuant", model_name=name, verify=True, compute_dtype="default")

    def prompt(self, text: str = "a red circle top left on black") -> str:
        return self.add("NibbleDemoPrompt", text=text)

    def latent(self) -> str:
        return self.add("EmptySD3LatentImage", width=64, height=64, batch_size=1)

    def sample(self, model: str, positive: str, seed: int = 1, steps: int = 8) -> str:
        """KSampler without CFG; returns the LATENT's node."""
        return self.add(
            "KSampler",
            model=[model, 0],
            positive=[positive, 0],
            negative=[positive, 0],
            latent_image=[self.latent(), 0],
            seed=seed,
            steps=steps,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        )

    def save(self, latent: str) -> str:
        """VAE decode and SaveImage; returns the id whose output has the picture."""
        vae = self.add("VAELoader", vae_name=VAE)
        pixels = self.add("VAEDecode", samples=[latent, 0], vae=[vae, 0])
        return self.add("SaveImage", images=[pixels, 0], filename_prefix="test")


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((a - b) ** 2) + 1e-12))
