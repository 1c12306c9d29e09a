"""Every noise schedule × sampler × spacing × number of steps, on a problem whose answer is known.

The data are two bumps on one pixel, the denoiser is the best possible one, and sampling starts from the exact
q(x_T); what is wrong with the result is therefore the sampler's doing. Prints the figures, writes
docs/samplers.md and exits with 1 if a combination fails.
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.diffusion.mixture import MEAN, PART, STD, IdealDenoiser  # noqa: E402

from ddpm.diffusion.denoiser import Denoiser  # noqa: E402
from ddpm.diffusion.objective import WEIGHTS, make_objective  # noqa: E402
from ddpm.diffusion.process import PREDICTIONS, target  # noqa: E402
from ddpm.diffusion.samplers import Step, ddim, ddpm, dpmpp_2m, dpmpp_2m_sde, heun, sample_levels, unipc  # noqa: E402
from ddpm.diffusion.schedules import SCHEDULES, Level, NoiseSchedule  # noqa: E402
from ddpm.diffusion.spacings import SPACINGS  # noqa: E402
from ddpm.runtime.randomness import normal  # noqa: E402

N = 4096  # images
CUT = -0.15  # between the bumps
SAMPLERS: dict[str, Callable[..., Iterator[Step]]] = {
    "ddpm small": partial(ddpm, variance="small"),
    "ddpm large": partial(ddpm, variance="large"),
    "ddim": ddim,
    "ddim eta 1": partial(ddim, eta=1.0),
    "heun": heun,
    "heun churn": partial(heun, churn=10.0),
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "unipc 2": unipc,
    "unipc 3": partial(unipc, order=3),
}
ORDERS = {"ddim": 1, "heun": 2, "dpmpp_2m": 2, "unipc 2": 3, "unipc 3": 4}  # UniPC-p: p + 1


@dataclass(frozen=True)
class Result:
    """The largest error among mean, standard deviation and share of the right bump, and what was allowed."""

    schedule: str
    T: int
    sampler: str
    spacing: str
    num_steps: int
    error: float
    allowed: float


def main() -> int:
    start = perf_counter()
    results, refused = matrix()
    orders = convergence()
    conversions, untrainable = objectives()
    text = report(results, refused, orders, conversions, untrainable)
    (ROOT / "docs" / "samplers.md").write_text(text)

    print(f"{len(results)} combinations of schedule, sampler, spacing and steps, {len(refused)} refused:")
    for reason in sorted(set(refused.values())):
        print(f"  {sum(r == reason for r in refused.values())} × {reason}")
    for steps in ("4", "10", "50", "T"):
        errors = sorted(r.error for r in results if column(r) == steps)
        print(f"  {steps:>2} steps: worst error {errors[-1]:.3f}, median {errors[len(errors) // 2]:.4f}")
    print(f"  nearest to its bound: {max(results, key=lambda r: r.error / r.allowed)}")
    lowest = [f"{name} {min(v for (n, _), v in orders.items() if n == name):.2f}" for name in ORDERS]
    print(f"orders of convergence, lowest of all schedules: {', '.join(lowest)}")
    print(f"{len(conversions)} schedules × predictions × weights trainable, {len(untrainable)} refused")
    print(f"  worst error of a conversion {max(conversions.values()):.1e}")

    failed = [str(r) for r in results if not r.error <= r.allowed]
    failed += [f"order of {key}: {got:.2f}" for key, got in orders.items() if not got > ORDERS[key[0]] - 0.2]
    failed += [f"conversion of {key}: off by {got:.1e}" for key, got in conversions.items() if not got < 1e-3]
    print(f"{len(failed)} failed, {perf_counter() - start:.0f} s")
    for line in failed:
        print(f"FAILED {line}")
    return 1 if failed else 0


def schedules(T: int) -> dict[str, NoiseSchedule]:
    zero = ("linear", "cosine", "sigmoid")
    plain = {name: make(T) for name, make in SCHEDULES.items()}
    return plain | {f"{name}, zero SNR": SCHEDULES[name](T, zero_terminal_snr=True) for name in zero}


def matrix() -> tuple[list[Result], dict[tuple[str, ...], str]]:
    """All at T = 100; at T = 1000 three schedules and two spacings."""
    results: list[Result] = []
    refused: dict[tuple[str, ...], str] = {}
    few = {name: schedules(1000)[name] for name in ("linear", "cosine", "straight")}
    for T, some, spacings in ((100, schedules(100), list(SPACINGS)), (1000, few, ["linspace", "logsnr"])):
        for name, schedule in some.items():
            for spacing in spacings:
                for num_steps in (1, 4, 10, 50, T):
                    try:
                        levels = sample_levels(schedule, num_steps, spacing)
                    except ValueError as error:
                        refused |= {(name, str(T), sampler, spacing): str(error) for sampler in SAMPLERS}
                        continue
                    for sampler in SAMPLERS:
                        error, allowed = run(SAMPLERS[sampler], schedule, levels)
                        results.append(Result(name, T, sampler, spacing, num_steps, error, allowed))
    return results, refused


def run(
    sampler: Callable[..., Iterator[Step]], schedule: NoiseSchedule, levels: list[Level]
) -> tuple[float, float]:
    """(error, what is allowed): five Monte Carlo errors of N images, and a discretisation error that falls
    with the number of steps. One step must return E[x_0 | x_T] itself. inf: something is not finite.
    """
    ideal, x = IdealDenoiser(schedule), quantiles(levels[0])
    index = torch.arange(N)
    steps = list(sampler(ideal, levels, x, lambda k: normal(0, "verify", k, index, (1, 1, 1)).double()))
    if not all(step.x.isfinite().all() and step.x_0.isfinite().all() for step in steps):
        return math.inf, 0.0
    got = steps[-1].x.flatten()
    if len(steps) == 1:
        return (got - ideal(x, levels[0]).x_0.flatten()).abs().max().item(), 1e-9
    errors = (got.mean() - TRUTH[0], got.std() - TRUTH[1], (got > CUT).double().mean() - TRUTH[2])
    return max(error.abs().item() for error in errors), 5 * 0.5 / math.sqrt(N) + 1.6 / len(steps)


def normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-z / math.sqrt(2))


def quantiles(level: Level) -> Tensor:
    """N images that fill the exact q(x_t) evenly: its quantiles at (i + 1/2) / N, by bisection."""
    mean, std = level.alpha * MEAN, ((level.alpha * STD) ** 2 + level.sigma**2).sqrt()
    wanted = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    low, high = torch.full_like(wanted, -10), torch.full_like(wanted, 10)
    for _ in range(60):
        x = (low + high) / 2
        below = (PART * normal_cdf((x[:, None] - mean) / std)).sum(1) < wanted
        low, high = torch.where(below, x, low), torch.where(below, high, x)
    return low.view(N, 1, 1, 1)


_MEAN = (PART * MEAN).sum()
TRUTH = (
    _MEAN,
    ((PART * (MEAN**2 + STD**2)).sum() - _MEAN**2).sqrt(),
    1 - (PART * normal_cdf((CUT - MEAN) / STD)).sum(),
)


def no_noise(k: int) -> Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def convergence() -> dict[tuple[str, str], float]:
    """The observed order between two interior noise levels, from 32 to 64 equal steps of lambda."""
    orders = {}
    for name, schedule in schedules(1000).items():
        ideal, x = IdealDenoiser(schedule), quantiles(schedule.at_lambda(-1.5))[::16]

        def solve(sampler: str, num_steps: int, ideal: IdealDenoiser = ideal, x: Tensor = x) -> Tensor:
            lambdas = [-1.5 + 3 * i / num_steps for i in range(num_steps + 1)]
            levels = [ideal.schedule.at_lambda(lambda_) for lambda_ in lambdas]
            *_, last = SAMPLERS[sampler](ideal, levels, x, no_noise)
            return last.x

        truth = solve("unipc 3", 2048)
        for sampler in ORDERS:
            coarse, fine = ((solve(sampler, n) - truth).square().mean().sqrt() for n in (32, 64))
            orders[sampler, name] = math.log2(coarse / fine)
    return orders


def lowest(orders: dict[tuple[str, str], float]) -> dict[str, float]:
    return {sampler: min(got for (name, _), got in orders.items() if name == sampler) for sampler in ORDERS}


class Predicts(nn.Module):
    """The ideal denoiser as a network that predicts something else than x_0."""

    def __init__(self, ideal: IdealDenoiser, prediction: str) -> None:
        super().__init__()
        self.ideal, self.prediction = ideal, prediction

    def forward(self, x_t: Tensor, t: Tensor, y: None) -> Tensor:
        level = self.ideal.schedule.at(t[0].item())
        estimate = self.ideal(x_t, level)
        return target(self.prediction, estimate.x_0, estimate.eps, level.alpha, level.sigma)


Case = tuple[str, str, str]


def objectives() -> tuple[dict[Case, float], dict[Case, str]]:
    """Either refused with a reason, or DDIM from that prediction must return what it returns from x_0. (With
    an ideal denoiser this tests the conversions alone.)
    """
    off: dict[Case, float] = {}
    refused: dict[Case, str] = {}
    for name, schedule in schedules(1000).items():
        ideal, levels = IdealDenoiser(schedule), sample_levels(schedule, 10, "trailing")
        x = quantiles(levels[0])[::16].float()
        *_, direct = ddim(ideal, levels, x, no_noise)
        for prediction in PREDICTIONS:
            denoiser = Denoiser(Predicts(ideal, prediction), schedule, prediction, clip="none")
            *_, converted = ddim(denoiser, levels, x, no_noise)
            for weight in WEIGHTS:
                try:
                    make_objective(schedule, "cpu", prediction=prediction, weight=weight)
                    off[name, prediction, weight] = (converted.x - direct.x).abs().max().item()
                except ValueError as error:
                    refused[name, prediction, weight] = str(error)
    return off, refused


def column(result: Result) -> str:
    return "T" if result.num_steps == result.T else str(result.num_steps)


def report(
    results: list[Result],
    refused: dict[tuple[str, ...], str],
    orders: dict[tuple[str, str], float],
    conversions: dict[Case, float],
    untrainable: dict[Case, str],
) -> str:
    columns = ["4", "10", "50", "T"]
    lines = [INTRODUCTION, "| sampler | spacing | 4 steps | 10 steps | 50 steps | T steps |"]
    lines.append("|---|---|--:|--:|--:|--:|")
    for sampler in SAMPLERS:
        for spacing in SPACINGS:
            mine = [r for r in results if (r.sampler, r.spacing) == (sampler, spacing)]
            worst = [max(r.error for r in mine if column(r) == c) for c in columns]
            lines.append(f"| {sampler} | {spacing} | " + " | ".join(f"{error:.3f}" for error in worst) + " |")
    lines += ["", f"{len(results)} combinations, {len(refused)} refused:", ""]
    lines += [f"- {reason}" for reason in sorted(set(refused.values()))]
    names = sorted({name for _, name in orders})
    lines += ["", ORDER_TEXT, f"| sampler | {' | '.join(names)} |", "|---|" + "--:|" * len(names)]
    for sampler in ORDERS:
        lines.append(f"| {sampler} | " + " | ".join(f"{orders[sampler, name]:.2f}" for name in names) + " |")
    lines += ["", OBJECTIVE_TEXT.format(len(conversions), max(conversions.values()), len(untrainable))]
    lines += ["| schedule | prediction | refused weights |", "|---|---|---|"]
    for name in schedules(2):
        for prediction in PREDICTIONS:
            weights = [w for (n, p, w) in untrainable if (n, p) == (name, prediction)]
            if weights:
                every = len(weights) == len(WEIGHTS)
                said = "all: where alpha is 0, eps says nothing of x_0" if every else ", ".join(weights)
                lines.append(f"| {name} | {prediction} | {said} |")
    return "\n".join(lines) + "\n"


INTRODUCTION = """# Samplers, verified

Written by `python scripts/verify_samplers.py`; do not edit by hand.

The data are two bumps on one pixel, 0.3 N(-0.6, 0.1²) + 0.7 N(0.4, 0.2²). The denoiser is E[x_0 | x_t]
in closed form and sampling starts from the exact q(x_T), so every error is the sampler's. The error is
the largest among mean, standard deviation (0.49) and share of the right bump (0.70), the worst over all
schedules: `linear`, `cosine`, `sigmoid`, `straight` and the first three with zero terminal SNR, at T =
100; also `linear`, `cosine` and `straight` at T = 1000 for `linspace` and `logsnr`. Stochastic samplers
carry a Monte Carlo error of about 0.008 (4096 images). With one step every sampler returns E[x_0 | x_T]
(checked to 1e-9). Nothing is anywhere infinite or NaN. A combination fails above 0.039 + 1.6 / steps.

`leading` starts before t = T-1 by definition; here it is given the x_t that belongs there. From pure
noise, few steps of it are wrong: take `trailing`.
"""

ORDER_TEXT = """## Order of convergence

Between two interior noise levels (lambda = -1.5 and 1.5), in equal steps of lambda: log2 of the error at
32 steps over that at 64. UniPC-p has order p + 1: its corrector gives one more (Zhao et al. 2023,
theorem 3.1).
"""

OBJECTIVE_TEXT = """## Predictions and weights

{} combinations of schedule, prediction and weight can be trained; DDIM from each prediction returns what
it returns from x_0 (largest difference {:.1e}, float32). {} are refused: with zero terminal SNR a weight
that is 0 at the last t would leave the first sampling step untrained. `plain` trains it.
"""


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
