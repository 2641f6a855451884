"""The page in a real browser: what it shows is what Python computes from the same scores."""

import csv
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from anomalib_cfa.inspect.inspection import Inspection, inspect_samples
from anomalib_cfa.inspect.predictors import Prediction
from anomalib_cfa.inspect.samples import find_samples

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("there is no Chromium: apt-get install chromium", allow_module_level=True)

NORMAL = {f"good/{index:03}.png": np.float32(60 + 3 * index) / np.float32(255) for index in range(40)}
DEFECTIVE = {
    f"{('hole', 'scratch')[index % 2]}/{index:03}.png": np.float32(100 + 5 * index) / np.float32(255)
    for index in range(30)
}
SCORES = NORMAL | DEFECTIVE


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def tab(browser: "playwright.Browser") -> Iterator["playwright.Page"]:
    """A tab of the browser for all tests: a new one takes longer than most of them."""
    context = browser.new_context(accept_downloads=True)
    yield context.new_page()
    context.close()


@pytest.fixture
def page(tab: "playwright.Page", inspection: Inspection) -> Iterator["playwright.Page"]:
    """The page, opened anew from the disk; it must not complain, nor ask for anything that is not its own."""
    complaints: list[str] = []
    requests: list[str] = []
    listeners: dict[str, Callable[[Any], None]] = {
        "console": lambda message: complaints.append(message.text),
        "pageerror": lambda error: complaints.append(str(error)),
        "request": lambda request: requests.append(request.url),
    }
    tab.goto("about:blank")  # from there an address is loaded, whatever the fragment
    tab.set_viewport_size({"width": 1300, "height": 850})
    for event, listener in listeners.items():
        tab.on(event, listener)
    tab.goto(inspection.page.as_uri())
    tab.wait_for_selector(".tile")
    yield tab
    tab.wait_for_timeout(50)
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    folder = inspection.page.parent.as_uri()
    assert requests[0] == inspection.page.as_uri()
    assert complaints == []
    assert [url for url in requests if not url.startswith((folder, "data:", "blob:"))] == []


def facts(page: "playwright.Page", side: str = "image") -> dict[str, str]:
    found = page.query_selector_all(f"#{side}-counts dd")
    return {fact.get_attribute("data-fact"): fact.inner_text() for fact in found}


def slide(page: "playwright.Page", slider: str, value: float) -> None:
    page.eval_on_selector(
        slider, "(it, value) => { it.value = value; it.dispatchEvent(new Event('input', {bubbles: true})); }", value
    )


def names(page: "playwright.Page") -> list[str]:
    """Names of all images listed, in their order."""
    return page.evaluate("order.map((index) => images[index].name)")


def test_the_slider_changes_the_counts_to_what_python_computes(page: "playwright.Page") -> None:
    for threshold in (0.0, 0.3, 0.555, 0.8, 1.0):
        slide(page, "#image-slider", threshold)
        missed = sum(score <= threshold for score in DEFECTIVE.values())
        alarms = sum(score > threshold for score in NORMAL.values())
        found = len(DEFECTIVE) - missed
        assert facts(page) == {
            "missed": f"{missed} of 30",
            "false alarms": f"{alarms} of 40",
            "precision": f"{100 * found / (found + alarms):.1f} %" if found + alarms else "\u2013",
            "recall": f"{100 * found / 30:.1f} %",
        }
        assert page.inner_text("#image-found") == f"{100 * alarms / 40:.1f} %"
        assert page.input_value("#image-threshold") == f"{threshold:g}"


def test_the_pixel_slider_counts_pixels(page: "playwright.Page") -> None:
    for threshold in (0.05, 0.4, 0.7):
        slide(page, "#pixel-slider", threshold)
        value = np.float32(threshold)
        levels = [
            (np.float32(100 + 5 * index) / np.float32(255), np.float32(90 + 4 * index) / 255) for index in range(30)
        ]
        found = 200 * sum(large > value for large, _ in levels)
        alarms = 16 * (sum(small > value for _, small in levels) + sum(score > value for score in NORMAL.values()))
        ground = threshold < 20 / 255
        assert not ground or threshold == 0.05
        if ground:
            alarms = 70 * 48 * 64 - 30 * 200
        assert facts(page, "pixel")["recall"] == f"{100 * found / 6000:.1f} %"
        assert facts(page, "pixel")["precision"] == f"{100 * found / (found + alarms):.1f} %"


def test_the_rate_asked_for_is_kept_by_the_lowest_threshold(page: "playwright.Page") -> None:
    for rate in (0, 5, 12.5, 60, 100):
        page.fill("#image-asked", str(rate))
        threshold = float(page.input_value("#image-threshold"))
        alarms = sum(score > threshold for score in NORMAL.values())
        assert alarms <= rate / 100 * 40
        assert threshold == 0 or sum(score > threshold - 2e-4 for score in NORMAL.values()) > rate / 100 * 40


def test_the_pixel_rate_asked_for_is_kept_by_the_lowest_threshold(page: "playwright.Page") -> None:
    page.fill("#pixel-asked", "0.2")
    threshold = float(page.input_value("#pixel-threshold"))
    allowed = 0.002 * (70 * 48 * 64 - 30 * 200)
    assert page.evaluate("(threshold) => pixelCounts(threshold).alarms", threshold) <= allowed
    assert page.evaluate("(threshold) => pixelCounts(threshold).alarms", threshold - 0.001) > allowed


def test_sorting(page: "playwright.Page") -> None:
    threshold = float(page.input_value("#image-threshold"))
    wrong = {name: score - threshold for name, score in NORMAL.items()}
    wrong |= {name: threshold - score for name, score in DEFECTIVE.items()}
    orders = {
        "name": sorted(SCORES),
        "score": sorted(sorted(SCORES), key=SCORES.get, reverse=True),
        "rising": sorted(sorted(SCORES), key=SCORES.get),
        "wrong": sorted(sorted(SCORES), key=wrong.get, reverse=True),
    }
    for choice, expected in orders.items():
        page.select_option("#sort", choice)
        shown = names(page)
        key = {"wrong": wrong, "name": dict(zip(expected, range(70), strict=True))}.get(choice, SCORES)
        assert [key[name] for name in shown] == pytest.approx([key[name] for name in expected], abs=1e-6)
        page.wait_for_function(
            "(name) => document.querySelector('.tile[data-place=\"0\"] .name').textContent === name", arg=shown[0]
        )


def test_filtering(page: "playwright.Page") -> None:
    slide(page, "#image-slider", 0.5)
    filters = {
        "missed": {name for name, score in DEFECTIVE.items() if score <= 0.5},
        "alarm": {name for name, score in NORMAL.items() if score > 0.5},
        "positive": {name for name, score in SCORES.items() if score > 0.5},
    }
    for choice, expected in filters.items():
        page.select_option("#show", choice)
        assert set(names(page)) == expected
        assert page.inner_text("#shown") == f"{len(expected)} of 70"
    page.select_option("#show", "")
    page.select_option("#kind", "hole")
    page.fill("#word", "02")
    assert set(names(page)) == {name for name in SCORES if name.startswith("hole/") and "02" in name}
    page.fill("#word", "nothing is called so")
    assert page.query_selector_all(".tile") == [] or page.wait_for_selector(".tile", state="detached") is None


def test_only_tiles_in_sight_exist_and_arrow_keys_walk_through_all(page: "playwright.Page") -> None:
    assert 0 < len(page.query_selector_all(".tile")) < 70
    page.focus("#grid")
    page.keyboard.press("End")
    page.wait_for_selector('.tile[aria-selected="true"][data-place="69"]')
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.inner_text("#viewer-name") == names(page)[1]
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#viewer-name") == names(page)[2]
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#viewer-name") == names(page)[0]
    page.keyboard.press("Escape")
    assert not page.is_visible("#viewer")


def test_an_opened_image_shows_regions_outlines_and_the_reason(page: "playwright.Page") -> None:
    page.evaluate("openViewer(images.findIndex((image) => image.name === 'hole/028.png'))")
    page.wait_for_selector("#outlines .true")
    assert [row.inner_text().split("\t") for row in page.query_selector_all("#regions tbody tr")] == [
        ["1", "200", f"{240 / 255:.3f}"],
        ["2", "16", f"{202 / 255:.3f}"],
    ]
    assert page.get_attribute("#outlines .found", "d").count("M") == 2 * (10 + 20) + 2 * (4 + 4)
    slide(page, "#viewer-pixel", 0.9)  # above the small region
    assert page.get_attribute("#outlines .found", "d").count("M") == 2 * (10 + 20)
    assert len(page.query_selector_all("#regions tbody tr")) == 1
    page.keyboard.press("o")
    page.keyboard.press("m")
    assert page.query_selector_all("#outlines path") == []
    assert page.is_visible("#reason")
    assert page.inner_text("#nearest-name") == "000.png"
    for picture in ("#picture", "#nearest", "#worst"):
        page.wait_for_function(f"document.querySelector('{picture}').naturalWidth > 0")


def test_the_strength_of_the_heat_map(page: "playwright.Page") -> None:
    page.evaluate("openViewer(images.findIndex((image) => image.name === 'hole/028.png'))")
    page.wait_for_selector("#outlines .found")
    pixel = """() => {
        const copy = new OffscreenCanvas(64, 48).getContext('2d', { willReadFrequently: true });
        copy.drawImage(document.querySelector('#heat'), 0, 0);
        return Array.from(copy.getImageData(20, 15, 1, 1).data);
    }"""
    slide(page, "#strength", 1)
    strong = page.evaluate(pixel)
    slide(page, "#strength", 0)
    assert page.evaluate(pixel)[3] == 0
    assert strong[3] == 255
    assert strong[:3] == page.evaluate("COLOURS[240]")


def test_the_fragment_keeps_the_state(page: "playwright.Page") -> None:
    slide(page, "#image-slider", 0.432)
    page.select_option("#sort", "wrong")
    page.select_option("#kind", "scratch")
    page.evaluate("openViewer(order[2])")
    opened, address = page.inner_text("#viewer-name"), page.url
    assert "image=0.432" in address
    page.goto("about:blank")
    page.goto(address)
    page.wait_for_selector("#viewer[open]")
    assert page.inner_text("#viewer-name") == opened
    assert page.input_value("#image-threshold") == "0.432"
    assert page.input_value("#sort") == "wrong"
    assert names(page)[2] == opened


def test_the_csv_holds_all_images_with_their_verdicts(page: "playwright.Page", tmp_path: Path) -> None:
    slide(page, "#image-slider", 0.5)
    page.select_option("#kind", "hole")  # the file holds the others, too
    with page.expect_download() as download:
        page.click("#csv")
    download.value.save_as(tmp_path / "inspection.csv")
    with (tmp_path / "inspection.csv").open(newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert {name: np.float32(row["score"]) for name, row in rows.items()} == SCORES
    for name, row in rows.items():
        positive = SCORES[name] > 0.5
        error = "" if positive == (name in DEFECTIVE) else "false alarm" if positive else "missed"
        assert (row["called_defective"], row["error"]) == (str(int(positive)), error)


def test_the_line_to_paste_names_the_thresholds_and_quotes_the_path(page: "playwright.Page") -> None:
    page.fill("#image-threshold", "0.4321")
    line = page.inner_text("#line")
    assert line.startswith(
        "python -m anomalib_cfa.inspect.thresholds 'a model'\\''s/model.ckpt' --image 0.4321 --pixel 0.4"
    )
    page.click("#reset")
    assert "--image 0.6" in page.inner_text("#line")


class Near:
    """A threshold of 0.3217 for images and pixels, and scores on either side that are near it."""

    view = (0.0, 0.0, 1.0, 1.0)
    checkpoint = None

    def predict(self, image: Image.Image) -> Prediction:
        score = np.float32(0.3218 if image.getpixel((0, 0))[0] else 0.3216)
        scores = np.full((8, 8), score)
        return Prediction(float(score), scores, bool(score > 0.3217), scores > 0.3217)


def test_the_models_own_thresholds_keep_their_decimals(tab: "playwright.Page", tmp_path: Path) -> None:
    for kind, red in (("good", 0), ("hole", 255)):
        (tmp_path / "test" / kind).mkdir(parents=True)
        Image.new("RGB", (8, 8), (red, 0, 0)).save(tmp_path / "test" / kind / "000.png")
    result = inspect_samples(Near(), find_samples(tmp_path), tmp_path / "page.html", "", "", embed=True)
    tab.goto(result.page.as_uri())
    tab.wait_for_selector(".tile")
    assert tab.input_value("#image-threshold") == tab.input_value("#pixel-threshold") == "0.3217"
    assert (facts(tab)["missed"], facts(tab)["false alarms"]) == ("0 of 1", "0 of 1")
    assert "--image 0.3217 --pixel 0.3217" in tab.inner_text("#line")


def test_names_are_text_and_never_markup(page: "playwright.Page", inspection: Inspection) -> None:
    assert page.inner_text("h1") == "<b>parts"
    assert page.inner_text("header code") == "</script>model"
    assert page.inner_text("#unreadable summary") == "1 files could not be judged"
    assert unquote(page.url).startswith("file://")


def test_no_width_needs_scrolling_sideways(page: "playwright.Page") -> None:
    for width in (360, 820, 1300):
        page.keyboard.press("Escape")  # the image of the width before
        page.wait_for_selector("#viewer", state="hidden")
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_timeout(100)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.evaluate("openViewer(order[0])")
        assert page.evaluate("document.querySelector('#viewer').scrollWidth") <= width
