"""Runs a suite against a model: every prompt, graded; then constrained, the odd prompts, the speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from threading import Lock

from web4lora_chassis.errors import FailedPrecondition
from web4lora_chassis.graders import ENDS, GRADERS, grade_end
from web4lora_chassis.graders.check import Check
from web4lora_chassis.graders.tool_call import grade_constrained
from web4lora_chassis.jobs import Progress

from web4lora_deployer.suite.chat import ChatClient, Endpoint
from web4lora_deployer.suite.latency import measure_latency
from web4lora_deployer.suite.result import Answer, Latency, Reply, SuiteResult
from web4lora_deployer.suite.robustness import grade_odd, odd_prompts
from web4lora_deployer.suite.spec import Prompt, Suite

Report = Callable[[Progress], None]


def run_suite(
    suite: Suite,
    endpoint: Endpoint,
    *,
    report: Report | None = None,
    max_parallel: int = 1,
    label: str = "deployed",
    extras: bool = True,
    memory: Callable[[], int] | None = None,
) -> SuiteResult:
    """Send every prompt of a suite to a model and grade the answers.

    The answers are greedy. Still, a server that works on several requests in one batch adds floats up in
    another order, so a rare answer may differ from run to run, or from an answer given alone.

    Args:
        suite: The prompts.
        endpoint: The model.
        report: Told of every finished prompt.
        max_parallel: Requests under way at once: the server's slots.
        label: Names the model in progress.
        extras: Whether the odd prompts are sent and the speed is measured too.
        memory: Returns the resident bytes of the runtime at this moment, 0 when unknown.

    Returns:
        Answers in the suite's order, with checks, speed and memory.

    Raises:
        Unavailable: The server failed at one prompt again and again.
        FailedPrecondition: The server takes no request of ours.
    """
    notes: list[str] = []
    monitor = _Monitor(report, memory)
    connections = max([max_parallel, *(suite.latency.requests_at_once if suite.latency else ())])
    with ChatClient(
        endpoint, seed=suite.seed, timeout_seconds=suite.timeout_seconds, connections=connections
    ) as client:
        started = time.perf_counter()
        monitor.begin(f"test {label}", len(suite.prompts) * suite.repeats)
        answers, *repeats = _ask_all(suite, client, max_parallel, monitor)
        seconds = time.perf_counter() - started
        constrained = _ask_constrained(suite, client, max_parallel, monitor, label, notes)
        robustness = _robustness(suite, client, endpoint, answers, monitor, label, notes) if extras else ()
        latency = tuple(_latency(suite, client, monitor, label, notes)) if extras else ()
    return SuiteResult(
        answers=answers,
        robustness=robustness,
        latency=latency,
        memory_bytes=monitor.memory_bytes,
        seconds=seconds,
        parallel=max_parallel,
        notes=tuple(notes),
        repeats=tuple(repeats),
        constrained=constrained,
    )


class _Monitor:
    """Passes progress on, and keeps the largest memory seen. Called from the threads that ask."""

    def __init__(self, report: Report | None, memory: Callable[[], int] | None) -> None:
        self._report = report
        self._memory = memory
        self._lock = Lock()
        self.memory_bytes = 0

    def begin(self, phase: str, total: int) -> None:
        self._phase, self._total, self._done, self._tokens = phase, total, 0, 0
        self._started = time.perf_counter()
        self._send()

    def done(self, reply: Reply | None = None) -> None:
        with self._lock:
            self._done += 1
            self._tokens += reply.output_tokens if reply else 0
            if self._memory:
                self.memory_bytes = max(self.memory_bytes, self._memory())
            self._send()

    def _send(self) -> None:
        if not self._report:
            return
        elapsed = time.perf_counter() - self._started
        left = elapsed / self._done * (self._total - self._done) if self._done else 0.0
        speed = self._tokens / elapsed if self._tokens and elapsed > 0 else 0.0
        message = f"{self._done}/{self._total}" + (f" · {speed:.0f} tokens/s" if speed else "")
        figures = {"tokens_per_second": speed} if speed else {}
        self._report(Progress(self._phase, self._done, self._total, "prompts", left, figures, message))


def _ask_all(
    suite: Suite, client: ChatClient, max_parallel: int, monitor: _Monitor
) -> tuple[tuple[Answer, ...], ...]:
    """Ask every prompt, then every one again for each repeat; the answers of each time in suite's order."""
    limits = {core.name: core.max_tokens for core in suite.cores}
    # The longest answers first, so that no slot waits at the end for one that began late. A repeat comes
    # after all that was asked before: so it meets other prompts in the server's batches.
    order = sorted(suite.prompts, key=lambda prompt: -limits[prompt.core]) * suite.repeats

    def ask(prompt: Prompt) -> Reply:
        return client.ask(prompt.messages, limits[prompt.core])

    replies = _replies(ask, order, client, max_parallel, monitor)
    refused = [reply.refused for reply in replies if reply.refused]
    if len(refused) == len(replies):
        raise FailedPrecondition(
            f"The server refused every prompt, the first with {refused[0]}", reason="MODEL_REFUSES"
        )
    passes = []
    for start in range(0, len(order), len(suite.prompts)):
        asked = slice(start, start + len(suite.prompts))
        found = {prompt.id: reply for prompt, reply in zip(order[asked], replies[asked], strict=True)}
        passes.append(tuple(_grade(suite, prompt, found[prompt.id]) for prompt in suite.prompts))
    return tuple(passes)


def _ask_constrained(
    suite: Suite, client: ChatClient, max_parallel: int, monitor: _Monitor, label: str, notes: list[str]
) -> tuple[Answer, ...]:
    """Ask the prompts of cores with a schema once more, their answers held to it."""
    cores = {core.name: core for core in suite.cores if core.json_schema is not None}
    prompts = [prompt for prompt in suite.prompts if prompt.core in cores]
    if not prompts:
        return ()

    def ask(prompt: Prompt) -> Reply:
        core = cores[prompt.core]
        return client.ask(prompt.messages, core.max_tokens, core.json_schema)

    monitor.begin(f"test {label}, constrained", len(prompts))
    replies = _replies(ask, prompts, client, max_parallel, monitor)
    if all(reply.refused for reply in replies):
        notes.append(f"no constrained tool calls: the server takes no JSON schema ({replies[0].refused})")
        return ()
    answers = []
    for prompt, reply in zip(prompts, replies, strict=True):
        checks = grade_constrained(reply.text, prompt.check)
        if reply.refused:
            reason = f"the server refused the prompt: {reply.refused}"
            checks = [Check(check.name, False, reason) for check in checks]
        answers.append(Answer(prompt.id, prompt.core, reply, tuple(checks)))
    return tuple(answers)


def _replies(
    ask: Callable[[Prompt], Reply],
    prompts: Sequence[Prompt],
    client: ChatClient,
    max_parallel: int,
    monitor: _Monitor,
) -> list[Reply]:
    """Ask prompts, so many at once, and return their replies in order; the first error ends it."""

    def ask_one(prompt: Prompt) -> Reply:
        reply = ask(prompt)
        monitor.done(reply)
        return reply

    pool = ThreadPoolExecutor(max_workers=max_parallel, thread_name_prefix="suite")
    try:
        futures: list[Future[Reply]] = [pool.submit(ask_one, prompt) for prompt in prompts]
        finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in finished:
            future.result()
        replies = [future.result() for future in futures]
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        client.close()  # ends the requests under way
        raise
    pool.shutdown()
    return replies


def _grade(suite: Suite, prompt: Prompt, reply: Reply) -> Answer:
    core = suite.core(prompt.core)
    graded = GRADERS[core.grader].grade(reply.text, prompt.check, core.rules)
    if reply.refused:
        reason = f"the server refused the prompt: {reply.refused}"
        checks = [Check(check.name, False, reason) for check in graded] + [Check(ENDS, False, reason)]
    else:
        if reply.thought_pieces and not reply.text.strip():
            reason = "it thought and never came to an answer"
            graded = [Check(check.name, False, reason) for check in graded]
        checks = [*graded, grade_end(reply.text, reply.finish_reason)]
    return Answer(prompt.id, prompt.core, reply, tuple(checks))


def _robustness(
    suite: Suite,
    client: ChatClient,
    endpoint: Endpoint,
    answers: Sequence[Answer],
    monitor: _Monitor,
    label: str,
    notes: list[str],
) -> tuple[Answer, ...]:
    spec = suite.robustness
    if not spec:
        return ()
    if spec.long_prompt_percent and not endpoint.context_tokens:
        notes.append("no long prompt was sent: the runtime does not tell how long its context is")
    replies = [(prompt, answer.reply) for prompt, answer in zip(suite.prompts, answers, strict=True)]
    prompts = odd_prompts(spec, suite.prompts[0], endpoint.context_tokens, replies)
    monitor.begin(f"odd prompts {label}", len(prompts))
    graded = []
    for prompt in prompts:
        reply = client.ask(prompt.messages, spec.max_tokens)
        monitor.done(reply)
        graded.append(grade_odd(prompt, reply))
    return tuple(graded)


def _latency(
    suite: Suite, client: ChatClient, monitor: _Monitor, label: str, notes: list[str]
) -> Iterator[Latency]:
    spec = suite.latency
    if not spec:
        return
    monitor.begin(f"speed {label}", spec.requests * len(spec.requests_at_once))
    for at_once in spec.requests_at_once:
        latency = measure_latency(client, suite.prompts, spec, at_once, monitor.done)
        if latency:
            yield latency
        else:
            notes.append(
                f"no speed at {at_once} requests at once: no answer came in pieces that could be timed"
            )
