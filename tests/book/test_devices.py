"""A chapter that says it uses no GPU uses none, on machines that have one too.

Each config of the control half and each model that such a chapter makes must name the CPU, for the default, "auto",
takes a GPU where there is one. This reads the code: no GPU is needed to find out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

import notebooks
from policyopt.control import PPOConfig
from policyopt.runs import resolve_device

CONFIGS = {"ReinforceConfig", "TRPOConfig", "PPOConfig"}
LOADERS = {"load", "load_model"}
PROMISES = ("a GPU is not used", "no GPU is used", "uses no GPU", "to run on the CPU")
# Chapters that break their promise still: say device="cpu" in each of their configs, and delete the entry.
UNFIXED: set[str] = set()


def first_line(chapter: str) -> str:
    cells = notebooks.read(notebooks.notebook_path(chapter)).cells
    return next(line for c in cells for line in c.source.splitlines() if line.startswith("*About "))


def parsed(*sources: str) -> ast.Module:
    return ast.parse("\n".join(sources))


def chapter_code(chapter: str) -> ast.Module:
    cells = notebooks.read(notebooks.notebook_path(chapter)).cells
    return parsed(
        *(c.source for c in cells if c.cell_type == "code" and "setup" not in c.metadata.get("tags", []))
    )


def name_of(function: ast.expr) -> str:
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")


def says_cpu(node: ast.AST, tree: ast.Module, seen: frozenset[str] = frozenset()) -> bool:
    """Whether an expression holds ``device="cpu"``, or a name that was given such an expression."""
    for part in ast.walk(node):
        if isinstance(part, ast.keyword) and part.arg == "device":
            return isinstance(part.value, ast.Constant) and part.value.value == "cpu"
        if isinstance(part, ast.Dict):
            for key, value in zip(part.keys, part.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "device":
                    return isinstance(value, ast.Constant) and value.value == "cpu"
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - seen
    given = [
        n.value
        for n in ast.walk(tree)
        if isinstance(n, ast.Assign)
        and names & {t.id for target in n.targets for t in ast.walk(target) if isinstance(t, ast.Name)}
    ]
    return any(says_cpu(value, tree, seen | names) for value in given)


def not_on_the_cpu(tree: ast.Module) -> Iterator[str]:
    """Return the configs and models of a chapter that would take a GPU."""
    language = {
        alias.asname or alias.name
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("policyopt.lm")
        for alias in n.names
    }
    # A config that estimates advantages trains nothing.
    harmless = {
        argument.id
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and name_of(call.func) == "estimate_advantages"
        for argument in call.args
        if isinstance(argument, ast.Name)
    }
    unused = {
        id(n.value)
        for n in ast.walk(tree)
        if isinstance(n, ast.Assign)
        and any(isinstance(t, ast.Name) and t.id in harmless for t in n.targets)
        and not says_cpu(n.value, tree)
    }
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or id(call) in unused:
            continue
        written = ast.unparse(call)
        if name_of(call.func) in CONFIGS - language and "lm." not in ast.unparse(call.func):
            options = [k for k in call.keywords if k.arg in (None, "device")]
            wanted = PPOConfig().device != "cpu" or any(k.arg == "device" for k in options)
        elif name_of(call.func) in LOADERS:
            options, wanted = [k for k in call.keywords if k.arg in (None, "device")], True
        else:
            continue
        if wanted and not any(says_cpu(option, tree) for option in options):
            yield written


@pytest.mark.parametrize(
    "chapter",
    [
        pytest.param(name, marks=pytest.mark.xfail) if name in UNFIXED else name
        for name in notebooks.chapters()
    ],
)
def test_a_chapter_that_says_it_uses_no_gpu_uses_none(chapter: str) -> None:
    if not any(promise in first_line(chapter) for promise in PROMISES):
        assert "GPU" in first_line(chapter), "the first line must say whether a GPU is used"
        return
    assert list(not_on_the_cpu(chapter_code(chapter))) == [], 'say device="cpu"'


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("PPOConfig(device='cpu')", 0),
        ("PPOConfig(gamma=0.98)", PPOConfig().device != "cpu"),
        ("PPOConfig(device='auto')", 1),
        ("pg, late = 1, {'device': 'cpu'}\nTRPOConfig(**late)", 0),
        ("common = {'device': 'cpu'}\nlate = common | {'gamma': 1}\nTRPOConfig(**late)", 0),
        ("common = {'gamma': 1}\nTRPOConfig(**common)", PPOConfig().device != "cpu"),
        ("C = PPOConfig()\nestimate_advantages(rollout, policy, critic, C)", 0),
        ("po.lm.PPOConfig(updates=1)", 0),
        ("from policyopt.lm import PPOConfig\nPPOConfig(updates=1)", 0),
        ("load_model('news-sft')", 1),
        ("load_model('news-sft', device='cpu')", 0),
    ],
)
def test_what_would_take_a_gpu_is_found(source: str, found: int) -> None:
    assert len(list(not_on_the_cpu(parsed(source)))) == found


def test_by_itself_a_config_takes_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the chapters must say it; if the default ever becomes the CPU, nothing above is asked for."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert resolve_device("auto").type == "cuda"
    assert PPOConfig().device in ("auto", "cpu")
