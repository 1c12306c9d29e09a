"""Load the 1,797 handwritten 8×8 digits of scikit-learn, which need no download and train in a minute."""

import hashlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm.data.dataset import Dataset, Split, hold_out
from ddpm.data.info import DatasetInfo
from ddpm.errors import DataError

SHA256 = "68aea062d35a127749050fa0e52dca09d6569ac08092c925610e0954e172dde2"  # of the table as bytes
HELD_OUT = 180  # images each for validation and test: a tenth


def digits(data_root: Path) -> Dataset:
    """Load grey digits uint8 (N, 1, 8, 8): 1,437 to train on, 180 each for validation and test.

    The pixels count ink in 17 levels, 0 … 16 (Alpaydin & Kaynak 1998, *Optical Recognition of Handwritten
    Digits*, test part); here they are scaled to 0 … 255. `data_root` is not used.
    """
    table = torch.from_numpy(_table())
    images = (table[:, :-1].view(-1, 1, 8, 8) * 255 / 16).round().to(torch.uint8)
    rest, test = hold_out(Split(images, table[:, -1].long()), HELD_OUT)
    train, val = hold_out(rest, HELD_OUT)
    facts = DatasetInfo(
        "digits", channels=1, image_size=8, num_classes=10, class_names=tuple("0123456789"), levels=17
    )
    return Dataset(facts, train, val, test)


def _table() -> NDArray[np.float64]:
    """Return (1797, 65): 64 pixels and the label. Read scikit-learn's file, as importing it takes two seconds."""
    package = find_spec("sklearn")
    assert package is not None and package.submodule_search_locations  # a dependency of ddpm
    folder = Path(package.submodule_search_locations[0])
    file = folder / "datasets" / "data" / "digits.csv.gz"
    table = np.loadtxt(file, delimiter=",")
    if hashlib.sha256(table.astype(np.uint8).data).hexdigest() != SHA256:
        raise DataError(f"{file}: its SHA-256 is not that of the published digits; install scikit-learn anew")
    return table
