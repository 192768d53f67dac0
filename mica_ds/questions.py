"""Questions about the documents: multiple choice, and such as are answered in words; their format and their marking."""

import math
import re
import string
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mica_ds.documents import read_jsonl
from mica_ds.errors import UserError

GAP = "____"
ASKING = "What belongs in the gap? "
"""What stands before a sentence with a GAP."""
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Choice:
    """Multiple choice: the model's answer is the option that it finds likeliest."""

    question: str
    options: list[str]
    answer: int
    """The index of the right option."""

    def mark(self, losses: list[float]) -> dict[str, Any]:
        """The row of results for the summed losses (nats) of the options; normalised, for each character. Local.

        A model that has diverged (NaN) chooses none.
        """
        normalised = [loss / len(option) for loss, option in zip(losses, self.options, strict=True)]
        chosen = _least(losses)
        return {
            "question": self.question,
            "answer": self.answer,
            "chosen": chosen,
            "right": chosen == self.answer,
            "right_normalised": _least(normalised) == self.answer,
            "losses": losses,
        }


@dataclass(frozen=True)
class Open:
    """To be answered in words, which are compared with the accepted answers."""

    question: str
    answers: list[str]

    def mark(self, given: str) -> dict[str, Any]:
        """The row of results for an answer: SQuAD's exact match and F1, the best over the accepted ones. Local."""
        return {
            "question": self.question,
            "answer": self.answers,
            "given": given,
            "exact_match": any(_words(given) == _words(answer) for answer in self.answers),
            "f1": max(_f1(_words(given), _words(answer)) for answer in self.answers),
        }


def prompt(question: Choice | Open) -> str:
    """What the model reads before an option, or before it answers. Local."""
    return f"Question: {question.question}\nAnswer:"


def read_questions(file: Path | None) -> list[Choice | Open]:
    """The questions of a jsonl file, in its order; none without a file. Local.

    Raises: UserError where the file cannot be read, or a question is malformed.
    """
    return [question for question, _ in _rows(file)]


def read_statements(file: Path | None) -> list[tuple[str, str]]:
    """Each question of a file, and what a document says that gives its answer away. Local.

    Of a draft its `sentence`; without it what is asked, with the gap filled. Raises: as `read_questions`.
    """
    return [(question.question, _statement(question, row)) for question, row in _rows(file)]


def _rows(file: Path | None) -> list[tuple[Choice | Open, dict[str, Any]]]:
    """The questions of a file, each with its row."""
    if file is None:
        return []
    key = "evaluate.questions"
    questions = [(_question(f"{key}: {where}", row), row) for where, row in read_jsonl(file, key)]
    if not questions:
        raise UserError(f"{key}: {file} holds no question")
    return questions


def _statement(question: Choice | Open, row: dict[str, Any]) -> str:
    if isinstance(row.get("sentence"), str):
        return row["sentence"]
    answer = question.options[question.answer] if isinstance(question, Choice) else question.answers[0]
    return question.question.removeprefix(ASKING).replace(GAP, answer)


def _question(where: str, row: Any) -> Choice | Open:
    if not isinstance(row, dict) or not isinstance(row.get("question"), str):
        raise UserError(f'{where} has no "question"')
    answer = row.get("answer")
    if "options" not in row:
        answers: list[Any] = answer if isinstance(answer, list) else [answer]
        if not answers or not all(isinstance(a, str) and a.strip() for a in answers):
            raise UserError(f'{where}: without "options", "answer" must be a text, or a list of accepted ones')
        if empty := [a for a in answers if not _words(a)]:
            raise UserError(
                f"{where}: nothing is left to compare of the answer {empty[0]!r}, without punctuation and articles"
            )
        return Open(row["question"], answers)
    options = row["options"]
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) and o for o in options):
        raise UserError(f'{where}: "options" must be a list of two or more texts')
    if len(set(options)) < len(options):
        raise UserError(f'{where}: two of the "options" are the same')
    if type(answer) is not int or not 0 <= answer < len(options):
        raise UserError(f'{where}: "answer" must be the index of the right option, 0 to {len(options) - 1}')
    return Choice(row["question"], options, answer)


def _least(losses: list[float]) -> int | None:
    """The index of the lowest; None where one is NaN, or all are infinite."""
    is_sound = not any(map(math.isnan, losses)) and math.isfinite(min(losses))
    return losses.index(min(losses)) if is_sound else None


def _words(text: str) -> list[str]:
    """As SQuAD compares them: lower case, without punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(given: list[str], accepted: list[str]) -> float:
    if not given or not accepted:  # SQuAD: nothing is right where nothing is left to say
        return float(given == accepted)
    common = sum((Counter(given) & Counter(accepted)).values())
    return 2 * common / (len(given) + len(accepted))
