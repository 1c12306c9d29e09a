"""The table after a multirun: one line a job, best first."""

from pathlib import Path

from ddpm.cli.run_folder import read_result


def sweep_table(folder: Path, planned: list[str]) -> str:
    """Reads `result.json` of every run folder under `folder`; a run without one has not finished."""
    rows: list[tuple[float, str, str]] = []
    for run in sorted(path for path in folder.iterdir() if path.is_dir()):
        if (result := read_result(run)) is None:
            rows.append((float("inf"), "failed", run.name))
        else:
            figure, error = result["val_eps_mse"], result["val_eps_mse_error"]
            rows.append((figure, f"{figure:.5f} ± {error:.5f}", run.name))
    lines = [f"{'val_eps_mse':>19}  job"] + [f"{text:>19}  {name}" for _, text, name in sorted(rows)]
    if missing := len(set(planned) - {name for _, _, name in rows}):
        lines.append(f"{missing} of {len(planned)} jobs left no folder")
    return "\n".join(lines)
