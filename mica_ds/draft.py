"""Drafts multiple-choice questions from documents, for a person to correct: a sentence with a gap.

The gap is the sentence's last name or number, so that what stands before it tells most. A name is a run of words
that are capitalised within sentences, too, and nowhere small; a number's kind is the word that says what it counts. The
wrong options are terms of the same kind from elsewhere in the documents: those that stand between the same words, then
those alike in length.
Sentences that point out of themselves (It, This, …), or have no three such others, give no question.
"""

import heapq
import itertools
import json
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mica_ds import comm
from mica_ds.documents import Broken, Document, find_files, read, refusal, split, where_all
from mica_ds.errors import UserError
from mica_ds.files import replace_text
from mica_ds.questions import ASKING, GAP

WRONG = 3  # options besides the right one

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'(\[]?[A-Z0-9])")
_NOT_PROSE = re.compile(r"\s*(#|\||```|~~~|<|\{|=+$|-+$)")
_ITEM = re.compile(r"\s*([-*+•]|\d+[.)])\s+")
_WORD = re.compile(r"[^\W_]+(?:['’.,:/-][^\W_]+)*%?")
_POINTERS = re.compile(
    r"(it|its|this|that|these|those|they|their|he|his|she|her|such|there|here|then|so)\b", re.IGNORECASE
)
_SPELLED = re.compile(r"two|three|four|five|six|seven|eight|nine|ten|eleven|twelve")
_SMALL = re.compile(r"an?|the|and|or|of|in|on|at|to|for|by|from|with|is|are|was|were|be|as|than|that")


@dataclass(frozen=True)
class SourceText:
    """One text of a source, and the file it comes from."""

    file: Path
    text: str
    """Of a chat what is said in it."""
    messages: Any = None
    """Those of a chat."""


@dataclass(frozen=True)
class _Term:
    """A name or a number in a sentence."""

    text: str
    kind: str
    """Terms of one kind can take each other's place."""
    start: int
    stop: int


def read_sources(sources: list[Path], may_skip: bool) -> list[SourceText]:
    """The documents of the config's `data.corpus`, with their files, without empty ones. Local.

    `may_skip` leaves out what is broken, and names it. Raises: UserError where a source is missing, something in it is
    broken, or there is no text.
    """
    documents: list[SourceText] = []
    for file in (file for source in sources for file in find_files(source, "data.corpus")):
        found = [each for part in split(file) for each in read(part)]
        documents += [_text(file, each) for each in found if not isinstance(each, Broken) and each.text.strip()]
        broken = sorted((each.place, each.reason) for each in found if isinstance(each, Broken))
        if broken and not may_skip:
            raise refusal("data.corpus", file, *broken[0])
        names = where_all(file, [place for place, _ in broken])
        for name, (_, reason) in zip(names, broken, strict=True):
            comm.say(f"warning: left out: {name} {reason}")
    if not documents:
        raise UserError(f"data.corpus: {', '.join(map(str, sources))} holds no text")
    return documents


def _text(file: Path, document: Document) -> SourceText:
    if document.messages is None:
        return SourceText(file, document.text)
    # In paragraphs, so that no sentence is of two messages.
    return SourceText(file, "\n\n".join(message["content"] for message in document.messages), document.messages)


def draft_questions(documents: list[SourceText], number: int, seed: int) -> list[dict[str, Any]]:
    """At most so many questions, from all documents alike; the same for the same seed. Local.

    Rows as `evaluate.questions` takes them, with `source` and `sentence` for the person that corrects them.
    """
    chance = random.Random(seed)
    sentences = [(document.file, sentence) for document in documents for sentence in _sentences(document)]
    within = {word for _, sentence in sentences for word in _words(sentence)[1:]}
    small = {word for _, sentence in sentences for word in _words(sentence) if word.islower()}
    names = {word for word in within if word[0].isupper() and len(word) > 1 and word.lower() not in small}
    found = [(file, sentence, list(_terms(sentence, names))) for file, sentence in sentences]
    contexts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for _, sentence, terms in found:
        for term in terms:
            contexts[term.kind, term.text].update(_neighbours(sentence, term))
    by_kind: dict[str, list[str]] = defaultdict(list)
    for kind, text in contexts:
        by_kind[kind].append(text)
    taken: set[str] = set()

    def drafts(file: Path, sentences: list[tuple[str, _Term]]) -> Iterator[dict[str, Any]]:
        for sentence, term in sentences:
            if sentence in taken:
                continue
            others = [text for text in by_kind[term.kind] if not _overlap(text, term.text) and text not in sentence]
            if len(others) < WRONG:
                continue
            own = contexts[term.kind, term.text]

            def unlikeness(text: str, term: _Term = term, own: Counter[str] = own) -> tuple[int, int, str]:
                shared = (own & contexts[term.kind, text]).total()
                return -shared, abs(len(text) - len(term.text)), text

            options = [term.text, *heapq.nsmallest(WRONG, others, unlikeness)]
            chance.shuffle(options)
            taken.add(sentence)
            yield {
                "question": f"{ASKING}{sentence[: term.start]}{GAP}{sentence[term.stop :]}",
                "options": options,
                "answer": options.index(term.text),
                "source": str(file),
                "sentence": sentence,
            }

    chance.shuffle(found)
    usable: dict[Path, list[tuple[str, _Term]]] = defaultdict(list)
    for file, sentence, terms in found:
        if terms and not _POINTERS.match(sentence):
            usable[file].append((sentence, terms[-1]))
    # A draft looks at all terms of its kind: none is made that is not asked for.
    return list(itertools.islice(_taking_turns([drafts(file, usable[file]) for file in sorted(usable)]), number))


def most_open(drafts: list[dict[str, Any]], losses: list[list[float]], number: int) -> list[dict[str, Any]]:
    """The drafts between whose options a model is least certain, whether it is right or wrong, in their order. Local.

    Keeping what it gets wrong instead would make any later training look good. `losses` (nats): of each option.
    """
    likeliest = [1 / sum(math.exp(min(row) - loss) for loss in row) for row in losses]  # the chance of the best option
    ranked = sorted(range(len(drafts)), key=lambda i: likeliest[i])[:number]
    return [drafts[i] for i in sorted(ranked)]


def without_sentences(documents: list[SourceText], drafts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The documents without the sentences that are asked for, as rows with `text` or `messages`. Local."""
    asked = sorted({draft["sentence"] for draft in drafts}, key=len, reverse=True)
    patterns = [re.compile(r"\s+".join(map(re.escape, sentence.split())) + r"[ \t]*") for sentence in asked]

    def cut(text: str) -> str:
        for pattern in patterns:
            text = pattern.sub("", text)
        return text

    return [
        {"text": cut(document.text)}
        if document.messages is None
        else {"messages": [{**message, "content": cut(message["content"])} for message in document.messages]}
        for document in documents
    ]


def check_absent(files: list[Path]) -> None:
    """Refuse to write over a file, or one over the other. Local. Raises: UserError."""
    for file in files:
        if file.exists():
            raise UserError(f"{file} exists, perhaps with a person's corrections: name another, or remove it")
    if len({file.absolute() for file in files}) < len(files):
        raise UserError(f"{files[0]} cannot hold both the questions and the documents: name two files")


def write_jsonl(rows: list[dict[str, Any]], file: Path) -> None:
    """Write a file, whole or not at all. Local, on one rank. Raises: UserError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from None


def _sentences(document: SourceText) -> Iterator[str]:
    """Whole sentences of prose, 5 to 50 words each; a line's end within a paragraph ends none."""
    for block in re.split(r"\n\s*\n", document.text):
        lines: list[str] = []
        for line in block.splitlines():
            item = _ITEM.match(line)
            if _NOT_PROSE.match(line):
                lines.append("\n")
            else:
                lines += ["\n", line[item.end() :].strip()] if item else [line.strip()]
        for part in " ".join(lines).split("\n"):
            for sentence in _SENTENCE_END.split(part.strip()):
                sentence = " ".join(sentence.split())
                if sentence.endswith((".", "!")) and 5 <= len(_words(sentence)) <= 50:
                    yield sentence


def _words(sentence: str) -> list[str]:
    return _WORD.findall(sentence)


def _terms(sentence: str, names: set[str]) -> Iterator[_Term]:
    """The names and numbers of a sentence, from left to right; `names` are the words that names consist of."""
    words = list(_WORD.finditer(sentence))
    place = 0
    while place < len(words):
        word = words[place][0]
        if word[0].isdigit() or _SPELLED.fullmatch(word):
            yield _Term(word, _number_kind(words, place), *words[place].span())
        elif word in names:
            last = place
            while (
                last + 1 < len(words)
                and words[last + 1][0] in names
                and sentence[words[last].end() : words[last + 1].start()] == " "
            ):
                last += 1
            start, stop = words[place].start(), words[last].end()
            yield _Term(sentence[start:stop], f"name of {last - place + 1}", start, stop)
            place = last
        place += 1


def _number_kind(words: list[re.Match[str]], place: int) -> str:
    """What a number counts: the word after it, or before it; of four digits alone a year."""
    word = words[place][0]
    if re.fullmatch(r"1\d{3}|20\d{2}", word):
        return "year"
    form = "spelled" if _SPELLED.fullmatch(word) else "digits"
    for neighbour in (place + 1, place - 1):
        if 0 <= neighbour < len(words) and words[neighbour][0].isalpha():
            counted = words[neighbour][0].lower()
            if not _SMALL.fullmatch(counted):
                return f"{form} {counted}"
    return f"{form} {len(word)}"


def _neighbours(sentence: str, term: _Term) -> list[str]:
    """What says where a term stands: the word before it, the word after it, and both."""
    before, after = _words(sentence[: term.start])[-1:], _words(sentence[term.stop :])[:1]
    left, right = (before or ["^"])[0].lower(), (after or ["$"])[0].lower()
    return [f"{left} _", f"_ {right}", f"{left} _ {right}"]


def _overlap(one: str, other: str) -> bool:
    return not set(one.lower().split()).isdisjoint(other.lower().split())


def _taking_turns(queues: list[Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The first of each, then the second of each, and so on, none of them made before its turn."""
    while queues:
        left = []
        for queue in queues:
            for row in itertools.islice(queue, 1):
                left.append(queue)
                yield row
        queues = left
