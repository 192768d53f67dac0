"""What is in the data: counts, documents that repeat others, and evaluation questions that stand in the corpus."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from mica_ds import comm
from mica_ds.config import Config
from mica_ds.data import Sequences, Texts
from mica_ds.documents import unread_files
from mica_ds.encoding import SHINGLE, SIGNATURE, hash_ngrams, hash_words
from mica_ds.files import replace_text
from mica_ds.questions import read_statements
from mica_ds.tokens import Tokens

REPORT = "data.json"
SIMILAR = 0.8
"""Share of two signatures that is the same, from which the later document, if compared, is a near-duplicate."""
NGRAM = 8
"""Words in a row by which a question is looked for in the corpus; of a shorter one all, if it has SHORTEST."""
SHORTEST = 4
CONTAINED = 0.5
"""Share of a question's n-grams in the corpus above which it is said to stand there.

Half of them is not enough: of nine words the last may be all that is told, or asked.
"""
_BANDS = 16
_AT_ONCE = 1 << 22  # words
_NAMED = 20  # of the worst that are named


def examine(config: Config, dataset: Sequences) -> dict[str, Any]:
    """What is to know about a run's data, as `data.json` holds it, and say it. Collective, though rank 0 alone works.

    Taken from the run folder where that has it for the same files, data and questions.
    Raises: UserError where the questions cannot be read.
    """
    found: dict[str, Any] = {}
    with comm.failing_together():
        if comm.is_main():
            questions = read_statements(config.evaluate.questions)
            unread = [unread_files(texts.source.path) for texts in dataset.texts]
            about = [dataset.digest(), questions, unread, [_left_out(texts) for texts in dataset.texts]]
            identity = hashlib.sha256(json.dumps(about).encode()).hexdigest()
            found = _known(config.output_dir / REPORT, identity) or {
                "identity": identity,
                "sequence_length": config.data.sequence_length,
                "sequences": len(dataset),
                "sources": [_source(*each) for each in zip(dataset.texts, unread, strict=True)],
                **_compared([texts.tokens for texts in dataset.texts if texts.purpose == "corpus"], questions),
            }
            _say(found)
    return found


def write_report(found: dict[str, Any], folder: Path) -> Path:
    """Write `data.json`, whole or not at all, and return its path. Local, on one rank."""
    file = folder / REPORT
    replace_text(file, json.dumps(found, indent=1))
    return file


def counts(found: dict[str, Any]) -> dict[str, float]:
    """The numbers of a report, as metrics. Local, on rank 0."""
    sums = {key: sum(source[key] for source in found["sources"]) for key in ("documents", "tokens", "empty")}
    return {
        **{f"data_{key}": value for key, value in sums.items()},
        "data_broken": sum(len(source["broken"]) for source in found["sources"]),
        "data_unread": sum(sum(source["unread"].values()) for source in found["sources"]),
        "data_sequences": found["sequences"],
        "data_near_duplicates": found["near_duplicates"]["number"],
        "data_questions_in_corpus": found["questions_in_corpus"]["number"],
    }


def _known(file: Path, identity: str) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text())
        return found if found["identity"] == identity else None
    except (OSError, ValueError, KeyError):
        return None


def _left_out(texts: Texts) -> list[Any]:
    """The files of a source, and what of them gives no tokens, and so does not tell in their digest."""
    manifest = texts.tokens.manifest
    return [*map(str, texts.tokens.files), manifest["empty"], manifest["broken"]]


def _source(texts: Texts, unread: dict[str, int]) -> dict[str, Any]:
    manifest = texts.tokens.manifest
    return {
        "path": str(texts.source.path),
        "purpose": texts.purpose,
        "weight": texts.source.weight,
        "files": len(texts.tokens.files),
        **{key: manifest[key] for key in ("documents", "chats", "tokens", "words", "empty", "digest")},
        "broken": texts.tokens.broken(),
        "unread": unread,
        "sequences": len(texts.rows),
    }


def _compared(corpus: list[Tokens], questions: list[tuple[str, str]]) -> dict[str, Any]:
    pairs = near_duplicates([tokens.signatures for tokens in corpus])
    shares = contained([statement for _, statement in questions], [tokens.words for tokens in corpus])
    judged = [(share, question) for share, (question, _) in zip(shares, questions, strict=True) if share is not None]
    high = [pair for pair in judged if pair[0] > CONTAINED]
    return {
        "near_duplicates": {
            "number": len(pairs),
            "method": f"MinHash of {SIGNATURE} over {SHINGLE} words in a row, estimated similarity at least {SIMILAR}; "
            f"compared are only documents that share one of {_BANDS} bands",
            "first": [
                {"document": _name(corpus, later), "repeats": _name(corpus, earlier)}
                for later, earlier in sorted(pairs.items())[:_NAMED]
            ],
        },
        "questions_in_corpus": {
            "number": len(high),
            "of": len(judged),
            "method": f"share of a question's {NGRAM}-word sequences found in the corpus, more than {CONTAINED}; "
            f"of one with {SHORTEST} to {NGRAM - 1} words, all of it; of a draft its sentence is looked for",
            "first": [{"question": q, "share": s} for s, q in sorted(high, key=lambda pair: -pair[0])[:_NAMED]],
        },
    }


def _name(corpus: list[Tokens], document: int) -> str:
    for tokens in corpus:
        if document < len(tokens.origins):
            return tokens.name(document)
        document -= len(tokens.origins)
    raise IndexError(document)


def near_duplicates(signatures: list[np.ndarray]) -> dict[int, int]:
    """Documents that are like an earlier one, by number over all sources, each with that one. Local.

    Signatures are grouped by bands of their numbers, and those that share a band with their group's first or with the
    one before them are compared. (datasketch's own index keeps kilobytes of Python objects a document.)
    """
    firsts = np.cumsum([0, *(len(each) for each in signatures)])

    def rows(numbers: np.ndarray) -> np.ndarray:
        found = np.empty((len(numbers), SIGNATURE), dtype=np.uint32)
        for each, start, stop in zip(signatures, firsts[:-1], firsts[1:], strict=True):
            mine = (numbers >= start) & (numbers < stop)
            found[mine] = each[numbers[mine] - start]
        return found

    pairs: dict[int, int] = {}
    width = SIGNATURE // _BANDS
    for band in range(_BANDS):
        keys = np.concatenate([each[:, band * width : (band + 1) * width] for each in signatures])
        hashes = hash_ngrams(keys.astype(np.uint64).T, width)[0]
        hashes[~keys.any(axis=1)] = 0  # too short to be compared
        order = np.argsort(hashes, kind="stable")  # so that the first of a group is the earliest document
        repeats = np.concatenate([[False], (hashes[order][1:] == hashes[order][:-1]) & (hashes[order][1:] != 0)])
        leaders = np.maximum.accumulate(np.where(repeats, 0, np.arange(len(order))))
        places = np.flatnonzero(repeats)
        for others in (leaders[places], places - 1):
            for some in range(0, len(places), 1 << 16):
                later, earlier = order[places[some : some + (1 << 16)]], order[others[some : some + (1 << 16)]]
                alike = (rows(later) == rows(earlier)).mean(axis=1) >= SIMILAR
                for a, b in zip(later[alike].tolist(), earlier[alike].tolist(), strict=True):
                    pairs[a] = min(b, pairs.get(a, b))
    return pairs


def contained(questions: list[str], words: list[np.ndarray]) -> list[float | None]:
    """The share of each question's n-grams that stand in some texts; None of those with too few words. Local."""
    grams: list[np.ndarray] = []
    sizes: list[int] = []
    for question in questions:
        hashed = np.array(hash_words(question), dtype=np.uint64)
        sizes.append(min(NGRAM, len(hashed)))
        grams.append(np.unique(hash_ngrams(hashed, sizes[-1])) if sizes[-1] >= SHORTEST else hashed[:0])
    present: dict[int, np.ndarray] = {}
    for size in {size for size in sizes if size >= SHORTEST}:
        wanted = np.unique(np.concatenate([theirs for theirs, n in zip(grams, sizes, strict=True) if n == size]))
        found = np.zeros(len(wanted), dtype=np.bool_)
        for each in words:
            for start in range(0, len(each), _AT_ONCE):
                hashes = hash_ngrams(each[start : start + _AT_ONCE + size - 1].astype(np.uint64), size)
                places = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
                found[places[wanted[places] == hashes]] = True
        present[size] = wanted[found]
    return [
        float(np.isin(theirs, present[n]).mean()) if n >= SHORTEST else None
        for theirs, n in zip(grams, sizes, strict=True)
    ]


def _say(found: dict[str, Any]) -> None:
    for source in found["sources"]:
        dropped = f"; left out: {source['empty']} empty, {len(source['broken'])} broken"
        comm.say(
            f"data: {source['path']} ({source['purpose']}): {source['documents']:,} documents of {source['tokens']:,} "
            f"tokens{dropped if source['empty'] or source['broken'] else ''}"
        )
        for broken in source["broken"][:_NAMED]:
            comm.say(f"warning: left out: {broken}")
        if len(source["broken"]) > _NAMED:
            comm.say(f"warning: left out: {len(source['broken']) - _NAMED} more; {REPORT} names all")
        if unread := source["unread"]:
            kinds = [f"{number:,} of {ending or 'none'}" for ending, number in unread.items()]
            kinds[_NAMED:] = [f"and of {len(kinds) - _NAMED} more endings"] if len(kinds) > _NAMED else []
            comm.say(f"warning: {source['path']} holds files of endings that are not read: {', '.join(kinds)}")
    comm.say(f"data: {found['sequences']:,} sequences of {found['sequence_length']} tokens")
    if number := found["near_duplicates"]["number"]:
        pair = found["near_duplicates"]["first"][0]
        comm.say(
            f"warning: documents that nearly repeat an earlier one: {number}, "
            f"such as {pair['document']}, which repeats {pair['repeats']}"
        )
    if number := found["questions_in_corpus"]["number"]:
        comm.say(
            f"warning: questions that stand in the corpus: {number} of {found['questions_in_corpus']['of']}, "
            f'such as "{found["questions_in_corpus"]["first"][0]["question"]}"'
        )
