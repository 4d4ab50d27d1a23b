"""Figures, maps and the explorer."""
