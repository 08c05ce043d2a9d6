"""Interactive figures: their numbers against the package's functions, size, picture, and Plotly's bundle."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise, product
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

import notebooks
from build_book import EXTERNAL
from policyopt import mdp
from policyopt.estimators import group_relative_advantages, leave_one_out_advantages
from policyopt.losses import clipped_surrogate_loss, dpo_loss
from policyopt_book import figures
from policyopt_book.figures import Change, Control, Interactive, Panel, Readout
from policyopt_book.tasks.grids import grid_world
from repository import ROOT

mpl.use("Agg")
STATIC = ROOT / "book" / "_static"
BUNDLE = STATIC / "plotly" / f"plotly-basic-{figures.PLOTLY_VERSION}.min.mjs"
CHAPTER_OF = {
    "value_iteration": "mdp",
    "clip_surrogate": "ppo",
    "gae_lambda": "ppo",
    "dpo_margin": "dpo",
    "group_baseline": "grpo",
    "kl_estimators": "grpo",
}
F64 = torch.float64


@pytest.fixture(scope="module")
def made() -> dict[str, Interactive]:
    return {name: getattr(figures, name)() for name in CHAPTER_OF}


def near(x: Any) -> Any:
    """Equal but for the rounding to four digits."""
    return pytest.approx(np.asarray(x, dtype=float).tolist(), rel=6e-4, abs=1e-9)


def shown(traces: list[dict[str, Any]], name: str, panel: int = 1) -> dict[str, Any]:
    axis = "x" if panel == 1 else f"x{panel}"
    (found,) = [t for t in traces if t["name"] == name and t.get("xaxis", "x") == axis]
    return found


def test_every_public_figure_is_in_one_chapter() -> None:
    public = {name for name in figures.__all__ if name.islower()}
    assert public == set(CHAPTER_OF)
    used = [
        (call, name)
        for name in notebooks.chapters()
        for cell in notebooks.read(notebooks.notebook_path(name)).cells
        if cell.cell_type == "code"
        for call in re.findall(r"\bfigures\.(\w+)\(", cell.source)
    ]
    assert sorted(used) == sorted(CHAPTER_OF.items())


# --- What goes into a page ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHAPTER_OF)
def test_the_json_is_small_and_sound(name: str, made: dict[str, Interactive]) -> None:
    text = made[name].spec()
    assert len(text.encode()) < 150_000
    assert "</" not in text
    spec = json.loads(text)
    assert spec["controls"]
    assert re.search(r"\d\.\d{9}", text) is None, "a number with more digits than four"


@pytest.mark.parametrize("name", CHAPTER_OF)
def test_every_setting_gives_lines_whose_ends_meet(name: str, made: dict[str, Interactive]) -> None:
    figure = made[name]
    names = [control.name for control in figure.controls]
    for options in list(product(*(control.options for control in figure.controls)))[
        :: 7 if len(names) > 2 else 1
    ]:
        settings = dict(zip(names, options, strict=True))
        for trace in figure.traces(**settings):
            assert len(trace["x"]) == len(trace["y"]) > 0
            for key in ("text", "base"):
                if isinstance(trace.get(key), list):
                    assert len(trace[key]) == len(trace["x"])
            assert all(math.isfinite(value) for value in [*trace["x"], *trace["y"]])
        assert len(figure.text(**settings)) > 20


def test_figures_have_names_of_their_own(made: dict[str, Interactive]) -> None:
    assert len({figure.uid for figure in made.values()}) == len(made)


@pytest.mark.parametrize("name", CHAPTER_OF)
def test_making_a_figure_twice_gives_the_same(name: str, made: dict[str, Interactive]) -> None:
    again = getattr(figures, name)()
    assert again.spec() == made[name].spec()
    assert again._repr_html_() == made[name]._repr_html_()


class _Reader(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and data.strip():
            self.scripts.append(data)


@pytest.mark.parametrize("name", CHAPTER_OF)
def test_the_output_holds_a_picture_the_numbers_and_the_script(
    name: str, made: dict[str, Interactive]
) -> None:
    figure = made[name]
    html = figure._repr_html_()
    reader = _Reader(html)
    assert [tag for tag, _ in reader.tags] == ["div", "img", "script", "script"]
    (_, root), (_, image), (_, data), _ = reader.tags
    assert root["id"] == f"figure-{figure.uid}"
    assert root["role"] == "group"
    assert root["aria-label"] == figure.title
    assert image["alt"] == figure.alt
    assert "hidden" not in image, "the picture is what readers without scripts see"
    kind, _, encoded = str(image["src"]).partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
        assert picture.width > 600
        assert len(np.unique(np.asarray(picture.convert("L")))) > 10
    assert data["type"] == "application/json"
    assert json.loads(reader.scripts[0]) == json.loads(figure.spec())
    assert figures.PLOTLY_INTEGRITY in reader.scripts[1]
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)[^\"'`\s]+", html) == [figures.PLOTLY_URL]
    assert EXTERNAL.search(html) is None
    assert len(html) < 300_000


@pytest.mark.parametrize("name", CHAPTER_OF)
def test_the_picture_can_be_drawn_at_other_settings(name: str, made: dict[str, Interactive]) -> None:
    figure = made[name]
    before = dict(mpl.rcParams)
    last = figure.picture(**{control.name: control.options[-1] for control in figure.controls})
    last.canvas.draw()  # layout problems warn, and warnings are errors
    assert len(last.axes) == len(figure.panels)
    assert dict(mpl.rcParams) == before
    assert not plt.get_fignums(), "a figure was left to pyplot"


@pytest.mark.parametrize(("name", "chapter"), CHAPTER_OF.items())
def test_committed_outputs_are_those_of_the_present_code(
    name: str, chapter: str, made: dict[str, Interactive]
) -> None:
    """The cells are tagged nbval-ignore-output: pictures differ with matplotlib. Numbers are compared here."""
    cells = [c for c in notebooks.read(notebooks.notebook_path(chapter)).cells if c.cell_type == "code"]
    (cell,) = [c for c in cells if f"figures.{name}(" in c.source]
    assert "nbval-ignore-output" in cell.metadata.tags
    if not cell.outputs:
        pytest.skip(f"{chapter} is to be executed")
    (html,) = [out.data["text/html"] for out in cell.outputs if "text/html" in out.get("data", {})]
    reader = _Reader(html)
    pairs = zip(_leaves(json.loads(reader.scripts[0])), _leaves(json.loads(made[name].spec())), strict=True)
    for old, new in pairs:
        if isinstance(new, str) and re.search(r"\d", new):
            continue  # sentences and labels with numbers: the last digit may differ on another machine
        assert old == (pytest.approx(new, rel=2e-3, abs=1e-4) if isinstance(new, float) else new)
    assert reader.scripts[1] == figures._loader(), f"the script has changed: make execute NAMES={chapter}"


def _leaves(x: Any) -> Iterator[Any]:
    if isinstance(x, dict):
        for key, value in x.items():
            yield key
            yield from _leaves(value)
    elif isinstance(x, list):
        for value in x:
            yield from _leaves(value)
    else:
        yield float(x) if isinstance(x, int) else x


# --- Plotly -------------------------------------------------------------------------------------------


def test_the_bundle_is_the_version_that_the_loader_asks_for() -> None:
    content = BUNDLE.read_bytes()
    assert len(content) <= 1.5e6
    assert f"v{figures.PLOTLY_VERSION}".encode() in content[:200]
    assert b"MIT license" in content[:400]
    digest = base64.b64encode(hashlib.sha384(content).digest()).decode()
    assert f"sha384-{digest}" == figures.PLOTLY_INTEGRITY
    assert f"@{figures.PLOTLY_VERSION}/" in figures.PLOTLY_URL
    assert [p for p in STATIC.rglob("plotly*") if p.is_file()] == [BUNDLE]
    assert {p.name for p in STATIC.rglob("*.js")} == {"book.js"}, (
        "Jupyter Book puts each of these into every page"
    )
    assert f'"{BUNDLE.relative_to(STATIC).as_posix()}"' in (STATIC / "book.js").read_text(encoding="utf-8")
    assert BUNDLE.name in BUNDLE.with_name("README.md").read_text(encoding="utf-8")


# --- Numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epsilon", "option", "ratio"), [("0.3", 0, "0.50"), ("0.3", 1, "0.50"), ("0.1", 1, "1.80")]
)
def test_clip_surrogate_is_the_loss_and_its_gradient(
    epsilon: str, option: int, ratio: str, made: dict[str, Interactive]
) -> None:
    figure, sign, e = made["clip_surrogate"], (1.0, -1.0)[option], float(epsilon)
    settings = {"epsilon": epsilon, "advantage": figure.controls[1].options[option], "ratio": ratio}
    traces = figure.traces(**settings)
    log_prob = torch.tensor([float(ratio)], dtype=F64).log().requires_grad_()
    items = clipped_surrogate_loss(
        log_prob, torch.zeros(1, dtype=F64), torch.full((1,), sign, dtype=F64), clip_ratio=e
    )
    (slope,) = torch.autograd.grad(-items.loss.sum(), log_prob)
    assert shown(traces, "your sample")["y"] == near(-items.loss.detach())
    assert shown(traces, "your sample", 2)["y"] == near(slope)
    assert ("gradient off" in figure.text(**settings)) == bool(items.clipped)
    curve = shown(traces, "clipped")
    rho = np.array(curve["x"])
    assert curve["y"] == pytest.approx(
        np.minimum(rho * sign, rho.clip(1 - e, 1 + e) * sign).tolist(), abs=2e-3
    )
    weight = dict(zip(*(shown(traces, "clipped", 2)[k] for k in "xy"), strict=True))
    assert weight[0.02] == (0.0 if sign < 0 else near(0.02))
    assert weight[2.0] == (0.0 if sign > 0 else -2.0)
    zone = shown(traces, "gradient off")
    middle, half = zone["x"][0], zone["width"] / 2
    assert (middle - half, middle + half) == pytest.approx(
        (1 + e, 2.0) if sign > 0 else (0.02, 1 - e), abs=2e-3
    )


@pytest.mark.parametrize(("gamma", "sweeps"), [("0.95", 11), ("0.5", 4)])
def test_value_iteration_shows_the_sweeps_and_their_bound(
    gamma: str, sweeps: int, made: dict[str, Interactive]
) -> None:
    figure = made["value_iteration"]
    layout = ("....G", ".#.#H", ".....", "S.#..")
    grid = grid_world(layout, slip=0.2, step_reward=-0.02, gamma=float(gamma))
    values = torch.zeros(grid.n_states, dtype=F64)
    for _ in range(sweeps):
        values = mdp.bellman_optimality(grid, values)
    solution = mdp.policy_iteration(grid)
    free = [s for s, letter in enumerate("".join(layout)) if letter != "#"]
    cells = figure.traces(gamma=gamma, sweep=str(sweeps))
    texts = [text.split("<br>") for text in shown(cells, "values")["text"]]
    written = [float(number.replace("−", "-")) for number, _ in texts]
    assert written == pytest.approx(values[free].tolist(), abs=0.0051)
    arrows = [below for _, below in texts]
    if sweeps == 11:  # what the chapter says of this sweep
        best = ["←↓→↑"[a] for a in solution.policy.argmax(1)[free].tolist()]
        for arrow, action, letter in zip(arrows, best, (c for c in "".join(layout) if c != "#"), strict=True):
            assert arrow == (letter if letter in "GH" else action)
        assert "the largest error of any cell is 0.0967" in figure.text(gamma=gamma, sweep="11")
    marks = shown(cells, "this sweep", 2)
    error, bound = (values - solution.values).abs().max().item(), mdp.error_bound(grid, values)
    assert marks["x"] == [sweeps, sweeps]
    assert marks["y"] == near([error, bound])
    for other in map(float, figure.controls[1].options):
        traces = figure.traces(gamma=f"{other:g}")
        errors, bounds = traces[2]["y"], traces[3]["y"]
        assert all(e <= b * 1.001 for e, b in zip(errors, bounds, strict=True))
        assert all(b <= other * a * 1.001 for a, b in pairwise(errors) if b > 1e-9)


def test_gae_lambda_shows_the_estimator_and_its_errors(made: dict[str, Interactive]) -> None:
    figure = made["gae_lambda"]
    exact, noisy, zero = figure.controls[1].options
    assert shown(figure.traces(lam="0.8"), "weight")["y"] == near((0.9 * 0.8) ** np.arange(16))
    for values in (exact, noisy, zero):
        at_0, at_1 = (figure.traces(lam=lam, values=values) for lam in "01")
        delta = np.array(shown(at_0, "TD error δ", 2)["y"])
        assert shown(at_0, "estimate Â", 2)["y"] == near(delta)
        summed = [(0.9 ** np.arange(9 - t) * delta[t:]).sum() for t in range(9)]
        assert shown(at_1, "estimate Â", 2)["y"] == pytest.approx(summed, abs=2e-3)
        bias, variance, both = (
            np.array(shown(at_1, name, 3)["y"]) for name in ("squared bias", "variance", "sum of both")
        )
        assert both == pytest.approx(bias + variance, rel=2e-3)
        assert bias[-1] < 2e-4, "λ = 1 has no bias, whatever V is"
        if values == exact:
            assert bias.max() < 2e-4
            assert both.argmin() == 0
        else:
            assert bias[0] > 0.01
            assert np.all(np.diff(bias) < 0)
            assert variance[-1] > 2 * variance[0]
    assert shown(figure.traces(), "sum of both", 3)["y"][0] > min(
        shown(figure.traces(), "sum of both", 3)["y"]
    )


@pytest.mark.parametrize(
    ("option", "options"), [(0, {}), (1, {"label_smoothing": 0.2}), (2, {"kind": "hinge"})]
)
def test_dpo_margin_is_the_loss_and_its_gradient(
    option: int, options: dict[str, Any], made: dict[str, Interactive]
) -> None:
    figure = made["dpo_margin"]
    for beta, difference in product(("0.02", "0.3"), ("−20", "0", "7")):
        settings = {"beta": beta, "difference": difference, "loss": figure.controls[2].options[option]}
        traces = figure.traces(**settings)
        d = torch.tensor([float(difference.replace("−", "-"))], dtype=F64)
        items = dpo_loss(d, torch.zeros(1, dtype=F64), beta=float(beta), **options)
        assert shown(traces, "your pair")["y"] == near(items.loss)
        assert shown(traces, "your pair", 2)["y"] == near(items.weight)
        if option == 0:
            x, y = (np.array(traces[1][k]) for k in "xy")
            assert y == pytest.approx(float(beta) / (1 + np.exp(float(beta) * x)), rel=2e-3)
        assert traces[2]["y"] == near([float(beta) / 2] * 2)


def test_kl_estimators_have_the_known_means_and_deviations(made: dict[str, Interactive]) -> None:
    figure = made["kl_estimators"]
    traces = figure.traces()
    x = np.array(traces[0]["x"])
    for trace, values in zip(traces, (-x, x**2 / 2, np.exp(x) - 1 - x), strict=False):
        assert trace["y"] == pytest.approx(values.tolist(), rel=5e-3, abs=2e-3)
    s = np.array([float(shift) for shift in figure.controls[0].options])
    # log r is normal with mean -s²/2 and variance s², so all moments are known.
    assert traces[4]["y"] == near(s**2 / 2)
    assert traces[5]["y"] == near(s**2 / 2 + s**4 / 8)
    assert traces[6]["y"] == near(s**2 / 2)
    assert traces[7]["y"] == near(s)
    assert traces[9]["y"] == pytest.approx(np.sqrt(np.exp(s**2) - 1 - s**2).tolist(), rel=6e-4, abs=1e-6)
    tokens = figure.traces(policies=figure.controls[1].options[1])
    assert tokens[4]["y"] == near(tokens[6]["y"])
    # What the chapter says: with Gaussians k3 is the noisier from 1.2 on, with four tokens never.
    assert [a > b for a, b in zip(traces[9]["y"], traces[7]["y"], strict=True)] == (s >= 1.15).tolist()
    assert all(a <= b for a, b in zip(tokens[9]["y"], tokens[7]["y"], strict=True))
    assert "KL = 0.18 nats" in figure.text(shift="0.6")


def test_group_baseline_is_the_three_advantages(made: dict[str, Interactive]) -> None:
    figure = made["group_baseline"]
    names = ("centred and divided by std", "centred only", "leave-one-out")
    for right, reward in product(figure.controls[0].options, figure.controls[1].options):
        traces = figure.traces(right=right, reward=reward)
        rewards = torch.tensor(shown(traces, "reward")["y"], dtype=F64)
        expected = (
            group_relative_advantages(rewards),
            group_relative_advantages(rewards, scale=False),
            leave_one_out_advantages(rewards),
        )
        for name, advantages in zip(names, expected, strict=True):
            assert shown(traces, name, 2)["y"] == pytest.approx(advantages.tolist(), rel=2e-3, abs=1e-6)
        assert shown(traces, "mean of the group")["y"] == near([rewards.mean()] * 2)
        silent = right in "08" and "minus" not in reward
        assert ("teaches nothing" in figure.text(right=right, reward=reward)) == silent
    ones = figure.traces(right="3", reward=figure.controls[1].options[0])
    assert sum(shown(ones, "reward")["y"]) == 3
    trifle = figure.text(right="8", reward=figure.controls[1].options[3])
    assert "1.37 centred and divided" in trifle
    assert "0.0035 centred only" in trifle


# --- Figures of one's own -----------------------------------------------------------------------------


def small(**changed: Any) -> Interactive:
    parts: dict[str, Any] = {
        "uid": "small",
        "title": "Small",
        "alt": "A line that rises, or falls.",
        "controls": (Control("way", "Way", ("up", "down")),),
        "panels": (Panel("A panel"),),
        "data": ({"type": "scatter", "mode": "lines", "name": "</script>", "x": [0, 1], "y": []},),
        "changes": (Change(0, ("way",), ({"y": [0, 1]}, {"y": [1, 0]})),),
        "readout": (Readout(("way",), ("It rises.", "It falls.")),),
    }
    return Interactive(**(parts | changed))


def test_a_figure_of_ones_own() -> None:
    figure = small()
    assert figure.traces(way="down")[0]["y"] == [1, 0]
    assert figure.text(way="down") == "It falls."
    assert len(_Reader(figure._repr_html_()).scripts) == 2, "a name must not end the script"
    assert repr(figure) == "<interactive figure 'small'>"
    with pytest.raises(ValueError, match="no setting"):
        figure.traces(way="sideways")
    with pytest.raises(ValueError, match="no setting"):
        figure.text(speed="fast")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"uid": "Small one"}, "uid may hold"),
        ({"alt": "A line"}, "alt must say"),
        ({"panels": ()}, "at least one control and one panel"),
        ({"controls": (Control("way", "Way", ("up", "down")),) * 2}, "same name"),
        ({"readout": (Readout(("speed",), ("fast",)),)}, "by must name controls"),
        ({"readout": (Readout(("way",), ("It rises.",)),)}, r"values by \('way',\) must be 2, got 1"),
        ({"changes": (Change(1, (), ({},)),)}, r"trace must lie in 0\.\.0, got 1"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"options": ("a", "a")}, "different"),
        ({"options": ()}, "different"),
        ({"options": ("a",), "start": 1}, r"start of 'x' must lie in 0\.\.0, got 1"),
        ({"options": ("a",), "kind": "knob"}, "must be 'range' or 'select', got 'knob'"),
    ],
)
def test_a_control_with_options_or_a_start_that_cannot_be_is_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Control("x", "X", **options)
