"""Graphs with caching in them, and what its charts say."""

from demo_graphs import Graph

STEPS = 12
EXPERT = dict(extrapolation="auto", first_steps=1, last_steps=1, store="gpu")
TEACACHE = dict(
    preset="balanced",
    threshold=0.2,
    start=0.0,
    end=1.0,
    calibration="none",
    rule="auto",
    level="auto",
    **EXPERT,
)
SMOOTHCACHE = dict(
    calibration="auto", alpha=0.15, depth="step", start=0.0, end=1.0, budget=0, **EXPERT
)


class CacheGraph(Graph):
    """Graphs with caching in them."""

    def parts(
        self,
        model: str,
        steps: int = STEPS,
        seed: int = 1,
        text: str = "a red circle top left on black",
    ) -> dict:
        """SamplerCustomAdvanced's inputs."""
        return dict(
            noise=[self.add("RandomNoise", noise_seed=seed), 0],
            guider=[
                self.add("BasicGuider", model=[model, 0], conditioning=[self.prompt(text), 0]),
                0,
            ],
            sampler=[self.add("KSamplerSelect", sampler_name="euler"), 0],
            sigmas=[
                self.add(
                    "BasicScheduler", model=[model, 0], scheduler="simple", steps=steps, denoise=1.0
                ),
                0,
            ],
            latent_image=[self.latent(), 0],
        )

    def teacache_sampler(
        self, model: str, compare: bool = False, parts: dict | None = None, **changes
    ) -> str:
        return self.add(
            "NibbleTeaCacheSampler",
            **(parts or self.parts(model)),
            compare=compare,
            **(TEACACHE | changes),
        )

    def apply_teacache(self, model: str, **changes) -> str:
        return self.add("NibbleApplyTeaCache", model=[model, 0], **(TEACACHE | changes))

    def apply_smoothcache(self, model: str, **changes) -> str:
        return self.add("NibbleApplySmoothCache", model=[model, 0], **(SMOOTHCACHE | changes))

    def calibrate(
        self, model: str, filename: str = "", steps: int = STEPS, overwrite: bool = False
    ) -> str:
        """Calibrate Cache on two prompts that no test samples."""
        parts = self.parts(model, steps=steps)
        prompts = self.add(
            "ConditioningCombine",
            conditioning_1=[self.prompt("a green star top on navy"), 0],
            conditioning_2=[self.prompt("a pink ring left on white"), 0],
        )
        return self.add(
            "NibbleCalibrateCache",
            model=[model, 0],
            positive=[prompts, 0],
            sampler=parts["sampler"],
            sigmas=parts["sigmas"],
            latent_image=parts["latent_image"],
            cfg=1.0,
            seed=5,
            filename=filename,
            overwrite=overwrite,
            k_max=3,
            order=2,
        )


def chart_of(output: dict) -> dict:
    return output["nibble_chart"][0]


def computed(chart: dict) -> list:
    return [cell["computed"] for cell in chart["cells"]]


def notes(chart: dict) -> str:
    return " ".join(value for label, value in chart["summary"] if label == "note")
