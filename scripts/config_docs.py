"""Writes docs/config.md: every key of every command, from the YAML files (defaults, meanings) and the limits.

python scripts/config_docs.py          a test holds the page and the schema together
"""

import re
from pathlib import Path

from omegaconf import OmegaConf

from ddpm.config.checking import declared
from ddpm.config.choices import CONFIG_DIR, choices
from ddpm.config.limits import Key, describe
from ddpm.config.schema import SCHEMAS, TrainConfig

PAGE = Path(__file__).parents[1] / "docs" / "config.md"
FIRST = ("train", "sample")
COMMANDS = (*FIRST, *sorted({file.stem for file in CONFIG_DIR.glob("*.yaml")} - set(FIRST)))
GROUPS = ("dataset", "model", "schedule", "objective", "optimizer", "sampler", "trainer")

HEAD = """# Every key

Written by `python scripts/config_docs.py` from the YAML files under `configs/` and the declarations in
`ddpm/config/schema.py`; do not edit by hand. Settings are typed as `key=value`; `ddpm-train --cfg job` prints what a
command line comes to.
A setting that needs others, and has no effect without them, is refused where it is typed.
A number outside its limits, a wrong type or an unknown key is refused in one line, and nothing is written.
"""


def page() -> str:
    parts = [HEAD]
    for command in COMMANDS:
        parts += [f"## ddpm-{command}\n", _table(_top_keys(command))]
    parts.append(
        "## Groups\n\n`group=choice` takes a file of the group, `group.key=value` changes a key of it. All groups are "
        "ddpm-train's; ddpm-sample has `sampler`, ddpm-eval `dataset` and `sampler`.\n"
    )
    for group in GROUPS:
        files = choices(group)
        listed = [f"- `{group}={file}`: {_first_comment(group, file)}" for file in files]
        parts += [f"### {group}\n", "\n".join(listed) + "\n"]
        known = declared(TrainConfig)
        rows = [(name := f"{group}.{key}", _defaults(group, key), _allowed(name, group),
                 _with_needs(note, known.get(name, Key())))
                for key, note in meanings(group).items()]  # fmt: skip
        parts.append(_table(rows) if rows else "")
    return "\n".join(parts)


def meanings(group: str) -> dict[str, str]:
    """What the comments beside the keys of a group's files say; "" for a key that none explains."""
    found: dict[str, str] = {}
    for file in choices(group):
        for line in (CONFIG_DIR / group / f"{file}.yaml").read_text().splitlines():
            key, _, rest = line.partition(":")
            if re.fullmatch(r"\w+", key) and key != "name":
                found[key] = found.get(key, "") or rest.partition("# ")[2].strip()
    return found


def _top_keys(command: str) -> list[tuple[str, str, str, str]]:
    content = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / f"{command}.yaml"))
    assert isinstance(content, dict)
    keys, known = (
        [str(key) for key in content if key not in ("defaults", "hydra")],
        declared(SCHEMAS[command]),
    )
    return [
        (key, _shown(content[key]), _allowed(key, command), _with_needs(known[key].help, known[key]))
        for key in keys
    ]


def _with_needs(note: str, key: Key) -> str:
    needs = " and ".join(f"`{need}`" for need in key.needs.split())
    return "; ".join(filter(None, [note, f"needs {needs}" if needs else ""]))


def _defaults(group: str, key: str) -> str:
    """The default of a key; where the choices differ, each with its own."""
    by_value: dict[str, list[str]] = {}
    for file, content in choices(group).items():
        if key in content:
            by_value.setdefault(_shown(content[key]), []).append(file)
    if len(by_value) == 1:
        return next(iter(by_value))
    return "<br>".join(f"{value} ({', '.join(files)})" for value, files in by_value.items())


def _allowed(key: str, where: str) -> str:
    if (known := declared(SCHEMAS.get(where, TrainConfig)).get(key)) and (text := describe(known.allowed)):
        return text
    values = [
        content[key.rpartition(".")[2]]
        for content in choices(where).values()
        if key.rpartition(".")[2] in content
    ]
    return "true or false" if values and all(isinstance(value, bool) for value in values) else ""


def _first_comment(group: str, file: str) -> str:
    lines = (CONFIG_DIR / group / f"{file}.yaml").read_text().splitlines()
    return next((line[1:].strip() for line in lines if line.startswith("#") and "@package" not in line), "")


def _shown(value: object) -> str:
    if value == "???":
        return "must be given"
    if value is None or isinstance(value, bool):
        return f"`{ ({None: 'null', True: 'true', False: 'false'}[value]) }`"
    if isinstance(value, list):
        return f"`[{','.join(map(str, value))}]`"
    return f"`{value}`".replace("${oc.env:DDPM_DATA,data}", "$DDPM_DATA, else data")


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    lines = ["| key | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    lines += [
        f"| `{key}` | {default} | {allowed} | {note.replace('|', '/')} |"
        for key, default, allowed, note in rows
    ]
    return "\n".join(lines) + "\n"


def _escaped(note: str) -> str:
    return note.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
