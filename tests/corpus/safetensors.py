"""Safetensors files and their index, as trainer and packager read a base model's."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from tests.corpus.case import DEEP, Case, Change, Kind, holds, no_json

FILE, INDEX, OTHER = "model.safetensors", "model.safetensors.index.json", "model-00001-of-00001.safetensors"
NAME = "model.layers.0.w.weight"


def entry(shape: Any = (2, 2), place: Any = (0, 8), dtype: Any = "BF16") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": place}


def file(header: object, body: bytes = bytes(8), length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


def whole(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / FILE).write_bytes(file({NAME: entry()}))


def trainer(folder: Path, _: Path) -> None:
    from web4lora_trainer.decoder import read_decoder

    read_decoder(folder)


def packager(folder: Path, _: Path) -> None:
    from web4lora_chassis.model_files.model_folder import read_model_folder

    read_model_folder(folder)


def index(content: object) -> Change:
    """An index in place of the single file's, beside one shard."""

    def apply(folder: Path) -> None:
        (folder / FILE).rename(folder / OTHER)
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / INDEX).write_bytes(raw)

    return apply


def dangling(folder: Path) -> None:
    (folder / FILE).unlink()
    (folder / FILE).symlink_to("/nowhere")


def a_folder(folder: Path) -> None:
    (folder / FILE).unlink()
    (folder / FILE).mkdir()


BROKEN = {
    "empty": b"",
    "seven bytes": bytes(7),
    "zeros": bytes(64),
    "a pickle": b"PK\x03\x04" + bytes(60),
    "a header of 2^63 bytes": file({NAME: entry()}, length=1 << 63),
    "a header of 2^64 - 1 bytes": file({NAME: entry()}, length=(1 << 64) - 1),
    "a header of 99 MB that is not there": file({NAME: entry()}, length=99 << 20),
    "a header of one byte": file(b"{", length=1),
    "a header one byte short": file({NAME: entry()}, length=60),
    "a header that is no JSON": file(b"{oops}  "),
    "a header that is a list": file([1, 2]),
    "a header that is null": file(b"null"),
    "a header that is no UTF-8": file(b'{"\xff\xfe": 1}'),
    "a header 100,000 deep": file(b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    "a number of 5,000 digits": file(b'{"a": ' + b"9" * 5000 + b"}"),
    "a name twice": file(
        f'{{"{NAME}": {json.dumps(entry())}, "{NAME}": {json.dumps(entry())}}}'.encode()
    ),
    "no tensors": file({}, b""),
    "an entry that is a list": file({NAME: [1]}),
    "an entry that is null": file({NAME: None}),
    "an entry without a type": file({NAME: {"shape": [2, 2], "data_offsets": [0, 8]}}),
    "a type that is unknown": file({NAME: entry(dtype="F7")}),
    "a type that is a list": file({NAME: entry(dtype=["BF16"])}),
    "a type of many lines": file({NAME: entry(dtype="a\nb" * 999)}),
    "a shape below zero": file({NAME: entry(shape=[-2, -2])}),
    "a shape of texts": file({NAME: entry(shape=["2", "2"])}),
    "a shape of halves": file({NAME: entry(shape=[2.0, 2.0])}),
    "a shape that is a text": file({NAME: entry(shape="22")}),
    "a shape that is true": file({NAME: entry(shape=[True, 4])}),
    "a shape that is infinite": file({NAME: entry(shape=[float("inf")])}),
    "a shape of 2^64 by 2^64": file({NAME: entry(shape=[1 << 64, 1 << 64])}),
    "a million dimensions": file({NAME: entry(shape=[2**62] * 20_000)}),
    "places backwards": file({NAME: entry(place=[8, 0])}),
    "places below zero": file({NAME: entry(place=[-8, 0])}),
    "three places": file({NAME: entry(place=[0, 8, 16])}),
    "a place that is a text": file({NAME: entry(place=["0", "8"])}),
    "places beyond the file": file({NAME: entry(place=[1 << 60, (1 << 60) + 8])}),
    "cut off": file({NAME: entry()}, bytes(7)),
    "bytes behind": file({NAME: entry()}, bytes(9)),
    "tensors over one another": file({NAME: entry(), "b": entry(place=[4, 12])}, bytes(12)),
    "a gap between tensors": file({NAME: entry(), "b": entry(place=[16, 24])}, bytes(24)),
    "a name of many lines": file({"a\nb\x1b[31m": entry(place=[0, 9])}, bytes(9)),
    "a name of half a character": file({"\ud800": entry(place=[0, 9])}, bytes(9)),
    "a name of a million letters": file({"x" * 1_000_000: entry(place=[0, 9])}, bytes(9)),
    "metadata that are a list": file({"__metadata__": [1], NAME: entry()}),
    "metadata of numbers": file({"__metadata__": {"format": 7}, NAME: entry()}),
}  # fmt: skip

INDEXES: dict[str, object] = {
    "no map": {"metadata": {}},
    "a map that is a list": {"weight_map": [NAME]},
    "a map that is empty": {"weight_map": {}},
    "a map to numbers": {"weight_map": {NAME: 7}},
    "a map to lists": {"weight_map": {NAME: [OTHER]}},
    "a file that is not there": {"weight_map": {NAME: "model-00002-of-00002.safetensors"}},
    "a file above": {"weight_map": {NAME: "../model.safetensors"}},
    "a file at the root": {"weight_map": {NAME: "/etc/passwd"}},
    "a file of no name": {"weight_map": {NAME: ""}},
    "this folder": {"weight_map": {NAME: "."}},
    "a name with a NUL": {"weight_map": {NAME: "a\0.safetensors"}},
    "a name of half a character": {"weight_map": {NAME: "\ud800.safetensors"}},
    "a name of many lines": {"weight_map": {NAME: "a\nb.safetensors"}},
    "a name of a million letters": {"weight_map": {NAME: "x" * 1_000_000 + ".safetensors"}},
    "one file a million times": {"weight_map": {f"t{n}": OTHER for n in range(100_000)}},
}

KIND = Kind(
    name="safetensors",
    whole=whole,
    readers={"trainer": trainer, "packager": packager},
    cases=(
        *(Case(name, holds(FILE, data)) for name, data in BROKEN.items()),
        Case("a link to nowhere", dangling),
        Case("a folder", a_folder),
        *(Case(f"index: {name}", index(data)) for name, data in INDEXES.items()),
        *(Case(f"index: {case.name}", lambda folder, case=case: (index({})(folder), case.damage(folder)))
          for case in no_json(INDEX)),
        *no_json("config.json", r"config\.json"),
    ),
    names=r"\.safetensors|config\.json",
)  # fmt: skip
