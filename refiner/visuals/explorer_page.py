"""What the explorer's page (``explorer.js``) is given, in a notebook and in a file of its own.

All blocks of all models are sent once; after that the page answers by itself. Coordinates are
int16, each block in its own range; neighbors are uint16, as more than 20,000 images have none.
"""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import asdict
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import to_hex
from PIL import Image

from refiner.base.errors import MissingPackage, UserError
from refiner.base.files import replacing
from refiner.images.decode import resize
from refiner.images.sets import shown_channels
from refiner.images.toybox import FACTORS
from refiner.visuals import maps
from refiner.visuals.explorer_state import Colour, Exploration, State, Table, View
from refiner.visuals.style import class_styles

LARGEST = 64  # pixels of a thumbnail
MOST_IN_FILE = 2_000  # images of a file of its own
SHEET_SIZE = 40  # pixels of a thumbnail there
UNKNOWN = 255  # the code of a number that is not known
NAMES = ("circle", "square", "triangle", "diamond", "down", "plus", "cross")
SHAPES = dict(zip("os^DvPX", NAMES, strict=True))
UNITS = {"yaw": "degrees", "hue": "turns", "background_hue": "turns", "scale": "of the frame"}
NUMBERS, CIRCLE = "viridis", "hsv"  # colours of numbers, and of angles and hues
HERE = Path(__file__).parent


def percent(share: float | None) -> str:
    return "–" if share is None or share != share else f"{100 * share:.0f} %"


def colour_map(colour: Colour) -> str:
    """The name of the colour map of a factor's numbers."""
    return CIRCLE if colour.circle else NUMBERS


def title_of(name: str) -> str:
    """A colour's name with its unit, where one is known."""
    share = {"neighbor change": "share of neighbors not shared", "wrong votes": "share of the vote"}
    about = share.get(name) or UNITS.get(name)
    about = about or ("degrees" if "degrees" in FACTORS.get(name, "") else "")
    return f"{name} ({about})" if about else name


# ---------------------------------------------------------------- tables


def tables(explored: Exploration) -> dict:
    """All that the page looks up; arrays as bytes."""
    labels = None if explored.labels is None else _bytes(explored.labels, np.int32)
    return {
        "n": len(explored),
        "k": explored.k,
        "labels": labels,
        "classes": list(explored.classes),
        "models": [_model(explored, name, table) for name, table in explored.tables.items()],
        "colours": [_colour(explored, name) for name in explored.colours],
    }


def _model(explored: Exploration, name: str, table: Table) -> dict:
    near = table.graph.indices[:, :, : explored.k] if explored.complete else None
    own = explored.complete and len(table.own_votes)
    accuracy = None if explored.labels is None else table.accuracy.tolist()
    return {
        "name": name,
        "blocks": list(table.blocks),
        "accuracy": accuracy,
        "kept": table.kept.tolist(),
        "xy": {layout: _places(xy) for layout, xy in table.xy.items()},
        "near": None if near is None else _bytes(near.numpy(), np.uint16),
        "wrong": _bytes(_level(1 - table.own_votes), np.uint8) if own else None,
    }


def _places(xy_LN2: np.ndarray) -> bytes:
    whole = np.stack([maps.framed(xy_N2) for xy_N2 in xy_LN2])
    return _bytes(np.round(32767 * whole), np.int16)


def _level(values: np.ndarray) -> np.ndarray:
    """Numbers of 0…1 as 0…254."""
    known = np.isfinite(values)
    return np.where(known, np.round(254 * np.where(known, values, 0)), UNKNOWN)


def _colour(explored: Exploration, name: str) -> dict:
    """Codes of the points, and what each code looks like: the legend's are the map's."""
    if name in ("neighbor change", "wrong votes"):  # these depend on the block
        colour, codes = Colour(np.empty(0)), None
    else:
        colour = explored.compute(_any_state(explored, name)).sides[0].colour
        values = colour.values if colour.names else _level(colour.values)
        codes = _bytes(values, np.uint16)
    found = {"name": name, "label": title_of(name), "codes": codes, "names": None, "marks": None}
    if colour.names is None:
        shades = plt.get_cmap(colour_map(colour))(np.linspace(0, 1, UNKNOWN))
        limits = [f"{x:.3g}" for x in colour.limits]
        return found | {"palette": [*map(to_hex, shades), "#999999"], "limits": limits}
    shades, markers = zip(*class_styles(len(colour.names)), strict=True)
    marks = [SHAPES[marker] for marker in markers]
    return found | {"names": list(colour.names), "palette": list(shades), "marks": marks}


def _any_state(explored: Exploration, colour: str) -> State:
    name = next(iter(explored.tables))
    return State(name, name, colour=colour)


def _bytes(values: np.ndarray, kind: type) -> bytes:
    return np.ascontiguousarray(values, dtype=kind).tobytes()


# ---------------------------------------------------------------- pictures


def thumbnail(explored: Exploration, i: int) -> str:
    """An image as a PNG in a data address, at most 64 pixels high; kept once it is made."""
    if i in explored.pictures:
        return explored.pictures[i]
    made = png_address(_fitting(explored.images[int(i)], LARGEST))
    return explored.pictures.setdefault(i, made)


def png_address(pixels) -> str:
    """An image, uint8 [C, H, W], as a data address."""
    return address(_png(pixels), "image/png")


def address(content: bytes, kind: str) -> str:
    """Content as a data address."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _fitting(pixels, size: int) -> torch.Tensor:
    """An image [C, H, W], made smaller where a side is longer than ``size``."""
    pixels = torch.as_tensor(pixels)
    return resize(pixels[None], size)[0] if max(pixels.shape[1:]) > size else pixels


def _picture(pixels) -> Image.Image:
    whole = shown_channels(torch.as_tensor(pixels)[None])[0]
    return Image.fromarray(whole.permute(1, 2, 0).cpu().numpy())


def _png(pixels) -> bytes:
    file = io.BytesIO()
    _picture(pixels).save(file, "png")
    return file.getvalue()


def sheet(explored: Exploration) -> dict:
    """All thumbnails in one WebP, row by row."""
    n, size = len(explored), SHEET_SIZE
    columns = math.ceil(math.sqrt(n))
    whole = Image.new("RGB", (columns * size, math.ceil(n / columns) * size))
    for i in range(n):
        one = _picture(_fitting(explored.images[i], size)).resize((size, size))
        whole.paste(one, (size * (i % columns), size * (i // columns)))
    file = io.BytesIO()
    whole.save(file, "webp", quality=80)
    found = {"address": address(file.getvalue(), "image/webp"), "columns": columns}
    return found | {"size": size, "width": columns * size}


def atlas_table(explored: Exploration, view: View, side: int):
    """A pyarrow table in the columns of Embedding Atlas; see :meth:`Explorer.to_parquet`."""
    try:
        import pyarrow as pa
    except ModuleNotFoundError as error:
        raise MissingPackage("this needs the package pyarrow: pip install pyarrow") from error
    if not explored.complete:
        raise UserError("the neighbors of so many images are not known: explore a part of them")
    at = [(view.state.left, view.state.block)]
    at += [(view.state.right, view.state.right_block or view.state.block)]
    name, block = at[side]
    block = min(block, len(explored.tables[name].blocks)) - 1
    found = [explored.neighbors_of((name, block), i) for i in range(len(explored))]
    near = [{"ids": ids.tolist(), "distances": (1 - cosines).tolist()} for ids, cosines in found]
    xy = view.sides[side].xy
    picture = lambda i: {"bytes": _png(_fitting(explored.images[i], LARGEST))}  # noqa: E731
    columns = {"x": xy[:, 0], "y": xy[:, 1], "neighbors": near}
    columns["image"] = [picture(i) for i in range(len(explored))]
    if explored.labels is not None:
        columns["class"] = [explored.name_of(label) for label in explored.labels]
    return pa.table(explored.factors | columns)


# ---------------------------------------------------------------- a file of its own


def write_html(explored: Exploration, state: State, path: Path) -> Path:
    """Writes the explorer as one file that asks nobody for anything; returns its path."""
    if not explored.complete or len(explored) > MOST_IN_FILE:
        raise UserError(
            f"a file holds the explorer of at most {MOST_IN_FILE:,} images, not "
            f"{len(explored):,}: explore a part of them"
        )
    with replacing(path) as temporary:
        Path(temporary).write_text(page(explored, state, sheet(explored)), encoding="utf-8")
    return path


def page(explored: Exploration, state: State, pictures: dict) -> str:
    """The file's text; ``pictures`` as :func:`sheet` makes them."""
    given = {"tables": tables(explored), "state": asdict(state), "sheet": pictures}
    text = json.dumps(given, default=lambda raw: base64.b64encode(raw).decode())
    css, js = ((HERE / f"explorer.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    title = " and ".join(explored.tables)
    return PAGE.format(title=escape(title), css=css, js=js, given=_safe(text))


def _safe(text: str) -> str:
    """Text that ends no script and opens no tag; JSON reads it as it was."""
    return text.replace("<", "\\u003c")


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Explorer: {title}</title><style>{css}</style>
<body class="rx-file"><div id="explorer"></div>
<script type="application/json" id="given">{given}</script>
<script type="module">{js}
openExplorer(document.getElementById("explorer"),
  JSON.parse(document.getElementById("given").textContent));
</script></body></html>
"""
