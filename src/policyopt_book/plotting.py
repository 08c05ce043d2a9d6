"""Learning curves with confidence bands, pictures of grid worlds, and the figure style
of the book.

Everything here needs NumPy and matplotlib only, and everything draws on an ``Axes``
that the caller owns: no figure is opened, shown or saved behind the caller's back.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from textwrap import dedent
from typing import Any, Literal, Protocol, TypeAlias

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.rcsetup import cycler
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "METHOD_COLOURS",
    "OKABE_ITO",
    "Drawing",
    "SourceListing",
    "align_runs",
    "bootstrap_band",
    "drawing",
    "interquartile_mean",
    "learning_curves",
    "method_style",
    "plot_band",
    "plot_grid",
    "show_source",
    "use_book_style",
]

FloatArray: TypeAlias = NDArray[np.float64]

OKABE_ITO: dict[str, str] = {
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "black": "#000000",
}
"""The Okabe–Ito palette, which people with the common kinds of colour blindness can
tell apart.

Its yellow is left out: on white paper it has too little contrast for a line.
References
----------
M. Okabe and K. Ito, *Color Universal Design*, 2008.
"""

_LINE_STYLES: tuple[Any, ...] = (
    "-",
    "--",
    "-.",
    ":",
    (0, (7, 2)),
    (0, (4, 1, 1, 1, 1, 1)),
    "-",
)

METHOD_COLOURS: dict[str, str] = {
    "REINFORCE": OKABE_ITO["orange"],
    "REINFORCE, critic": OKABE_ITO["vermillion"],
    "TRPO": OKABE_ITO["sky"],
    "PPO": OKABE_ITO["blue"],
    "DPO": OKABE_ITO["purple"],
    "DPO, 4 pairs": "#882255",
    "GRPO": OKABE_ITO["green"],
    "GRPO, noisy grades": "#44AA99",
    "Dr. GRPO, RLOO": "#117733",
    "DAPO's loss": "#999933",
    "GSPO": "#EE3377",
    "CISPO": "#332288",
    "ranking": OKABE_ITO["black"],
    "ranking, online": "#888888",
    "expert iteration": "#8C5A2B",
}
"""One colour per method, in the order in which the book's figures list methods.

The methods with a chapter of their own have a colour of the Okabe–Ito palette; their
variants have other colours, mostly of Tol's palettes. See :func:`method_style`.

References
----------
P. Tol, *Colour Schemes*, SRON/EPS/TN/09-002, 2021.
"""

_METHOD_LINES: dict[str, Any] = {
    "REINFORCE": ":",
    "REINFORCE, critic": "-.",
    "TRPO": "--",
    "PPO": "-",
    "DPO": "--",
    "DPO, 4 pairs": ":",
    "GRPO": (0, (7, 2)),
    "GRPO, noisy grades": (0, (7, 2)),
    "Dr. GRPO, RLOO": "-",
    "DAPO's loss": "--",
    "GSPO": "-.",
    "CISPO": ":",
    "ranking": "-.",
    "ranking, online": "-.",
    "expert iteration": (0, (4, 1, 1, 1, 1, 1)),
}


def method_style(label: str) -> dict[str, Any]:
    """Colour and line style of a method, the same in every figure.

    Parameters
    ----------
    label : str
        A key of :data:`METHOD_COLOURS`, or one with something after a comma, such as
        ``"DPO, all pairs"``, which looks as ``"DPO"`` does.

    Returns
    -------
    dict
        ``color`` and ``linestyle``, to be handed on to ``ax.plot`` or
        :func:`plot_band`.

    Raises
    ------
    ValueError
        If no method has this name.

    Examples
    --------
    >>> method_style("DPO, all pairs") == method_style("DPO")
    True
    """
    name = label if label in METHOD_COLOURS else label.split(",")[0]
    if name not in METHOD_COLOURS:
        raise ValueError(
            f"label must begin with one of {list(METHOD_COLOURS)}, got {label!r}"
        )
    return {"color": METHOD_COLOURS[name], "linestyle": _METHOD_LINES[name]}


def use_book_style() -> None:
    """Set matplotlib's ``rcParams`` to the figure style of the book.

    Lines differ by colour *and* by line style, the background is opaque white, and the
    text stays readable when a figure of the default size is squeezed to the width of a
    phone. ``matplotlib.rcdefaults()`` undoes it.
    """
    mpl.rcParams.update(
        {
            "figure.figsize": (6.8, 4.0),
            "figure.dpi": 130,
            "savefig.dpi": 130,
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "axes.facecolor": "white",
            "figure.constrained_layout.use": True,
            "font.size": 11.5,
            "axes.titlesize": 12.5,
            "axes.labelsize": 11.5,
            "xtick.labelsize": 11.0,
            "ytick.labelsize": 11.0,
            "legend.fontsize": 11.0,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#D9D9D9",
            "grid.linewidth": 0.7,
            "lines.linewidth": 2.0,
            "lines.markersize": 6.0,
            "image.cmap": "cividis",
            "axes.prop_cycle": cycler(color=list(OKABE_ITO.values()))
            + cycler(linestyle=list(_LINE_STYLES)),
        }
    )


def interquartile_mean(x: ArrayLike, axis: int = 0) -> FloatArray:
    """Mean of the middle half of ``x`` along ``axis``: a quarter of the values is cut
    off at each end.

    It is less moved by one freak run than the mean, and uses more of the data than the
    median. With ``n`` values, ``n // 4`` are cut at each end. NaN anywhere along the
    axis gives NaN: a missing run is not quietly left out.

    Parameters
    ----------
    x : array_like
        Numbers of any shape.
    axis : int
        The axis that holds the runs.

    Returns
    -------
    ndarray
        ``x`` without ``axis``, float64.

    Raises
    ------
    ValueError
        If the axis is empty.

    References
    ----------
    Agarwal et al., *Deep RL at the Edge of the Statistical Precipice*, 2021,
    arXiv:2108.13264, section 4.3.

    Examples
    --------
    >>> float(interquartile_mean([0.0, 1.0, 2.0, 1000.0]))
    1.5
    """
    values = np.sort(
        np.asarray(x, dtype=np.float64), axis=axis
    )  # NaN is sorted to the end
    n = values.shape[axis]
    if n == 0:
        raise ValueError(
            f"x must hold at least one value along axis {axis}, got shape "
            f"{values.shape}"
        )
    middle = np.take(values, np.arange(n // 4, n - n // 4), axis=axis).mean(axis=axis)
    missing = np.isnan(np.take(values, -1, axis=axis))
    return np.asarray(np.where(missing, np.nan, middle), dtype=np.float64)


def bootstrap_band(
    runs: ArrayLike,
    statistic: Callable[..., Any] = interquartile_mean,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[FloatArray, FloatArray]:
    """Percentile-bootstrap confidence band of a statistic over independent runs.

    Whole runs are drawn with replacement, so the dependence of one run's points on each
    other is kept. The band is pointwise: it covers each point with probability
    ``level``, not the whole curve at once. With one task, this is the stratified
    bootstrap of the source. Where a run is NaN, the band of the default statistic is
    NaN.

    Parameters
    ----------
    runs : array_like
        ``[n_runs, ...]``; one row per run.
    statistic : callable
        Called as ``statistic(array, axis=1)`` on ``[resamples, n_runs, ...]``; must not
        depend on the order of runs.
    level : float
        Confidence level, in (0, 1).
    resamples : int
        How many times the runs are drawn again.
    seed : int
        Seed of the resampling; the same seed gives the same band.

    Returns
    -------
    tuple of ndarray
        ``(low, high)``, each with the shape of ``runs`` without its first axis.

    Raises
    ------
    ValueError
        For ``level`` outside (0, 1), ``resamples < 1`` or no run.

    References
    ----------
    Agarwal et al., 2021, arXiv:2108.13264, section 4.1.

    Examples
    --------
    >>> low, high = bootstrap_band(np.full((10, 3), 7.0))
    >>> low.tolist(), high.tolist()
    ([7.0, 7.0, 7.0], [7.0, 7.0, 7.0])
    """
    table = np.asarray(runs, dtype=np.float64)
    if table.ndim < 1 or table.shape[0] < 1:
        raise ValueError(
            f"runs must be [n_runs, ...] with at least one run, got shape {table.shape}"
        )
    if not 0.0 < level < 1.0:
        raise ValueError(
            f"level must lie in (0, 1), got {level}; 0.95 is the usual choice"
        )
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    n_runs = table.shape[0]
    columns = table.reshape(n_runs, -1)
    drawn = np.random.default_rng(seed).integers(n_runs, size=(resamples, n_runs))
    band = np.empty((2, columns.shape[1]))
    # In blocks of columns, so that memory stays at a few MB however fine the grid of x
    # is.
    block = max(1, 2**20 // (resamples * n_runs))
    for start in range(0, columns.shape[1], block):
        part = slice(start, start + block)
        estimates = statistic(columns[:, part][drawn], axis=1)
        band[:, part] = np.quantile(
            estimates, [(1 - level) / 2, (1 + level) / 2], axis=0
        )
    low, high = band.reshape(2, *table.shape[1:])
    return low, high


def align_runs(
    steps_list: Sequence[ArrayLike],
    values_list: Sequence[ArrayLike],
    grid: ArrayLike,
    window: int = 20,
) -> FloatArray:
    """Put the episodes of several runs on one grid of environment steps.

    The value of a run at a grid point is the mean over its last ``window`` episodes
    that had ended by then (over fewer, while fewer have ended). Before a run's first
    episode has ended its value is NaN: nothing is known yet, and filling it in would
    favour the runs whose first episodes are short. After its last episode a run keeps
    its last value.

    Parameters
    ----------
    steps_list : sequence of array_like
        One array ``[n_i]`` per run: the environment step at which each episode ended,
        never decreasing.
    values_list : sequence of array_like
        One array ``[n_i]`` per run: the undiscounted return of each episode.
    grid : array_like
        ``[X]`` environment steps.
    window : int
        How many episodes to average, at least 1.

    Returns
    -------
    ndarray
        ``[n_runs, X]`` float64.

    Raises
    ------
    ValueError
        If the lists disagree, steps decrease, or ``window < 1``.

    Examples
    --------
    >>> steps, returns = [[10, 20, 30]], [[1.0, 3.0, 5.0]]
    >>> align_runs(steps, returns, grid=[5, 10, 25, 40], window=2).tolist()
    [[nan, 1.0, 2.0, 4.0]]
    """
    if window < 1:
        raise ValueError(f"window must be at least 1 episode, got {window}")
    if len(steps_list) != len(values_list) or not steps_list:
        raise ValueError(
            "steps_list and values_list need one array per run and at least one run, "
            f"got {len(steps_list)} and {len(values_list)}"
        )
    points = np.asarray(grid, dtype=np.float64)
    table = np.full((len(steps_list), points.size), np.nan)
    for row, (run_steps, run_values) in enumerate(
        zip(steps_list, values_list, strict=True)
    ):
        steps = np.asarray(run_steps, dtype=np.float64)
        values = np.asarray(run_values, dtype=np.float64)
        if steps.ndim != 1 or steps.shape != values.shape:
            raise ValueError(
                f"run {row}: steps and values must be 1-D of equal length, got "
                f"{steps.shape}, {values.shape}"
            )
        if np.any(np.diff(steps) < 0):
            raise ValueError(
                f"run {row}: steps must never decrease; sort the episodes by the step "
                "at which they ended"
            )
        ended = np.searchsorted(steps, points, side="right")
        first = np.maximum(ended - window, 0)
        total = np.concatenate([[0.0], np.cumsum(values)])
        known = ended > 0
        table[row, known] = (total[ended] - total[first])[known] / (ended - first)[
            known
        ]
    return table


def plot_band(
    ax: Axes,
    x: ArrayLike,
    runs: ArrayLike,
    label: str | None = None,
    *,
    statistic: Callable[..., Any] = interquartile_mean,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    **line: Any,
) -> Line2D:
    """Draw a statistic of several runs as a line with its bootstrap band.

    Parameters
    ----------
    ax : Axes
        Where to draw.
    x : array_like
        ``[X]`` positions.
    runs : array_like
        ``[n_runs, X]``; points at which a run is NaN are left blank.
    label : str, optional
        Text of the legend.
    statistic : callable
        Statistic over runs, as in :func:`bootstrap_band`.
    level : float
        Confidence level of the band.
    resamples : int
        Bootstrap resamples.
    seed : int
        Seed of the bootstrap.
    **line
        Passed on to ``ax.plot``: ``color``, for instance, which the band takes too, or
        ``**method_style(label)``.

    Returns
    -------
    Line2D
        The line.
    """
    positions = np.asarray(x, dtype=np.float64)
    table = np.asarray(runs, dtype=np.float64)
    if table.ndim != 2 or positions.shape != table.shape[1:]:
        raise ValueError(
            f"runs must be [n_runs, len(x)] with len(x) = {positions.size}, got shape "
            f"{table.shape}"
        )
    (drawn,) = ax.plot(positions, statistic(table, axis=0), label=label, **line)
    low, high = bootstrap_band(table, statistic, level, resamples, seed)
    ax.fill_between(
        positions, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0
    )
    return drawn


class _Episodes(Protocol):
    """Episodes of one run in the order in which they ended."""

    @property
    def steps(self) -> Any: ...

    @property
    def returns(self) -> Any: ...


class _Result(Protocol):
    """What every trainer of the package returns, as far as a learning curve is
    concerned.
    """

    @property
    def episodes(self) -> Any: ...


def learning_curves(
    ax: Axes,
    results: Mapping[str, Sequence[_Result]],
    *,
    window: int = 20,
    points: int = 200,
    threshold: float | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    xlabel: str = "environment steps",
    ylabel: str | None = None,
) -> dict[str, FloatArray]:
    """Draw one learning curve per algorithm: interquartile mean over seeds, with a
    bootstrap band.

    Parameters
    ----------
    ax : Axes
        Where to draw.
    results : mapping from str to sequence of results
        For each label, the results of its seeds. A result has ``episodes.steps``
        ``[n]`` (the environment step at which each episode ended) and
        ``episodes.returns`` ``[n]`` (its undiscounted return).
    window : int
        Episodes in the trailing mean (see :func:`align_runs`).
    points : int
        Points of the common grid of steps, which runs from 0 to the last episode of any
        result.
    threshold : float, optional
        If given, a thin horizontal line, for instance the score at which a task counts
        as solved.
    level : float
        Confidence level of the bands.
    resamples : int
        Bootstrap resamples.
    seed : int
        Seed of the bootstrap.
    xlabel : str
        Label of the x axis.
    ylabel : str, optional
        Label of the y axis; by default it names the window.

    Returns
    -------
    dict from str to ndarray
        For each label the aligned runs, ``[n_seeds, points]``, so that a claim about
        the picture can be asserted.

    Raises
    ------
    ValueError
        If there is no result, or a run in which no episode ended.
    """
    if not results or any(len(group) == 0 for group in results.values()):
        raise ValueError(
            "results must hold at least one label, and at least one result for each "
            "label"
        )
    runs = {
        label: [_read_episodes(label, i, r.episodes) for i, r in enumerate(group)]
        for label, group in results.items()
    }
    last = {
        label: max(steps[-1] for steps, _ in group) for label, group in runs.items()
    }
    grid = np.linspace(0.0, max(last.values()), points)
    aligned: dict[str, FloatArray] = {}
    for label, group in runs.items():
        table = align_runs(
            [steps for steps, _ in group], [values for _, values in group], grid, window
        )
        shown = grid <= last[label]
        plot_band(
            ax,
            grid[shown],
            table[:, shown],
            label,
            level=level,
            resamples=resamples,
            seed=seed,
        )
        aligned[label] = table
    if threshold is not None:
        ax.axhline(
            threshold, color="#555555", linewidth=1.0, linestyle=(0, (2, 2)), zorder=1
        )
    ax.set_xlabel(xlabel)
    ax.set_ylabel(
        f"return (mean of last {window} episodes)" if ylabel is None else ylabel
    )
    ax.legend()
    return aligned


def _read_episodes(
    label: str, index: int, episodes: _Episodes
) -> tuple[FloatArray, FloatArray]:
    steps, returns = (
        np.asarray(a, dtype=np.float64) for a in (episodes.steps, episodes.returns)
    )
    if steps.size == 0:
        raise ValueError(
            f"result {index} of {label!r} has no finished episode; train for more "
            "environment steps"
        )
    return steps, returns


# Left, down, right, up as (row, column): FrozenLake's order of actions.
_ARROWS = ((0, -1), (1, 0), (0, 1), (-1, 0))


def plot_grid(
    ax: Axes,
    values: ArrayLike,
    policy: ArrayLike | None = None,
    *,
    layout: Sequence[str],
    terminal: str = "GH",
    decimals: int = 2,
    cmap: str | Colormap | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
) -> None:
    """Draw a grid world: values as a heat map with numbers, the policy as arrows.

    Works for :func:`policyopt_book.tasks.grids.grid_world` and for Gymnasium's
    FrozenLake; state ``row * columns + column`` is the cell ``layout[row][column]``,
    and the actions are 0 left, 1 down, 2 right, 3 up.

    Parameters
    ----------
    ax : Axes
        Where to draw.
    values : array_like
        ``[rows * columns]`` (an added terminal state at the end is ignored), one number
        per cell.
    policy : array_like, optional
        ``[S]`` actions or ``[S, 4]`` probabilities; the likelier an action, the more
        opaque its arrow.
    layout : sequence of str
        The map, one string per row; ``#`` is a wall; letters in ``terminal`` end the
        episode, and ``S`` is the start.
    terminal : str
        Letters of cells that are marked and get no arrow.
    decimals : int
        Decimals of the numbers; a negative number leaves them out.
    cmap : str or Colormap, optional
        Colour map, by default ``image.cmap``.
    vmin : float, optional
        Value at the low end of the colour map, by default the smallest value drawn.
    vmax : float, optional
        Value at the high end of the colour map, by default the largest value drawn.

    Raises
    ------
    ValueError
        If the shapes of ``values``, ``policy`` and ``layout`` disagree.
    """
    rows, columns = len(layout), len(layout[0]) if layout else 0
    if rows == 0 or columns == 0 or any(len(line) != columns for line in layout):
        raise ValueError(
            f"layout must be non-empty strings of equal length, got {list(layout)}"
        )
    cells = rows * columns
    flat = np.asarray(values, dtype=np.float64).reshape(-1)
    if flat.size not in (cells, cells + 1):
        raise ValueError(
            f"values must hold {rows} x {columns} = {cells} numbers, one per cell, got "
            f"{flat.size}"
        )
    numbers = flat[:cells].reshape(rows, columns)
    probabilities = (
        None
        if policy is None
        else _action_probabilities(policy, cells).reshape(rows, columns, 4)
    )
    walls = np.array([[letter == "#" for letter in line] for line in layout])
    colours = mpl.colormaps.get_cmap(
        mpl.rcParams["image.cmap"] if cmap is None else cmap
    )
    drawn = numbers[~walls]
    norm = Normalize(
        drawn.min() if vmin is None else vmin, drawn.max() if vmax is None else vmax
    )
    ax.imshow(np.ma.masked_array(numbers, walls), cmap=colours, norm=norm)
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)
    for row, column in np.ndindex(rows, columns):
        letter, corner = layout[row][column], (column - 0.5, row - 0.5)
        if letter == "#":
            ax.add_patch(
                Rectangle(
                    corner, 1, 1, facecolor="#DDDDDD", edgecolor="#777777", hatch="///"
                )
            )
            continue
        red, green, blue, _ = colours(norm(numbers[row, column]))
        ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
        if letter in terminal or letter == "S":
            ax.text(
                column - 0.44,
                row - 0.42,
                letter,
                color=ink,
                va="top",
                weight="bold",
                size=11.0,
            )
        arrows = (
            None
            if probabilities is None or letter in terminal
            else probabilities[row, column]
        )
        if decimals >= 0:
            text = f"{numbers[row, column]:.{decimals}f}"
            height = row if arrows is None else row + 0.31
            ax.text(
                column, height, text, color=ink, ha="center", va="center", size=11.5
            )
        if arrows is not None:
            _draw_arrows(
                ax, row - (0.12 if decimals >= 0 else 0.0), column, arrows, ink
            )


def _draw_arrows(
    ax: Axes, row: float, column: float, probabilities: FloatArray, colour: str
) -> None:
    for (down, right), probability in zip(_ARROWS, probabilities, strict=True):
        if probability < 0.02:
            continue
        # A lone arrow is centred in its cell, several start near its centre.
        tail, tip = (-0.24, 0.30) if probability > 0.98 else (0.04, 0.30)
        ax.annotate(
            "",
            xy=(column + tip * right, row + tip * down),
            xytext=(column + tail * right, row + tail * down),
            arrowprops={
                "arrowstyle": "-|>",
                "mutation_scale": 9,
                "color": colour,
                "alpha": max(0.15, float(probability)),
                "linewidth": 1.4,
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )


def _action_probabilities(policy: ArrayLike, cells: int) -> FloatArray:
    table = np.asarray(policy)
    if table.ndim == 1 and table.size >= cells:
        table = np.eye(4)[table[:cells].astype(np.int64)]
    if table.ndim != 2 or table.shape[0] < cells or table.shape[1] != 4:
        raise ValueError(
            f"policy must be [S] actions or [S, 4] probabilities with S >= {cells}, "
            f"got shape {table.shape}"
        )
    return np.asarray(table[:cells], dtype=np.float64)


@dataclass(frozen=True)
class Drawing:
    """A schematic drawing, as SVG text; Jupyter, Colab, GitHub and the book show it as
    a picture.

    Its background is white, as that of the other figures, so the book's style sheet
    turns it into a dark one in the dark theme.
    """

    name: str
    svg: str

    def _repr_svg_(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        return f"<drawing {self.name!r}>"


def drawing(name: str) -> Drawing:
    """Return a drawing that comes with the book.

    A cell that ends in it carries the picture in its output, so that nothing has to be
    fetched: it is seen offline and in a notebook that was opened by itself.

    Parameters
    ----------
    name : str
        Name of a file in ``policyopt_book/drawings``, without ``.svg``.

    Returns
    -------
    Drawing

    Raises
    ------
    ValueError
        If there is no drawing of this name.

    Examples
    --------
    >>> drawing("loop")
    <drawing 'loop'>
    """
    folder = resources.files("policyopt_book").joinpath("drawings")
    names = sorted(
        file.name.removesuffix(".svg")
        for file in folder.iterdir()
        if file.name.endswith(".svg")
    )
    if name not in names:
        raise ValueError(f"name must be one of {names}, got {name!r}")
    text = folder.joinpath(f"{name}.svg").read_text(encoding="utf-8")
    return Drawing(name=name, svg=text)


@dataclass(frozen=True)
class SourceListing:
    """Source code that a notebook shows as Markdown: a link to the file, then the code
    with highlighting.
    """

    name: str
    path: str
    line: int
    code: str
    url: str | None

    def _repr_markdown_(self) -> str:
        where = (
            f"`{self.path}`, line {self.line}"
            if self.url is None
            else f"[`{self.path}`]({self.url}#L{self.line})"
        )
        return f"{where}\n\n```python\n{self.code}\n```"

    def __repr__(self) -> str:
        return f"<source of {self.name}>"


_PRAGMA = re.compile(r" +# (fmt: skip|noqa\b.*|type: ignore\b.*)$", re.MULTILINE)
"""A note to a formatter, linter or type checker, which no reader needs."""


def show_source(
    obj: Any, *, docstring: Literal["summary", "full", "none"] = "summary"
) -> SourceListing:
    """Show the real source of a function or class of the package, with a link to the
    repository.

    Nothing is copied by hand, so the listing on a page cannot drift from the code that
    the page runs. Notes to formatters, linters and type checkers are left out.

    Parameters
    ----------
    obj : object
        A function, method or class written in Python.
    docstring : {'summary', 'full', 'none'}
        ``"summary"`` keeps the first paragraph of each docstring, ``"full"`` all of it,
        ``"none"`` nothing.

    Returns
    -------
    SourceListing
        An object that Jupyter, GitHub and the book render as Markdown.

    Raises
    ------
    ValueError
        For an unknown value of ``docstring``.
    TypeError
        If ``obj`` has no Python source.
    """
    if docstring not in ("summary", "full", "none"):
        raise ValueError(
            f"docstring must be 'summary', 'full' or 'none', got {docstring!r}"
        )
    target = inspect.unwrap(obj) if callable(obj) else obj
    lines, line = inspect.getsourcelines(target)
    code = dedent("".join(lines)).rstrip()
    if docstring != "full":
        code = _shorten_docstrings(code, keep_summary=docstring == "summary")
    code = _PRAGMA.sub("", code)
    package, *_ = str(target.__module__).split(".")
    path = _path_in_repository(target, package)
    url = _repository(package)
    return SourceListing(
        name=f"{target.__module__}.{target.__qualname__}",
        path=path,
        line=line,
        code=code,
        url=None if url is None else f"{url}/blob/main/{path}",
    )


def _shorten_docstrings(code: str, *, keep_summary: bool) -> str:
    """Cut each docstring down to its first paragraph, or out."""
    lines = code.split("\n")
    nodes = [
        n
        for n in ast.walk(ast.parse(code))
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    for node in sorted(
        nodes, key=lambda n: n.lineno, reverse=True
    ):  # from the end, so that line numbers stay true
        text = ast.get_docstring(node)
        if text is None:
            continue
        expression = node.body[0]
        indent = " " * expression.col_offset
        paragraph = text.strip().split("\n\n", 1)[0].split("\n")
        paragraph[0] = f'"""{paragraph[0]}'
        if len(paragraph) == 1:
            paragraph[0] += '"""'
        else:
            paragraph.append('"""')
        kept = [indent + x for x in paragraph] if keep_summary else []
        if not keep_summary and len(node.body) == 1:
            kept = [f"{indent}..."]
        end = expression.end_lineno or expression.lineno
        following = end
        if not keep_summary:
            while following < len(lines) and not lines[following].strip():
                following += 1
        lines[expression.lineno - 1 : following] = kept
    return "\n".join(lines)


def _path_in_repository(obj: Any, package: str) -> str:
    parts = Path(inspect.getsourcefile(obj) or "").parts
    if package in parts:
        return "/".join(("src", *parts[len(parts) - 1 - parts[::-1].index(package) :]))
    return parts[-1]


def _repository(package: str) -> str | None:
    """Read the address in the installed package's ``[project.urls]``, which is the one
    place that states it.
    """
    try:
        entries = metadata.metadata(package).get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        return None
    urls = dict(entry.split(", ", 1) for entry in entries)
    url = urls.get("Repository")
    return None if url is None else str(url).rstrip("/").removesuffix(".git")
