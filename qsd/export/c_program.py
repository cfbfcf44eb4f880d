"""An integer network as one C99 file and its header: no dependency, no allocation, no floating point."""

import re
from pathlib import Path

from qsd._version import __version__
from qsd.errors import QsdError
from qsd.export.c_constants import constants
from qsd.export.c_layers import Mode, statements
from qsd.files import replacing
from qsd.integer import IntegerNetwork

# Files of C that stand at the beginning and at the end of every program.
_KERNELS, _MAIN = Path(__file__).with_name("kernels.c"), Path(__file__).with_name("main.c")
_MOST_AXES = 3

_HEADER = """/* An integer spiking network, written by qsd {version}. */
#ifndef {guard}_H
#define {guard}_H

#include <stdint.h>

#define {guard}_CHANNELS {channels}
#define {guard}_HEIGHT {height}
#define {guard}_WIDTH {width}
#define {guard}_CLASSES {classes}
#define {guard}_STEPS {steps}

/* Called with the spikes of a layer, one byte each, step by step; the number is that of the layer in the .c file. */
typedef void (*{prefix}_watch)(int layer, const uint8_t *spikes, int steps, int size);

/* Both give one integer by class for an image of bytes [channels][height][width]; the largest names the class.
 * {prefix}_count multiplies spike counts, {prefix}_step adds weights spike by spike. The watch may be NULL. They share
 * static memory, so that they must not run at the same time. */
void {prefix}_count(const uint8_t *pixels, int32_t *output);
void {prefix}_step(const uint8_t *pixels, int32_t *output, {prefix}_watch watch);

#endif
"""


def write_c(network: IntegerNetwork, path: str | Path) -> None:
    """Write the program and its header, which has the same name with the ending ``.h``.

    Args:
        network: The integer network.
        path: The file of the program; one that exists is replaced.

    Raises:
        QsdError: If a file cannot be written, or a layer has more axes than the program handles.
    """
    path = Path(path)
    for layer in network.description.layers:
        if layer.kind == "permute" and len(layer.shape) > _MOST_AXES:
            raise QsdError(f"layer {layer.name} arranges {len(layer.shape)} axes, and a C program at most three.")
    names = _names(network, path)
    with replacing(path.with_suffix(".h")) as partial:
        partial.write_text(_HEADER.format(**names), encoding="ascii")
    with replacing(path) as partial:
        partial.write_text(_program(network, path, names), encoding="ascii")


def memory_bytes(network: IntegerNetwork) -> int:
    """Bytes of the static memory of a program, for counts and steps together.

    Args:
        network: The integer network.
    """
    return max(Mode.of(network.description, stepped).memory.size for stepped in (False, True))


def _names(network: IntegerNetwork, path: Path) -> dict[str, object]:
    """Words that stand in the texts above."""
    prefix = re.sub(r"\W", "_", path.stem, flags=re.ASCII)
    prefix = prefix if prefix[:1].isalpha() else f"n{prefix}"
    channels, height, width = network.image_shape
    description = network.description
    return {
        "version": __version__,
        "prefix": prefix,
        "guard": prefix.upper(),
        "channels": channels,
        "height": height,
        "width": width,
        "classes": network.layer(description.output).size,
        "steps": description.time_steps,
    }


def _program(network: IntegerNetwork, path: Path, names: dict[str, object]) -> str:
    description = network.description
    parts = [
        f"/* An integer spiking network, written by qsd {__version__}. Layers are numbered in their order. */",
        f'#include "{path.with_suffix(".h").name}"',
        "#include <stddef.h>\n",
        _KERNELS.read_text(encoding="ascii"),
    ]
    for number, layer in enumerate(description.layers):
        lines = constants(layer, number, description, network.arrays)
        if lines:
            parts += [f"/* {number}: {_comment(layer.name)} ({layer.kind}) */", *lines]
    counts, steps = Mode.of(description, False), Mode.of(description, True)
    size = max(counts.memory.size, steps.memory.size)
    parts.append(f"\nstatic int32_t arena[{-(-size // 4)}];\n")
    prefix = names["prefix"]
    parts += _function(f"void {prefix}_count(const uint8_t *pixels, int32_t *output)", counts)
    parts += _function(f"void {prefix}_step(const uint8_t *pixels, int32_t *output, {prefix}_watch watch)", steps)
    parts += [
        f"#define QSD_PIXELS ({names['channels']} * {names['height']} * {names['width']})",
        f"#define QSD_CLASSES {names['classes']}",
        f"#define QSD_COUNT {prefix}_count",
        f"#define QSD_STEP {prefix}_step",
        _MAIN.read_text(encoding="ascii"),
    ]
    return "\n".join(parts)


def _function(head: str, mode: Mode) -> list[str]:
    lines = [head, "{"]
    for number, layer in enumerate(mode.network.layers):
        lines += [f"    {line}" for line in statements(layer, number, mode)]
    output = mode.layer(mode.network.output)
    if mode.stepped:
        lines.append(f"    qsd_sum_steps({mode.at(output.name)}, {mode.steps}, {output.size}, output);")
    else:
        lines += [f"    for (int i = 0; i < {output.size}; ++i)", f"        output[i] = {mode.at(output.name)}[i];"]
    return [*lines, "}\n"]


def _comment(name: str) -> str:
    """A name as it may stand in a comment."""
    return name.encode("ascii", "replace").decode().replace("*/", "* /")
