"""The course: its exercises, running its notebooks, their pages. Notebooks say ``course.check``."""

from refiner.base.places import measured
from refiner.course.exercises import check, choose, draw_float, draw_int, earlier, status
from refiner.course.run import record

__all__ = ["check", "choose", "draw_float", "draw_int", "earlier", "measured", "record", "status"]
