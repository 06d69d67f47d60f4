"""Sphinx configuration. `make docs` builds with every warning an error."""

from importlib import metadata

project = "rankwise"
author = "The rankwise developers"
copyright = "The rankwise developers, Apache-2.0"
release = metadata.version("rankwise")
version = ".".join(release.split(".")[:2])

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "examples", "tools"]
html_theme = "furo"
html_title = f"rankwise {release}"
html_static_path = ["_static"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
