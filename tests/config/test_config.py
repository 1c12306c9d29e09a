"""Every YAML composes, passes the schema and builds; the schema refuses what it should."""

import inspect
from typing import Any

import pytest

from ddpm.config import choices, hydra, overrides
from ddpm.config.checking import declared
from ddpm.config.choices import CONFIG_DIR, known_keys
from ddpm.config.schema import SCHEMAS, TrainConfig, check, to_dict
from ddpm.errors import UserError
from ddpm.runtime.gpu_locks import cuda_number


def train_config(*overrides: str) -> TrainConfig:
    return check(TrainConfig, hydra.compose("train", list(overrides)))  # type: ignore[no-any-return]


def files(group: str) -> list[str]:
    return sorted(file.stem for file in (CONFIG_DIR / group).glob("*.yaml"))


@pytest.mark.parametrize(
    "override",
    [
        f"{g}={f}"
        for g in ("model", "schedule", "objective", "optimizer", "sampler", "trainer", "experiment")
        for f in files(g)
    ],
)
def test_every_choice_composes(override: str) -> None:
    assert to_dict(train_config(override))


@pytest.mark.parametrize("name", files("dataset"))
def test_every_dataset_has_a_recipe(name: str) -> None:
    composed = train_config(f"dataset={name}", *(["dataset.path=x"] if name == "folder" else []))
    assert composed.trainer.max_steps > 0 and composed.model.name == "unet"


@pytest.mark.parametrize(
    ("group", "table"),
    [
        ("schedule", "ddpm.diffusion.schedules.SCHEDULES"),
        ("dataset", "ddpm.data.datasets.DATASETS"),
        ("model", "ddpm.networks.NETWORKS"),
        ("sampler", "ddpm.diffusion.samplers.SAMPLERS"),
    ],
)
def test_yaml_keys_are_the_functions_keywords(group: str, table: str) -> None:
    import importlib

    module, _, attribute = table.rpartition(".")
    functions: dict[str, Any] = getattr(importlib.import_module(module), attribute)
    common = {
        "sampler": {"num_steps", "spacing", "rho", "clip", "dynamic_percentile"},
        "model": {"conditional"},
    }.get(group, set())
    contents = choices.choices(group).values()
    assert {content["name"] for content in contents} == functions.keys()
    for content in contents:
        keywords = set(inspect.signature(functions[content["name"]]).parameters)
        assert content.keys() - {"name"} - common <= keywords, content


def test_precedence_of_recipe_experiment_and_command_line() -> None:
    assert train_config("dataset=mnist").trainer.max_steps == 30000
    short = train_config("dataset=mnist", "experiment=mnist_cpu").trainer.max_steps
    assert short < 30000
    assert train_config("dataset=mnist", "experiment=mnist_cpu", "trainer.max_steps=7").trainer.max_steps == 7
    assert (
        train_config("dataset=mnist", "model=unet_tiny").model.params["channels"]
        == choices.choices("model")["unet_tiny"]["channels"]
    )


def test_stored_config_comes_back_the_same() -> None:
    original = train_config(
        "dataset=mnist", "schedule=cosine", "model.attention=[]", "optimizer.lr=3e-4", "trainer.resume='a b'"
    )
    again = hydra.compose("train", overrides.as_overrides(to_dict(original)))
    assert check(TrainConfig, again) == original
    assert check(TrainConfig, to_dict(original)) == original


def test_paths_survive_hydras_grammar() -> None:
    for path in (
        "12_34",
        "a b",
        "é/فا",
        "x=y",
        "#1",
        "it's",
        "(a)",
        "[b]",
        "a,b",
        "~/x",
        "back\\slash",
        "a&b",
        "end\\",
    ):
        typed = hydra.read_overrides([f"run_dir={path}"])
        assert hydra.compose("train", typed)["run_dir"] == path
        assert overrides.typed_value(typed, "run_dir") == path


def stored(**changes: Any) -> dict[str, Any]:
    return {**to_dict(train_config()), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": 1}, "unknown key 'extra'"),
        ({"model": {"name": "os.system"}}, "model.name='os.system': must be one of mlp, unet"),
        ({"model": "unet"}, "must be a set of keys with a name"),
        ({"trainer": 3}, "trainer=3: must be a set of keys"),
        ({"seed": True}, "seed=True"),
        ({"seed": 2**64}, "seed="),
        ({"device": "cpu\0"}, "device="),
        (
            {
                "schedule": {
                    "name": "linear",
                    "num_timesteps": 10**9,
                    "beta_start": 1e-4,
                    "beta_end": 0.02,
                    "zero_terminal_snr": False,
                }
            },
            "from 1 to 100000",
        ),
        ({"schedule": {"name": "linear", "_target_": "os.system"}}, "unknown key 'schedule._target_'"),
    ],
)
def test_schema_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check(TrainConfig, stored(**changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_every_number_has_limits() -> None:
    keys = [key for key in known_keys("train") + known_keys("sample") if "." in key]
    for key in keys:
        group, name = key.split(".")
        for content in choices.choices(group).values():
            value = content.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                assert declared(TrainConfig)[key].allowed, f"{key} has no limits"


@pytest.mark.parametrize("program", SCHEMAS)
def test_declarations_and_yaml_files_have_the_same_keys(program: str) -> None:
    declarations = declared(SCHEMAS[program])
    known = {
        *known_keys(program),
        *(["optimizer.name"] if program == "train" else []),
    }  # typed as optimizer=…
    assert declarations.keys() <= known
    assert {key for key in known if "." not in key} - {"experiment"} <= declarations.keys()
    assert all(
        declarations[key].help for key in choices.own_keys(choices.read_yaml(CONFIG_DIR / f"{program}.yaml"))
    )


@pytest.mark.parametrize(
    ("program", "typed", "said"),
    [
        (
            "train",
            "trainer.max_steps=1e1",
            "=10.0: must be a number from 1 to 1000000000, a whole number: 10",
        ),
        ("train", "trainer.max_steps=2.0", "=2.0: must be a number from 1 to 1000000000, a whole number: 2"),
        ("train", "trainer.max_steps=2.5", "=2.5: must be a number from 1 to 1000000000, a whole number"),
        (
            "train",
            "seed=1e3",
            "seed=1000.0: must be a number from 0 to 9223372036854775807, a whole number: 1000",
        ),
        ("train", "seed=1,2", "several values for seed: add -m to run a job for each"),
        ("train", "seed=range(3)", "several values for seed: add -m to run a job for each"),
        ("sample", "save=grid,npz", "several values for save: a list is written save=[grid,npz]"),
        ("sample", "save=images", "save=images: must be a list such as [images]"),
        ("sample", "label=1,2", "several values for label: a list is written label=[1,2]"),
        ("sample", "n=1,2", "n=1,2: must be one value"),
        (
            "eval",
            "measure=cas,distance",
            "several values for measure: a list is written measure=[cas,distance]",
        ),
        ("eval", "sampler.num_steps=5,10", "several values for sampler.num_steps: add -m to compare them"),
        ("export", "format=a,b", "format=a,b: must be one value"),
        ("train", "dataset=1", "dataset=1: must be one of digits"),
        ("train", "seed=" + "9" * 5000, "9: Exceeds the limit"),
        ("train", "seed=[", "seed=[: settings are written key=value; quote a value"),
        ("sample", "sampler=../x", "sampler=../x: must be one of ddim"),
    ],
)
def test_a_mistake_says_what_is_right_for_this_key(program: str, typed: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        check(
            SCHEMAS[program],
            hydra.compose(program, hydra.read_overrides(["ckpt=a"] * (program != "train") + [typed])),
        )
    assert said in str(caught.value)


def test_a_device_that_is_a_number_is_told_its_name() -> None:
    with pytest.raises(UserError, match=r"device=0: must be auto, cpu, cuda or cuda:0$"):
        cuda_number(train_config("device=0").device)
