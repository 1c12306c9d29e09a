"""Pages that are made from the code say what the code says."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_of_keys_is_up_to_date_and_explains_every_key() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "config_docs.py"))
    assert script["PAGE"].read_text() == script["page"](), "run python scripts/config_docs.py"
    for group in script["GROUPS"]:
        unexplained = [key for key, meaning in script["meanings"](group).items() if not meaning]
        assert not unexplained, f"{group}: no comment beside {unexplained} in any of configs/{group}/*.yaml"


def test_links_lead_somewhere() -> None:
    import re

    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", page.read_text()):
            assert "://" in link or (page.parent / link).exists(), f"{page.name} links to {link}"


def test_readme_is_short_and_shows_pictures() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120 and text.count("![") >= 4
