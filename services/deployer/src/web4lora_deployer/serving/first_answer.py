"""Ask a model for its first answer: what is deployed counts as serving once it has given one."""

from __future__ import annotations

import httpx2
from web4lora_chassis import process
from web4lora_chassis.errors import FailedPrecondition, Unavailable

from web4lora_deployer.runtimes.base import Deployed
from web4lora_deployer.runtimes.http import NOT_LOADABLE, refused

_ANSWER_SECONDS = 600.0


def first_answer(deployed: Deployed) -> None:
    """Ask for one token, which also loads the model where that happens on demand.

    Raises:
        FailedPrecondition: The runtime is there, and the model does not answer.
        ResourceExhausted: It has no memory for the model.
        Unavailable: The runtime is out of reach or busy, or went away meanwhile.
    """
    try:
        answer = httpx2.post(
            f"{deployed.endpoint}/chat/completions",
            json={
                "model": deployed.model,
                "messages": [{"role": "user", "content": "Say hi."}],
                "max_tokens": 1,
                "temperature": 0,
            },
            timeout=httpx2.Timeout(_ANSWER_SECONDS, connect=10),
            trust_env=False,  # proxies of the environment are for the outside world
        )
    except httpx2.HTTPError as error:
        raise Unavailable(
            f"{deployed.model} is deployed, but {deployed.endpoint} does not answer: "
            f"{error or type(error).__name__}",
            fix="The runtime's log may say why; then try again.",
            reason="MODEL_DOES_NOT_ANSWER",
        ) from error
    if answer.status_code != httpx2.codes.OK or not _has_choices(answer):
        known = refused("The runtime", f"let {deployed.model} answer", answer.status_code, answer.text)
        if not isinstance(known, FailedPrecondition) or known.reason in (process.CRASHED, NOT_LOADABLE):
            raise known
        raise FailedPrecondition(
            f"{deployed.model} does not answer: {deployed.endpoint} said {answer.status_code}: "
            f"{answer.text[:300]}",
            fix="The runtime's log may say why.",
            reason="MODEL_DOES_NOT_ANSWER",
        )


def _has_choices(answer: httpx2.Response) -> bool:
    try:
        data = answer.json()
    except ValueError:
        return False
    return isinstance(data, dict) and bool(data.get("choices"))
