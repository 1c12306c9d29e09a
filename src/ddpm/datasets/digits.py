"""The 1,797 handwritten 8×8 digits that come with scikit-learn: nothing to download, trained in a minute."""

from pathlib import Path

import torch

from ddpm.datasets.types import Dataset, Facts, Split, hold_out

HELD_OUT = 180  # images each for validation and test: a tenth


def digits(data_root: Path) -> Dataset:
    """Grey digits, images uint8 (N, 1, 8, 8): 1,437 to train on, 180 each for validation and test.

    The pixels count ink in 17 levels, 0 … 16 (Alpaydin & Kaynak 1998, *Optical Recognition of Handwritten
    Digits*, test part); here they are spread over 0 … 255. `data_root` is not used.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    ink = torch.from_numpy(source.images)
    images = (ink * 255 / 16).round().to(torch.uint8)[:, None]
    rest, test = hold_out(Split(images, torch.from_numpy(source.target).long()), HELD_OUT)
    train, val = hold_out(rest, HELD_OUT)
    facts = Facts(
        "digits", channels=1, image_size=8, num_classes=10, class_names=tuple("0123456789"), levels=17
    )
    return Dataset(facts, train, val, test)
