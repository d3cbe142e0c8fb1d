"""A run's stages in words: how far one is, and what came of it."""

from __future__ import annotations

from pathlib import Path

from web4.lora.v1 import deployer_pb2, gateway_pb2, jobs_pb2, packager_pb2, trainer_pb2

from web4lora.home import short
from web4lora.views import human
from web4lora.views.console import BAD, NOTE, OK

_FIGURES = {
    "loss": ("loss {}", human.loss),
    "held_out_loss": ("held-out {}", human.loss),
    "probe_score": ("probes {} of 100", human.number),
    "tokens_per_second": ("{} tokens/s", human.number),
    "peak_memory_bytes": ("{} memory", human.size),
}
_BYTES = "bytes"


def stage_name(stage: gateway_pb2.Stage) -> str:
    """Return a stage's name as people write it."""
    return gateway_pb2.StageName.Name(stage.name).removeprefix("STAGE_NAME_").lower()


def run_state(run: gateway_pb2.Run) -> str:
    """Return a run's state as people write it."""
    return gateway_pb2.RunState.Name(run.state).removeprefix("RUN_STATE_").lower()


def seconds_of(stage: gateway_pb2.Stage) -> float:
    """Return how long a stage took, or has taken until now."""
    return human.elapsed(stage.start_time, stage.end_time)


def queued_text(stage: gateway_pb2.Stage) -> str:
    """Return what a queued stage waits for: `waiting for the trainer, 2 runs ahead, about 14 min`."""
    return stage.progress.message or "waiting its turn"


def progress_text(progress: jobs_pb2.Progress) -> str:
    """Return how far a job is, without the phase: `120/226 steps · loss 0.31 · about 2 min left`."""
    parts = [_amount(progress)] if progress.total or progress.done else []
    figures = [_figure(name, progress.figures[name]) for name in _in_order(progress)]
    parts += figures or ([progress.message] if progress.message else [])
    if progress.seconds_left > 0:
        parts.append(f"about {human.about(progress.seconds_left)} left")
    return " · ".join(parts)


def result_lines(stage: gateway_pb2.Stage) -> list[str]:
    """Return what came of a stage that succeeded: a line, and more where there is more to say."""
    kind = stage.WhichOneof("result")
    if kind == "prepare_result":
        return _prepared(stage.prepare_result)
    if kind == "train_result":
        return _trained(stage.train_result)
    if kind == "package_result":
        return _packaged(stage.package_result)
    if kind == "deploy_result":
        return [_deployed(stage.deploy_result), *passed_over(stage.deploy_result)]
    if kind == "verify_result":
        return [verified(stage.verify_result)]
    if kind == "promote_result":
        return [stage.promote_result.summary]
    return [""]


def tested(result: deployer_pb2.VerifyResult) -> bool:
    """Tell whether there was a suite: without one the stage is done and nothing was tested."""
    return bool(result.scores or result.gates or result.report.digest)


def failure_lines(error: jobs_pb2.JobError) -> list[str]:
    """Return why something failed, what to do, and which log tells more."""
    lines = error.message.splitlines() or [error.reason]
    lines += error.fix.splitlines()
    log = error.metadata.get("log", "")
    if log and log not in error.fix:
        lines.append(f"log: {short(Path(log))}")
    return lines


def _amount(progress: jobs_pb2.Progress) -> str:
    if progress.unit == _BYTES:
        done = human.size(progress.done)
        return f"{done} of {human.size(progress.total)}" if progress.total else done
    unit = f" {progress.unit}" if progress.unit else ""
    return f"{progress.done:,}/{progress.total:,}{unit}" if progress.total else f"{progress.done:,}{unit}"


def _in_order(progress: jobs_pb2.Progress) -> list[str]:
    """Return the figures' names: those we know first, in their order."""
    known = [name for name in _FIGURES if name in progress.figures]
    return known + sorted(name for name in progress.figures if name not in _FIGURES)


def _figure(name: str, value: float) -> str:
    if name in _FIGURES:
        pattern, write = _FIGURES[name]
        return pattern.format(write(value))
    plain = name.removesuffix("_bytes").replace("_", " ")
    return f"{plain} {human.size(value) if name.endswith('_bytes') else human.number(value)}"


def _prepared(result: trainer_pb2.PrepareResult) -> list[str]:
    data, estimate = result.dataset, result.estimate
    rows = human.count(data.train_rows, "row")
    if len(data.rows_by_core) > 1:
        rows += f" in {human.count(len(data.rows_by_core), 'core')}"
    parts = [
        rows,
        f"{data.eval_rows:,} held out",
        *([f"{human.count(data.answers, 'answer')} trained"] if data.answers else []),
        f"{data.tokens:,} tokens, {data.trained_tokens:,} trained",
        f"{data.rows_too_long:,} too long",
    ]
    if estimate.peak_memory_bytes:
        how = "measured" if estimate.rehearsed else "computed"
        parts.append(f"needs about {human.size(estimate.peak_memory_bytes)} of memory, {how}")
    if estimate.seconds:
        parts.append(f"about {human.about(estimate.seconds)} to train")
    if result.device:
        parts.append(result.device)
    shown = [f"! {warning}" for warning in data.warnings[:3]]
    if len(data.warnings) > len(shown):
        shown.append(f"! … and {len(data.warnings) - len(shown)} more warnings: `web4lora dataset check`")
    return [" · ".join(parts), *([result.compared] if result.compared else []), *shown]


def _trained(result: trainer_pb2.TrainResult) -> list[str]:
    parts = [human.count(result.steps, "step"), f"loss {human.loss(result.final_loss)}"]
    if result.HasField("held_out_loss"):
        parts.append(f"held-out {human.loss(result.held_out_loss)}")
    parts.append(f"{result.tokens_per_second:,.0f} tokens/s")
    if result.peak_memory_bytes:
        parts.append(f"{human.size(result.peak_memory_bytes)} of memory")
    shown = [f"! {event}" for event in result.events]
    return [" · ".join(parts), *([result.verdict] if result.verdict else []), *shown]


def _packaged(result: packager_pb2.PackageResult) -> list[str]:
    parts = [f"merge {OK}", f"{result.reference.type} {human.size(result.reference.size_bytes)} {OK}"]
    for file in result.quantized:
        saved = f"{human.MINUS}{100 * file.size_reduction:.0f} %"
        parts.append(f"{file.type} {human.size(file.size_bytes)} ({saved}) {OK}")
    files = [result.reference, *result.quantized]
    if result.HasField("adapter_gguf"):
        files += [result.adapter_gguf, result.adapter_base]
        parts.append(f"adapter {human.size(result.adapter_gguf.size_bytes)} {OK}")
        parts.append(f"base {result.adapter_base.type} {human.size(result.adapter_base.size_bytes)} {OK}")
    parts.append(f"loads {OK if all(file.loads for file in files) else BAD}")
    contents = [f"{file.type}: {file.contents}" for file in result.quantized if file.contents]
    return ["  ".join([*parts, f"checksums {OK}"]), *contents, *_changed(result.merge)]


def _changed(merge: packager_pb2.MergeReport) -> list[str]:
    """Return which stage changed answers: a line, and a row for each stage that was compared."""
    told = [f"{NOTE} {gate.stage}: {gate.measured}" for gate in merge.gates if not gate.passed]
    compared = [gate for gate in merge.gates if gate.answers]
    if not compared:
        return told
    width = max(len(gate.stage) for gate in compared)
    return [merge.changed_at, *(f"  {gate.stage:<{width}}  {gate.measured}" for gate in compared), *told]


def _deployed(result: deployer_pb2.DeployResult) -> str:
    deployment = result.deployment
    return f"{deployment.id} on {deployment.target}, {deployment.endpoint}"


def passed_over(result: deployer_pb2.DeployResult) -> list[str]:
    """Return a line for each runtime that could not serve the model on this machine and was passed over."""
    return [f"{NOTE} not on {said.splitlines()[0]}" for said in result.passed_over if said]


def verified(result: deployer_pb2.VerifyResult, against: str = "") -> str:
    """Return what tests found in a line.

    Args:
        result: What they found.
        against: What the model was compared with; empty: with itself before quantization.
    """
    if not tested(result):
        return result.verdict
    # Results of runs from before prompts were told have scores alone.
    parts = [
        human.count(result.prompts, "prompt") if result.prompts else human.count(len(result.scores), "score")
    ]
    if any(score.HasField("reference_percent") for score in result.scores):
        parts[0] += f" against {against}" if against else " before and after quantization"
    if result.time_to_first_token_seconds:
        parts.append(f"first token after {result.time_to_first_token_seconds:.2f} s")
    if result.tokens_per_second:
        parts.append(f"{human.number(result.tokens_per_second)} tokens/s")
    if result.memory_bytes:
        parts.append(f"{human.size(result.memory_bytes)} of memory")
    return " · ".join(parts)
