"""The git commit a program runs from, read from git's own files: git itself runs what a repository's config says."""

import re
from pathlib import Path

import ddpm
from ddpm.io.files import open_regular

_HASH = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_REF = re.compile(r"ref: (refs/[^\s\0]+)")
MAX_BYTES = 1 << 24  # of packed-refs; a repository with 200,000 branches


def commits() -> dict[str, str]:
    """Of the current folder and, where that is another repository, of ddpm itself; changes since then are not seen."""
    here, own = commit(Path.cwd()), commit(Path(ddpm.__file__).parent)
    return ({"git": here} if here else {}) | ({"git of ddpm": own} if own and own != here else {})


def commit(folder: Path) -> str | None:
    """The commit that is checked out in the repository around a folder, if there is one."""
    for parent in (folder, *folder.parents):
        if (
            parent / ".git"
        ).exists():  # a file in a worktree or submodule, which leads elsewhere: not followed
            try:
                return _head(parent / ".git")
            except (OSError, ValueError):
                return None
    return None


def _head(git: Path) -> str | None:
    head = _line(git / "HEAD")
    ref = _REF.fullmatch(head)
    if ref is None or ".." in ref[1]:
        return head if _HASH.fullmatch(head) else None
    if (git / ref[1]).is_file():
        loose = _line(git / ref[1])
        return loose if _HASH.fullmatch(loose) else None
    packed = _text(git / "packed-refs").splitlines()
    found = [line.split()[0] for line in packed if line.endswith(" " + ref[1])]
    return found[0] if found and _HASH.fullmatch(found[0]) else None


def _line(path: Path) -> str:
    return _text(path).partition("\n")[0].strip()


def _text(path: Path) -> str:
    with open_regular(path) as file:
        return file.read(MAX_BYTES).decode()
