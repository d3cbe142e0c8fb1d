from __future__ import annotations

from typing import Any

import pytest
from web4.lora.v1 import trainer_pb2
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.pipeline.train import LoraSettings, LossBand, TrainSettings
from web4lora_trainer.specs import check_prepare, check_train, settings_of

DIGEST = "a" * 64


def test_absent_fields_take_the_contracts_defaults() -> None:
    settings = settings_of(trainer_pb2.TrainSettings())
    assert settings == TrainSettings()
    assert settings.lora == LoraSettings(16, None, 0.0, ("q_proj", "k_proj", "v_proj", "o_proj"), 0)
    assert settings.lora.scale_numerator == 32
    assert settings.loss_band == LossBand(0.6, 1.0)
    assert (settings.epochs, settings.learning_rate, settings.schedule, settings.seed) == (
        1,
        2e-4,
        "cosine",
        17,
    )
    assert settings.batch_tokens("cpu") == 512
    assert settings.batch_tokens("mps") == 4096


def test_every_field_of_the_contract_is_taken() -> None:
    message = trainer_pb2.TrainSettings(
        lora=trainer_pb2.LoraSettings(
            rank=4, alpha=6, dropout=0.1, target_modules=["up_proj"], last_layers=3
        ),
        epochs=2.5,
        max_steps=7,
        learning_rate=1e-3,
        schedule="linear",
        warmup_ratio=0.1,
        max_length_tokens=99,
        tokens_per_batch=64,
        gradient_accumulation=2,
        gradient_checkpointing="on",
        dtype="fp32",
        seed=(1 << 32) - 1,
        checkpoint_steps=5,
        held_out_evaluations=2,
        loss_band=trainer_pb2.LossBand(low=0.1, high=0.5),
        write_bin=False,
        max_grad_norm=0.5,
        optim="adafactor",
        loraplus_lr_ratio=16,
        neftune_noise_alpha=5,
        report_to=["tensorboard"],
        **{"from": "a" * 64},
    )
    assert settings_of(message) == TrainSettings(
        lora=LoraSettings(4, 6.0, 0.1, ("up_proj",), 3),
        epochs=2.5,
        max_steps=7,
        learning_rate=1e-3,
        schedule="linear",
        warmup_ratio=0.1,
        max_length_tokens=99,
        tokens_per_batch=64,
        gradient_accumulation=2,
        gradient_checkpointing="on",
        dtype="fp32",
        seed=(1 << 32) - 1,
        checkpoint_steps=5,
        held_out_evaluations=2,
        loss_band=LossBand(0.1, 0.5),
        write_bin=False,
        max_grad_norm=0.5,
        optim="adafactor",
        loraplus_lr_ratio=16.0,
        neftune_noise_alpha=5.0,
        report_to=("tensorboard",),
        start_from="a" * 64,
    )
    fields = {field.name for field in message.DESCRIPTOR.fields} - {"from"} | {"start_from"}
    assert fields == set(TrainSettings.__dataclass_fields__), "a field of the contract is not read"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0.0), ("epochs", float("nan")), ("learning_rate", -1.0), ("learning_rate", float("inf")),
        ("schedule", "step"), ("dtype", "int4"), ("gradient_checkpointing", "maybe"), ("warmup_ratio", 1.5),
        ("tokens_per_batch", 0), ("gradient_accumulation", 0), ("max_length_tokens", 1), ("seed", -1),
    ],
)  # fmt: skip
def test_values_out_of_bounds_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidInput) as caught:
        settings_of(trainer_pb2.TrainSettings(**{field: value}))
    assert caught.value.metadata["field"] == f"train.{field}"


def test_the_loss_band_and_module_names_are_checked() -> None:
    with pytest.raises(InvalidInput, match=r"train\.loss_band: low 2"):
        settings_of(trainer_pb2.TrainSettings(loss_band=trainer_pb2.LossBand(low=2, high=1)))
    with pytest.raises(InvalidInput, match="target_modules"):
        settings_of(trainer_pb2.TrainSettings(lora=trainer_pb2.LoraSettings(target_modules=["../x"])))


def ref(kind: str) -> Any:
    from web4.lora.v1 import artifacts_pb2

    return artifacts_pb2.ArtifactRef(
        kind=artifacts_pb2.ArtifactKind.Value(f"ARTIFACT_KIND_{kind}"), name="x", digest=DIGEST
    )


def test_specs_are_refused_before_a_job_is_accepted() -> None:
    base = trainer_pb2.BaseModelSpec(model="smollm2-135m-instruct")
    check_prepare(trainer_pb2.PrepareSpec(dataset=ref("DATASET"), base=base))
    check_train(trainer_pb2.TrainSpec(name="a", dataset=ref("DATASET"), base=ref("BASE_MODEL")))
    for no_work in (
        trainer_pb2.PrepareSpec(dataset=ref("DATASET")),
        trainer_pb2.PrepareSpec(base=base),
        trainer_pb2.PrepareSpec(dataset=ref("GGUF"), base=base),
    ):
        with pytest.raises(InvalidInput):
            check_prepare(no_work)
    for bad in (
        trainer_pb2.TrainSpec(name="a", dataset=ref("DATASET"), base=ref("DATASET")),
        trainer_pb2.TrainSpec(name="../a", dataset=ref("DATASET"), base=ref("BASE_MODEL")),
    ):
        with pytest.raises(InvalidInput):
            check_train(bad)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (
            {"target_modules": ["all-linear", "q_proj"]},
            "train.lora.target_modules: all-linear names every layer",
        ),
        ({"rank_pattern": {"v_proj": 0}}, "train.lora.rank_pattern.v_proj: 0 must be at least 1"),
        ({"rank_pattern": {"(.*)+": 4}}, "is not the name of a layer"),
        ({"alpha_pattern": {"v_proj": -1.0}}, "train.lora.alpha_pattern.v_proj: -1.0 must be above 0"),
    ],
)
def test_loras_shape_is_checked(lora: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        settings_of(trainer_pb2.TrainSettings(lora=lora))
    assert said in caught.value.message


def test_a_layers_rank_is_that_of_the_first_name_that_it_ends_with() -> None:
    lora = LoraSettings(8, rank_pattern={"layers.1.mlp.up_proj": 2, "up_proj": 4})
    names = ("model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gup_proj")
    assert [lora.rank_of(name) for name in names] == [2, 4, 8]
