"""TRL's SFT trainer with what a laptop needs: batches of like length, scores only where there are labels."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset as TokenDataset
from peft import LoraConfig, PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer
from web4lora_chassis.errors import FailedPrecondition, Internal

from web4lora_trainer.batching import IGNORED, Collator, Encoded, LikeLengthBatches
from web4lora_trainer.device import Device

PROBE_STEPS = 8
"""Steps at the start in which any non-finite loss means that the number format is wrong."""
_MAX_NON_FINITE_IN_A_ROW = 5
_POSITIONS_PER_CHUNK = 512
_FP16_LOSS_SCALE = 1024.0
_HEAD_TOLERANCE = 0.02


class NonFiniteLoss(Internal):
    """The loss or its gradient was infinite or not a number, too often to go on."""

    default_reason = "NON_FINITE_LOSS"

    def __init__(self, step: int) -> None:
        super().__init__(
            f"The loss or its gradient is not finite at step {step}.",
            fix="Lower learning_rate, or set dtype to fp32.",
            metadata={"step": step},
        )
        self.step = step


class _AnswerLoss(torch.autograd.Function):
    """Cross entropy, summed, through a frozen head: a chunk of positions at a time.

    The gradient is made in the forward pass, so scores never exist for more than one chunk, and a vocabulary
    of 150,000 costs megabytes instead of gigabytes.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of hidden (positions, width); weight is (vocabulary, width)."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        for start in range(0, hidden.shape[0], _POSITIONS_PER_CHUNK):
            part = slice(start, start + _POSITIONS_PER_CHUNK)
            scores = F.linear(hidden[part].to(weight.dtype), weight, bias).float()
            index = targets[part].unsqueeze(1)
            norm = scores.logsumexp(dim=1, keepdim=True)
            total += (norm - scores.gather(1, index)).sum()
            if gradient is not None:
                probabilities = scores.sub_(norm).exp_()
                probabilities.scatter_add_(1, index, torch.full_like(norm, -1.0))
                gradient[part] = (probabilities.to(weight.dtype) @ weight).to(hidden.dtype)
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Scale the gradient that the forward pass made."""
        gradient: torch.Tensor = ctx.gradient
        return gradient.mul_(outer[0].to(gradient.dtype)), None, None, None


class _ScaleGradient(torch.autograd.Function):
    """The identity; its backward pass multiplies, so that small fp16 gradients do not vanish."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None]:
        return outer[0] * ctx.scale, None


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
        device: Where and in which number format.
        tokens_per_batch: Budget of a batch, padding included.
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
        device: Device,
        tokens_per_batch: int,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        self._plan = device
        self._tokens_per_batch = tokens_per_batch
        self._non_finite = 0
        self.tokens_seen = 0
        self.answer_tokens_seen = 0
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(tokenizer.pad_token_id, device.pad_to_multiple_of),
            train_dataset=_token_dataset(rows),
            eval_dataset=_token_dataset(held_out) if held_out else None,
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=list(callbacks),
        )
        if device.dtype == "fp16":
            for parameter in self.peft_model.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(lambda gradient: gradient / _FP16_LOSS_SCALE)  # type: ignore[no-untyped-call]

    @property
    def peft_model(self) -> PeftModel:
        """The base model with the adapter in it."""
        assert isinstance(self.model, PeftModel)
        return self.model

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the training batches."""
        return self._loader(self.train_dataset, shuffle=True)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return the held-out batches, always the same."""
        return self._loader(eval_dataset or self.eval_dataset, shuffle=False)

    def _loader(self, rows: Any, *, shuffle: bool) -> DataLoader[Any]:
        batches = LikeLengthBatches(
            [len(ids) for ids in rows["input_ids"]],
            self._tokens_per_batch,
            self.args.seed,
            pad_to_multiple_of=self._plan.pad_to_multiple_of,
            shuffle=shuffle,
        )
        return _Batches(rows, batch_sampler=batches, collate_fn=self.data_collator, num_workers=0)

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return the mean loss of the labelled tokens; there are no outputs to return.

        Raises:
            NonFiniteLoss: The loss was not finite too often.
        """
        assert not return_outputs, "only the loss is computed"
        training = bool(model.training)
        loss, count = self._summed_loss(inputs)
        if training:
            self.tokens_seen += int(inputs["attention_mask"].sum())
            self.answer_tokens_seen += count
            self._note(math.isfinite(loss.item()))
            if self._plan.dtype == "fp16":
                loss = _ScaleGradient.apply(loss, _FP16_LOSS_SCALE)  # type: ignore[no-untyped-call]
        return loss / (count if num_items_in_batch is None else num_items_in_batch)

    def _summed_loss(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Return the summed loss and the number of labelled tokens of a batch."""
        base: Any = self.peft_model.get_base_model()
        labels = inputs["labels"][:, 1:]
        counted = labels != IGNORED
        with self._autocast():
            states = base.get_decoder()(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            ).last_hidden_state
            head = base.get_output_embeddings()
            loss = _AnswerLoss.apply(states[:, :-1][counted], head.weight, head.bias, labels[counted])  # type: ignore[no-untyped-call]
        return loss, int(counted.sum())

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Compute in the base's 16-bit format, with the adapter's weights kept in fp32."""
        if self._plan.dtype == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self._plan.kind, dtype=self._plan.torch_dtype)

    def check_head(self) -> None:
        """Make sure that our short way to the scores is the model's own.

        Raises:
            FailedPrecondition: The model does more to its scores than multiply by the head.
        """
        base: Any = self.peft_model.get_base_model()
        ids = torch.arange(5, 13, device=self.args.device).unsqueeze(0) % base.config.vocab_size
        mask = torch.ones_like(ids)
        self.peft_model.eval()
        with torch.no_grad(), self._autocast():
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

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,  # noqa: ARG002 - transformers passes it
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure the held-out loss, each labelled token weighing the same."""
        self.peft_model.eval()
        total, tokens = 0.0, 0
        with torch.no_grad():
            for batch in self.get_eval_dataloader(eval_dataset):
                loss, count = self._summed_loss(self._prepare_inputs(batch))
                total, tokens = total + loss.item(), tokens + count
        self.peft_model.train()
        metrics = {f"{metric_key_prefix}_loss": total / max(tokens, 1)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip; an update whose gradient is not finite is left out instead of ruining the adapter."""
        norm = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        finite = math.isfinite(float(norm))
        if not finite:
            for parameter in model.parameters():
                parameter.grad = None
            self._note(finite)
        return norm

    def _note(self, finite: bool) -> None:
        """Give up on losses that stay non-finite, at once while the number format is on probation."""
        self._non_finite = 0 if finite else self._non_finite + 1
        allowed = 0 if self.state.global_step < PROBE_STEPS else _MAX_NON_FINITE_IN_A_ROW
        if self._non_finite > allowed:
            raise NonFiniteLoss(self.state.global_step + 1)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save as transformers does; TRL's model card for each checkpoint is left out."""
        Trainer._save_checkpoint(self, model, trial)


def _token_dataset(rows: Sequence[Encoded]) -> TokenDataset:
    def records() -> Iterator[dict[str, list[int]]]:
        for row in rows:
            yield {"input_ids": list(row.input_ids), "labels": list(row.labels)}

    return TokenDataset.from_list(list(records()))
