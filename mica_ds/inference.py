"""What a model makes of token sequences: likelihoods and greedy continuations, by batches shared among the ranks.

A forward of ZeRO-3 is collective, so every rank runs the same number of batches: where they do not divide, some ranks
repeat one, and the repetition is dropped.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from mica_ds import comm

_IGNORED = -100

Found = TypeVar("Found")


@dataclass(frozen=True)
class Sequence:
    """Token ids, and which of them are scored: -100 in `labels` where not."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Likelihood:
    """What a model makes of the scored tokens of a sequence."""

    loss: float
    """Their summed negative log-likelihood, in nats."""
    is_greedy: bool
    """Whether each of them is the likeliest there."""


class Runner:
    """Runs a tokenizer's sequences through models, so many tokens a batch."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, batch_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.batch_tokens, self._padding = batch_tokens, tokenizer.eos_token_id

    def likelihoods(self, model: nn.Module, sequences: list[Sequence]) -> list[Likelihood]:
        """Of each sequence, on all ranks, by a model whose forward is ready (a DeepSpeed engine). Collective."""

        def score(batch: list[int]) -> list[Likelihood]:
            return batch_likelihoods(model, [sequences[i] for i in batch], self._padding)

        return self._run(model, score, [len(sequence.ids) for sequence in sequences], "evaluation")

    def continuations(self, model: Any, prompts: list[list[int]], new_tokens: int) -> list[str]:
        """The likeliest continuation of each prompt, token by token up to the end of the line. Collective."""

        def write(batch: list[int]) -> list[str]:
            return self._write(model, [prompts[i] for i in batch], new_tokens)

        return self._run(model, write, [len(prompt) + new_tokens for prompt in prompts], "answers")

    def _run(
        self, model: nn.Module, act: Callable[[list[int]], list[Found]], lengths: list[int], name: str
    ) -> list[Found]:
        """What `act` finds for each sequence, given the indices of a batch."""
        if not lengths:
            return []
        was_training = model.training
        model.eval()
        mine: dict[int, Found] = {}
        with torch.no_grad():
            for batch in _own_batches(batches(lengths, self.batch_tokens), name):
                mine.update(zip(batch, act(batch), strict=True))
        model.train(was_training)
        merged = {i: found for part in comm.gather(mine) for i, found in part.items()}
        return [merged[i] for i in range(len(lengths))]

    def _write(self, model: Any, prompts: list[list[int]], new_tokens: int) -> list[str]:
        length = max(map(len, prompts))
        rows = [[self._padding] * (length - len(prompt)) + prompt for prompt in prompts]
        masks = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        device = next(model.parameters()).device

        def have_ended(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            texts = self.tokenizer.batch_decode(ids[:, length:])
            return torch.tensor(["\n" in text for text in texts], device=device)

        # The engine knows no generate(), but ZeRO-3 gathers by hooks on the modules, which it calls.
        written = getattr(model, "module", model).generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(masks, device=device),
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,  # these three, where a model's own generation_config.json has other values
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            pad_token_id=self._padding,
            stopping_criteria=[have_ended],
            synced_gpus=comm.world_size() > 1,  # a rank whose batch is done goes on until all are
        )
        texts = self.tokenizer.batch_decode(written[:, length:], skip_special_tokens=True)
        return [text.partition("\n")[0].strip() for text in texts]


def _own_batches(all_batches: list[list[int]], name: str) -> Iterator[list[int]]:
    """This rank's batches, as many as every other rank's, under a progress bar of rank 0."""
    ranks = comm.world_size()
    rounds = range(-(-len(all_batches) // ranks))
    for turn in tqdm(rounds, desc=name, unit="batch", disable=not comm.is_main()):
        yield all_batches[min(turn * ranks + comm.rank(), len(all_batches) - 1)]


def batches(lengths: list[int], tokens: int) -> list[list[int]]:
    """Indices grouped by like length, each group of at most `tokens` after padding (or one sequence). Local."""
    found: list[list[int]] = [[]]
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if found[-1] and (len(found[-1]) + 1) * lengths[i] > tokens:
            found.append([])
        found[-1].append(i)
    return found


@torch.no_grad()
def batch_likelihoods(model: nn.Module, sequences: list[Sequence], padding: int) -> list[Likelihood]:
    """Those of one batch by one forward. Local, but for the forward itself."""
    length = max(len(sequence.ids) for sequence in sequences)
    device = next(model.parameters()).device

    def padded(rows: Callable[[Sequence], list[int]], filler: int) -> torch.Tensor:
        return torch.tensor(
            [rows(s) + [filler] * (length - len(s.ids)) for s in sequences],
            device=device,
        )

    labels = padded(lambda s: s.labels, _IGNORED)[:, 1:]
    # Padding stands at the right, where a causal model's earlier tokens cannot see it: no attention mask is needed.
    logits = model(input_ids=padded(lambda s: s.ids, padding), use_cache=False).logits[:, :-1]
    losses = nn.functional.cross_entropy(
        logits.float().transpose(1, 2),
        labels,
        ignore_index=_IGNORED,
        reduction="none",
    )
    are_greedy = ((logits.argmax(dim=-1) == labels) | (labels == _IGNORED)).all(dim=1)
    return [Likelihood(*found) for found in zip(losses.double().sum(dim=1).tolist(), are_greedy.tolist(), strict=True)]
