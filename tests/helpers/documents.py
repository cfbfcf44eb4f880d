"""The commands and examples of README and documentation."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Programs that the inline code of a sentence may name.
PROGRAMS = ("qsd ", "lightning ", "make ", "pip ", "python ")

# Commands for OpenMMLab, which tests/mm/test_documents.py runs one after the other.
MM = re.compile(r"python tools/mm|qsd demo (detection|segmentation|scenes)|qsd (convert|run|analyze) .*\.pth")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    language: str
    text: str


def blocks(*languages):
    """All fenced blocks of these languages, in the order of pages."""
    found = []
    for path in PAGES:
        for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE):
            found.append(Block(str(path.relative_to(ROOT)), language, text))
    return [block for block in found if block.language in languages]


def commands():
    """Every command of the shell blocks, once; ``lightning fit`` is the program ``qsd fit``."""
    found = {}
    for block in blocks("bash", "sh", "shell", "console"):
        for line in re.sub(r"\\\n\s*", " ", block.text).splitlines():
            line = re.sub(r"^lightning fit", "qsd fit", line.removeprefix("$ ").strip())
            if line and not line.startswith("#"):
                found.setdefault(line, block.page)
    return list(found)


def inline_commands():
    """The commands that sentences name, once each, without trailing dots."""
    found = {}
    for path in PAGES:
        text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
        for code in re.findall(r"`([^`\n]+)`", text):
            if code.startswith(PROGRAMS):
                found.setdefault(code.removesuffix("...").strip(), str(path.relative_to(ROOT)))
    return list(found)


def subcommand(command):
    """The word after the program: ``fit``, ``convert``, the target of make."""
    return shlex.split(command)[1]


def read(page):
    """The text of a page."""
    return Path(ROOT / page).read_text()
