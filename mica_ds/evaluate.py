"""Knowledge (multiple choice by likelihood) and retention (perplexity of held-out text), sharded over the ranks."""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from mica_ds import comm
from mica_ds.config import EvaluateSettings
from mica_ds.documents import read_documents, read_jsonl
from mica_ds.errors import UserError


@dataclass(frozen=True)
class Scores:
    """What one evaluation found; None for what the config does not ask for."""

    knowledge: float | None
    """Share of the questions whose right option is the likeliest."""
    retention: float | None
    """Perplexity of the held-out general text, per token."""

    def found(self) -> dict[str, float]:
        """Those that the config asks for. Local."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Sequence:
    """Token ids, and which of them are scored."""

    ids: list[int]
    labels: list[int]


class Evaluator:
    """Reads questions and held-out text once, so that a mistake in them shows before training; scores on demand."""

    def __init__(
        self,
        settings: EvaluateSettings,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
    ) -> None:
        """Collective. Raises: UserError where a file is missing or a question is malformed."""
        self._batch_tokens = settings.batch_tokens
        self._padding = tokenizer.eos_token_id
        with comm.failing_together():
            self._questions = read_questions(settings, tokenizer)
            self._held_out = _read_held_out(settings, tokenizer, sequence_length)

    @property
    def digest(self) -> str:
        """SHA-256 of what is scored."""
        return hashlib.sha256(repr((self._questions, self._held_out)).encode()).hexdigest()

    @property
    def questions(self) -> int:
        """How many questions an accuracy is over."""
        return len(self._questions)

    @property
    def chance(self) -> float | None:
        """The accuracy that guessing would reach; None without questions."""
        if not self._questions:
            return None
        return sum(1 / len(question["options"]) for question in self._questions) / len(self._questions)

    def score(self, model: nn.Module) -> Scores:
        """Score a model whose forward is ready (a DeepSpeed engine). Collective; leaves the model in its mode."""
        options = [option for question in self._questions for option in question["options"]]
        losses = self._losses(model, options + self._held_out)
        knowledge = self._accuracy(losses[: len(options)]) if options else None
        retention = None
        if self._held_out:
            tokens = sum(sum(label != -100 for label in sequence.labels) for sequence in self._held_out)
            retention = math.exp(sum(losses[len(options) :]) / tokens)
        return Scores(knowledge, retention)

    def _accuracy(self, losses: list[float]) -> float:
        remaining = iter(losses)
        right = 0
        for question in self._questions:
            scores = [next(remaining) for _ in question["options"]]
            right += scores.index(min(scores)) == question["answer"]
        return right / len(self._questions)

    def _losses(self, model: nn.Module, sequences: list[Sequence]) -> list[float]:
        """The summed negative log-likelihood (nats) of each sequence's labels, on all ranks.

        Every rank runs the same number of batches, since a ZeRO-3 forward is collective: where the batches do not
        divide, some ranks repeat one, and the repetition is dropped.
        """
        if not sequences:
            return []
        batches = _batches([len(sequence.ids) for sequence in sequences], self._batch_tokens)
        ranks = comm.world_size()
        rounds = -(-len(batches) // ranks)
        was_training = model.training
        model.eval()
        mine: dict[int, float] = {}
        for turn in tqdm(range(rounds), desc="evaluation", unit="batch", disable=not comm.is_main()):
            batch = batches[min(turn * ranks + comm.rank(), len(batches) - 1)]
            losses = _batch_losses(model, [sequences[i] for i in batch], self._padding)
            mine.update(zip(batch, losses, strict=True))
        model.train(was_training)
        merged = {i: loss for part in comm.gather(mine) for i, loss in part.items()}
        return [merged[i] for i in range(len(sequences))]


def _batches(lengths: list[int], tokens: int) -> list[list[int]]:
    """Indices grouped by like length, each group of at most `tokens` after padding (but at least one sequence)."""
    batches: list[list[int]] = [[]]
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batches[-1] and (len(batches[-1]) + 1) * lengths[i] > tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


@torch.no_grad()
def _batch_losses(model: nn.Module, sequences: list[Sequence], padding: int) -> list[float]:
    length = max(len(sequence.ids) for sequence in sequences)
    device = next(model.parameters()).device

    def padded(rows: Callable[[Sequence], list[int]], filler: int) -> torch.Tensor:
        return torch.tensor(
            [rows(s) + [filler] * (length - len(s.ids)) for s in sequences],
            device=device,
        )

    labels = padded(lambda s: s.labels, -100)
    # Padding stands at the right, where a causal model's earlier tokens cannot see it: no attention mask is needed.
    logits = model(input_ids=padded(lambda s: s.ids, padding), use_cache=False).logits
    losses = nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2),
        labels[:, 1:],
        ignore_index=-100,
        reduction="none",
    )
    return losses.double().sum(dim=1).tolist()


def read_questions(settings: EvaluateSettings, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Each question with its options as sequences in which the option's tokens alone are scored. Local.

    Raises: UserError where the file cannot be read, or a question is malformed.
    """
    if settings.questions is None:
        return []
    questions = []
    for where, row in read_jsonl(settings.questions, "evaluate.questions"):
        _check_question(where, row)
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        options = []
        for option in row["options"]:
            answer = tokenizer(f" {option}", add_special_tokens=False)["input_ids"]
            options.append(Sequence(prompt + answer, [-100] * len(prompt) + answer))
        questions.append({"options": options, "answer": row["answer"]})
    if not questions:
        raise UserError(f"evaluate.questions: {settings.questions} holds no question")
    return questions


def _check_question(where: str, row: Any) -> None:
    where = f"evaluate.questions: {where}"
    if not isinstance(row, dict) or not isinstance(row.get("question"), str):
        raise UserError(f'{where} has no "question"')
    options, answer = row.get("options"), row.get("answer")
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) and o for o in options):
        raise UserError(f'{where}: "options" must be a list of two or more texts')
    if not isinstance(answer, int) or not 0 <= answer < len(options):
        raise UserError(f'{where}: "answer" must be the index of the right option, 0 to {len(options) - 1}')


def _read_held_out(settings: EvaluateSettings, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Sequence]:
    if settings.retention is None:
        return []
    documents = tokenizer(read_documents([settings.retention], "evaluate.retention"))["input_ids"]
    pieces = [document[i : i + length] for document in documents for i in range(0, len(document), length)]
    return [Sequence(piece, [-100, *piece[1:]]) for piece in pieces]
