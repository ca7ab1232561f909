"""The page in a real browser: no errors, no requests, and plots that show something, in light and in dark."""

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_solopo.report.figure import DARK, LIGHT, Theme
from megatron_solopo.report.page import write_comparison
from tests.report.browser import chromium
from tests.report.written_runs import write_answers, write_preferences, write_run

PLOTS = [
    "accuracy-by-length",
    "accuracy-by-task",
    "reward-accuracy-by-length",
    "accuracy-by-depth",
    "reward-accuracy-by-depth",
    "losses",
    "rewards",
    "gap",
    "gradient-and-throughput",
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    runs = [write_run(folder / name, seed=place) for place, name in enumerate(("solopo", "long_po"))]
    for place, run in enumerate(runs):
        write_answers(run, skill=0.9 - 0.4 * place, step=120, tasks=("niah", "qa"))
        write_preferences(run, skill=0.9 - 0.4 * place, step=120)
    return write_comparison(runs, folder / "report")


@pytest.fixture(scope="module")
def seen(page: Path) -> dict[str, Any]:
    """By scheme: a picture of every plot's rectangle; and all that the browser complained about or asked for."""
    found: dict[str, Any] = {"complaints": [], "requests": []}
    with chromium() as browser:
        for scheme in ("light", "dark"):
            tab = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme=scheme)
            tab.on("console", lambda message: found["complaints"].append(message.text))
            tab.on("pageerror", lambda error: found["complaints"].append(str(error)))
            tab.on("request", lambda request: found["requests"].append(request.url))
            tab.goto(page.as_uri(), wait_until="networkidle")
            shots = {plot.get_attribute("id"): plot.locator("img").screenshot() for plot in tab.locator("figure").all()}
            found[scheme] = {name: Image.open(io.BytesIO(shot)).convert("RGB") for name, shot in shots.items()}
            found["text"] = tab.locator("body").inner_text()
            found["width"] = tab.evaluate("document.documentElement.scrollWidth")
    return found


def test_the_page_asks_for_nothing_and_complains_of_nothing(seen: dict[str, Any], page: Path) -> None:
    outside = [url for url in seen["requests"] if url != page.as_uri() and not url.startswith("data:")]
    assert (seen["complaints"], outside) == ([], [])
    assert len(seen["requests"]) >= 2, "both visits were watched"


@pytest.mark.parametrize(("scheme", "theme"), [("light", LIGHT), ("dark", DARK)])
def test_every_plot_shows_both_runs_on_its_own_background(seen: dict[str, Any], scheme: str, theme: Theme) -> None:
    assert list(seen[scheme]) == PLOTS
    for name, picture in seen[scheme].items():
        assert picture.width > 900 and picture.height > 200, name
        assert near(picture, theme.background) > 0.2 * picture.width * picture.height or "depth" in name, name
        wanted = [theme.text] if "depth" in name else [theme.colour(0), theme.colour(1), theme.text]
        for colour in wanted:
            assert near(picture, colour) > 40, f"{name}: no {colour} in {scheme}"
    for name in ("accuracy-by-depth", "reward-accuracy-by-depth"):
        colours = seen[scheme][name].getcolors(maxcolors=1 << 20)
        assert sum(count > 500 for count, _ in colours) > 6, f"{name}: no heat map in {scheme}"


def near(picture: Image.Image, colour: str) -> int:
    """Pixels within 24 levels of a colour in every channel."""
    wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    counts = picture.getcolors(maxcolors=1 << 22)
    return sum(count for count, pixel in counts if max(abs(a - b) for a, b in zip(pixel, wanted, strict=True)) <= 24)


def test_the_page_is_readable_and_does_not_scroll_sideways(seen: dict[str, Any]) -> None:
    assert seen["width"] <= 1200
    headings = (
        "Accuracy against context length",
        "Verdict",
        "How training went",
        "What it cost",
        "What was set differently",
    )
    places = [seen["text"].find(heading) for heading in headings]
    assert -1 not in places and places == sorted(places)
