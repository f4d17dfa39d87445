"""The demo model, held-out prompts, and pictures of them by ComfyUI's sampler, measured against the
uncached ones.

torch and ComfyUI are imported where they are used: ComfyUI has to be started first.
"""

import time
from pathlib import Path

STEPS = 28
CALIBRATION_SEED, PROMPT_SEED, SEED = 5000, 7000, 20000


def scenes(seed: int, count: int, taken=()) -> list[str]:
    """`count` different random prompts of the demo's world that are neither among the scored ones
    nor `taken`.
    """
    import numpy as np

    from nibble.demo import prompts, world

    rng, found = np.random.default_rng(seed), []
    while len(found) < count:
        text = str(world.random_scene(rng))
        if text not in prompts.SCORED and text not in taken and text not in found:
            found.append(text)
    return found


class Bench:
    """One model, its prompts and its uncached pictures."""

    def __init__(self, model, name: str, asked: list[str]):
        import torch

        from nibble.demo import pictures, prompts

        self.torch, self.model, self.name, self.count = torch, model, name, len(asked)
        self.tokens, self.pooled = prompts.embed(prompts.word_indices(asked))
        self.vae, self.rows, self.forwards = pictures.load_vae(), [], 0
        model.model.diffusion_model.single_blocks[0].register_forward_hook(self._count)
        self.noise = torch.cat(
            [
                torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(SEED + i))
                for i in range(self.count)
            ]
        )
        self.reference = {
            batched: self.decode(self.draw(model, STEPS, self.groups(batched))[0])
            for batched in (True, False)
        }

    def groups(self, batched: bool) -> list[slice]:
        """What is drawn together."""
        return [slice(0, self.count)] if batched else [slice(i, i + 1) for i in range(self.count)]

    def _count(self, *_):
        self.forwards += 1

    def sigmas(self, steps: int):
        import comfy.samplers

        return comfy.samplers.calculate_sigmas(
            self.model.get_model_object("model_sampling"), "simple", steps
        )

    def conditioning(self, which: slice) -> list:
        return [[self.tokens[which], {"pooled_output": self.pooled[which], "guidance": 3.5}]]

    def draw(self, model, steps: int, groups: list[slice], sigmas=None):
        """(latents, forwards a group, CPU seconds a group); sigmas: of another schedule."""
        import comfy.samplers

        found, seconds, self.forwards = [], 0.0, 0
        for group in groups:
            guider = comfy.samplers.CFGGuider(model)
            guider.inner_set_conds({"positive": self.conditioning(group)})
            noise, begin = self.noise[group], time.process_time()
            found.append(
                guider.sample(
                    noise,
                    self.torch.zeros_like(noise),
                    comfy.samplers.sampler_object("euler"),
                    self.sigmas(steps) if sigmas is None else sigmas,
                    disable_pbar=True,
                    seed=SEED,
                )
            )
            seconds += time.process_time() - begin
        return self.torch.cat(found), self.forwards / len(groups), seconds / len(groups)

    def decode(self, latents):
        from nibble.demo import pictures

        return pictures.decode(self.vae, self.model.model.process_latent_in(latents))

    def measure(
        self, method: str, setting, model, steps: int = STEPS, batched: bool = True, work=None
    ) -> None:
        """One row: a method with one setting."""
        from nibble.demo import metrics

        groups = self.groups(batched)
        latents, forwards, seconds = self.draw(model, steps, groups)
        uncached = self.draw(self.model, STEPS, groups[:: max(1, len(groups) // 2)])[2]
        drawn, reference = self.decode(latents), self.reference[batched]
        psnr, ssim = metrics.psnr(drawn, reference), metrics.ssim(drawn, reference)
        row = {
            "model": self.name,
            "method": method,
            "setting": setting,
            "forwards": round(work() * STEPS if work else forwards, 2),
            "time": round(seconds / uncached, 3),
            "psnr": round(psnr.mean().item(), 2),
            "psnr_min": round(psnr.min().item(), 2),
            "ssim": round(ssim.mean().item(), 5),
            "ssim_min": round(ssim.min().item(), 5),
        }
        self.rows.append(row)
        print(
            f"{row['model']:7} {method:34} {setting!s:6} {row['forwards']:6.2f} forwards"
            f" {row['time']:6.3f} time {row['psnr']:6.2f} dB, least {row['psnr_min']:6.2f}, SSIM"
            f" {row['ssim']:.4f} / {row['ssim_min']:.4f}",
            flush=True,
        )


def load(name: str, folder: Path):
    """The demo model, "16-bit" or "4-bit"; both compute in float32."""
    import comfy.sd
    import torch

    from nibble.demo import pictures, run
    from nibble.nodes.bridge.quantized import loading
    from nibble.quant.svdquant.recipe import Recipe

    if name == "16-bit":
        return comfy.sd.load_diffusion_model(
            str(pictures.FLUX_FILE), model_options={"dtype": torch.float32}
        )
    target = folder / "demo-4bit.safetensors"
    run.quantize(target, Recipe.from_preset("fast"))
    return loading.load(target, dtype="fp32")
