"""A page about the information that the spikes of attention carry, for one network or several side by side."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from qsd._version import __version__
from qsd.errors import QsdError
from qsd.information import Information
from qsd.report import attention_plots as figures
from qsd.report.rendering import Finding, PageFigure, render, series

MOST_NETWORKS = len(figures.COLOURS)
# Quantities of a signal: key, name on figures, name in tables, key of the upper bound.
QUANTITIES = (
    ("entropy", "entropy of the counts, bits", "entropy, bits", "max_entropy"),
    ("kept_variance", "share of the membrane's variance kept", "variance kept", None),
    ("kept_information", "share of the membrane's information kept", "information kept", None),
    ("firing_rate", "spikes per neuron and time step", "rate", None),
    ("silent_heads", "share of silent heads", "silent heads", None),
    ("teacher_distance", "distance to the teacher's similarity, 0 to 2", "distance to teacher", None),
)


def network_record(label: str, information: Information, **facts: Any) -> dict[str, Any]:
    """The entry of one network in a record.

    Args:
        label: Name of the network on the page.
        information: The measurements.
        **facts: The entries ``model``, ``time_steps``, ``weight_bits`` and ``checkpoint``.
    """
    return {"label": label, **facts, **information.to_dict()}


def attention_record(networks: Sequence[Mapping[str, Any]], data: str, teacher: str | None) -> dict[str, Any]:
    """A record of several networks, for `attention_html` and JSON.

    Args:
        networks: Entries of `network_record`.
        data: Name of the images that were measured, in words.
        teacher: Name of the network whose token similarities were compared, or ``None``.

    Raises:
        QsdError: If there are too many networks, or their attention layers differ.
    """
    if not 1 <= len(networks) <= MOST_NETWORKS:
        raise QsdError(f"{len(networks)} networks: one to {MOST_NETWORKS} can be shown side by side.")
    layers = [[figures.signal_name(signal) for signal in network["signals"]] for network in networks]
    for network, names in zip(networks, layers):
        if names != layers[0]:
            raise QsdError(
                f"{network['label']} has other attention layers than {networks[0]['label']}; analyse them apart."
            )
    means = {key: [_mean(network, key) for network in networks] for key, *_ in (*QUANTITIES, ("max_entropy",))}
    return {"qsd": __version__, "data": data, "teacher": teacher, "means": means, "networks": list(networks)}


def attention_html(record: Mapping[str, Any]) -> str:
    """The page of a record.

    Args:
        record: The result of `attention_record`, or the same read from JSON.
    """
    shown = [(key, name) for key, _, name, _ in QUANTITIES if _known(record, key)]
    return render(
        "attention.html.j2",
        r=record,
        names=figures.signal_name,
        findings=findings(record),
        plots=_figures(record),
        quantities=shown,
        measured=f"Measured on {record['networks'][0]['images']} {record['data']}.",
    )


def findings(record: Mapping[str, Any]) -> list[Finding]:
    """The findings of a record, in sentences.

    Args:
        record: A record, as in `attention_html`.
    """
    networks, means = record["networks"], record["means"]
    found = []

    def by_network(values: Sequence[str | None]) -> str:
        if len(networks) == 1:
            return str(values[0])
        return "; ".join(f"{n['label']}: {value}" for n, value in zip(networks, values) if value is not None)

    def numbers(key: str) -> list[str | None]:
        return [None if value is None else f"{value:.3f}" for value in means[key]]

    if _known(record, "entropy"):
        bits = [
            None if value is None else f"{value:.2f} of at most {most:.2f} bits"
            for value, most in zip(means["entropy"], means["max_entropy"])
        ]
        text = f"mean of queries, keys and values: {by_network(bits)}."
        found.append(Finding("plain", "Entropy of the spike counts,", text))
        text = f"that the counts explain, mean: {by_network(numbers('kept_variance'))}."
        found.append(Finding("plain", "Share of the membranes' variance", text))
    bimodal = [sum((s["membrane"]["bimodality"] or 0) > 5 / 9 for s in n["signals"]) for n in networks]
    shares = [f"{count} of {len(n['signals'])}" for count, n in zip(bimodal, networks)]
    text = f"(coefficient above 5/9), of queries, keys and values: {by_network(shares)}."
    found.append(Finding("plain", "Bimodal membranes", text))
    for network in networks:
        silent = [figures.signal_name(s) for s in network["signals"] if (s["silent_heads"] or 0) > 0.5]
        if silent:
            more = f" and {len(silent) - 3} more" if len(silent) > 3 else ""
            text = f"in {network['label']}, more than half of the heads and images at {', '.join(silent[:3])}{more}."
            found.append(Finding("bad", "Silent heads:", text))
    if _known(record, "teacher_distance"):
        text = f"mean, 0 to 2: {by_network(numbers('teacher_distance'))}."
        found.append(Finding("plain", "Distance to the teacher's token similarities,", text))
    return found


def _known(record: Mapping[str, Any], key: str) -> bool:
    return any(value is not None for value in record["means"][key])


def _mean(network: Mapping[str, Any], key: str) -> float | None:
    values = [signal[key] for signal in network["signals"] if signal[key] is not None]
    return mean(values) if values else None


def _figures(record: Mapping[str, Any]) -> dict[str, list[PageFigure]]:
    networks = record["networks"]
    labels = ", ".join(network["label"] for network in networks)
    found: dict[str, list[PageFigure]] = {}
    for key, name, _, limit in QUANTITIES:
        if _known(record, key):
            values = ", ".join(
                f"{network['label']} {'unknown' if value is None else f'{value:.3f}'}"
                for network, value in zip(networks, record["means"][key])
            )
            caption = f"{name[0].upper()}{name[1:]}, by layer{'; dashed: the upper bound' if limit else ''}."
            drawn = figures.signal_bars(networks, key, name, limit)
            section = {"teacher_distance": "teacher", "firing_rate": "activity", "silent_heads": "activity"}
            alt = f"{name} by layer; means: {values}"
            found.setdefault(section.get(key, "information"), []).extend(series(drawn, alt, caption))
    alt = f"Distributions of the membranes of queries, keys and values by attention layer: {labels}"
    caption = "Membranes of queries, keys and values, by layer. Dotted: the thresholds of the first network"
    found["membranes"] = series(figures.membranes(networks), alt, f"{caption}.")
    found["counts"] = [
        figure
        for network in networks
        if network["time_steps"]
        for figure in series(
            figures.spike_counts(network),
            f"Shares of neurons by spike count and layer: {network['label']}",
            f"{network['label']}: neurons by their spike count per image; the rest fires none.",
        )
    ]
    return found
