"""ddpm-report: compare runs, of a sweep or any others, in a table, CSV and pictures."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddpm.cli import command
from ddpm.config.overrides import quoted, typed_value
from ddpm.config.schema import ReportConfig
from ddpm.errors import UserError, printable
from ddpm.io.files import reason, try_to_draw, write_atomically
from ddpm.io.folders import make_folder, names_in, remove_empty
from ddpm.report import runs, table
from ddpm.report.runs import RunRow
from ddpm.runs import run_dir
from ddpm.runs.output_dirs import dated_folder

FILES = ("report.csv", "report.png", "contact.png")
MAX_IMAGES = 64  # of each run in contact.png


def main(arguments: list[str]) -> None:
    command.run("report", _with_folders(arguments), report, defaults=_before_typed)


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
    """Check what needs each other: a folder; a sampler for its parameters. Raises UserError. Returns no defaults."""
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
    if config.contact and config.device not in ("auto", "cpu"):
        _contact_sheet().runtime_device.device(config.device)  # a mistake comes before the table
    folders = [Path(folder) for folder in config.folder]
    rows = runs.ranked(runs.read_all(folders, run_dir.is_running), config.figure)
    alone = len(folders) == 1 and all(row.path != folders[0] for row in rows)
    out = Path(config.out) if config.out is not None else folders[0] if alone else None
    if out is not None:
        _check_out(out, beside_runs=alone and out.resolve() == folders[0].resolve())
    print(table.table(rows, config.figure), flush=True)
    made: list[Path] = []
    try:
        made = dated_folder("outputs/report") if out is None else make_folder(out)
        out = out or made[0]
        for line in _write(config, rows, out):
            print(printable(line), flush=True)
    except BrokenPipeError:  # `ddpm-report … | head`
        raise
    except OSError as error:
        remove_empty(made)
        raise UserError(f"cannot write to {out}: {reason(error)}; out=… names another folder") from None


def _write(config: ReportConfig, rows: list[RunRow], out: Path) -> Iterator[str]:
    """Write the files one by one. Yields lines that say which. Raises UserError, OSError."""
    figure, without = config.figure, sum(row.best(config.figure) is None for row in rows)
    for old in FILES[1:]:  # a report is replaced as a whole
        (out / old).unlink(missing_ok=True)
    write_atomically(out / "report.csv", table.csv_text(rows, figure).encode())
    yield str(out / "report.csv")
    if without == len(rows):
        yield f"no run has a {figure} yet, which comes with the first validation: no report.png"
    else:
        from ddpm.report import plot

        picture = out / "report.png"
        yield from try_to_draw(plot.draw, rows, figure, picture) or [str(picture)]
    if config.contact:
        options = (config.n, config.seed, config.sampler, figure, config.device)
        yield from _contact_sheet().write(out / "contact.png", rows, *options)
    if 0 < without < len(rows):
        yield f"{without} of {len(rows)} runs have no {figure} and are only in table and CSV"
    if best := table.best(rows, figure):
        yield best


def _contact_sheet() -> Any:
    """Import what draws images, and with it torch, which tables do without."""
    from ddpm.report import contact_sheet

    return contact_sheet


def _check_out(out: Path, beside_runs: bool) -> None:
    """Check that the results go into a folder that is new, empty or a report's. Raises UserError.

    `beside_runs`: it is the folder of the runs, where other files may lie.
    """
    there = names_in(out) if out.is_dir() else set[str]()
    foreign = there - {*FILES} if table.is_csv(out / FILES[0]) else there
    if foreign := foreign & {*FILES} if beside_runs else foreign:
        raise UserError(f"out={out}: holds {min(foreign)}, which is not of a report; choose another name")
