"""GGUF headers and what is refused of them, quantization's inputs, the choice of the 16-bit type."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from web4lora_chassis.errors import DataLoss, InvalidInput
from web4lora_chassis.model_files.gguf import GgufHeader, GgufTensor
from web4lora_packager.chat_template import Tokenizer
from web4lora_packager.check import check_header, contents, read_made
from web4lora_packager.quantize import calibration_text

TOKENIZER = Tokenizer("T", {"<s>": 1, "</s>": 2}, {"bos_token": "<s>", "eos_token": "</s>"}, (2,))


def _write(path: Path, *, template: str = "T", eos: int = 2) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_chat_template(template)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(eos)
    writer.add_tensor("a", np.ones((4, 32), np.float16))
    writer.add_tensor("b", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_header_like_the_base_s_is_taken(tmp_path: Path) -> None:
    check_header(read_made(_write(tmp_path / "m.gguf")), TOKENIZER, None, "m.gguf")


@pytest.mark.parametrize("data", [b"", b"junk", b"GGUF" + b"\0" * 4])
def test_what_is_no_gguf_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(DataLoss, match=r"bad\.gguf"):
        read_made(tmp_path / "bad.gguf")


def test_a_file_without_its_end_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[: read_made(path).end_bytes - 1])
    with pytest.raises(DataLoss, match=r"m\.gguf is cut off"):
        read_made(path)


def test_another_chat_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataLoss, match="chat template"):
        check_header(read_made(_write(tmp_path / "m.gguf", template="T\n")), TOKENIZER, None, "m.gguf")


def test_another_end_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataLoss, match="eos_token has the id 7"):
        check_header(read_made(_write(tmp_path / "m.gguf", eos=7)), TOKENIZER, None, "m.gguf")


def test_a_quant_with_other_tensors_is_refused(tmp_path: Path) -> None:
    header = read_made(_write(tmp_path / "m.gguf"))
    check_header(header, TOKENIZER, header, "m.gguf")
    with pytest.raises(DataLoss, match="2 tensors"):
        check_header(header, TOKENIZER, replace(header, tensors=header.tensors[:1]), "m.gguf")


CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"


def _rows(path: Path, *texts: str) -> Path:
    answer = {"role": "assistant", "content": "!"}
    rows = [{"messages": [{"role": "user", "content": text}, answer]} for text in texts]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def test_calibration_takes_rows_of_all_files_in_turn(tmp_path: Path) -> None:
    tokenizer = replace(TOKENIZER, chat_template=CHATML)
    files = [_rows(tmp_path / "a.jsonl", "1", "2", "3"), _rows(tmp_path / "b.jsonl", "x")]
    rendered = "".join(f"<user>{text}</><assistant>!</>" for text in ("1", "x", "2", "3"))
    assert calibration_text(tokenizer, files, 100) == rendered


def test_calibration_is_bounded(tmp_path: Path) -> None:
    text = calibration_text(
        replace(TOKENIZER, chat_template=CHATML), [_rows(tmp_path / "a.jsonl", *["y" * 10_000] * 30)], 10
    )
    assert 10 * 512 * 8 <= len(text) < 10 * 512 * 8 + 10_100


def test_calibration_needs_rows(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no training rows"):
        calibration_text(TOKENIZER, [], 100)
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(InvalidInput, match=r"bad\.jsonl:1"):
        calibration_text(TOKENIZER, [tmp_path / "bad.jsonl"], 100)


@pytest.mark.parametrize(
    ("kind", "rows", "words"),
    [
        ("Q4_K_M", (576,), "58 % Q5_0, 32 % Q8_0, 10 % Q4_K, because rows of 576 are no multiples of 256"),
        ("IQ4_XS", (576, 320), "58 % Q5_0, 32 % Q8_0, 10 % Q4_K, because rows of 320 and 576 are no"),
        ("Q4_K_M", (1024,), ""),
        ("Q8_0", (576,), ""),
        ("Q4_0", (576,), ""),
        ("IQ4_NL", (576,), ""),
        ("F16", (576,), ""),
    ],
)
def test_the_types_that_a_file_really_has_are_told(kind: str, rows: tuple[int, ...], words: str) -> None:
    f32, q5_0, q8_0, q4_k = 0, 6, 8, 12
    tensors = [
        tensor
        for row in rows
        for tensor in (
            GgufTensor("a", (row, 116), q5_0),
            GgufTensor("b", (row, 64), q8_0),
            GgufTensor("c", (4 * row, 5), q4_k),
            GgufTensor("d", (row,), f32),
        )
    ]
    told = contents(GgufHeader({}, tensors), kind)
    assert told.startswith(words)
    assert bool(told) == bool(words)
