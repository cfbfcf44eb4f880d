"""What a conversion did to a network and what it costs: the record, its page, and the files of both."""

from qsd.report.files import FILES, summary, write_conversion
from qsd.report.page import findings, html
from qsd.report.recording import STAGES, Record, check_options, metrics, record_conversion

__all__ = [
    "FILES",
    "STAGES",
    "Record",
    "check_options",
    "findings",
    "html",
    "metrics",
    "record_conversion",
    "summary",
    "write_conversion",
]
