"""TRL's SFT trainer with what a laptop needs: batches of like length, scores only where there are labels."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset as TokenDataset
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer
from web4lora_chassis.errors import FailedPrecondition, Internal
from web4lora_chassis.model_files.trained_conversations import IGNORED

from web4lora_trainer.answer_loss import AnswerLoss, ScaleGradient
from web4lora_trainer.batching import Collator, LikeLengthBatches
from web4lora_trainer.checkpoints import seal
from web4lora_trainer.device import trim_heap
from web4lora_trainer.encoding import Encoded
from web4lora_trainer.ladder import Rung
from web4lora_trainer.plan import TrainPlan

PROBE_STEPS = 8
"""Steps at the start in which any non-finite loss means that the number format is wrong."""
_MAX_NON_FINITE_IN_A_ROW = 5
_TRIM_STEPS = 8
"""Steps between two times that a CPU's heap is given back: the step after that asks for its pages anew."""
_FP16_TOKEN_SCALE = 1024.0
"""A token's gradient is multiplied by this on its way back, so that it does not vanish in fp16."""
_SCALE_FILE = "loss_scale.json"
_HEAD_TOLERANCE = 0.02


class NonFiniteLoss(Internal):
    """The loss or its gradient was infinite or not a number, too often to go on."""

    default_reason = "NON_FINITE_LOSS"

    def __init__(self, step: int) -> None:
        super().__init__(
            f"The loss or its gradient is not finite at step {step}.",
            fix="Lower learning_rate, or look for broken rows; with dtype fp16 or bf16, try fp32.",
            metadata={"step": step},
        )
        self.step = step


class _Batches(DataLoader[Any]):
    """A data loader that tells its batches the epoch, as transformers' Trainer expects."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class AnswerTrainer(SFTTrainer):
    """Trains a LoRA adapter on the labelled tokens of rows that are tokens already.

    Args:
        model: The base model, in the number format to compute in.
        args: TRL's settings.
        lora: The adapter.
        tokenizer: The base model's.
        rows: Rows to train on.
        held_out: Rows for the held-out loss; may be empty.
        plan: What each step is.
        rung: How it is computed: a planned batch may be split, which changes nothing but the memory it takes.
        callbacks: Told of every step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: SFTConfig,
        lora: LoraConfig,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Encoded],
        held_out: Sequence[Encoded],
        plan: TrainPlan,
        rung: Rung,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        self._plan = plan
        self._rung = rung
        self._non_finite = 0
        self._step_loss = torch.zeros(())
        self._step_batches: list[Any] = []
        self._step_tokens: Any = None
        self.token_scale = _FP16_TOKEN_SCALE
        self._backward_scale = 1.0
        self.tokens_seen = 0
        self.answer_tokens_seen = 0
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(tokenizer.pad_token_id, plan.pad_to_multiple_of),
            train_dataset=_token_dataset(rows),
            eval_dataset=_token_dataset(held_out) if held_out else None,
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=list(callbacks),
        )
        for layer in self.peft_model.modules():
            if isinstance(layer, LoraLayer):  # PEFT would make its input fp32, and autocast 16-bit again
                layer.cast_input_dtype_enabled = plan.device.dtype == "fp32"
        if plan.device.dtype == "fp16":
            for parameter in self.peft_model.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(lambda gradient: gradient / self._backward_scale)  # type: ignore[no-untyped-call]

    @property
    def peft_model(self) -> PeftModel:
        """The base model with the adapter in it."""
        assert isinstance(self.model, PeftModel)
        return self.model

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the training batches."""
        return self._loader(self.train_dataset, self._plan.batch_tokens, shuffle=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return the held-out batches, always the same."""
        tokens = min(self._plan.batch_tokens, self._rung.tokens)
        return self._loader(eval_dataset or self.eval_dataset, tokens, shuffle=False)

    def _loader(self, rows: Any, tokens: int, *, shuffle: bool) -> DataLoader[Any]:
        batches = LikeLengthBatches(
            [len(ids) for ids in rows["input_ids"]],
            tokens,
            self._plan.seed,
            pad_to_multiple_of=self._plan.pad_to_multiple_of,
            shuffle=shuffle,
        )
        return _Batches(rows, batch_sampler=batches, collate_fn=self.data_collator, num_workers=0)

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run a planned batch forward and backward, as many of its rows at once as the rung allows."""
        # The mean is over the whole step: without its count, a batch's parts would weigh too much.
        assert num_items_in_batch is not None
        self.tokens_seen += int(inputs["attention_mask"].sum())
        self.answer_tokens_seen += int((inputs["labels"][:, 1:] != IGNORED).sum())
        loss = self._forward_and_backward(model, inputs, num_items_in_batch)
        self._step_loss = self._step_loss + loss
        # Transformers keeps a running sum and takes what it logged from it: one NaN, and it never ends.
        return torch.where(loss.isfinite(), loss, torch.zeros_like(loss))

    def _forward_and_backward(
        self, model: Any, inputs: Mapping[str, torch.Tensor], step_tokens: torch.Tensor | int
    ) -> torch.Tensor:
        """Return a batch's part of the step's loss; its gradients are added to those of the step."""
        rows, width = inputs["input_ids"].shape
        at_once = max(1, self._rung.tokens // width)
        parts = []
        for start in range(0, rows, at_once):
            part = {name: value[start : start + at_once] for name, value in inputs.items()}
            parts.append(super().training_step(model, part, step_tokens))  # type: ignore[no-untyped-call]
        return torch.stack(parts).sum() if len(parts) > 1 else parts[0]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a step's own loss where it isn't finite; see `training_step`."""
        if "loss" in logs:
            loss = float(self._step_loss)
            logs["loss"] = logs["loss"] if math.isfinite(loss) else loss
            self._step_loss = torch.zeros(())
        super().log(logs, start_time)

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return the mean loss of the labelled tokens; there are no outputs to return."""
        assert not return_outputs, "only the loss is computed"
        loss, count = self._summed_loss(inputs)
        tokens = count if num_items_in_batch is None else num_items_in_batch
        if model.training and self._plan.device.dtype == "fp16":
            # The mean divides gradients by the step's tokens; the scale makes up for that.
            self._backward_scale = self.token_scale * float(tokens)
            loss = ScaleGradient.apply(loss, self._backward_scale)
        return loss / tokens

    def _summed_loss(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Return the summed loss and the number of labelled tokens of a batch."""
        base: Any = self.peft_model.get_base_model()
        labels = inputs["labels"][:, 1:]
        counted = labels != IGNORED
        with self.autocast():
            # Without a mask: padding comes behind a row's tokens, and no token sees what comes behind it.
            states = base.get_decoder()(input_ids=inputs["input_ids"], use_cache=False).last_hidden_state
            head = base.get_output_embeddings()
            loss = AnswerLoss.apply(states[:, :-1][counted], head.weight, head.bias, labels[counted])
        return loss, int(counted.sum())

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Compute in the base's 16-bit format, with the adapter's weights kept in fp32."""
        device = self._plan.device
        if device.dtype == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(device.kind, dtype=device.torch_dtype)

    def check_head(self) -> None:
        """Make sure that our short way to the scores is the model's own.

        Raises:
            FailedPrecondition: The model does more to its scores than multiply by the head.
        """
        base: Any = self.peft_model.get_base_model()
        ids = torch.arange(5, 13, device=self.args.device).unsqueeze(0) % base.config.vocab_size
        mask = torch.ones_like(ids)
        self.peft_model.eval()
        with torch.no_grad(), self.autocast():
            expected = base(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
            states = base.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            head = base.get_output_embeddings()
            scores = F.linear(states.to(head.weight.dtype), head.weight, head.bias).float()
        self.peft_model.train()
        if (scores - expected).abs().max() > _HEAD_TOLERANCE * expected.abs().max():
            raise FailedPrecondition(
                f"{type(base).__name__} changes its scores after the head; training it would optimize "
                "another loss.",
                fix="Choose a base model of another architecture, for example Llama or Qwen2.",
                reason="ARCHITECTURE_UNSUPPORTED",
            )

    def held_out_seconds(self) -> float:
        """Return how long measuring the held-out loss takes, by the batch with the longest rows."""
        rows: Any = self.eval_dataset
        tokens = [len(ids) for ids in rows["input_ids"]]
        with torch.random.fork_rng(devices=[]):
            batch = self._prepare_inputs(list(self.get_eval_dataloader())[-1])
        self.peft_model.eval()
        began = time.perf_counter()
        with torch.no_grad():
            self._summed_loss(batch)
        spent = time.perf_counter() - began
        self.peft_model.train()
        return spent * sum(tokens) / int(batch["attention_mask"].sum())

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,  # noqa: ARG002 - transformers passes it
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure the held-out loss, each labelled token weighing the same."""
        self._plan.device.release_memory()
        self.peft_model.eval()
        total, tokens = 0.0, 0
        # A loader draws a number when its batches begin, and dropout would go on from another one.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for batch in self.get_eval_dataloader(eval_dataset):
                loss, count = self._summed_loss(self._prepare_inputs(batch))
                total, tokens = total + loss.item(), tokens + count
        self.peft_model.train()
        metrics = {f"{metric_key_prefix}_loss": total / max(tokens, 1)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Measure; an update that comes from what is not finite is left out instead of ruining the adapter.

        Called for every update, whether its gradient was clipped or not.
        """
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        while self._overflowed(norm):
            norm = self._step_with_less_scale(model)
        finite = math.isfinite(float(norm)) and math.isfinite(float(self._step_loss))
        if not finite:
            for parameter in model.parameters():
                parameter.grad = None
        self._note(finite)
        return norm

    def _overflowed(self, norm: Any) -> bool:
        """Tell whether a smaller scale may help: in fp16 the loss is finite and its gradient is not."""
        return (
            self._plan.device.dtype == "fp16"
            and self.token_scale > 1.0
            and math.isfinite(float(self._step_loss))
            and not math.isfinite(float(norm))
        )

    def _step_with_less_scale(self, model: Any) -> Any:
        """Make the step's gradients again from the same rows, scaled by half, and return their norm."""
        self.token_scale /= 2
        model.zero_grad()
        batches, step_tokens = self._step_batches, self._step_tokens
        for inputs in batches:
            self._forward_and_backward(model, inputs, step_tokens)
        clipped = None
        if self.args.max_grad_norm > 0:
            clipped = self._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        return super()._get_grad_norm(model, clipped)  # type: ignore[no-untyped-call]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Keep the step's batches: fp16 may need them a second time. Between steps the heap is given back."""
        if self._plan.device.kind == "cpu" and self.state.global_step % _TRIM_STEPS == 0:
            trim_heap()
        self._step_batches, self._step_tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        return self._step_batches, self._step_tokens

    def _note(self, finite: bool) -> None:
        """Give up on steps that stay non-finite, at once while the number format is on probation."""
        self._non_finite = 0 if finite else self._non_finite + 1
        allowed = 0 if self.state.global_step < PROBE_STEPS else _MAX_NON_FINITE_IN_A_ROW
        if self._non_finite > allowed:
            raise NonFiniteLoss(self.state.global_step + 1)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save as transformers does, then seal it; TRL's model card for each checkpoint is left out."""
        Trainer._save_checkpoint(self, model, trial)
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self._plan.device.dtype == "fp16":
            (folder / _SCALE_FILE).write_text(json.dumps(self.token_scale), encoding="utf-8")
        seal(folder)

    def load_adapter(self, checkpoint: Path) -> None:
        """Put a checkpoint's adapter into the model."""
        tensors = load_file(checkpoint / SAFETENSORS_WEIGHTS_NAME)
        found: Any = set_peft_model_state_dict(self.peft_model, tensors)
        assert not found.unexpected_keys, found.unexpected_keys

    def take_over(self, checkpoint: Path) -> None:
        """Be as the training was at a checkpoint; it makes no further step."""
        self.load_adapter(checkpoint)
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load what a resumed training goes on with, fp16's scale too."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._plan.device.dtype == "fp16":
            self.token_scale = float(json.loads((Path(checkpoint) / _SCALE_FILE).read_text(encoding="utf-8")))


def given_batches(trainer: AnswerTrainer, batches: Any) -> None:
    """Have a trainer train on batches of a sampler's own, in place of the plan's."""
    rows: Any = trainer.train_dataset
    loader = _Batches(rows, batch_sampler=batches, collate_fn=trainer.data_collator, num_workers=0)
    trainer.get_train_dataloader = lambda: loader  # type: ignore[method-assign]


def _token_dataset(rows: Sequence[Encoded]) -> TokenDataset:
    def records() -> Iterator[dict[str, list[int]]]:
        for row in rows:
            yield {"input_ids": list(row.input_ids), "labels": list(row.labels)}

    return TokenDataset.from_list(list(records()))
