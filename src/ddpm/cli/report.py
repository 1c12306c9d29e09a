"""ddpm-report: compare runs, of a sweep or any others, in a table, CSV and pictures."""

import sys
from pathlib import Path

from ddpm.cli import app
from ddpm.config.overrides import quoted, typed_value
from ddpm.config.schema import ReportConfig
from ddpm.errors import UserError, printable
from ddpm.io.files import reason, write_atomically
from ddpm.report import runs, table
from ddpm.report.runs import RunRow
from ddpm.runs import run_dir
from ddpm.runs.output_dirs import dated_folder

MAX_IMAGES = 64  # of each run in contact.png


def main() -> None:
    sys.argv[1:] = _with_folders(sys.argv[1:])
    app.run("report", ReportConfig, report, defaults=_before_typed)


def _with_folders(arguments: list[str]) -> list[str]:
    """Collect bare arguments and those of folder=… in one Hydra list. A job's folder may contain a `=` itself."""
    folders, others = [], []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key == "folder" and equals:
            folders += value[1:-1].split(",") if value[:1] == "[" and value[-1:] == "]" else [value]
        elif argument[:1] not in ("-", "~", "") and (not equals or "/" in key):
            folders.append(argument)
        else:
            others.append(argument)
    listed = ",".join(quoted(folder.strip(" '\"")) for folder in folders if folder)
    return [*others, f"folder=[{listed}]"] if listed else others


def _before_typed(overrides: list[str]) -> list[str]:
    """No defaults. Raises UserError without a folder, or for a sampler's parameter without the sampler."""
    if typed_value(overrides, "folder") is None:
        raise UserError("name a folder of runs: ddpm-report outputs/multirun/…")
    parameters = [o for o in overrides if o.lstrip("+").startswith("sampler.")]
    if parameters and typed_value(overrides, "sampler") is None:
        raise UserError(f"{parameters[0]}: name the sampler, too (sampler=ddim {parameters[0]})")
    return []


def report(config: ReportConfig) -> None:
    """Run the command for one checked config. Raises UserError."""
    if config.n > MAX_IMAGES:
        raise UserError(f"n={config.n}: must be a number from 1 to {MAX_IMAGES}")
    if config.contact:
        _check_device(config.device)
    folders = [Path(folder) for folder in config.folder]
    rows = runs.ranked(runs.read_all(folders, run_dir.is_running), config.figure)
    print(table.table(rows, config.figure), flush=True)
    out = _out(config, folders, rows)
    try:
        write_atomically(out / "report.csv", table.csv_text(rows, config.figure).encode())
        print(printable(str(out / "report.csv")), flush=True)
        if any(row.best(config.figure) for row in rows):
            from ddpm.report import plot

            plot.draw(rows, config.figure, out / "report.png")
            print(printable(str(out / "report.png")), flush=True)
        else:
            print(f"no run has a {config.figure} yet, which comes with the first validation: no report.png")
        if config.contact:
            from ddpm.report import contact_sheet

            options = (config.n, config.seed, config.sampler, config.figure, config.device)
            for line in contact_sheet.write(out / "contact.png", rows, *options):
                print(printable(line))
        without = sum(row.best(config.figure) is None for row in rows)
        if 0 < without < len(rows):
            print(f"{without} of {len(rows)} runs have no {config.figure} and are only in table and CSV")
        if best := table.best(rows, config.figure):
            print(printable(best))
    except BrokenPipeError:  # `ddpm-report … | head`
        raise
    except OSError as error:
        raise UserError(f"cannot write to {out}: {reason(error)}; out=… names another folder") from None


def _check_device(name: str) -> None:
    """Raise UserError for a device that does not exist. `auto` and `cpu` are known without importing torch."""
    if name not in ("auto", "cpu"):
        from ddpm.runtime import device as runtime_device

        runtime_device.device(name)


def _out(config: ReportConfig, folders: list[Path], rows: list[RunRow]) -> Path:
    """The folder for the results: beside the runs of one folder, but never a run's own folder."""
    if config.out is None:
        alone = len(folders) == 1 and all(row.path != folders[0] for row in rows)
        return folders[0] if alone else dated_folder("outputs/report")
    try:
        Path(config.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make out={config.out}: {reason(error)}") from None
    return Path(config.out)
