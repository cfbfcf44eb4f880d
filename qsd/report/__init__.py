"""The report of a conversion: what it changed in a network, what the network costs, and the files of both."""

from qsd.report.classifier import record_conversion, write_conversion
from qsd.report.files import FILES, PAGE, summary
from qsd.report.measuring import Origin, convert_after_training, metrics
from qsd.report.options import STAGES, ConversionOptions
from qsd.report.page import findings, html
from qsd.report.record import Record

__all__ = [
    "FILES",
    "PAGE",
    "STAGES",
    "ConversionOptions",
    "Origin",
    "Record",
    "convert_after_training",
    "findings",
    "html",
    "metrics",
    "record_conversion",
    "summary",
    "write_conversion",
]
