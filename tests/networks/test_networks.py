"""The U-Net against diffusers' `UNet2DModel` as the reference, and what each network promises by itself."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import yaml
from torch import Tensor, nn

from ddpm.export.diffusers_map import diffusers_config, to_diffusers
from ddpm.networks import NETWORKS
from ddpm.networks.mlp import MLP
from ddpm.networks.unet import UNet, sinusoids

Network = TypeVar("Network", bound=nn.Module)
MODELS = sorted((Path(__file__).parents[2] / "configs" / "model").glob("*.yaml"))

# (image_size, in_channels, out_channels, num_classes) and the keys of the YAML files.
TOPOLOGIES: dict[str, tuple[tuple[int, int, int, int], dict[str, Any]]] = {
    "one level": ((6, 1, 1, 0), {"channels": [8], "num_blocks": 1, "attention": [], "head_dim": 8}),
    "two levels, attention on top": (
        (8, 1, 1, 0),
        {"channels": [16, 32], "num_blocks": 1, "attention": [0], "head_dim": 8},
    ),
    "three levels, as unet_small": (
        (28, 1, 1, 10),
        {"channels": [32, 64, 64], "num_blocks": 2, "attention": [1, 2], "head_dim": 8},
    ),
    "RGB, variance too, attention below": (
        (12, 3, 6, 0),
        {"channels": [16, 16, 48], "num_blocks": 2, "attention": [2], "head_dim": 16, "norm_groups": 4},
    ),
    "classes, attention everywhere": (
        (8, 3, 3, 4),
        {"channels": [16, 8], "num_blocks": 3, "attention": [0, 1], "head_dim": 4},
    ),
}
TINY: dict[str, Any] = {
    "channels": [8, 16],
    "num_blocks": 1,
    "attention": [1],
    "head_dim": 8,
    "norm_groups": 4,
}


def scrambled(network: Network) -> Network:
    """The network with every weight random: layers that start at 0 or 1 would hide a mistake."""
    for parameter in network.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        nn.init.normal_(parameter, std=0.5 * fan_in**-0.5)
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, mean=1.0, std=0.2)
    return network


def distinct(rows: Tensor) -> int:
    return len({tuple(row) for row in rows.tolist()})


Inputs = tuple[Tensor, Tensor, Tensor | None]


def inputs(image_size: int, channels: int, num_classes: int, n: int = 3) -> Inputs:
    x = torch.randn(n, channels, image_size, image_size)
    labels = torch.tensor([0, num_classes, num_classes - 1]) if num_classes else None
    return x, torch.tensor([0, 500, 999]), labels


def tiny(num_classes: int = 0, **changes: Any) -> UNet:
    return UNet(8, 1, 1, num_classes, **(TINY | changes))


@pytest.fixture(autouse=True)
def _one_seed_and_one_thread() -> Iterator[None]:
    """Tensors here are tiny: threads cost more than they bring."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def diffusers_unet(config: dict[str, object]) -> Any:
    import diffusers  # takes seconds: only where it is needed

    build: Any = diffusers.UNet2DModel
    return build(**config)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_unet_equals_diffusers_in_output_and_gradients(name: str, channels_last: bool) -> None:
    (image_size, in_channels, out_channels, num_classes), keys = TOPOLOGIES[name]
    ours = scrambled(UNet(image_size, in_channels, out_channels, num_classes, **keys))
    reference = diffusers_unet(diffusers_config(image_size, in_channels, out_channels, num_classes, **keys))
    reference.load_state_dict(to_diffusers(ours.state_dict()))  # strict: every weight has one counterpart
    x, t, y = inputs(image_size, in_channels, num_classes)
    expected = reference(x, t, class_labels=y).sample
    target = torch.randn_like(expected)
    ((expected - target) ** 2).mean().backward()

    if channels_last:
        ours = ours.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    output = ours(x, t, y)
    ((output - target) ** 2).mean().backward()

    assert output.shape == (3, out_channels, image_size, image_size)
    assert expected.std() > 0.1  # else equality would say little
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    gradients = to_diffusers({key: p.grad for key, p in ours.named_parameters() if p.grad is not None})
    for key, parameter in reference.named_parameters():
        assert parameter.grad is not None
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(gradients[key], parameter.grad, atol=1e-4 * scale + 1e-7, rtol=0, msg=key)


def test_unet_equals_diffusers_in_double_precision() -> None:
    """Float32 leaves room for an error of 1e-6 of the right size; this leaves none."""
    (image_size, *rest), keys = TOPOLOGIES["classes, attention everywhere"]
    ours = scrambled(UNet(image_size, *rest, **keys)).double()
    reference = diffusers_unet(diffusers_config(image_size, *rest, **keys)).double()
    reference.load_state_dict(to_diffusers(ours.state_dict()))
    x, t, y = inputs(image_size, rest[0], rest[2])
    with torch.no_grad():
        expected = reference(x.double(), t, class_labels=y).sample
        torch.testing.assert_close(ours(x.double(), t, y), expected, atol=1e-12, rtol=0)


def test_to_diffusers_shares_memory() -> None:
    network = tiny()
    theirs = to_diffusers(network.state_dict())["conv_in.weight"]
    assert theirs.data_ptr() == network.conv_in.weight.data_ptr()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_embedding_tells_1000_times_apart_and_is_float32_under_autocast(precision: torch.dtype) -> None:
    t = torch.arange(1000)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        embedding = sinusoids(t, 32)
    assert embedding.dtype == torch.float32
    assert distinct(embedding) == 1000
    assert distinct(t.bfloat16()[:, None]) < 600  # why the angles have to be float32


def test_embedded_times_stay_apart_through_bf16_layers() -> None:
    network = scrambled(tiny())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        embedding = network.time(sinusoids(torch.arange(1000), network.frequencies))
    assert distinct(embedding) == 1000


def test_embedding_of_integer_and_fractional_times() -> None:
    t = torch.tensor([3, 3, 4])
    assert torch.equal(sinusoids(t, 16), sinusoids(t.double(), 16))
    low, middle, high = sinusoids(torch.tensor([3.0, 3.5, 4.0]), 16)
    assert (middle - low).norm() > 0.1
    assert (high - middle).norm() > 0.1
    torch.testing.assert_close(sinusoids(torch.zeros(1), 4), torch.tensor([[1.0, 1.0, 0.0, 0.0]]))


def test_autocast_stays_near_float32_and_trains() -> None:
    network = scrambled(tiny(num_classes=3))
    x, t, y = inputs(8, 1, 3)
    with torch.autocast("cpu", torch.bfloat16):
        low = network(x, t, y)
    low.float().square().mean().backward()
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), network(x, t, y), atol=0.1, rtol=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("build", [tiny, lambda num_classes: MLP(8, 1, 1, num_classes)], ids=["unet", "mlp"])
def test_no_label_is_the_null_label_and_every_label_counts(build: Any) -> None:
    network = scrambled(build(num_classes=3)).eval()
    x, t, _ = inputs(8, 1, 3, n=1)
    t = t[:1]
    with torch.no_grad():
        without = network(x, t)
        outputs = [network(x, t, torch.tensor([label])) for label in range(4)]
    assert torch.equal(without, outputs[3])
    assert len({output.sum().item() for output in outputs}) == 4
    with pytest.raises(ValueError, match="unconditional"):
        build(num_classes=0)(x, t, torch.tensor([0]))


@pytest.mark.parametrize("build", [tiny, lambda: MLP(8, 1, 1, 0)], ids=["unet", "mlp"])
def test_output_depends_on_time_also_between_integers(build: Any) -> None:
    network = scrambled(build()).eval()
    x = torch.randn(1, 1, 8, 8).expand(3, -1, -1, -1)
    with torch.no_grad():
        first, second, third = network(x, torch.tensor([10.0, 10.5, 11.0]))
        again = network(x[:2], torch.tensor([10, 11]))
    assert (first - second).abs().max() > 1e-4
    assert (second - third).abs().max() > 1e-4
    torch.testing.assert_close(again, torch.stack([first, third]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["unet", "mlp"])
def test_images_of_a_batch_do_not_see_each_other(name: str) -> None:
    network = scrambled(tiny() if name == "unet" else MLP(8, 1, 1, 0)).eval()
    x, t, _ = inputs(8, 1, 0)
    with torch.no_grad():
        torch.testing.assert_close(network(x, t)[1:2], network(x[1:2], t[1:2]), atol=1e-5, rtol=0)


def test_unet_starts_by_predicting_zero_yet_learns_everywhere() -> None:
    network = tiny()
    x, t, _ = inputs(8, 1, 0)
    assert torch.equal(network(x, t), torch.zeros_like(x))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(3):  # zeros open one after the other, from the output inwards
        optimizer.zero_grad()
        (network(x, t) - x).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


@pytest.mark.parametrize("precision", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_compiles_into_one_graph(precision: torch.dtype) -> None:
    network = scrambled(tiny(num_classes=3))
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    x, t, y = inputs(8, 1, 3)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        output = compiled(x, t, y)
        expected = network(x, t, y)
    output.float().sum().backward()
    torch.testing.assert_close(output, expected)


def test_dropout_only_in_training() -> None:
    network = scrambled(tiny(dropout=0.5))
    x, t, _ = inputs(8, 1, 0)
    assert not torch.equal(network(x, t), network(x, t))
    network.eval()
    assert torch.equal(network(x, t), network(x, t))


@pytest.mark.parametrize(
    ("image_size", "changes", "words"),
    [
        (28, {"channels": [32] * 4}, ["24 and 32", "at most 3 levels"]),
        (7, {}, ["6 and 8", "at most 1 level"]),
        (1, {}, ["nearest are 2"]),
        (8, {"channels": []}, ["channels=[]"]),
        (8, {"num_blocks": 0}, ["num_blocks=0"]),
        (8, {"channels": [8, 18]}, ["18", "norm_groups=4"]),
        (8, {"channels": [8, 12]}, ["12", "head_dim=8"]),
        (8, {"attention": [2]}, ["attention=[2]", "0 to 1"]),
        (8, {"attention": [-1]}, ["attention=[-1]", "0 to 1"]),
    ],
)
def test_refusals_are_one_clear_line(image_size: int, changes: dict[str, Any], words: Sequence[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        UNet(image_size, 1, 1, 0, **(TINY | changes))
    message = str(refusal.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_mlp_is_784_512_784_with_time() -> None:
    network = MLP(28, 1, 1, 0)
    pixels = sum(p.numel() for key, p in network.named_parameters() if not key.startswith("times."))
    assert pixels == 784 * 512 + 512 + 512 * 784 + 784
    assert network(torch.randn(2, 1, 28, 28), torch.tensor([0, 1])).shape == (2, 1, 28, 28)


def test_mlp_fits_any_image_and_depth() -> None:
    network = MLP(5, 3, 6, 7, hidden=16, num_layers=3)
    output = network(torch.randn(2, 3, 5, 5), torch.tensor([0.5, 1.0]), torch.tensor([0, 7]))
    assert output.shape == (2, 6, 5, 5)


@pytest.mark.parametrize(("key", "value"), [("hidden", 15), ("hidden", 0), ("num_layers", 0)])
def test_mlp_refuses(key: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{key}={value}"):
        MLP(8, 1, 1, 0, **{key: value})


@pytest.mark.parametrize(
    ("name", "image_size", "parameters"),
    [("unet_tiny", 8, 0.70e6), ("unet_small", 28, 1.707e6), ("unet_base", 28, 16.05e6), ("mlp", 28, 1.067e6)],
)
def test_yaml_files_build_at_their_stated_size(name: str, image_size: int, parameters: float) -> None:
    (file,) = [file for file in MODELS if file.stem == name]
    text = file.read_text()
    keys = yaml.safe_load(text)
    assert text.startswith("# ")
    assert keys.pop("conditional") is False
    network = NETWORKS[keys.pop("name")](image_size, 1, 1, 0, **keys)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(parameters, rel=0.005)


def test_every_yaml_file_is_tested() -> None:
    assert [file.stem for file in MODELS] == ["mlp", "unet_base", "unet_small", "unet_tiny"]
