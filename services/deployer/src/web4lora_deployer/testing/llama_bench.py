"""llama-bench on the file of a deployed model: how fast llama.cpp is there with nothing around it."""

from __future__ import annotations

import json
from pathlib import Path

from web4lora_chassis import process
from web4lora_chassis.errors import Internal
from web4lora_chassis.jobs import Progress
from web4lora_llamacpp import LlamaCpp
from web4lora_llamacpp.converter import environment

from web4lora_deployer.report import SpeedLimit
from web4lora_deployer.runtimes.base import Report
from web4lora_deployer.suite import SuiteResult

_ROUNDS = 3
_TIMEOUT_SECONDS = 1800.0


def measure_limit(llama: LlamaCpp, file: Path, result: SuiteResult, report: Report) -> SpeedLimit:
    """Run llama-bench with prompts and answers as long as a suite's were on average.

    Batch sizes, threads and flash attention are llama.cpp's defaults, which llama-server takes too.

    Args:
        llama: The tools.
        file: The GGUF.
        result: What the suite found.
        report: Takes progress.

    Raises:
        Internal: llama-bench failed.
    """
    replies = [answer.reply for answers in result.passes for answer in answers]
    prompt_tokens = max(1, round(sum(reply.prompt_tokens for reply in replies) / len(replies)))
    answer_tokens = max(1, round(sum(reply.output_tokens for reply in replies) / len(replies)))
    report(Progress(phase="llama-bench", message=f"{prompt_tokens} + {answer_tokens} tokens"))
    output = process.run(
        [
            llama.bench, "--model", file, "--offline", "--repetitions", str(_ROUNDS), "--output", "jsonl",
            "--n-prompt", "0", "--n-gen", str(answer_tokens), "-pg", f"{prompt_tokens},{answer_tokens}",
        ],
        env=environment(file.parent), timeout_seconds=_TIMEOUT_SECONDS,
    )  # fmt: skip
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    found = {bool(row["n_prompt"]): row for row in rows}
    if set(found) != {False, True}:
        raise Internal(f"llama-bench gave {len(rows)} speeds in place of 2:\n{output[-500:]}")
    return SpeedLimit(
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        answer_tokens_per_second=float(found[False]["avg_ts"]),
        all_tokens_per_second=float(found[True]["avg_ts"]),
        threads=int(found[True]["n_threads"]),
    )
