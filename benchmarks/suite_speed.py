"""How fast a suite of 200 prompts runs in each runtime found here, beside llama-bench on the same file.

    web4lora up
    .venv/bin/python benchmarks/suite_speed.py outputs/latest/model.Q4_K_M.gguf

Deploys the file to every runtime that `web4lora doctor` finds, asks each the sample's 100 held-out prompts
and 100 of its training rows, as many at once as it has slots, and runs llama-bench with prompts and answers
as long as the suite's were on average. Nothing else should be at work on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from web4lora import Client

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "web4"
CORES = {  # name: check, file, held-out rows, training rows, longest answer
    "tool": ("tool_call", "tool_core", 40, 40, 72),
    "style": ("style", "style_core", 20, 20, 220),
    "guardrail": ("guardrail", "guardrails", 40, 40, 64),
}
CONTEXT_TOKENS = 1024


def write_suite(folder: Path) -> Path:
    """Write a suite of 200 prompts."""
    lines = ["name: 200 prompts", "llama_bench: true", "cores:"]
    for core, (check, name, held_out, trained, longest) in CORES.items():
        rows = []
        for part, count in (("eval", held_out), ("train", trained)):
            text = (EXAMPLES / f"{name}.{part}.jsonl").read_text("utf-8")
            rows += text.splitlines(keepends=True)[:count]
        (folder / f"{core}.jsonl").write_text("".join(rows), "utf-8")
        lines.append(f"  {core}: {{check: {check}, prompts: {core}.jsonl, max_tokens: {longest}}}")
    (folder / "suite.yaml").write_text("\n".join(lines) + "\n", "utf-8")
    return folder / "suite.yaml"


def finished(client: Client, job_id: str) -> Any:
    """Follow a job to its end; a line for each phase."""
    last: Any = None
    phase = ""
    for last in client.watch_job(job_id):
        if last.progress.phase != phase:
            phase = last.progress.phase
            print(f"  {time.strftime('%H:%M:%S')} {phase}", flush=True)
    if not last.HasField("result"):
        raise SystemExit(f"{last.error.message} {last.error.fix}")
    return last


def show(data: dict[str, Any]) -> None:
    """Print the runtimes side by side."""
    rows = [(data["models"]["deployed"], data["throughput"]["deployed"], None)]
    rows += [(each["model"], each["throughput"], each) for each in data["comparisons"]]
    bench = data["llama_bench"]
    total = data["suite"]["prompts"]
    print(f"\n{'runtime':<28}{'seconds':>8}{'answers':>10}{'share':>7}{'all':>9}{'share':>7}  same answers")
    for model, speed, compared in rows:
        name = f"{model['target']} {model.get('runtime_version', '')}"[:27]
        same = f"{compared['same_answers']} of {total}" if compared else "–"
        print(
            f"{name:<28}{speed['seconds']:>8.1f}{speed['answer_tokens_per_second']:>10.1f}"
            f"{speed['llama_bench_answer_share']:>7.0%}{speed['all_tokens_per_second']:>9.1f}"
            f"{speed['llama_bench_all_share']:>7.0%}  {same}"
        )
    print(
        f"{'llama-bench':<28}{'':>8}{bench['answer_tokens_per_second']:>10.1f}{1:>7.0%}"
        f"{bench['all_tokens_per_second']:>9.1f}{1:>7.0%}"
    )
    print(
        f"\n{total} prompts, {rows[0][1]['requests_at_once']} at once; tokens/s by the clock, reading the "
        f"prompts included. llama-bench: {bench['prompt_tokens']} + {bench['answer_tokens']} tokens, one "
        f"after the other, {bench['threads']} threads."
    )


def main() -> None:
    """Deploy, ask, compare, clean up."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("gguf", type=Path, help="the model")
    parser.add_argument("--parallel", type=int, default=4, help="requests at once, default 4")
    parser.add_argument("--out", type=Path, help="bring the report here")
    asked = parser.parse_args()
    with Client() as client, tempfile.TemporaryDirectory() as folder:
        targets = [runtime.target for runtime in client.info().runtimes if runtime.usable]
        targets.sort(key=lambda target: target != "llama-server")
        names = [f"bench-{target}" for target in targets]
        made = []
        try:
            for name, target in zip(names, targets, strict=True):
                job = client.deploy(
                    asked.gguf, name, target=target, context_tokens=CONTEXT_TOKENS, parallel=asked.parallel
                )
                made.append(finished(client, job.id).result.deploy.deployment.id)
            first, *others = made
            job = client.evaluate(first, write_suite(Path(folder)), against=others, name="bench-suite-speed")
            report = finished(client, job.id).result.evaluate.report
            out = asked.out or Path(folder) / "report"
            client.get_artifact(report, out)
            show(json.loads((out / "eval.json").read_text("utf-8")))
        finally:
            for deployment in made:
                client.delete_deployment(deployment)


if __name__ == "__main__":
    main()
