"""Charts as inline SVG that take their colours from the page, so that one picture serves light and dark.

matplotlib draws with stand-in colours; they are replaced by CSS variables. Names from outside never go into a chart:
legends are HTML.
"""

import io
import re
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

INK, GRID = "#010203", "#040506"
SERIES = [f"#0a0b{n:02x}" for n in range(1, 7)]
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mlc",  # the same data gives the same page
    "font.size": 10,
    "axes.labelpad": 6,  # the browser's font may be wider than the one that is measured here
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}


def ranked(counts: Mapping[str, Sequence[int]], label: str) -> str:
    """Images per class against the class's rank, one curve per group: how long the tail is. Descending counts."""
    with rc_context(STYLE):
        figure, axes = _axes()
        for color, values in zip(_colors(counts), counts.values(), strict=True):
            axes.plot(range(1, len(values) + 1), values, color=color, marker="." if len(values) < 40 else None)
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="rank of the class", ylabel="images")
        return _svg(figure, label, "ranked")


def bars(series: Mapping[str, np.ndarray], label: str, xlabel: str, ylabel: str, *, name: str) -> str:
    """Whole numbers 0, 1, 2, ... and the share of each, side by side per series (arrays of values)."""
    top = max((int(values.max(initial=0)) for values in series.values()), default=0)
    step = top // 40 + 1  # at most 41 bars
    with rc_context(STYLE):
        figure, axes = _axes()
        width = 0.84 * step / len(series)
        for place, (color, values) in enumerate(zip(_colors(series), series.values(), strict=True)):
            share = np.bincount(values // step, minlength=top // step + 1) / max(1, len(values))
            left = np.arange(len(share)) * step + (step - 1) / 2 + (place - (len(series) - 1) / 2) * width
            axes.bar(left, 100 * share, width, color=color)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel=xlabel, ylabel=ylabel)
        return _svg(figure, label, name)


def sizes(series: Mapping[str, np.ndarray], label: str) -> str:
    """Width against height, int [N, 2] per series; equal sizes are one larger dot."""
    with rc_context(STYLE):
        figure, axes = _axes()
        joined = np.concatenate(list(series.values()))
        square = [joined.min(), joined.max()]
        for color, values in zip(_colors(series), series.values(), strict=True):
            points, count = np.unique(values, axis=0, return_counts=True)
            area = 6 + 60 * count / len(values)
            axes.scatter(points[:, 0], points[:, 1], s=area, color=color, alpha=0.45, linewidths=0)
        axes.plot(square, square, color=GRID, linewidth=0.8)
        for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
            scale("log", base=2)
            axis.set_major_formatter(FuncFormatter(_plain))
        axes.set(xlabel="width, pixels", ylabel="height, pixels")
        return _svg(figure, label, "sizes")


def aspects(series: Mapping[str, np.ndarray], label: str) -> str:
    """Width / height on a logarithmic axis, float [N] per series."""
    values = np.log2(np.concatenate(list(series.values())))
    reach = max(1.0, float(np.abs(values).max(initial=0)))
    edges = np.linspace(-reach, reach, 42)
    with rc_context(STYLE):
        figure, axes = _axes()
        for color, part in zip(_colors(series), series.values(), strict=True):
            share = np.histogram(np.log2(part), edges)[0] / max(1, len(part))
            axes.stairs(100 * share, edges, color=color, fill=True, alpha=0.3)
            axes.stairs(100 * share, edges, color=color)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.xaxis.set_major_formatter(FuncFormatter(_ratio))
        axes.set(xlabel="width : height", ylabel="% of images")
        return _svg(figure, label, "aspects")


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    label: str,
    xlabel: str,
    ylabel: str,
    *,
    name: str,
    diagonal: bool = False,
    at: float | None = None,
    xlim: tuple[float, float] | None = None,
    styles: Mapping[str, tuple[int, bool]] | None = None,
) -> str:
    """Lines y(x), (x, y) each; nan leaves a gap. Dotted, for comparison: y = x for `diagonal`, x = `at`.

    styles: for each line which of the colours it has and whether it is dashed (default: one after another, none).
    """
    with rc_context(STYLE):
        figure, axes = _axes()
        for number, (name_of_line, (x, y)) in enumerate(series.items()):
            place, dashed = (styles or {}).get(name_of_line, (number, False))
            drawn = {"color": SERIES[place % len(SERIES)], "linestyle": (0, (3, 2)) if dashed else "-"}
            face = {"markerfacecolor": "none"} if dashed else {}
            axes.plot(x, y, linewidth=1.5, marker="o" if len(x) < 25 else None, markersize=3, **drawn, **face)
        if diagonal:
            axes.axline((0, 0), slope=1, color=INK, linewidth=1, linestyle=":")
            axes.set(xlim=(0, 1), ylim=(0, 1))
        if at is not None:
            axes.axvline(at, color=INK, linewidth=1, linestyle=":")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if xlim:
            axes.set_xlim(xlim)
        return _svg(figure, label, name)


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.0, 2.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.07, h_pad=0.05)
    axes = figure.subplots()
    axes.grid(True)
    return figure, axes


def _colors(series: Mapping) -> list[str]:
    return [SERIES[place % len(SERIES)] for place in range(len(series))]


def _plain(value: float, _: int) -> str:
    return f"{value:,.0f}"


def _ratio(value: float, _: int) -> str:
    side = f"{2 ** abs(value):g}"
    return f"1:{side}" if value < 0 else f"{side}:1"


def _svg(figure: Figure, label: str, name: str) -> str:
    """The figure as an `<svg>` element; `label` is read aloud and must be plain text of ours."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text)
    text = re.sub(r'(<svg)[^>]*?(viewBox="[^"]*")[^>]*>', rf'\1 role="img" aria-label="{label}" \2>', text, count=1)
    text = re.sub(r'(\bid="|="#|url\(#)', rf"\g<1>{name}-", text)
    for place, color in enumerate(SERIES, 1):
        text = text.replace(color, f"var(--series-{place})")
    return text.replace(INK, "var(--ink)").replace(GRID, "var(--line)").strip()
