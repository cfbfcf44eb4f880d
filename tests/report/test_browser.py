"""The page in a real browser, where there is one."""

import shutil
import subprocess
from html import escape

import numpy as np
import pytest
from PIL import Image

from qsd.report import html

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--hide-scrollbars", "--virtual-time-budget=20000",
]  # fmt: skip
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")

# Frames as wide as a phone and as a desktop; what they show is measured from outside, as the page runs no scripts.
MEASURE = """<!DOCTYPE html><body>
<iframe width="390" height="800" srcdoc="{page}"></iframe><iframe width="1200" height="800" srcdoc="{page}"></iframe>
<script>
window.onload = () => {{
  const rows = [...document.querySelectorAll("iframe")].map(frame => {{
    const d = frame.contentDocument, images = [...d.images];
    return [frame.width, d.documentElement.scrollWidth, images.length,
      images.filter(i => i.complete && i.naturalWidth > 0 && i.clientWidth > 250).length].join(" ");
  }});
  document.body.innerHTML = "<pre>" + rows.join(";") + "</pre>";
}};
</script></body>"""


def run(tmp_path, *arguments):
    command = [BROWSER, *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_it_fits_a_phone_and_a_desktop_with_all_its_pictures(made_up_record, tmp_path):
    page = html(made_up_record("qsd_15m", layers=None))
    (tmp_path / "outer.html").write_text(MEASURE.format(page=escape(page)))
    dom = run(tmp_path, "--dump-dom", (tmp_path / "outer.html").as_uri())
    rows = [list(map(int, row.split())) for row in dom.split("<pre>")[1].split("</pre>")[0].split(";")]
    assert len(rows) == 2
    for width, content, images, shown in rows:
        assert content <= width  # nothing makes the page scroll sideways
        assert images == shown == page.count("<img ")


def test_it_is_printed_on_pages_and_painted(made_up_record, tmp_path):
    (tmp_path / "report.html").write_text(html(made_up_record()))
    address = (tmp_path / "report.html").as_uri()
    run(tmp_path, f"--print-to-pdf={tmp_path / 'report.pdf'}", "--no-pdf-header-footer", address)
    pdf = (tmp_path / "report.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert 3 <= pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") <= 15
    run(tmp_path, f"--screenshot={tmp_path / 'screen.png'}", "--window-size=1000,3000", address)
    pixels = np.asarray(Image.open(tmp_path / "screen.png").convert("RGB")).reshape(-1, 3)
    blue = (np.abs(pixels.astype(int) - (0x00, 0x72, 0xB2)).sum(1) < 12).sum()
    assert blue > 3000  # bars of the firing rates
