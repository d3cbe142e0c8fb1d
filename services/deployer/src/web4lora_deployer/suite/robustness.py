"""Odd prompts: one that fills most of the context, and scripts, signs and emoji of all kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from web4lora_chassis.graders import grade_end
from web4lora_chassis.graders.check import Check, check

from web4lora_deployer.suite.result import Answer, Reply
from web4lora_deployer.suite.spec import Prompt, RobustnessSpec

CORE = "robustness"
TITLES: Mapping[str, str] = {
    "robustness.long_prompt": "a long prompt is read whole and answered",
    "robustness.unicode": "Unicode comes through",
}
_UNICODE = (
    "Δώσε στον πράκτορα το όνομα Ζωή, κωδικός ΑΒΓ-7.",
    "エージェント「桜」を作成してください。優先度は高です。",
    "صف الوكيل نور باختصار، ثم اذكر رقم ٤٢.",
    "Name the agent 👩🏽‍🚀-Zoë-n̈a\u200dï𝕏\u2028and note “½ × 10⁻³ ≤ ε”.",
)
_CHARACTERS_PER_TOKEN = 3.0


@dataclass(frozen=True)
class OddPrompt:
    """A prompt, the check that it is for, and the fewest tokens that it must be read as."""

    id: str
    check: str
    messages: tuple[Mapping[str, str], ...]
    min_prompt_tokens: int = 0


def odd_prompts(
    spec: RobustnessSpec, sample: Prompt, context_tokens: int, replies: Sequence[tuple[Prompt, Reply]]
) -> list[OddPrompt]:
    """Make the odd prompts.

    Args:
        spec: Which ones.
        sample: A prompt of the suite, whose system message is used.
        context_tokens: Longest prompt and answer together; 0 when unknown: then there is no long prompt.
        replies: What was asked so far, with its reply: tells how many characters make a token.
    """
    system = [message for message in sample.messages if message["role"] == "system"]
    prompts: list[OddPrompt] = []
    if spec.long_prompt_percent and context_tokens:
        room = min(context_tokens * spec.long_prompt_percent // 100, context_tokens - spec.max_tokens - 64)
        text = _notes(int(room * _characters_per_token(replies)))
        user = {"role": "user", "content": f"{text}\n\n{sample.question}"}
        prompts.append(OddPrompt("long-prompt", "robustness.long_prompt", (*system, user), room // 2))
    if spec.unicode:
        for number, text in enumerate(_UNICODE, start=1):
            messages = (*system, {"role": "user", "content": text})
            prompts.append(OddPrompt(f"unicode-{number}", "robustness.unicode", messages))
    return prompts


def grade_odd(prompt: OddPrompt, reply: Reply) -> Answer:
    """Grade the reply to an odd prompt: it came, whole and clean, and it ended."""
    return Answer(prompt.id, CORE, reply, (_check(prompt, reply),))


def _check(prompt: OddPrompt, reply: Reply) -> Check:
    if reply.refused:
        return check(prompt.check, f"the server refused the prompt: {reply.refused}")
    if 0 < reply.prompt_tokens < prompt.min_prompt_tokens:
        read = f"only {reply.prompt_tokens} tokens were read, at least {prompt.min_prompt_tokens} were sent"
        return check(prompt.check, f"{read}: the server cut the prompt")
    if not reply.text.strip():
        return check(prompt.check, "the answer is empty")
    if "\ufffd" in reply.text:
        return check(prompt.check, "the answer holds broken characters (U+FFFD)")
    return check(prompt.check, grade_end(reply.text, reply.finish_reason).reason)


def _characters_per_token(replies: Sequence[tuple[Prompt, Reply]]) -> float:
    # With the template's tokens counted in, this errs on the short side, so the prompt surely fits.
    known = [(prompt, reply) for prompt, reply in replies if reply.prompt_tokens]
    characters = sum(len(message["content"]) for prompt, _ in known for message in prompt.messages)
    tokens = sum(reply.prompt_tokens for _, reply in known)
    return min(characters / tokens, 4.0) if tokens else _CHARACTERS_PER_TOKEN


def _notes(characters: int) -> str:
    """Make plain text of about so many characters, no line of it twice."""
    lines: list[str] = []
    length = 0
    while length < characters:
        line = f"Note {len(lines) + 1}: the ledger was read and nothing in it was missing or written twice."
        lines.append(line)
        length += len(line) + 1
    return "\n".join(lines)
