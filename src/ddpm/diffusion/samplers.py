"""Samplers: from pure noise to images, one noise level after the other.

A sampler is a generator `(denoiser, levels, x_T, noise, **options)` that yields a `Step` after each level. A
caller that wants the images takes the last, one that wants a film takes them all. `levels` runs from the
noisiest to the clean image (`sample_levels`); `noise(k)` returns the batch's k-th standard normal tensor.

Everywhere t is the level a step leaves, s the cleaner one it goes to, and h = lambda_s - lambda_t > 0, which
is infinite from pure noise and onto the clean image: there a step has first order. Coefficients are Python
floats from float64, so nothing waits for a GPU. To add a sampler, write it, put it into `SAMPLERS` and add
`configs/sampler/<name>.yaml`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ddpm.diffusion.denoiser import Estimate
from ddpm.diffusion.process import posterior
from ddpm.diffusion.schedules import Level, NoiseSchedule
from ddpm.diffusion.spacings import SPACINGS
from ddpm.errors import one_of, positive, within


class Denoise(Protocol):
    """`ddpm.diffusion.denoiser.Denoiser`, or anything like it. `last`: x_0 will be the image itself."""

    schedule: NoiseSchedule

    def __call__(self, x_t: Tensor, level: Level, last: bool = False) -> Estimate: ...


Noise = Callable[[int], Tensor]
Known = list[tuple[Level, Tensor]]  # estimates of x_0 at several levels


class Step(NamedTuple):
    """x (N, C, H, W) at noise level `level`, and the x_0 that was estimated on the way there."""

    x: Tensor
    x_0: Tensor
    level: Level


def sample_levels(
    schedule: NoiseSchedule, num_steps: int, spacing: str | Sequence[float] = "linspace", rho: float = 7.0
) -> list[Level]:
    """Return num_steps noise levels from the noisiest, then the clean image: num_steps + 1 in all.

    `spacing` names one of `SPACINGS`, or is itself the list of falling times in [0, T-1]; then num_steps is ignored.
    Raises ValueError for an unknown spacing or a number out of its range.
    """
    last = schedule.num_timesteps - 1
    if isinstance(spacing, str):
        one_of("spacing", spacing, SPACINGS)
        within("num_steps", num_steps, 1, last + 1)
        positive("rho", rho)
        times = SPACINGS[spacing](schedule, num_steps, rho=rho)
    else:
        times = list(spacing)
        if not times or any(t <= s for t, s in pairwise(times)) or not 0 <= times[-1] <= times[0] <= last:
            raise ValueError(f"spacing = {times}: a list of times must fall, and lie within 0 to {last}")
    return [schedule.at(t) for t in times] + [schedule.at(-1)]


def ddpm(
    denoiser: Denoise, levels: Sequence[Level], x: Tensor, noise: Noise, *, variance: str = "small"
) -> Iterator[Step]:
    """Sample ancestrally (Ho et al. 2020, algorithm 2): each step draws from q(x_s | x_t, x_0).

    variance "small" is the posterior's own (beta tilde), "large" that of q(x_t | x_s) (beta), ibid. section
    3.2; "learned" lies where the network says between their logarithms (Nichol & Dhariwal 2021, eq. 15).
    """
    one_of("variance", variance, ("small", "large", "learned"))
    for k, (t, s) in enumerate(pairwise(levels)):
        x_0, _, fraction = denoiser(x, t, last=s.sigma == 0)
        q = posterior(t, s)
        x = q.x_t_factor * x + q.x_0_factor * x_0
        if s.sigma > 0 and variance == "learned":
            if fraction is None:
                raise ValueError("variance = learned: the network has learned none; must be small or large")
            small, large = math.log(q.variance), math.log(q.transition_variance)
            x = x + torch.exp(0.5 * (small + (large - small) * fraction)) * noise(k)
        elif s.sigma > 0:
            x = x + math.sqrt(q.variance if variance == "small" else q.transition_variance) * noise(k)
        yield Step(x, x_0, s)


def ddim(
    denoiser: Denoise, levels: Sequence[Level], x: Tensor, noise: Noise, *, eta: float = 0.0
) -> Iterator[Step]:
    """Sample by DDIM (Song et al. 2021, eq. 12 and 16): eta = 0 is deterministic, eta = 1 ancestral sampling."""
    within("eta", eta, 0, 1)
    for k, (t, s) in enumerate(pairwise(levels)):
        x_0, eps, _ = denoiser(x, t, last=s.sigma == 0)
        std = eta * math.sqrt(posterior(t, s).variance)
        x = s.alpha * x_0 + math.sqrt(s.sigma**2 - std**2) * eps
        if std > 0:
            x = x + std * noise(k)
        yield Step(x, x_0, s)


def ddim_inverse(
    denoiser: Denoise, levels: Sequence[Level], x: Tensor, *, iterations: int = 15
) -> Iterator[Step]:
    """Go from images to the noise that `ddim` with eta = 0 makes them from; `levels` as there, noisiest first.

    The step from s up to t wants the x_t that ddim takes to x_s, for which the denoiser must see x_t itself:
    a fixed point, found by iteration from the usual guess (Pan et al. 2023, *AIDI*). Solved for x_t with x_0
    held, the equation contracts near pure noise; with eps held, near the clean image. Each image keeps the
    iterate that fits best, so the usual guess where the others go astray. Clipping cannot be undone.
    """
    within("iterations", iterations, 2, math.inf)
    for s, t in pairwise(reversed(levels)):
        hold_x_0 = s.alpha * t.alpha < s.sigma * t.sigma
        ratio = t.sigma / s.sigma if hold_x_0 else t.alpha / s.alpha
        best, misfit = x, x.new_full((len(x), 1, 1, 1), math.inf)
        iterate = x
        for k in range(iterations):
            x_0, eps, _ = denoiser(iterate, t)
            held = (t.alpha - s.alpha * ratio) * x_0 if hold_x_0 else (t.sigma - s.sigma * ratio) * eps
            following = ratio * x + held
            if k > 0:  # x_s, where the iteration starts, is no candidate
                change = (following - iterate).square().mean(dim=(1, 2, 3), keepdim=True)
                best = torch.where(change < misfit, iterate, best)
                misfit = torch.minimum(change, misfit)
            iterate = following
        x = best
        yield Step(x, x_0, t)


def heun(
    denoiser: Denoise,
    levels: Sequence[Level],
    x: Tensor,
    noise: Noise,
    *,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    churn_noise: float = 1.0,
    cap: bool = True,
) -> Iterator[Step]:
    """Sample at second order, two evaluations a step (Karras et al. 2022, algorithm 2; without churn algorithm 1).

    Their trapezoid rule for dx = eps d(sigma / alpha) puts e^h / 2 of the weight on the x_0 of the later end.
    Over a long step, where that exceeds 1 (h > ln 2), it would run far past both ends; with `cap` the weight is 1
    there. The cap is ours; it acts on 5 of the 17 steps of EDM's own schedule.
    """
    within("churn", churn, 0, math.inf)
    within("churn_min", churn_min, 0, churn_max)
    gamma = min(churn / (len(levels) - 1), math.sqrt(2) - 1)
    for k, (t, s) in enumerate(pairwise(levels)):
        if gamma > 0 and churn_min <= math.exp(-t.lambda_) <= churn_max:
            x, t = _raise_noise(denoiser.schedule, x, t, gamma, churn_noise, noise(k))
        x_0, eps, _ = denoiser(x, t, last=s.sigma == 0)
        x = s.alpha * x_0 + s.sigma * eps
        if t.alpha > 0 and s.sigma > 0:
            h = s.lambda_ - t.lambda_
            part = 1.0 if cap and h > math.log(2) else 0.5 * math.exp(h)
            x = x - math.expm1(-h) * part * s.alpha * (denoiser(x, s).x_0 - x_0)
        yield Step(x, x_0, s)


def _raise_noise(
    schedule: NoiseSchedule, x: Tensor, t: Level, gamma: float, scale: float, eps: Tensor
) -> tuple[Tensor, Level]:
    """Draw from q(x_u | x_t) at the u whose sigma / alpha is larger by the part gamma, at most at T-1."""
    u = schedule.at_lambda(t.lambda_ - math.log1p(gamma))
    if u.t <= t.t:
        return x, t
    return u.alpha / t.alpha * x + scale * math.sqrt(posterior(u, t).transition_variance) * eps, u


LONGEST_STRIDE = 1.5  # steps that are longer, relative to the one before, must not extrapolate x_0 in full


def dpmpp_2m(denoiser: Denoise, levels: Sequence[Level], x: Tensor, noise: Noise) -> Iterator[Step]:
    """Sample by DPM-Solver++(2M) (Lu et al. 2022, *DPM-Solver++*): second order, from two steps' x_0."""
    return dpmpp_2m_sde(denoiser, levels, x, noise, eta=0.0)


def dpmpp_2m_sde(
    denoiser: Denoise, levels: Sequence[Level], x: Tensor, noise: Noise, *, eta: float = 1.0
) -> Iterator[Step]:
    """Sample by SDE-DPM-Solver++(2M) (Lu et al. 2022, *DPM-Solver++*), with fresh noise of strength eta in [0, 1].

    Written in e^-h = alpha_t sigma_s / (sigma_t alpha_s), which is 0 where h is infinite.
    """
    within("eta", eta, 0, 1)
    x_0_before, h_before = x, math.inf
    for k, (t, s) in enumerate(pairwise(levels)):
        x_0 = denoiser(x, t, last=s.sigma == 0).x_0
        h, decay = s.lambda_ - t.lambda_, t.alpha * s.sigma / (t.sigma * s.alpha)
        stride = min(h / h_before, LONGEST_STRIDE) if h < math.inf else 0.0
        middle = x_0 + 0.5 * stride * (x_0 - x_0_before)  # x_0 as a line in lambda, in the middle of the step
        x = s.sigma / t.sigma * decay**eta * x + s.alpha * (1 - decay ** (1 + eta)) * middle
        if eta > 0 and s.sigma > 0:
            x = x + s.sigma * math.sqrt(1 - decay ** (2 * eta)) * noise(k)
        x_0_before, h_before = x_0, h
        yield Step(x, x_0, s)


def unipc(
    denoiser: Denoise, levels: Sequence[Level], x: Tensor, noise: Noise, *, order: int = 2
) -> Iterator[Step]:
    """Sample by UniPC-p on x_0 with B(h) = 1 - e^-h (Zhao et al. 2023).

    Each x_0 first corrects the step that led to it, then serves the next one. `order` is 2 or 3.
    """
    within("order", order, 2, 3)
    known: Known = []  # the x_0 of the last levels, newest first
    x_before = x
    for t, s in pairwise(levels):
        x_0 = denoiser(x, t, last=s.sigma == 0).x_0
        if known:
            x = _unipc_step(x_before, known, t, ahead=x_0)
        known = [(t, x_0), *known][: 1 if s.sigma == 0 else order]
        x_before, x = x, _unipc_step(x, known, s)
        if t.alpha == 0:  # infinitely far away in lambda: of no use to the next steps
            known = []
        yield Step(x, x_0, s)


def _unipc_step(x: Tensor, known: Known, s: Level, ahead: Tensor | None = None) -> Tensor:
    """Step to s by UniP or, with the x_0 `ahead` at s, by UniC (Zhao et al. 2023), both for x_0."""
    (t, x_0), older = known[0], known[1:]
    h = s.lambda_ - t.lambda_
    if older and h > LONGEST_STRIDE * (t.lambda_ - older[0][0].lambda_):
        older = []
    nodes = [((level.lambda_ - t.lambda_) / h, other) for level, other in older]
    if ahead is not None:
        nodes.append((1.0, ahead))
    ratio = s.sigma / t.sigma
    x = ratio * x + (s.alpha - t.alpha * ratio) * x_0
    for (r, other), weight in zip(nodes, _unipc_weights([r for r, _ in nodes], h), strict=True):
        x = x - s.alpha * math.expm1(-h) * weight / r * (other - x_0)
    return x


def _unipc_weights(r: list[float], h: float) -> list[float]:
    """Solve sum_i a_i r_i^(k-1) = k! h phi_(k+1)(-h) / B(h) for UniPC's weights a (Zhao et al. 2023).

    A single node has the weight 1/2.
    """
    if len(r) < 2:
        return [0.5] * len(r)
    wanted, phi = [], math.expm1(-h) / -h
    for k in range(1, len(r) + 1):
        phi = (phi - 1 / math.factorial(k)) / -h  # phi_(k+1)
        wanted.append(math.factorial(k) * -h * phi / math.expm1(-h))
    powers = torch.tensor([[r_i**k for r_i in r] for k in range(len(r))], dtype=torch.float64)
    return [float(a_i) for a_i in torch.linalg.solve(powers, torch.tensor(wanted, dtype=torch.float64))]


SAMPLERS: dict[str, Callable[..., Iterator[Step]]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "unipc": unipc,
}
