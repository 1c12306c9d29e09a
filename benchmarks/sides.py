"""A training step of ours, and of each peer from PyPI (the extra `bench`), as the benchmarks run them.

A step draws a batch, times and noise, and does forward, loss, backward and AdamW. Ours and diffusers' train the same
network from the same weights, clip the gradient and average the weights. The other two have U-Nets of their own of
about as many FLOP, and the loss of their own training code; neither clips or averages here, which is in their favour.
All data lie ready on the device: scikit-learn's digits, enlarged to 28×28.
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm.config.hydra import compose
from ddpm.config.schema import TrainConfig, check
from ddpm.data.batches import Batches
from ddpm.data.dataset import Dataset, Split
from ddpm.data.digits import digits
from ddpm.data.info import DatasetInfo
from ddpm.export.diffusers_map import diffusers_config, to_diffusers
from ddpm.io.images import normalise
from ddpm.train.cuda_graph import CapturedSteps
from ddpm.train.state import TrainState, prepare
from ddpm.train.step import _draw, learning_rate, train_step

SIZE = 28
NETWORKS = {  # of ours and of diffusers
    "unet_small": ["model=unet_small"],
    "mnist_gpu": [
        "model=unet_small",
        "model.channels=[64,128,128]",
        "model.num_blocks=1",
        "model.attention=[2]",
    ],
    "tiny": ["model=unet_small", "model.channels=[8,32]", "model.attention=[1]", "model.head_dim=8"],
}
Loss = Callable[[Tensor], Tensor]  # of a batch x_0 (N, 1, 28, 28) in [-1, 1]


@dataclass(frozen=True)
class Setting:
    """A library, by its name on PyPI, and how it is run."""

    side: str
    precision: str = "fp32"  # or bf16, by autocast
    channels_last: bool = False
    compile: str | None = None  # the mode of torch.compile: "default" or "reduce-overhead"; None: eager
    cuda_graph: bool = False  # ours: the whole step as one graph
    network: str = "unet_small"  # or another of NETWORKS
    fused: bool = (
        True  # a peer's optimizer and average, a kernel for all weights; else PyTorch's and its own default
    )
    keep_freed: bool = False  # ddpm.runtime.memory.keep_freed, which every command of ours calls

    def __str__(self) -> str:
        words = [self.side, self.precision, "channels_last" if self.channels_last else "contiguous"]
        flags = {"compile": self.compile, "unfused": not self.fused, "keep_freed": self.keep_freed}
        return " ".join(words + [name for name, on in flags.items() if on])


@dataclass(frozen=True, eq=False)
class Side:
    network: nn.Module
    step: Callable[[], Tensor]  # a training step on a new batch, to its loss


def make(setting: Setting, batch_size: int, device: torch.device) -> Side:
    """A training that is ready for its first step."""
    if setting.side == "ours":
        run, batches = our_run(setting, batch_size, device)
        if setting.compile:
            run.network.compile(mode=setting.compile)

        steps = CapturedSteps(run, batches) if device.type == "cuda" else None

        def step() -> Tensor:
            loss, _ = steps.step() if steps else train_step(run, *batches.batch(run.step))
            run.step += 1
            return loss

        return Side(run.network, step)
    torch.manual_seed(0)
    return _peer(setting, batch_size, device, *PEERS[setting.side](device, setting.network))


def installed() -> dict[str, str]:
    """The peers that are here, and their versions."""
    found = {}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def our_run(setting: Setting, batch_size: int, device: torch.device) -> tuple[TrainState, Batches]:
    overrides = [
        "dataset=mnist",
        *NETWORKS[setting.network],
        f"trainer.batch_size={batch_size}",
        f"trainer.precision={setting.precision}",
        f"trainer.channels_last={str(setting.channels_last).lower()}",
        "trainer.compile=false",
        f"trainer.cuda_graph={str(setting.cuda_graph).lower()}",
    ]
    config = check(TrainConfig, compose("train", overrides))
    split = Split(_images(), None)
    run = prepare(config, Dataset(DatasetInfo("digits", 1, SIZE, 0, (), 256), split, split, split), device)
    return run, Batches(split, batch_size, config.seed, device)


def twin(run: TrainState) -> nn.Module:
    """diffusers' network of the same topology and weights as a run's."""
    from diffusers import UNet2DModel

    params = {key: value for key, value in run.config.model.params.items() if key != "conditional"}
    network = UNet2DModel(**diffusers_config(SIZE, 1, 1, 0, **params)).to(run.device)
    network.load_state_dict(to_diffusers(run.network.state_dict()))
    return network


def difference(device: torch.device) -> tuple[float, float]:
    """How far the two networks' outputs are apart at most, in float32, and the largest of them. Random weights: of new
    ones the last layer's are zero.
    """
    run, _ = our_run(Setting("ours", channels_last=True), 8, device)
    for parameter in run.network.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, t = torch.randn(8, 1, SIZE, SIZE, device=device), torch.arange(8, device=device) * 100
    with torch.no_grad():
        ours, theirs = run.network(x, t), twin(run)(x, t).sample
    return float((ours - theirs).abs().max()), float(theirs.abs().max())


def losses(steps: int, batch_size: int, device: torch.device) -> list[tuple[float, float]]:
    """Our loss and diffusers' at each step of the same training: weights, images, times and noise. In float32."""
    from diffusers import DDPMScheduler

    run, batches = our_run(Setting("ours", channels_last=True), batch_size, device)
    network, scheduler = twin(run).train(), DDPMScheduler(num_train_timesteps=1000)
    o, found = run.config.optimizer, []
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=o.lr, betas=(o.beta_1, o.beta_2), weight_decay=o.weight_decay
    )
    for _ in range(steps):
        x_0, y = batches.batch(run.step)
        t, _, eps, _ = _draw(run, x_0, y, torch.arange(len(x_0), device=device), run.step)
        optimizer.param_groups[0]["lr"] = learning_rate(o, run.step, run.max_steps)
        theirs = F.mse_loss(network(scheduler.add_noise(x_0, eps, t), t).sample, eps)
        optimizer.zero_grad()
        theirs.backward()
        nn.utils.clip_grad_norm_(network.parameters(), run.config.trainer.grad_clip)
        optimizer.step()
        ours, _ = train_step(run, x_0, y)
        run.step += 1
        found.append((ours.item(), theirs.item()))
    return found


def _peer(setting: Setting, batch_size: int, device: torch.device, network: nn.Module, loss_of: Loss) -> Side:
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format
    network.to(memory_format=layout).train()
    if setting.compile:
        network.compile(mode=setting.compile)
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=setting.fused or None)
    average = None
    if setting.side == "diffusers":
        from diffusers.training_utils import EMAModel

        average = EMAModel(parameters, decay=0.999, foreach=setting.fused)
    images = normalise(_images()).to(device)

    def step() -> Tensor:
        chosen = torch.randint(len(images), (batch_size,), device=device)
        x_0 = images[chosen].contiguous(memory_format=layout)
        with torch.autocast(device.type, torch.bfloat16, enabled=setting.precision == "bf16"):
            loss = loss_of(x_0)
        optimizer.zero_grad()
        loss.backward()
        if average:
            nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if average:
            average.step(parameters)
        return loss.detach()

    return Side(network, step)


def _diffusers(device: torch.device, name: str) -> tuple[nn.Module, Loss]:
    """As in diffusers' examples/unconditional_image_generation."""
    from diffusers import DDPMScheduler

    network = twin(our_run(Setting("ours", network=name), 1, device)[0])
    scheduler = DDPMScheduler(num_train_timesteps=1000)

    def loss(x_0: Tensor) -> Tensor:
        noise = torch.randn_like(x_0)
        t = torch.randint(1000, (len(x_0),), device=device)
        return F.mse_loss(network(scheduler.add_noise(x_0, noise, t), t).sample.float(), noise)

    return network, loss


def _denoising_diffusion_pytorch(device: torch.device, name: str) -> tuple[nn.Module, Loss]:
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    network = Unet(dim=32, dim_mults=(1, 2, 4), channels=1)
    return network, GaussianDiffusion(network, image_size=SIZE, auto_normalize=False).to(device)


def _smalldiffusion(device: torch.device, name: str) -> tuple[nn.Module, Loss]:
    """Schedule as in its examples/fashion_mnist_unet.py; without dropout, as all others here."""
    from smalldiffusion import Scaled, ScheduleLogLinear, Unet, generate_train_sample

    network = Scaled(Unet)(SIZE, 1, 1, ch=32, ch_mult=(1, 2, 2), attn_resolutions=(14, 7), dropout=0.0)
    schedule = ScheduleLogLinear(sigma_min=0.01, sigma_max=20, N=800)
    network.to(device)

    def loss(x_0: Tensor) -> Tensor:
        x_0, sigma, eps, _ = generate_train_sample(x_0, schedule)
        return network.get_loss(x_0, sigma, eps)

    return network, loss


PEERS = {
    "diffusers": _diffusers,
    "denoising-diffusion-pytorch": _denoising_diffusion_pytorch,
    "smalldiffusion": _smalldiffusion,
}


def _images() -> Tensor:
    """uint8 (N, 1, 28, 28)."""
    images = digits(Path()).train.images
    return F.interpolate(images.float(), size=SIZE, mode="bilinear").round().to(torch.uint8)
