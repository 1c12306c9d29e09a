"""`label=`: classes by number or by name; a number comes first, and is told where a name would be another class."""

import dataclasses
from typing import Any

import pytest

from ddpm.config import hydra
from ddpm.config.schema import DrawConfig, SampleConfig, check
from ddpm.data.info import DatasetInfo
from ddpm.errors import UserError
from ddpm.sample.model import ambiguous, class_number
from ddpm.sample.sampler_file import NO_GUIDANCE

FOLDER = DatasetInfo("folder", 3, 8, 4, ("cat", "a dog", "10", "0"), 256)


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("3", [3]),
        ("[0,1,2]", [0, 1, 2]),
        ("all", "all"),
        ("null", None),
        ("cat", ["cat"]),
        ("[cat,3]", ["cat", 3]),
        ("a dog", ["a dog"]),
        ("['a dog', T-shirt/top]", ["a dog", "T-shirt/top"]),
        ("ب (é)", ["ب (é)"]),
        ("007", ["007"]),
        ("'12'", [12]),
    ],
)
def test_numbers_and_names_are_read(typed: str, read: Any) -> None:
    config = check(SampleConfig, hydra.compose("sample", hydra.read_overrides(["ckpt=a", f"label={typed}"])))
    assert config.label == read


def test_values_of_the_library_are_read_alike() -> None:
    plain = {"n": 1, "seed": 0, "index": None, "batch_size": 1, **NO_GUIDANCE}
    for label, read in ((2, [2]), ("cat", ["cat"]), (["cat", 2], ["cat", 2]), ("all", "all"), (None, None)):
        assert check(DrawConfig, {**plain, "label": label}).label == read
    for wrong in (True, [], 2.5, {"a": 1}, [[1]]):
        with pytest.raises(UserError, match="label="):
            class_number(FOLDER, check(DrawConfig, {**plain, "label": wrong}).label[0])


def test_a_number_comes_before_a_name_and_says_so() -> None:
    assert [class_number(FOLDER, label) for label in (0, 1, "cat", "a dog", 10)] == [0, 1, 0, 1, 2]
    assert ambiguous(FOLDER, [0, 1, "cat", 10]) == [
        "label=0 is class number 0, named cat; the class named 0 is label=3"
    ]
    digits = dataclasses.replace(FOLDER, class_names=("0", "1", "2", "3"))
    assert ambiguous(digits, [0, 1, 2, 3]) == ambiguous(FOLDER, None) == ambiguous(FOLDER, "all") == []


def test_an_unknown_class_is_one_line_with_the_names() -> None:
    with pytest.raises(UserError) as caught:
        class_number(FOLDER, "dog")
    assert str(caught.value) == (
        "label=dog: folder has the labels 0 to 3 or, by name, cat, a dog, 10, 0; did you mean 'a dog'?"
    )
    many = dataclasses.replace(FOLDER, num_classes=100, class_names=tuple(f"c{k}" for k in range(100)))
    with pytest.raises(UserError, match=r"c0, c1, .*c39, …"):
        class_number(many, 100)
