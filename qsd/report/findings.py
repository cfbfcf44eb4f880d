"""The findings of a conversion record, as sentences for page and terminal."""

from collections.abc import Sequence

from qsd.report import words
from qsd.report.costs import EnergyRecord
from qsd.report.memory import memory_finding
from qsd.report.record import AuditedOperation, ComparedCounts, DenseAccuracy, Record
from qsd.report.rendering import Finding, scientific, significant


def findings(record: Record) -> list[Finding]:
    """The findings of a record, the unfavourable ones included.

    Args:
        record: What was measured.
    """
    exact = [compared for compared in record.comparison if compared.dtype == "float64"]
    rounded = [compared for compared in record.comparison if compared.dtype == "float32"]
    found = [_exactness(record, exact)] if exact else []
    found += [_rounding(compared) for compared in rounded[:1]]
    found.append(_accuracy(record))
    if record.audit:
        found.append(audit_finding(record))
    if record.energy:
        found.append(_energy(record.energy))
        if record.energy.with_memory_mj:
            found.append(memory_finding(record.energy))
    return found


def _exactness(record: Record, exact: Sequence[ComparedCounts]) -> Finding:
    images, changed = exact[0].images, max(compared.changed_images for compared in exact)
    ways = {"count": "in the count domain", "simulate": "time step by time step"}
    measured = " and ".join(
        ways[compared.way] + ("" if compared.images == images else f" (on {compared.images} of them)")
        for compared in exact
    )
    kind, title = "good", "Lossless."
    text = f"In float64 every neuron fires the trained spike count on all {images} images"
    if changed or any(compared.class_agreement < 1 for compared in exact):
        kind, title = "bad", "Not lossless."
        text = f"In float64 {changed} of {images} images have a neuron with another spike count than trained"
        if record.conversion.merged_bits is not None:
            text += f" (merged kernels were quantized to {record.conversion.merged_bits} bits)"
    text += f", {measured}, with the delay {words.lossless_delay(record).partition(' = ')[0]}"
    if isinstance(record.accuracy, DenseAccuracy):
        differences = [compared.largest_difference for compared in exact]
        known = [difference for difference in differences if difference is not None]
        if len(known) == len(differences):
            largest = max(known)
            differ = f"differ by at most {scientific(largest)}" if largest else "are equal"
            text += f"; boxes, scores or logits {differ}"
    return Finding(kind, title, f"{text}.")


def _rounding(compared: ComparedCounts) -> Finding:
    text = f"{compared.changed_images} of {compared.images} images have a changed spike count"
    if compared.changed_images:
        dense = compared.other_regions is not None
        same = "classes and masks stay" if dense else "the class stays"
        text += f"; {same} the same for {100 * compared.class_agreement:.2f} %"
    if compared.farthest_first_difference is not None:
        distance = compared.farthest_first_difference
        place = f"is within {scientific(distance)} steps of" if distance else "lies exactly on"
        text += f". The first neuron that differs {place} a threshold in every image, by rounding"
    if compared.other_regions:
        text += f". In {compared.other_regions} of them rounded scores led to another choice of regions first"
    return Finding("plain", "In float32", f"{text}.")


def _accuracy(record: Record) -> Finding:
    accuracy = record.accuracy
    if isinstance(accuracy, DenseAccuracy):
        if not accuracy.metrics:
            return Finding("plain", "Accuracy", "was not measured: the data set's metrics need all of its images.")
        pairs = [
            f"{metric.name} {significant(metric.spiking)} (as trained {significant(metric.quantized)})"
            for metric in words.main_metrics(accuracy)
        ]
        return Finding("plain", "In binary spikes:", f"{', '.join(pairs)} on {accuracy.images} images.")
    lost = 100 * (accuracy.quantized - accuracy.spiking)
    change = "the same as" if lost == 0 else f"{abs(lost):.2f} points {'below' if lost > 0 else 'above'}"
    text = f"{100 * accuracy.spiking:.2f} % of {accuracy.images} images in binary spikes, {change} the trained network"
    if accuracy.float_twin is not None:
        text += f" and {100 * (accuracy.spiking - accuracy.float_twin):+.2f} points from the float twin"
    if record.delays and len(record.delays.rows) > 1:
        undelayed = record.delays.rows[0].accuracy
        text += f"; without any delay {100 * undelayed:.2f} % of {record.delays.images} images"
    return Finding("plain", "Accuracy.", f"{text}.")


def _energy(energy: EnergyRecord) -> Finding:
    totals = energy.total_mj
    mine, other = (totals.merged, totals.unmerged) if energy.merged else (totals.unmerged, totals.merged)
    name, other_name = ("merged", "unmerged") if energy.merged else ("unmerged", "merged")
    text = (
        f"the spiking network as converted ({name}) needs {mine:.3g} mJ per image; {other_name} it would be "
        f"{other:.3g} mJ. A plain integer network of {energy.bits}-bit activations needs "
        f"{totals.integer:.3g} mJ at the same prices (preset {energy.preset}, arithmetic alone, "
        f"{energy.images} images). The papers' formula gives {totals.papers:.3g} mJ."
    )
    ratio = mine / totals.integer
    if ratio <= 1:
        return Finding("good", f"Cheaper than an integer network, {1 / ratio:.2f} times:", text)
    return Finding("bad", f"An integer network would be cheaper, {ratio:.2f} times:", text)


def audit_finding(record: Record) -> Finding:
    """The finding of the audit.

    Args:
        record: What was measured, the audit included.
    """
    assert record.audit is not None
    operations = record.audit.operations
    unproven = [o for o in operations if not (o.spike_driven or o.stem)]
    wrong = [o for o in unproven if o.status != "unproven"]
    if wrong:
        text = f"The input of {len(wrong)} of {len(operations)} operations is not binary spikes: {_names(wrong)}."
        return Finding("bad", "Not spike-driven.", text)
    if unproven:
        text = (
            f"{len(unproven)} of {len(operations)} operations received no spike at all on {record.audit.images} "
            f"images, so nothing is proven for them: {_names(unproven)}. All others{_but_the_first(operations)} "
            "receive binary spikes."
        )
        return Finding("plain", "Spike-driven as far as there were spikes.", text)
    widest = max((o.bits or 0 for o in operations if o.operation == "product"), default=0)
    text = f"All {len(operations)} operations{_but_the_first(operations)} receive binary spikes"
    text += f"; products have one binary operand and one of up to {widest} bits" if widest else ""
    return Finding("good", "Spike-driven.", f"{text}.")


def _but_the_first(operations: Sequence[AuditedOperation]) -> str:
    """The exception for the layer that sees an image; counts of events are spikes already."""
    return " but the first, on the image," if any(operation.stem for operation in operations) else ""


def _names(operations: Sequence[AuditedOperation]) -> str:
    more = f" and {len(operations) - 3} more" if len(operations) > 3 else ""
    return ", ".join(operation.name for operation in operations[:3]) + more
