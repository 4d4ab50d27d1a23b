"""The explorer as one file, used in a Chromium that reaches nothing but that file."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from browser import BROWSER, browsing
from matplotlib.colors import to_rgb

import refiner
from refiner.images.sets import ImageSet

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium")
N, L, K = 240, 12, 10
NAMES = ("ball", "cube", "cone", "<can>")


@pytest.fixture(scope="module")
def explorer():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % 4
    pixels = torch.randint(256, (N, 3, 16, 16), generator=generator, dtype=torch.uint8)
    centres = torch.randn(4, 6, generator=generator)[labels]
    strength = torch.linspace(0, 1, L)[:, None, None]
    features = {
        name: torch.randn(L, N, 6, generator=generator) + gain * strength * centres
        for name, gain in (("before", 1), ("after", 2))
    }
    factors = {"hue": np.linspace(0, 1, N), "tenth": np.arange(N) * 7 % 10}
    images = ImageSet(pixels, labels, NAMES, factors)
    return refiner.explore(images, features, k=K, progress=False)


@pytest.fixture(scope="module")
def browser():
    with browsing() as found:
        yield found


def opened(browser, path, **how):
    blocked, errors = [], []
    context = browser.new_context(**how)
    context.set_default_timeout(20_000)
    context.route(
        "**/*",
        lambda r: (
            r.continue_()
            if r.request.url == path.as_uri()
            else (blocked.append(r.request.url), r.abort())
        ),
    )
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(path.as_uri())
    page.locator(".rx-map canvas").first.wait_for()
    return SimpleNamespace(page=page, blocked=blocked, errors=errors)


@pytest.fixture(scope="module")
def file(explorer, tmp_path_factory):
    return explorer.to_html(tmp_path_factory.mktemp("file") / "explorer.html")


@pytest.fixture
def shown(browser, file):
    found = opened(browser, file, viewport={"width": 1280, "height": 720}, reduced_motion="reduce")
    yield found
    assert not found.errors and not [x for x in found.blocked if not x.startswith("data:")]
    found.page.context.close()


def state(page):
    return page.evaluate("document.querySelector('.refiner-explorer').explorer.state")


def where(page, i, side=0):
    return page.evaluate(
        "([side, i]) => document.querySelector('.refiner-explorer').explorer.at(side, i)", [side, i]
    )


def places(page, side=0):
    """Where on the page all images are, [N, 2]."""
    code = "([side, n]) => Array.from({length: n}, (_, i) => document.querySelector("
    code += "'.refiner-explorer').explorer.at(side, i))"
    return np.array(page.evaluate(code, [side, N]))


def alone(page, side=0):
    """The image that lies farthest from all others on a map."""
    xy = places(page, side)
    apart = np.linalg.norm(xy[:, None] - xy[None], axis=-1) + 1e9 * np.eye(N)
    return int(apart.min(1).argmax())


def rights(explorer, block):
    """Neighbors of the own class of every image in both models, and those in common, all [N]."""
    labels = explorer.exploration.labels
    graphs = [
        t.graph.indices[block - 1, :, :K].numpy() for t in explorer.exploration.tables.values()
    ]
    before, after = ((labels[g] == labels[:, None]).sum(1) for g in graphs)
    return before, after, (graphs[0][:, :, None] == graphs[1][:, None]).any(-1).sum(1)


def test_the_panel_fits_and_a_click_answers_in_view(shown, explorer):
    page = shown.page
    box = page.locator(".refiner-explorer").bounding_box()
    assert box["height"] <= 620 and box["y"] + box["height"] <= 720
    i = alone(page)
    page.mouse.click(*where(page, i))
    assert state(page)["selected"] == i
    before, after, common = (x[i] for x in rights(explorer, L))
    words = f"Right neighbors {before} → {after} of {K}; {common} of {K} shared by both models"
    inspector = page.locator(".rx-inspector")
    assert words in inspector.inner_text() and f"Image {i}" in inspector.inner_text()
    pictures = [int(x.get_attribute("data-image")) for x in inspector.locator(".rx-picture").all()]
    assert pictures == [i, *(j for near in explorer.select(i).near for j in near.indices)]
    assert inspector.locator(".rx-ok").count() == before + after
    assert inspector.locator(".rx-no").count() == 2 * K - before - after
    assert inspector.get_by_role("button", name="shared by both models").count() == 2 * common
    below = inspector.locator(".rx-picture").last.bounding_box()
    assert below["y"] + below["height"] <= 720, "answered within the window"
    inspector.locator(".rx-picture").nth(1).click()
    assert state(page)["selected"] == pictures[1]
    page.get_by_role("button", name="Back").click()
    assert state(page)["selected"] == i
    page.get_by_label("Find").last.fill("17")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Back").click()
    assert state(page)["selected"] == i, "back from a search, too"
    assert f"Selected image {i}," in page.get_by_role("status").inner_text()


SPY = """() => {
  window.seen = [];
  for (const name of ["arc", "rect"]) {
    const own = CanvasRenderingContext2D.prototype[name];
    CanvasRenderingContext2D.prototype[name] = function (...numbers) {
      const side = [...document.querySelectorAll(".rx-map canvas")].indexOf(this.canvas);
      window.seen.push([side, name, ...numbers]);
      return own.apply(this, numbers);
    };
  }
}"""


def test_neighbors_are_ringed_on_both_maps_and_wrong_ones_have_corners(shown, explorer):
    page, (before, after, _) = shown.page, rights(explorer, L)
    i = int(np.minimum(K - before, K - after).argmax())
    page.evaluate(SPY)
    page.get_by_label("Find").last.fill(str(i))
    page.keyboard.press("Enter")
    seen, labels = page.evaluate("seen"), explorer.exploration.labels
    for side, near in enumerate(explorer.select(i).near):
        box = page.locator(".rx-map canvas").nth(side).bounding_box()
        xy = places(page, side) - [box["x"], box["y"]]
        found = {"arc": [], "rect": []}
        for _, name, x, y, r, *_ in (row for row in seen if row[0] == side):
            if name == "rect":
                found["rect"].append((x + 7, y + 7))
            elif r == 7:
                found["arc"].append((x, y))
        right = labels[near.indices] == labels[i]
        assert right.any() and not right.all(), "both kinds are seen"
        for name, some in (("arc", near.indices[right]), ("rect", near.indices[~right])):
            assert np.allclose(found[name], xy[some], atol=0.51), (side, name)


def test_the_curve_is_the_slider(shown, explorer):
    page, slider = shown.page, shown.page.get_by_role("slider")
    assert page.get_by_role("button", name="Play through the blocks").is_visible()
    slider.focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    tables = explorer.exploration.tables
    words = [f"{name} {round(100 * t.accuracy[L - 3])} %" for name, t in tables.items()]
    best = {name: int(t.accuracy.argmax()) for name, t in tables.items()}
    words += [f"{name} is best in block {b + 1}" for name, b in best.items()]
    for side, b in enumerate(best.values()):
        ringed, dots = (page.locator(f".rx-{x}{side}") for x in ("best", "dot"))
        centre = lambda one: (box := one.bounding_box())["x"] + box["width"] / 2  # noqa: E731
        assert centre(ringed) == pytest.approx(centre(dots.nth(b)), abs=0.6)
    said = slider.get_attribute("aria-valuetext")
    assert slider.get_attribute("aria-valuenow") == str(L - 2) and all(x in said for x in words)
    kept = tables["before"].kept[L - 3]
    caption = page.locator(".rx-map figcaption").first.inner_text()
    assert caption.endswith(f"{words[0][7:]} · neighbors kept to the last block {kept * 100:.0f} %")
    common = rights(explorer, L - 2)[2].mean() / K
    assert f"neighbors in common {round(100 * common)} %" in said
    xy = places(page)
    wanted = tables["before"].xy["pca"][L - 3]
    for seen, own in zip(xy.T, (wanted * [1, -1]).T, strict=True):  # moved and scaled alike
        assert np.corrcoef(seen, own)[0, 1] > 0.9999
    page.keyboard.press("Home")
    assert state(page)["block"] == 1
    box = slider.bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 178, box["y"] + 50, steps=4)
    page.mouse.up()
    assert state(page)["block"] == L, "dragged to the right end"
    page.get_by_role("button", name="Play").click()
    page.wait_for_function("document.querySelector('.refiner-explorer').explorer.state.block === 2")


def test_shift_and_drag_is_a_lasso_and_a_search_takes_its_place(shown, explorer):
    page = shown.page
    box = page.locator(".rx-map canvas").first.bounding_box()
    xy = places(page)
    low, high = np.quantile(xy, 0.2, axis=0), np.quantile(xy, 0.8, axis=0)
    inside = ((xy > low) & (xy < high)).all(1)
    page.keyboard.down("Shift")
    page.mouse.move(*low)
    page.mouse.down()
    for corner in ((high[0], low[1]), high, (low[0], high[1])):
        page.mouse.move(*corner, steps=3)
    page.mouse.up()
    page.keyboard.up("Shift")
    assert state(page)["group"] == np.flatnonzero(inside).tolist() and box["height"] > 300
    find = page.get_by_label("Find").last
    find.fill("cone")
    find.press("Enter")
    assert state(page)["group"] == list(range(2, N, 4)) and state(page)["selected"] is None
    before, after = (x[2::4].mean() / K for x in rights(explorer, L)[:2])
    text = page.locator(".rx-inspector").inner_text()
    assert f"Right neighbors {round(100 * before)} % → {round(100 * after)} %" in text
    find.fill("zebra")
    find.press("Enter")
    assert "nothing is called 'zebra'" in page.get_by_role("alert").inner_text()
    find.fill("17")
    find.press("Enter")
    assert (state(page)["selected"], state(page)["group"]) == (17, [])
    find.fill("")
    find.press("Enter")
    assert (state(page)["selected"], state(page)["group"]) == (None, [])


def test_look_at_takes_the_images_that_changed_most(shown, explorer):
    page = shown.page
    before, after, common = (x.astype(int) for x in rights(explorer, L))
    for name, value in (
        ("improved", after - before),
        ("lost", before - after),
        ("changed", -common),
    ):
        seen = []
        for _ in range(3):
            page.get_by_role("button", name=f"most {name}").click()
            seen.append(state(page)["selected"])
        assert seen == np.argsort(-value, kind="stable")[:3].tolist()
    page.get_by_label("Find").last.fill("cone")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="most lost").click()
    assert state(page)["selected"] == 2 + 4 * (before - after)[2::4].argmax(), "among the group"
    page.get_by_role("button", name="Back to the group").click()
    assert state(page)["selected"] is None and len(state(page)["group"]) == N // 4
    page.get_by_role("button", name="Clear selection").click()
    page.get_by_role("button", name="ball 60").click()
    page.get_by_role("button", name="most improved").click()
    assert state(page)["selected"] == 4 * (after - before)[::4].argmax(), "among what is alone"


def test_clusters_are_ranked_by_what_they_gained(shown, explorer):
    before, after, common = rights(explorer, L)
    gain = {c: (after - before)[c::4].mean() for c in range(4)}
    rows = shown.page.locator(".rx-gains tr").all()[1:]
    for row, c in zip(rows, sorted(gain, key=lambda c: -gain[c]), strict=True):
        cells = [100 * x[c::4].mean() / K for x in (before, after, K - common)]
        a, b, changed = (int(x + 0.5) for x in cells)
        wanted = f"{NAMES[c]} {a} % → {b} % {changed} %"
        assert " ".join(row.inner_text().split()) == wanted
        shown_image = int(row.locator(".rx-picture").get_attribute("data-image"))
        assert shown_image % 4 == c and common[shown_image] == common[c::4].min()
    shown.page.get_by_label("Colour by").select_option("tenth")
    rows = shown.page.locator(".rx-gains tr").all()
    assert len(rows) == 1 + 4 + 1 + 4
    rows[5].get_by_role("button", name="2 between").click()
    assert shown.page.locator(".rx-gains tr").count() == 1 + 10


def test_a_file_saves_what_is_chosen(shown, explorer):
    page = shown.page
    page.get_by_role("button", name="Save CSV").click()
    assert "nothing is chosen" in page.get_by_role("alert").inner_text()
    page.get_by_label("Find").last.fill("<can>")
    page.keyboard.press("Enter")
    page.locator(".rx-inspector .rx-picture").first.click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save CSV").click()
    rows = list(csv.DictReader(download.value.path().open(encoding="utf-8")))
    asked = {"selected": state(page)["selected"], "group": tuple(range(3, N, 4))}
    wanted = explorer.exploration.chosen(explorer.set(**asked))
    assert {int(row["image"]): row["chosen"] for row in rows} == wanted
    assert all(row["class"] == NAMES[int(row["image"]) % 4] for row in rows)
    explorer.set(selected=None, group=())


def test_reset_undoes_zoom_and_pan_and_a_chip_isolates(shown, explorer):
    page = shown.page
    first = where(page, 5)
    box = page.locator(".rx-map canvas").first.bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.wheel(0, -300)
    page.mouse.down()
    page.mouse.move(box["x"] + 160, box["y"] + 140, steps=3)
    page.mouse.up()
    page.wait_for_timeout(100)
    assert np.abs(np.subtract(where(page, 5), first)).max() > 20
    page.get_by_role("button", name="Reset view").click()
    assert where(page, 5) == pytest.approx(first)
    page.locator(".rx-map canvas").first.focus()
    page.keyboard.press("+")
    assert np.abs(np.subtract(where(page, 5), first)).max() > 3
    page.keyboard.press("-")
    assert where(page, 5) == pytest.approx(first)
    scrolls = """(by) => !document.querySelector(".rx-map canvas").dispatchEvent(
      new WheelEvent("wheel", { deltaY: by, cancelable: true }))"""
    assert not page.evaluate(scrolls, 100), "nothing to zoom out of: the page scrolls"
    assert page.evaluate(scrolls, -100)


def test_points_have_the_colours_of_their_classes_and_a_chip_isolates_one(shown, explorer):
    page, i = shown.page, alone(shown.page)
    shades = explorer.widget.tables["colours"][0]["palette"]
    shade = np.array(to_rgb(shades[i % 4])) * 255

    def pixel():
        code = """([x, y]) => {
          const canvas = document.querySelector(".rx-map canvas");
          const box = canvas.getBoundingClientRect(), g = canvas.getContext("2d");
          return [...g.getImageData(x - box.left, y - box.top, 1, 1).data].slice(0, 3);
        }"""
        return np.array(page.evaluate(code, where(page, i)))

    page.mouse.move(2, 2)
    assert np.abs(pixel() - (0.9 * shade + 0.1 * 255)).max() <= 2
    for name, opacity in ((NAMES[i % 4], 0.9), (NAMES[(i + 1) % 4], 0.07)):
        page.get_by_role("button", name=f"{name} 60").click()
        chip = page.get_by_role("button", name=f"{name} 60")
        assert chip.get_attribute("aria-pressed") == "true"
        assert np.abs(pixel() - (opacity * shade + (1 - opacity) * 255)).max() <= 2


@pytest.mark.parametrize("width", [500, 900, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_points_and_names_fit_in_every_width_and_theme(browser, file, width, scheme):
    how = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    found = opened(browser, file, **how)
    page = found.page
    boxes = [c.bounding_box() for c in page.locator(".rx-map canvas").all()]
    assert (boxes[0]["y"] < boxes[1]["y"]) == (width < 700), "narrow maps stack"
    for side, box in enumerate(boxes):
        xy = places(page, side) - [box["x"], box["y"]]
        assert (xy > 0).all() and (xy < [box["width"], box["height"]]).all()
    paper = page.evaluate("getComputedStyle(document.body.firstChild.firstChild).backgroundColor")
    assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(22, 22, 22)")
    unnamed = "[...document.querySelectorAll('button,select,input,canvas')].filter("
    unnamed += "x => !(x.textContent.trim() || x.ariaLabel || x.title || x.labels?.length)).length"
    assert page.evaluate(unnamed) == 0 and not found.errors
    found.page.context.close()
