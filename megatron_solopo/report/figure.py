"""What all pictures share: two themes, styled axes, lines with bands, heat maps, and writing SVG and PNG.

Colour-blind readers can tell the colours apart.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

# The browser's own typeface. matplotlib lays out by DejaVu Sans, which is wider than all of these.
_TYPEFACES = "system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans'"
_PNG_DPI = 160


@dataclass(frozen=True)
class Theme:
    """The colours of one appearance of a page."""

    text: str
    muted: str
    grid: str
    background: str
    series: tuple[str, ...]
    """One for each run, after Okabe and Ito (2008). Further runs take the same colours with another line."""
    ramp: str
    """matplotlib's name for the colours of a heat map."""

    def colour(self, place: int) -> str:
        """The colour of a run, by its place on the command line."""
        return self.series[place % len(self.series)]

    def line(self, place: int) -> str:
        """The line style of a run: solid until all colours are in use."""
        return ("-", "--", ":", "-.")[place // len(self.series) % 4]


LIGHT = Theme(
    text="#1f2328",
    muted="#656d76",
    grid="#d8dee4",
    background="#ffffff",
    series=("#0072b2", "#d55e00", "#009e73", "#b3589a", "#a67c00", "#3a3f45"),
    ramp="YlGnBu",
)
DARK = Theme(
    text="#e6edf3",
    muted="#9198a1",
    grid="#30363d",
    background="#0d1117",
    series=("#58a6ff", "#ff9e5e", "#3fd0a4", "#f0a6cf", "#e3b341", "#c9d1d9"),
    ramp="viridis",
)
_MARKERS = "osD^vP"


@dataclass(frozen=True)
class Picture:
    """A picture of the page, which `draw` makes in either theme."""

    name: str
    """Name of its PNG file without the suffix."""
    title: str
    caption: str
    alt: str
    """What it shows in words, for readers who do not see it."""
    draw: Callable[[Theme], Figure]


def empty_figure(theme: Theme, width: float, height: float) -> Figure:
    """An empty figure of a size in inches. It needs no display and shares no state."""
    return Figure(figsize=(width, height), facecolor=theme.background, layout="constrained")


@dataclass(frozen=True)
class RenderedPicture:
    """A picture as SVG in both themes, and as PNG in the light one."""

    picture: Picture
    light: str
    """Data URI of the SVG in the light theme."""
    dark: str
    """Data URI of the SVG in the dark theme."""
    png: bytes


def render(picture: Picture) -> RenderedPicture:
    """Draw a picture in both themes."""
    stream = io.BytesIO()
    light = picture.draw(LIGHT)
    light_uri = _svg_uri(light, picture.name)
    light.set_layout_engine("none")  # the layout is done; doing it again is slow
    light.savefig(stream, format="png", dpi=_PNG_DPI)
    return RenderedPicture(picture, light_uri, _svg_uri(picture.draw(DARK), picture.name), stream.getvalue())


def _svg_uri(drawn: Figure, name: str) -> str:
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        drawn.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue().decode().replace("'DejaVu Sans'", _TYPEFACES)
    return f"data:image/svg+xml;base64,{base64.b64encode(text.encode()).decode()}"


HeatMapCells = Mapping[tuple[str, str], tuple[float, int]]
"""(column, row) -> (share in [0, 1], count). Columns are in order of appearance."""
_MAPS_PER_ROW = 3


@dataclass(frozen=True)
class LengthPoint:
    """An estimate with its 95 % interval at one context length in tokens."""

    length: int
    mean: float
    low: float
    high: float
    count: int
    """Number of answers or triplets behind the estimate."""


def style_axes(axis: Axes, theme: Theme, title: str = "", x: str = "", y: str = "") -> None:
    """Give axes the theme's colours, a light grid and no box."""
    axis.set_facecolor(theme.background)
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=theme.text)
    axis.set_xlabel(x, color=theme.muted, fontsize=9)
    axis.set_ylabel(y, color=theme.muted, fontsize=9)
    axis.tick_params(colors=theme.muted, labelsize=9, length=0)
    axis.grid(color=theme.grid, linewidth=0.8)
    axis.set_axisbelow(True)
    for side in axis.spines.values():
        side.set_visible(False)


def add_legend(axis: Axes, theme: Theme) -> None:
    """Add a legend if any line has a label."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=9, labelcolor=theme.text, loc="best")


def draw_banded_line(
    axis: Axes, points: Sequence[LengthPoint], colour: str, label: str, place: int = 0, line: str = "-"
) -> None:
    """Draw means over the length with their intervals as a band. A single point gets a bar."""
    lengths = [point.length for point in points]
    means = [point.mean for point in points]
    low, high = [point.low for point in points], [point.high for point in points]
    marker = _MARKERS[place % len(_MARKERS)]
    axis.plot(lengths, means, line, color=colour, marker=marker, markersize=5, linewidth=2, label=label)
    if len(points) > 1:
        axis.fill_between(lengths, low, high, color=colour, alpha=0.15, linewidth=0)
    else:
        axis.vlines(lengths, low, high, color=colour, alpha=0.5, linewidth=2)


def scale_by_length(axis: Axes, lengths: Sequence[int]) -> None:
    """Scale the x axis by powers of two, and put ticks at the lengths that were measured."""
    ticks = sorted(set(lengths))
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticklabels([short_length(tick) for tick in ticks])
    if len(ticks) == 1:
        axis.set_xlim(ticks[0] / 2, ticks[0] * 2)


def short_length(tokens: int) -> str:
    """ "128K" for 131072, "1.5K" for 1536, "512"."""
    return f"{tokens / 1024:g}K" if tokens >= 1024 and tokens % 128 == 0 else f"{tokens:,}"


def draw_heat_map(axis: Axes, theme: Theme, cells: HeatMapCells) -> None:
    """Draw shares with their numbers. Cells without a measurement stay empty. Rows are sorted from the top."""
    # A column may lack some rows, so the rows' order of appearance says nothing.
    columns, rows = list(dict.fromkeys(column for column, _ in cells)), sorted({row for _, row in cells})
    shares = np.full((len(rows), len(columns)), np.nan)
    for (column, row), (share, _) in cells.items():
        shares[rows.index(row), columns.index(column)] = share
    axis.imshow(shares, cmap=theme.ramp, vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    axis.grid(False)
    for (column, row), (share, count) in cells.items():
        dark = (share > 0.55) != (theme.ramp == "viridis")
        place = columns.index(column), rows.index(row)
        text = f"{share:.2f}\n$n$={count}"
        axis.annotate(text, place, ha="center", va="center", fontsize=8, color="#ffffff" if dark else "#1f2328")


def draw_heat_maps(
    theme: Theme, maps: Sequence[tuple[str, HeatMapCells]], x: str = "", y: str = "", across: int = _MAPS_PER_ROW
) -> Figure:
    """A figure of heat maps, each with its title, `across` of them in a row."""
    rows = -(-len(maps) // across)
    deep = max(len({depth for _, depth in cells}) for _, cells in maps)
    drawn = empty_figure(theme, 4.2 * across, (0.55 * deep + 1.0) * rows)
    axes = drawn.subplots(
        rows, across, squeeze=False
    )  # unused places stay empty, so that a single map is not too large
    for axis, (label, cells) in zip(axes.flat, maps, strict=False):
        style_axes(axis, theme, label, x, y)
        draw_heat_map(axis, theme, cells)
    for axis in list(axes.flat)[len(maps) :]:
        axis.set_visible(False)
    return drawn
