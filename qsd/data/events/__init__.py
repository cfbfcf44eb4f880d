"""Recordings of event cameras: data modules, and the counting of events into frames."""

from qsd.data.events.base import EventData
from qsd.data.events.digit_events import DigitEvents
from qsd.data.events.dvs import DvsData
from qsd.data.events.folder import EventFolderData
from qsd.data.events.frames import Binning, FrameAugmentation
from qsd.data.events.recordings import RecordingArrays, RecordingFiles
from qsd.reading.events import Events, load_events

__all__ = [
    "Binning",
    "DigitEvents",
    "DvsData",
    "EventData",
    "EventFolderData",
    "Events",
    "FrameAugmentation",
    "RecordingArrays",
    "RecordingFiles",
    "load_events",
]
