"""A figure that follows a training while it runs."""

from __future__ import annotations

import math
import time


class LiveFigure:
    """The history as a figure in a notebook that is drawn again while training runs.

    A plain image whose output is replaced: it works in JupyterLab, under papermill and in a stored
    notebook. Outside of a notebook nothing is shown.

    Args:
        every: seconds between two drawings, at least.
    """

    def __init__(self, *, every: float = 5.0):
        self.every, self.drawn, self.handle, self.figure = every, -math.inf, None, None

    def __call__(self, history: list[dict]) -> None:
        """Draws, if the last drawing is long enough ago."""
        if time.monotonic() - self.drawn >= self.every:
            self.draw(history)

    def draw(self, history: list[dict]) -> None:
        """Draws now; call it once more after training for the last steps."""
        import matplotlib.pyplot as plt

        from refiner.visuals import plots

        try:
            from IPython.display import display
        except ModuleNotFoundError:  # then this is no notebook either
            return

        self.figure = plots.history(history)[0].figure
        if self.handle is None:
            self.handle = display(self.figure, display_id=True)
        else:
            self.handle.update(self.figure)
        plt.close(self.figure)  # or the notebook shows it a second time
        self.drawn = time.monotonic()
