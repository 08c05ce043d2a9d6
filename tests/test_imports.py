"""What imports what: the floors of the library, what importing it loads, and the names that it offers."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from policyopt import lm
from repository import ROOT

LIBRARY = ROOT / "src" / "policyopt"
MODULES = {
    ".".join(file.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__"): file
    for file in LIBRARY.rglob("*.py")
}
MATHS = ("_checks", "mdp", "distributions", "estimators", "losses", "trust_region")
FRAME = ("runs", "checkpoint", "frame")
HALVES = ("policyopt.control", "policyopt.lm")


def imported(file: Path) -> Iterator[str]:
    """Everything that a file imports, inside functions too, but not what only type checkers read."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    unread = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in unread:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, *packages: str) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def forbidden(module: str) -> tuple[str, ...]:
    """What a module must not import."""
    everywhere = ("policyopt_book", "matplotlib")
    if module in {f"policyopt.{name}" for name in MATHS}:
        return (*everywhere, *HALVES, "gymnasium", "transformers")
    if module in {f"policyopt.{name}" for name in FRAME}:
        return (*everywhere, *HALVES)
    if within(module, "policyopt.control"):
        return (*everywhere, "policyopt.lm", "transformers")
    if within(module, "policyopt.lm"):
        return (*everywhere, "policyopt.control", "gymnasium")
    return (*everywhere, *HALVES, "gymnasium", "transformers", "torch")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_only_go_down(module: str) -> None:
    found = {name for name in imported(MODULES[module]) if within(name, *forbidden(module))}
    assert found == set()


def test_every_module_has_a_floor() -> None:
    floors = {f"policyopt.{name}" for name in (*MATHS, *FRAME)}
    assert {m for m in MODULES if not within(m, *HALVES)} == {"policyopt", *floors}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


LOADED = """
import json, sys, time
heavy = ("torch", "gymnasium", "transformers", "matplotlib", "policyopt_book")
steps = {}
def note(step):
    steps[step] = [name for name in heavy if name in sys.modules]

start = time.perf_counter()
import policyopt as po
steps["seconds"] = time.perf_counter() - start
note("import")
note(po.losses.__name__)
note(po.train_seeds.__name__)
steps["names"] = dir(po)
note("dir")
assert po.train_ppo is po.control.train_ppo and po.History is po.runs.History
note(po.train_ppo.__name__)
note(po.lm.train_grpo.__name__)
assert po.lm.History is po.History
for name in ("train_grpo", "no_such_name", "_private"):
    assert not hasattr(po, name), name
print(json.dumps(steps))
"""


@pytest.fixture(scope="module")
def steps() -> dict[str, list[str]]:
    loaded: dict[str, list[str]] = json.loads(run(LOADED))
    return loaded


def test_modules_are_loaded_on_first_use(steps: dict[str, list[str]]) -> None:
    assert steps["import"] == []
    assert steps["policyopt.losses"] == steps["train_seeds"] == ["torch"]
    assert steps["train_ppo"] == ["torch", "gymnasium"]
    assert steps["train_grpo"] == ["torch", "gymnasium", "transformers"]


def test_the_import_takes_no_time(steps: dict[str, float]) -> None:
    assert steps["seconds"] < 2


def test_the_names_are_offered(steps: dict[str, list[str]]) -> None:
    modules = {m.split(".")[1] for m in MODULES if m.count(".") == 1}
    names = {"train_reinforce", "train_trpo", "train_ppo", "PPOConfig", "evaluate", "make_policy", "sample_episodes",
             "Policy", "TrainResult", "train_seeds", "History", "TrainingDivergedError"}  # fmt: skip
    assert modules | names <= set(steps["names"])
    assert not {"Any", "import_module", "TYPE_CHECKING"} & set(steps["names"])


def public_names(file: Path) -> set[str]:
    """What a module lists in ``__all__``; its functions and classes if there is no list."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    for statement in body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            return set(ast.literal_eval(statement.value))
    return {s.name for s in body if isinstance(s, (ast.ClassDef, ast.FunctionDef)) and s.name[0] != "_"}


@pytest.mark.parametrize("half", HALVES)
def test_a_half_offers_what_its_modules_call_public(half: str) -> None:
    """Every name is there and public where it is defined, and none is a module or a helper of the imports."""
    names = json.loads(run(f"import json, {half} as half; print(json.dumps(half.__all__))"))
    modules = [m for m in MODULES if within(m, half, "policyopt.runs") and m != half]
    public = {name for module in modules for name in public_names(MODULES[module])}
    assert names == sorted(set(names))
    assert set(names) <= public
    assert {"History", "train_seeds", "train_" + ("trpo" if half.endswith("control") else "dpo")} <= set(
        names
    )


BLOCKED = """
import sys
sys.modules["gymnasium"] = None
import policyopt.lm
assert policyopt.lm.train_dpo
for name in [name for name in sys.modules if name.startswith("policyopt")]:
    del sys.modules[name]
del sys.modules["gymnasium"]

sys.modules["transformers"] = None
import policyopt as po
assert po.train_ppo
try:
    po.lm
except ImportError as error:
    print(error)
"""


def test_each_half_works_without_what_the_other_needs() -> None:
    message = run(BLOCKED)
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["lm"]
    for requirement in ("transformers>=5", "accelerate>=1.0"):
        assert f"'{requirement}'" in message
        assert requirement in extra


@pytest.mark.parametrize("name", ["train_ppo", "PPOConfig", "PPOUpdate"])
def test_old_names_of_ppo_are_understood_for_one_version(name: str) -> None:
    old = name.replace("PPO", "PPOLM").replace("_ppo", "_ppo_lm")
    with pytest.warns(DeprecationWarning, match=f"policyopt.lm: {old} is called {name} now"):
        assert getattr(lm, old) is getattr(lm, name)
    assert old not in lm.__all__
