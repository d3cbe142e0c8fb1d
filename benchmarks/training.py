"""How fast this machine trains: our trainer beside TRL's SFT trainer, on the same rows, in one run.

    .venv/bin/python benchmarks/training.py --seconds 60

Every variant trains SmolLM2-135M-Instruct on the sample dataset in a process of its own, one after the other,
for the given time; the first two steps, which warm caches up, are not counted. Speed is in non-padding tokens
through the model in a second of training, so padding is not rewarded. The last line is no training: the rate
at which the linear layers' own multiplications alone would go through as many tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TRAIN_FILES = sorted((ROOT / "examples" / "web4").glob("*.train.jsonl"))
BASE = "smollm2-135m-instruct"
WARM_UP_STEPS = 2
DEMO_LAST_LAYERS = 14
TRL_BATCH_ROWS = 8  # TRL's default
PEER_DEFAULTS = "TRL SFTTrainer, its defaults (bf16, gradient checkpointing)"
PEER_BEST = "TRL SFTTrainer, bf16, packed, no checkpointing"
PACKED_TOKENS = 512

VARIANTS: dict[str, Callable[[float], dict[str, Any]]] = {}


class Enough(Exception):
    """The time is over."""


class Meter:
    """Counts tokens and seconds after the warm-up.

    Args:
        seconds: When to raise `Enough`, counted from the end of the warm-up.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._began: tuple[float, int] | None = None
        self.result: dict[str, Any] = {}

    def step(self, step: int, tokens: int) -> None:
        """Take a finished step in, with all tokens so far."""
        now = time.perf_counter()
        if step == WARM_UP_STEPS:
            self._began = (now, tokens)
        elif self._began is not None:
            spent = now - self._began[0]
            self.result = {
                "tokens": tokens - self._began[1],
                "seconds": spent,
                "steps": step - WARM_UP_STEPS,
                "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                * (1 if sys.platform == "darwin" else 1024),
            }
            if spent >= self._seconds:
                raise Enough


def variant(name: str) -> Callable[[Callable[[float], dict[str, Any]]], Callable[[float], dict[str, Any]]]:
    """Register what is measured under a name."""

    def register(function: Callable[[float], dict[str, Any]]) -> Callable[[float], dict[str, Any]]:
        VARIANTS[name] = function
        return function

    return register


def _base_folder() -> Path:
    from web4lora_chassis.settings import Settings, load
    from web4lora_trainer.base_model import resolve

    return resolve(BASE, "", load(Settings).cache, lambda _line: None).decoder.folder


def _trl(seconds: float, **options: Any) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    meter = Meter(seconds)

    class Count(TrainerCallback):
        def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "num_tokens" in logs:
                meter.step(state.global_step, int(logs["num_tokens"]))

    lines = [line for path in TRAIN_FILES for line in path.read_text(encoding="utf-8").splitlines()]
    rows = Dataset.from_list([{"messages": json.loads(line)["messages"]} for line in lines])
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=str(_base_folder()),
            args=SFTConfig(
                output_dir=folder, report_to="none", disable_tqdm=True, logging_steps=1, save_strategy="no",
                seed=17, use_cpu=True, **{"per_device_train_batch_size": TRL_BATCH_ROWS, **options},
            ),
            train_dataset=rows,
            peft_config=LoraConfig(
                r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
                task_type="CAUSAL_LM",
            ),
            callbacks=[Count()],
        )  # fmt: skip
        with contextlib.suppress(Enough):
            trainer.train()
    return meter.result


def _ours(seconds: float, last_layers: int) -> dict[str, Any]:
    from web4lora_chassis.dataset import read_dataset
    from web4lora_chassis.pipeline.train import LoraSettings, TrainSettings
    from web4lora_trainer.loss_report import read_losses
    from web4lora_trainer.progress import TrainProgress
    from web4lora_trainer.train import Base, train

    meter = Meter(seconds)
    settings = TrainSettings(lora=LoraSettings(last_layers=last_layers), held_out_evaluations=0)
    with tempfile.TemporaryDirectory() as folder:

        def report(progress: TrainProgress) -> None:
            if progress.step:
                rows = read_losses(Path(folder) / "loss.csv")
                if rows:  # the last one is of the step before this
                    meter.step(rows[-1].step, rows[-1].tokens)

        with contextlib.suppress(Enough):
            train(settings, read_dataset(TRAIN_FILES), Base(_base_folder(), BASE), Path(folder), report)
    return meter.result


@variant(PEER_DEFAULTS)
def trl_defaults(seconds: float) -> dict[str, Any]:
    """The peer as it comes."""
    return _trl(seconds)


@variant("TRL SFTTrainer, fp32, no checkpointing")
def trl_fp32(seconds: float) -> dict[str, Any]:
    """The peer with what a person would set whose CPU can't multiply bf16."""
    return _trl(seconds, bf16=False, gradient_checkpointing=False)


@variant(PEER_BEST)
def trl_best(seconds: float) -> dict[str, Any]:
    """The peer with what a person would set whose CPU can: rows of 512 tokens, packed, one at a time."""
    return _trl(
        seconds, gradient_checkpointing=False, packing=True, max_length=PACKED_TOKENS,
        per_device_train_batch_size=1,
    )  # fmt: skip


@variant("web4lora, every layer")
def ours_all(seconds: float) -> dict[str, Any]:
    """Ours with its defaults."""
    return _ours(seconds, 0)


@variant(f"web4lora, last {DEMO_LAST_LAYERS} of 30 layers (the demo)")
def ours_demo(seconds: float) -> dict[str, Any]:
    """Ours as the demo sets it."""
    return _ours(seconds, DEMO_LAST_LAYERS)


@variant("the linear layers' multiplications alone, every layer")
def multiplications(seconds: float) -> dict[str, Any]:
    """Forward and input gradient of every linear layer, and of the head where tokens are trained on."""
    import torch
    from web4lora_chassis.dataset import read_dataset
    from web4lora_trainer.base_model import load_tokenizer
    from web4lora_trainer.decoder import read_decoder
    from web4lora_trainer.device import choose_device
    from web4lora_trainer.encoding import encode_rows

    decoder = read_decoder(_base_folder())
    device = choose_device(decoder.layer_shapes, "auto", "cpu")
    encoded = encode_rows(read_dataset(TRAIN_FILES).train, load_tokenizer(decoder.folder), PACKED_TOKENS).rows
    share = sum(row.trained_tokens for row in encoded) / sum(map(len, encoded))
    layers = [(shape, PACKED_TOKENS) for shape in decoder.layer_shapes] * decoder.layers
    layers.append(((decoder.vocabulary, decoder.hidden_size), round(share * PACKED_TOKENS)))
    work = [
        tuple(
            torch.randn(size).to(device.torch_dtype) for size in (shape, (rows, shape[1]), (rows, shape[0]))
        )
        for shape, rows in layers
    ]
    meter = Meter(seconds)
    with contextlib.suppress(Enough), torch.no_grad():
        for step in itertools.count(1):
            for weight, value, gradient in work:
                value @ weight.t()
                gradient @ weight
            meter.step(step, step * PACKED_TOKENS)
    return meter.result


def main() -> int:
    """Measure every variant in its own process and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="time for each variant (default 60)")
    parser.add_argument(
        "--peer-bf16",
        action="store_true",
        help="measure TRL in bf16 too, as it comes: minutes a step on a CPU that can't multiply bf16",
    )
    parser.add_argument("--child", choices=list(VARIANTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print("RESULT " + json.dumps(VARIANTS[arguments.child](arguments.seconds)))
        return 0
    measured = {}
    for name in VARIANTS:
        if name in (PEER_DEFAULTS, PEER_BEST) and not arguments.peer_bf16:
            continue
        print(f"measuring: {name}", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--seconds", str(arguments.seconds), "--child", name]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if done.returncode != 0 or not lines:
            print(done.stderr[-2000:], file=sys.stderr)
            return 1
        measured[name] = json.loads(lines[-1].removeprefix("RESULT "))
    print("| variant | tokens/s | steps | seconds | peak memory |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, found in measured.items():
        print(
            f"| {name} | {found['tokens'] / found['seconds']:.0f} | {found['steps']} "
            f"| {found['seconds']:.0f} | {found['peak_memory_bytes'] / 1e9:.1f} GB |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
