r"""Interactive figures: sliders and choices on curves that the library has computed.

Each function below returns an :class:`Interactive`, which a notebook shows like any
other figure. Every number in it comes from the functions that the chapters teach and
the trainers use (:mod:`policyopt.losses`, :mod:`policyopt.estimators`,
:mod:`policyopt.mdp`, :mod:`policyopt.distributions`), for all settings of the controls
in advance. So nothing is computed in the browser, and a figure also works in a page
that is read offline.

What is shown needs scripts, and Plotly's "basic" bundle: the book brings its own copy;
Jupyter and Colab fetch the same file from a public mirror of npm. Without one or the
other (GitHub, no network) a picture of the figure stands in its place, drawn by
matplotlib from the same numbers at the controls' first settings.

Writing a figure of your own takes controls, traces as `Plotly's reference
<https://plotly.com/javascript/reference/>`_ describes them, and what changes in them
with which control:

>>> import torch
>>> from policyopt.losses import bradley_terry_loss
>>> margin = torch.linspace(-4, 4, 9)
>>> loss = [
...     bradley_terry_loss(margin, torch.zeros(9), centering=c).loss.tolist()
...     for c in (0.0, 0.01)
... ]
>>> line = {"type": "scatter", "mode": "lines", "name": "loss", "x": margin.tolist()}
>>> figure = Interactive(
...     uid="bradley-terry",
...     title="Centring",
...     alt="The loss falls with the margin; centring bends it up at the ends.",
...     controls=(Control("c", "Centring c", ("0", "0.01")),),
...     panels=(Panel("Loss"),),
...     data=({**line, "y": []},),
...     changes=(Change(0, ("c",), tuple({"y": y} for y in loss)),),
... )
>>> [round(y, 2) for y in figure.traces(c="0.01")[0]["y"][::4]]
[4.18, 0.69, 0.18]
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from importlib import resources
from itertools import product
from typing import Any, Literal, TypeAlias

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from policyopt import mdp
from policyopt.distributions import Categorical, DiagonalGaussian
from policyopt.estimators import (
    gae,
    group_relative_advantages,
    kl_estimate,
    leave_one_out_advantages,
    td_errors,
)
from policyopt.losses import DPO, clipped_surrogate_loss, dpo_loss, surrogate_loss
from policyopt_book.plotting import OKABE_ITO, use_book_style
from policyopt_book.tasks.grids import grid_world

__all__ = [
    "PLOTLY_INTEGRITY",
    "PLOTLY_URL",
    "PLOTLY_VERSION",
    "Change",
    "Control",
    "Interactive",
    "Panel",
    "Readout",
    "clip_surrogate",
    "dpo_margin",
    "gae_lambda",
    "group_baseline",
    "kl_estimators",
    "value_iteration",
]

PLOTLY_VERSION = "4.1.1"
"""Version of the npm package ``plotly.js-basic-dist-min`` that draws the figures."""

PLOTLY_URL = (
    "https://cdn.jsdelivr.net/npm/plotly.js-basic-dist-min"
    f"@{PLOTLY_VERSION}/plotly-basic.min.js"
)
"""Where a page finds it that has no copy of its own, i.e. that does not set
``window.POLICYOPT_PLOTLY_URL``.
"""

PLOTLY_INTEGRITY = (
    "sha384-N2HZsG+IG/3J8CwhGGYz/kmzZ0sprpPWwjhor9ZI4lxuf47i9DXK2/NDGxMaJiEb"
)
"""What a browser checks that file against before it runs it."""

Trace: TypeAlias = dict[str, Any]

TEXT, GRID, SHADE = "@text", "@grid", "@shade"  # colours of the page's theme
_BLUE, _VERMILLION, _GREEN, _PURPLE = (
    OKABE_ITO[name] for name in ("blue", "vermillion", "green", "purple")
)
_GREY = "#8C8C8C"  # neither light nor dark, for pages of both kinds
_F64 = torch.float64


@dataclass(frozen=True)
class Control:
    """A slider or a list of choices.

    Parameters
    ----------
    name : str
        By which :class:`Change` and :class:`Readout` refer to it; a Python name.
    label : str
        What the reader sees beside it.
    options : tuple of str
        Its settings, as the reader sees them; no two alike.
    start : int
        Index of the first setting.
    kind : {'range', 'select'}
        Slider, or list of choices.
    """

    name: str
    label: str
    options: tuple[str, ...]
    start: int = 0
    kind: Literal["range", "select"] = "range"

    def __post_init__(self) -> None:
        if not self.options or len(set(self.options)) != len(self.options):
            raise ValueError(
                f"options of {self.name!r} must be different and at least one, got "
                f"{self.options}"
            )
        if not 0 <= self.start < len(self.options):
            raise ValueError(
                f"start of {self.name!r} must lie in 0..{len(self.options) - 1}, got "
                f"{self.start}"
            )
        if self.kind not in ("range", "select"):
            raise ValueError(
                f"kind of {self.name!r} must be 'range' or 'select', got {self.kind!r}"
            )


@dataclass(frozen=True)
class Panel:
    """One pair of axes; the ``i``-th is Plotly's ``xaxis{i}`` and ``yaxis{i}``.

    Parameters
    ----------
    title : str
        Short text above the axes.
    width : float
        Width beside the other panels, relative to theirs.
    height : int
        Height in pixels where panels stand one above the other.
    """

    title: str
    width: float = 1.0
    height: int = 230


@dataclass(frozen=True)
class Change:
    """What some of the controls change in one trace.

    Parameters
    ----------
    trace : int
        Index of the trace.
    by : tuple of str
        Names of the controls.
    values : tuple of dict
        Attributes of the trace for every combination of settings; the last control in
        ``by`` changes fastest. An attribute that is a dictionary is merged into the
        trace's own.
    """

    trace: int
    by: tuple[str, ...]
    values: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Readout:
    """Part of the sentence below a figure, for every combination of settings of some
    controls.

    Parameters
    ----------
    by : tuple of str
        Names of the controls.
    values : tuple of str
        Texts, ordered as in :class:`Change`.
    """

    by: tuple[str, ...]
    values: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Interactive:
    """A figure with controls, which shows itself in notebooks, in the book and as a
    plain picture.

    Colours are those of CSS, or ``"@text"``, ``"@grid"`` and ``"@shade"``, which follow
    the theme of the page. The picture understands the traces ``scatter`` (lines,
    markers) and ``bar`` (with numeric ``x``, ``width``, ``base``).

    Parameters
    ----------
    uid : str
        Stable name of the figure, and the ``id`` of its element; unique on a page.
    title : str
        What the figure is about, in a few words; names the group of controls for screen
        readers.
    alt : str
        What the figure shows at its first settings, for those who do not see it; at
        least 20 characters.
    controls : tuple of Control
        At least one.
    panels : tuple of Panel
        At least one.
    data : tuple of dict
        Traces of Plotly; one that belongs to panel ``i`` > 1 says ``xaxis="x{i}",
        yaxis="y{i}"``.
    changes : tuple of Change
        What the controls change.
    layout : dict
        Plotly's ``xaxis``, ``yaxis``, ``xaxis2``, ...: titles, ranges, ticks. Numbers
        without units.
    readout : tuple of Readout
        The sentence below the figure, put together from its parts.
    height : int
        Height of the axes in pixels where panels stand side by side.

    Raises
    ------
    ValueError
        If the parts do not fit together.
    """

    uid: str
    title: str
    alt: str
    controls: tuple[Control, ...]
    panels: tuple[Panel, ...]
    data: tuple[Trace, ...]
    changes: tuple[Change, ...]
    layout: Mapping[str, Any] = field(default_factory=dict)
    readout: tuple[Readout, ...] = ()
    height: int = 280

    def __post_init__(self) -> None:
        if not self.uid or set(self.uid) - set("abcdefghijklmnopqrstuvwxyz0123456789-"):
            raise ValueError(f"uid may hold a-z, 0-9 and '-', got {self.uid!r}")
        if len(self.alt) < 20:
            raise ValueError(f"alt must say what the figure shows, got {self.alt!r}")
        if not self.controls or not self.panels:
            raise ValueError("a figure needs at least one control and one panel")
        sizes = {control.name: len(control.options) for control in self.controls}
        if len(sizes) != len(self.controls):
            raise ValueError(f"two controls of {self.uid!r} have the same name")
        parts: list[Change | Readout] = [*self.changes, *self.readout]
        for part in parts:
            if not set(part.by) <= set(sizes):
                raise ValueError(
                    f"by must name controls, {sorted(sizes)}, got {part.by}"
                )
            expected = math.prod(sizes[name] for name in part.by)
            if len(part.values) != expected:
                raise ValueError(
                    f"values by {part.by} must be {expected}, got {len(part.values)}"
                )
        for change in self.changes:
            if not 0 <= change.trace < len(self.data):
                raise ValueError(
                    f"trace must lie in 0..{len(self.data) - 1}, got {change.trace}"
                )

    def traces(self, **settings: str) -> list[Trace]:
        """Return Plotly's traces at some settings.

        Parameters
        ----------
        **settings : str
            For each control that is not at its first setting, one of its options.

        Returns
        -------
        list of dict

        Raises
        ------
        ValueError
            For an unknown control or option.
        """
        state = self._state(settings)
        traces = [dict(trace) for trace in self.data]
        for change in self.changes:
            trace = traces[change.trace]
            for key, value in change.values[self._place(change.by, state)].items():
                trace[key] = (
                    {**trace.get(key, {}), **value}
                    if isinstance(value, dict)
                    else value
                )
        return traces

    def text(self, **settings: str) -> str:
        """Return the sentence below the figure at some settings, given as for
        :meth:`traces`.
        """
        state = self._state(settings)
        return " ".join(
            part.values[self._place(part.by, state)] for part in self.readout
        )

    def _state(self, settings: Mapping[str, str]) -> dict[str, int]:
        state = {control.name: control.start for control in self.controls}
        options = {control.name: control.options for control in self.controls}
        for name, option in settings.items():
            if option not in options.get(name, ()):
                raise ValueError(
                    f"{name} = {option!r} is no setting of this figure; there are "
                    f"{options}"
                )
            state[name] = options[name].index(option)
        return state

    def _place(self, by: Sequence[str], state: Mapping[str, int]) -> int:
        sizes = {control.name: len(control.options) for control in self.controls}
        place = 0
        for name in by:
            place = place * sizes[name] + state[name]
        return place

    def spec(self) -> str:
        """Return what the script reads, as JSON; numbers have four digits."""
        found = {
            "height": self.height,
            "panels": [vars(panel) for panel in self.panels],
            "controls": [vars(control) for control in self.controls],
            "data": self.data,
            "changes": [vars(change) for change in self.changes],
            "layout": self.layout,
            "readout": [vars(part) for part in self.readout],
        }
        text = json.dumps(
            _rounded(found), separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
        return text.replace("</", "<\\/").replace("<!--", "<\\u0021--")

    def picture(self, **settings: str) -> Figure:
        """Draw the figure with matplotlib, in the book's style; ``settings`` as for
        :meth:`traces`.

        The figure belongs to no window and to no state of pyplot; save it with
        ``savefig``.
        """
        with mpl.rc_context():
            use_book_style()
            figure = Figure(
                figsize=(4.0 * len(self.panels) ** 0.8 + 1.2, 3.6), layout="constrained"
            )
            FigureCanvasAgg(figure)
            widths = [panel.width for panel in self.panels]
            axes = figure.subplots(
                1, len(self.panels), squeeze=False, width_ratios=widths
            )[0]
            for i, (ax, panel) in enumerate(zip(axes, self.panels, strict=True)):
                suffix = "" if i == 0 else str(i + 1)
                for trace in self.traces(**settings):
                    if trace.get("xaxis", "x") == f"x{suffix}":
                        _draw(ax, trace)
                _set_axes(
                    ax,
                    self.layout.get(f"xaxis{suffix}", {}),
                    self.layout.get(f"yaxis{suffix}", {}),
                )
                ax.set_title(panel.title)
            handles = {
                label: handle
                for ax in axes
                for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
            }
            if handles:
                figure.legend(
                    list(handles.values()),
                    list(handles),
                    loc="outside lower center",
                    ncols=4 if len(handles) == 4 else 3,
                )
        return figure

    @cached_property
    def _png(self) -> bytes:
        buffer = io.BytesIO()
        options: dict[str, Any] = {
            "metadata": {"Software": None},
            "pil_kwargs": {"optimize": True},
        }
        self.picture().savefig(buffer, format="png", dpi=110, **options)
        return buffer.getvalue()

    def _repr_png_(self) -> bytes:
        return self._png

    def _repr_html_(self) -> str:
        png = base64.b64encode(self._png).decode()
        return (
            f'<div class="policyopt-figure" id="figure-{self.uid}" role="group" '
            f'aria-label="{html.escape(self.title)}">\n'
            f'<img alt="{html.escape(self.alt)}" style="max-width: 100%; height: auto" '
            f'src="data:image/png;base64,{png}">\n'
            f'<script type="application/json">{self.spec()}</script>\n'
            f"<script>{_loader()}</script>\n</div>"
        )

    def __repr__(self) -> str:
        return f"<interactive figure {self.uid!r}>"


@cache
def _loader() -> str:
    """Return the script of all figures, without its comments."""
    text = (
        resources.files("policyopt_book")
        .joinpath("figures.js")
        .read_text(encoding="utf-8")
    )
    lines = (line.strip() for line in text.splitlines())
    script = "\n".join(line for line in lines if line and not line.startswith("//"))
    return script.replace("__URL__", PLOTLY_URL).replace(
        "__INTEGRITY__", PLOTLY_INTEGRITY
    )


def _rounded(x: Any) -> Any:
    """Round all numbers to four digits, and rounding errors to 0; what is not finite is
    left out of a line.
    """
    if isinstance(x, float):
        if not math.isfinite(x):
            return None
        return 0.0 if abs(x) < 1e-12 else float(f"{x:.4g}")
    if isinstance(x, Mapping):
        return {key: _rounded(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_rounded(value) for value in x]
    return x


# --- The picture ---

_INKS = {TEXT: "#000000", GRID: "#D9D9D9", SHADE: "#E6E6E6"}
_DASHES = {"dash": "--", "dot": ":", "dashdot": "-."}
_MARKERS = {"line-ns-open": "|", "diamond": "D", "square": "s"}


def _ink(colour: Any) -> Any:
    return (
        [_ink(c) for c in colour]
        if isinstance(colour, list | tuple)
        else _INKS.get(colour, colour)
    )


def _draw(ax: Axes, trace: Trace) -> None:
    label = trace.get("name") if trace.get("showlegend", True) else None
    marker, line = trace.get("marker", {}), trace.get("line", {})
    if trace["type"] == "bar":
        bars = ax.bar(
            trace["x"],
            trace["y"],
            width=trace["width"],
            bottom=trace.get("base", 0.0),
            color=_ink(marker["color"]),
            alpha=trace.get("opacity", 1.0),
            label=label,
            zorder=0.5 if marker["color"] == SHADE else 2,
            linewidth=0,
        )
        inks = trace.get("textfont", {}).get("color", TEXT)
        for i, (bar, text) in enumerate(zip(bars, trace.get("text", ()), strict=False)):
            middle = (
                bar.get_x() + bar.get_width() / 2,
                bar.get_y() + bar.get_height() / 2,
            )
            ink = _ink(inks if isinstance(inks, str) else inks[i])
            ax.text(
                *middle,
                text.replace("<br>", "\n"),
                color=ink,
                ha="center",
                va="center",
                size=10,
            )
        return
    colour = _ink(line.get("color", marker.get("color", TEXT)))
    ax.plot(
        trace["x"],
        trace["y"],
        color=colour,
        linestyle=_DASHES.get(line.get("dash", ""), "-")
        if "lines" in trace["mode"]
        else "none",
        linewidth=line.get("width", 2.0),
        marker=_MARKERS.get(marker.get("symbol", ""), "o")
        if "markers" in trace["mode"]
        else "",
        markersize=marker.get("size", 6.0) * 0.75,
        alpha=trace.get("opacity", 1.0),
        label=label,
        clip_on="markers" not in trace["mode"],
    )


def _set_axes(ax: Axes, x: Mapping[str, Any], y: Mapping[str, Any]) -> None:
    for which, options in (("x", x), ("y", y)):
        axis = ax.xaxis if which == "x" else ax.yaxis
        log = options.get("type") == "log"
        settings: dict[str, Any] = {
            f"{which}label": options.get("title", {}).get("text", "")
        }
        if log:
            settings[f"{which}scale"] = "log"
        if "range" in options:
            settings[f"{which}lim"] = tuple(
                10.0**end if log else end for end in options["range"]
            )
        ax.set(**settings)
        if "tickvals" in options:
            axis.set_ticks(options["tickvals"], options.get("ticktext"))
            ax.set(
                **{key: value for key, value in settings.items() if key.endswith("lim")}
            )  # ticks widen the view
        if not options.get("showticklabels", True):
            axis.set_ticks([])
        if not options.get("showgrid", True):
            axis.grid(False)
    if "scaleanchor" in y:
        ax.set_aspect("equal")
        ax.spines[:].set_visible(False)


def _lines(
    name: str, x: Any = (), y: Any = (), *, panel: int = 1, dash: str = "", **more: Any
) -> Trace:
    line = {"color": more.pop("color", TEXT), "width": more.pop("width", 2.5)} | (
        {"dash": dash} if dash else {}
    )
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": _list(x),
        "y": _list(y),
        "line": line,
    } | (_on(panel) | more)


def _points(
    name: str, x: Any = (), y: Any = (), *, panel: int = 1, **more: Any
) -> Trace:
    marker = {"color": more.pop("color", TEXT), "size": more.pop("size", 11)}
    marker |= {"symbol": more.pop("symbol")} if "symbol" in more else {}
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": _list(x),
        "y": _list(y),
        "marker": marker,
    } | ({"cliponaxis": False} | _on(panel) | more)


def _bars(
    name: str, x: Any, y: Any, *, panel: int = 1, width: Any = 0.8, **more: Any
) -> Trace:
    marker = {"color": more.pop("color", TEXT), "line": {"width": 0}}
    return {
        "type": "bar",
        "name": name,
        "x": _list(x),
        "y": _list(y),
        "width": width,
        "marker": marker,
    } | (_on(panel) | more)


def _on(panel: int) -> Trace:
    return {} if panel == 1 else {"xaxis": f"x{panel}", "yaxis": f"y{panel}"}


def _list(x: Any) -> list[Any]:
    """Return numbers as the JSON will hold them, so that the picture and the tests see
    the same.
    """
    found = _rounded(x.tolist() if isinstance(x, Tensor) else list(x))
    assert isinstance(found, list)
    return found


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title}, **more}


_POWERS: dict[str, Any] = {
    "type": "log",
    "tickvals": [0.0001, 0.001, 0.01, 0.1, 1.0, 10.0],
    "ticktext": ["10⁻⁴", "10⁻³", "10⁻²", "10⁻¹", "10⁰", "10¹"],
}


def _number(x: float) -> str:
    """Write a number with three digits, a true minus sign and a true power of ten."""
    digits, _, power = f"{0.0 if abs(x) < 1e-12 else x:.3g}".replace(
        "-", "−"
    ).partition("e")
    if not power:
        return digits
    return f"{digits}·10" + f"{power[0]}{power[1:].lstrip('0')}".translate(
        str.maketrans("−+0123456789", "⁻⁺⁰¹²³⁴⁵⁶⁷⁸⁹")
    )


# --- The figures ---

_EPSILONS = ("0.05", "0.1", "0.2", "0.3", "0.4", "0.5")
_SIGNS = {"A = +1: better than expected": 1.0, "A = −1: worse than expected": -1.0}


def clip_surrogate() -> Interactive:
    """Show PPO's clipped surrogate: objective and gradient weight over the ratio, for
    any ε and either sign of A.

    Left the objective of :func:`~policyopt.losses.clipped_surrogate_loss` and of
    :func:`~policyopt.losses.surrogate_loss`, right their weights
    w = ∂ objective / ∂ log π, by autograd. A dot marks the sample whose ratio the
    reader has chosen.

    Returns
    -------
    Interactive
        Controls ``epsilon``, ``advantage`` and ``ratio``.
    """
    ratios = tuple(f"{r / 20:.2f}" for r in range(2, 41))

    def evaluate(
        ratio: Tensor, sign: float, epsilon: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return objective, weight of ∇ log π, and whether the clip is active."""
        log_prob = ratio.log().requires_grad_()
        old, advantages = torch.zeros_like(ratio), torch.full_like(ratio, sign)
        if epsilon is None:
            objective, off = (
                -surrogate_loss(log_prob, old, advantages).loss,
                torch.zeros_like(ratio),
            )
        else:
            items = clipped_surrogate_loss(
                log_prob, old, advantages, clip_ratio=epsilon
            )
            objective, off = -items.loss, items.clipped
        (weight,) = torch.autograd.grad(objective.sum(), log_prob)
        return objective.detach(), weight, off

    curves, plain, zones, dots, said = [], [], [], [], []
    ends = torch.tensor([0.02, 2.0], dtype=_F64)
    for sign in _SIGNS.values():
        objective, weight, _ = evaluate(ends, sign, None)
        plain.append((_list(objective), _list(weight)))
    for epsilon, sign in product(map(float, _EPSILONS), _SIGNS.values()):
        # Straight lines, with a corner or a step at the edges of the clip.
        edges = [
            edge + side for edge in (1 - epsilon, 1 + epsilon) for side in (-1e-6, 1e-6)
        ]
        ratio = torch.tensor(sorted([0.02, 1.0, 2.0, *edges]), dtype=_F64)
        objective, weight, off = evaluate(ratio, sign, epsilon)
        curves.append({"x": _list(ratio), "y": (_list(objective), _list(weight))})
        low, high = ratio[off.bool()].min().item(), ratio[off.bool()].max().item()
        zones.append({"x": [(low + high) / 2], "width": high - low})
        ratio = torch.tensor([float(r) for r in ratios], dtype=_F64)
        for r, o, w, c in zip(ratio, *evaluate(ratio, sign, epsilon), strict=True):
            dots.append((r.item(), o.item(), w.item()))
            verdict = "gradient off: nothing left to gain" if c else "gradient on"
            said.append(
                f"objective {_number(o.item())}, weight {_number(w.item())}: {verdict}."
            )

    by = ("epsilon", "advantage")
    zone: dict[str, Any] = {
        "color": SHADE,
        "hoverinfo": "skip",
        "y": [6.0],
        "base": -3.0,
    }
    data = (
        _bars("gradient off", [1.6], width=0.8, **zone),
        _bars("gradient off", [1.6], width=0.8, panel=2, showlegend=False, **zone),
        _lines("unclipped, ρA", ends, color=_VERMILLION, dash="dash"),
        _lines(
            "unclipped", ends, color=_VERMILLION, dash="dash", panel=2, showlegend=False
        ),
        _lines("clipped", color=_BLUE),
        _lines("clipped", color=_BLUE, panel=2, showlegend=False),
        _points("your sample"),
        _points("your sample", panel=2, showlegend=False),
    )
    changes = [Change(i, by, tuple(zones)) for i in (0, 1)]
    for i in (0, 1):
        changes.append(
            Change(2 + i, ("advantage",), tuple({"y": pair[i]} for pair in plain))
        )
        changes.append(
            Change(4 + i, by, tuple({"x": c["x"], "y": c["y"][i]} for c in curves))
        )
        points = tuple({"x": _list([dot[0]]), "y": _list([dot[1 + i]])} for dot in dots)
        changes.append(Change(6 + i, (*by, "ratio"), points))
    x = _axis("ratio ρ = π / π_old", range=[0.0, 2.0])
    return Interactive(
        uid="clip-surrogate",
        title="PPO's clipped surrogate",
        alt="Two panels over the ratio from 0 to 2. Left, the clipped objective: for "
        "a positive advantage it rises with the ratio up to one plus epsilon and is "
        "flat beyond; the unclipped one goes on rising. Right, the weight of the "
        "gradient of log pi, which is ratio times advantage, and exactly 0 where the "
        "objective is flat.",
        controls=(
            Control("epsilon", "Clip ε", _EPSILONS, _EPSILONS.index("0.2")),
            Control("advantage", "Advantage", tuple(_SIGNS), kind="select"),
            Control("ratio", "Ratio ρ of your sample", ratios, ratios.index("1.50")),
        ),
        panels=(Panel("Objective"), Panel("Weight w of ∇ log π")),
        data=data,
        changes=tuple(changes),
        layout={
            "xaxis": x,
            "yaxis": _axis("objective", range=[-2.1, 2.1]),
            "xaxis2": x,
            "yaxis2": _axis("weight", range=[-2.1, 2.1]),
        },
        readout=(
            Readout(("ratio",), tuple(f"At ρ = {r}:" for r in ratios)),
            Readout((*by, "ratio"), tuple(said)),
        ),
    )


_LAYOUT = ("....G", ".#.#H", ".....", "S.#..")
_GAMMAS = ("0.5", "0.8", "0.95")
_SWEEPS = 25


def value_iteration() -> Interactive:
    """Show value iteration on the grid world of the first chapter, sweep by sweep.

    Left the values after k sweeps of :func:`~policyopt.mdp.bellman_optimality` from V =
    0, with the actions that are best for them (all of those that tie; a dot where all
    four do). Right, on a logarithmic axis, the true error max |V_k − V*|, with V* from
    :func:`~policyopt.mdp.policy_iteration`, and the bound on it that needs no V*,
    :func:`~policyopt.mdp.error_bound`.

    Returns
    -------
    Interactive
        Controls ``sweep`` and ``gamma``.
    """
    rows, columns = len(_LAYOUT), len(_LAYOUT[0])
    letters = "".join(_LAYOUT)
    free = [s for s, letter in enumerate(letters) if letter != "#"]
    walls = [s for s, letter in enumerate(letters) if letter == "#"]
    colours = mpl.colormaps["cividis"]
    cells: list[Trace] = []
    history: list[tuple[list[float], list[float]]] = []
    said = []
    for gamma in map(float, _GAMMAS):
        grid = grid_world(_LAYOUT, slip=0.2, step_reward=-0.02, gamma=gamma)
        best = mdp.policy_iteration(grid).values
        values = torch.zeros_like(best)
        errors, bounds = [], []
        for _ in range(_SWEEPS + 1):
            errors.append((values - best).abs().max().item())
            bounds.append(mdp.error_bound(grid, values))
            q = mdp.lookahead(grid, values)
            ties = q >= q.amax(dim=-1, keepdim=True) - 1e-9
            fills, inks, texts = [], [], []
            for s in free:
                # One scale for all sweeps and discounts: −0.1 and below is the darkest,
                # 1 the lightest.
                red, green, blue, _ = colours((values[s].item() + 0.1) / 1.1)
                fills.append(mpl.colors.to_hex((red, green, blue)))
                inks.append(
                    "#000"
                    if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
                    else "#fff"
                )
                arrows = "".join(
                    a for a, tie in zip("←↓→↑", ties[s].tolist(), strict=True) if tie
                )
                ends = letters[s] in "GH"
                below = letters[s] if ends else "·" if len(arrows) == 4 else arrows
                texts.append(
                    f"{values[s].item() + 0.0:.2f}<br>{below}".replace(
                        "-0.00", "0.00"
                    ).replace("-", "−")
                )
            cells.append(
                {"marker": {"color": fills}, "text": texts, "textfont": {"color": inks}}
            )
            known = values[letters.index("S")].item()
            said.append(
                f"the start is worth {_number(known)}; the largest error of any cell "
                f"is {_number(errors[-1])}, and provably at most "
                f"{_number(bounds[-1])}."
            )
            values = mdp.bellman_optimality(grid, values)
        history.append((errors, bounds))

    def squares(states: list[int]) -> dict[str, Any]:
        x, base = (
            [s % columns for s in states],
            [rows - 1.47 - s // columns for s in states],
        )
        return {
            "x": x,
            "base": base,
            "y": [0.94] * len(states),
            "width": 0.94,
            "hoverinfo": "skip",
        }

    sweeps = list(range(_SWEEPS + 1))
    text: dict[str, Any] = {
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "constraintext": "none",
    }
    data = (
        _bars(
            "values", **squares(free), **text, showlegend=False, textfont={"size": 13}
        ),
        _bars("wall", **squares(walls), color=GRID, showlegend=False),
        _lines("largest error |Vₖ − V*|", sweeps, panel=2, color=_BLUE),
        _lines(
            "its bound (12), without V*",
            sweeps,
            panel=2,
            color=_VERMILLION,
            dash="dash",
        ),
        _points("this sweep", panel=2),
    )
    moved = tuple(
        {"x": [k, k], "y": _list([errors[k], bounds[k]])}
        for errors, bounds in history
        for k in sweeps
    )
    both = ("gamma", "sweep")
    bare = {"showticklabels": False, "showgrid": False, "showline": False}
    return Interactive(
        uid="value-iteration",
        title="Value iteration, sweep by sweep",
        alt="Left, the grid world of 4 rows and 5 columns after three sweeps: values "
        "are known near the goal in the top right corner, where arrows point to it, "
        "and still slightly negative far from it. Right, the largest error of the "
        "values and its bound against the number of sweeps, on a logarithmic axis: "
        "both fall, the bound above.",
        controls=(
            Control("sweep", "Sweep k", tuple(map(str, sweeps)), 3),
            Control(
                "gamma", "Discount γ", _GAMMAS, _GAMMAS.index("0.95"), kind="select"
            ),
        ),
        panels=(
            Panel("Values Vₖ and their best actions", width=1.1, height=235),
            Panel("How far from V*?"),
        ),
        data=data,
        changes=(
            Change(0, both, tuple(cells)),
            Change(2, ("gamma",), tuple({"y": _list(errors)} for errors, _ in history)),
            Change(3, ("gamma",), tuple({"y": _list(bounds)} for _, bounds in history)),
            Change(4, both, moved),
        ),
        layout={
            "xaxis": {"range": [-0.5, columns - 0.5], **bare},
            "yaxis": {
                "range": [-0.5, rows - 0.5],
                **bare,
                "scaleanchor": "x",
                "constrain": "domain",
            },
            "xaxis2": _axis("sweep k", range=[-0.5, _SWEEPS + 0.5]),
            "yaxis2": _axis("error of a value", range=[-4.0, 1.5], **_POWERS),
        },
        readout=(
            Readout(
                ("sweep",),
                tuple(
                    "After 1 sweep:" if k == 1 else f"After {k} sweeps:" for k in sweeps
                ),
            ),
            Readout(both, tuple(said)),
        ),
    )


_EPISODES = 5000
_LAMBDAS = (
    "0",
    "0.1",
    "0.2",
    "0.3",
    "0.4",
    "0.5",
    "0.6",
    "0.7",
    "0.8",
    "0.9",
    "0.95",
    "1",
)


def gae_lambda() -> Interactive:
    """Show what GAE's λ does: weights of the TD errors, one episode, and bias against
    variance.

    A small grid world is solved exactly, so that the true advantages are known. Left,
    the weight of each later TD error in the estimate of one step, by autograd through
    :func:`~policyopt.estimators.gae`. Middle, the estimates along one sampled episode
    and the true advantages. Right, squared bias and variance of the estimate, measured
    on 5000 episodes and averaged over the states and actions met. Bias means the part
    that differs between the actions of a state: the part they share does not change the
    policy gradient.

    Returns
    -------
    Interactive
        Controls ``lam`` and ``values``.
    """
    world = grid_world(["...G", ".#.H", "S..."], gamma=0.9, slip=0.2, step_reward=-0.04)
    policy = 0.5 * mdp.policy_iteration(world).policy + 0.5 * mdp.uniform_policy(world)
    exact, truth = mdp.policy_evaluation(world, policy), mdp.advantages(world, policy)
    generator = torch.Generator().manual_seed(0)
    noise = 0.3 * torch.randn(world.n_states, dtype=_F64, generator=generator)
    guesses = {
        "exact": exact,
        "exact + error of 0.3 per state": torch.where(
            world.terminal, 0.0, exact + noise
        ),
        "0 everywhere": torch.zeros_like(exact),
    }
    paths = mdp.sample_trajectories(
        world, policy, _EPISODES, max_steps=400, generator=generator
    )
    shown = int((paths.valid.sum(dim=0) == 9).nonzero()[0])
    steps = list(range(9))
    truths = truth[paths.states, paths.actions]
    # Each state and action is a group; how often it was met is its weight.
    group = (paths.states * world.n_actions + paths.actions)[paths.valid]
    total = partial(torch.bincount, group, minlength=world.n_states * world.n_actions)
    count = total()
    met = count > 1

    def estimate(values: Tensor, lam: float, rewards: Tensor = paths.rewards) -> Tensor:
        return gae(
            rewards,
            values[paths.states],
            values[paths.next_states],
            paths.terminated,
            paths.truncated,
            gamma=world.gamma,
            gae_lambda=lam,
        )

    later = list(range(16))
    weights, episodes, markers, said = [], [], [], []
    errors: list[dict[str, list[float]]] = []
    for lam in map(float, _LAMBDAS):
        rewards = torch.zeros(len(later), dtype=_F64, requires_grad=True)
        zero, never = (
            torch.zeros_like(rewards),
            torch.zeros(len(later), dtype=torch.bool),
        )
        at_zero = gae(
            rewards, zero, zero, never, never, gamma=world.gamma, gae_lambda=lam
        )[0]
        weights.append({"y": _list(torch.autograd.grad(at_zero, rewards)[0])})
    for values in guesses.values():
        curve: dict[str, list[float]] = {"bias": [], "variance": [], "both": []}
        for lam in map(float, _LAMBDAS):
            estimates = estimate(values, lam)
            episodes.append({"y": _list(estimates[: len(steps), shown])})
            missed = (estimates - truths)[paths.valid]
            mean = torch.where(met, total(missed) / count, 0.0)
            variance = (count * (total(missed.square()) / count - mean.square()))[
                met
            ].sum() / count.sum()
            # What all actions of a state have in common has no effect on the gradient.
            table = mean.view_as(policy)
            differs = (table - (policy * table).sum(dim=1, keepdim=True)).flatten()
            bias = (count * differs.square()).sum() / count.sum()
            for key, value in zip(
                curve, (bias, variance, bias + variance), strict=True
            ):
                curve[key].append(value.item())
            markers.append(
                {"x": [lam] * 3, "y": _list([c[-1] for c in curve.values()])}
            )
            # With the exact V the bias is 0 for every λ; what is measured there is
            # noise.
            noisy = (
                curve["bias"][-1]
                <= 2 * (errors[0] if errors else curve)["bias"][len(curve["both"]) - 1]
            )
            tail = ", no more than sampling noise" if noisy else ""
            said.append(
                f"squared bias {_number(curve['bias'][-1])}{tail}; variance "
                f"{_number(curve['variance'][-1])}."
            )
        errors.append(curve)
    deltas = [
        {
            "y": _list(
                td_errors(
                    paths.rewards,
                    values[paths.states],
                    values[paths.next_states],
                    paths.terminated,
                    gamma=world.gamma,
                )[: len(steps), shown]
            )
        }
        for values in guesses.values()
    ]
    lambdas = [float(lam) for lam in _LAMBDAS]
    by = ("values", "lam")
    curves = {
        "bias": ("squared bias", _VERMILLION, "dash"),
        "variance": ("variance", OKABE_ITO["orange"], "dot"),
    }
    data = (
        _bars("weight", later, [0.0] * 16, color=_GREY, showlegend=False, width=0.7),
        _bars(
            "TD error δ",
            steps,
            [0.0] * 9,
            panel=2,
            color=_GREEN,
            opacity=0.45,
            width=0.7,
        ),
        _lines(
            "estimate Â",
            steps,
            panel=2,
            color=_BLUE,
            mode="lines+markers",
            marker={"color": _BLUE, "size": 7},
        ),
        _lines(
            "true advantage", steps, truths[: len(steps), shown], panel=2, dash="dash"
        ),
        *(_lines(n, lambdas, panel=3, color=c, dash=d) for n, c, d in curves.values()),
        _lines("sum of both", lambdas, panel=3, color=_PURPLE),
        _points("chosen λ", panel=3, size=9),
    )
    changes = (
        Change(0, ("lam",), tuple(weights)),
        Change(1, ("values",), tuple(deltas)),
        Change(2, by, tuple(episodes)),
        *(
            Change(
                4 + i, ("values",), tuple({"y": _list(curve[key])} for curve in errors)
            )
            for i, key in enumerate(("bias", "variance", "both"))
        ),
        Change(7, by, tuple(markers)),
    )
    return Interactive(
        uid="gae-lambda",
        title="What lambda trades in GAE",
        alt="Three panels for lambda 0.9 and a value function with errors. Left, the "
        "weights of later TD errors decay geometrically. Middle, TD errors and "
        "estimated advantages along an episode of nine steps, beside the true "
        "advantages. Right, squared bias falls with lambda; the variance falls a "
        "little, then rises; their sum is smallest in between.",
        controls=(
            Control("lam", "λ", _LAMBDAS, _LAMBDAS.index("0.9")),
            Control("values", "V(s) is", tuple(guesses), 1, kind="select"),
        ),
        panels=(
            Panel("Weight of δₜ₊ₖ in Âₜ", width=0.8, height=180),
            Panel("One episode"),
            Panel("Error of Â"),
        ),
        data=data,
        changes=changes,
        layout={
            "xaxis": _axis("steps later, k", range=[-0.7, 15.7]),
            "yaxis": _axis("(γλ)ᵏ, with γ = 0.9", range=[0.0, 1.05]),
            "xaxis2": _axis("step t of the episode", range=[-0.7, 8.7]),
            "yaxis2": _axis("reward units", range=[-1.1, 1.1]),
            "xaxis3": _axis("λ", range=[-0.04, 1.04]),
            "yaxis3": _axis("reward units squared", range=[-4.0, 0.3], **_POWERS),
        },
        readout=(
            Readout(("lam",), tuple(f"At λ = {lam}:" for lam in _LAMBDAS)),
            Readout(by, tuple(said)),
        ),
    )


_BETAS = ("0.02", "0.05", "0.1", "0.2", "0.3")
_LOSSES: dict[str, dict[str, Any]] = {
    "−log σ (DPO)": {},
    "smoothed, a fifth of the labels doubted": {"label_smoothing": 0.2},
    "hinge (SLiC)": {"kind": "hinge"},
}


def dpo_margin() -> Interactive:
    """Show DPO's β and the margin: the loss of a pair and the weight of its gradient
    over the difference of log-ratios.

    The x axis is what the policy changes: how much more the chosen completion's
    log-probability has risen above the reference's than the rejected one's, in nats.
    The margin is β times it. Left the loss of
    :func:`~policyopt.losses.dpo_loss`, right the weight that it reports.

    Returns
    -------
    Interactive
        Controls ``beta``, ``difference`` and ``loss``.
    """
    differences = tuple(f"{d}".replace("-", "−") for d in range(-20, 21))

    def evaluate(difference: Tensor, beta: float, options: Mapping[str, Any]) -> DPO:
        return dpo_loss(difference, torch.zeros_like(difference), beta=beta, **options)

    by = ("loss", "beta")
    points = torch.tensor([float(d.replace("−", "-")) for d in differences], dtype=_F64)
    curves, dots, said = [], [], []
    for options, beta in product(_LOSSES.values(), map(float, _BETAS)):
        knee = torch.tensor(
            [1 / beta - 1e-6, 1 / beta + 1e-6], dtype=_F64
        )  # where the hinge has its corner
        grid = (
            torch.cat([torch.linspace(-20, 20, 81, dtype=_F64), knee])
            .sort()
            .values.clamp(max=20.0)
        )
        items = evaluate(grid, beta, options)
        curves.append({"x": _list(grid), "y": (_list(items.loss), _list(items.weight))})
        items = evaluate(points, beta, options)
        for d, loss, weight, margin in zip(
            points, items.loss, items.weight, items.margin, strict=True
        ):
            dots.append((d.item(), loss.item(), weight.item()))
            said.append(
                f"margin {_number(margin.item())}, loss {_number(loss.item())}, "
                f"weight {_number(weight.item())} = {_number(weight.item() / beta)} β."
            )
    neutral = [{"y": [beta / 2, beta / 2]} for beta in map(float, _BETAS)]
    data = (
        _lines("", color=_BLUE, showlegend=False),
        _lines("", color=_BLUE, panel=2, showlegend=False),
        _lines(
            "β/2, DPO's weight of every pair at the start",
            [-20, 20],
            panel=2,
            color=_VERMILLION,
            dash="dash",
        ),
        _points("your pair"),
        _points("your pair", panel=2, showlegend=False),
    )
    changes = [Change(2, ("beta",), tuple(neutral))]
    for i in (0, 1):
        changes.append(
            Change(i, by, tuple({"x": c["x"], "y": c["y"][i]} for c in curves))
        )
        moved = tuple({"x": [dot[0]], "y": _list([dot[1 + i]])} for dot in dots)
        changes.append(Change(3 + i, (*by, "difference"), moved))
    x = _axis("difference of log-ratios, nats", range=[-20.5, 20.5])
    return Interactive(
        uid="dpo-margin",
        title="DPO's beta and the margin",
        alt="Two panels over the difference of log-ratios from minus 20 to 20 nats, "
        "for beta 0.3. Left, the loss falls from about 6 to nearly 0. Right, the "
        "weight of the gradient falls from almost beta, where the pair is ordered "
        "wrong, through half of beta at 0 to nearly 0.",
        controls=(
            Control("beta", "β", _BETAS, _BETAS.index("0.3")),
            Control(
                "difference",
                "Difference of your pair",
                differences,
                differences.index("5"),
            ),
            Control("loss", "Loss", tuple(_LOSSES), kind="select"),
        ),
        panels=(Panel("Loss of a pair"), Panel("Weight w of its gradient")),
        data=data,
        changes=tuple(changes),
        layout={
            "xaxis": x,
            "yaxis": _axis("loss", range=[-0.2, 6.2]),
            "xaxis2": x,
            "yaxis2": _axis("weight", range=[-0.075, 0.315]),
        },
        readout=(
            Readout(
                ("difference",),
                tuple(f"At a difference of {d} nats:" for d in differences),
            ),
            Readout((*by, "difference"), tuple(said)),
        ),
    )


_KINDS: tuple[Literal["k1", "k2", "k3"], ...] = ("k1", "k2", "k3")
_SHIFTS = tuple(f"{s / 10:.1f}" for s in range(17))


_DRAWS = 40
_Case: TypeAlias = tuple[tuple[Tensor, Tensor], Tensor, tuple[Tensor, Tensor], float]


def _two_gaussians(shift: float) -> _Case:
    """Return log π and log π_ref of a fine grid of actions, the actions' probabilities,
    the logs of samples, and KL.
    """
    actions = torch.linspace(-12, 12, 2401, dtype=_F64)[:, None]
    policy, reference = (
        DiagonalGaussian(
            torch.full((_DRAWS, 1), mean, dtype=_F64), torch.zeros(1, dtype=_F64)
        )
        for mean in (0.0, shift)
    )
    drawn = policy.sample(torch.Generator().manual_seed(3))
    every = tuple(
        DiagonalGaussian(d.mean[:1], d.log_std).log_prob(actions)
        for d in (policy, reference)
    )
    return (
        (every[0], every[1]),
        every[0].exp() * (actions[1] - actions[0]),
        (policy.log_prob(drawn), reference.log_prob(drawn)),
        policy.kl(reference)[0].item(),
    )


def _four_tokens(shift: float) -> _Case:
    """Return the same for a softmax over four tokens, of which π prefers the first, and
    a uniform π_ref.
    """
    logits = torch.zeros(_DRAWS, 4, dtype=_F64)
    policy = Categorical.from_logits(logits + 1.5 * shift * torch.eye(4, dtype=_F64)[0])
    reference = Categorical.from_logits(logits)
    drawn = policy.sample(torch.Generator().manual_seed(3))
    return (
        (policy.log_probs[0], reference.log_probs[0]),
        policy.log_probs[0].exp(),
        (policy.log_prob(drawn), reference.log_prob(drawn)),
        policy.kl(reference)[0].item(),
    )


_POLICIES: dict[str, Callable[[float], _Case]] = {
    "two Gaussians, their means a shift apart": _two_gaussians,
    "four tokens, one of them preferred": _four_tokens,
}


def kl_estimators() -> Interactive:
    """Show the estimators k1, k2, k3 of KL(π ‖ π_ref): one sample's value, and their
    means and spreads.

    Left, each estimator of :func:`~policyopt.estimators.kl_estimate` over the
    log-ratio, with the log-ratios of 40 samples. Middle and right, mean and standard
    deviation against the shift between the two policies, not sampled: sums over four
    actions, or over a fine grid of actions for two Gaussians.

    Returns
    -------
    Interactive
        Controls ``shift`` and ``policies``.
    """
    log_ratio = torch.linspace(-3.5, 2.0, 56, dtype=_F64)
    values = {
        kind: kl_estimate(torch.zeros_like(log_ratio), log_ratio, kind)
        for kind in _KINDS
    }
    colours = dict(zip(_KINDS, (_VERMILLION, _GREEN, _BLUE), strict=True))
    dashes = dict(zip(_KINDS, ("", "dot", "dash"), strict=True))  # k3 covers k1

    rugs, markers, said = [], [], []
    curves: list[dict[str, tuple[list[float], list[float]]]] = []
    for case in _POLICIES.values():
        table: dict[str, tuple[list[float], list[float]]] = {
            kind: ([], []) for kind in _KINDS
        }
        for shift in map(float, _SHIFTS):
            every, weight, drawn, truth = case(shift)
            for kind in _KINDS:
                value = kl_estimate(*every, kind)
                mean = (weight * value).sum()
                table[kind][0].append(mean.item())
                table[kind][1].append(
                    (weight * (value - mean).square()).sum().sqrt().item()
                )
            means = [kl_estimate(*drawn, kind).mean().item() for kind in _KINDS]
            rugs.append({"x": _list(drawn[1] - drawn[0]), "y": [-1.7] * _DRAWS})
            markers.append(
                [
                    {"x": [shift] * 3, "y": _list([c[i][-1] for c in table.values()])}
                    for i in (0, 1)
                ]
            )
            parts = ", ".join(
                f"{kind} {_number(mean)}"
                for kind, mean in zip(_KINDS, means, strict=True)
            )
            said.append(
                f"KL = {_number(truth)} nats. Means over the {_DRAWS} samples shown: "
                f"{parts}."
            )
        curves.append(table)

    shifts = [float(s) for s in _SHIFTS]
    data = (
        *(
            _lines(k, log_ratio, values[k], color=colours[k], dash=dashes[k])
            for k in _KINDS
        ),
        _points(
            f"log-ratios of {_DRAWS} samples",
            size=12,
            symbol="line-ns-open",
            showlegend=False,
        ),
        *(
            _lines(
                k,
                shifts,
                panel=panel,
                color=colours[k],
                dash=dashes[k],
                showlegend=False,
            )
            for panel in (2, 3)
            for k in _KINDS
        ),
        _points("chosen shift", panel=2, size=9),
        _points("chosen shift", panel=3, size=9, showlegend=False),
    )
    by = ("policies", "shift")
    changes = [Change(3, by, tuple(rugs))]
    for i in (0, 1):
        for j, kind in enumerate(_KINDS):
            ys = tuple({"y": _list(table[kind][i])} for table in curves)
            changes.append(Change(4 + 3 * i + j, ("policies",), ys))
        changes.append(Change(10 + i, by, tuple(pair[i] for pair in markers)))
    x = _axis("shift", range=[-0.04, 1.64])
    return Interactive(
        uid="kl-estimators",
        title="Three estimators of the KL divergence",
        alt="Three panels for a shift of 0.6. Left, over the log-ratio: k1 is a "
        "falling straight line, negative on the right; k2 and k3 are bowls that touch "
        "0 at 0, k3 steeper on the right; ticks below show 40 log-ratios. Middle, the "
        "means of k1 and k3 coincide and that of k2 lies apart for large shifts. "
        "Right, the standard deviations: k1's is the largest for small shifts, k3's "
        "for large ones.",
        controls=(
            Control("shift", "Shift", _SHIFTS, _SHIFTS.index("0.6")),
            Control("policies", "Policies", tuple(_POLICIES), kind="select"),
        ),
        panels=(
            Panel("Value of one sample"),
            Panel("Mean", width=0.8),
            Panel("Standard deviation", width=0.8),
        ),
        data=data,
        changes=tuple(changes),
        layout={
            "xaxis": _axis("log r = log π_ref − log π", range=[-3.6, 2.1]),
            "yaxis": _axis("nats", range=[-2.1, 4.5]),
            "xaxis2": x,
            "yaxis2": _axis("nats", range=[-0.05, 2.2]),
            "xaxis3": x,
            "yaxis3": _axis("nats", range=[-0.05, 3.4]),
        },
        readout=(
            Readout(("shift",), tuple(f"Shift {s}:" for s in _SHIFTS)),
            Readout(by, tuple(said)),
        ),
    )


_GROUP = 8
_REWARDS: dict[
    str, tuple[float, float, float]
] = {  # wrong, right, what each place later in the group costs
    "0 if wrong, 1 if right": (0.0, 1.0, 0.0),
    "0 if wrong, 10 if right": (0.0, 10.0, 0.0),
    "5 if wrong, 6 if right": (5.0, 6.0, 0.0),
    "0 or 1, minus 0.001 for each further word": (0.0, 1.0, 0.001),
}


def group_baseline() -> Interactive:
    """Show GRPO's group as a baseline: the rewards of one group of eight, and three
    kinds of advantage.

    Left the rewards and their mean, right what
    :func:`~policyopt.estimators.group_relative_advantages` (divided by the standard
    deviation or not) and :func:`~policyopt.estimators.leave_one_out_advantages` make of
    them. The last kind of reward takes 0.001 off for every word, and each answer is one
    word longer than the one before: a difference that nobody cares about, which the
    division by the standard deviation blows up when nothing else differs.

    Returns
    -------
    Interactive
        Controls ``right`` and ``reward``.
    """
    counts = tuple(map(str, range(_GROUP + 1)))
    answers = torch.arange(_GROUP)
    kinds: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
        "centred and divided by std": (_BLUE, group_relative_advantages),
        "centred only": (
            _VERMILLION,
            lambda rewards: group_relative_advantages(rewards, scale=False),
        ),
        "leave-one-out": (_GREEN, leave_one_out_advantages),
    }
    bars, means, said = [], [], []
    advantages: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for (wrong, right, price), count in product(_REWARDS.values(), range(_GROUP + 1)):
        # Which answers are right: spread over the group, and one more with each
        # setting.
        rank = torch.tensor([1, 5, 3, 7, 0, 4, 2, 6])
        rewards = torch.where(rank < count, right, wrong).to(_F64) - price * answers
        bars.append({"y": _list(rewards)})
        means.append({"y": [float(rewards.mean())] * 2})
        largest = {}
        for kind, (_, function) in kinds.items():
            found = function(rewards)
            advantages[kind].append({"y": _list(found)})
            largest[kind] = found.abs().max().item()
        if not any(largest.values()):
            said.append(
                "All rewards are alike: every advantage is 0, and the group teaches "
                "nothing."
            )
        else:
            parts = ", ".join(
                f"{_number(size)} {kind}" for kind, size in largest.items()
            )
            said.append(f"Largest advantage: {parts}.")
    by = ("reward", "right")
    shift = dict(zip(kinds, (-0.27, 0.0, 0.27), strict=True))
    data = (
        _bars("reward", answers + 1, [0.0] * _GROUP, color=_PURPLE, width=0.7),
        _lines("mean of the group", [0.4, _GROUP + 0.6], color=TEXT, dash="dash"),
        *(
            _bars(
                kind,
                (answers + 1) + shift[kind],
                [0.0] * _GROUP,
                panel=2,
                color=colour,
                width=0.25,
            )
            for kind, (colour, _) in kinds.items()
        ),
    )
    changes = (
        Change(0, by, tuple(bars)),
        Change(1, by, tuple(means)),
        *(
            Change(2 + i, by, tuple(found))
            for i, found in enumerate(advantages.values())
        ),
    )
    x = _axis(
        "answer of the group",
        range=[0.4, _GROUP + 0.6],
        tickvals=_list(answers + 1),
        showgrid=False,
    )
    return Interactive(
        uid="group-baseline",
        title="The group as a baseline",
        alt="Left, the rewards of eight answers, two of them 1 and the others 0, with "
        "their mean 0.25 as a dashed line. Right, three bars for each answer: its "
        "advantage centred and divided by the standard deviation, centred only, and "
        "leave-one-out. Right answers are positive, wrong ones negative, divided ones "
        "largest.",
        controls=(
            Control("right", "Right answers of 8", counts, 2),
            Control("reward", "Reward", tuple(_REWARDS), kind="select"),
        ),
        panels=(
            Panel("Rewards", width=0.8, height=180),
            Panel("Advantages", width=1.2),
        ),
        data=data,
        changes=changes,
        layout={
            "xaxis": x,
            "yaxis": _axis("reward", zeroline=True, zerolinecolor=TEXT),
            "xaxis2": x,
            "yaxis2": _axis("advantage", zeroline=True, zerolinecolor=TEXT),
        },
        readout=(
            Readout(("right",), tuple(f"{count} of 8 right." for count in counts)),
            Readout(by, tuple(said)),
        ),
    )
