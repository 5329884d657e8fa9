# SPDX-License-Identifier: Apache-2.0
"""The report of a real engine: what it says, that it escapes, and how it looks and is used in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lynx_compile.engine.manifest import (
    AtOutput,
    AtSteps,
    BackendVersion,
    Budget,
    CandidateForm,
    EngineFile,
    HalfOfSteps,
    LinearChoice,
    Manifest,
    Weights,
)
from lynx_compile.files.outputs import Outputs
from lynx_compile.tools import compare, report
from lynx_compile.tools.comparison import Comparison, EngineRun
from tests.tools.browser import CHROMIUM, Browser, Scheme

pytestmark = pytest.mark.slow
WIDTHS = {"phone": 390, "desktop": 1200}
ENTER, ESCAPE, TAB = ("Enter", 13, "\r"), ("Escape", 27), ("Tab", 9)
NAMED = {
    "button",
    "link",
    "image",
    "img",
    "table",
    "dialog",
    "region",
    "figure",
    "heading",
    "DisclosureTriangle",
}


@pytest.fixture(scope="module")
def compared(compiled_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine after ``compare``, so that the page has all of its parts."""
    folder = tmp_path_factory.mktemp("report") / "out"
    shutil.copytree(compiled_tiny.parent, folder)
    engine = folder / compiled_tiny.name
    compare.compare(engine)
    return engine


@pytest.fixture
def manifest(compared: Path) -> Manifest:
    return Manifest.read(compared.with_suffix(".json"))


@pytest.fixture
def comparison(compared: Path) -> Comparison:
    found = Comparison.read(compared.with_suffix(".compare.json"))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


class Elements(HTMLParser):
    """Every element's name and attributes, and all text; refuses what is not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_compilation_leaves_it(compiled_tiny: Path) -> None:
    page = compiled_tiny.with_suffix(".html").read_text()
    manifest = Manifest.read(compiled_tiny.with_suffix(".json"))
    elements = Elements(page)
    assert "17 of 30 linears" in elements.text and "Not drawn yet" in elements.text
    assert "Not compared yet" in elements.text and "no budget decided on this engine" in elements.text
    speed, error, size = numbers_of(page)
    assert speed.endswith("x") and error == "not measured" and size == f"{manifest.engine.bytes / 1e6:.1f} MB"
    assert "by the roofline of an H100: predicted, not measured" in elements.text
    for node in manifest.sparse:
        for linear, expected in zip(node.linears, node.errors, strict=True):
            said = dialog_of(page, linear)
            assert "Became 2:4 weights." in said and "No other candidates were weighed" in said
            own = f"Layer error: {expected:.4f} solved, not tuned, expected from the calibration; not measured yet."
            assert own in said
    for linear in manifest.dense:
        assert f"Became dense: {linear.reason}." in dialog_of(page, linear.linear)
    assert all(stage.name in elements.text for stage in manifest.stages)


def test_everything_that_was_measured_is_in_it(
    compared: Path, manifest: Manifest, comparison: Comparison
) -> None:
    page = page_of(compared)
    elements = Elements(page)
    for linear in comparison.linears:
        own = f"{linear.expected:.4f} solved, not tuned, expected from the calibration; {linear.error:.4f} by compare."
        assert own in dialog_of(page, linear.linear)
    for step in comparison.output:
        assert f"step {step.step}, t = {step.timestep:.3f}: {step.error:.4f}" in elements.text
    whole = np.sqrt(np.mean([step.error**2 for step in comparison.output]))
    assert numbers_of(page)[1] == f"{whole:.4f}"
    same = "by compare on calls held out, of other noise but the same prompts."
    assert (same in elements.text) == ("other prompts" in comparison.not_measured)
    assert (
        comparison.images is not None and f"{comparison.images.mean_psnr:.1f} dB on average" in elements.text
    )
    samples = [a for tag, a in elements.found if tag == "img"]
    assert len(samples) == len(comparison.images.psnr) and all(a["alt"] for a in samples)
    assert all(f"{psnr:.1f} dB" in elements.text for psnr in comparison.images.psnr)
    levels = {path: cell["class"] for path, cell in cells_of(elements).items()}
    assert len(levels) == 17 + len([x for x in manifest.dense if "blocks" in x.linear])
    order = sorted(comparison.linears, key=lambda linear: linear.error)
    shown = [int(str(levels[linear.linear])[-1]) for linear in order]
    assert shown == sorted(shown) and shown[0] < shown[-1] == 4


def page_of(engine: Path) -> str:
    return engine.with_suffix(".html").read_text()


def numbers_of(page: str) -> list[str]:
    return re.findall(r'<dd class="value[^>]*>([^<]*)</dd>', page)


def dialog_of(page: str, linear: str) -> str:
    """What the page says of a linear that is chosen in the picture; white space made one."""
    (dialog,) = re.findall(rf"<h3 id=\"name-\d+\">{re.escape(linear)}</h3>(.*?)</div>", page, re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", dialog).split()).replace(" .", ".").replace(" :", ":")


def row_of(page: str, linear: str) -> str:
    """What the table of all linears says of one."""
    name = re.escape(linear.replace(".", ".<wbr>"))
    (row,) = re.findall(rf'<tr><th scope="row" class="path">{name}</th>(.*?)</tr>', page, re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", row).split())


def cells_of(elements: Elements) -> dict[str, dict[str, str | None]]:
    """The picture's buttons by the linear that they name."""
    buttons = [a for tag, a in elements.found if tag == "button" and "cell" in str(a["class"])]
    return {str(a["aria-label"]).split(":")[0]: a for a in buttons}


def judged(manifest: Manifest) -> Manifest:
    """As if a budget had decided: every linear's candidates, the one that it has chosen."""
    choices = []
    for number, path in enumerate(path for node in manifest.sparse for path in node.linears):
        forms: tuple[tuple[Any, bool, float, float | None], ...] = (
            ("none", False, 1.0, 0.0),
            ("none", True, 1.7, 0.0004 * (number + 1)),
            ("activation", True, 1.8, None),
            ("weight", False, 2.3, 0.001 * (number + 1)),
        )
        candidates = tuple(
            CandidateForm(operand=operand, fp8=fp8, gain=gain, measured=fp8 or not number, error=error)
            for operand, fp8, gain, error in forms
        )
        choices.append(
            LinearChoice(
                linear=path, candidates=candidates, chosen=3, reason=f"why of {path}", microseconds=46.0
            )
        )
    errors = AtOutput(predicted=0.0125, solved=0.012, tuned=0.0117)
    steps = (
        AtSteps(first=0, last=1, predicted=0.01, solved=0.0102, tuned=None),
        AtSteps(first=2, last=2, predicted=0.02, solved=None, tuned=None),
    )
    budget = Budget(
        limit="max_output_error", value=0.015, speed=1.87, error=errors, psnr=None, calls=20, steps=steps,
        halves=(HalfOfSteps(first=0, last=1, speed=1.9), HalfOfSteps(first=2, last=3, speed=1.6)),
        stepped_back=(choices[0].linear,), linears=tuple(choices),
    )  # fmt: skip
    return manifest.model_copy(update={"budget": budget, "costs": "gpu.json"})


def test_a_budget_shows_what_it_weighed(manifest: Manifest) -> None:
    found = judged(manifest)
    page = report.render(found, None, None)
    text = " ".join(Elements(page).text.split())
    assert numbers_of(page)[:2] == ["1.87x", "0.0117"]
    assert "measured on 20 calls held out; at most 0.015 was allowed." in text
    assert "by gpu.json, and where that says nothing by the roofline of an H100: predicted" in text
    assert found.budget is not None
    for choice in found.budget.linears:
        said = dialog_of(page, choice.linear)
        assert said.count("(chosen)") == 1 and f"Became 2:4 weights: {choice.reason}." in said
        assert "dense FP8 1.70x 27.1 µs" in said and "2:4 activations in FP8 1.80x 25.6 µs not solved" in said
        first = (
            choice is found.budget.linears[0]
        )  # the only one whose speed was measured, and that stepped back
        speed = "2.30x" if first else "2.30x*"
        assert f"2:4 weights (chosen) {speed} 20 µs {choice.candidates[3].error:.4f}" in said
        assert ("over the budget when it was measured" in said) == first
    table = text[text.index("Predicted, solved, tuned") : text.index("By step")]
    assert "all 0.0125 0.0120 0.0117 0 to 1 0.0100 0.0102 not tuned 2 0.0200 not measured not tuned" in table
    assert "1.90x for steps 0 to 1 and 1.60x for steps 2 to 3" in table and "images not measured" in table


def tuned(manifest: Manifest) -> Manifest:
    """As if tuning had raised every linear's layer error."""
    sparse = tuple(
        node.model_copy(update={"solved_errors": tuple(error / 2 for error in node.errors)})
        for node in manifest.sparse
    )
    return manifest.model_copy(update={"sparse": sparse})


def test_layer_errors_of_solved_weights_stand_beside_those_of_tuned_ones(manifest: Manifest) -> None:
    nodes = tuple(node.model_copy(update={"solved_errors": ()}) for node in manifest.sparse)
    older = report.render(manifest.model_copy(update={"sparse": nodes}), None, None)
    solved, moved = (report.render(one, None, None) for one in (manifest, tuned(manifest)))
    assert "tuning lowers the error of the model’s output and often raises" in " ".join(moved.split())
    for node in manifest.sparse:
        for linear, error in zip(node.linears, node.errors, strict=True):
            now, was = f"{error:.4f}", f"{error / 2:.4f}"
            for page, in_dialog, in_row in (
                (moved, f"{was} solved, {now} tuned,", f"{was} {now} –"),
                (solved, f"{now} solved, not tuned,", f"{now} – –"),
                (older, now, f"{now} expected –"),
            ):
                said = f"Layer error: {in_dialog} expected from the calibration; not measured yet."
                assert said in dialog_of(page, linear) and row_of(page, linear).endswith(in_row)


def test_it_is_self_contained(compared: Path) -> None:
    page = page_of(compared)
    assert "<script" not in page and "@import" not in page and "url(" not in page
    links = [a for _, a in Elements(page).found for key in ("src", "href", "xlink:href") if key in a]
    targets = {str(a.get("src", a.get("href"))) for a in links}
    assert targets and all(to.startswith(("data:image/png;base64,", "#")) for to in targets)


def test_everything_is_escaped(manifest: Manifest, comparison: Comparison) -> None:
    evil = "</td><script>alert('x')</script>\"&"
    source = manifest.source.model_copy(update={"model": evil})
    sparse = (
        manifest.sparse[0].model_copy(
            update={"linears": (f"blocks.0.{evil}", *manifest.sparse[0].linears[1:])}
        ),
    )
    dense = (manifest.dense[0].model_copy(update={"reason": evil, "linear": evil}),)
    spoiled = manifest.model_copy(update={"source": source, "sparse": sparse, "dense": dense})
    found = comparison.model_copy(
        update={"missed": (evil,), "over_budget": evil, "metric": {evil: 1.0}, "not_measured": {evil: evil}}
    )
    page = report.render(spoiled, found, None)
    elements = Elements(page)
    assert "<script" not in page and "script" not in {tag for tag, _ in elements.found}
    assert elements.text.count(evil) >= 8


def test_every_form_has_its_words_and_letters(manifest: Manifest) -> None:
    forms = (("weight", True), ("activation", True), ("none", True), ("activation", False))
    sparse = tuple(
        node.model_copy(update={"operand": operand, "fp8": fp8, "gain": None})
        for node, (operand, fp8) in zip(manifest.sparse, forms, strict=False)
    )
    page = report.render(manifest.model_copy(update={"sparse": sparse}), None, None)
    words = ("2:4 weights in FP8", "2:4 activations in FP8", "dense FP8", "2:4 activations")
    for node, form, mark in zip(sparse, words, ("w8", "a8", "8", "a"), strict=True):
        for linear in node.linears:
            assert f"Became {form}." in dialog_of(page, linear)
            assert re.search(rf'aria-label="{re.escape(linear)}: {form}, error [\d.]+">{mark}</button>', page)
        assert re.search(rf'aria-hidden="true">{mark}</span>{form}, \d+</li>', page)
    assert "–</span>dense, " in page and "w</span>" not in page


def test_what_is_shipped_and_how_it_is_loaded(manifest: Manifest) -> None:
    file = EngineFile(file="tiny.safetensors", bytes=7_200_000, sha256="0" * 64)
    weights = Weights(mode="external", file=file.file, sha256=file.sha256, tensors=manifest.outputs)
    engine = manifest.engine.model_copy(update={"bytes": 1_000_000})
    apart = manifest.model_copy(update={"engine": engine, "weights": weights, "files": (file,)})
    page = report.render(apart, None, None)
    assert numbers_of(page)[2] == "8.2 MB" and "1.0 MB and 7.2 MB of weights in tiny.safetensors" in page
    assert "lynx_compile.load(" in page
    torch = BackendVersion(name="torch", version="2.13")
    page = report.render(apart.model_copy(update={"backend": torch}), None, None)
    assert numbers_of(page)[2] == "7.2 MB" and "lynx_compile.apply(pipe.transformer" in page
    assert "lynx_compile.load(" not in page and "trtexec" not in page


def test_a_comparison_of_another_engine_is_left_out(compared: Path, tmp_path: Path) -> None:
    for path in compared.parent.glob("tiny.*"):
        if path.is_file():
            shutil.copy(path, tmp_path)
    engine = tmp_path / compared.name
    values = json.loads(engine.with_suffix(".compare.json").read_text())
    for spoiled in (json.dumps(values | {"engine_sha256": "0" * 64}), "{", json.dumps(values | {"extra": 1})):
        engine.with_suffix(".compare.json").write_text(spoiled)
        assert "Not compared yet" in report.write(Outputs.of(engine)).read_text()


def test_what_was_not_drawn_says_why(manifest: Manifest, comparison: Comparison) -> None:
    without = comparison.model_copy(
        update={"images": None, "not_measured": {"images": "there is no pipeline"}}
    )
    assert "Not drawn: there is no pipeline." in report.render(manifest, without, None)
    assert "is not beside the engine any more" in report.render(manifest, comparison, Path("gone.png"))


def flux_sized(manifest: Manifest, comparison: Comparison, sheet: Path) -> str:
    """A page of FLUX.1-dev's size, with both engines measured: the widest that is to be expected."""
    double = [n for n in manifest.sparse if not n.layer.startswith("single")]
    single = [n for n in manifest.sparse if n.layer.startswith("single")]
    sparse = [
        node.model_copy(
            update={
                "layer": node.layer.replace(".0.", f".{block}.", 1),
                "linears": tuple(linear.replace(".0.", f".{block}.", 1) for linear in node.linears),
                "errors": tuple((block + 1) * error for error in node.errors),
                "solved_errors": tuple(block * error for error in node.errors),
            }
        )
        for nodes, count in ((double, 19), (single, 38))
        for block in range(count)
        for node in nodes
    ]
    engines = tuple(
        EngineRun(kind=kind, steps=comparison.output, milliseconds=123.4) for kind in ("dense", "lynx")
    )
    found = comparison.model_copy(update={"engines": engines, "linears": ()})
    return report.render(judged(manifest.model_copy(update={"sparse": tuple(sparse)})), found, sheet)


FIRST = "button.cell[aria-label^='transformer_blocks.0.attn.to_q']"
# Text that is shown, with the colours that a person sees: of the nearest background that is not transparent.
LOOKS = """(() => {
  const rgb = colour => colour.match(/[\\d.]+/g).map(Number);
  const shown = [...document.querySelectorAll("body *")].filter(e => e.checkVisibility()
    && [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()));
  const behind = e => {
    const c = rgb(getComputedStyle(e).backgroundColor);
    return c[3] === 0 && e.parentElement ? behind(e.parentElement) : c;
  };
  const inside = e => e.closest(".scroll, pre, .skip, .hidden, title");
  const wide = document.documentElement.clientWidth;
  return {
    width: innerWidth, scroll: document.documentElement.scrollWidth,
    clipped: [...document.querySelectorAll("body *")].filter(e => e.checkVisibility() && !inside(e)
      && e.getBoundingClientRect().right > wide + 0.5).map(e => e.outerHTML.slice(0, 80)),
    scrolled: [...document.querySelectorAll(".scroll")].map(e => e.scrollWidth - e.clientWidth),
    cells: [...document.querySelectorAll("button.cell")].map(e => Math.min(e.offsetWidth, e.offsetHeight)),
    smallest: Math.min(...shown.map(e => parseFloat(getComputedStyle(e).fontSize))),
    page: rgb(getComputedStyle(document.body).backgroundColor),
    colours: shown.filter(e => !e.closest(".skip, .hidden, title")).map(e => [e.outerHTML.slice(0, 60),
      rgb(getComputedStyle(e)[e instanceof SVGElement ? "fill" : "color"]), behind(e)]),
    headings: [...document.querySelectorAll("h1, h2, h3")].map(e => Number(e.tagName[1])),
  };
})()"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
@pytest.mark.parametrize("size", ["tiny", "flux"])
def test_in_a_browser(
    compared: Path, manifest: Manifest, comparison: Comparison, browser: Browser, tmp_path: Path, size: str
) -> None:
    sheet = compared.with_suffix(".compare.png")
    page = tmp_path / "page.html"
    page.write_text(page_of(compared) if size == "tiny" else flux_sized(manifest, comparison, sheet))
    schemes: tuple[Scheme, ...] = ("light", "dark") if size == "tiny" else ("light",)
    for width in WIDTHS.values():
        for scheme in schemes:
            browser.open(page, width, 844, scheme)
            check_looks(browser.evaluate(LOOKS), width, scheme)
            browser.click(FIRST)
            assert "Became" in shown_dialog(browser) and "to_q" in shown_dialog(browser)
            check_looks(browser.evaluate(LOOKS), width, scheme)
            with Image.open(browser.screenshot(tmp_path / f"{width}-{scheme}.png")) as picture:
                pixels = np.asarray(picture.convert("L"), dtype=float)
            assert (np.median(pixels) < 128) == (scheme == "dark") and pixels.std() > 5


def check_looks(found: dict[str, Any], width: int, scheme: Scheme) -> None:
    assert found["width"] == width and found["scroll"] <= width and found["clipped"] == []
    assert max(found["scrolled"]) <= 0, "a picture has to be scrolled sideways"
    assert found["smallest"] >= 10 and min(found["cells"]) >= 24
    assert (luminance(found["page"]) < 0.5) == (scheme == "dark")
    pale = [(text, contrast(text_of, behind)) for text, text_of, behind in found["colours"]]
    assert len(pale) > 50 and [one for one in pale if one[1] < 4.5] == []
    levels = found["headings"]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later <= before + 1 for before, later in pairwise(levels))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_by_keyboard_and_for_a_screen_reader(
    manifest: Manifest, comparison: Comparison, compared: Path, browser: Browser, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    page.write_text(report.render(judged(manifest), comparison, compared.with_suffix(".compare.png")))
    browser.open(page, WIDTHS["desktop"], 844, "light")
    assert shown_dialog(browser) == ""
    for _ in range(60):  # with nothing but the tabulator
        browser.press(*TAB)
        if browser.evaluate(f"document.activeElement.matches({json.dumps(FIRST)})"):
            break
    browser.press(*ENTER)
    assert "dense FP8" in shown_dialog(browser) and "(chosen)" in shown_dialog(browser)
    assert browser.evaluate("document.activeElement.getAttribute('role')") == "dialog", "it is read out"
    found = browser.accessible()
    assert ("dialog", "transformer_blocks.0.attn.to_q") in found and ("button", "Close") in found
    browser.press(*ESCAPE)
    assert shown_dialog(browser) == ""
    assert browser.evaluate(f"document.activeElement.matches({json.dumps(FIRST)})"), "back where it was"
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = browser.accessible()
    roles = {role for role, _ in found}
    assert {
        "banner",
        "main",
        "contentinfo",
        "region",
        "columnheader",
        "rowheader",
        "table",
        "button",
    } <= roles
    assert [role for role, name in found if role in NAMED and not name] == []
    assert ("button", "transformer_blocks.0.attn.to_q: 2:4 weights, error 0.0010") in found
    assert ("rowheader", "all") in found and ("columnheader", "predicted") in found


def shown_dialog(browser: Browser) -> str:
    """The text of the linear that is shown; none where none is."""
    text: str = browser.evaluate("document.querySelector(':popover-open')?.innerText ?? ''")
    return text


def luminance(colour: Any) -> float:
    parts = [value / 255 for value in colour[:3]]
    red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return float(0.2126 * red + 0.7152 * green + 0.0722 * blue)


def contrast(one: Any, other: Any) -> float:
    """As the Web Content Accessibility Guidelines define it."""
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)
