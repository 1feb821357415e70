"""Sphinx configuration: Markdown pages by MyST, the Python API from docstrings. `scripts/docs` builds the site."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from reshard import __version__  # noqa: E402

project = "reshard"
author = "the reshard authors"
copyright = author
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"

source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "generate.py"]
suppress_warnings = ["myst.strikethrough"]

html_theme = "furo"
html_title = f"reshard {release}"
html_static_path = ["_static"]
html_js_files = ["filter.js"]
html_extra_path = ["reader.py", "manifest.schema.json", "tensors.schema.json"]
