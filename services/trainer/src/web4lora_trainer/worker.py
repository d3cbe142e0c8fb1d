"""The child process of a trainer's job: from the contract's spec to its result."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from web4.lora.v1 import trainer_pb2
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore, open_store
from web4lora_chassis.artifacts.manifest import Manifest
from web4lora_chassis.dataset import Dataset, read_dataset
from web4lora_chassis.earlier_adapter import adapter_of, require_base, start_problems
from web4lora_chassis.errors import Unavailable
from web4lora_chassis.jobs import JobContext, Progress
from web4lora_chassis.jobs.byte_progress import byte_progress
from web4lora_chassis.pipeline.rules import error_of
from web4lora_chassis.pipeline.train import TrainSettings
from web4lora_chassis.rpc import job_process, ref_message
from web4lora_chassis.settings import Settings, load
from web4lora_llamacpp import find, find_source
from web4lora_llamacpp.tools import cache_root

from web4lora_trainer.base_check import context_tokens
from web4lora_trainer.base_model import BaseModel, resolve
from web4lora_trainer.beside import other_jobs, yield_memory
from web4lora_trainer.prepare import Converter, Preparation, check_settings, prepare
from web4lora_trainer.rehearsal import Rehearser
from web4lora_trainer.reports import leaving, report_here, require_reports
from web4lora_trainer.service import tool_versions
from web4lora_trainer.specs import checked_ref, settings_of
from web4lora_trainer.trainings import Training

if TYPE_CHECKING:
    from web4lora_trainer.progress import TrainProgress

_CREATED_BY = "trainer"


def run_prepare(spec: trainer_pb2.PrepareSpec, context: JobContext) -> trainer_pb2.PrepareResult:
    """Check the data, bring the base model into the store, and estimate the training."""
    yield_memory()
    settings = load(Settings)
    store = open_store(settings)
    context.report(Progress(phase="check data"))
    dataset = _dataset(store, checked_ref(spec.dataset, "dataset"), context.work_dir)
    context.report(Progress(phase="base model"))
    base = resolve(
        spec.base.model,
        spec.base.revision,
        settings.cache,
        lambda line: context.report(Progress(phase="base model", message=line)),
    )
    context.report(Progress(phase="check base model", message="against itself, and against llama.cpp"))
    train_settings = settings_of(spec.train)
    require_reports(train_settings.report_to)
    start = _start(store, train_settings)
    with Rehearser() as rehearser:
        if not other_jobs():
            rehearser.start()  # its libraries load meanwhile
        check_settings(
            train_settings, base.decoder.folder, spec.context_tokens
        )  # before llama.cpp is fetched
        found = prepare(
            train_settings, dataset, base.decoder.folder,
            _converter(settings, context), base.name, context.work_dir, base.licence, other_jobs, rehearser,
            _rates(settings),
        )  # fmt: skip
    ref = _store_base(store, base, context)
    if start is not None:
        require_base(start, ref)
    return _prepare_result(ref, dataset, found, leaving(train_settings.report_to))


def _converter(settings: Settings, context: JobContext) -> Converter | None:
    """Return llama.cpp's converter, fetched when it is not there yet; None where it is out of reach."""
    try:
        source = find_source(cache_root(settings.cache), context.report)
    except Unavailable as error:
        context.report(Progress(phase="check base model", message=error.message))
        return None
    llama = find(settings.cache)
    return Converter(source, llama.tokenize if llama else None, settings.cache / "vocabularies")


def _rates(settings: Settings) -> Path:
    """Return where measured speeds are kept."""
    return settings.cache / "speeds"


def _store_base(store: ArtifactStore, base: BaseModel, context: JobContext) -> ArtifactRef:
    files = base.decoder.files()
    total = sum(path.stat().st_size for path in files.values())
    return store.put(
        "base_model",
        base.name,
        files,
        parameters={"source": base.source, "revision": base.revision, "licence": base.licence},
        created_by=_CREATED_BY,
        link=base.ours,
        advance=byte_progress(context.report, "store base model", total),
    )


def _prepare_result(
    ref: ArtifactRef, dataset: Dataset, found: Preparation, warnings: Sequence[str]
) -> trainer_pb2.PrepareResult:
    needed = found.estimate
    return trainer_pb2.PrepareResult(
        base=ref_message(ref),
        dataset=trainer_pb2.DatasetReport(
            train_rows=len(dataset.train),
            eval_rows=len(dataset.held_out),
            rows_by_core=dataset.rows_by_core,
            tokens=found.train.tokens,
            trained_tokens=found.train.trained_tokens,
            answers=found.train.answers,
            longest_row_tokens=found.train.longest_row_tokens,
            rows_too_long=found.train.rows_too_long,
            warnings=[*warnings, *dataset.warnings, *found.warnings],
        ),
        estimate=trainer_pb2.TrainEstimate(
            peak_memory_bytes=needed.peak_memory_bytes,
            free_memory_bytes=needed.free_memory_bytes,
            steps=needed.steps,
            seconds=needed.seconds,
            disk_bytes=needed.disk_bytes,
            rehearsed=needed.rehearsed,
        ),
        device=str(found.device),
        compared=found.compared,
        context_tokens=found.context_tokens,
    )


def run_train(spec: trainer_pb2.TrainSpec, context: JobContext) -> trainer_pb2.TrainResult:
    """Train, going on from the last checkpoint of this or an earlier job, and store the adapter."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # all there is to read lies on this machine
    from web4lora_trainer.train import Base, train  # its libraries take seconds; a prepare needs few of them

    settings = load(Settings)
    store = open_store(settings)
    dataset_ref, base_ref = checked_ref(spec.dataset, "dataset"), checked_ref(spec.base, "base_model")
    context.report(Progress(phase="fetch"))
    dataset = _dataset(store, dataset_ref, context.work_dir)
    folder = settings.cache / "artifacts" / base_ref.prefix
    made_with = store.get(base_ref, folder).parameters
    base = Base(folder, json.loads(made_with["source"]), json.loads(made_with["revision"]), base_ref.digest)

    train_settings = settings_of(spec.train)
    require_reports(train_settings.report_to)
    if train_settings.report_to:
        report_here(settings.home / "trainer" / "reports", f"{spec.name}-{context.id}")
    start, weights = _start(store, train_settings), None
    if start is not None:
        require_base(start, base_ref)
        weights = context.work_dir / "start"
        store.get(start.ref, weights)
    train_settings = train_settings.for_model(context_tokens(folder))
    root = settings.home / "trainer" / "trainings"
    training = Training(
        root, (dataset_ref.digest, base_ref.digest), train_settings, context.work_dir, settings
    )
    with training.open() as work_dir:
        outcome = train(
            train_settings, dataset, base, work_dir, lambda progress: context.report(_progress(progress)),
            memory_failures=context.memory_failures, end_early=context.end_early, rates=_rates(settings),
            start=weights,
        )  # fmt: skip
        context.report(Progress(phase="store adapter"))
        adapter = store.put(
            "adapter",
            spec.name,
            outcome.files,
            inputs=[dataset_ref, base_ref, *([start.ref] if start else [])],
            parameters={**asdict(train_settings.of_result), "device": outcome.device},
            tools=tool_versions(),
            created_by=_CREATED_BY,
        )
        if not outcome.ended_early:  # else a new job of the same goes on from there
            training.finish()
    result = trainer_pb2.TrainResult(
        adapter=ref_message(adapter),
        final_loss=outcome.final_loss,
        settled=outcome.settled,
        verdict=outcome.verdict,
        steps=outcome.steps,
        tokens_per_second=outcome.tokens_per_second,
        seconds=outcome.seconds,
        peak_memory_bytes=outcome.peak_memory_bytes,
        device=outcome.device,
        trained_parameters=outcome.trained_parameters,
        events=outcome.events,
        ended_early=outcome.ended_early,
    )
    if outcome.held_out_loss is not None:
        result.held_out_loss = outcome.held_out_loss
    result.exported_step = outcome.exported_step
    if outcome.probe_score is not None:
        result.probe_score = outcome.probe_score
    return result


def _start(store: ArtifactStore, settings: TrainSettings) -> Manifest | None:
    """Return the adapter to go on from, if there is one.

    Raises:
        NotFound: It is not in the store.
        InvalidInput: Its shape is another.
    """
    if settings.start_from is None:
        return None
    adapter = adapter_of(store, settings.start_from)
    if problems := list(start_problems(settings, adapter)):
        raise error_of(problems)
    return adapter


def _dataset(store: ArtifactStore, ref: ArtifactRef, work_dir: Path) -> Dataset:
    """Fetch a dataset and check it: train/*.jsonl to train on, eval/*.jsonl held out."""
    folder = work_dir / "dataset"
    paths = [entry.path for entry in store.get(ref, folder).files]
    train_files = [folder / path for path in paths if path.startswith("train/") and path.endswith(".jsonl")]
    eval_files = [folder / path for path in paths if path.startswith("eval/") and path.endswith(".jsonl")]
    return read_dataset(train_files, eval_files)


def _progress(progress: TrainProgress) -> Progress:
    """Return a training's progress as a job's."""
    figures = {
        name: value
        for name, value in (
            ("loss", progress.loss),
            ("held_out_loss", progress.held_out_loss),
            ("probe_score", progress.probe_score),
            ("tokens_per_second", progress.tokens_per_second or None),
        )
        if value is not None and math.isfinite(value)
    }
    parts = []
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.2f}")
    if progress.held_out_loss is not None:
        parts.append(f"held-out {progress.held_out_loss:.2f}")
    if progress.probe_score is not None:
        parts.append(f"probes {progress.probe_score:.0f} of 100")
    if progress.tokens_per_second:
        parts.append(f"{progress.tokens_per_second:.0f} tokens/s")
    if progress.resumed_step:
        parts.append(f"resumed at step {progress.resumed_step}")
    if progress.note:
        parts.append(progress.note)
    return Progress(
        phase=progress.phase,
        done=progress.step,
        total=progress.total_steps,
        unit="steps" if progress.total_steps else "",
        seconds_left=progress.seconds_left,
        figures=figures,
        message=" · ".join(parts),
    )


if __name__ == "__main__":
    sys.exit(job_process({"prepare": run_prepare, "train": run_train}))
