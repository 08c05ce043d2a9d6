"""Curves, bands, grids and source listings: numbers against slow loops, pictures against what they must show."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from types import SimpleNamespace

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes

from policyopt import mdp
from policyopt.control import train_ppo
from policyopt_book import plotting
from policyopt_book.tasks.grids import grid_world


@pytest.fixture
def ax() -> Iterator[Axes]:
    with mpl.rc_context():
        plotting.use_book_style()
        figure, axes = plt.subplots()
        yield axes
        figure.canvas.draw()  # layout problems warn, and warnings are errors
        plt.close(figure)


# --- Statistics ---------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=25))
def test_interquartile_mean_against_a_loop(numbers: list[float]) -> None:
    cut = len(numbers) // 4
    kept = sorted(numbers)[cut : len(numbers) - cut]
    assert plotting.interquartile_mean(numbers) == pytest.approx(sum(kept) / len(kept), rel=1e-9, abs=1e-6)


def test_interquartile_mean_along_either_axis_leaves_out_missing_values() -> None:
    table = np.array([[1.0, 5.0, 3.0], [2.0, np.nan, 3.0], [3.0, 5.0, 3.0], [400.0, 5.0, 3.0]])
    np.testing.assert_array_equal(plotting.interquartile_mean(table), [2.5, np.nan, 3.0])
    np.testing.assert_array_equal(plotting.interquartile_mean(table.T, axis=1), [2.5, np.nan, 3.0])
    with pytest.raises(ValueError, match="at least one value along axis 0"):
        plotting.interquartile_mean(np.zeros((0, 3)))


def test_bootstrap_band_is_the_percentile_bootstrap() -> None:
    runs = np.random.default_rng(3).normal(size=(11, 4))
    low, high = plotting.bootstrap_band(runs, level=0.9, resamples=500, seed=5)
    drawn = np.random.default_rng(5).integers(11, size=(500, 11))
    estimates = np.array([plotting.interquartile_mean(runs[rows]) for rows in drawn])
    np.testing.assert_allclose(low, np.quantile(estimates, 0.05, axis=0))
    np.testing.assert_allclose(high, np.quantile(estimates, 0.95, axis=0))


def test_bootstrap_band_does_not_depend_on_its_blocks() -> None:
    runs = np.random.default_rng(0).normal(size=(10, 300))  # several blocks
    low, high = plotting.bootstrap_band(runs)
    pieces = [plotting.bootstrap_band(runs[:, :130]), plotting.bootstrap_band(runs[:, 130:])]
    np.testing.assert_array_equal([low, high], np.concatenate(pieces, axis=1))
    assert low.shape == (300,)


def test_bootstrap_band_of_a_mean_covers_the_truth() -> None:
    """200 experiments of 20 normal runs: a 95 % band covers a bit less than 95 %, as the bootstrap does."""
    runs = np.random.default_rng(1).normal(loc=7.0, size=(20, 200))
    low, high = plotting.bootstrap_band(runs, statistic=np.mean)
    assert 0.86 < np.mean((low < 7.0) & (high > 7.0)) < 0.98
    assert np.mean(high - low) == pytest.approx(2 * 1.96 / 20**0.5, rel=0.1)


def test_bootstrap_band_is_missing_where_values_are_and_refuses_what_does_not_fit() -> None:
    runs = np.ones((5, 3))
    runs[2, 1] = np.nan
    low, high = plotting.bootstrap_band(runs)
    np.testing.assert_array_equal(low, [1.0, np.nan, 1.0])
    np.testing.assert_array_equal(high, [1.0, np.nan, 1.0])
    with pytest.raises(ValueError, match=r"level must lie in \(0, 1\), got 95"):
        plotting.bootstrap_band(runs, level=95)
    with pytest.raises(ValueError, match="resamples must be at least 1, got 0"):
        plotting.bootstrap_band(runs, resamples=0)
    with pytest.raises(ValueError, match="at least one run"):
        plotting.bootstrap_band(np.zeros((0, 3)))


def test_align_runs_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    steps = [np.cumsum(rng.integers(0, 9, size=n)) for n in (1, 30, 50)]
    values = [rng.normal(size=len(s)) for s in steps]
    grid = np.arange(0.0, 250.0, 3.5)
    table = plotting.align_runs(steps, values, grid, window=7)
    for row, (run_steps, run_values) in enumerate(zip(steps, values, strict=True)):
        for column, point in enumerate(grid):
            known = [v for s, v in zip(run_steps, run_values, strict=True) if s <= point][-7:]
            np.testing.assert_allclose(table[row, column], np.mean(known) if known else np.nan, atol=1e-12)


@pytest.mark.parametrize(
    ("steps", "values", "window", "message"),
    [
        ([[1, 2]], [[1.0, 2.0]], 0, "window must be at least 1 episode, got 0"),
        ([[1, 2]], [], 1, "one array per run"),
        ([], [], 1, "at least one run"),
        ([[1, 2]], [[1.0]], 1, "run 0: steps and values must be 1-D of equal length"),
        ([[1], [3, 2]], [[1.0], [1.0, 2.0]], 1, "run 1: steps must never decrease"),
    ],
)
def test_align_runs_refuses_what_does_not_fit(
    steps: list[object], values: list[object], window: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plotting.align_runs(steps, values, [1.0], window)


# --- Curves -------------------------------------------------------------------------------------------


def result(steps: list[int], returns: list[float]) -> SimpleNamespace:
    return SimpleNamespace(episodes=SimpleNamespace(steps=steps, returns=returns))


def test_learning_curves_draw_the_mean_of_each_label_and_return_the_runs(ax: Axes) -> None:
    quick = [result([10, 20, 100], [0.0, 10.0, 20.0 + i]) for i in range(4)]
    slow = [result([50], [1.0])]
    aligned = plotting.learning_curves(ax, {"quick": quick, "slow": slow}, window=1, points=11, threshold=15)
    assert aligned["quick"].shape == (4, 11)
    np.testing.assert_array_equal(aligned["quick"][:, 0], np.nan)  # no episode has ended at step 0
    np.testing.assert_array_equal(aligned["quick"][:, -1], [20.0, 21.0, 22.0, 23.0])
    first, second, threshold = ax.get_lines()
    assert first.get_ydata()[-1] == 21.5  # interquartile mean of 20 ... 23
    assert first.get_linestyle() != second.get_linestyle()
    assert first.get_color() != second.get_color()
    assert second.get_xdata()[-1] == 50  # a curve stops with its own last episode
    assert list(threshold.get_ydata()) == [15, 15]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["quick", "slow"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("environment steps", "return (mean of last 1 episodes)")


def test_learning_curves_refuse_what_does_not_fit(ax: Axes) -> None:
    with pytest.raises(ValueError, match="at least one result"):
        plotting.learning_curves(ax, {"nothing": []})
    with pytest.raises(ValueError, match="result 1 of 'a' has no finished episode"):
        plotting.learning_curves(ax, {"a": [result([1], [1.0]), result([], [])]})
    with pytest.raises(ValueError, match=r"runs must be \[n_runs, len\(x\)\] with len\(x\) = 2"):
        plotting.plot_band(ax, [0, 1], np.zeros((3, 3)))


def test_book_style_is_legible_and_opaque(ax: Axes) -> None:
    assert mpl.rcParams["figure.facecolor"] == mpl.rcParams["savefig.facecolor"] == "white"
    sizes = ["font.size", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"]
    assert min(float(mpl.rcParams[size]) for size in sizes) >= 10.5
    styles = [(c["color"], str(c["linestyle"])) for c in mpl.rcParams["axes.prop_cycle"]]
    assert len(set(styles)) == len(styles) == 7


def test_each_method_has_a_colour_of_its_own_in_every_figure(ax: Axes) -> None:
    colours = {label: np.array(mpl.colors.to_rgb(c)) for label, c in plotting.METHOD_COLOURS.items()}
    for (a, first), (b, second) in combinations(colours.items(), 2):
        assert np.linalg.norm(first - second) > 0.25, f"{a} and {b} look alike"
    assert list(colours)[:7] == [
        "REINFORCE",
        "REINFORCE, critic",
        "TRPO",
        "PPO",
        "DPO",
        "DPO, 4 pairs",
        "GRPO",
    ]
    line = plotting.plot_band(
        ax, [0, 1], np.zeros((3, 2)), "DPO, all pairs", **plotting.method_style("DPO, all pairs")
    )
    band = ax.collections[-1].get_facecolor()[0]
    assert (
        mpl.colors.to_hex(line.get_color())
        == mpl.colors.to_hex(band)
        == plotting.METHOD_COLOURS["DPO"].lower()
    )
    # Those that figures draw together differ by their lines too.
    for panel in (
        ("REINFORCE", "REINFORCE, critic", "TRPO", "PPO"),
        ("PPO", "GRPO", "DPO, all pairs", "DPO, 4 pairs", "expert iteration", "ranking"),
        ("GRPO", "ranking, online"),
    ):
        assert len({str(plotting.method_style(label)["linestyle"]) for label in panel}) == len(panel)
    with pytest.raises(ValueError, match="label must begin with one of"):
        plotting.method_style("SARSA")


# --- Grids --------------------------------------------------------------------------------------------


def test_plot_grid_writes_values_and_points_arrows(ax: Axes) -> None:
    layout = ["S.G", ".#H"]
    problem = grid_world(layout)
    solution = mdp.policy_iteration(problem)
    plotting.plot_grid(ax, solution.values, solution.policy, layout=layout)
    arrows = [t for t in ax.texts if getattr(t, "arrow_patch", None) is not None]
    assert len(arrows) == 3  # not in the wall, the goal or the hole
    for arrow in arrows:
        (x1, y1), (x0, y0) = arrow.xy, arrow.get_position()
        state = round((y0 + y1) / 2) * 3 + round((x0 + x1) / 2)
        action = int(solution.policy[state].argmax())
        direction = {0: (-1, 0), 1: (0, 1), 2: (1, 0), 3: (0, -1)}[action]  # y grows downwards
        assert np.sign([round(x1 - x0, 6), round(y1 - y0, 6)]).tolist() == list(direction)
    written = sorted(t.get_text() for t in ax.texts if t.get_text())
    assert written == sorted(
        ["S", "G", "H", "0.00", "0.00", *(f"{v:.2f}" for v in solution.values[[0, 1, 3]])]
    )


def test_plot_grid_accepts_actions_and_an_added_state(ax: Axes) -> None:
    plotting.plot_grid(ax, np.zeros(3), [2, 0, 1], layout=["S."])
    assert len([t for t in ax.texts if t.get_text() == "0.00"]) == 2


@pytest.mark.parametrize(
    ("values", "policy", "layout", "message"),
    [
        (np.zeros(3), None, ["..", "."], "equal length"),
        (np.zeros(7), None, ["..", ".."], "values must hold 2 x 2 = 4 numbers"),
        (np.zeros(4), np.zeros((4, 3)), ["..", ".."], r"policy must be \[S\] actions or \[S, 4\]"),
    ],
)
def test_plot_grid_refuses_what_does_not_fit(
    ax: Axes, values: np.ndarray, policy: object, layout: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plotting.plot_grid(ax, values, policy, layout=layout)


# --- Source -------------------------------------------------------------------------------------------


def test_show_source_links_to_the_line_and_shows_running_code() -> None:
    listing = plotting.show_source(mdp.policy_evaluation)
    markdown = listing._repr_markdown_()
    link, _, code = markdown.partition("\n\n")
    assert link.startswith("[`src/policyopt/mdp.py`](https://github.com/")
    assert link.endswith(f"/blob/main/src/policyopt/mdp.py#L{mdp.policy_evaluation.__code__.co_firstlineno})")
    assert code.startswith("```python\ndef policy_evaluation(mdp: FiniteMDP, policy: Tensor) -> Tensor:\n")
    assert "torch.linalg.solve" in code
    assert code.endswith("\n```")
    assert repr(listing) == "<source of policyopt.mdp.policy_evaluation>"


def test_show_source_keeps_shortens_or_drops_docstrings() -> None:
    full, summary, none = (
        plotting.show_source(mdp.FiniteMDP, docstring=how).code for how in ("full", "summary", "none")
    )
    assert "Raises\n" in full
    assert '"""A finite MDP (S, A, P, R, γ) with its initial distribution μ."""\n\n    P: Tensor' in summary
    assert '"""Number of states S, terminal ones included."""' in summary
    assert "Raises\n" not in summary
    assert "# noqa" not in plotting.show_source(train_ppo).code
    assert "# fmt" not in plotting.show_source(train_ppo).code
    two_lines = plotting.show_source(mdp.value_iteration).code
    assert 'from V = 0 until V is\n    provably close to V*.\n    """\n    require' in two_lines
    assert '"""' not in none
    for code in (full, summary, none):
        compile("from __future__ import annotations\n" + code, "listing", "exec")
    only_docstring = plotting.show_source(plotting._Episodes.steps.fget, docstring="none").code
    assert only_docstring.endswith("...")
    with pytest.raises(ValueError, match="'summary', 'full' or 'none', got 'short'"):
        plotting.show_source(mdp.lookahead, docstring="short")


def test_show_source_names_the_file_where_no_address_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise plotting.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(plotting.metadata, "metadata", missing)
    first = plotting.show_source(mdp.lookahead)._repr_markdown_().splitlines()[0]
    assert first.startswith("`src/policyopt/mdp.py`, line ")
