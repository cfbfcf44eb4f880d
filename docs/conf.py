"""Configuration of the documentation site: ``make docs`` writes it to ``docs/_build/html``.

The build needs no network, and neither do the pages: formulas become MathML, and nothing is fetched from elsewhere.
"""

import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

sys.path.insert(0, str(Path(__file__).parents[1]))
_VERSION = Path(__file__).parents[1] / "qsd" / "_version.py"

project = "qsd"
author = "The authors of qsd"
copyright = "the authors of qsd"
release = version = re.findall(r'__version__ = "(.+)"', _VERSION.read_text())[0]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "pictures"]
default_role = "py:obj"  # single backticks in docstrings name objects of the package

html_theme = "furo"
html_title = f"qsd {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False

# The reference is built from the sources: frameworks and optional packages need not be imported or installed for it.
autodoc_mock_imports = [
    "jsonargparse", "lightning", "mmcv", "mmdet", "mmengine", "mmseg", "nir", "onnx", "onnxruntime", "onnxscript",
    "sklearn", "tensorboard", "torchmetrics",
]  # fmt: skip
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def _inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def _block(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Register the renderer of formulas.

    Args:
        app: The application of Sphinx.
    """
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_block, None))
