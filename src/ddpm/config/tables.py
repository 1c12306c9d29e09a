"""Where the table of each kind stands, and the names in it; `ddpm.register` adds to them."""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = Path(__file__).parents[1]


class Table(NamedTuple):
    """A dict of functions or classes by name, and the key of a group ("": of none) whose value is such a name."""

    module: str
    attribute: str
    group: str
    key: str = "name"


TABLES = {
    "schedule": Table("ddpm.diffusion.schedules", "SCHEDULES", "schedule"),
    "sampler": Table("ddpm.diffusion.samplers", "SAMPLERS", "sampler"),
    "dataset": Table("ddpm.data.datasets", "DATASETS", "dataset"),
    "metric": Table("ddpm.evaluate.metrics.registry", "METRICS", "", "measure"),
    "network": Table("ddpm.networks", "NETWORKS", "model"),
    "prediction": Table("ddpm.diffusion.process", "PREDICTIONS", "objective", "prediction"),
    "weight": Table("ddpm.diffusion.objective", "WEIGHTS", "objective", "weight"),
    "timesteps": Table("ddpm.diffusion.timesteps", "TIMESTEPS", "objective", "timesteps"),
    "optimizer": Table("ddpm.train.optimizers", "OPTIMIZERS", "optimizer"),
    "logger": Table("ddpm.train.loggers", "LOGGERS", "", "logger"),
}
REGISTERED: dict[str, dict[str, Callable[..., Any]]] = {kind: {} for kind in TABLES}


@dataclass(frozen=True)
class Names:
    """The names in the table of a kind, the registered ones too."""

    kind: str

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*_written(self.kind), *REGISTERED[self.kind]]))


@cache
def _written(kind: str) -> tuple[str, ...]:
    """Read the keys of a table from its source, as importing it would import torch."""
    table = TABLES[kind]
    path = PACKAGE.joinpath(*table.module.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == table.attribute:
            assert isinstance(node.value, ast.Dict)
            return tuple(ast.literal_eval(key) for key in node.value.keys if key is not None)
    raise AssertionError(f"{file} has no {table.attribute}")


def uses_plugin(config: dict[str, Any]) -> bool:
    """Return whether a config, as plain data, names something registered."""
    return any(
        (config[table.group] if table.group else config).get(table.key) in REGISTERED[kind]
        for kind, table in TABLES.items()
    )
