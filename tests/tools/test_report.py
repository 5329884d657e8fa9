# SPDX-License-Identifier: Apache-2.0
"""The report of a real engine: what it says, that it escapes, and how it looks in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lynx_compile.engine.manifest import Manifest
from lynx_compile.files.outputs import Outputs
from lynx_compile.tools import compare, report
from lynx_compile.tools.comparison import Comparison, EngineRun

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
DARK = "--blink-settings=preferredColorScheme=0"
WIDTHS = {"phone": 390, "desktop": 1200}


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
        if tag not in ("meta", "br", "img"):
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
    assert "17 of 30" in elements.text and "Not compared yet" in elements.text
    for node in manifest.sparse:
        for linear, error in zip(node.linears, node.errors, strict=True):
            assert f"{linear}: 2:4 weights, expected error {error:.4f}, expected gain" in elements.text
    for linear in manifest.dense:
        assert linear.linear in elements.text and linear.reason in elements.text
    assert all(stage.name in elements.text for stage in manifest.stages)


def test_everything_that_was_measured_is_in_it(
    compared: Path, manifest: Manifest, comparison: Comparison
) -> None:
    elements = Elements(compared.with_suffix(".html").read_text())
    for linear in comparison.linears:
        assert (
            f"{linear.linear}: 2:4 weights, expected error {linear.expected:.4f}, measured " in elements.text
        )
        assert f"{linear.error:.4f}" in elements.text
    for step in comparison.output:
        assert f"step {step.step}, t = {step.timestep:.3f}: {step.error:.4f}" in elements.text
    assert comparison.images is not None and f"{comparison.images.mean_psnr:.1f} dB" in elements.text
    rects = [a for tag, a in elements.found if tag == "rect" and (a["class"] or "").startswith("cell l")]
    assert len(rects) == 17  # one cell a sparse linear
    by_title = dict(
        re.findall(r"<g><title>(\S+): 2:4.*?</title>\s*<rect class=\"cell l(\d)", page_of(compared))
    )
    errors = {linear.linear: linear.error for linear in comparison.linears}
    order = sorted(errors, key=lambda linear: errors[linear])
    levels = [int(by_title[linear]) for linear in order]
    assert levels == sorted(levels) and levels[0] < levels[-1]


def page_of(engine: Path) -> str:
    return engine.with_suffix(".html").read_text()


def test_it_is_self_contained(compared: Path) -> None:
    page = page_of(compared)
    assert "<script" not in page and "@import" not in page and "url(" not in page
    links = [a for _, a in Elements(page).found for key in ("src", "href", "xlink:href") if key in a]
    assert links and all(str(a["src"]).startswith("data:image/png;base64,") for a in links)


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
        update={"missed": (evil,), "metric": {evil: 1.0}, "not_measured": {evil: evil}}
    )
    page = report.render(spoiled, found, None)
    elements = Elements(page)
    assert "<script" not in page and "script" not in {tag for tag, _ in elements.found}
    assert elements.text.count(evil) >= 7


def test_an_extra_kind_of_layer_is_marked(manifest: Manifest) -> None:
    sparse = tuple(node.model_copy(update={"operand": "weight"}) for node in manifest.sparse)
    page = report.render(manifest.model_copy(update={"sparse": sparse}), None, None)
    elements = Elements(page)
    assert "2:4 weights" in elements.text
    assert sum(tag == "text" and (a.get("class") or "").startswith("mark") for tag, a in elements.found) == 17


def test_every_form_has_its_words_and_letters(manifest: Manifest) -> None:
    forms = (("weight", True), ("activation", True), ("none", True), ("activation", False))
    sparse = tuple(
        node.model_copy(update={"operand": operand, "fp8": fp8, "gain": None})
        for node, (operand, fp8) in zip(manifest.sparse, forms, strict=False)
    )
    page = report.render(manifest.model_copy(update={"sparse": sparse}), None, None)
    elements = Elements(page)
    words = ("2:4 weights in FP8", "2:4 activations in FP8", "dense FP8", "2:4 activations")
    for node, form, mark in zip(sparse, words, ("w8", "8", "8", ""), strict=True):
        for linear in node.linears:
            assert re.search(
                rf"{re.escape(linear)}: {form}, expected error .*, expected gain \d", elements.text
            )
            cell = page[page.index(f"<g><title>{linear}: {form}, ") :]
            found = re.search(r'class="mark[^>]*>(\w+)</text>', cell[: cell.index("</g>")])
            assert (found[1] if found else "") == mark
    assert "in FP8" in elements.text and "w 2:4 weights" in elements.text
    without = report.render(manifest.model_copy(update={"sparse": sparse[3:]}), None, None)
    assert "in FP8" not in without


def test_a_comparison_of_another_engine_is_left_out(compared: Path, tmp_path: Path) -> None:
    for path in compared.parent.glob("tiny.*"):
        if path.is_file():
            shutil.copy(path, tmp_path)
    engine = tmp_path / compared.name
    values = json.loads(engine.with_suffix(".compare.json").read_text())
    for spoiled in (json.dumps(values | {"engine_sha256": "0" * 64}), "{", json.dumps(values | {"extra": 1})):
        engine.with_suffix(".compare.json").write_text(spoiled)
        assert "Not compared yet" in report.write(Outputs.of(engine)).read_text()


def flux_sized(manifest: Manifest, comparison: Comparison) -> str:
    """A page of FLUX.1-dev's size, with both engines measured: the widest that is to be expected."""
    double = [n for n in manifest.sparse if not n.layer.startswith("single")]
    single = [n for n in manifest.sparse if n.layer.startswith("single")]
    sparse = [
        node.model_copy(
            update={
                "layer": node.layer.replace(".0.", f".{block}.", 1),
                "linears": tuple(linear.replace(".0.", f".{block}.", 1) for linear in node.linears),
                "errors": tuple((block + 1) * error for error in node.errors),
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
    return report.render(manifest.model_copy(update={"sparse": tuple(sparse)}), found, None)


PROBE = """
<script>
addEventListener("load", () => {
  const inside = e => e.closest(".scroll, pre, details");
  const clipped = [...document.querySelectorAll("main *")].filter(e => !inside(e)
    && e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5).map(e => e.outerHTML.slice(0, 80));
  const rgb = (e, key) => getComputedStyle(e)[key].match(/[\\d.]+/g).map(Number);
  const card = document.querySelector("section");
  parent.postMessage({
    width: innerWidth, scroll: document.documentElement.scrollWidth, clipped,
    charts: [...document.querySelectorAll(".scroll")].map(e => e.scrollWidth - e.clientWidth),
    page: rgb(document.body, "backgroundColor"), card: rgb(card, "backgroundColor"),
    text: rgb(document.body, "color"), quiet: rgb(document.querySelector(".quiet"), "color"),
    bad: rgb(document.querySelector("a, .bad, .good"), "color"),
    letters: rgb(document.querySelector("svg text"), "fill"),
    smallest: Math.min(...[...document.querySelectorAll("main *")].map(e => parseFloat(getComputedStyle(e).fontSize))),
  }, "*");
});
</script></body>"""
FRAME = """<!DOCTYPE html><meta name="color-scheme" content="light dark"><body style="margin:0">
<iframe src="probe.html" style="border:0;width:{width}px;height:3000px"></iframe>
<script>addEventListener("message", m => document.documentElement.dataset.found = JSON.stringify(m.data))</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", ["phone", "desktop"])
@pytest.mark.parametrize("size", ["tiny", "flux"])
def test_in_a_browser(
    compared: Path,
    manifest: Manifest,
    comparison: Comparison,
    tmp_path: Path,
    device: str,
    scheme: str,
    size: str,
) -> None:
    """In a frame as wide as the device, since a headless window is at least 500 pixels wide."""
    page = page_of(compared) if size == "tiny" else flux_sized(manifest, comparison)
    (tmp_path / "page.html").write_text(page)
    probe = re.sub(r"<meta http-equiv[^>]*>", "", page).replace("</body>", PROBE)
    (tmp_path / "probe.html").write_text(probe)
    (tmp_path / "frame.html").write_text(FRAME.format(width=WIDTHS[device]))
    dom = browse(tmp_path, "frame.html", scheme, "--virtual-time-budget=4000", "--dump-dom")
    match = re.search(r'data-found="([^"]*)"', dom)
    assert match, dom[:500]
    found = json.loads(match[1].replace("&quot;", '"').replace("&amp;", "&").replace("&lt;", "<"))
    assert found["width"] == WIDTHS[device]
    assert found["scroll"] <= found["width"] and found["clipped"] == []
    assert max(found["charts"]) <= 0, "a picture has to be scrolled sideways"
    assert found["smallest"] >= 10
    assert (luminance(found["page"]) < 0.5) == (scheme == "dark")
    for colour in ("text", "quiet", "bad", "letters"):
        assert contrast(found[colour], found["card"]) >= 4.5, colour
    browse(tmp_path, "page.html", scheme, f"--screenshot={tmp_path / 'page.png'}")
    with Image.open(tmp_path / "page.png") as picture:
        pixels = np.asarray(picture.convert("L"), dtype=float)
    assert (np.median(pixels) < 128) == (scheme == "dark") and pixels.std() > 5


def browse(folder: Path, page: str, scheme: str, *flags: str) -> str:
    profile = folder / f"profile-{len(list(folder.iterdir()))}"
    dark = (DARK,) if scheme == "dark" else ()
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "--window-size=1250,1600", *dark, *flags]
    done = subprocess.run(
        [*command, (folder / page).as_uri()], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def luminance(colour: Any) -> float:
    parts = [value / 255 for value in colour[:3]]
    red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return float(0.2126 * red + 0.7152 * green + 0.0722 * blue)


def contrast(one: Any, other: Any) -> float:
    """As the Web Content Accessibility Guidelines define it."""
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)
