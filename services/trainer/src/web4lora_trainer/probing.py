"""Asks a model in training its probes: greedy answers of the live adapter, graded; nothing is random."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from web4lora_trainer.probes import Probe, Probes, answer_text, fewer, longest_answer
from web4lora_trainer.sft import AnswerTrainer

_TIMED_TOKENS = 5


class Prober:
    """Asks the probes.

    Args:
        trainer: Whose model; it is in training mode again afterwards.
        tokenizer: The base model's.
        probes: What to ask; not empty.
        tokens_at_once: Most tokens of prompts and answers at once, padding included.
    """

    def __init__(
        self, trainer: AnswerTrainer, tokenizer: PreTrainedTokenizerBase, probes: Probes, tokens_at_once: int
    ) -> None:
        self._trainer = trainer
        # The base's own generation settings (a penalty for repetition) are not what a suite asks with, and
        # `generate` falls back on them for all that it is not told.
        base: Any = trainer.peft_model.get_base_model()
        base.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        self._tokenizer = tokenizer
        self.prompts = probes.prompts
        self._tokens_at_once = tokens_at_once

    def ask(self, count: int) -> list[Mapping[str, bool]]:
        """Return which checks the answers to so many prompts pass."""
        results: list[Mapping[str, bool]] = []
        longest = longest_answer(self.prompts[:count])
        for batch in self._batches(count):
            for probe, ids in zip(batch, self._answers(batch, longest), strict=True):
                ends = [place for place, token in enumerate(ids) if token in self._stops([probe])]
                text = answer_text(ids[: ends[0]] if ends else ids, self._tokenizer)
                results.append(probe.grade(text, ended=bool(ends)))
        return results

    def seconds(self) -> Callable[[int], float]:
        """Return how long asking so many prompts takes at most.

        A few prompts and one alone are timed, read and with the first tokens behind them: time grows in a
        line with the prompts at once.
        """
        few = self._batches(fewer(len(self.prompts))[-1])[0]
        timed, alone = self._timed(few), self._timed(few[:1])

        def seconds(count: int) -> float:
            tokens, total = longest_answer(self.prompts[:count]), 0.0
            for batch in self._batches(count):
                part = (len(batch) - 1) / max(len(few) - 1, 1)
                read, each = (a + max(b - a, 0.0) * part for a, b in zip(alone, timed, strict=True))
                total += read + each * (tokens - 1)
            return total

        return seconds

    def _timed(self, batch: Sequence[Probe]) -> tuple[float, float]:
        """Return the seconds to read prompts, and to write a token behind each."""
        clock = _Clock()
        self._answers(batch, _TIMED_TOKENS, fewest=_TIMED_TOKENS, clock=clock)
        last = clock.stamps[-1] - clock.stamps[0]
        return clock.stamps[0] - clock.began, last / (len(clock.stamps) - 1)

    def _batches(self, count: int) -> list[list[Probe]]:
        prompts = self.prompts[:count]
        return list(batches_of(prompts, longest_answer(prompts), self._tokens_at_once))

    def _stops(self, batch: Sequence[Probe]) -> list[int]:
        return sorted({*(probe.stop for probe in batch), int(self._tokenizer.eos_token_id)})

    def _answers(
        self, batch: Sequence[Probe], most: int, fewest: int = 0, clock: StoppingCriteria | None = None
    ) -> list[list[int]]:
        """Return the tokens that follow each prompt."""
        pad = int(self._tokenizer.pad_token_id)
        width = max(len(probe.prompt_ids) for probe in batch)
        ids = [[pad] * (width - len(probe.prompt_ids)) + list(probe.prompt_ids) for probe in batch]
        mask = [[0] * (width - len(p.prompt_ids)) + [1] * len(p.prompt_ids) for p in batch]
        device = self._trainer.args.device
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False, max_new_tokens=most, min_new_tokens=fewest or None, use_cache=True,
            eos_token_id=self._stops(batch), pad_token_id=pad,
        )  # fmt: skip
        model: Any = self._trainer.peft_model
        model.eval()
        try:
            with torch.no_grad(), self._trainer.autocast():
                found = model.generate(
                    input_ids=torch.tensor(ids, device=device),
                    attention_mask=torch.tensor(mask, device=device),
                    generation_config=settings,
                    stopping_criteria=StoppingCriteriaList([clock] if clock else []),
                )
        finally:
            model.train()
        answers: list[list[int]] = found[:, width:].tolist()
        return answers


def batches_of(prompts: Sequence[Probe], answer: int, tokens: int) -> Iterator[list[Probe]]:
    """Yield prompts in batches of like length, each of so many tokens at most, or of one prompt."""
    batch: list[Probe] = []
    for probe in sorted(prompts, key=lambda each: len(each.prompt_ids)):
        if batch and (len(probe.prompt_ids) + answer) * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(probe)
    if batch:
        yield batch


class _Clock(StoppingCriteria):
    """Stops nothing, and knows when each token came."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.stamps: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:  # noqa: ARG002 - transformers names them
        self.stamps.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
