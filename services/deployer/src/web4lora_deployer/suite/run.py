"""Runs a suite against a model: every prompt once, graded; then the odd prompts and the speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from threading import Lock

from web4lora_chassis.errors import FailedPrecondition
from web4lora_chassis.jobs import Progress

from web4lora_deployer.suite.chat import ChatClient, Endpoint
from web4lora_deployer.suite.check import Check
from web4lora_deployer.suite.graders import ENDS, GRADERS, grade_end
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
        monitor.begin(f"test {label}", len(suite.prompts))
        answers = _ask_all(suite, client, max_parallel, monitor)
        seconds = time.perf_counter() - started
        robustness = _robustness(suite, client, endpoint, answers, monitor, label, notes) if extras else ()
        latency = tuple(_latency(suite, client, monitor, label, notes)) if extras else ()
    return SuiteResult(
        answers, robustness, latency, monitor.memory_bytes, seconds, max_parallel, tuple(notes)
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


def _ask_all(suite: Suite, client: ChatClient, max_parallel: int, monitor: _Monitor) -> tuple[Answer, ...]:
    limits = {core.name: core.max_tokens for core in suite.cores}
    # The longest answers first, so that no slot waits at the end for one that began late.
    order = sorted(suite.prompts, key=lambda prompt: -limits[prompt.core])

    def ask(prompt: Prompt) -> Answer:
        reply = client.ask(prompt.messages, limits[prompt.core])
        monitor.done(reply)
        return _grade(suite, prompt, reply)

    pool = ThreadPoolExecutor(max_workers=max_parallel, thread_name_prefix="suite")
    try:
        answers = {answer.id: answer for answer in _first_error_or_all(pool, ask, order)}
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        client.close()  # ends the requests under way
        raise
    pool.shutdown()
    refused = [answer.reply.refused for answer in answers.values() if answer.reply.refused]
    if len(refused) == len(answers):
        raise FailedPrecondition(
            f"The server refused every prompt, the first with {refused[0]}", reason="MODEL_REFUSES"
        )
    return tuple(answers[prompt.id] for prompt in suite.prompts)


def _first_error_or_all(
    pool: ThreadPoolExecutor, ask: Callable[[Prompt], Answer], prompts: Sequence[Prompt]
) -> list[Answer]:
    futures: list[Future[Answer]] = [pool.submit(ask, prompt) for prompt in prompts]
    finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in finished:
        future.result()
    return [future.result() for future in futures]


def _grade(suite: Suite, prompt: Prompt, reply: Reply) -> Answer:
    core = suite.core(prompt.core)
    graded = GRADERS[core.grader].grade(reply.text, prompt.check, core.rules)
    if reply.refused:
        reason = f"the server refused the prompt: {reply.refused}"
        checks = [Check(check.name, False, reason) for check in graded] + [Check(ENDS, False, reason)]
    else:
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
            notes.append(f"no speed at {at_once} requests at once: every answer was shorter than two tokens")
