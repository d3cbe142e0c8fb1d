"""What ended answers in training, by the conversations that it kept."""

from __future__ import annotations

from pathlib import Path

from web4lora_chassis.errors import FailedPrecondition, InvalidInput
from web4lora_chassis.model_files.trained_conversations import (
    TRAINED_CONVERSATIONS,
    TrainedConversations,
    read_trained_conversations,
)

from web4lora_packager.chat_template import Tokenizer

_KEYS = 2  # of a GGUF, besides that of the end of a text: end of turn, end of message


def read_kept(adapter: Path) -> TrainedConversations:
    """Read what training kept beside an adapter; an adapter from elsewhere has nothing.

    Raises:
        InvalidInput: It is not what training writes.
    """
    path = adapter / TRAINED_CONVERSATIONS
    return read_trained_conversations(path) if path.is_file() else TrainedConversations(())


def trained_stops(
    kept: TrainedConversations, tokenizer: Tokenizer, vocabulary: int | None
) -> tuple[int, ...]:
    """Return the tokens that training put behind answers, without those that end a text anyway.

    Args:
        kept: What training kept.
        tokenizer: The base's.
        vocabulary: Number of tokens that the model has, if known.

    Raises:
        InvalidInput: It names a token that the model lacks.
        FailedPrecondition: There are more such tokens than a GGUF can name.
    """
    found = [turn.stop_token for conversation in kept.conversations for turn in conversation.turns]
    if vocabulary is not None and any(token >= vocabulary for token in found):
        raise InvalidInput(
            f"{TRAINED_CONVERSATIONS} names the token {max(found)}; the model has {vocabulary}.",
            fix="Train again, or bring the adapter anew.",
        )
    eos = tokenizer.added.get(tokenizer.special.get("eos_token", ""))
    stops = tuple(token for token in dict.fromkeys(found) if token != eos)
    if len(stops) > _KEYS:
        raise FailedPrecondition(
            f"Training ended answers with {len(stops)} tokens besides eos, {list(stops)}; a GGUF names "
            f"{_KEYS}, and answers would go on behind the others.",
            fix="Use a base whose chat template ends turns with the same token.",
            reason="STOPS_UNKNOWN",
        )
    return stops
