"""What the HTML reports share."""

from __future__ import annotations

import math
from html import escape

from torch import Tensor

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c2733; background: #fff }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #d8dee5;
         vertical-align: top }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
.ok { color: #12703d } .failed { color: #b3261e; font-weight: 600 }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; max-width: 100%; vertical-align: top }
figure img { max-width: 100%; height: auto } figcaption { color: #52606d; font-size: .85rem }
"""


def figure_html(png: str, heading: str, told: str) -> str:
    """A figure of a report: the picture itself, its caption and what it shows in words."""
    caption = escape(heading)
    source = f"data:image/png;base64,{png.strip()}"
    picture = f'<img alt="{escape(told)}" src="{source}">'
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


def json_ready(value):
    """Tensors and tuples as JSON's lists, NaN as null, numbers to five digits."""
    if isinstance(value, dict):
        return {key: json_ready(v) for key, v in value.items()}
    if isinstance(value, Tensor):
        return json_ready(value.tolist())
    if isinstance(value, list | tuple):
        return [json_ready(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
