"""The report of a conversion: what it changed in a network, what the network costs, and the files of both."""

from qsd.report.classifier import record_conversion, write_conversion
from qsd.report.files import FILES, PAGE, summary, write_csv
from qsd.report.findings import findings
from qsd.report.measuring import Origin, convert_after_training, metrics
from qsd.report.options import MERGES, STAGES, ConversionOptions
from qsd.report.page import html
from qsd.report.record import Record

__all__ = [
    "FILES",
    "MERGES",
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
    "write_csv",
]
