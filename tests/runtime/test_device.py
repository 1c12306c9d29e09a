"""PyTorch's switches for CUDA, which can be read and set without a GPU."""

import pytest
import torch

from ddpm.runtime import device


def test_one_precision_for_all_of_float32() -> None:
    for tf32 in (True, False):
        device.set_up_cuda(tf32=tf32)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is tf32
        assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_callers_precision_comes_back() -> None:
    device.set_up_cuda(tf32=True)
    with pytest.raises(KeyError), device.ieee_float32():
        assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "ieee"
        raise KeyError
    assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "tf32"
    device.set_up_cuda()
    with device.ieee_float32():
        pass
    assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is False


def test_the_search_for_algorithms_is_switched_off_and_on_again() -> None:
    for before in (True, False):
        torch.backends.cudnn.benchmark = before
        with device.without_cudnn_benchmark():
            assert not torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.benchmark is before


def test_tf32_is_named_only_where_it_is_used() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert device.precision("tf32", gpu) == torch.float32
    assert [device.precision_name(name, gpu) for name in ("tf32", "fp32", "bf16")] == [
        "tf32",
        "float32",
        "bfloat16",
    ]
    assert device.precision_name("tf32", cpu) == "float32"
