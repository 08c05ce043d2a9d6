"""The workflows and the hooks before a commit: what they call exists, and they may do no more than they must."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import build_book
from repository import ROOT

WORKFLOWS = {f.stem: yaml.safe_load(f.read_text()) for f in (ROOT / ".github" / "workflows").glob("*.yml")}
TARGETS = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text())) | {".venv/.ready"}
TARGETS |= {f".venv/.{name}" for name in re.findall(r"\$\(VENV\)/\.(\w+)", (ROOT / "Makefile").read_text())}
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
JOBS = [(w, name) for w, flow in WORKFLOWS.items() for name in flow["jobs"]]
# What each job may do beyond reading the code.
WRITES = {
    ("publish", "publish"): {"pages", "id-token"},
}


def job(workflow: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = WORKFLOWS[workflow]["jobs"][name]
    return found


def commands(workflow: str) -> list[str]:
    jobs = WORKFLOWS[workflow]["jobs"].values()
    return [step["run"] for j in jobs for step in j.get("steps", []) if "run" in step]


def test_there_are_two() -> None:
    assert set(WORKFLOWS) == {"test", "publish"}


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_what_they_call_exists(workflow: str) -> None:
    for text in commands(workflow):
        for target in re.findall(r"(?m)(?:^|[;&|] *)make ([\w./-]+)", text):
            assert target in TARGETS, f"make {target}"
        for file in re.findall(r"book/_tools/\w+\.py|\.ci/\w+", text):
            assert (ROOT / file).is_file(), file


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_pipes_fail_when_a_part_of_them_does(workflow: str) -> None:
    assert WORKFLOWS[workflow]["defaults"] == {"run": {"shell": "bash"}}


@pytest.mark.parametrize(("workflow", "name"), JOBS)
def test_actions_are_pinned(workflow: str, name: str) -> None:
    for step in job(workflow, name).get("steps", []):
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"])


@pytest.mark.parametrize(("workflow", "name"), JOBS)
def test_jobs_end(workflow: str, name: str) -> None:
    assert 1 <= job(workflow, name)["timeout-minutes"] <= 120


@pytest.mark.parametrize(("workflow", "name"), JOBS)
def test_permissions_are_the_least(workflow: str, name: str) -> None:
    assert WORKFLOWS[workflow]["permissions"] == {"contents": "read"}
    own = job(workflow, name).get("permissions", {})
    assert {k for k, v in own.items() if v == "write"} == WRITES.get((workflow, name), set())
    assert set(own.values()) <= {"read", "write"}


@pytest.mark.parametrize(("workflow", "name"), JOBS)
def test_texts_of_others_do_not_become_commands(workflow: str, name: str) -> None:
    """Branch names, titles and messages come from outside: they reach a script as variables only."""
    for step in job(workflow, name).get("steps", []):
        for expression in re.findall(r"\$\{\{\s*(.*?)\s*\}\}", step.get("run", "")):
            pytest.fail(expression)


def test_the_tests_run_on_every_change() -> None:
    assert set(WORKFLOWS["test"][True]) == {"push", "pull_request"}  # YAML 1.1 reads `on` as true


def test_the_oldest_and_the_newest_versions_are_tested_on_the_oldest_and_the_newest_python() -> None:
    pythons = job("test", "test")["strategy"]["matrix"]["python"]
    jobs = {j["versions"]: j["python"] for j in job("test", "versions")["strategy"]["matrix"]["include"]}
    assert jobs == {"oldest": pythons[0], "newest": pythons[-1]}
    assert jobs.keys() <= TARGETS
    assert 'make "$VERSIONS" TORCH=torch' in commands("test")


def test_the_web_tests_cannot_be_skipped_for_want_of_a_browser() -> None:
    steps = [step.get("run", "") for step in job("test", "test")["steps"]]
    browser = next(i for i, text in enumerate(steps) if "CHROMIUM=" in text)
    assert ".ci/run" in steps[browser + 1 :]
    assert "test -x" in steps[browser]


def test_what_is_published_is_what_make_book_builds() -> None:
    assert "make book" in commands("publish")
    (folder,) = (step["with"]["path"] for step in job("publish", "publish")["steps"]
                 if "upload-pages-artifact" in step.get("uses", ""))  # fmt: skip
    assert ROOT / folder == build_book.HTML


def test_dependabot_watches_the_pins_and_the_actions() -> None:
    updates = yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text())["updates"]
    assert {update["package-ecosystem"] for update in updates} == {"pip", "github-actions"}
    assert {update["directory"] for update in updates} == {"/"}


def test_ci_runs_every_check_to_its_end_and_names_those_that_failed(tmp_path: Path) -> None:
    """In a copy of the Makefile whose targets fail or pass at once."""
    text = (ROOT / "Makefile").read_text()
    (targets,) = re.findall(r"(?m)^CHECKS := (.*)$", text)
    assert (
        set(targets.split())
        == {"lint", "web-test", "test-quick", "sweep-quick", "oldest-quick", "colab-test"}
        <= TARGETS
    )
    body = "\\1:\n\t@echo ran $@; test $@ != '$(BAD)'\n"
    fake = re.sub(rf"(?ms)^({'|'.join(targets.split())}):.*?(?=^\n)", body, text)
    (tmp_path / "Makefile").write_text(fake)
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    # The make that runs this test must not speak to the one that is tested.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    for bad, last in (
        ("", "All passed: " + targets),
        ("lint", "FAILED: lint"),
        ("colab-test", "FAILED: colab-test"),
    ):
        run = subprocess.run(
            [tmp_path / ".ci" / "run"], env={**outside, "BAD": bad}, text=True, capture_output=True
        )
        assert re.findall(r"(?m)^ran (.*)$", run.stdout) == targets.split()
        assert run.stdout.splitlines()[-1] == last
        assert (run.returncode != 0) == bool(bad)


def test_hooks_use_the_tools_of_the_lock() -> None:
    """No second version of ruff that could disagree with ``make lint``."""
    assert {repo["repo"] for repo in HOOKS["repos"]} == {"local"}
    hooks = {hook["id"]: hook for repo in HOOKS["repos"] for hook in repo["hooks"]}
    assert set(hooks) == {"ruff-check", "ruff-format", "twins", "large-files", "merge-conflicts"}
    for hook in hooks.values():
        command = shlex.split(hook["entry"])
        if hook["language"] == "system":
            assert command[0] in (".venv/bin/ruff", ".venv/bin/python")
            if command[0].endswith("python"):
                assert (ROOT / command[1]).is_file()
        else:
            assert hook["additional_dependencies"] == ["pre-commit-hooks==6.0.0"]


def test_the_hook_for_twins_sees_both_halves_of_a_pair() -> None:
    pattern = next(h["files"] for repo in HOOKS["repos"] for h in repo["hooks"] if h["id"] == "twins")
    for name in ("book/mdp.ipynb", "book/twins/mdp.md"):
        assert re.search(pattern, name)
    for name in ("book/index.md", "book/api/lm.md", "src/policyopt/mdp.py"):
        assert not re.search(pattern, name)


def test_no_file_is_larger_than_the_hook_allows() -> None:
    entry = next(h["entry"] for repo in HOOKS["repos"] for h in repo["hooks"] if h["id"] == "large-files")
    limit = int(entry.partition("--maxkb=")[2])
    listed = (
        (ROOT / "book").glob("*.ipynb"),
        (ROOT / "src").rglob("*.safetensors"),
        (ROOT / "book/_static").glob("*"),
    )
    files: list[Path] = [file for group in listed for file in group]
    assert files
    assert [f.name for f in files if f.stat().st_size > limit * 1024] == []
