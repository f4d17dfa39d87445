"""Constant Acceleration Flow where every answer is known, and what constant acceleration is worth
without training.

    python tests/bench/bench_caf.py            both parts, about ten minutes on one core
    python tests/bench/bench_caf.py --parts mixture

`mixture`: nets of 5 x 128 trained on couplings of a ring of Gaussians (`mixture.py`); mean distance
    from where the exact flow leads, for noise that was
not trained on, at the same number of calls: N steps of 2-rectified flow are N calls, N steps of CAF
N + 1. CAF trains two nets, so 2-rectified flow is trained once more, twice as long. "ahead": the
acceleration asked for further on in a step (`flow.sample`).

`training-free`: the demo FLUX; each sampler's pictures against those of 28 steps of Euler's method
from the same noise, at the same number of calls. "obeys": share of pictures in which the scorer
reads colour, shape and place as asked.
"""

import argparse
import copy
import json
import math
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401
from bench import mixture
from nibble.accel.caf import adams_bashforth, flow, objectives
from nibble.demo import metrics, pictures, prompts, scorer, world
from nibble.quant import diffusers as models
from nibble.quant.training import loop

RESULTS = Path(__file__).resolve().parent / "results"
PARTS = ["mixture", "training-free"]
CALLS = (2, 3, 5)
TEACHER_STEPS = 28


def fit(net: torch.nn.Module, loss, steps: int) -> torch.nn.Module:
    """Trains all of a net."""
    for _ in loop.steps(
        dict(net.named_parameters()), loss, loop.Options(steps=steps, lr=1e-3, warmup=100, seed=1)
    ):
        pass
    return net


def of(net):
    """A net as the objectives call it: with a condition, which this world has not."""
    return lambda x, t, condition=None: net(x, t)


class Mixture:
    """Couplings to train on and to be judged by."""

    def __init__(self, steps: int, count: int = 20000):
        self.steps, self.starts, self.pushes = steps, {}, {}
        self.train, self.held = (
            mixture.couplings(min(count, 256 * steps), 0, 60),
            mixture.couplings(4000, 1, 100),
        )

    def draw(self, generator):
        index = torch.randint(0, len(self.train[0]), (256,), generator=generator)
        return self.train[0][index], self.train[1][index], None

    def error(self, sample) -> dict[int, float]:
        """calls → mean distance of sample(noise, calls) from where the exact flow leads."""
        noise, data = self.held
        with torch.no_grad():
            return {
                calls: (sample(noise, calls) - data).norm(dim=1).mean().item() for calls in CALLS
            }

    def rectified(self, longer: int = 1) -> dict[int, float]:
        net = mixture.Net()
        fit(net, objectives.rectified_objective(of(net), self.draw), self.steps * longer)

        def sample(x, calls):
            for i in range(calls):
                x = x + net(x, x.new_full((len(x),), i / calls)) / calls
            return x

        return self.error(sample)

    def caf(self, h: float, conditioned: bool = True, ahead: float = 0.0) -> dict[int, float]:
        if h not in self.starts:
            self.starts[h] = net = mixture.Net()
            fit(net, objectives.velocity_objective(of(net), self.draw, h), self.steps)
        speed = self.starts[h]
        if (h, conditioned) not in self.pushes:
            push = copy.deepcopy(speed)
            seen = (
                (lambda x, t, v, c=None: push(x, t, v))
                if conditioned
                else (lambda x, t, v, c=None: push(x, t))
            )
            fit(push, objectives.acceleration_objective(seen, of(speed), self.draw), self.steps)
            self.pushes[h, conditioned] = seen
        seen = self.pushes[h, conditioned]
        return self.error(
            lambda x, calls: flow.sample(speed, seen, x, flow.uniform(calls - 1), ahead=ahead, h=h)
        )


def measure_mixture(options: argparse.Namespace) -> dict:
    """{"steps", "rows": [{"method", "errors": {calls: distance}, "of_rectified": {calls: ratio},
    "seconds"}]}.
    """
    ring = Mixture(options.train_steps)
    arms = {
        "2-rectified flow": ring.rectified,
        "2-rectified flow, trained twice as long": lambda: ring.rectified(2),
        "CAF": lambda: ring.caf(1.5),
        "CAF, h = 1": lambda: ring.caf(1.0),
        "CAF, h = 0.5": lambda: ring.caf(0.5),
        "CAF, without conditioning": lambda: ring.caf(1.5, False),
    }
    arms |= {
        f"CAF, h = {h}, ahead {ahead}": partial(ring.caf, h, ahead=ahead)
        for h in (1.5, 1.0, 0.5)
        for ahead in (0.35, flow.AHEAD)
    }
    rows = []
    for name, arm in arms.items():
        start = time.perf_counter()
        errors = arm()
        rows.append(
            {
                "method": name,
                "errors": errors,
                "of_rectified": {
                    n: errors[n] / (rows[0]["errors"] if rows else errors)[n] for n in CALLS
                },
                "seconds": time.perf_counter() - start,
            }
        )
        print(
            f"{name:42}",
            *(f"{n} calls {errors[n]:.4f} ({rows[-1]['of_rectified'][n]:.2f})" for n in CALLS),
            sep="  ",
            flush=True,
        )
    return {"steps": options.train_steps, "rows": rows}


def dpmpp_2m(velocity, x: torch.Tensor, times: list[float]) -> torch.Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2) over -log(sigma), first and
    last step of first order.
    """
    before = None
    for i, (start, stop) in enumerate(zip(times, times[1:], strict=False)):
        clean = x - start * velocity(x, i)
        towards = clean
        if before is not None and stop > 0:
            towards = clean + math.log(start / stop) / math.log(times[i - 1] / start) / 2 * (
                clean - before
            )
        x, before = stop / start * x + (1 - stop / start) * towards, clean
    return x


def euler(velocity, x: torch.Tensor, times: list[float]) -> torch.Tensor:
    """Euler's method."""
    return adams_bashforth.integrate(velocity, x, times, limit=0.0)


def second_order_but_last(velocity, x: torch.Tensor, times: list[float]) -> torch.Tensor:
    """Adams-Bashforth with Euler's step at the end: ComfyUI's lms of order 2."""
    x = adams_bashforth.integrate(velocity, x, times[:-1])
    return x + (times[-1] - times[-2]) * velocity(x, len(times) - 2)


class Demo:
    """The demo FLUX drawing scored prompts from the same noise by any sampler."""

    def __init__(self, count: int, seeds: int = 2):
        self.flux, self.vae = pictures.load_flux(), pictures.load_vae()
        asked = [prompt for prompt in prompts.SCORED[:count] for _ in range(seeds)]
        self.scenes, self.words = (
            [world.parse(prompt) for prompt in asked],
            prompts.embed(prompts.word_indices(asked)),
        )
        drawn = [
            torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(seed))
            for seed in range(seeds)
        ]
        self.noise, self.known = torch.stack(drawn * count), {}

    @torch.no_grad()
    def draw(self, sample, times: list[float]) -> torch.Tensor:
        """Pictures (count, 64, 64, 3). What was computed for the same latents at the same time is
        not computed again: samplers begin alike.
        """

        def velocity(x, i):
            key = times[i], x.numpy().tobytes()
            if key not in self.known:
                self.known[key] = models.velocity(
                    self.flux,
                    x,
                    x.new_full((len(x),), times[i]),
                    *self.words,
                    x.new_full((len(x),), 3.5),
                )
            return self.known[key]

        return pictures.decode(self.vae, sample(velocity, self.noise, times))


LIMITS = (0.05, 0.1, 0.2, None)  # None: never limited


def samplers(pace: float) -> dict:
    """name → (sampler, h). Schedules at another pace are drawn with Euler's method and with a
    limit.
    """
    second = {
        f"constant acceleration, limit {limit}": (
            partial(adams_bashforth.integrate, limit=limit),
            1.0,
        )
        for limit in LIMITS
    }
    return {
        "euler": (euler, 1.0),
        "dpmpp_2m": (dpmpp_2m, 1.0),
        "lms, order 2": (second_order_but_last, 1.0),
        **second,
        f"euler, h = {pace}": (euler, pace),
        f"constant acceleration, limit 0.1, h = {pace}": (
            partial(adams_bashforth.integrate, limit=0.1),
            pace,
        ),
    }


def measure_training_free(options: argparse.Namespace) -> dict:
    """{"pictures", "teacher_steps", "teacher_obeys": {shift: share}, "rows": [{"shift", "calls",
    "method", "psnr", "worst", "obeys"}]}.

    psnr: mean over pictures, in dB.
    """
    demo, rows, teachers = Demo(options.prompts), [], {}
    for shift in options.shifts:
        teacher = demo.draw(euler, models.schedule(TEACHER_STEPS, shift).tolist())
        teachers[shift] = scorer.score(teacher.numpy(), demo.scenes)["all"]
        for calls in options.calls:
            for name, (sample, h) in samplers(options.pace).items():
                drawn = demo.draw(
                    sample,
                    [*adams_bashforth.retime(models.schedule(calls, shift), h).tolist()[:-1], 0.0],
                )
                each = metrics.psnr(drawn, teacher)
                rows.append(
                    {
                        "shift": shift,
                        "calls": calls,
                        "method": name,
                        "psnr": each.mean().item(),
                        "worst": each.min().item(),
                        "obeys": scorer.score(drawn.numpy(), demo.scenes)["all"],
                    }
                )
                print(
                    shift,
                    calls,
                    f"{name:44} {rows[-1]['psnr']:.1f} dB, worst {rows[-1]['worst']:.1f}, obeys"
                    f" {rows[-1]['obeys']:.1%}",
                    flush=True,
                )
    return {
        "pictures": len(demo.noise),
        "teacher_steps": TEACHER_STEPS,
        "teacher_obeys": teachers,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "caf.json")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--train-steps", type=int, default=1000, help="of each net of the mixture")
    parser.add_argument("--prompts", type=int, default=10, help="of the demo model, two seeds each")
    parser.add_argument(
        "--shifts", type=float, nargs="+", default=[1.15, 3.0], help="of the schedule, as exponents"
    )
    parser.add_argument(
        "--calls", type=int, nargs="*", default=[2, 3, 5, 8], help="of the demo model"
    )
    parser.add_argument(
        "--pace",
        type=float,
        default=1.5,
        help="h of the schedules that are tried besides the plain ones",
    )
    options = parser.parse_args()
    measures = {"mixture": measure_mixture, "training-free": measure_training_free}
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    for part in options.parts:
        found[part] = measures[part](options)
        found |= {
            "command": " ".join(sys.argv),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
