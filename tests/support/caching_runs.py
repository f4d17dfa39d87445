"""Drawing with a cached model in a test: conditionings, a run, and what ComfyUI was asked."""

import comfy.sample
import comfy.samplers
import torch

STEPS, TEXT = 10, 64


def conditioning(seed: int = 0, **more) -> list:
    """A random prompt for the tests' FLUX."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            torch.randn(1, 6, TEXT, generator=generator),
            {"pooled_output": torch.randn(1, TEXT, generator=generator), "guidance": 3.5} | more,
        ]
    ]


def draw(
    model,
    cfg: float | None = None,
    sampler: str = "euler",
    steps: int = STEPS,
    side: int = 8,
    callback=None,
    positive=None,
    seed: int = 1,
):
    """Latents (1, 16, side, side) after sampling; cfg adds an unconditional prompt."""
    guider = comfy.samplers.CFGGuider(model)
    positive = positive or conditioning()
    if cfg:
        guider.set_conds(positive, conditioning(99))
        guider.set_cfg(cfg)
    else:
        guider.inner_set_conds({"positive": positive})
    latent = torch.zeros(1, 16, side, side)
    sigmas = comfy.samplers.calculate_sigmas(
        model.get_model_object("model_sampling"), "simple", steps
    )
    return guider.sample(
        comfy.sample.prepare_noise(latent, seed),
        latent,
        comfy.samplers.sampler_object(sampler),
        sigmas,
        callback=callback,
        disable_pbar=True,
        seed=seed,
    )


def blocks_run(model) -> list[int]:
    """A list with one number, counted up whenever the model's first single block runs; the hook
    lives as long as the model.
    """
    count = [0]

    def counted(*_):
        count[0] += 1

    model.model.diffusion_model.single_blocks[0].register_forward_hook(counted)
    return count


def left_behind(model) -> list[str]:
    """What caching would have left on a model or its patcher, were it to leave anything."""
    network = model.model.diffusion_model
    found = [
        f"{name}.{key}"
        for name, module in network.named_modules()
        for key in module.__dict__
        if key in module.__dict__.get("_modules", {})
    ]
    return found + [
        key for key in model.model_options.get("transformer_options", {}) if key == "nibble_cache"
    ]


def traces(model) -> dict:
    """Everything that caching could leave behind: what each module's instance holds, its hooks, and
    the options.
    """
    found = {
        name: (sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.model.named_modules()
        if name != "model_sampling"
    }
    return found | {
        "options": repr(sorted(model.model_options["transformer_options"])),
        "wrappers": repr(model.wrappers),
    }
