"""A run's folder of people, whose `run.json` names the run that `web4lora deploy FOLDER` is about."""

from __future__ import annotations

from pathlib import Path

from tests.corpus.case import Case, Kind, having, no_json

FILE = "run.json"
IDS: dict[str, object] = {
    "a number": 7,
    "null": None,
    "empty": "",
    "a path": "../run_1",
    "of many lines": "a\nb\x1b[31m",
    "of half a character": "\ud800",
    "of a million letters": "x" * 1_000_000,
    "a list": ["run_1"],
}


def command(folder: Path, _: Path) -> None:
    from web4.lora.v1 import gateway_pb2
    from web4lora.client.deployable import deploy_spec
    from web4lora_chassis.errors import NotFound

    def run_of(run_id: str) -> gateway_pb2.Run:
        if run_id != "run_2026-01-31_1":
            raise NotFound(f"There is no run {run_id}.")
        run = gateway_pb2.Run(id=run_id)
        run.stages.add().package_result.quantized.add().artifact.name = "demo"
        return run

    deploy_spec(folder, "", run_of=run_of, open_store=lambda: None)  # type: ignore[arg-type, return-value]


KIND = Kind(
    name="run.json",
    whole=having(FILE, run_id="run_2026-01-31_1"),
    readers={"command": command},
    cases=(
        *no_json(FILE),
        *(Case(f"an id that is {name}", having(FILE, run_id=value)) for name, value in IDS.items()),
        Case("not there", lambda folder: (folder / FILE).unlink()),
        Case("a folder", lambda folder: ((folder / FILE).unlink(), (folder / FILE).mkdir())),
    ),
    names=r"run\.json",
)
