"""What else CAF can be trained with, on the ring of Gaussians (`mixture.py`): mean distance from
where the exact flow leads, by calls of the net, for noise that was not trained on.

    python tests/bench/bench_caf_objectives.py            all parts, about four minutes on one core
    python tests/bench/bench_caf_objectives.py --parts distances

`distances`: squares and Huber's (`flow.pseudo_huber`), on couplings as they are and with 3 % of the
    pictures given to other noise. "p99": of the distances, at two calls.
`averages`: weights averaged while they are trained (decay 0.999, (1 + n) / (10 + n) at first),
    beside the last ones; the learning rate falling to 0 as in Train CAF, or constant, where the
    velocity net is averaged in either.
`without couplings`: MeanFlow and piFlow (`without_couplings.py`), of as many evaluations of a net
    as CAF takes with its couplings: twice as many steps as each of its nets.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401
from bench import bench_caf, mixture
from bench import without_couplings as others
from nibble.accel.caf import flow, objectives
from nibble.quant.training import loop

H, DECAY, OUTLIERS = 1.5, 0.999, 0.03


def fit(net, loss, steps: int, lr: float, falling: bool = True):
    """Trains all of a net; a copy with its averaged weights."""
    averaged = copy.deepcopy(net)
    options = loop.Options(steps=steps, lr=lr, warmup=100, seed=1, decay=float(falling))
    for done, _ in loop.steps(dict(net.named_parameters()), loss, options):
        rest = 1 - min(DECAY, (1 + done) / (10 + done))
        with torch.no_grad():
            for mean, last in zip(averaged.parameters(), net.parameters(), strict=True):
                mean.lerp_(last, rest)
    return averaged


class Trial(bench_caf.Mixture):
    """CAF and others by one training of one ring."""

    def __init__(self, steps: int, lr: float):
        super().__init__(steps)
        self.lr = lr

    def mixed_up(self) -> None:
        """Gives some pictures to other noise."""
        noise, data = self.train
        drawn = torch.Generator().manual_seed(9)
        some = torch.rand(len(data), generator=drawn) < OUTLIERS
        data = data.clone()
        data[some] = self.train[1][torch.randperm(len(data), generator=drawn)][some]
        self.train = noise, data

    def nets(self, distance: str = "MSE", lr: float | None = None, falling: bool = True):
        """Velocity net, acceleration net, its averaged weights; where the rate is constant, the
        velocity net is the average of its own.
        """
        lr = lr or self.lr
        loss = objectives.velocity_objective(
            bench_caf.of(speed := mixture.Net()), self.draw, H, distance=distance
        )
        mean = fit(speed, loss, self.steps, lr, falling)
        speed = speed if falling else mean
        push = copy.deepcopy(speed)
        loss = objectives.acceleration_objective(
            lambda x, t, v, c=None: push(x, t, v), bench_caf.of(speed), self.draw, distance=distance
        )
        return speed, push, fit(push, loss, self.steps, lr, falling)

    @staticmethod
    def drawn(speed, push):
        return lambda x, calls: flow.sample(speed, push, x, flow.uniform(calls - 1), h=H)


def measure_distances(options: argparse.Namespace) -> list[dict]:
    rows = []
    for pairs in ("as they are", "3 % mixed up"):
        trial = Trial(options.train_steps, options.lr)
        if pairs != "as they are":
            trial.mixed_up()
        for distance in objectives.DISTANCES:
            sample = trial.drawn(*trial.nets(distance)[:2])
            noise, data = trial.held
            with torch.no_grad():
                far = (sample(noise, 2) - data).norm(dim=1).quantile(0.99).item()
            row = {"pairs": pairs, "distance": distance, "errors": trial.error(sample), "p99": far}
            rows.append(told(row))
    return rows


def measure_averages(options: argparse.Namespace) -> list[dict]:
    trial, rows = Trial(options.train_steps, options.lr), []
    for lr in (options.lr, 2 * options.lr):
        for rate in ("falling", "constant"):
            speed, last, averaged = trial.nets(lr=lr, falling=rate == "falling")
            for weights, push in {"last": last, "averaged": averaged}.items():
                errors = trial.error(trial.drawn(speed, push))
                rows.append(told({"lr": lr, "rate": rate, "weights": weights, "errors": errors}))
    return rows


def measure_without_couplings(options: argparse.Namespace) -> list[dict]:
    trial, rows, steps = Trial(options.train_steps, options.lr), [], 2 * options.train_steps
    mean, taught, policy = others.Net(), others.Net(), others.Net(2 * others.GRID)
    arms = {
        "MeanFlow": (mean, others.meanflow(mean, False), others.meanflow_sample),
        "MeanFlow, taught": (taught, others.meanflow(taught, True), others.meanflow_sample),
        "piFlow": (policy, others.piflow(policy, bench_caf.CALLS), others.piflow_sample),
    }
    for name, (net, loss, sample) in arms.items():
        fit(net, loss, steps, options.lr)
        errors = trial.error(lambda x, calls, net=net, sample=sample: sample(net, x, calls))
        rows.append(told({"method": name, "steps": steps, "errors": errors}))
    return rows


def told(row: dict) -> dict:
    print(*(f"{key} {value}" for key, value in row.items()), sep="  ", flush=True)
    return row


MEASURES = {
    "without couplings": measure_without_couplings,
    "distances": measure_distances,
    "averages": measure_averages,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=bench_caf.RESULTS / "caf-objectives.json")
    parser.add_argument("--parts", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--train-steps", type=int, default=1000, help="of each net of CAF")
    parser.add_argument("--lr", type=float, default=2e-3)
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    for part in options.parts:
        found[part] = MEASURES[part](options)
        found |= {
            "command": " ".join(["python", *sys.argv]),
            "train_steps": options.train_steps,
            "lr": options.lr,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
