"""Make the study's real corpus out of Debian's package `debian-history`, once: a text file a chapter.

It is the history of a project told in four chapters, short enough that minutes of training see it several times.
The document is copyright (c) 1999-2004 Bdale Garbee and (c) 1999-2019 the Debian Documentation Team, under the GNU
General Public License, version 2 or later, as the package's own copyright file says. It stays out of this repository.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE, VERSION = "debian-history", "2.28"  # of Debian 12 (bookworm)
TARGET = Path(__file__).resolve().parent.parent / "runs" / "corpus" / "debian-history"
SHA256 = "c0d8e6e13f787b547581e614da42d20818de1206f07815658008fb013f727e31"
"""Of all chapters in their order: the questions of the study are about this text and no other."""
CHAPTERS = ["intro", "leaders", "releases", "detailed"]


def main() -> None:
    if TARGET.is_dir():
        return
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the finished folder is moved in one step.
    with tempfile.TemporaryDirectory(dir=TARGET.parent) as scratch:
        source = _download(Path(scratch))
        texts = [html_text((source / f"{chapter}.en.html").read_text(encoding="utf-8")) for chapter in CHAPTERS]
        found = hashlib.sha256("".join(texts).encode()).hexdigest()
        if found != SHA256:
            sys.exit(f"corpus: the text of {PACKAGE} {VERSION} has SHA-256 {found}, but the study asks for {SHA256}")
        folder = Path(scratch) / TARGET.name
        folder.mkdir()
        for number, (chapter, text) in enumerate(zip(CHAPTERS, texts, strict=True), start=1):
            (folder / f"{number}-{chapter}.txt").write_text(text, encoding="utf-8")
        os.replace(folder, TARGET)
    words = sum(len(text.split()) for text in texts)
    print(f"corpus: {len(texts)} chapters, {words} words in {TARGET}, SHA-256 {SHA256}")


def _download(scratch: Path) -> Path:
    """The package's folder of pages, unpacked under `scratch`."""
    try:
        subprocess.run(["apt-get", "download", f"{PACKAGE}={VERSION}"], cwd=scratch, check=True, capture_output=True)
        subprocess.run(["dpkg-deb", "--extract", next(scratch.glob("*.deb")), scratch], check=True)
    except (OSError, subprocess.CalledProcessError):
        sys.exit(
            f"corpus: apt-get gives no {PACKAGE} {VERSION}: it is Debian 12's; run this there after `apt-get update`"
        )
    return scratch / "usr" / "share" / "doc" / PACKAGE / "docs"


def html_text(page: str) -> str:
    """Headings, paragraphs and items of a DocBook page, one a line, without navigation and tables of contents."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(page, "html.parser")
    for noise in soup.select(".navheader, .navfooter, .toc"):
        noise.decompose()
    lines = []
    for block in soup.find_all(["h1", "h2", "h3", "p"]):
        words = " ".join(block.get_text().split())
        lines.append(f"- {words}" if block.find_parent("li") else f"\n{words}")
    return "\n".join(lines).strip() + "\n"


if __name__ == "__main__":
    main()
