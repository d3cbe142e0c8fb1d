"""Measures the time to the first token and the speed, alone and with several requests at once."""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from web4lora_deployer.suite.chat import ChatClient
from web4lora_deployer.suite.result import Latency, Reply
from web4lora_deployer.suite.spec import LatencySpec, Prompt


def measure_latency(
    client: ChatClient,
    prompts: Sequence[Prompt],
    spec: LatencySpec,
    at_once: int,
    done: Callable[[], None],
) -> Latency | None:
    """Measure the speed with `at_once` requests under way.

    Args:
        client: Of the model.
        prompts: Questions of the suite, of which some are asked.
        spec: How many, and how long the answers may be.
        at_once: Requests under way.
        done: Called after each request.

    Returns:
        The speed; None when no request yielded an answer of two tokens or more.
    """
    step = max(1, len(prompts) // spec.requests)
    chosen = [prompts[index * step % len(prompts)] for index in range(spec.requests)]

    def ask(prompt: Prompt) -> Reply:
        reply = client.ask(_with_unique_start(prompt.messages), spec.max_tokens)
        done()
        return reply

    with ThreadPoolExecutor(max_workers=at_once, thread_name_prefix="latency") as pool:
        started = time.perf_counter()
        replies = list(pool.map(ask, chosen))
        seconds = time.perf_counter() - started
    timed = [reply for reply in replies if reply.tokens_per_second > 0]
    if not timed:
        return None
    first_tokens = [reply.first_token_seconds for reply in timed]
    return Latency(
        requests_at_once=at_once,
        requests=len(timed),
        first_token_seconds=statistics.median(first_tokens),
        slowest_first_token_seconds=max(first_tokens),
        tokens_per_second=statistics.median(reply.tokens_per_second for reply in timed),
        total_tokens_per_second=sum(reply.output_tokens for reply in replies) / seconds,
        timed_by_server=all(reply.timed_by_server for reply in timed),
    )


def _with_unique_start(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Make a conversation that no server has in its cache, so that the whole prompt is read."""
    first, *rest = messages
    unique = {"role": first["role"], "content": f"Session {secrets.token_hex(8)}. {first['content']}"}
    return [unique, *(dict(message) for message in rest)]
