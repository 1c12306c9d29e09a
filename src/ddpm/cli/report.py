"""ddpm-report: the runs of a sweep, or any others, side by side: a table, CSV and pictures."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm.cli import app
from ddpm.config import hydra
from ddpm.config.schema import ReportConfig
from ddpm.errors import UserError, printable
from ddpm.io.files import reason, write_atomically
from ddpm.runs.output_dirs import dated_folder

if TYPE_CHECKING:
    from ddpm.report.runs import RunRow

MAX_IMAGES = 64  # of each run in contact.png,
MAX_ROWS = 100  # runs in it
MAX_NAME = 28


def main() -> None:
    sys.argv[1:] = _with_folders(sys.argv[1:])
    app.run("report", ReportConfig, report, defaults=_before_typed)


def _with_folders(arguments: list[str]) -> list[str]:
    """Bare arguments, and those of folder=…, as one list in Hydra's grammar. A job's folder may hold a `=` itself."""
    folders, others = [], []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key == "folder" and equals:
            folders += value[1:-1].split(",") if value[:1] == "[" and value[-1:] == "]" else [value]
        elif argument[:1] not in ("-", "~", "") and (not equals or "/" in key):
            folders.append(argument)
        else:
            others.append(argument)
    quoted = ",".join(hydra.quoted(folder.strip(" '\"")) for folder in folders if folder)
    return [*others, f"folder=[{quoted}]"] if quoted else others


def _before_typed(overrides: list[str]) -> list[str]:
    """Nothing, but a folder is needed, and a parameter of a sampler needs the sampler."""
    if hydra.typed_value(overrides, "folder") is None:
        raise UserError("name a folder of runs: ddpm-report outputs/multirun/…")
    parameters = [o for o in overrides if o.lstrip("+").startswith("sampler.")]
    if parameters and hydra.typed_value(overrides, "sampler") is None:
        raise UserError(f"{parameters[0]}: name the sampler, too (sampler=ddim {parameters[0]})")
    return []


def report(config: ReportConfig) -> None:
    """The whole command for one checked config."""
    from ddpm.report import runs as report
    from ddpm.report import table
    from ddpm.runs import run_dir

    if config.n > MAX_IMAGES:
        raise UserError(f"n={config.n}: must be a number from 1 to {MAX_IMAGES}")
    if config.contact:
        _check_device(config.device)
    folders = [Path(folder) for folder in config.folder]
    rows = report.ranked(report.read_all(folders, run_dir.is_running), config.figure)
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
            _contact(config, rows, out / "contact.png")
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
    """A mistake comes before all else; that `auto` and `cpu` are none is known without torch."""
    if name not in ("auto", "cpu"):
        from ddpm.runtime import device as runtime_device

        runtime_device.device(name)


def _out(config: ReportConfig, folders: list[Path], rows: "list[RunRow]") -> Path:
    """Beside the runs of one folder; a run's own folder is not written to."""
    if config.out is None:
        alone = len(folders) == 1 and all(row.path != folders[0] for row in rows)
        return folders[0] if alone else dated_folder("outputs/report")
    try:
        Path(config.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make out={config.out}: {reason(error)}") from None
    return Path(config.out)


def _contact(config: ReportConfig, rows: "list[RunRow]", picture: Path) -> None:
    """contact.png, with a bar on a terminal; a run that cannot be drawn from says why."""
    from tqdm import tqdm

    from ddpm.checkpoint import locate
    from ddpm.io.images import save_png
    from ddpm.report import contact_sheet, table
    from ddpm.report.runs import brief
    from ddpm.runtime import device as runtime_device

    device, keys = runtime_device.device(config.device), table.varying(rows)
    sampler = "each run's own sampler" if config.sampler is None else config.sampler.name
    title = f"{config.n} images of seed {config.seed}, {sampler}, best {config.figure} first"
    strips: list[contact_sheet.Strip] = []
    left_out: list[str] = []
    for row in tqdm(rows, unit="run", disable=not sys.stderr.isatty(), dynamic_ncols=True):
        if len(strips) == MAX_ROWS:
            left_out.append(f"{picture.name} shows the first {MAX_ROWS} runs of {len(rows)}")
            break
        head = table.measured(row, config.figure) or f"no {config.figure}"
        try:
            if not locate.of_run(row.path):  # the table says what is the matter
                continue
            images, step = contact_sheet.drawn(row.path, config.n, config.seed, config.sampler, device)
        except (UserError, OSError) as error:
            left_out.append(f"no images of {row.name}: {brief(str(error), row.path)}")
            continue
        named = f": {row.name}" if len(row.name) <= MAX_NAME else ""  # a job's name says the settings again
        foot = f"{row.status}, step {step}{named}"
        strips.append(contact_sheet.Strip(head, table.label(row, keys), foot, images))
    for line in left_out:
        print(printable(line))
    if not strips:
        print(f"nothing to draw from: no {picture.name}")
        return
    save_png(picture, contact_sheet.sheet(title, strips))
    print(printable(str(picture)))
