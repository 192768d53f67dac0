"""The text of a file that is one document: plain, HTML or PDF."""

import logging
import re
from pathlib import Path

_BLOCKS = (
    "address article blockquote br dd div dl dt figcaption footer form h1 h2 h3 h4 h5 h6 header hr li main nav ol p "
    "pre section table td th title tr ul"
)


class UnusableError(Exception):
    """Why a file that can be read gives no documents, as said after its name: `is encrypted with a password`."""


def extract(file: Path) -> str:
    """The text of a file, by the ending of its name. Local.

    Raises: UnusableError; OSError; what the libraries raise where a file is damaged.
    """
    ending = file.suffix.lower()
    if ending in (".html", ".htm"):
        return _read_html(file)
    if ending == ".pdf":
        return _read_pdf(file)
    return file.read_text(encoding="utf-8-sig")  # Windows' editors begin a file with a mark


def _read_html(file: Path) -> str:
    """What a browser shows: a line a block, without scripts and styles."""
    from bs4 import BeautifulSoup  # here, as pypdf below: not every corpus needs it

    page = BeautifulSoup(file.read_bytes(), "html.parser")
    for hidden in page(["script", "style", "template", "noscript"]):
        hidden.decompose()
    for string in page.find_all(string=True):
        if string.find_parent("pre") is None:
            string.replace_with(type(string)(re.sub(r"\s+", " ", string)))
    for block in page(_BLOCKS.split()):
        block.insert_before("\n")
        block.insert_after("\n")
    text = re.sub(r"(?m)^ (?! )|[ \t]+$", "", page.get_text())  # indents of <pre> stay
    return re.sub(r"\n{2,}", "\n", text).strip("\n")


def _read_pdf(file: Path) -> str:
    from pypdf import PdfReader

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it warns of each oddity of a file
    reader = PdfReader(file)
    if reader.is_encrypted and not reader.decrypt(""):
        raise UnusableError("is encrypted with a password")
    text = "\n".join(page.extract_text() for page in reader.pages)
    if not text.strip():
        raise UnusableError("holds no text: if its pages are scans, have their text recognised (OCR) first")
    return text
