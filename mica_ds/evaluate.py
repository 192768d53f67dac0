"""Knowledge (questions about the documents) and perplexities of held-out text, sharded over the ranks."""

import hashlib
import json
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from mica_ds import comm
from mica_ds.config import EvaluateSettings
from mica_ds.documents import read_documents
from mica_ds.encoding import without_end
from mica_ds.errors import UserError
from mica_ds.files import remove_abandoned, replace_text
from mica_ds.inference import Likelihood, Runner, Sequence
from mica_ds.questions import Choice, Open, prompt, read_questions
from mica_ds.scores import Scores, perplexity

_VERSION = 1  # of what is kept of a base model's scores
_LEAST_ANSWER = 16  # tokens that the model may answer with, and more where an accepted answer is longer


class Evaluator:
    """Reads questions and held-out text once, so that a mistake in them shows before training; scores on demand."""

    def __init__(
        self,
        settings: EvaluateSettings,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
    ) -> None:
        """Collective. Raises: UserError where a file is missing or of no use, or a question is malformed."""
        self.runner = Runner(tokenizer, settings.batch_tokens)
        self._base: dict[str, Scores] = {}
        with comm.failing_together():
            self._questions = read_questions(settings.questions)
            self._options = [self._as_sequences(q) if isinstance(q, Choice) else [] for q in self._questions]
            self._domain = _held_out(settings.domain, "evaluate.domain", tokenizer, sequence_length)
            self._retention = _held_out(settings.retention, "evaluate.retention", tokenizer, sequence_length)

    def _as_sequences(self, question: Choice) -> list[Sequence]:
        """Each option after the question, its own tokens alone scored."""
        tokenizer = self.runner.tokenizer
        before = self._begin(question)
        answers = [tokenizer(f" {option}", add_special_tokens=False)["input_ids"] for option in question.options]
        return [Sequence(before + answer, [-100] * len(before) + answer) for answer in answers]

    @property
    def digest(self) -> str:
        """SHA-256 of what is scored."""
        scored = (self._questions, self._options, self._domain, self._retention)
        return hashlib.sha256(repr(scored).encode()).hexdigest()

    @property
    def questions(self) -> int:
        """How many multiple-choice questions an accuracy is over."""
        return sum(isinstance(question, Choice) for question in self._questions)

    @property
    def chance(self) -> float | None:
        """The accuracy that guessing would reach; None without multiple choice."""
        shares = [1 / len(question.options) for question in self._questions if isinstance(question, Choice)]
        return sum(shares) / len(shares) if shares else None

    def score(self, model: nn.Module) -> Scores:
        """Score a model whose forward is ready (a DeepSpeed engine). Collective; leaves the model in its mode."""
        options = [option for options in self._options for option in options]
        found = self.runner.likelihoods(model, options + self._domain + self._retention)
        answers = iter(self._answers(model))
        losses = iter(likelihood.loss for likelihood in found)
        rows = [
            question.mark([next(losses) for _ in options])
            if isinstance(question, Choice)
            else question.mark(next(answers))
            for question, options in zip(self._questions, self._options, strict=True)
        ]
        texts = found[len(options) :]
        domain, retention = texts[: len(self._domain)], texts[len(self._domain) :]
        return Scores(rows, _perplexity(self._domain, domain), _perplexity(self._retention, retention))

    def base_key(self, engine: Any, weights: str) -> str:
        """What names the scores of a base model here, in the cache and in a run's checkpoints. Local.

        `engine` is DeepSpeed's, of the base alone or with an adapter; `weights` is the fingerprint of the base's.
        """
        model: Any = engine.module.get_base_model() if isinstance(engine.module, PeftModel) else engine.module
        settings = [part.to_json_string(use_diff=False) for part in (model.config, model.generation_config)]
        settings.append(model.config._attn_implementation)
        place = [engine.device.type, comm.world_size(), self.runner.batch_tokens, torch.__version__]
        about = [_VERSION, self.digest, self._prompts(), weights, settings, place, transformers.__version__]
        return hashlib.sha256(repr(about).encode()).hexdigest()

    def score_base(self, engine: Any, weights: str, cache: Path, kept: str | None = None) -> Scores:
        """Score the base model, or take what an earlier start or run has found and left in the cache. Collective.

        `engine` and `weights` as in `base_key`; `kept` is what that said where the run began, maybe on other ranks.
        """
        own = self.base_key(engine, weights)
        key = kept or own
        if key not in self._base:
            self._base[key] = self._base_scores(engine, [cache / "scores" / f"{name}.json" for name in (key, own)])
        return self._base[key]

    def _base_scores(self, engine: Any, files: list[Path]) -> Scores:
        """The base model's from the first of the files that is there, or into the last."""
        if not (self._questions or self._domain or self._retention):
            return self.score(engine)
        known: list[tuple[Path, dict[str, Any]]] = []
        for file in files if comm.is_main() else []:
            with suppress(OSError, ValueError, TypeError):  # there is none, or it is damaged
                known.append((file, dict(json.loads(file.read_text(encoding="utf-8")))))
        if known := comm.gather(known)[0]:
            file, scores = known[0]
            comm.say(f"evaluation: the base model's scores are known, from {file}")
            return Scores(**scores)
        with engine.module.disable_adapter() if isinstance(engine.module, PeftModel) else nullcontext():
            found = self.score(engine)
        if comm.is_main():
            with suppress(OSError):  # the next start scores it again
                files[-1].parent.mkdir(parents=True, exist_ok=True)
                remove_abandoned(files[-1].parent)
                replace_text(files[-1], json.dumps(found.as_dict()), is_shared=True)
        return found

    def _prompts(self) -> list[list[int]]:
        """The tokens of each open question."""
        return [self._begin(question) for question in self._questions if isinstance(question, Open)]

    def _begin(self, question: Choice | Open) -> list[int]:
        """The tokens of what is read before an answer."""
        return without_end(self.runner.tokenizer(prompt(question))["input_ids"], self.runner.tokenizer)

    def _answers(self, model: nn.Module) -> list[str]:
        """What the model says to each open question."""
        asked = [question for question in self._questions if isinstance(question, Open)]
        accepted = [len(self.runner.tokenizer(answer)["input_ids"]) for q in asked for answer in q.answers]
        return self.runner.continuations(
            model, self._prompts(), new_tokens=max([_LEAST_ANSWER, *(2 * n for n in accepted)])
        )


def _perplexity(sequences: list[Sequence], found: list[Likelihood]) -> float | None:
    if not sequences:
        return None
    tokens = sum(sum(label != -100 for label in sequence.labels) for sequence in sequences)
    return perplexity(sum(likelihood.loss for likelihood in found), tokens)


def _held_out(source: Path | None, key: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Sequence]:
    if source is None:
        return []
    documents = tokenizer(read_documents([source], key))["input_ids"]
    pieces = [document[i : i + length] for document in documents for i in range(0, len(document), length)]
    if all(len(piece) == 1 for piece in pieces):
        raise UserError(f"{key}: {source} holds nothing to predict: its documents are of one token each")
    return [Sequence(piece, [-100, *piece[1:]]) for piece in pieces]
