"""What fails in a test that draws its cases can be drawn again."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FAILS = """
from hypothesis import given, strategies as st

@given(st.integers(0, 10**9))
def test_fails(number):
    print("drawn", number)
    assert number < 1000
"""


def _run(folder: Path, *options: str) -> str:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-v",
        *options,
        ".",
    ]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8").stdout


@pytest.mark.sweep  # it starts interpreters
def test_a_failure_says_how_to_draw_it_again(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    test = tmp_path / "test_fails.py"
    test.write_text(FAILS, encoding="utf-8")

    said = _run(tmp_path)

    assert "hypothesis profile 'policyopt' -> " in said
    assert re.search(r"(Falsifying example|Failing test case): test_fails\([\sE]*number=1000", said)
    (again,) = set(re.findall(r"@reproduce_failure\('[\d.]+', b'.*?'\)", said))  # said twice where CI is set

    imported = FAILS.replace("import given", "import given, reproduce_failure")
    test.write_text(imported.replace("@given", f"{again}\n@given"), encoding="utf-8")
    said = _run(tmp_path, "--hypothesis-seed=7")

    assert "hypothesis profile 'seeded' -> " in said  # draws by the seed
    assert set(re.findall(r"^drawn \d+", said, re.M)) == {"drawn 1000"}
