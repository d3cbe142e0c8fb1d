"""A tokenizer's files, as trainer and packager read a base model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.corpus.case import Case, Kind, edited, having, holds, no_json
from tests.tiny_base import make_base

FILE, CONFIG, SPECIAL, ADDED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
TRAINER, PACKAGER = ("trainer",), ("packager",)


def trainer(folder: Path, _: Path) -> None:
    from web4lora_trainer.base_check import check_base
    from web4lora_trainer.base_model import load_tokenizer
    from web4lora_trainer.decoder import read_decoder

    check_base(read_decoder(folder), load_tokenizer(folder))


def packager(folder: Path, _: Path) -> None:
    from web4lora_packager.chat_template import read_tokenizer

    read_tokenizer(folder)


def added(**values: Any) -> Callable[[Any], object]:
    return lambda data: data["added_tokens"][-1].update(values)


def vocabulary(change: Callable[[dict[str, Any]], object]) -> Callable[[Any], object]:
    return lambda data: change(data["model"]["vocab"])


BOTH: dict[str, Callable[[Any], object]] = {
    "added tokens an object": lambda data: data.update(added_tokens={"a": 1}),
    "added tokens a text": lambda data: data.update(added_tokens="abc"),
    "added tokens a number": lambda data: data.update(added_tokens=7),
    "an added token that is a number": lambda data: data["added_tokens"].append(7),
    "an added token without an id": lambda data: data["added_tokens"][-1].pop("id"),
    "an added token without a text": lambda data: data["added_tokens"][-1].pop("content"),
    "an id that is a text": added(id="two"),
    "an id that is a half": added(id=2.5),
    "an id below 0": added(id=-1),
    "an id of 2^70": added(id=1 << 70),
    "an id of no number": added(id=float("nan")),
    "an id that is a list": added(id=[2]),
    "a text that is a number": added(content=7),
    "a text that is a list": added(content=["a"]),
    "a text of half a character": added(content="\ud800"),
}
TOKENIZERS: dict[str, Callable[[Any], object]] = {
    "no model": lambda data: data.pop("model"),
    "a model that is null": lambda data: data.update(model=None),
    "a model of nobody": lambda data: data["model"].update(type="Nobody"),
    "a vocabulary that is a list": lambda data: data["model"].update(vocab=[1]),
    "a vocabulary that is null": lambda data: data["model"].update(vocab=None),
    "a vocabulary of texts": vocabulary(lambda vocab: vocab.update(a="x")),
    "a vocabulary below 0": vocabulary(lambda vocab: vocab.update(a=-7)),
    "a vocabulary beyond the model": vocabulary(lambda vocab: vocab.update(zzz=10**6)),
    "a vocabulary of 2^40": vocabulary(lambda vocab: vocab.update(zzz=1 << 40)),
    "a vocabulary with half of its tokens": vocabulary(
        lambda vocab: [vocab.pop(token) for token in list(vocab)[3::2]]
    ),
    "merges that are a text": lambda data: data["model"].update(merges="ab"),
    "merges of tokens that there are not": lambda data: data["model"]["merges"].append(["qqq", "www"]),
    "merges of one": lambda data: data["model"]["merges"].append(["a"]),
    "a normalizer that takes all away": lambda data: data.update(
        normalizer={"type": "Replace", "pattern": {"Regex": "."}, "content": ""}
    ),
    "a pattern that is none": lambda data: data.update(
        normalizer={"type": "Replace", "pattern": {"Regex": "("}, "content": ""}
    ),
    "a pattern without end": lambda data: data.update(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "(?:\\w+\\w+)+$^"}, "behavior": "Isolated",
                       "invert": False}
    ),
    "a normalizer of nobody": lambda data: data.update(normalizer={"type": "Nobody"}),
    "a decoder that is a list": lambda data: data.update(decoder=[1]),
    "no decoder": lambda data: data.update(decoder=None),
    "a version of the future": lambda data: data.update(version="99.0"),
    "a truncation to 0": lambda data: data.update(
        truncation={"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 9}
    ),
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "eos a number": {"eos_token": 7},
    "eos a list": {"eos_token": ["<|im_end|>"]},
    "eos an object of nothing": {"eos_token": {}},
    "eos null": {"eos_token": None},
    "eos no token": {"eos_token": "<|nobody|>"},
    "eos of many lines": {"eos_token": "a\nb\x1b[31m"},
    "eos of a million letters": {"eos_token": "x" * 1_000_000},
    "bos no token": {"bos_token": "<|nobody|>"},
    "a class that is a number": {"tokenizer_class": 7},
    "code of its own": {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}},
    "tokens that are a list": {"added_tokens_decoder": [1]},
    "tokens of words": {"added_tokens_decoder": {"two": {"content": "x"}}},
    "tokens of numbers": {"added_tokens_decoder": {"2": 7}},
    "a length that is a text": {"model_max_length": "many"},
    "a side of nobody": {"padding_side": "above"},
    "extra tokens a number": {"additional_special_tokens": 7},
}

KIND = Kind(
    name="tokenizer",
    whole=make_base,
    readers={"trainer": trainer, "packager": packager},
    cases=(
        *no_json(FILE),
        *no_json(CONFIG),
        *no_json(SPECIAL),
        *no_json(ADDED, readers=TRAINER),
        *(Case(f"{FILE}: {name}", edited(FILE, change)) for name, change in BOTH.items()),
        *(Case(f"{FILE}: {name}", edited(FILE, change), readers=TRAINER)
          for name, change in TOKENIZERS.items()),
        *(Case(f"{CONFIG}: {name}", having(CONFIG, **values), readers=TRAINER)
          for name, values in CONFIGS.items()),
        Case("no tokenizer", lambda folder: (folder / FILE).unlink(), readers=TRAINER),
        Case("a byte order mark", lambda folder: holds(
            FILE, b"\xef\xbb\xbf" + (folder / FILE).read_bytes())(folder)),
    ),
    names=r"tokenizer|special_tokens_map\.json|added_tokens\.json",
    modules=("torch", "transformers", "tokenizers"),
)  # fmt: skip
