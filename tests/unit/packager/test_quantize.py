"""The importance matrix's text comes from the rows that were trained on, by the same reader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from web4lora_chassis.errors import InvalidInput
from web4lora_packager.chat_template import Tokenizer
from web4lora_packager.quantize import calibration_text

TOKENIZER = Tokenizer("{% for m in messages %}{{ m.role + ':' + m.content + ';' }}{% endfor %}", {}, {}, ())


def rows(path: Path, *contents: object, before: bytes = b"") -> Path:
    lines = [
        json.dumps({"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": "b"}]})
        for one in contents
    ]
    path.write_bytes(before + "\n".join(lines).encode())
    return path


def test_a_byte_order_mark_and_parts_are_read_as_training_reads_them(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]
    path = rows(tmp_path / "rows.jsonl", "a", parts, before=b"\xef\xbb\xbf")
    assert calibration_text(TOKENIZER, [path], 2) == "user:a;assistant:b;user:c\nd;assistant:b;"


def test_a_bad_row_is_named_as_everywhere_else(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r'^rows\.jsonl:2: message 1, from "user", has no text'):
        calibration_text(TOKENIZER, [rows(tmp_path / "rows.jsonl", "a", "")], 2)
