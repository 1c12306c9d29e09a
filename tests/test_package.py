"""What is installed: the wheel carries its configs and finds them from anywhere."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

from ddpm.cli import old_install

ROOT = Path(__file__).parents[1]


def test_wheel_carries_configs_and_finds_them(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {
            name.removeprefix("ddpm/") for name in archive.namelist() if name.startswith("ddpm/configs/")
        }
        archive.extractall(tmp_path / "site")
    assert packed == {str(file.relative_to(ROOT)) for file in (ROOT / "configs").rglob("*.yaml")}
    assert (tmp_path / "site" / "ddpm" / "py.typed").exists()
    assets = Path("ddpm") / "evaluate" / "features" / "assets"
    assert {file.name: file.read_bytes() for file in (tmp_path / "site" / assets).iterdir()} == {
        file.name: file.read_bytes() for file in (ROOT / "src" / assets).iterdir()
    }
    code = (
        "import sys; sys.argv[1:] = ['--cfg', 'job', 'dataset=mnist']\n"
        "import ddpm; from ddpm.cli.entry import train; train(); print(ddpm.__file__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "channels:" in result.stdout and str(tmp_path / "site") in result.stdout
    code = "import ddpm.errors; print(ddpm.errors.install_hint('sweep'))"
    for site, words in ((tmp_path / "site", "'ddpm-toolkit[sweep]'"), (ROOT / "src", f"-e '{ROOT}[sweep]'")):
        asked = [sys.executable, "-c", code]
        result = subprocess.run(asked, env={"PYTHONPATH": str(site)}, capture_output=True, text=True)
        assert result.stdout == f"pip install {words}\n"


def test_no_text_names_the_stranger_on_the_public_index() -> None:
    """There `ddpm` is another project: its name must not be what anybody is told to install."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    wrong = re.compile(
        r"""\bddpm\[|\bpip\d? +install\b[^\n|]{0,40}[\s"']ddpm(?![-\w./])|^name = "ddpm"$""", re.M
    )
    assert wrong.search('pip install "ddpm[' + 'inception]"') and wrong.search(
        "uv pip install -U " + "ddpm\n"
    )
    found = []
    for name in listed.stdout.split("\0"):
        path = ROOT / name
        if path.is_file() and path != Path(__file__) and b"\0" not in (data := path.read_bytes()):
            found += [f"{name}: {match[0]}" for match in wrong.finditer(data.decode())]
    assert not found


def test_readme_names_the_commands_ci_runs() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "\npip install -e . && ddpm-train && ddpm-sample ckpt=latest n=64\n" in readme
    assert '\npip install -e ".[test]" && pytest\n' in readme


def test_an_older_installation_of_the_former_name_is_told(tmp_path: Path) -> None:
    """Only ours, by the commands it installs; a stranger's project of the same name is nobody's business."""
    ours, theirs, new = (tmp_path / name for name in ("ours", "theirs", "new"))
    for place, name, command in (
        (ours, "ddpm-0.1.0", "ddpm-train = ddpm.cli.entry:train"),
        (theirs, "ddpm-2.0", "ddpm = ddpm.main:run"),
        (new, "ddpm_toolkit-0.1.0", "ddpm-train = ddpm.cli.entry:train"),
    ):
        (place / f"{name}.dist-info").mkdir(parents=True)
        (place / f"{name}.dist-info" / "entry_points.txt").write_text(f"[console_scripts]\n{command}\n")
    assert old_install.advice(["", str(tmp_path / "none"), str(new), str(theirs)]) == ""
    assert old_install.advice([str(ours)]) == ""  # the present one, from before a checkout was renamed
    line = old_install.advice([str(theirs), str(new), str(ours)])
    assert f"is in {ours}; remove it: pip uninstall ddpm && pip install" in line and "\n" not in line
    code = "import sys; sys.argv[1:] = ['ckpt=none']; from ddpm.cli.entry import info; info()"
    for more, lines in (([], 1), ([new, ours], 2)):
        path = ":".join(map(str, [ROOT / "src", *more]))
        result = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={"PYTHONPATH": path, "PATH": ""},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 2 and result.stderr.count("\n") == lines, result.stderr
