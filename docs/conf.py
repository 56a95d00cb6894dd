"""The site: pages in Markdown, an API reference from the docstrings. `make docs` builds it."""

project = "flora_jax"
author = "The flora_jax authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
myst_heading_anchors = 3
napoleon_numpy_docstring = False
html_show_copyright = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
