"""What base and adapter say by weights that stay in their files: what Transformers and PEFT say of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from web4lora_chassis.model_files.trained_conversations import Conversation, TrainedConversations, Turn

from tests import tiny_llama

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
TOKENS, START = (*range(10, 40), 4), 20


def test_it_is_what_the_whole_model_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM
    from web4lora_packager import expected
    from web4lora_packager.expected import expect

    monkeypatch.setattr(expected, "_SLICE_WEIGHTS", 70_000)  # the head comes in slices, and so does the MLP
    base = tiny_llama.write_base(tmp_path / "base")
    adapter = tiny_llama.write_adapter(tmp_path / "adapter", base)
    assert expect(base, adapter) == {"likely": []}
    labels = (*[-100] * START, *TOKENS[START:])
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    row = Conversation("f.jsonl", 3, messages, TOKENS, labels, (Turn(1, START, 4),))
    TrainedConversations((row,)).write(adapter)
    (answer,) = expect(base, adapter)["likely"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    whole = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
    with torch.inference_mode():
        wanted = whole(input_ids=torch.tensor([TOKENS])).logits[0, START - 1 : -1].log_softmax(-1)
    assert len(answer) == len(TOKENS) - START
    for place, row_of in zip(answer, wanted, strict=True):
        assert [log for _, log in place] == pytest.approx(
            [float(row_of[token]) for token, _ in place], abs=1e-4
        )
        assert place[0][1] == pytest.approx(float(row_of.max()), abs=1e-4)


def test_a_model_that_can_not_be_asked_so_says_why(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file
    from web4lora_packager.expected import expect

    base = tiny_llama.write_base(tmp_path / "base")
    adapter = tiny_llama.write_adapter(tmp_path / "adapter", base)
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    row = Conversation("f", 1, messages, (5, 4), (-100, 4), (Turn(1, 1, 4),))
    TrainedConversations((row,)).write(adapter)
    tensors = load_file(base / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, base / "model.safetensors")
    assert "the files have no model.norm.weight" in expect(base, adapter)["left_out"]
