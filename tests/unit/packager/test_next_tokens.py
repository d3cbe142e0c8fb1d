"""Which stage changed the model: what is asked, and what two stages' next tokens say of the one between."""

from __future__ import annotations

import math

import pytest
from web4lora_chassis.model_files.trained_conversations import Conversation, TrainedConversations, Turn
from web4lora_packager.next_tokens import Answer, Gate, Said, compare, divergence, kept_answers, summary

STOP = 9


def _kept(*lengths: int, prompt: int = 3) -> Conversation:
    """Return a conversation of answers of so many tokens, its stops among them, behind short prompts."""
    tokens, labels, turns = [], [], []
    for number, length in enumerate(lengths):
        tokens += [1] * prompt
        labels += [-100] * prompt
        turns.append(Turn(2 * number + 1, len(tokens), STOP))
        tokens += [*[2] * (length - 1), STOP]
        labels += [*[2] * (length - 1), STOP]
    messages = ({"role": "user"}, {"role": "assistant"}) * len(lengths)
    return Conversation("tools.jsonl", 7, messages, tuple(tokens), tuple(labels), tuple(turns))


def _likely(**shares: float) -> dict[int, float]:
    return {ord(token): math.log(share) for token, share in shares.items()}


def _said(*answers: list[dict[int, float]]) -> Said:
    return Said(tuple(map(tuple, answers)), {ord(token): token for token in "abc"})


def test_each_turn_is_asked_up_to_its_end_and_no_long_row_is() -> None:
    one, two = kept_answers(TrainedConversations((_kept(4, 100),)))
    assert (one.id, one.start, len(one.tokens)) == ("tools.jsonl:7, turn 1", 3, 7)
    assert one.tokens[-1] == STOP
    assert (two.id, two.start, len(two.tokens)) == ("tools.jsonl:7, turn 2", 10, 26)
    assert [each.id for each in kept_answers(TrainedConversations((_kept(2),)))] == ["tools.jsonl:7"]
    assert kept_answers(TrainedConversations((_kept(2, prompt=2000),))) == ()


def test_the_divergence_is_that_of_the_likely_tokens_and_the_rest() -> None:
    old, new = _likely(a=0.5, b=0.25), _likely(b=0.5, a=0.25)
    wanted = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert divergence(old, new) == pytest.approx(wanted)
    assert divergence(old, old) == 0
    # Not told of: as the least likely that is, so never too far off.
    assert divergence(_likely(a=0.5, c=0.5), _likely(a=0.75, b=0.25)) == pytest.approx(
        0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2), abs=1e-6
    )


def test_what_is_no_number_is_no_agreement() -> None:
    answers, sure, none = [Answer("one", (1, 2), 1)], _likely(a=0.9, b=0.1), {ord("a"): math.nan}
    for before, after in ((none, sure), (sure, none), (none, none)):
        assert not compare("convert", answers, _said([before]), _said([after]), limit=0.1).passed


def test_an_answer_changes_where_another_token_is_the_likeliest() -> None:
    answers = [Answer(name, (1, 2, 3), 1) for name in ("same", "tie", "odd")]
    sure, tie, other = _likely(a=0.8, b=0.1), _likely(a=0.45, b=0.4), _likely(b=0.6, a=0.3)
    before = _said([sure, sure], [sure, tie], [sure, sure])
    after = _said([sure, sure], [sure, other], [other, sure])
    gate = compare("quantize Q4_K_M", answers, before, after)
    assert gate.passed
    assert gate.measured.startswith("2 of 3 answers change, all near ties but odd; divergence ")
    tied, odd = gate.changed
    assert (tied.id, tied.token, tied.before, tied.after, tied.near_tie) == ("tie", 2, "a", "b", True)
    assert (odd.id, odd.token, odd.near_tie) == ("odd", 1, False)
    assert (odd.before_probability, odd.after_probability) == pytest.approx((0.8, 0.1))
    nothing = compare("convert", answers, before, before, limit=0.1)
    limits = "changed at: quantize Q4_K_M, 2 of 3 answers, all near ties but odd"
    assert summary([Gate("merge", "base plus adapter", "", ""), nothing, gate]) == limits
    assert summary([nothing]) == "no stage changed any of 3 answers"
    assert summary([]) == ""


def test_more_than_the_limit_at_one_token_is_too_much() -> None:
    answers = [Answer("one", (1, 2, 3), 1)]
    one, other = _likely(a=0.9, b=0.1), _likely(a=0.5, b=0.5)
    gate = compare("convert", answers, _said([one, one]), _said([one, other]), limit=0.1)
    assert not gate.passed
    assert gate.changed == ()
    assert compare("convert", answers, _said([one, one]), _said([one, other])).passed
