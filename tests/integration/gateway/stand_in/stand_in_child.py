"""The stand-in's child: makes tiny but real artifacts. Files in its control folder steer it:

`hold-<kind>` makes it wait, `fail-<kind>` makes it fail with the text in that file, and `miss-limits` makes
its tests find that a limit was missed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from web4lora_chassis.artifacts import ArtifactRef, open_store
from web4lora_chassis.errors import ResourceExhausted
from web4lora_chassis.jobs import JobContext, Progress, worker_main
from web4lora_chassis.settings import Settings, load

CONTROL = Path(os.environ["STAND_IN_CONTROL"])
STEP_SECONDS = float(os.environ.get("STAND_IN_STEP_SECONDS", "0.05"))


def steer(context: JobContext, kind: str) -> None:
    failure = CONTROL / f"fail-{kind}"
    if failure.exists():
        raise ResourceExhausted(failure.read_text(), fix="Buy memory.", reason="OUT_OF_MEMORY")
    step = 0
    while step < 3 or ((CONTROL / f"hold-{kind}").exists() and not context.end_early()):
        step += 1
        context.report(Progress(kind, step, 100, "steps", message=f"step {step}", figures={"loss": 1 / step}))
        time.sleep(STEP_SECONDS)


def store_files(
    context: JobContext, kind: str, name: str, texts: dict[str, str], inputs=(), **parameters
) -> dict:
    files = {}
    for path, text in texts.items():
        files[path] = context.work_dir / kind / path
        files[path].parent.mkdir(parents=True, exist_ok=True)
        files[path].unlink(missing_ok=True)
        files[path].write_text(text)
    refs = [ArtifactRef.from_json({**ref, "kind": ref["kind"][14:].lower()}) for ref in inputs]
    ref = open_store(load(Settings)).put(
        kind, name, files, inputs=refs, parameters=parameters, created_by="stand-in"
    )
    return {**ref.to_json(), "kind": f"ARTIFACT_KIND_{kind.upper()}", "size_bytes": str(ref.size_bytes)}


def prepare(context: JobContext) -> dict:
    steer(context, "prepare")
    base = store_files(context, "base_model", "base", {"config.json": json.dumps(context.spec["base"])})
    dataset = {"train_rows": 3, "rows_by_core": {"tool": 3}}
    return {"base": base, "dataset": dataset, "device": "stand-in", "context_tokens": 8192}


def train(context: JobContext) -> dict:
    steer(context, "train")
    spec = context.spec
    texts = {
        "adapter_config.json": "{}",
        "adapter_model.safetensors": json.dumps(spec["train"]),
        "logs/loss.csv": "step,loss\n1,0.5\n",
    }
    adapter = store_files(
        context, "adapter", spec["name"], texts, [spec["dataset"], spec["base"]], lora=spec["train"]["lora"]
    )
    return {
        "adapter": adapter, "final_loss": 0.5, "verdict": "settled", "steps": 3, "tokens_per_second": 7.5,
        "ended_early": context.end_early(),
    }  # fmt: skip


def package(context: JobContext) -> dict:
    steer(context, "package")
    spec = context.spec
    inputs = [spec["base"], spec["adapter"]]
    told = spec["adapter"]["digest"]

    def gguf(path: str, kind: str, size: float) -> dict:
        artifact = store_files(context, "gguf", f"{spec['name']}-{kind.lower()}", {path: told + kind}, inputs)
        return {
            "artifact": artifact,
            "file_name": path,
            "type": kind,
            "size_bytes": 67,
            "size_reduction": size,
        }

    return {
        "merged": store_files(context, "merged_model", spec["name"], {"model.safetensors": told}, inputs),
        "merge": {"adapter_tensors": 4},
        "reference": gguf("merged_model.gguf", "F16", 0),
        "quantized": [gguf(f"model.{kind}.gguf", kind, 0.6) for kind in spec["package"]["quantizations"]],
        "files": store_files(
            context,
            "report",
            spec["name"],
            {"Modelfile": "FROM x\n", "SHA256SUMS": told, "modelfile.json": "{}"},
        ),
        "llama_cpp_version": "b1",
    }


def deploy(context: JobContext) -> dict:
    steer(context, "deploy")
    spec = context.spec
    deployment = {
        "id": f"{spec['name']}:v{spec['gguf']['digest'][:8]}",
        "name": spec["name"],
        "target": spec["deploy"].get("target", "auto").replace("auto", "llama-server"),
        "endpoint": "http://127.0.0.1:1/v1",
        "gguf": spec["gguf"],
        "state": "DEPLOYMENT_STATE_SERVING",
        "context_tokens": spec["deploy"].get("context_tokens", 4096),
    }
    place = CONTROL / f"deployment-{spec['gguf']['digest'][:8]}.json"
    part = place.with_suffix(".part")
    part.write_text(json.dumps(deployment))
    part.replace(place)
    return {"deployment": deployment, "ready_seconds": 0.1}


def verify(context: JobContext) -> dict:
    steer(context, "verify")
    spec = context.spec
    texts = {"eval_log.md": "passed\n", "eval.json": spec["run_json"], "drawio_diagram.png": "png"}
    score = {"name": "tool_call.valid", "prompts": 40, "deployed_percent": 95.0}
    report = store_files(context, "report", spec["name"], texts)
    missed = (CONTROL / "miss-limits").exists()
    gates = [{"name": "memory", "passed": True}, {"name": "speed", "passed": not missed}]
    result = {"passed": not missed, "verdict": "usable", "scores": [score], "gates": gates, "report": report}
    if (CONTROL / "undecided").exists():
        gates[0]["state"], gates[1]["state"] = "TEST_STATE_PASSED", "TEST_STATE_UNDECIDED"
        result |= {"passed": False, "state": "TEST_STATE_UNDECIDED"}
    return result


HANDLERS = {"prepare": prepare, "train": train, "package": package, "deploy": deploy, "verify": verify}

if __name__ == "__main__":
    sys.exit(worker_main(HANDLERS))
