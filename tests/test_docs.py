"""Pages that are made from the code say what the code says."""

import re
import runpy
import tomllib
from pathlib import Path

import yaml

from ddpm.checkpoint import header

ROOT = Path(__file__).parents[1]


def test_the_page_of_keys_is_up_to_date_and_explains_every_key() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "config_docs.py"))
    assert script["PAGE"].read_text() == script["page"](), "run python scripts/config_docs.py"
    for group in script["GROUPS"]:
        unexplained = [key for key, meaning in script["meanings"](group).items() if not meaning]
        assert not unexplained, f"{group}: no comment beside {unexplained} in any of configs/{group}/*.yaml"


def test_links_lead_somewhere() -> None:
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", page.read_text()):
            assert "://" in link or (page.parent / link).exists(), f"{page.name} links to {link}"


def test_readme_is_short_and_shows_pictures() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120 and text.count("![") >= 4


def test_changelog_names_every_format_and_every_key_that_came_later() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    for version in header.READABLE_VERSIONS:
        assert f"\n| {version} | " in text
    for key in header.DEFAULTS_FOR_OLD_CHECKPOINTS:
        assert f"`{key}`" in text, key


def test_citation_names_the_version_and_the_authors_of_the_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == project["version"] and citation["license"] == project["license"]
    assert all(author["name"] in (ROOT / "LICENSE").read_text() for author in citation["authors"])


def test_workflow_runs_the_checks_on_every_python_that_is_supported() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["checks"]
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    named = [
        line.rsplit(" ", 1)[1] for line in classifiers if line.startswith("Programming Language :: Python ::")
    ]
    assert job["strategy"]["matrix"]["python"] == named and job["steps"][-1]["run"] == ".ci/run"
    assert '"${PYTHON:-python3}" -m venv' in (ROOT / ".ci" / "run").read_text()
