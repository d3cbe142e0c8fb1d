"""Real trainings of a tiny model."""

from __future__ import annotations

import functools
import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from web4lora_chassis.dataset import Dataset, Message, Row
from web4lora_chassis.errors import DataLoss, FailedPrecondition, InvalidInput, ResourceExhausted
from web4lora_chassis.model_files import chat_template
from web4lora_chassis.model_files.trained_conversations import read_trained_conversations
from web4lora_chassis.pipeline.train import LoraSettings, LossBand, TrainSettings
from web4lora_deployer.prompts.training_record import trained_system
from web4lora_trainer.assemble import assemble
from web4lora_trainer.base_model import load_tokenizer
from web4lora_trainer.batching import Collator
from web4lora_trainer.decoder import read_decoder
from web4lora_trainer.device import Device
from web4lora_trainer.encoding import encode_rows
from web4lora_trainer.ladder import rungs
from web4lora_trainer.loss_report import read_losses
from web4lora_trainer.plan import make_plan
from web4lora_trainer.prepare import Converter, check_settings, prepare
from web4lora_trainer.progress import TrainProgress
from web4lora_trainer.sft import AnswerTrainer
from web4lora_trainer.train import Base, train

COLOURS = ["red", "green", "blue"]
SETTINGS = TrainSettings(
    lora=LoraSettings(rank=4), max_steps=6, learning_rate=1e-2, tokens_per_batch=160, checkpoint_steps=2,
    held_out_evaluations=2, loss_band=LossBand(0.0, 9.0), dtype="fp32",
)  # fmt: skip


def rows(count: int, start: int = 0) -> tuple[Row, ...]:
    return tuple(
        Row(
            "a.jsonl", index, f"r{index}", "tool",
            (
                Message("user", "question " * (1 + index % 4) + str(index)),
                Message("assistant", COLOURS[index % 3]),
            ),
        )
        for index in range(start, start + count)
    )  # fmt: skip


@pytest.fixture
def dataset() -> Dataset:
    return Dataset(rows(18), rows(5, 100), ())


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return Base(tiny_base, "org/tiny", "0123abc")


def silent(_: TrainProgress) -> None:
    pass


class Killed(BaseException):
    """Ends a training as a kill would: nothing of ours catches it."""


def test_a_training_makes_the_run_folder(dataset: Dataset, base: Base, tmp_path: Path) -> None:
    seen: list[TrainProgress] = []
    outcome = train(SETTINGS, dataset, base, tmp_path, seen.append)
    assert set(outcome.files) == {
        "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "trainer_state.json",
        "trained_conversations.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "logs/loss.csv", "logs/loss.png",
    }  # fmt: skip
    config = json.loads(outcome.files["adapter_config.json"].read_text())
    assert config["base_model_name_or_path"] == "org/tiny"
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    texts = [path.read_text() for name, path in outcome.files.items() if name.endswith(".json")]
    assert not any(str(tmp_path) in text or str(base.folder) in text for text in texts)

    tensors = load_file(outcome.files["adapter_model.safetensors"])
    plain = torch.load(outcome.files["adapter_model.bin"], weights_only=True)
    assert len(tensors) == 2 * 4 * 2
    assert tensors.keys() == plain.keys()
    assert all(torch.equal(tensors[name], plain[name]) for name in tensors)
    assert sum(t.numel() for t in tensors.values()) == outcome.trained_parameters
    assert any(t.abs().max() > 0 for name, t in tensors.items() if "lora_B" in name)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert outcome.files[name].read_bytes() == (base.folder / name).read_bytes()

    losses = read_losses(outcome.files["logs/loss.csv"])
    assert [row.step for row in losses] == [1, 2, 3, 4, 5, 6]
    assert losses[-1].loss < losses[0].loss
    assert [row.step for row in losses if row.held_out_loss is not None] == [3, 6]
    assert outcome.held_out_loss == pytest.approx(losses[-1].held_out_loss)
    state = json.loads(outcome.files["trainer_state.json"].read_text())
    assert state["global_step"] == 6
    assert [p.step for p in seen if p.phase == "train"][-1] == 6
    assert seen[0].phase == "load"
    assert seen[-1].phase == "export"
    assert outcome.steps == prepare(SETTINGS, dataset, base.folder).estimate.steps


def test_a_training_that_is_ended_early_exports_what_there_is(
    dataset: Dataset, base: Base, tmp_path: Path
) -> None:
    whole = train(SETTINGS, dataset, base, tmp_path / "whole", silent)
    assert not whole.ended_early
    steps: list[int] = []

    def report(progress: TrainProgress) -> None:
        steps.append(progress.step)

    early = train(SETTINGS, dataset, base, tmp_path / "early", report, end_early=lambda: max(steps) >= 3)
    assert (early.ended_early, early.steps) == (True, 4)
    assert early.events == ("ended early at step 4 of 6 on request",)
    losses = read_losses(early.files["logs/loss.csv"])
    assert [(row.step, row.loss) for row in losses] == [
        (row.step, row.loss) for row in read_losses(whole.files["logs/loss.csv"])[:4]
    ]
    assert losses[-1].held_out_loss == pytest.approx(early.held_out_loss)

    # The same training, wanted in full after all, goes on from there.
    rest = train(SETTINGS, dataset, base, tmp_path / "early", silent)
    assert (rest.ended_early, rest.events) == (False, ())
    assert rest.files["adapter_model.safetensors"].read_bytes() == (
        whole.files["adapter_model.safetensors"].read_bytes()
    )


def test_a_killed_training_goes_on_to_the_same_adapter(dataset: Dataset, base: Base, tmp_path: Path) -> None:
    settings = replace(SETTINGS, max_steps=0, epochs=2, gradient_accumulation=2, checkpoint_steps=3)
    whole = train(settings, dataset, base, tmp_path / "whole", silent)

    def kill_at(step: int) -> Any:
        def report(progress: TrainProgress) -> None:
            if progress.phase == "train" and progress.step == step:
                raise Killed

        return report

    resumed: list[int] = []
    with pytest.raises(Killed):
        train(settings, dataset, base, tmp_path / "cut", kill_at(5))
    half = tmp_path / "cut" / "checkpoints" / "checkpoint-5"  # what a kill in the middle of saving leaves
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    cut = train(settings, dataset, base, tmp_path / "cut", lambda p: resumed.append(p.resumed_step))
    assert max(resumed) == 3
    ours, theirs = (load_file(o.files["adapter_model.safetensors"]) for o in (cut, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    pairs = [
        [(r.step, r.loss, r.tokens) for r in read_losses(o.files["logs/loss.csv"])] for o in (cut, whole)
    ]
    assert pairs[0] == pairs[1]


@pytest.mark.parametrize("step", [4, 3], ids=["plain", "with a held-out loss"])
def test_a_kill_right_after_a_checkpoint_loses_no_row(
    dataset: Dataset, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    settings = replace(SETTINGS, checkpoint_steps=step)
    save = AnswerTrainer._save_checkpoint

    def save_and_die(self: AnswerTrainer, *arguments: Any) -> None:
        save(self, *arguments)
        if self.state.global_step == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(AnswerTrainer, "_save_checkpoint", save_and_die)
        with pytest.raises(Killed):
            train(settings, dataset, base, tmp_path, silent)
    resumed: list[int] = []
    outcome = train(settings, dataset, base, tmp_path, lambda p: resumed.append(p.resumed_step))
    assert max(resumed) == step
    losses = read_losses(outcome.files["logs/loss.csv"])
    assert [row.step for row in losses] == [1, 2, 3, 4, 5, 6]
    assert [row.step for row in losses if row.held_out_loss is not None] == [3, 6]


def test_rows_that_a_power_cut_took_do_not_end_a_training(
    dataset: Dataset, base: Base, tmp_path: Path
) -> None:
    def kill(progress: TrainProgress) -> None:
        if progress.step == 5:
            raise Killed

    with pytest.raises(Killed):
        train(SETTINGS, dataset, base, tmp_path, kill)
    lines = (tmp_path / "loss.csv").read_text().splitlines(keepends=True)
    (tmp_path / "loss.csv").write_text("".join(lines[:2]))
    outcome = train(SETTINGS, dataset, base, tmp_path, silent)
    assert [row.step for row in read_losses(outcome.files["logs/loss.csv"])] == [1, 5, 6]


def test_only_the_last_layers_are_adapted(dataset: Dataset, base: Base, tmp_path: Path) -> None:
    settings = replace(
        SETTINGS, lora=LoraSettings(rank=2, last_layers=1, target_modules=("up_proj",)), max_steps=1
    )
    outcome = train(settings, dataset, base, tmp_path, silent)
    tensors = load_file(outcome.files["adapter_model.safetensors"])
    assert sorted(tensors) == [
        f"base_model.model.model.layers.1.mlp.up_proj.lora_{half}.weight" for half in "AB"
    ]


def test_a_module_that_is_not_there_is_refused(dataset: Dataset, base: Base, tmp_path: Path) -> None:
    settings = replace(SETTINGS, lora=LoraSettings(target_modules=("c_attn",)))
    with pytest.raises(InvalidInput, match="c_attn"):
        train(settings, dataset, base, tmp_path, silent)


def test_rows_that_are_all_too_long_are_refused(dataset: Dataset, base: Base) -> None:
    with pytest.raises(FailedPrecondition, match="All 18 training rows"):
        prepare(replace(SETTINGS, max_length_tokens=8), dataset, base.folder)


def trainer_for(base: Base, dataset: Dataset, work_dir: Path, dtype: str = "fp32") -> AnswerTrainer:
    tokenizer, decoder = load_tokenizer(base.folder), read_decoder(base.folder)
    train_rows, held_out = (encode_rows(part, tokenizer, 256) for part in (dataset.train, dataset.held_out))
    device = Device("cpu", "cpu", dtype, 1)
    plan = make_plan("key", replace(SETTINGS, max_steps=3), decoder, train_rows, held_out, device)
    rung = rungs(plan, may_checkpoint=True)[0]
    return assemble(plan, rung, SETTINGS, decoder, train_rows.rows, held_out.rows, work_dir)


def test_loss_and_gradients_are_those_of_the_whole_model(
    dataset: Dataset, base: Base, tmp_path: Path
) -> None:
    trainer = trainer_for(base, dataset, tmp_path)
    model = trainer.peft_model
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    encoded = encode_rows(dataset.train[:5], load_tokenizer(base.folder), 256).rows
    batch = Collator(2)([{"input_ids": row.input_ids, "labels": row.labels} for row in encoded])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    trainer.compute_loss(model, batch).backward()
    ours = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    loss = trainer.compute_loss(model, batch).item()
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert ours.keys() == trained.keys()
    for name, parameter in trained.items():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-6)
    answer_tokens = sum(row.trained_tokens for row in encoded)
    model.zero_grad()
    trainer.training_step(model, batch, answer_tokens)
    for name, parameter in trained.items():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-6)
    assert trainer.tokens_seen == sum(len(row) for row in encoded)
    assert trainer.answer_tokens_seen == answer_tokens


def test_the_base_stays_frozen_and_adapters_are_fp32(dataset: Dataset, base: Base, tmp_path: Path) -> None:
    model = trainer_for(base, dataset, tmp_path, dtype="bf16").peft_model
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)


def test_the_held_out_loss_weighs_every_token_the_same(dataset: Dataset, base: Base, tmp_path: Path) -> None:
    trainer = trainer_for(base, dataset, tmp_path)
    encoded = encode_rows(dataset.held_out, load_tokenizer(base.folder), 256).rows
    batch = Collator(2)([{"input_ids": row.input_ids, "labels": row.labels} for row in encoded])
    model = trainer.peft_model.eval()
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_a_model_that_changes_its_scores_is_refused(dataset: Dataset, base: Base, tmp_path: Path) -> None:
    trainer = trainer_for(base, dataset, tmp_path)
    inner = trainer.peft_model.get_base_model()
    forward = inner.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = 0.1 * torch.tanh(output.logits / 0.1)
        return output

    inner.forward = capped
    with pytest.raises(FailedPrecondition, match="changes its scores"):
        trainer.check_head()


def test_a_loss_that_is_not_finite_falls_back_to_fp32_from_the_start(
    dataset: Dataset, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = AnswerTrainer._summed_loss

    def overflowing(self: AnswerTrainer, inputs: Any) -> Any:
        loss, count = honest(self, inputs)
        broken = self._plan.device.dtype == "bf16" and self.state.global_step == 2
        return (loss * math.inf if broken else loss), count

    monkeypatch.setattr(AnswerTrainer, "_summed_loss", overflowing)
    monkeypatch.setattr("web4lora_trainer.train.choose_device", lambda *_: Device("cpu", "cpu", "bf16", 1))
    settings = replace(SETTINGS, dtype="auto", checkpoint_steps=1)
    outcome = train(settings, dataset, base, tmp_path / "auto", silent)
    assert "fp32" in outcome.device
    assert outcome.events == (
        "the loss or its gradient was NaN or infinite in bf16 at step 3: the training started again in fp32",
    )
    assert [row.step for row in read_losses(outcome.files["logs/loss.csv"])] == [1, 2, 3, 4, 5, 6]

    with pytest.raises(FailedPrecondition, match="NaN or infinite at step 3: bf16, which") as caught:
        train(replace(settings, dtype="bf16"), dataset, base, tmp_path / "asked", silent)
    assert "Set dtype to fp32 or auto" in caught.value.fix

    monkeypatch.setattr(Device, "free_memory_bytes", lambda *_: 1_000)
    with pytest.raises(ResourceExhausted, match=r"NaN or infinite in bf16 at step 3.*Training needs about"):
        train(settings, dataset, base, tmp_path / "small", silent)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_loss_that_is_not_finite_spoils_no_other(
    dataset: Dataset, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    honest = AnswerTrainer._summed_loss

    def broken(self: AnswerTrainer, inputs: Any) -> Any:
        loss, count = honest(self, inputs)
        return (loss * value if self.model.training and self.state.global_step == 9 else loss), count

    monkeypatch.setattr(AnswerTrainer, "_summed_loss", broken)
    told: list[TrainProgress] = []
    outcome = train(replace(SETTINGS, max_steps=12), dataset, base, tmp_path, told.append)
    losses = read_losses(outcome.files["logs/loss.csv"])
    assert [row.step for row in losses if not math.isfinite(row.loss)] == [10]
    assert math.isfinite(outcome.final_loss)
    assert "1 of 12 losses was not finite" in outcome.verdict

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    state = json.loads(outcome.files["trainer_state.json"].read_text(), parse_constant=refuse)
    assert [each["step"] for each in state["log_history"] if each.get("loss", 0) is None] == [10]
    tensors = load_file(outcome.files["adapter_model.safetensors"])
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


@pytest.mark.parametrize("longest_gradient", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_changes_nothing_clipped_or_not(
    dataset: Dataset, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longest_gradient: float
) -> None:
    """Settings refuse a max_grad_norm of 0; the guard does not lean on it."""
    honest = AnswerTrainer._forward_and_backward

    def broken(self: AnswerTrainer, model: Any, *arguments: Any) -> Any:
        loss = honest(self, model, *arguments)
        if self.state.global_step == 9:
            next(p for p in model.parameters() if p.grad is not None).grad[0] = math.nan
        return loss

    monkeypatch.setattr(AnswerTrainer, "_forward_and_backward", broken)
    settings = replace(SETTINGS, max_steps=12, max_grad_norm=longest_gradient)
    outcome = train(settings, dataset, base, tmp_path, silent)
    tensors = load_file(outcome.files["adapter_model.safetensors"])
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert [row.step for row in read_losses(tmp_path / "loss.csv") if row.grad_norm is None] == [10]


def test_an_adapter_that_is_not_finite_is_not_exported(
    dataset: Dataset, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = AnswerTrainer.train

    def ruin(self: AnswerTrainer, *arguments: Any, **options: Any) -> Any:
        honest(self, *arguments, **options)
        with torch.no_grad():
            next(p for p in self.peft_model.parameters() if p.requires_grad)[0, 0] = math.inf

    monkeypatch.setattr(AnswerTrainer, "train", ruin)
    with pytest.raises(DataLoss, match=r"1 of the adapter's 16 tensors hold numbers that are not finite"):
        train(SETTINGS, dataset, base, tmp_path, silent)
    assert not list((tmp_path / "output").glob("adapter_model*"))


def test_of_two_gpus_one_is_used(
    dataset: Dataset, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainingArguments

    set_up = TrainingArguments.__dict__["_setup_devices"].func

    def two(self: TrainingArguments) -> Any:
        device = set_up(self)
        self._n_gpu = 2
        return device

    seen = functools.cached_property(two)
    seen.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", seen)
    assert TrainingArguments(use_cpu=True).n_gpu == 2
    assert train(SETTINGS, dataset, base, tmp_path, silent).steps == 6


def test_one_of_several_processes_neither_prepares_nor_trains(
    dataset: Dataset, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FailedPrecondition, match="one of 2 processes"):
        prepare(SETTINGS, dataset, base.folder)
    with pytest.raises(FailedPrecondition, match="one of 2 processes"):
        train(SETTINGS, dataset, base, tmp_path, silent)


def test_a_few_conversations_are_kept_as_they_were_trained(base: Base, tmp_path: Path) -> None:
    def talk(line: int, *questions: str, system: str = "") -> Row:
        turns = [Message("system", system)] if system else []
        for question in questions:
            turns += [Message("user", question), Message("assistant", "red")]
        return Row("rows.jsonl", line, "", "", tuple(turns))

    data = [talk(line, "one " * line) for line in range(1, 12)]
    data += [
        talk(20, "one", "two"),
        talk(21, "one", system="be a helper"),
        talk(22, "one", "two", system="yes"),
    ]
    outcome = train(SETTINGS, Dataset(tuple(data), (), ()), base, tmp_path, silent)
    kept = json.loads(outcome.files["trained_conversations.json"].read_text())
    assert kept["format"] == "web4lora.trained_conversations/1"
    found = kept["conversations"]
    assert [one["line"] for one in found] == [21, 1, 22, 20, 2, 3, 4, 5]
    assert {one["file"] for one in found} == {"train/rows.jsonl"}
    tokenizer = load_tokenizer(base.folder)
    for one in found:
        for turn in one["turns"]:
            asked = one["messages"][: turn["messages"]]
            text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
            prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert one["input_ids"][: turn["prompt_tokens"]] == prompt
            assert one["labels"][len(prompt)] == one["input_ids"][len(prompt)]
            assert turn["stop_token"] == tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert len(one["labels"]) == len(one["input_ids"])
    assert [len(one["turns"]) for one in found[:4]] == [1, 1, 2, 2]
    messages = [message.to_json() for message in data[13].messages]
    assert found[2]["messages"] == messages


@pytest.mark.parametrize(
    ("systems", "said"),
    [
        (["", "", "A", "B", "B", "B"], "B"),
        (["", "", "", "A", "A"], ""),
        (["", "A"], "A"),  # on a tie the model knows a system message
    ],
)
def test_the_most_frequent_system_message_is_kept(
    base: Base, tmp_path: Path, systems: list[str], said: str
) -> None:
    from web4lora_trainer.export import export_conversations

    asked = [
        replace(row, messages=(*([Message("system", text)] if text else []), *row.messages))
        for row, text in zip(rows(len(systems)), systems, strict=True)
    ]
    encoded = encode_rows(asked, load_tokenizer(base.folder), 4096)
    twice = [encoded.rows[0]] * 9  # a conversation may be several rows of tokens
    export_conversations([*twice, *encoded.rows], tmp_path)
    record = tmp_path / "trained_conversations.json"
    assert json.loads(record.read_text())["system"] == said
    assert trained_system(read_trained_conversations(record)) == said


def test_a_kind_with_long_rows_alone_is_kept_too(base: Base, tmp_path: Path) -> None:
    from web4lora_trainer.export import export_conversations

    short, long = rows(3), rows(3)
    long = tuple(replace(row, messages=(Message("system", "red " * 600), *row.messages)) for row in long)
    encoded = encode_rows([*short, *long], load_tokenizer(base.folder), 4096)
    export_conversations(encoded.rows, tmp_path)
    kept = json.loads((tmp_path / "trained_conversations.json").read_text())["conversations"]
    assert [one["messages"][0]["role"] for one in kept] == ["user", "system", "user", "user"]


def with_template(base: Base, folder: Path, head: str) -> Base:
    """The base with a chat template that begins with something of the test's."""
    shutil.copytree(base.folder, folder)
    path = folder / "chat_template.jinja"
    path.write_text(head + path.read_text())
    return replace(base, folder=folder)


def test_a_template_without_end_is_given_up_in_one_line(
    base: Base, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "Bounds", partial(chat_template.Bounds, cpu_seconds=1))
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    for when in ("", "{% if messages[0].role == 'system' %}"):
        head = f"{when}{endless}{'{% endif %}' if when else ''}"
        asked = replace(rows(1)[0], messages=(Message("system", "yes"), *rows(1)[0].messages))
        folder = tmp_path / str(len(when))
        with pytest.raises(InvalidInput, match="more than 1 s of processor time") as caught:
            prepare(SETTINGS, Dataset((asked,), (), ()), with_template(base, folder, head).folder)
        assert "\n" not in caught.value.message


def test_the_date_that_the_template_wrote_is_kept(base: Base, dataset: Dataset, tmp_path: Path) -> None:
    """A training that goes on the next day reads the same tokens as before."""
    dated = with_template(base, tmp_path / "base", "{{ strftime_now('%d %Y') }} ")
    work = tmp_path / "work"
    work.mkdir()
    (work / "rendered_at").write_text("2024-02-29T23:59:00")
    outcome = train(replace(SETTINGS, max_steps=1), dataset, dated, work, silent)
    record = json.loads(outcome.files["trained_conversations.json"].read_text())
    assert record["rendered_at"] == "2024-02-29T23:59:00"
    tokenizer = load_tokenizer(dated.folder)
    first = record["conversations"][0]
    assert tokenizer.decode(first["input_ids"]).startswith("29 2024 ")


def test_a_template_without_a_date_leaves_none(base: Base, dataset: Dataset, tmp_path: Path) -> None:
    outcome = train(replace(SETTINGS, max_steps=1), dataset, base, tmp_path, silent)
    assert "rendered_at" not in json.loads(outcome.files["trained_conversations.json"].read_text())


def test_settings_that_the_base_can_not_serve_are_refused_at_once_and_first(
    base: Base, dataset: Dataset, tmp_path: Path
) -> None:
    """Before the tokenizer, which is of no use here, is even looked at."""
    broken = with_template(base, tmp_path / "base", "{% if %}").folder
    lora = replace(SETTINGS.lora, target_modules=("q_proj", "qkv"))
    asked = replace(SETTINGS, max_length_tokens=300, lora=lora)
    contexts = {"deploy.context_tokens": 256, "package.context_tokens": 257}
    with pytest.raises(InvalidInput) as caught:
        check_settings(asked, broken, contexts)
    assert caught.value.metadata["field"].splitlines() == [
        "train.max_length_tokens", "train.lora.target_modules", "package.context_tokens",
    ]  # fmt: skip
    assert "package.context_tokens: 257 is more than the 256 tokens" in caught.value.message
    with pytest.raises(InvalidInput, match="max_length_tokens"):
        prepare(asked, dataset, broken)


UNQUOTABLE = 'one "\ntwo """\nthree'


def test_a_text_that_a_modelfile_can_not_hold_is_refused_before_training(
    base: Base, dataset: Dataset, tmp_path: Path
) -> None:
    template = (
        "{% if messages[0].role != 'system' %}{% set messages = [{'role': 'system', 'content': TEXT}] + "
    )
    template = template.replace("TEXT", json.dumps(UNQUOTABLE)) + "messages %}{% endif %}"
    with pytest.raises(InvalidInput, match="system message of the base's chat template can't be written"):
        prepare(SETTINGS, dataset, with_template(base, tmp_path / "a", template).folder)
    licensed = with_template(base, tmp_path / "b", "").folder
    (licensed / "LICENSE.txt").write_text(UNQUOTABLE)
    with pytest.raises(InvalidInput, match=r"licence, in LICENSE\.txt, can't be written in a Modelfile: "):
        prepare(SETTINGS, dataset, licensed)
    (licensed / "LICENSE.txt").write_text('Called "A"\nand "B"')
    prepare(SETTINGS, dataset, licensed)
    with pytest.raises(InvalidInput, match="in its model card"):
        prepare(SETTINGS, dataset, base.folder, licence=UNQUOTABLE)


def test_memory_is_looked_at_before_llama_cpp_is_asked(
    base: Base, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Device, "free_memory_bytes", lambda *_: 1)
    with pytest.raises(ResourceExhausted):
        prepare(
            SETTINGS, dataset, base.folder, Converter(tmp_path / "no source", None, tmp_path), "a", tmp_path
        )


def test_rows_that_the_template_refuses_are_named_training_and_held_out(base: Base, tmp_path: Path) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    folder = with_template(base, tmp_path / "base", template).folder
    system = Message("system", "yes")
    bad = [
        replace(row, messages=(system, *row.messages), file=name)
        for row, name in zip(rows(2, 1), "tv", strict=True)
    ]
    with pytest.raises(InvalidInput) as caught:
        prepare(SETTINGS, Dataset((*rows(3), bad[0]), (bad[1],), ()), folder)
    assert "t:1: the base's chat template refuses it: no system turns" in caught.value.message
    assert "v:2: the base's chat template refuses it" in caught.value.message
    assert "2 problems in the dataset" in caught.value.message


def test_preparing_says_what_became_of_every_answer(base: Base) -> None:
    user, answer = Message("user", "one"), Message("assistant", "red")
    excluded = Row("a", 9, "", "", (user, replace(answer, trained=False), user, answer))
    found = prepare(SETTINGS, Dataset((*rows(3), excluded), (), ()), base.folder)
    assert found.train.answers == 4
    assert [line for line in found.warnings if line not in found.notes] == [
        "1 training answers have a weight of 0: not trained on"
    ]
