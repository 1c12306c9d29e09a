"""Modules and names of 0.1.0 can still be imported, with one warning."""

import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from ddpm.old_names import MODULES, NAMES, RENAMED


@pytest.mark.parametrize("old", MODULES)
def test_old_modules_are_forwarded(old: str) -> None:
    module, expected = importlib.import_module(old), dict[str, object]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for new in reversed(MODULES[old].split()):
            own = vars(importlib.import_module(new)).items()
            expected |= {
                n: v for n, v in own if not n.startswith("__") and getattr(v, "__module__", new) == new
            }
        for new, names in NAMES.get(old, {}).items():
            home = importlib.import_module(new)
            expected |= {name: getattr(home, RENAMED.get(name, name)) for name in names.split()}
        assert all(getattr(module, name) is value for name, value in expected.items())


@pytest.mark.parametrize("old", NAMES)
def test_old_names_of_packages_are_forwarded(old: str) -> None:
    module = importlib.import_module(old)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for new, names in NAMES[old].items():
            for name in names.split():
                today = RENAMED.get(name, name)
                assert getattr(module, name) is getattr(importlib.import_module(new), today)
    with pytest.raises(AttributeError, match=f"module '{old}' has no attribute 'nothing'"):
        _ = module.nothing


def test_one_warning_names_the_new_place_and_the_users_line(tmp_path: Path) -> None:
    """The imports of docs/extending.md, of the notebook and of exported model cards as they were."""
    (tmp_path / "plugin.py").write_text(
        "import ddpm\n"
        "from ddpm.datasets.types import Dataset, Facts, Split, hold_out\n"
        "from ddpm.samplers import Denoise, Noise, Step\n"
        "from ddpm.schedules import Level, NoiseSchedule\n"
        "from ddpm.diffusion import Denoiser\n"
        "from ddpm.config import choose_sampler\n"
        "from ddpm import build, config, sampling\n"
        "assert config.check and config.TrainConfig and build.facts and build.network and sampling.Model.sample\n"
        "print(sampling.Model.__module__)\n"
    )
    result = subprocess.run([sys.executable, "plugin.py"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("ddpm.api"), result.stderr
    assert result.stderr.count("Warning") == 1, result.stderr
    assert "plugin.py:2: FutureWarning: ddpm.datasets.types.Dataset is now ddpm.data.dataset.Dataset" in (
        result.stderr
    )


def test_nothing_of_ours_uses_old_names(tmp_path: Path) -> None:
    code = "import ddpm.cli.train, ddpm.cli.sample, ddpm.cli.evaluate, ddpm.api, ddpm.old_names as o, sys\n"
    code += "assert not o._warned and not o.MODULES.keys() & sys.modules.keys()"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
