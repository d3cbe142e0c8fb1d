"""Base models before the real converter and llama-tokenize: what they don't know is said before training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from web4lora_chassis.dataset import Message, Row
from web4lora_chassis.errors import FailedPrecondition
from web4lora_llamacpp import LlamaCpp, run_converter
from web4lora_trainer.base_model import load_tokenizer
from web4lora_trainer.decoder import read_decoder
from web4lora_trainer.encoding import encode_rows
from web4lora_trainer.token_check import TrainedText, compare_tokens, cut_answers, llama_ends, llama_tokenize
from web4lora_trainer.vocabulary import kept_vocabulary, write_vocabulary

from tests.tiny_base import make_base, make_tokenizer

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    make_base(folder, convertible=True)
    return folder


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def vocabulary(base: Path, llama_cpp: LlamaCpp, tmp_path: Path) -> Path:
    return write_vocabulary(llama_cpp.source, read_decoder(base), "tiny", tmp_path)


def trained(base: Path, text: str, *, add_special_tokens: bool = False) -> TrainedText:
    tokenizer = load_tokenizer(base)
    ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    return TrainedText("rows.jsonl:3", text, tuple(ids))


TEXT = '<|im_start|>user\nAdd 1 to\t 23. Ä 中 {"x"}\\n<|im_end|>\n<|im_start|>assistant\n'


def test_the_same_tokens_pass_and_any_other_is_named(base: Path, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    gguf = vocabulary(base, llama_cpp, tmp_path)
    tokenize, tokenizer = llama_tokenize(llama_cpp.tokenize, gguf), load_tokenizer(base)
    text = trained(base, TEXT)
    assert "1 rows, 1 texts compared" in compare_tokens([text], tokenize, tokenizer)
    other = replace(text, ids=(*text.ids[:5], 299, *text.ids[6:]))
    with pytest.raises(FailedPrecondition, match=r"rows.jsonl:3: .* that differs is number 6") as caught:
        compare_tokens([text, other], tokenize, tokenizer)
    assert caught.value.reason == "TOKENS_DIFFER"
    with pytest.raises(FailedPrecondition, match=r"Training puts <\|im_start\|> in front"):
        compare_tokens([replace(text, ids=(1, *text.ids))], tokenize, tokenizer)
    with pytest.raises(FailedPrecondition, match="no conversation to compare"):
        compare_tokens([], tokenize, tokenizer)


def test_a_vocabulary_is_made_once_for_a_base_and_anew_for_another_tokenizer(
    base: Path, llama_cpp: LlamaCpp, tmp_path: Path
) -> None:
    kept, calls = tmp_path / "kept", tmp_path / "work" / "converter.log"

    def make(source: Path, name: str = "tiny") -> bytes:
        return kept_vocabulary(source, read_decoder(base), name, calls.parent, kept).read_bytes()

    calls.parent.mkdir()
    first = make(llama_cpp.source)
    assert first == vocabulary(base, llama_cpp, tmp_path).read_bytes()
    assert make(tmp_path / "no source") == first
    with pytest.raises(FailedPrecondition):
        make(tmp_path / "no source", "other")
    edit(base / "tokenizer_config.json", add_bos_token=True)
    with pytest.raises(FailedPrecondition):
        make(tmp_path / "no source")
    assert make(llama_cpp.source) != first
    assert len(list(kept.iterdir())) == 2


def test_an_answer_that_llama_cpp_would_cut_short_is_named(
    base: Path, llama_cpp: LlamaCpp, tmp_path: Path
) -> None:
    """llama.cpp ends at <|endoftext|> by its name alone; nothing in the base says so."""
    tokenizer = load_tokenizer(base)
    ends = llama_ends(llama_cpp.tokenize, vocabulary(base, llama_cpp, tmp_path))
    assert {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")} <= ends
    rows = [
        Row("a.jsonl", line, "", "", (Message("user", "one"), Message("assistant", answer)))
        for line, answer in enumerate(("red", "red<|endoftext|>blue", "red<|im_start|>blue"), start=1)
    ]
    (problem,) = cut_answers(encode_rows(rows, tokenizer, 512).rows, ends, tokenizer)
    assert str(problem).startswith("a.jsonl:2: message 2 holds <|endoftext|>, at which")


def test_ends_that_llama_cpp_does_not_tell_are_not_taken_for_none(tmp_path: Path) -> None:
    """What writes its log may be cut off: no answer must not pass for "it ends nowhere"."""
    silent = tmp_path / "llama-tokenize"
    silent.write_text("#!/bin/sh\necho 'print_info: EOG token = 2 x'\n")
    silent.chmod(0o755)
    with pytest.raises(FailedPrecondition, match="does not say at which tokens"):
        llama_ends(silent, tmp_path / "vocabulary.gguf")


def test_blanks_that_special_tokens_eat_are_named(base: Path, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    data = json.loads((base / "tokenizer.json").read_text())
    for entry in data["added_tokens"]:
        entry["rstrip"] = True
    (base / "tokenizer.json").write_text(json.dumps(data))
    tokenize = llama_tokenize(llama_cpp.tokenize, vocabulary(base, llama_cpp, tmp_path))
    with pytest.raises(FailedPrecondition, match=r"kept by llama.cpp, and eaten .* \(rstrip\)"):
        compare_tokens([trained(base, TEXT)], tokenize, load_tokenizer(base))


def test_a_tokenizer_that_llama_cpp_does_not_know_is_said_in_words(
    base: Path, llama_cpp: LlamaCpp, tmp_path: Path
) -> None:
    make_tokenizer(base)
    with pytest.raises(
        FailedPrecondition, match=r"does not know this tokenizer \(pre-tokenizer hash \w{8}…\)"
    ) as caught:
        vocabulary(base, llama_cpp, tmp_path)
    assert "\n" not in caught.value.message


def test_an_architecture_that_llama_cpp_does_not_know_is_said_in_words(
    base: Path, llama_cpp: LlamaCpp, tmp_path: Path
) -> None:
    edit(base / "config.json", architectures=["NobodyForCausalLM"])
    with pytest.raises(FailedPrecondition, match="does not know the architecture NobodyForCausalLM"):
        vocabulary(base, llama_cpp, tmp_path)


@pytest.mark.parametrize("architecture", ["DreamModel", "LlamaForCausalLM"])
def test_the_converter_runs_no_code_of_a_model_and_sees_no_secret(
    base: Path, llama_cpp: LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    """Straight to the converter: what refuses `auto_map` before it is not what is tested."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    ran = tmp_path / "ran"
    code = f"import os\nopen({str(ran)!r}, 'w').write(repr(dict(os.environ)))\nclass Tokenizer: pass\n"
    (base / "LICENSE_tok.py").write_text(code)
    auto_map = {"AutoTokenizer": ["LICENSE_tok.Tokenizer", "LICENSE_tok.Tokenizer"]}
    edit(base / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Tokenizer")
    edit(base / "config.json", architectures=[architecture])
    arguments = [base, "--vocab-only", "--outfile", tmp_path / "out.gguf"]
    lines: list[str] = []
    run_converter(llama_cpp.converter, arguments, log=tmp_path / "log", on_line=lines.append)
    assert not ran.exists()
    assert "secret" not in "\n".join(lines)
