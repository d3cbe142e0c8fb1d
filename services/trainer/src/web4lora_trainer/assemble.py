"""Puts a training together: the base in its number format, the adapter, TRL's settings, the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.pipeline.train import TrainSettings

from web4lora_trainer.base_model import load_tokenizer
from web4lora_trainer.decoder import Decoder
from web4lora_trainer.encoding import Encoded
from web4lora_trainer.ladder import Rung
from web4lora_trainer.plan import TrainPlan

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch.optim import Optimizer
    from transformers import TrainerCallback
    from trl.trainer.sft_config import SFTConfig

    from web4lora_trainer.sft import AnswerTrainer


def assemble(
    plan: TrainPlan,
    rung: Rung,
    settings: TrainSettings,
    decoder: Decoder,
    rows: Sequence[Encoded],
    held_out: Sequence[Encoded],
    checkpoints: Path,
    callbacks: Sequence[TrainerCallback] = (),
    start: Path | None = None,
) -> AnswerTrainer:
    """Load the base and return the trainer.

    Args:
        plan: What each step is.
        rung: How it is computed.
        settings: The adapter's shape, and what no plan needs to hold.
        decoder: The base model.
        rows: Rows to train on.
        held_out: Rows for the held-out loss; may be empty.
        checkpoints: Where checkpoints go.
        callbacks: Told of every step.
        start: Folder of an adapter of this shape, whose weights the new one begins with.

    Raises:
        FailedPrecondition: The base does more to its scores than multiply by the head.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from web4lora_trainer.sft import AnswerTrainer

    disable_progress_bar()  # type: ignore[no-untyped-call]
    model = AutoModelForCausalLM.from_pretrained(
        decoder.folder,
        dtype=plan.device.torch_dtype,
        attn_implementation=plan.attention,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    model.config.use_cache = False
    if rung.checkpointing:
        # Not by the trainer's settings: TRL would then send gradients below the adapter's first layer.
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    trainer = AnswerTrainer(
        model,
        _arguments(plan, settings, checkpoints, measured=bool(held_out)),
        _adapter(settings, decoder),
        load_tokenizer(decoder.folder),
        rows,
        held_out,
        plan,
        rung,
        callbacks,
    )
    if settings.loraplus_lr_ratio != 1:
        trainer.optimizer = _lora_plus(trainer, settings)
    if start is not None:
        _load_weights(trainer.peft_model, start)
    trainer.check_head()
    return trainer


def _lora_plus(trainer: AnswerTrainer, settings: TrainSettings) -> Optimizer:
    """Return the optimizer with two rates, as PEFT makes it; the schedule scales both."""
    from peft.optimizers import create_loraplus_optimizer

    kind, arguments = trainer.get_optimizer_cls_and_kwargs(trainer.args)
    return create_loraplus_optimizer(
        trainer.peft_model, kind, loraplus_lr_ratio=settings.loraplus_lr_ratio, **arguments
    )


def _load_weights(model: PeftModel, start: Path) -> None:
    """Give an adapter the weights of an earlier one.

    Raises:
        InvalidInput: It lacks weights, or has others.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    weights = load_file(start / "adapter_model.safetensors")
    ours = get_peft_model_state_dict(model, save_embedding_layers=False)
    differ = [
        name for name, tensor in ours.items() if name not in weights or weights[name].shape != tensor.shape
    ]
    if found := sorted({*differ, *(weights.keys() - ours.keys())}):
        raise InvalidInput(
            f"train.from: {len(found)} tensors of that adapter are others than those of train.lora, for "
            f"example {found[0]}.",
            fix="Set train.lora to what that adapter was trained with.",
            metadata={"field": "train.from"},
        )
    set_peft_model_state_dict(model, weights)


def _adapter(settings: TrainSettings, decoder: Decoder) -> LoraConfig:
    from peft import LoraConfig

    lora, layers = settings.lora, decoder.layers
    last = lora.last_layers
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.scale_numerator,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=list(decoder.target_modules(lora)),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        layers_to_transform=list(range(layers - last, layers)) if 0 < last < layers else None,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _arguments(plan: TrainPlan, settings: TrainSettings, checkpoints: Path, *, measured: bool) -> SFTConfig:
    from trl.trainer.sft_config import SFTConfig

    arguments = SFTConfig(
        output_dir=str(checkpoints),
        max_steps=plan.steps,
        learning_rate=plan.learning_rate,
        lr_scheduler_type=plan.schedule,
        warmup_steps=plan.warmup_steps,
        gradient_accumulation_steps=plan.accumulation,
        max_grad_norm=settings.max_grad_norm,
        weight_decay=0.0,
        optim=settings.optim,
        neftune_noise_alpha=settings.neftune_noise_alpha or None,
        per_device_train_batch_size=1,
        seed=plan.seed,
        use_cpu=plan.device.kind == "cpu",
        bf16=False,
        fp16=False,
        gradient_checkpointing=None,  # type: ignore[arg-type]  # TRL would turn it on
        activation_checkpointing=False,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=plan.checkpoint_steps,
        save_total_limit=3 if measured else 2,  # the best, and two to go on from
        eval_strategy="no",
        report_to=list(settings.report_to) or "none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        torch_empty_cache_steps=50 if plan.device.kind == "mps" else None,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = (
            1  # else transformers spreads the model over every GPU it sees, and TRL refuses that
        )
    return arguments
