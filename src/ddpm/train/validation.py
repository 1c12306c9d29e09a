"""Validation: the objective's own loss on held-out images, and an error in eps that compares any two runs."""

import torch
from torch import Tensor, nn

from ddpm.data.dataset import Split
from ddpm.diffusion.objective import Objective, losses
from ddpm.diffusion.process import invert
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.io.images import normalise
from ddpm.runtime import distributed
from ddpm.runtime.randomness import normal
from ddpm.runtime.world import ALONE, World
from ddpm.train.metrics_file import VALIDATED

EVALUATIONS = 1024  # network evaluations for each figure
LAMBDAS = tuple(-4 + 0.5 * i for i in range(17))  # common to all runs, from nearly noise to nearly clean
_SEED = 20260101  # of the noise: the same for every run, whatever its own seed


class Validation:
    """A fixed set of (image, noise level, noise), so that two measurements differ by the network alone.

    `val_loss` is the objective's, and cannot rank different objectives or schedules. `val_eps_mse` can: it is the mean
    over 17 noise levels lambda = -4 … 4 of the squared error in eps, from whatever the network predicts.
    """

    def __init__(
        self, split: Split, schedule: NoiseSchedule, objective: Objective, device: torch.device
    ) -> None:
        index = torch.arange(EVALUATIONS, device=device)
        chosen = index % len(split.images)
        self.x_0 = normalise(split.images.to(device)[chosen])
        self.y = None if split.labels is None else split.labels.to(device)[chosen]
        self.eps = normal(_SEED, "validation", 0, index, tuple(self.x_0.shape[1:]))
        shuffle = torch.randperm(EVALUATIONS, generator=torch.Generator().manual_seed(_SEED)).to(device)
        self.t = (shuffle * schedule.num_timesteps) // EVALUATIONS  # the times of the loss: evenly spread
        self.objective = objective
        levels = [schedule.at_lambda(lambda_) for lambda_ in LAMBDAS]
        self.level = index % len(levels)
        table = torch.tensor([[v.t, v.alpha, v.sigma] for v in levels], dtype=torch.float32, device=device)
        self.time, self.alpha, self.sigma = table[self.level].unbind(1)

    @torch.inference_mode()
    def measure(
        self, network: nn.Module, conditional: bool, batch_size: int = 256, world: World = ALONE
    ) -> dict[str, float]:
        """Return both figures and their standard errors, by the names in metrics_file.VALIDATED.

        Several processes share the evaluations and return the same figures.
        """
        loss, error = [], []
        own = world.share(EVALUATIONS)
        for start in range(own.start, own.stop, batch_size):
            part = slice(start, min(start + batch_size, own.stop))
            y = self.y[part] if conditional and self.y is not None else None
            loss.append(losses(network, self.objective, self.x_0[part], self.t[part], self.eps[part], y))
            error.append(self._eps_errors(network, part, y))
        both = torch.stack([torch.cat(loss), torch.cat(error)])
        losses_, errors = distributed.all_gather_columns(world, both, EVALUATIONS)
        by_level = [_mean_and_error(errors[self.level == k]) for k in range(len(LAMBDAS))]
        eps_mse = sum(mean for mean, _ in by_level) / len(LAMBDAS)
        eps_error = sum(error**2 for _, error in by_level) ** 0.5 / len(LAMBDAS)
        return dict(zip(VALIDATED, (*_mean_and_error(losses_), eps_mse, eps_error), strict=True))

    def _eps_errors(self, network: nn.Module, part: slice, y: Tensor | None) -> Tensor:
        alpha, sigma = (table[part].view(-1, 1, 1, 1) for table in (self.alpha, self.sigma))
        x_t = alpha * self.x_0[part] + sigma * self.eps[part]
        output = network(x_t, self.time[part], y).float()[:, : x_t.shape[1]]
        _, eps = invert(self.objective.prediction, output, x_t, alpha, sigma)
        return (eps - self.eps[part]).square().mean(dim=(1, 2, 3))


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()
