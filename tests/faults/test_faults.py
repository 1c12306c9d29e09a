"""Each case of the fault harness a few times; `scripts/fault_drill.py` runs them as often as it takes."""

from pathlib import Path

import pytest

from tests.faults import beside, damage, disk, downloads, hostile, kills, mutations, numbers, signals
from tests.faults.cases import Case

MODULES = (beside, damage, disk, downloads, hostile, kills, mutations, numbers, signals)
CASES = [case for module in MODULES for case in module.CASES]


@pytest.mark.xdist_group("faults")  # one process, which makes its undisturbed runs once
@pytest.mark.parametrize("case", [case for case in CASES if case.short], ids=str)
def test_promise(case: Case, tmp_path: Path) -> None:
    assert case.run(tmp_path, case.short)


@pytest.mark.slow
@pytest.mark.parametrize("case", beside.CASES, ids=str)
def test_thousands_of_files_beside_a_run(case: Case, tmp_path: Path) -> None:
    assert case.run(tmp_path, case.long // 6)  # all of them are for scripts/fault_drill.py


def test_every_case_has_a_name_of_its_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
