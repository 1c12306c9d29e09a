"""The table of datasets: functions `(data_root, **params) -> Dataset`.

To add one, write the function, put it into `DATASETS` and add `configs/dataset/<name>.yaml` with its parameters.
"""

from collections.abc import Callable

from ddpm.data import digits, folder, mnist, persian
from ddpm.data.dataset import Dataset

DATASETS: dict[str, Callable[..., Dataset]] = {
    "digits": digits.digits,
    "mnist": mnist.mnist,
    "fashion_mnist": mnist.fashion_mnist,
    "kmnist": mnist.kmnist,
    "persian": persian.persian,
    "folder": folder.folder,
}
