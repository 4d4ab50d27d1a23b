"""Settings of the course's static site; ``docs/build.py`` runs Sphinx with them."""

project = "MIM-Refiner Lab"
copyright = "MIM-Refiner Lab authors"
extensions = ["myst_nb"]
html_theme = "furo"
html_title = "MIM-Refiner Lab"
html_copy_source = False
html_show_sphinx = False
exclude_patterns = ["site"]
templates_path = []

nb_execution_mode = "off"  # the notebooks hold their outputs
nb_merge_streams = True
nb_ipywidgets_js = {}  # nothing from the network
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 2
# A "#" title is a question and "###" an exercise, and hints hold code: nothing to warn about there.
suppress_warnings = ["myst.header", "misc.highlighting_failure"]
