"""The Triton kernels of random numbers, by Triton's interpreter on the CPU, beside PyTorch's: status 0 where equal."""

from unittest.mock import patch

import torch

from ddpm.runtime import randomness, randomness_triton
from ddpm.runtime.randomness import key, normal, uniform

INDEX = torch.cat([torch.arange(40), torch.tensor([2**53, 2**31, 7])])


def main() -> None:
    indices = (INDEX, INDEX[::3], INDEX[:1], INDEX[:0], torch.arange(700))
    steps = (0, 3, {"a": torch.tensor(key(5, "a", 3))}, {"a": torch.tensor([1, -1, 12])[2]})
    for index in indices:
        for step in steps:
            expected = uniform(5, "a", step, index)
            with patch.object(randomness, "_kernels", lambda _: randomness_triton):
                assert torch.equal(uniform(5, "a", step, index), expected)
    for shape in ((), (1,), (7,), (1, 28, 28), (3, 21, 21)):
        for step in steps:
            expected = normal(5, "a", step, INDEX, shape)
            with patch.object(randomness, "_kernels", lambda _: randomness_triton):
                found = normal(5, "a", step, INDEX, shape)
            assert found.dtype == torch.float32 and found.shape == expected.shape
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


main()
