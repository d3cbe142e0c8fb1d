"""The record of a model's training: where it is kept, and what it says of the model's system message."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore, Manifest
from web4lora_chassis.artifacts.manifest import FileEntry
from web4lora_chassis.errors import FailedPrecondition, InvalidInput, NotFound
from web4lora_chassis.model_files.trained_conversations import (
    TRAINED_CONVERSATIONS,
    TrainedConversations,
    read_trained_conversations,
)

MISSING = "TRAINING_RECORD_MISSING"
_MADE_HERE = ("gguf", "merged_model", "adapter")
_AGAIN = "Train again: `web4lora run FILE --from train`."


def model_file(manifest: Manifest) -> FileEntry:
    """Return the one GGUF of an artifact; the record may lie beside it.

    Raises:
        InvalidInput: It has none, or several.
    """
    found = [entry for entry in manifest.files if entry.path != TRAINED_CONVERSATIONS]
    if len(found) != 1:
        raise InvalidInput(
            f"{manifest.ref} has {len(found)} files; exactly one GGUF is wanted.",
            fix="Merge a split model into one file first: llama-gguf-split --merge.",
        )
    return found[0]


def find_record(ref: ArtifactRef, store: ArtifactStore) -> ArtifactRef | None:
    """Return the artifact that holds the record of a model's training: its own, or one it was made from.

    Args:
        ref: The GGUF's artifact.
        store: Holds the artifacts.

    Returns:
        None for a model that was not trained here.

    Raises:
        FailedPrecondition: It was trained here, and there is no record.
    """
    trained, seen, left = False, {ref}, [ref]
    while left:
        current = left.pop(0)
        trained = trained or current.kind != "gguf"
        try:
            manifest = store.manifest(current)
        except NotFound:  # deleted since; the record should be nearer
            continue
        if any(entry.path == TRAINED_CONVERSATIONS for entry in manifest.files):
            return current
        more = [each for each in manifest.inputs if each.kind in _MADE_HERE and each not in seen]
        seen.update(more)
        left += more
    if trained:
        raise FailedPrecondition(
            f"{ref} was trained here, but no record of its training is kept: nothing shows that it would be "
            "served the prompts it was trained on.",
            fix=f"It was made by an older version, or its adapter was deleted. {_AGAIN}",
            reason=MISSING,
        )
    return None


def read_record(path: Path) -> TrainedConversations:
    """Read a record, which must hold a trained answer.

    Raises:
        InvalidInput: It is of another format, or contradicts itself.
        FailedPrecondition: It holds no answer.
    """
    record = read_trained_conversations(path)
    if not any(conversation.turns for conversation in record.conversations):
        raise FailedPrecondition(
            f"{TRAINED_CONVERSATIONS} holds no trained answer: nothing shows that the model would be served "
            "the prompts it was trained on.",
            fix=_AGAIN,
            reason=MISSING,
        )
    return record


def trained_system(record: TrainedConversations) -> str:
    """Return the system message that a model was trained with most often; empty when most had none."""
    if record.system is not None:
        return record.system
    first = [each.messages[0] for each in record.conversations if each.messages]
    systems = Counter(str(one.get("content") or "") if one["role"] == "system" else "" for one in first)
    # The conversations are few and chosen to differ: on a tie the model knows a system message.
    return max(systems, key=lambda text: (systems[text], bool(text)), default="")
