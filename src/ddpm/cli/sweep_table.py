"""The table after a multirun: one line a job, best first."""

import json
from pathlib import Path


def sweep_table(folder: Path, planned: int) -> str:
    """Reads `result.json` of every run folder under `folder`; a run without one has not finished."""
    rows: list[tuple[float, str, str]] = []
    for run in sorted(path for path in folder.iterdir() if path.is_dir()):
        try:
            result = json.loads((run / "result.json").read_text())
            figure = float(result["val_eps_mse"])
            rows.append((figure, f"{figure:.5f} ± {float(result['val_eps_mse_error']):.5f}", run.name))
        except (OSError, ValueError, KeyError):
            rows.append((float("inf"), "failed", run.name))
    lines = [f"{'val_eps_mse':>19}  job"] + [f"{text:>19}  {name}" for _, text, name in sorted(rows)]
    if len(rows) < planned:
        lines.append(f"{planned - len(rows)} of {planned} jobs left no folder")
    return "\n".join(lines)
