"""A conversion record as an HTML page."""

from typing import Any

from qsd import plots
from qsd.report import memory, words
from qsd.report.activity_plots import figures, page_figures
from qsd.report.costs import EnergyRecord
from qsd.report.findings import audit_finding, findings
from qsd.report.record import DenseAccuracy, Record
from qsd.report.rendering import PageFigure, page_figure, render, series, significant

Figures = dict[str, list[PageFigure]]


def html(record: Record) -> str:
    """The page of a record: one file that needs no other file, no script and no network.

    Args:
        record: What was measured, or what `Record.read` returned.
    """
    return render(
        "page.html.j2",
        r=record,
        cards=_cards(record),
        findings=findings(record),
        plots=_figures(record),
        activity_plots=page_figures(record.activity, figures(record.activity)) if record.activity else {},
        measured=words.measured(record),
        energy_measured=words.energy_measured(record),
        energy_rows=_energy_rows(record),
        energy_columns=[{"key": key, "title": title} for key, title, _ in plots.ENERGY_COLUMNS],
        memory_rows=memory.memory_rows(record.energy),
        memory_layers=memory.layer_rows(record.energy),
        bit_rows=memory.bit_rows(record.energy),
        neurobench_rows=memory.neurobench_rows(record.energy),
        price_source=memory.source(record.energy) if record.energy else "",
        size_rows=_size_rows(record),
        way=words.evaluation(record),
        merge_words=words.merging(record),
        delay_words=words.delays(record),
        lossless_delay=words.lossless_delay(record),
        code_words=words.spikes_of_a_count(record),
        audit_words=audit_finding(record).text if record.audit else "",
    )


def _cards(record: Record) -> list[dict[str, str]]:
    accuracy = record.accuracy
    if isinstance(accuracy, DenseAccuracy):
        measured = f"in binary spikes, {accuracy.images} images"
        cards = [(significant(m.spiking), f"{m.name} {measured}") for m in words.main_metrics(accuracy)]
    else:
        cards = [
            (f"{100 * accuracy.spiking:.2f} %", f"accuracy in binary spikes, {accuracy.images} images"),
            (f"{100 * accuracy.quantized:.2f} %", "accuracy of the quantized network, the same images"),
            (f"{100 * accuracy.class_agreement:.2f} %", "images with the same class"),
        ]
    cards.append((f"{record.latency.steps} steps", f"latency; {record.latency.interval} between images"))
    if record.neurons:
        cards.append((f"{words.mean_rate(record.neurons):.3f}", "spikes per neuron and time step"))
    if record.energy:
        totals, preset = record.energy.total_mj.model_dump(), record.energy.preset
        titles = {key: title for key, title, _ in plots.ENERGY_COLUMNS}
        cards += [
            (f"{totals[key]:.3g} mJ", f"{titles[key]}, per image, preset {preset}") for key in ("merged", "integer")
        ]
    cards.append((words.in_bytes(record.sizes.packed_bytes), "packed weights"))
    return [{"value": value, "name": name} for value, name in cards]


def _figures(record: Record) -> Figures:
    entries = [(row["name"], row["bytes"]) for row in _size_rows(record) if row["bytes"] is not None]
    alt = "Sizes: " + ", ".join(f"{name} {words.in_bytes(size)}" for name, size in entries)
    sizes = page_figure(plots.sizes(entries), alt, "Sizes of the weights, computed from the network.")
    return {
        **_delay_figures(record),
        **_activity_figures(record),
        **_raster_figures(record),
        **_energy_figures(record),
        **memory.memory_figures(record.energy),
        "sizes": [sizes],
    }


def _delay_figures(record: Record) -> Figures:
    if record.delays is None:
        return {}
    delays = record.delays
    alt = "Accuracy over the delay: " + "; ".join(
        f"delay {row.delay}: {100 * row.accuracy:.1f} %, same class {100 * row.class_agreement:.1f} %"
        for row in delays.rows
    )
    figure = plots.delay_curve([row.model_dump() for row in delays.rows], delays.quantized_accuracy)
    caption = (
        f"Accuracy and class agreement over the delay, simulated time step by time step on {delays.images} images."
    )
    return {"delay": [page_figure(figure, alt, caption)]}


def _activity_figures(record: Record) -> Figures:
    if not record.neurons:
        return {}
    neurons, drawn = record.neurons, [neuron.model_dump() for neuron in record.neurons]
    measured = words.measured(record)
    low, high = (extreme(neurons, key=lambda neuron: neuron.rate) for extreme in (min, max))
    alt = (
        f"Firing rates, from {low.rate:.4f} ({low.name}) to {high.rate:.4f} ({high.name}), mean "
        f"{words.mean_rate(neurons):.4f}"
    )
    caption = f"Firing rate by layer: spikes per neuron and step of its window, for every delay. {measured}"
    rates = series(plots.firing_rates(drawn), alt, caption)
    quiet = max(neurons, key=lambda neuron: neuron.histogram[0])
    silent = f"{100 * quiet.histogram[0]:.1f} %"
    alt = f"Spike counts by layer; the largest share of silent neurons is {silent}, in {quiet.name}"
    caption = (
        f"Neurons by their spike count per image, 1 to T = {record.model.time_steps}; all other neurons are silent. "
        f"{measured}"
    )
    return {"rates": rates, "histograms": series(plots.count_histograms(drawn), alt, caption)}


def _raster_figures(record: Record) -> Figures:
    raster = record.raster
    if raster is None:
        return {}
    shown, images = len(raster.spikes[0][0]), len(raster.spikes)
    total = sum(sum(map(sum, image)) for image in raster.spikes)
    alt = f"Spike raster of {raster.name}: {total} spikes of {shown} neurons over the windows of {images} images"
    caption = (
        f"Binary spikes of {raster.name}: {shown} of its {raster.neurons} neurons, evenly spaced, over the windows of "
        f"the first {images} images; time steps between two windows are not drawn. Each row is a neuron."
    )
    return {"raster": [page_figure(plots.spike_raster(raster.model_dump()), alt, caption)]}


def _energy_figures(record: Record) -> Figures:
    energy = record.energy
    if energy is None:
        return {}
    measured = words.energy_measured(record)
    alt = "Total energy per image: " + ", ".join(f"{row['name']} {row['mj']:.4g} mJ" for row in _energy_rows(record))
    figure = plots.energy_totals(energy.total_mj.model_dump())
    totals = page_figure(figure, alt, f"Energy of the arithmetic per image. {measured}")
    most = max(energy.layers, key=lambda layer: layer.energy_mj.merged)
    alt = (
        f"Energy by layer in four columns; the merged spiking network needs most in {most.name}, "
        f"{1e3 * most.energy_mj.merged:.3g} µJ"
    )
    layers = plots.energy_by_layer([layer.model_dump() for layer in energy.layers])
    caption = f"Energy by operation, the columns side by side on one scale. {measured}"
    return {"energy_totals": [totals], "energy_layers": series(layers, alt, caption)}


def _energy_rows(record: Record) -> list[dict[str, Any]]:
    if record.energy is None:
        return []
    totals = record.energy.total_mj.model_dump()
    baseline = totals["integer"]
    return [
        {
            "name": name,
            "mj": totals[key],
            "ratio": totals[key] / baseline if baseline and key != "lemaire" else None,
            "how": how,
        }
        for key, (name, how) in _conventions(record.energy).items()
        if totals[key] is not None
    ]


def _conventions(energy: EnergyRecord) -> dict[str, tuple[str, str]]:
    """Names and descriptions of the columns of energy."""
    return {
        "merged": (
            "spiking, merged",
            "ours: additions counted from the spikes that were fired, borders included, each chain of convolutions "
            "merged into one; the stem's MACs once",
        ),
        "unmerged": (
            "spiking, unmerged",
            "ours: the same with the chains as trained, whose inner layers receive no spikes and cost MACs",
        ),
        "papers": ("papers' formula", "the papers' convention: rate × T × operations of the trained layers, stem once"),
        "papers_stem_per_step": ("papers' formula, stem T times", "the same with the stem counted in every time step"),
        "integer": (
            "integer network",
            f"ours, the baseline: the trained layers on {energy.bits}-bit activations without any spikes, every MAC "
            "at the preset's price",
        ),
        "float_twin": ("float twin", "the trained layers on floats, every MAC at the price of floats"),
        "lemaire": (
            "model of Lemaire et al.",
            "the merged network in their analytical model (2022), which includes memory and has its own prices",
        ),
    }


def _size_rows(record: Record) -> list[dict[str, Any]]:
    sizes = record.sizes
    rows = [
        ("float weights", sizes.float_bytes, "4 bytes per parameter"),
        ("packed", sizes.packed_bytes, "weights at their real bit width, with step sizes and norms"),
    ]
    if sizes.file_bytes is not None:
        rows.append(("packed file", sizes.file_bytes, "on disk, with its header"))
    if sizes.converted_bytes is not None:
        meaning = f"the spiking network in memory ({words.merging(record)}), norms folded in"
        rows.append(("converted", sizes.converted_bytes, meaning))
    table = [{"name": n, "value": words.in_bytes(b), "bytes": b, "meaning": m} for n, b, m in rows]
    millions = (
        ("parameters", sizes.parameters, "parameters of the trained network"),
        (
            "float equivalents",
            sizes.float_equivalents,
            "the papers' figure: parameters × bits / 32, neither a count nor bytes",
        ),
    )
    return table + [
        {"name": name, "value": f"{significant(number / 1e6)} M", "bytes": None, "meaning": meaning}
        for name, number, meaning in millions
    ]
