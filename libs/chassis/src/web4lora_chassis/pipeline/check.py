"""The check of a whole pipeline, as the command makes it of a file and the gateway of a run."""

from __future__ import annotations

import re

from web4.lora.v1 import gateway_pb2

from web4lora_chassis.errors import shown
from web4lora_chassis.pipeline.dataset import DatasetSettings
from web4lora_chassis.pipeline.deploy import DeploySettings
from web4lora_chassis.pipeline.package import PackageSettings
from web4lora_chassis.pipeline.rules import Problem
from web4lora_chassis.pipeline.train import TrainSettings
from web4lora_chassis.pipeline.verify import VerifySettings, without_suite
from web4lora_chassis.quantization_sizes import size_problem

# Narrower than what artifacts and deployments may be called: their names are made of this one.
_NAME = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
_NAME_LENGTH = 63
_STAGES = (
    ("dataset", DatasetSettings),
    ("train", TrainSettings),
    ("package", PackageSettings),
    ("deploy", DeploySettings),
    ("verify", VerifySettings),
)


def problems_of(pipeline: gateway_pb2.Pipeline) -> list[Problem]:
    """Return all that is wrong with the values of a pipeline, without a look at the files it names."""
    found = [*_name(pipeline.name)]
    if not pipeline.base.model.strip():
        found.append(
            Problem(
                "base.model", "no base model is named.", "Name an alias, a hub id, a folder or a GGUF file."
            )
        )
    for name, kind in _STAGES:
        found += kind.problems(getattr(pipeline, name), name)
    if pipeline.dataset.eval_share > 0 and pipeline.dataset.eval_files:
        found.append(
            Problem(
                "dataset.eval_share",
                "there are eval_files too.",
                "Leave out one of the two.",
                between=True,
            )
        )
    if pipeline.package.adapter_gguf and pipeline.train.lora.use_dora:
        found.append(
            Problem(
                "package.adapter_gguf",
                "llama.cpp adds an adapter to a base, and DoRA is no sum.",
                "Leave out train.lora.use_dora, or deploy a merged model.",
                between=True,
            )
        )
    if not (pipeline.verify.suite_file or pipeline.verify.suite.digest):
        found += without_suite(pipeline.verify)
        if pipeline.deploy.promote == "proven":
            found.append(
                Problem(
                    "deploy.promote",
                    "nothing is proven without tests.",
                    "Name a suite in verify.suite_file, or take another policy than proven.",
                    between=True,
                )
            )
    if not found:
        wanted = pipeline.verify.budgets.min_size_reduction
        if problem := size_problem(wanted, PackageSettings.of(pipeline.package).quantizations[0]):
            found.append(Problem("verify.budgets.min_size_reduction", *problem, between=True))
    return found


def fill(pipeline: gateway_pb2.Pipeline) -> None:
    """Give each absent value its default; what depends on the model or the machine stays absent."""
    for name, kind in _STAGES:
        kind.fill(getattr(pipeline, name))
    if not pipeline.train.lora.HasField("alpha"):
        pipeline.train.lora.alpha = TrainSettings.of(pipeline.train).lora.scale_numerator


def _name(name: str) -> list[Problem]:
    if _NAME.fullmatch(name) and len(name) <= _NAME_LENGTH:
        return []
    words = "-".join(re.findall(r"[a-z0-9]+", name.lower())).lstrip("0123456789-")[:_NAME_LENGTH].rstrip("-")
    hint = f"; {words} would be one" if words else ""
    rule = f"Use 1 to {_NAME_LENGTH} of a-z and 0-9 with single dashes within, the first one a letter."
    return [Problem("name", f"{shown(name)} is not a pipeline name{hint}.", rule)]
