"""The worker of the RPC tests: does `prepare` and fails `train`."""

from __future__ import annotations

import sys

from web4.lora.v1 import trainer_pb2
from web4lora_chassis.errors import OutOfMemory
from web4lora_chassis.jobs import JobContext, Progress
from web4lora_chassis.rpc import job_process


def prepare(spec: trainer_pb2.PrepareSpec, context: JobContext) -> trainer_pb2.PrepareResult:
    context.report(Progress("read", 5, 5, "rows", figures={"rows_per_second": 2.5}, message="read"))
    report = trainer_pb2.DatasetReport(train_rows=5_000_000_000, warnings=["é"])
    return trainer_pb2.PrepareResult(base=spec.dataset, dataset=report, device="cpu")


def train(spec: trainer_pb2.TrainSpec, context: JobContext) -> trainer_pb2.TrainResult:
    raise OutOfMemory("Training needs 21 GB.", fix="Use a smaller base.", metadata={"needed_bytes": 21 << 30})


if __name__ == "__main__":
    sys.exit(job_process({"prepare": prepare, "train": train}))
