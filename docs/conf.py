"""Sphinx configuration."""

from pathlib import Path

import sb3_m3po  # noqa: F401  (an early, clear error when the package is not installed)

project = "sb3_m3po"
author = "The sb3_m3po authors"
project_copyright = author
release = (Path(__file__).resolve().parents[1] / "sb3_m3po" / "version.txt").read_text(encoding="utf-8").strip()
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"

exclude_patterns = ["_build"]
# The changelog repeats its headings for every release, and its level-3 headings end in a colon as Stable-Baselines3's do
suppress_warnings = ["myst.header"]

html_theme = "furo"
html_title = f"sb3_m3po {release}"
copybutton_prompt_text = "$ "
