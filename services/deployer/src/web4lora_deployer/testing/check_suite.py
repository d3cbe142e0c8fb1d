"""Read a suite before anything is trained for it, and say which scores it gives.

That is done in a process of its own, with a time limit: a suite comes from outside, and the service, which
keeps models running, knows nothing of suites. `python -m web4lora_deployer.testing.check_suite FOLDER` is
that one.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from web4lora_chassis import process
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore
from web4lora_chassis.errors import Internal, InvalidInput, Web4Error
from web4lora_chassis.pipeline.verify import BAD_SUITE

if TYPE_CHECKING:
    from web4lora_deployer.suite import Suite

_SECONDS = 60.0


def check_suite(ref: ArtifactRef, store: ArtifactStore, seconds: float = _SECONDS) -> tuple[str, ...]:
    """Return the names of the scores that a stored suite gives.

    Args:
        ref: The suite.
        store: Holds it.
        seconds: Longest time to read it.

    Raises:
        InvalidInput: Something in it is wrong: reason BAD_SUITE, each line of the message beginning with a
            file of the suite and a line.
        NotFound: It is not in the store.
        Unavailable: The store is out of reach.
    """
    with tempfile.TemporaryDirectory(prefix="web4lora-suite-") as name:
        folder = Path(name).resolve() / "suite"
        store.get(ref, folder)
        command: list[str | Path] = [sys.executable, "-m", "web4lora_deployer.testing.check_suite", folder]
        try:
            text = process.run(command, env=_environment(), timeout_seconds=seconds)
            answer = json.loads(text.splitlines()[-1])
        except Internal as error:
            raise InvalidInput(
                f"suite.yaml: the suite can't be read: {error.message}",
                fix="Make it smaller: fewer prompts, and none that are very long.",
                reason=BAD_SUITE,
            ) from error
    if problem := answer.get("problem"):
        raise InvalidInput(problem, fix=answer["fix"], reason=BAD_SUITE)
    return tuple(answer["scores"])


def scores_of(suite: Suite) -> list[str]:
    """Return the names of the scores that a suite's prompts give, in their order.

    A score that the suite knows and no prompt is checked for, such as that of refusals in a suite without a
    request to refuse, is none of them.

    Raises:
        InvalidInput: Prompts can't be graded; a line each.
    """
    from web4lora_chassis.graders import ENDS, GRADERS
    from web4lora_chassis.graders.tool_call import CONSTRAINED_TITLES

    from web4lora_deployer.suite.problems import Problems

    given, problems = {ENDS}, Problems()
    for core in suite.cores:
        if core.json_schema is not None:
            given.update(CONSTRAINED_TITLES)
        for prompt in suite.prompts:
            if prompt.core != core.name:
                continue
            with problems.noted():
                try:
                    checks = GRADERS[core.grader].grade("", prompt.check, core.rules)
                except Exception as error:
                    where = f'suite.yaml: cores.{core.name}: prompt "{prompt.id}"'
                    raise InvalidInput(f"{where}: its check can't be made: {error!r}.") from error
                given.update(check.name for check in checks)
    problems.refuse_any()
    return [name for name in suite.score_names if name in given]


def _environment() -> dict[str, str]:
    """Return what the process needs of our environment: no token, no key."""
    return {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG") if name in os.environ}


def main() -> None:
    """Print what a folder's suite gives as a line of JSON: `scores`, or `problem` and `fix`."""
    from web4lora_deployer.suite import load_suite

    folder = Path(sys.argv[1])
    try:
        answer: dict[str, object] = {"scores": scores_of(load_suite(folder))}
    except Web4Error as error:
        text = error.message.replace(f"{folder}/", "").encode("utf-8", "replace").decode("utf-8")
        answer = {"problem": text, "fix": error.fix}
    sys.stdout.write(f"\n{json.dumps(answer)}\n")


if __name__ == "__main__":
    main()
