"""Weights of 4 bits as words of a dictionary: bytes that stand for one to five weights each (ours).

Files of ONNX cannot be compressed, but a table can be read at an index and entries of a tensor can be left out. So a
byte is the number of a row of a table of words, and behind the shorter words of the table there are entries that are
left out. The likelier weights are, the more of them make up a word, so that a weight takes little more bits than its
entropy. Runtimes unpack the words once, when they load the file.
"""

import heapq
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
_WORDS, _LONGEST = 256, 5
_LEVELS, _LEAST = 16, -8


@dataclass(frozen=True)
class Dictionary:
    """Words for a sequence of integers from -8 to 7.

    Attributes:
        words: At most 256 words. All integers of the sequence are words of their own.
    """

    words: list[tuple[int, ...]]

    @classmethod
    def of(cls, integers: Integers) -> "Dictionary":
        """The words that are the likeliest if integers follow each other at random.

        Args:
            integers: The sequence.
        """
        shares = np.bincount(integers - _LEAST, minlength=_LEVELS) / max(len(integers), 1)
        levels = [(int(level) + _LEAST, float(shares[level])) for level in np.flatnonzero(shares)]
        words: list[tuple[int, ...]] = [(level,) for level, _ in levels]
        longer: list[tuple[float, tuple[int, ...]]] = []

        def extend(word: tuple[int, ...], share: float) -> None:
            if len(word) < _LONGEST:
                for level, more in levels:
                    heapq.heappush(longer, (-share * more, (*word, level)))

        for level, share in levels:
            extend((level,), share)
        while longer and len(words) < _WORDS:
            share, word = heapq.heappop(longer)
            words.append(word)
            extend(word, -share)
        return cls(words)

    def encode(self, integers: Integers) -> NDArray[np.uint8]:
        """The numbers of the words that make up a sequence; each word is the longest one that fits.

        Args:
            integers: The sequence that the dictionary was made for.
        """
        digits = (integers - _LEAST).astype(np.int32)
        lengths, numbers = np.zeros(len(digits), np.int8), np.zeros(len(digits), np.uint8)
        keys: NDArray[np.int32] = np.zeros(len(digits), np.int32)
        for length in range(1, _LONGEST + 1):
            keys = keys[: len(digits) - length + 1] * _LEVELS + digits[length - 1 :]
            found = np.full(_LEVELS**length, -1, np.int16)
            for number, word in enumerate(self.words):
                if len(word) == length:
                    found[np.dot(np.array(word) - _LEAST, _LEVELS ** np.arange(length)[::-1])] = number
            seen = found[keys]
            fits = np.flatnonzero(seen >= 0)
            lengths[fits], numbers[fits] = length, seen[fits]
        starts, place, steps = [], 0, lengths.tolist()
        while place < len(steps):
            starts.append(place)
            place += steps[place]
        return numbers[starts]

    def tables(self) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
        """The words in rows of one length, ``[words, L]``, and by entry whether it belongs to the word."""
        columns = [*itertools.zip_longest(*self.words)]
        entries = np.array([[0 if level is None else level for level in column] for column in columns], np.int8)
        used = np.array([[level is not None for level in column] for column in columns])
        return np.ascontiguousarray(entries.T), np.ascontiguousarray(used.T)


def add_words(graph: Any, tensors: dict[str, Integers]) -> None:
    """Add tensors of weights as words of one dictionary.

    Args:
        graph: The `qsd.export.integers.IntegerGraph` to add to.
        tensors: Integers from -8 to 7 by the name of the value that holds them, as signed bytes.
    """
    sequence = np.concatenate([integers.reshape(-1) for integers in tensors.values()])
    dictionary = Dictionary.of(sequence)
    entries, used = dictionary.tables()
    types = graph.onnx.TensorProto
    words = graph.constant("weights.words", dictionary.encode(sequence), np.uint8)
    rows = graph.add("Cast", [words], "weights.rows", to=types.INT32)
    one_row = graph.shared([-1], np.int64)
    parts = []
    for name, values, dtype in (("entries", entries, np.int8), ("used", used, np.bool_)):
        read = graph.add(
            "Gather", [graph.constant(f"weights.table.{name}", values, dtype), rows], f"weights.{name}.rows"
        )
        parts.append(graph.add("Reshape", [read, one_row], f"weights.{name}"))
    graph.add("Compress", parts, "weights.all")
    # ONNX Runtime unpacks the words at each run instead of once, unless it is told how many weights there are.
    known = graph.onnx.helper.make_tensor_value_info("weights.all", types.INT8, [len(sequence)])
    graph.model.graph.value_info.append(known)
    sizes = graph.constant("weights.sizes", [integers.size for integers in tensors.values()], np.int64)
    graph.split(["weights.all", sizes], [f"{name}.flat" for name in tensors])
    for name, integers in tensors.items():
        graph.add("Reshape", [f"{name}.flat", graph.shared(list(integers.shape), np.int64)], name)
