"""Prices of operations and of memory accesses, and the choice of a memory by its size."""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, model_validator

from qsd.errors import QsdError
from qsd.reading import regular_file
from qsd.schema import Schema, parse

Preset = Literal["fp32", "fp16", "int8"]
# Price of a multiply-accumulate and of an accumulate, in pJ.
PRESETS: dict[Preset, tuple[float, float]] = {"fp32": (4.6, 0.9), "fp16": (1.5, 0.4), "int8": (0.23, 0.03)}

_REMEDY = "docs/energy.md shows such a file"
_LARGEST_FILE = 2**20  # bytes
_WORD = 64  # bits, to which the prices of memories belong
_HOROWITZ = "Horowitz, Computing's energy problem, ISSCC 2014, 45 nm"
Price = Annotated[float, Field(ge=0, le=1e12)]


class Memory(Schema):
    """A memory on the chip.

    Attributes:
        kib: Its size in KiB.
        pj: Energy in pJ of reading or writing 64 bits.
    """

    kib: Annotated[float, Field(gt=0, le=1e9)]
    pj: Price


class Prices(Schema):
    """Prices of operations and of memory accesses.

    Attributes:
        source: Where they come from.
        mac_pj: Energy in pJ of a multiply-accumulate of the spiking and the integer network.
        ac_pj: Energy in pJ of an accumulate.
        float_mac_pj: Energy in pJ of a multiply-accumulate of the float twin.
        memories: Memories on the chip, the smallest first.
        dram_pj: Lower and upper end of the energy in pJ of 64 bits of what fits into none of them.
    """

    source: Annotated[str, Field(min_length=1, max_length=1000)]
    mac_pj: Price
    ac_pj: Price
    float_mac_pj: Price = 4.6
    memories: Annotated[list[Memory], Field(min_length=1, max_length=100)]
    dram_pj: Annotated[list[Price], Field(min_length=2, max_length=2)]

    @model_validator(mode="after")
    def _in_order(self) -> "Prices":
        sizes = [memory.kib for memory in self.memories]
        if sizes != sorted(set(sizes)):
            raise ValueError("memories must become larger from one to the next")
        if self.dram_pj[0] > self.dram_pj[1]:
            raise ValueError("dram_pj must be the lower and the upper end")
        return self

    def per_bit(self, held: float) -> tuple[float, float]:
        """Energy in pJ of one bit of the smallest memory that is large enough, at both ends of its range.

        Args:
            held: Bits that the memory has to hold.
        """
        memory = self.memory(held)
        low, high = self.dram_pj if memory is None else (memory.pj, memory.pj)
        return low / _WORD, high / _WORD

    def memory(self, held: float) -> Memory | None:
        """The smallest memory that is large enough, ``None`` for DRAM.

        Args:
            held: Bits that the memory has to hold.
        """
        return next((memory for memory in self.memories if held <= memory.kib * 8192), None)


def preset_prices(preset: Preset) -> Prices:
    """The prices of 45 nm (Horowitz, 2014).

    Args:
        preset: Arithmetic of the spiking and the integer network.

    Raises:
        QsdError: For an unknown preset.
    """
    if preset not in PRESETS:
        raise QsdError(f"preset={preset!r} is unknown; use one of {', '.join(PRESETS)}.")
    mac, ac = PRESETS[preset]
    memories = [Memory(kib=kib, pj=pj) for kib, pj in ((8.0, 10.0), (32.0, 20.0), (1024.0, 100.0))]
    return Prices(source=_HOROWITZ, mac_pj=mac, ac_pj=ac, memories=memories, dram_pj=[1300.0, 2600.0])


def read_prices(path: str | Path) -> Prices:
    """Read prices from a YAML file.

    Args:
        path: The file.

    Raises:
        QsdError: If it cannot be read, is no YAML, or a field is missing or does not fit.
    """
    file = regular_file(path, "price file")
    if file.stat().st_size > _LARGEST_FILE:
        raise QsdError(f"{path} is larger than 1 MiB and holds no prices; {_REMEDY}.")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise QsdError(f"{path} is no YAML: {' '.join(str(error).split())[:200]}; {_REMEDY}.") from error
    if not isinstance(content, dict):
        raise QsdError(f"{path} holds a {type(content).__name__} instead of fields with prices; {_REMEDY}.")
    return parse(Prices, {str(key): value for key, value in content.items()}, str(path), _REMEDY)


def chosen_prices(preset: Preset, prices: Prices | str | Path | None) -> tuple[Preset | Literal["own"], Prices]:
    """The prices that a measurement was asked for, and their name.

    Args:
        preset: Name of the energy-price table.
        prices: Prices of one's own instead, or a YAML file with them; ``None`` for the preset's.

    Raises:
        QsdError: For an unknown preset, or prices that do not fit.
    """
    known = preset_prices(preset)
    if prices is None:
        return preset, known
    return "own", prices if isinstance(prices, Prices) else read_prices(prices)
