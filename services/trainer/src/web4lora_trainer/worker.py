"""The child process of a trainer's job: reads the spec, does the work, returns the contract's result."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from google.protobuf.json_format import ParseDict
from web4.lora.v1 import trainer_pb2
from web4lora_chassis.artifacts import ArtifactRef, ArtifactStore, open_store
from web4lora_chassis.dataset import Dataset, read_dataset
from web4lora_chassis.jobs import JobContext, Progress, worker_main
from web4lora_chassis.rpc import ref_message
from web4lora_chassis.rpc.jobs import to_json
from web4lora_chassis.settings import Settings, load

from web4lora_trainer.base_model import BaseModel, resolve
from web4lora_trainer.run_training import Base, Preparation, TrainProgress, prepare, train
from web4lora_trainer.service import tool_versions
from web4lora_trainer.specs import reference, settings_of

_CREATED_BY = "trainer"


def run_prepare(context: JobContext) -> Mapping[str, Any]:
    """Check the data, bring the base model into the store, and estimate the training."""
    settings = load(Settings)
    store = open_store(settings)
    spec = ParseDict(dict(context.spec), trainer_pb2.PrepareSpec())
    context.report(Progress(phase="check data"))
    dataset = _dataset(store, reference(spec.dataset, "dataset"), context.work_dir)
    context.report(Progress(phase="base model"))
    base = resolve(
        spec.base.model,
        spec.base.revision,
        settings.cache,
        lambda line: context.report(Progress(phase="base model", message=line)),
    )
    context.report(Progress(phase="estimate", message="counting tokens, measuring the device"))
    found = prepare(settings_of(spec.train), dataset, base.checkpoint.folder)
    ref = _store_base(store, base, context)
    return to_json(_prepare_result(ref, dataset, found))


def _store_base(store: ArtifactStore, base: BaseModel, context: JobContext) -> ArtifactRef:
    files = base.files()
    total = sum(path.stat().st_size for path in files.values())
    moved = 0

    def advance(count: int) -> None:
        nonlocal moved
        moved += count
        context.report(Progress(phase="store base model", done=moved, total=total, unit="bytes"))

    return store.put(
        "base_model",
        base.name,
        files,
        parameters={"source": base.source, "revision": base.revision, "licence": base.licence},
        created_by=_CREATED_BY,
        link=base.ours,
        advance=advance,
    )


def _prepare_result(ref: ArtifactRef, dataset: Dataset, found: Preparation) -> trainer_pb2.PrepareResult:
    needed = found.estimate
    return trainer_pb2.PrepareResult(
        base=ref_message(ref),
        dataset=trainer_pb2.DatasetReport(
            train_rows=len(dataset.train),
            eval_rows=len(dataset.held_out),
            rows_by_core=dataset.rows_by_core,
            tokens=found.train.tokens,
            trained_tokens=found.train.trained_tokens,
            longest_row_tokens=found.train.longest_row_tokens,
            rows_too_long=found.train.rows_too_long,
            warnings=[*dataset.warnings, *found.warnings],
        ),
        estimate=trainer_pb2.TrainEstimate(
            peak_memory_bytes=needed.peak_memory_bytes,
            free_memory_bytes=needed.free_memory_bytes,
            steps=needed.steps,
            seconds=needed.seconds,
            disk_bytes=needed.disk_bytes,
        ),
        device=str(found.device),
    )


def run_train(context: JobContext) -> Mapping[str, Any]:
    """Train, going on from the last checkpoint of an earlier attempt, and store the adapter."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # all there is to read lies on this machine
    settings = load(Settings)
    store = open_store(settings)
    spec = ParseDict(dict(context.spec), trainer_pb2.TrainSpec())
    dataset_ref, base_ref = reference(spec.dataset, "dataset"), reference(spec.base, "base_model")
    context.report(Progress(phase="fetch"))
    dataset = _dataset(store, dataset_ref, context.work_dir)
    folder = settings.cache / "artifacts" / base_ref.prefix
    made_with = store.get(base_ref, folder).parameters
    base = Base(folder, json.loads(made_with["source"]), json.loads(made_with["revision"]))

    asked = settings_of(spec.train)
    outcome = train(
        asked, dataset, base, context.work_dir, lambda progress: context.report(_progress(progress)),
        memory_failures=context.memory_failures,
    )  # fmt: skip
    context.report(Progress(phase="store adapter"))
    adapter = store.put(
        "adapter",
        spec.name,
        outcome.files,
        inputs=[dataset_ref, base_ref],
        parameters={**asdict(asked), "device": outcome.device},
        tools=tool_versions(),
        created_by=_CREATED_BY,
    )
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
    )
    if outcome.held_out_loss is not None:
        result.held_out_loss = outcome.held_out_loss
    return to_json(result)


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
            ("tokens_per_second", progress.tokens_per_second or None),
        )
        if value is not None
    }
    parts = []
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.2f}")
    if progress.held_out_loss is not None:
        parts.append(f"held-out {progress.held_out_loss:.2f}")
    if progress.tokens_per_second:
        parts.append(f"{progress.tokens_per_second:.0f} tokens/s")
    if progress.resumed_step:
        parts.append(f"resumed at step {progress.resumed_step}")
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
    sys.exit(worker_main({"prepare": run_prepare, "train": run_train}))
