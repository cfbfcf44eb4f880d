"""An integer network as files for hardware: a description as JSON, arrays, memory files, and test vectors.

The page "Integer networks" of the documentation describes the folder for readers who do not have this package.
"""

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsd.errors import QsdError
from qsd.export.notes import check_notes
from qsd.files import replacing_together
from qsd.integer import Description, IntegerNetwork
from qsd.integer.description import VERSION, width
from qsd.integer.pixels import Bytes
from qsd.integer.scaling import Table
from qsd.schema import Schema, check_version, parse_json, read_object

NETWORK, SCHEMA, ARRAYS, VECTORS = "network.json", "schema.json", "arrays.npz", "vectors.npz"
MEMORIES = "hex"  # A folder.
_REMEDY = "write the folder again with qsd export --format integers"
_PACKABLE_BITS = 4


class ArrayEntry(Schema):
    """An array of the folder.

    Attributes:
        shape: Its shape.
        bits: Width of its integers in the memory file, as two's complement.
        packed: Whether ``arrays.npz`` holds two integers of 4 bits in each byte, the first one in the low half.
    """

    shape: list[int]
    bits: int
    packed: bool


class ChangedEntry(Schema):
    """An image of the search with a changed count, see `qsd.integer.ChangedCount`.

    Attributes:
        image: Number of the image.
        neuron: Name of the first neurons with changed counts, in the order of execution.
        counts: Number of counts that differ there.
        distance: Distance of a membrane from the threshold between both counts, in thresholds.
        bound: Largest distance, in thresholds, between this membrane and the one of the network of floats.
    """

    image: int
    neuron: str
    counts: int
    distance: float
    bound: float


class Record(Schema):
    """How near the integers are to the network of floats. Nothing is computed with it.

    Attributes:
        search: By number of fractional bits that was tried the number of images with a changed count; empty without a
            search.
        changed: The images that the chosen number of bits leaves with a changed count.
        bounds: By neuron the largest distance, in thresholds, from its membrane to that of the network of floats, for
            equal spikes before it. A membrane that is farther from the next threshold gives the same count.
    """

    search: dict[int, int]
    changed: list[ChangedEntry]
    bounds: dict[str, float]


class Dump(Schema):
    """The content of ``network.json``.

    Attributes:
        network: The integer network.
        arrays: Its arrays, by ``layer/array``.
        image: Shape of an image.
        neurons: Names of the neurons, whose spikes the test vectors hold.
        notes: Further facts, such as names of classes.
        record: How near the integers are to the network of floats.
    """

    network: Description
    arrays: dict[str, ArrayEntry]
    image: list[int]
    neurons: list[str]
    notes: dict[str, Any]
    record: Record


def write_integers(
    network: IntegerNetwork,
    folder: str | Path,
    pixels: Bytes | None = None,
    notes: Mapping[str, Any] | None = None,
    memories: bool = True,
) -> None:
    """Write the folder of an integer network.

    Args:
        network: The network.
        folder: Folder to write to; it is made if it does not exist, and files of the same names are replaced.
        pixels: Images of the test vectors, uint8 ``[B, C, H, W]``; ``None`` for no test vectors.
        notes: Further facts to keep, as JSON.
        memories: Whether to write the memory files for ``$readmemh`` too, in a folder of their own.

    Raises:
        QsdError: If the files cannot be written.
    """
    entries = {name: _entry(name, values, network) for name, values in network.arrays.items()}
    dump = Dump(
        network=network.description,
        arrays=entries,
        image=list(network.image_shape),
        neurons=network.neurons(),
        notes=check_notes(notes),
        record=Record(
            search=network.search,
            changed=[ChangedEntry(**asdict(reason)) for reason in network.changed],
            bounds=network.bounds,
        ),
    )
    packed = {name: _packed(values, entries[name]) for name, values in network.arrays.items()}
    vectors = None if pixels is None else _vectors(network, pixels)
    with replacing_together(folder) as partial:
        (partial / NETWORK).write_text(dump.model_dump_json(indent=1), encoding="utf-8")
        (partial / SCHEMA).write_text(json.dumps(Dump.model_json_schema(), indent=1), encoding="utf-8")
        (partial / ARRAYS).write_bytes(_npz(packed))
        if vectors is not None:
            (partial / VECTORS).write_bytes(_npz(vectors))
    if memories:
        with replacing_together(Path(folder) / MEMORIES) as partial:
            for name, values in _memories(network).items():
                (partial / f"{name.replace('/', '.')}.hex").write_text(_hexadecimal(*values), encoding="ascii")


def read_integers(folder: str | Path) -> Dump:
    """Check the description in a folder.

    Args:
        folder: The folder.

    Raises:
        QsdError: If the file is missing, of a newer version, or has a field that does not fit.
    """
    path = Path(folder) / NETWORK
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise QsdError(f"{path} cannot be read: {error}.") from error
    network = read_object(text, str(path), _REMEDY).get("network")
    check_version(network if isinstance(network, dict) else {}, VERSION, str(path))
    return parse_json(Dump, text, str(path), _REMEDY)


def _entry(name: str, values: NDArray[Any], network: IntegerNetwork) -> ArrayEntry:
    layer_name, array = name.rsplit("/", 1)
    layer = network.layer(layer_name)
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    stated = {"weight": "weight_bits", "thresholds": "threshold_bits"}.get(array)
    bits = width(min(low, -1), high) if stated is None else getattr(layer, stated)
    return ArrayEntry(shape=list(values.shape), bits=bits, packed=array == "weight" and bits <= _PACKABLE_BITS)


def _packed(values: NDArray[Any], entry: ArrayEntry) -> NDArray[Any]:
    """Two integers of 4 bits in a byte, or the array as it is."""
    if not entry.packed:
        return values
    halves = values.reshape(-1).astype(np.int64) & 15
    halves = np.append(halves, np.zeros(len(halves) % 2, np.int64)).reshape(-1, 2)
    return (halves[:, 0] | halves[:, 1] << 4).astype(np.uint8)


def _npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Compressed arrays as `numpy.load` reads them; equal arrays give equal bytes."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, values in arrays.items():
            single = io.BytesIO()
            np.lib.format.write_array(single, np.ascontiguousarray(values), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), single.getvalue(), zipfile.ZIP_DEFLATED)
    return content.getvalue()


def _memories(network: IntegerNetwork) -> dict[str, tuple[NDArray[Any], int]]:
    """The arrays of the memory files and their widths: those of the folder, and tables of weights written out."""
    memories = {name: (values, _entry(name, values, network).bits) for name, values in network.arrays.items()}
    for layer in network.description.layers:
        if layer.kind == "convolution" and layer.table_shift is not None:
            multiplier = memories.pop(f"{layer.name}/multiplier")[0].astype(np.int64)
            codes = np.arange(2**layer.weight_bits)
            # A weight addresses the table by its bits, as an unsigned number.
            weights = np.where(codes < 2 ** (layer.weight_bits - 1), codes, codes - 2**layer.weight_bits)
            entries = Table(multiplier, layer.table_shift).entries(weights[None].repeat(len(multiplier), 0))
            memories[f"{layer.name}/table"] = entries, layer.entry_bits
    return memories


def _hexadecimal(values: NDArray[Any], bits: int) -> str:
    """One integer in a line, in the order of memory, as two's complement of so many bits."""
    digits, mask = -(-bits // 4), (1 << bits) - 1
    head = f"// {bits} bits, shape {' '.join(map(str, values.shape))}\n"
    return head + "".join(f"{value & mask:0{digits}x}\n" for value in values.reshape(-1).tolist())


def _vectors(network: IntegerNetwork, pixels: Bytes) -> dict[str, NDArray[Any]]:
    """Images, the spikes of every neuron and max-pool in every step, and the output."""
    spikes: dict[str, list[NDArray[Any]]] = {}
    outputs = []
    names = [layer.name for layer in network.description.layers if layer.kind in ("neuron", "max_pool")]
    for i in range(len(pixels)):  # One at a time, because all signals of all steps are held.
        values = network.simulate(pixels[i : i + 1])
        outputs.append(network.output(values))
        for name in names:
            steps = values.signals[name][:, 0]
            spikes.setdefault(name, []).append(np.packbits(steps.reshape(len(steps), -1).astype(bool), axis=1))
    packed = {f"spikes/{name}": np.stack(rows) for name, rows in spikes.items()}
    return {"pixels": pixels, "output": np.concatenate(outputs), **packed}
