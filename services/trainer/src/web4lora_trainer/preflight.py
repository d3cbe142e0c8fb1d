"""What a training will need, memory, disk and time, and a refusal when memory is too small."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from web4lora_chassis.errors import ResourceExhausted
from web4lora_chassis.pipeline.train import TrainSettings

from web4lora_trainer.batching import LikeLengthBatches
from web4lora_trainer.decoder import Decoder
from web4lora_trainer.device import Device
from web4lora_trainer.encoding import EncodedRows
from web4lora_trainer.probes import MOST_SHARE

if TYPE_CHECKING:
    import psutil

    from web4lora_trainer.rehearsal import Rehearsal

_RUNTIME_BYTES = 1_150_000_000
"""Python with torch, transformers, peft and trl loaded, and a measured margin for the allocator."""
_ADAPTER_BYTES_PER_PARAMETER = 16
"""fp32 weight, gradient and Adam's two moments."""
_HOST_BYTES_PER_TOKEN = 113
"""A row's token as Python holds it: id, label, and both again in the trainer's data set."""
_HEAD_POSITIONS = 512
_RESIDUAL_TENSORS = 14
_MLP_TENSORS = 6
_TRAINING_EFFICIENCY = 0.62
"""Share of the measured matmul rate that a training step reaches; measured on SmolLM2, 2 cores, fp32."""
_HEADROOM = 0.92
_CHECKPOINTS_KEPT = 3
"""The best, and two to go on from."""
_CACHE_SHARE = 0.5
"""Of the memory of a step's activations, which are not there while answers are written."""


@dataclass(frozen=True)
class Estimate:
    """What a training will need.

    Attributes:
        peak_memory_bytes: Of the training process.
        free_memory_bytes: On the device now.
        steps: Optimizer steps.
        seconds: Time to train; 0 while the device's speed is unknown.
        disk_bytes: What the run will write.
        checkpointing: Activations will be computed twice instead of kept.
        rehearsed: Memory and time were measured on steps of the training itself.
    """

    peak_memory_bytes: int
    free_memory_bytes: int
    steps: int
    seconds: float
    disk_bytes: int
    checkpointing: bool
    rehearsed: bool = False


def measured(
    needed: Estimate,
    rehearsal: Rehearsal,
    decoder: Decoder,
    train: EncodedRows,
    held_out: EncodedRows,
    settings: TrainSettings,
    device: Device,
) -> Estimate:
    """Return an estimate with what a rehearsal measured in place of what was computed.

    Args:
        needed: The estimate.
        rehearsal: What was measured.
        decoder: The base model.
        train: Rows to train on; the rehearsal had few of them in memory.
        held_out: Rows for the held-out loss.
        settings: How to train.
        device: Where.
    """
    own = training_flops(
        decoder, rehearsal.tokens, rehearsal.trained_tokens, settings, checkpointing=needed.checkpointing
    )
    rate = own / max(rehearsal.seconds, 1e-9)
    an_epoch = training_flops(
        decoder, train.tokens, train.trained_tokens, settings, checkpointing=needed.checkpointing
    )
    seconds = an_epoch * epochs(train, settings, device) / rate
    if rehearsal.held_out_tokens:
        a_token = rehearsal.held_out_seconds / rehearsal.held_out_tokens
        seconds += settings.held_out_evaluations * held_out.tokens * a_token
    return replace(
        needed,
        peak_memory_bytes=rehearsal.peak_memory_bytes + _HOST_BYTES_PER_TOKEN * train.tokens,
        seconds=seconds * (1 + MOST_SHARE if settings.probes and held_out.rows else 1),
        rehearsed=True,
    )


def estimate(
    decoder: Decoder,
    train: EncodedRows,
    held_out: EncodedRows,
    settings: TrainSettings,
    device: Device,
    others: Sequence[psutil.Process] = (),
) -> Estimate:
    """Estimate memory, steps, time and disk of a training.

    Args:
        decoder: The base model.
        train: Rows to train on.
        held_out: Rows for the held-out loss.
        settings: How to train.
        device: Where.
        others: Processes that will have ended when the training starts: their memory counts as free.

    Raises:
        InvalidInput: A target module is not in the base model.
    """
    free = device.free_memory_bytes(others)
    kept = peak_memory_bytes(decoder, train, settings, device, checkpointing=False)
    choice = settings.gradient_checkpointing
    checkpointing = choice == "on" or (
        choice == "auto"
        and (kept > free * _HEADROOM or (device.kind == "mps" and decoder.size_bytes > 4 << 30))
    )
    peak = peak_memory_bytes(decoder, train, settings, device, checkpointing=True) if checkpointing else kept
    adapter_bytes = adapter_parameters(decoder, settings) * 4
    files = 2 if settings.write_bin else 1
    return Estimate(
        peak_memory_bytes=peak,
        free_memory_bytes=free,
        steps=optimizer_steps(train, settings, device),
        seconds=_seconds(decoder, train, held_out, settings, device, checkpointing=checkpointing),
        disk_bytes=adapter_bytes * (files + _CHECKPOINTS_KEPT * 3) + (16 << 20),
        checkpointing=checkpointing,
    )


def require_memory(needed: Estimate, settings: TrainSettings, device: Device, why: str = "") -> None:
    """Refuse a training that would not fit.

    Args:
        needed: What it needs.
        settings: How to train.
        device: Where.
        why: What led there; told first.

    Raises:
        ResourceExhausted: Names what is needed, what is free, and settings that need less.
    """
    if needed.peak_memory_bytes <= needed.free_memory_bytes:
        return
    budget = settings.batch_tokens(device.kind)
    hints = []
    if not needed.checkpointing:
        hints.append("gradient_checkpointing: on")
    if budget > 256:
        hints.append(f"tokens_per_batch: {budget // 2} (with gradient_accumulation doubled)")
    if settings.lora.last_layers == 0:
        hints.append("lora.last_layers")
    raise ResourceExhausted(
        f"{why}{'. ' if why else ''}Training needs about {_gigabytes(needed.peak_memory_bytes)} GB, "
        f"{device.name} has {_gigabytes(needed.free_memory_bytes)} GB free.",
        fix="Close other programs, choose a smaller base model, or set "
        f"{', '.join(hints) or 'max_length_tokens lower'}.",
        reason="MEMORY_TOO_SMALL",
        metadata={
            "needed_bytes": needed.peak_memory_bytes,
            "free_bytes": needed.free_memory_bytes,
        },
    )


def optimizer_steps(train: EncodedRows, settings: TrainSettings, device: Device) -> int:
    """Return the number of optimizer steps of the whole training."""
    return settings.max_steps or math.ceil(settings.epochs * _steps_an_epoch(train, settings, device))


def epochs(train: EncodedRows, settings: TrainSettings, device: Device) -> float:
    """Return how often the training passes over the data."""
    return optimizer_steps(train, settings, device) / _steps_an_epoch(train, settings, device)


def _steps_an_epoch(train: EncodedRows, settings: TrainSettings, device: Device) -> int:
    batches = LikeLengthBatches(
        [len(row) for row in train.rows],
        settings.batch_tokens(device.kind),
        settings.seed,
        pad_to_multiple_of=device.pad_to_multiple_of,
    )
    return max(1, math.ceil(len(batches) / settings.gradient_accumulation))


def adapter_parameters(decoder: Decoder, settings: TrainSettings) -> int:
    """Return the number of weights that will be trained.

    Those are rank * (inputs + outputs) of every adapted layer, and with DoRA a length for each output.
    """
    lora = settings.lora
    return sum(
        lora.rank_of(name) * (rows + columns) + lora.use_dora * rows
        for name, (rows, columns) in decoder.adapted(lora).items()
    )


def trained_layers(decoder: Decoder, settings: TrainSettings) -> int:
    """Return through how many decoder layers the backward pass goes."""
    last = settings.lora.last_layers
    return min(last, decoder.layers) if last else decoder.layers


def peak_memory_bytes(
    decoder: Decoder,
    train: EncodedRows,
    settings: TrainSettings,
    device: Device,
    *,
    checkpointing: bool,
) -> int:
    """Return the peak memory of training: runtime + base + adapter + activations + head.

    base: every weight in the number format to compute in. adapter: 16 bytes a weight. activations, for each
    token of the fullest batch and each layer that the backward pass crosses: about 14 tensors as wide as the
    model, 6 as wide as its MLP (both kept by autograd), and for each pair of tokens of a row and each head
    the attention's scores, twice; with checkpointing one tensor a layer and all of it for one layer. head:
    scores of 512 positions, three times in fp32.
    """
    config = decoder.text_config
    longest = train.longest_row_tokens
    tokens = max(settings.batch_tokens(device.kind), longest)
    hidden = decoder.hidden_size
    mlp = int(config.get("intermediate_size", 4 * hidden))
    heads = int(config.get("num_attention_heads", 1))
    scores = 2 * heads * longest if device.attention(longest) == "eager" or device.kind == "mps" else 0
    number = device.dtype_bytes
    a_layer = tokens * (_RESIDUAL_TENSORS * hidden + _MLP_TENSORS * mlp + scores) * number
    layers = trained_layers(decoder, settings)
    activations = layers * tokens * hidden * number + a_layer if checkpointing else layers * a_layer
    head = 3 * 4 * _HEAD_POSITIONS * decoder.vocabulary
    adapter = adapter_parameters(decoder, settings) * _ADAPTER_BYTES_PER_PARAMETER
    runtime = _RUNTIME_BYTES if device.kind != "cuda" else 600_000_000
    return runtime + decoder.parameters * number + adapter + activations + head


def probed_tokens(decoder: Decoder, settings: TrainSettings, tokens: int, *, checkpointing: bool) -> int:
    """Return how many tokens may be written and read at once without more memory than a training step takes.

    A token that is written keeps keys and values of every layer, one that is trained on its activations; see
    `peak_memory_bytes`.

    Args:
        decoder: The base model.
        settings: How to train.
        tokens: Those of a training step at once.
        checkpointing: Whether its activations are computed twice.
    """
    config = decoder.text_config
    hidden, heads = decoder.hidden_size, int(config.get("num_attention_heads", 1))
    head_size = int(config.get("head_dim") or hidden // heads)
    cached = decoder.layers * 2 * int(config.get("num_key_value_heads") or heads) * head_size
    a_layer = _RESIDUAL_TENSORS * hidden + _MLP_TENSORS * int(config.get("intermediate_size", 4 * hidden))
    layers = trained_layers(decoder, settings)
    kept = layers * hidden + a_layer if checkpointing else layers * a_layer
    return int(tokens * kept * _CACHE_SHARE / cached)


def training_flops(
    decoder: Decoder, tokens: int, trained_tokens: int, settings: TrainSettings, *, checkpointing: bool
) -> float:
    """Return operations of the matmuls for some tokens: forward, and input gradients where they flow."""
    weights = decoder.layer_parameters
    forward = 2.0 * weights * decoder.layers
    crossed = 2.0 * weights * trained_layers(decoder, settings)
    a_token = forward + crossed * (2 if checkpointing else 1)
    head = 4.0 * decoder.vocabulary * decoder.hidden_size
    return a_token * tokens + head * trained_tokens


def _seconds(
    decoder: Decoder,
    train: EncodedRows,
    held_out: EncodedRows,
    settings: TrainSettings,
    device: Device,
    *,
    checkpointing: bool,
) -> float:
    """Return the time to train, from the measured matmul rate and the share of it that training reaches."""
    if not device.flops_per_second:
        return 0.0
    flops = _all_flops(decoder, train, held_out, settings, device, checkpointing=checkpointing)
    return flops / (device.flops_per_second * _TRAINING_EFFICIENCY)


def _all_flops(
    decoder: Decoder,
    train: EncodedRows,
    held_out: EncodedRows,
    settings: TrainSettings,
    device: Device,
    *,
    checkpointing: bool,
) -> float:
    """Return operations of the matmuls of a whole training, its held-out measurements included."""
    an_epoch = training_flops(
        decoder, train.tokens, train.trained_tokens, settings, checkpointing=checkpointing
    )
    forward = 2.0 * decoder.layer_parameters * decoder.layers
    held_out_flops = settings.held_out_evaluations * forward * held_out.tokens
    return an_epoch * epochs(train, settings, device) + held_out_flops


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f}"
