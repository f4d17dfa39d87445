"""Constant Acceleration Flow trained on the demo FLUX, with couplings of its own 28-step sampler,
beside what else draws in few calls.

    python tests/bench/bench_caf_distilled.py                  about an hour on one core
    python tests/bench/bench_caf_distilled.py --couplings FILE   keeps the couplings there, or takes
      those that are there

`pictures`: each method's pictures against the teacher's from the same noise (mean and least PSNR,
    share that the scorer finds as asked), at the same
number of calls of the model, in every schedule: even steps, and FLUX's shift at e^1.15 and e^3, the
demo's own. "2-rectified flow" is trained on the same couplings with an adapter of the same rank,
for as many steps as both nets of CAF together; "…, fading" with CAF's `adapter.share` and times.

`inversion`: the teacher's pictures led back to noise and drawn again from it, in as many calls
    there and at most as many back: PSNR of the picture, and
how far the noise is from the one that the picture was made of (mean squared; 2 would be any other
noise).
"""

import argparse
import itertools
import json
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import numpy as np

import checkout  # noqa: F401
from bench import bench_caf
from nibble.accel.caf import adams_bashforth, flow, heads, objectives
from nibble.accel.caf import adapter as caf_adapter
from nibble.demo import metrics, pictures, prompts, scorer, world
from nibble.quant import diffusers as models
from nibble.quant.training import loop

SHIFTS, GUIDANCE, BATCH = (0.0, 1.15, 3.0), 3.5, 32
AHEADS = (0.0, 0.35, flow.AHEAD)
ARMS = ("untrained", "rectified", "inversion")
# `adapter.share`
RECTIFIED = {"2-rectified flow": 1.0, "2-rectified flow, fading": caf_adapter.MIDDLE}


class Couplings:
    """(noise, what the teacher draws of it, words of the prompt) for random scenes."""

    def __init__(self, count: int, path: Path | None):
        if path is not None and path.exists():
            self.noise, self.data, self.words = torch.load(path)
        else:
            self.noise, self.data, self.words = map(torch.cat, zip(*self._made(count), strict=True))
            if path is not None:
                torch.save((self.noise, self.data, self.words), path)

    @staticmethod
    def _made(count: int):
        flux, drawn = pictures.load_flux(), np.random.default_rng(5)
        for i in range(-(-count // 64)):
            asked = prompts.word_indices([str(world.random_scene(drawn)) for _ in range(64)])[
                : count - 64 * i
            ]
            noise = torch.randn(64, 16, 8, 8, generator=torch.Generator().manual_seed(50000 + i))[
                : count - 64 * i
            ]
            yield (
                noise,
                models.euler(
                    flux,
                    noise,
                    *prompts.embed(asked),
                    bench_caf.TEACHER_STEPS,
                    GUIDANCE,
                    pictures.SHIFT,
                ),
                torch.as_tensor(asked),
            )

    def draw(self, generator: torch.Generator):
        index = torch.randint(0, len(self.noise), (BATCH,), generator=generator)
        return self.noise[index], self.data[index], prompts.embed(self.words[index])


class Student:
    """The demo FLUX beside an adapter; `model(x, sigma, start, words)` with one of its heads, as
    `heads.Model` with a condition.
    """

    def __init__(self, rank: int, h: float, middle: float):
        self.flux = pictures.load_flux().requires_grad_(False)
        names = [
            name
            for name, module in self.flux.named_modules()
            if isinstance(module, torch.nn.Linear) and "transformer_blocks" in name
        ]
        self.adapter = caf_adapter.CAFAdapter.create(self.flux, names, rank, h, middle=middle)

    def model(self, head: str, x, sigma, start, words):
        def run(x):
            return -models.velocity(self.flux, x, sigma, *words, x.new_full((len(x),), GUIDANCE))

        place = self.adapter.input_layer
        shown = (
            None
            if start is None
            else caf_adapter.presented_by(self.flux, place, lambda: run(start))
        )
        with caf_adapter.attached(
            self.flux, self.adapter.head(head), place, shown, self.adapter.strength(sigma)
        ):
            return run(x)

    def velocity(self, x, t, words):
        return heads.velocity_net(
            lambda x, sigma, start: self.model("velocity", x, sigma, start, words), self.adapter.h
        )(x, t)

    def accelerate(self, x, t, start, words):
        return heads.acceleration_net(
            lambda x, sigma, start: self.model("acceleration", x, sigma, start, words),
            self.adapter.h,
        )(x, t, start)

    def nets(self, words):
        """Both nets for one batch of prompts, as `flow.sample` calls them."""
        return lambda x, t: self.velocity(x, t, words), lambda x, t, v: self.accelerate(
            x, t, v, words
        )


def fit(name: str, head: torch.nn.Module, loss, steps: int, lr: float) -> float:
    """Trains a head; seconds."""
    start, options = (
        time.perf_counter(),
        loop.Options(steps=steps, lr=lr, warmup=30, weight_decay=0.0, decay=1.0, seed=1),
    )
    for step, value in loop.steps(
        {str(i): p for i, p in enumerate(head.parameters())}, loss, options
    ):
        if step % 100 == 0:
            print(
                f"{name}: step {step} of {steps}, loss {value:.5f},"
                f" {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    return time.perf_counter() - start


def trained_caf(
    couplings: Couplings, options: argparse.Namespace, h: float, middle: float
) -> tuple[Student, float]:
    """Both heads, and seconds."""
    student = Student(options.rank, h, middle)
    seconds = fit(
        f"velocity, h = {h}",
        student.adapter.velocity,
        objectives.velocity_objective(
            student.velocity, couplings.draw, h, objectives.ENDS["velocity"], options.distance
        ),
        options.train_steps,
        options.lr,
    )
    loss = objectives.acceleration_objective(
        student.accelerate,
        student.velocity,
        couplings.draw,
        objectives.ENDS["acceleration"],
        options.distance,
    )
    name, head = f"acceleration, h = {h}", student.adapter.acceleration
    return student, seconds + fit(name, head, loss, options.train_steps, options.lr)


def trained_rectified(
    couplings: Couplings, options: argparse.Namespace, middle: float
) -> tuple[Student, float]:
    """2-rectified flow: the velocity head alone at h = 1, for as long as both nets of CAF."""
    student = Student(options.rank, 1.0, middle)
    loss = objectives.velocity_objective(
        student.velocity,
        couplings.draw,
        1.0,
        (0.0, 0.0) if middle == 1 else objectives.ENDS["velocity"],
    )
    return student, fit(
        "2-rectified flow", student.adapter.velocity, loss, 2 * options.train_steps, options.lr
    )


class Judge(bench_caf.Demo):
    """Pictures of scored prompts, whose noise no coupling has."""

    def __init__(self, count: int, calls: list[int]):
        super().__init__(count)
        self.calls = calls
        self.wanted = models.euler(
            self.flux, self.noise, *self.words, bench_caf.TEACHER_STEPS, GUIDANCE, pictures.SHIFT
        )
        self.teacher = pictures.decode(self.vae, self.wanted)
        self.obeys, self.rows = scorer.score(self.teacher.numpy(), self.scenes)["all"], []

    def judge(self, method: str, schedule: str, calls: int, drawn: torch.Tensor, **more) -> None:
        """A row for pictures (count, height, width, 3)."""
        each = metrics.psnr(drawn, self.teacher)
        self.rows.append(
            {
                "method": method,
                "schedule": schedule,
                "calls": calls,
                "psnr": each.mean().item(),
                "least": each.min().item(),
                "obeys": scorer.score(drawn.numpy(), self.scenes)["all"],
            }
            | more
        )
        print(
            f"{calls} calls  {method:36} {schedule:8} {each.mean():.1f} dB, least {each.min():.1f},"
            f" obeys {self.rows[-1]['obeys']:.1%}",
            flush=True,
        )

    def untrained(self) -> None:
        """The model as it is, by several samplers."""
        second = partial(adams_bashforth.integrate, limit=0.05)
        for name, sample in {
            "euler": bench_caf.euler,
            "dpmpp_2m": bench_caf.dpmpp_2m,
            "constant acceleration, untrained": second,
        }.items():
            for calls in self.calls:
                for shift in SHIFTS:
                    self.judge(
                        name,
                        schedule(shift),
                        calls,
                        self.draw(sample, models.schedule(calls, shift).tolist()),
                    )

    @torch.no_grad()
    def rectified(self, name: str, student: Student) -> None:
        """Euler's steps of a 2-rectified flow."""
        for calls in self.calls:
            for shift in SHIFTS:
                x = self._eulers(
                    lambda x, sigma: -student.model("velocity", x, sigma, None, self.words),
                    self.noise,
                    models.schedule(calls, shift),
                )
                self.judge(name, schedule(shift), calls, pictures.decode(self.vae, x))

    @staticmethod
    def _eulers(speed, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        """Euler's method for dx/dsigma = speed(x, sigma (batch,))."""
        return adams_bashforth.integrate(
            lambda x, i: speed(x, sigmas[i].expand(len(x))), x, sigmas.tolist(), 0.0
        )

    @torch.no_grad()
    def caf(self, name: str, student: Student) -> None:
        """CAF at even times, and at the times of other schedules; the acceleration asked for at the
        beginning of a step, and ahead.
        """
        nets, h = student.nets(self.words), student.adapter.h
        for calls in self.calls:
            grids = {"even t": flow.uniform(calls - 1)}
            if calls > 2:
                grids |= {
                    schedule(shift): flow.time_of(1 - models.schedule(calls - 1, shift), h).tolist()
                    for shift in SHIFTS[1:]
                }
            for ahead in AHEADS:
                for grid, times in grids.items():
                    drawn = pictures.decode(
                        self.vae, flow.sample(*nets, self.noise, times, ahead=ahead, h=h)
                    )
                    self.judge(f"{name}, ahead {ahead:g}" if ahead else name, grid, calls, drawn)

    @torch.no_grad()
    def inversion(self, students: dict[str, Student]) -> list[dict]:
        """[{"method", "calls": there and back each, "psnr", "least", "noise"}]."""
        found = []
        for calls in self.calls:
            for name, student in students.items():
                nets, times = student.nets(self.words), flow.uniform(calls - 1)
                for ahead in AHEADS:
                    noise, start = flow.invert(
                        *nets, self.wanted, times[::-1], ahead, student.adapter.h
                    )
                    back = flow.sample(*nets, noise, times, start, ahead=ahead, h=student.adapter.h)
                    found.append(
                        self._inverted(
                            f"{name}, ahead {ahead:g}" if ahead else name, calls, noise, back
                        )
                    )
            for shift in SHIFTS:
                sigmas = models.schedule(calls, shift)
                noise = self._eulers(self._untrained, self.wanted, sigmas.flip(0))
                found.append(
                    self._inverted(
                        f"euler, {schedule(shift)}",
                        calls,
                        noise,
                        self._eulers(self._untrained, noise, sigmas),
                    )
                )
        return found

    def _untrained(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return models.velocity(self.flux, x, sigma, *self.words, x.new_full((len(x),), GUIDANCE))

    def _inverted(self, method: str, calls: int, noise: torch.Tensor, back: torch.Tensor) -> dict:
        each = metrics.psnr(pictures.decode(self.vae, back), self.teacher)
        row = {
            "method": method,
            "calls": calls,
            "psnr": each.mean().item(),
            "least": each.min().item(),
            "noise": (noise - self.noise).square().mean().item(),
        }
        print(
            f"{calls} calls there and back  {method:20} {row['psnr']:.1f} dB, least"
            f" {row['least']:.1f}; noise {row['noise']:.3f}",
            flush=True,
        )
        return row


def schedule(shift: float) -> str:
    return f"e^{shift:g}" if shift else "even"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=bench_caf.RESULTS / "caf-distilled.json")
    parser.add_argument("--couplings", type=Path, help="a file to keep them in")
    parser.add_argument("--count", type=int, default=4096, help="couplings, if they are to be made")
    parser.add_argument("--train-steps", type=int, default=400, help="of each net")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--distance", choices=objectives.DISTANCES, default="MSE")
    parser.add_argument("--paces", type=float, nargs="+", default=[1.0], help="h of CAF")
    parser.add_argument(
        "--middles",
        type=float,
        nargs="+",
        default=[caf_adapter.MIDDLE],
        help="of CAF's `adapter.share`; 1: heads do not fade",
    )
    parser.add_argument(
        "--arms", nargs="*", choices=ARMS, default=ARMS, help="what is measured besides CAF"
    )
    parser.add_argument("--calls", type=int, nargs="+", default=[2, 3, 5])
    parser.add_argument("--prompts", type=int, default=20, help="two seeds each")
    options = parser.parse_args()
    couplings, judge, students, seconds = (
        Couplings(options.count, options.couplings),
        Judge(options.prompts, options.calls),
        {},
        {},
    )
    if "untrained" in options.arms:
        judge.untrained()
    for h, middle in itertools.product(options.paces, options.middles):
        name = f"CAF, h = {h:g}" + ("" if middle == caf_adapter.MIDDLE else f", middle {middle:g}")
        students[name], seconds[name] = trained_caf(couplings, options, h, middle)
        judge.caf(name, students[name])
    for name, middle in RECTIFIED.items() if "rectified" in options.arms else ():
        student, seconds[name] = trained_rectified(couplings, options, middle)
        judge.rectified(name, student)
    found = {
        "couplings": len(couplings.noise),
        "train_steps": options.train_steps,
        "rank": options.rank,
        "lr": options.lr,
        "batch": BATCH,
        "distance": options.distance,
        "pictures": len(judge.noise),
        "teacher_steps": bench_caf.TEACHER_STEPS,
        "teacher_obeys": judge.obeys,
        "seconds": seconds,
        "rows": judge.rows,
        "inversion": judge.inversion(students) if "inversion" in options.arms else [],
        "command": " ".join(sys.argv),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
