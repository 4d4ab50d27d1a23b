"""A live widget and the picture of it that stays when the notebook is read without a kernel.

The picture is hidden while the widget lives, as it would show an older state. When the kernel ends
it comes back, with one line that says so; and a cell that is run again closes its old widgets.
"""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

# Finds the outputs that follow in the same cell, and hides them as long as the kernel answers. A
# widget is drawn before it stands on the page, so the cell is looked for when it does.
WATCH = """
export default { render({ model, el }) {
  let alive = true, copies = [], frame = 0;
  const seen = new MutationObserver(() => hide());
  const hide = () => {
    const own = el.closest(".jp-OutputArea-child"), all = own ? [...own.parentNode.children] : [];
    copies = own ? all.slice(all.indexOf(own) + 1) : copies;
    copies.forEach((one) => {
      if (one.querySelector("img")) one.style.display = alive ? "none" : "";
    });
  };
  const begin = () => {
    if (!el.isConnected) { frame = requestAnimationFrame(begin); return; }
    const area = el.closest(".jp-OutputArea");
    if (area) seen.observe(area, { childList: true, subtree: true });
    hide();
  };
  model.on("comm_live_update", () => {
    alive = false;
    el.textContent = "The kernel has ended: run this cell again to go on. The picture below stays.";
    const whole = el.closest(".widget-vbox"), parts = whole ? [...whole.children] : [];
    for (const one of parts) if (!one.contains(el)) one.style.display = "none"; // nobody answers
    hide();
  });
  begin();
  return () => { alive = false; cancelAnimationFrame(frame); seen.disconnect(); hide(); };
} };
"""
_shown: dict[str, tuple[str, object]] = {}  # by cell: the run that showed a widget, and the widget


def show(widget, figure: Figure) -> None:
    """Shows a widget, and after it the figure that stays; closes what the same cell showed before.

    Args:
        widget: of ipywidgets.
        figure: is closed.
    """
    import anywidget
    import ipywidgets as w
    from IPython.display import display

    watch = anywidget.AnyWidget(_esm=WATCH)
    whole = w.VBox([watch, widget])
    cell, run = _cell_and_run()
    if cell:
        before = _shown.get(cell)
        if before and before[0] != run:
            close(before[1], but=widget)
        _shown[cell] = run, w.VBox([before[1], whole]) if before and before[0] == run else whole
    display(whole)
    display(figure)
    plt.close(figure)


def close(widget, *, but=None) -> None:
    """Closes a widget with all that it is made of: ipywidgets leaves the parts in the kernel.

    Args:
        widget: of ipywidgets.
        but: a part that stays open, as it is shown again.
    """
    if widget is but:
        return
    for part in getattr(widget, "children", ()):
        close(part, but=but)
    for name in ("layout", "style"):
        if hasattr(getattr(widget, name, None), "close"):
            getattr(widget, name).close()
    widget.close()


def _cell_and_run() -> tuple[str | None, str | None]:
    """JupyterLab's name of the cell that runs, and that of this run; None elsewhere."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    parent = shell.get_parent() if hasattr(shell, "get_parent") else {}
    return parent.get("metadata", {}).get("cellId"), parent.get("header", {}).get("msg_id")
