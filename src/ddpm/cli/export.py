"""ddpm-export: a checkpoint as a folder that other tools load, with a model card."""

from ddpm.cli import command
from ddpm.config.schema import ExportConfig
from ddpm.errors import printable


def main(arguments: list[str]) -> None:
    command.run("export", arguments, export)


def export(config: ExportConfig) -> None:
    """Run the command for one checked config. Raises UserError."""
    from ddpm.export import folder

    for line in folder.write(config):
        print(printable(line))
