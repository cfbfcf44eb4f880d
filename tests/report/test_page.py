"""The page: everything is on it, it needs nothing from elsewhere, and it hides no bad news."""

import base64
import itertools
import re
from html.parser import HTMLParser

import pytest

from qsd import plots
from qsd.report import Record, html


class Page(HTMLParser):
    """Collects elements with their attributes, and all text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def svg(image):
    head, _, data = image["src"].partition(",")
    assert head == "data:image/svg+xml;base64"
    return base64.b64decode(data).decode()


@pytest.fixture(scope="module")
def text(made_up_record):
    """The page of a made-up record; most of its time goes into the figures."""
    return html(made_up_record())


def test_every_figure_is_there_and_described(text):
    page = Page(text)
    images = page.all("img")
    alts = " ".join(image["alt"] for image in images)
    for word in (
        "over the delay",
        "Firing rates",
        "Spike counts",
        "raster",
        "Total energy",
        "Energy by layer",
        "Sizes",
    ):
        assert word in alts, word
    assert all(len(image["alt"]) > 40 for image in images)
    assert len(page.all("figure")) == len(page.all("figcaption")) == len(images)
    assert all("</svg>" in svg(image) for image in images)
    assert {s.get("id") for s in page.all("section")} >= {
        "accuracy", "delay", "activity", "energy", "size", "latency", "audit", "tables",
    }  # fmt: skip


def references(text):
    """Whatever a browser might fetch."""
    found = re.findall(r"""(?:src|href|srcset|action|data|poster)\s*=\s*["']?([^"'\s>]+)""", text)
    found += re.findall(r"url\(\s*[\"']?([^\"')]+)", text)
    return [reference for reference in found if not reference.startswith(("data:", "#"))]


def test_nothing_refers_to_the_network(text):
    page = Page(text)
    assert references(text) == []
    assert "@import" not in text
    assert not page.all("script")
    assert not page.all("iframe")
    for image in page.all("img"):
        drawing = svg(image)
        assert references(drawing) == []
        assert "<script" not in drawing
        assert "@import" not in drawing
    # and where a later change forgets it, the browser refuses
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_a_reference_would_be_found():
    for text in ('<img src="http://x/y.png">', "<a href=//x>", "<style>b{background:url(https://x)}</style>"):
        assert references(text)


def test_every_figure_says_what_it_was_measured_on(text):
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text, re.DOTALL)
    for caption in captions:
        assert "images" in caption or "computed from the network" in caption, caption
        if "Energy" in caption:
            assert "preset fp32: 4.6 pJ per MAC, 0.9 pJ per addition" in caption
            assert "papers" in caption


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("integer", "title", "kind"),
    [(1.0, "An integer network would be cheaper, 2.00 times", "bad"),
     (3.0, "Cheaper than an integer network, 1.50 times", "good")],
)  # fmt: skip
def test_the_rival_is_named_where_it_is_cheaper_and_where_it_is_not(made_up_record, integer, title, kind):
    content = made_up_record().to_dict()
    content["energy"]["total_mj"].update(merged=2.0, unmerged=1.5, integer=integer)
    text = html(Record.model_validate(content))
    assert re.search(rf'<li class="{kind}"><b>{title}', text)
    assert "as converted (merged) needs 2 mJ per image; unmerged it would be 1.5 mJ" in text


@pytest.mark.usefixtures("undrawn")
def test_losses_are_named(made_up_record):
    content = made_up_record().to_dict()
    content["comparison"][1].update(changed_images=2)
    content["audit"]["operations"][3].update(spike_driven=False, status="analog", note="a functional ReLU")
    content["audit"]["spike_driven"] = False
    text = html(Record.model_validate(content))
    assert "Not lossless." in text
    assert "2 of 200 images" in text
    assert "Not spike-driven." in text
    assert "a functional ReLU" in text
    content["audit"]["operations"][3].update(status="unproven")
    assert "Spike-driven as far as there were spikes." in html(Record.model_validate(content))


def test_all_layers_of_a_deep_network_are_named_on_figures_that_fit_a_page(made_up_record):
    record = made_up_record("qsd_75m", layers=None)
    neurons, layers = record.to_dict()["neurons"], record.to_dict()["energy"]["layers"]
    assert len(neurons) > 80
    drawn = [*plots.firing_rates(neurons), *plots.energy_by_layer(layers)]
    for figure in drawn:
        width, height = figure.get_size_inches()
        assert width <= 4.2  # a phone's width: text is not scaled down there
        assert height <= 10.2  # A4 without margins
        labels = figure.axes[0].get_yticklabels()
        assert min(label.get_fontsize() for label in labels) >= 6
        figure.draw_without_rendering()
        boxes = sorted((label.get_window_extent() for label in labels if label.get_text()), key=lambda box: box.y0)
        assert all(above.y0 >= below.y0 + below.height * 0.8 for below, above in itertools.pairwise(boxes))
        assert min(box.x0 for box in boxes) >= 0  # names are not cut off
    rates = plots.firing_rates(neurons)
    assert sum(len(f.axes[0].texts) for f in rates) == len(neurons)


@pytest.mark.parametrize(("time_steps", "layers"), [(1, 1), (8, None)])
def test_other_networks(made_up_record, time_steps, layers):
    record = made_up_record(time_steps=time_steps, layers=layers)
    page = Page(html(record))
    assert all(neuron.name in page.text for neuron in record.neurons)
    assert f"T = {time_steps}" in page.text
    assert len(page.all("img")) >= 7


def test_what_was_left_out_is_said_and_not_drawn(made_up_record):
    record = made_up_record()
    left_out = {
        "left_out": ["compare", "delays", "activity", "audit", "energy"], "comparison": [], "delays": None,
        "neurons": [], "raster": None, "audit": None, "energy": None, "activity": None,
    }  # fmt: skip
    page = Page(html(record.model_copy(update=left_out)))
    assert "Left out on request: compare, delays, activity, audit, energy" in page.text
    assert len(page.all("img")) == 1  # sizes
    assert "97.50 %" in page.text


@pytest.mark.usefixtures("undrawn")
def test_names_are_text_and_not_markup(made_up_record):
    content = made_up_record().to_dict()
    content["model"]["name"] = "<script>alert(1)</script>"
    content["audit"]["operations"][2]["note"] = '"><img src=http://x>'
    page = Page(html(Record.model_validate(content)))
    assert not page.all("script")
    assert all(image["src"].startswith("data:") for image in page.all("img"))


def test_the_page_of_a_record_from_disk_is_the_same_byte_for_byte(made_up_record, text):
    assert html(Record.from_json(made_up_record().to_json())) == text
