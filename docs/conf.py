"""Sphinx configuration: MyST Markdown, Furo theme."""

project = "partita"
author = "the partita authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "partita"
exclude_patterns = ["_build"]
autodoc_typehints = "description"
