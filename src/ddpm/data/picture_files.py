"""Find the picture files in and below a folder, and count by kind what is passed over."""

import os
from pathlib import Path
from typing import NamedTuple

from ddpm.errors import DataError, is_plain, printable
from ddpm.io.files import reason

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")
MAX_ENTRIES = 10_000_000  # files and folders
MAX_SUFFIX = 10  # characters
MAX_KINDS = 10  # named in a text


class Found(NamedTuple):
    """files: sorted; passed: how many other entries there are of each kind, and the path of one."""

    files: list[Path]
    passed: dict[str, tuple[int, str]]

    @property
    def passed_over(self) -> str:
        """Name the kinds in one line; empty if nothing was passed over."""
        kinds = sorted(self.passed.items(), key=lambda item: (-item[1][0], item[0]))
        parts = [f"{count:,} × {kind} ({example})" for kind, (count, example) in kinds[:MAX_KINDS]]
        if rest := sum(count for _, (count, _) in kinds[MAX_KINDS:]):
            parts.append(f"{rest:,} × others")
        return "passed over: " + ", ".join(parts) if parts else ""


def find_pictures(root: Path, below: bool = True) -> Found:
    """Find the picture files of a folder and, if `below`, of all folders below it. Raises DataError.

    Links to folders are followed, after all real folders: so each is read once, and under its own name if it lies here.
    Passed over are hidden files and folders, files of other kinds, links that lead nowhere, to a folder that is read
    already or to one around them, and sub-folders of `root` without a picture.
    """
    files, passed, seen = list[Path](), dict[str, tuple[int, str]](), set[tuple[int, int]]()
    folders, links, classes, entries = [root], list[Path](), list[Path](), 0

    def pass_over(kind: str, path: Path) -> None:
        count, example = passed.get(kind, (0, printable(str(path.relative_to(root)))))
        passed[kind] = count + 1, example

    while folders or links:
        links.sort(reverse=True)
        is_link, here = not folders, folders.pop() if folders else links.pop()
        try:
            about = os.stat(here)
            if (about.st_dev, about.st_ino) in seen or (is_link and _is_around(here, root)):
                pass_over("link to a folder around it or read already", here)
                continue
            seen.add((about.st_dev, about.st_ino))
            with os.scandir(here) as listed:
                inside = sorted(listed, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{here}: cannot be read ({reason(error)})") from error
        entries += len(inside)
        if entries > MAX_ENTRIES:
            raise DataError(f"{root}: holds more than {MAX_ENTRIES} files and folders")
        if here.parent == root:
            classes.append(here)
        for entry in inside:
            path = here / entry.name
            if kind := _kind(path, below):
                pass_over(kind, path)
            elif os.path.isfile(path):
                files.append(path)
            else:
                (links if entry.is_symlink() else folders).append(path)
    with_pictures = {class_of(file, root) for file in files}
    for empty in sorted(path for path in classes if path.name not in with_pictures):
        pass_over("sub-folder without a picture", empty)
    return Found(sorted(files), passed)


def class_of(file: Path, root: Path) -> str:
    """Return the name of the sub-folder of `root` in or below which a file lies; its own name in `root` itself."""
    return file.relative_to(root).parts[0]


def _kind(path: Path, below: bool) -> str:
    """Name the kind of what is passed over; empty for a picture and, if `below`, a folder."""
    if path.name.startswith("."):
        return "hidden"
    if os.path.isdir(path):
        return "" if below else "folder"
    if not os.path.exists(path):
        return "link that leads nowhere"
    if not os.path.isfile(path):
        return "pipe, socket or device"
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return ""
    if not suffix:
        return "no suffix"
    return suffix if len(suffix) <= MAX_SUFFIX and is_plain(suffix) else "other suffix"


def _is_around(link: Path, root: Path) -> bool:
    """Whether a link leads to a folder that `root` or the link itself lies in."""
    target = os.path.realpath(link)
    return any(Path(os.path.realpath(inside)).is_relative_to(target) for inside in (root, link.parent))
