"""Base models that contradict themselves: the cases of `broken_bases`."""

from __future__ import annotations

from tests.corpus.case import Case, Kind
from tests.corpus.tokenizer import trainer
from tests.tiny_base import make_base
from tests.unit.trainer.broken_bases import BROKEN

KIND = Kind(
    name="base model",
    whole=make_base,
    readers={"trainer": trainer},
    cases=tuple(Case(name, change, says) for name, (change, says) in BROKEN.items()),
    names=r"\.safetensors|\.json|base model|base's|weights|tokenizer",
    modules=("torch", "transformers", "safetensors.torch"),
)
