"""A conversion record as a page."""

from collections.abc import Mapping, Sequence
from typing import Any

from qsd import plots
from qsd.report.rendering import Finding, PageFigure, page_figure, render, scientific, series, significant


def html(record: Mapping[str, Any]) -> str:
    """The page of a record.

    Args:
        record: what `qsd.report.record` returned, or what is in a ``conversion.json``.
    """
    return render(
        "page.html.j2",
        r=record,
        cards=_cards(record),
        findings=findings(record),
        plots=_figures(record),
        measured=_measured(record),
        energy_measured=_energy_measured(record),
        energy_rows=_energy_rows(record),
        energy_columns=[{"key": key, "title": title} for key, title, _ in plots.ENERGY_COLUMNS],
        size_rows=_size_rows(record),
        way=_way(record),
        merge_words=_merge_words(record),
        delay_words=_delay_words(record),
        audit_words=_audit_finding(record).text if record["audit"] else "",
        missing=record["left_out"],
        segments=record.get("segments", []),
    )


def findings(record: Mapping[str, Any]) -> list[Finding]:
    """What a record says, in sentences, the bad news included.

    Args:
        record: see `html`.
    """
    found = [*_comparison_findings(record), _accuracy_finding(record)]
    if record["audit"]:
        found.append(_audit_finding(record))
    if record["energy"]:
        found.append(_energy_finding(record["energy"]))
    return found


def _comparison_findings(record: Mapping[str, Any]) -> list[Finding]:
    exact = [c for c in record["comparison"] if c["dtype"] == "float64"]
    rounded = [c for c in record["comparison"] if c["dtype"] == "float32"]
    found = []
    if exact:
        images, changed = exact[0]["images"], max(c["changed_images"] for c in exact)
        fewer = {c["way"]: "" if c["images"] == images else f" (on {c['images']} of them)" for c in exact}
        words = {"count": "in the count domain", "simulate": "spike by spike"}
        ways = " and ".join(words[c["way"]] + fewer[c["way"]] for c in exact)
        title, kind, text = (
            "Lossless.",
            "good",
            f"In float64 every neuron fires the trained count on all {images} images",
        )
        if changed or any(c["class_agreement"] < 1 for c in exact):
            title, kind = "Not lossless.", "bad"
            text = f"In float64 {changed} of {images} images have a neuron with another count than trained"
            if record["conversion"]["merged_bits"] is not None:
                text += f" (merged kernels were quantized to {record['conversion']['merged_bits']} bits)"
        text = f"{text}, {ways}, with the delay T − 1"
        differences = [c["largest_difference"] for c in exact if "largest_difference" in c]
        if differences and None not in differences:
            largest = max(differences)
            text += (
                f"; boxes, scores or logits {f'differ by {scientific(largest)} at most' if largest else 'are equal'}"
            )
        found.append(Finding(kind, title, f"{text}."))
    for c in rounded[:1]:
        text = f"{c['changed_images']} of {c['images']} images have a changed count"
        if c["changed_images"]:
            what = "classes and masks stay" if "largest_difference" in c else "the class stays"
            text += f"; {what} the same for {100 * c['class_agreement']:.2f} %"
        if c["farthest_first_difference"] is not None:
            farthest = scientific(c["farthest_first_difference"])
            text += f", and each began within {farthest} steps of a threshold, by rounding"
        if c.get("other_regions"):
            text += f"; {c['other_regions']} of them began with another choice of regions, by rounded scores"
        found.append(Finding("plain", "In float32", f"{text}."))
    return found


def _accuracy_finding(record: Mapping[str, Any]) -> Finding:
    accuracy = record["accuracy"]
    if "metrics" in accuracy:
        if not accuracy["metrics"]:
            return Finding("plain", "Accuracy", "was not measured: the data set's metrics need all of its images.")
        pairs = [
            f"{m['name']} {significant(m['spiking'])} (as trained {significant(m['quantized'])})" for m in _main(record)
        ]
        return Finding("plain", "In binary spikes:", f"{', '.join(pairs)} on {accuracy['images']} images.")
    lost = 100 * (accuracy["quantized"] - accuracy["spiking"])
    change = "the same as" if lost == 0 else f"{abs(lost):.2f} points {'below' if lost > 0 else 'above'}"
    text = f"{100 * accuracy['spiking']:.2f} % of {accuracy['images']} images in binary spikes, "
    text += f"{change} the trained network"
    if accuracy["float"] is not None:
        text += f" and {100 * (accuracy['spiking'] - accuracy['float']):+.2f} points to the float twin"
    if record["delays"] and len(record["delays"]["rows"]) > 1:
        first = record["delays"]["rows"][0]
        text += f"; without any delay {100 * first['accuracy']:.2f} % of {record['delays']['images']} images"
    return Finding("plain", "Accuracy.", f"{text}.")


def _energy_finding(energy: Mapping[str, Any]) -> Finding:
    totals = energy["total_mj"]
    mine, other = ("merged", "unmerged") if energy["merged"] else ("unmerged", "merged")
    text = (
        f"the spiking network as converted ({mine}) needs {totals[mine]:.3g} mJ per image; {other} it would be "
        f"{totals[other]:.3g} mJ. A plain integer network of {energy['bits']}-bit activations needs "
        f"{totals['integer']:.3g} mJ at the same prices (preset {energy['preset']}, arithmetic alone, "
        f"{energy['images']} images). The papers' formula gives {totals['papers']:.3g} mJ."
    )
    ratio = totals[mine] / totals["integer"]
    if ratio <= 1:
        return Finding("good", f"Cheaper than an integer network, {1 / ratio:.2f} times:", text)
    return Finding("bad", f"An integer network would be cheaper, {ratio:.2f} times:", text)


def _main(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The metrics of a detector or segmenter that are reported first: those at an IoU of 0.5, else all."""
    metrics = record["accuracy"]["metrics"]
    return (
        [m for m in metrics if m["name"].endswith("_50")]
        or [m for m in metrics if m["name"].startswith("m")]
        or metrics
    )


def _cards(record: Mapping[str, Any]) -> list[dict[str, str]]:
    accuracy = record["accuracy"]
    if "metrics" in accuracy:
        what = f"in binary spikes, {accuracy['images']} images"
        cards = [(significant(m["spiking"]), f"{m['name']} {what}") for m in _main(record)]
    else:
        cards = [
            (f"{100 * accuracy['spiking']:.2f} %", f"accuracy in binary spikes, {accuracy['images']} images"),
            (f"{100 * accuracy['quantized']:.2f} %", "accuracy of the quantized network, the same images"),
            (f"{100 * accuracy['class_agreement']:.2f} %", "images with the same class"),
        ]
    cards.append((f"{record['latency']['steps']} steps", f"latency; {record['latency']['interval']} between images"))
    if record["neurons"]:
        cards.append((f"{_mean_rate(record['neurons']):.3f}", "spikes per neuron and time step"))
    if record["energy"]:
        totals, preset = record["energy"]["total_mj"], record["energy"]["preset"]
        for key, title, _ in plots.ENERGY_COLUMNS:
            if key in ("merged", "integer") and totals.get(key) is not None:
                cards.append((f"{totals[key]:.3g} mJ", f"{title}, per image, preset {preset}"))
    if record["sizes"]:
        cards.append((_bytes(record["sizes"]["packed_bytes"]), "packed weights"))
    return [{"value": value, "name": name} for value, name in cards]


def _figures(record: Mapping[str, Any]) -> dict[str, list[PageFigure]]:
    found: dict[str, list[PageFigure]] = {}
    measured = _measured(record)
    if record["delays"]:
        rows, images = record["delays"]["rows"], record["delays"]["images"]
        alt = "Accuracy over the delay: " + "; ".join(
            f"delay {r['delay']}: {100 * r['accuracy']:.1f} %, same class {100 * r['class_agreement']:.1f} %"
            for r in rows
        )
        figure = plots.delay_curve(rows, record["delays"]["quantized_accuracy"])
        caption = f"Accuracy and class agreement over the delay. Stepped spike by spike on {images} images."
        found["delay"] = [page_figure(figure, alt, caption)]
    if record["neurons"]:
        neurons = record["neurons"]
        low, high = (f(neurons, key=lambda n: n["rate"]) for f in (min, max))
        alt = (
            f"Firing rates, from {low['rate']:.4f} ({low['name']}) to {high['rate']:.4f} ({high['name']}), mean "
            f"{_mean_rate(neurons):.4f}"
        )
        caption = f"Firing rate by layer: spikes per neuron and time step, divided by T whatever the delay. {measured}"
        found["rates"] = series(plots.firing_rates(neurons), alt, caption)
        quiet = max(neurons, key=lambda n: n["histogram"][0])
        silent = f"{100 * quiet['histogram'][0]:.1f} %"
        alt = f"Spike counts by layer; most silent is {quiet['name']}, where {silent} of the neurons fire none"
        caption = f"Neurons by their spike count per image, 1 to T = {record['model']['time_steps']}; the rest of the "
        found["histograms"] = series(plots.count_histograms(neurons), alt, f"{caption}neurons fires none. {measured}")
    if record["raster"]:
        raster = record["raster"]
        shown, images = len(raster["spikes"][0][0]), len(raster["spikes"])
        total = sum(sum(map(sum, image)) for image in raster["spikes"])
        alt = f"Spike raster of {raster['name']}: {total} spikes of {shown} neurons over the windows of {images} images"
        caption = (
            f"Binary spikes of {raster['name']}: {shown} of its {raster['neurons']} neurons, evenly spaced, over the "
            f"windows of the first {images} images; what lies between two windows is left out. Each row is a neuron."
        )
        found["raster"] = [page_figure(plots.spike_raster(raster), alt, caption)]
    if record["energy"]:
        energy = record["energy"]
        rows = [f"{row['name']} {row['mj']:.4g} mJ" for row in _energy_rows(record)]
        alt = "Total energy per image: " + ", ".join(rows)
        caption = f"Energy of the arithmetic per image. {_energy_measured(record)}"
        found["energy_totals"] = [page_figure(plots.energy_totals(energy["total_mj"]), alt, caption)]
        most = max(energy["layers"], key=lambda layer: layer["energy_mj"]["merged"] or 0.0)
        alt = (
            f"Energy by layer in four columns; the dearest of the merged spiking network is {most['name']} with "
            f"{1e3 * most['energy_mj']['merged']:.3g} µJ"
        )
        caption = f"Energy by operation, the columns side by side on one scale. {_energy_measured(record)}"
        found["energy_layers"] = series(plots.energy_by_layer(energy["layers"]), alt, caption)
    if record["sizes"]:
        entries = [(row["name"], row["bytes"]) for row in _size_rows(record) if row["bytes"] is not None]
        alt = "Sizes: " + ", ".join(f"{name} {_bytes(size)}" for name, size in entries)
        found["sizes"] = [page_figure(plots.sizes(entries), alt, "Sizes of the weights, computed from the network.")]
    return found


def _measured(record: Mapping[str, Any]) -> str:
    return f"Measured on {record['accuracy']['images']} images, {_way(record)}." if record["neurons"] else ""


def _energy_measured(record: Mapping[str, Any]) -> str:
    energy = record["energy"]
    if not energy:
        return ""
    return (
        f"Measured on {energy['images']} images; preset {energy['preset']}: {energy['mac_pj']} pJ per MAC, "
        f"{energy['ac_pj']} pJ per addition. Merged, unmerged and integer network: our counts; papers' formula: theirs."
    )


def _energy_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    energy = record["energy"]
    if not energy:
        return []
    how = {
        "merged": (
            "spiking, merged",
            "ours: additions counted from the spikes that fell, borders included, each chain of convolutions merged "
            "into one; the stem's MACs once",
        ),
        "unmerged": (
            "spiking, unmerged",
            "ours: the same with the chains as trained, whose inner layers do not see spikes and cost MACs",
        ),
        "papers": ("papers' formula", "the papers' convention: rate × T × operations of the trained layers, stem once"),
        "papers_stem_per_step": ("papers' formula, stem T times", "the same with the stem counted in every time step"),
        "integer": (
            "integer network",
            f"ours, the honest rival: the trained layers on {energy['bits']}-bit activations without any spikes, every "
            "MAC at the preset's price",
        ),
    }
    totals, rival = energy["total_mj"], energy["total_mj"]["integer"]
    return [
        {"name": name, "mj": totals[key], "ratio": totals[key] / rival if rival else None, "how": words}
        for key, (name, words) in how.items()
        if totals.get(key) is not None
    ]


def _size_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    sizes = record["sizes"]
    if not sizes:
        return []
    rows = [
        ("float weights", sizes["float_bytes"], "4 bytes per parameter"),
        ("packed", sizes["packed_bytes"], "weights at their real bit width, step sizes and norms beside them"),
    ]
    if sizes["file_bytes"] is not None:
        rows.append(("packed file", sizes["file_bytes"], "on disk, with its header"))
    if sizes["converted_bytes"] is not None:
        meaning = f"what the spiking network ({_merge_words(record)}) holds in memory, norms folded in"
        rows.append(("converted", sizes["converted_bytes"], meaning))
    table = [{"name": n, "value": _bytes(b), "bytes": b, "meaning": m} for n, b, m in rows]
    equivalents = sizes["float_equivalents"]
    value = f"{significant(equivalents / 1e6)} M"
    meaning = "the papers' figure: parameters × bits / 32, neither a count nor bytes"
    parameters = {"name": "parameters", "value": f"{significant(sizes['parameters'] / 1e6)} M", "bytes": None}
    return [
        *table,
        {**parameters, "meaning": "of the trained network"},
        {"name": "float equivalents", "value": value, "bytes": None, "meaning": meaning},
    ]


def _audit_finding(record: Mapping[str, Any]) -> Finding:
    audit = record["audit"]
    operations = audit["operations"]
    open_ = [o for o in operations if not (o["spike_driven"] or o["stem"])]
    wrong = [o for o in open_ if o["status"] != "unproven"]
    if wrong:
        text = f"{len(wrong)} of {len(operations)} operations see something else than binary spikes: {_names(wrong)}."
        return Finding("bad", "Not spike-driven.", text)
    if open_:
        text = (
            f"{len(open_)} of {len(operations)} operations saw no spike at all on {audit['images']} images, so nothing "
            f"is proven of them: {_names(open_)}. The others but the first see binary spikes."
        )
        return Finding("plain", "Spike-driven as far as there were spikes.", text)
    widest = max((o["bits"] or 0 for o in operations if o["operation"] == "product"), default=0)
    text = f"Of {len(operations)} operations all but the first, on the image, see binary spikes"
    text += f"; products have one binary operand, the other up to {widest} bits" if widest else ""
    return Finding("good", "Spike-driven.", f"{text}.")


def _names(operations: Sequence[Mapping[str, Any]]) -> str:
    more = f" and {len(operations) - 3} more" if len(operations) > 3 else ""
    return ", ".join(o["name"] for o in operations[:3]) + more


def _merge_words(record: Mapping[str, Any]) -> str:
    merge, bits = record["conversion"]["merge"], record["conversion"]["merged_bits"]
    words = {True: "merged convolutions", False: "unmerged convolutions"}.get(merge, f"only {merge} chains merged")
    return words if bits is None else f"{words} of {bits} bits"


def _delay_words(record: Mapping[str, Any]) -> str:
    delay, lossless = record["conversion"]["delay"], record["model"]["time_steps"] - 1
    if delay is None:
        return f"the lossless delay T − 1 = {lossless} at every neuron"
    return f"a delay of {delay} at every neuron" if isinstance(delay, int) else "delays chosen neuron by neuron"


def _way(record: Mapping[str, Any]) -> str:
    return "spike by spike" if record["accuracy"]["way"] == "simulate" else "in the count domain"


def _mean_rate(neurons: Sequence[Mapping[str, Any]]) -> float:
    total = sum(neuron["size"] for neuron in neurons)
    return sum(neuron["rate"] * neuron["size"] for neuron in neurons) / total


def _bytes(size: float) -> str:
    return f"{significant(size / 1e6)} MB" if size >= 1e6 else f"{significant(size / 1e3)} kB"
