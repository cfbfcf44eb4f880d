"""The documentation site: it is built without warnings and without network, and its pictures can be drawn."""

import re
import runpy
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.helpers import ROOT, sample

needs_sphinx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("sphinx", "myst_parser", "furo")), reason="needs the extra docs"
)


# The extensions of the site without that of the pages of source code, which are most of its pages.
DOCUMENTING = ("myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        *sample(["-D", f"extensions={','.join(DOCUMENTING)}"], []),
        str(ROOT / "docs"),
        str(folder),
    ]
    # A proxy that refuses: whatever asks for the network fails.
    environment = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment |= {"OMP_NUM_THREADS": "1", "PATH": "", "HOME": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder


@needs_sphinx
def test_the_site_is_built_without_warnings(site):
    pages = {path.stem for path in site.glob("*.html")}
    assert {"index", "architecture", "theory", "engine", "results", "provenance"} <= pages
    assert "to_spike_driven" in (site / "api/spiking.html").read_text()
    assert "<math" in (site / "theory.html").read_text()


@needs_sphinx
def test_its_pages_fetch_nothing(site):
    for page in site.rglob("*.html"):
        sources = re.findall(r'(?:<script[^>]* src|<img[^>]* src|<link[^>]* href)="([^"]+)"', page.read_text())
        assert not [source for source in sources if source.startswith(("http:", "https:", "//"))], page


def test_the_pictures_can_be_drawn(tmp_path):
    draw = runpy.run_path(str(ROOT / "docs/pictures/draw.py"))["main"]
    assert draw([str(tmp_path)]) == 0
    drawn = {path.name for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name for path in (ROOT / "docs/pictures").glob("*.svg")}
