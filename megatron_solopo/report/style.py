"""How pictures look: two themes, colours that the colour-blind can tell apart, SVG and PNG."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure

# A browser's own typeface; matplotlib lays out by DejaVu Sans, which is wider than all of these.
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
    """After Okabe and Ito (2008); one for each run, then again from the first with another line."""
    ramp: str
    """Matplotlib's name of the colours of a heat map."""

    def colour(self, place: int) -> str:
        """Of a run, by its place on the command line."""
        return self.series[place % len(self.series)]

    def line(self, place: int) -> str:
        """Its line: solid, until the colours are used up."""
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
MARKERS = "osD^vP"


@dataclass(frozen=True)
class Picture:
    """A plot of the page, to be drawn in each theme."""

    name: str
    """Of its PNG file, without the ending."""
    title: str
    caption: str
    alt: str
    """What it shows, in words."""
    draw: Callable[[Theme], Figure]


def figure(theme: Theme, width: float, height: float) -> Figure:
    """An empty figure, in inches, without a display and without state that others share."""
    return Figure(figsize=(width, height), facecolor=theme.background, layout="constrained")


@dataclass(frozen=True)
class Rendered:
    """A picture as files: SVGs in data URIs, and a light PNG."""

    picture: Picture
    light: str
    dark: str
    png: bytes


def render(picture: Picture) -> Rendered:
    """Draw a picture in both themes."""
    stream = io.BytesIO()
    light = picture.draw(LIGHT)
    light_uri = _svg_uri(light, picture.name)
    light.set_layout_engine("none")  # laid out already, and that is the slow part
    light.savefig(stream, format="png", dpi=_PNG_DPI)
    return Rendered(picture, light_uri, _svg_uri(picture.draw(DARK), picture.name), stream.getvalue())


def _svg_uri(drawn: Figure, name: str) -> str:
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        drawn.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue().decode().replace("'DejaVu Sans'", _TYPEFACES)
    return f"data:image/svg+xml;base64,{base64.b64encode(text.encode()).decode()}"
