"""The Python of the README runs as it is printed, but for a smaller budget."""

import re
from pathlib import Path

import pytest

from repository import ROOT

BLOCKS = re.findall(r"(?ms)^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"))
SMALLER = {"po.PPOConfig()": "po.PPOConfig(total_steps=2048)", "updates=20": "updates=2"}


@pytest.mark.parametrize("block", BLOCKS, ids=["control", "lm"])
def test_the_code_of_the_readme_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert sum(block.count(budget) for budget in SMALLER) == 1
    for budget, smaller in SMALLER.items():
        block = block.replace(budget, smaller)
    names: dict[str, object] = {}
    exec(block, names)
    assert "result" in names
    assert ("brevity" in names) == (tmp_path / "brief-model" / "model.safetensors").exists()
