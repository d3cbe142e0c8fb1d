"""Which tokens are trained, with the constructs of the template families that bases come with."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from web4lora_chassis.dataset import Message, Row
from web4lora_chassis.dataset_tools import ToolCall
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.model_files.trained_conversations import IGNORED
from web4lora_trainer.base_model import load_tokenizer
from web4lora_trainer.encoding import Encoded, EncodedRows, encode_rows

from tests.tiny_base import CHATML as TINY_CHATML
from tests.tiny_base import WORDS, make_tokenizer
from tests.unit.chassis.model_files.chat_templates import QWEN_2_5


@dataclass(frozen=True)
class Family:
    """A template, the special tokens it writes, and what it trains of the conversation `TURNS`."""

    template: str
    special: tuple[str, ...]
    eos: str
    trained: tuple[str, ...]
    bos: str = ""
    adds_bos: bool = False
    rstrip: tuple[str, ...] = ()
    rows: int = 1
    config: dict[str, Any] = field(default_factory=dict)


GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    + GENERATION
)
QWEN3 = (
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- set content = m.content %}"
    "{%- if m.role == 'assistant' %}{%- set reasoning = '' %}{%- if '</think>' in content %}"
    "{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or reasoning) %}"
    "{{- '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}"
    "{{- content.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|end_of_sentence|>' }}"
    "{% else %}{{ '<|User|>' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
FAMILIES = {
    "chatml": Family(
        CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", ("red<|im_end|>", "blue one<|im_end|>")
    ),
    "chatml on a base whose eos is another": Family(
        CHATML, ("<|im_start|>", "<|im_end|>", "<|endoftext|>"), "<|endoftext|>",
        ("red<|im_end|>", "blue one<|im_end|>"),
    ),
    "llama 2": Family(
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>"), "</s>", (" red </s>", " blue one </s>"), bos="<s>", adds_bos=True,
    ),
    "llama 3": Family(
        "{% for m in messages %}{% set c = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
        " + m.content | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set c = bos_token + c %}{% endif %}{{ c }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|end_of_text|>", ("red<|eot_id|>", "blue one<|eot_id|>"), bos="<|begin_of_text|>", adds_bos=True,
        rows=2,  # this tokenizer, unlike Llama 3's own, splits "\n\n" before a letter in two
    ),
    "gemma": Family(
        "{{ bos_token }}{% if messages[0].role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>",
        ("red<end_of_turn>", "blue one<end_of_turn>"), bos="<bos>", adds_bos=True,
    ),
    "phi 3": Family(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), "<|endoftext|>",
        ("red<|end|>", "blue one<|end|>"), rstrip=("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    ),
    "deepseek coder": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '### Instruction:\n' + m.content + '\n' }}{% else %}"
        "{{ '### Response:\n' + m.content + '\n<|EOT|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
        ("<|begin|>", "<|EOT|>"), "<|EOT|>", ("red\n<|EOT|>", "blue one\n<|EOT|>"), bos="<|begin|>",
    ),
    "qwen 3": Family(
        QWEN3, ("<|im_start|>", "<|im_end|>"), "<|im_end|>",
        ("<think>\n\n</think>\n\nblue one<|im_end|>", "<think>\n\n</think>\n\nred<|im_end|>"), rows=2,
    ),
    "r1": Family(
        R1, ("<bos>", "<|User|>", "<|Assistant|>", "<|end_of_sentence|>"), "<|end_of_sentence|>",
        ("blue one<|end_of_sentence|>", "red<|end_of_sentence|>"), bos="<bos>", rows=2,
    ),
    "zephyr": Family(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        ("<s>", "</s>"), "</s>", ("red</s>", "blue one</s>"), bos="<s>", adds_bos=True,
    ),
    "mistral": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}"
        "{% endfor %}",
        ("<s>", "</s>"), "</s>", (" red</s>", " blue one</s>"), bos="<s>", adds_bos=True,
    ),
    "harmony": Family(
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
        "{{ ('<|return|>' if loop.last else '<|end|>') }}{% else %}"
        "{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"), "<|return|>",
        ("<|channel|>final<|message|>blue one<|return|>", "<|channel|>final<|message|>red<|return|>"), rows=2,
    ),
    "no token behind an answer": Family(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        ("<eos>",), "<eos>", ("blue one\n<eos>", "red\n<eos>"), rows=2,
    ),
    "the generation tag": Family(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
        "{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}" + GENERATION,
        ("<|im_start|>", "<|im_end|>"), "<|im_end|>", ("red<|im_end|>", "blue one<|im_end|>"),
    ),
}  # fmt: skip
TURNS = (("user", "one"), ("assistant", "red"), ("user", "two"), ("assistant", "blue one"))


def row(*turns: tuple[str, str], line: int = 1) -> Row:
    return Row("a.jsonl", line, "", "", tuple(Message(role, content) for role, content in turns))


def make(folder: Path, family: Family, *, blank_before_pieces: bool = False) -> Any:
    """Write a family's tokenizer and load it as training does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if blank_before_pieces:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        first = ["<unk>", *(f"<0x{number:02X}>" for number in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=first, show_progress=False)
        tokenizer.train_from_iterator([w for text in WORDS for w in text.split()], trainer)
        data = json.loads(tokenizer.to_str())
        data["added_tokens"] = []
        tokenizer = Tokenizer.from_str(json.dumps(data))
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator([*WORDS, "\n\n", "a: red", ": red"], trainer)
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, rstrip=text in family.rstrip) for text in family.special]
    )
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": family.eos,
        "add_bos_token": family.adds_bos, "clean_up_tokenization_spaces": False, **family.config,
    }  # fmt: skip
    if family.bos:
        config["bos_token"] = family.bos
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text(family.template)
    return load_tokenizer(folder)


def trained(encoded: Encoded, tokenizer: Any) -> list[str]:
    """Return the text of each stretch of labels."""
    found: list[list[int]] = []
    before = IGNORED
    for label in encoded.labels:
        if label != IGNORED:
            if before == IGNORED:
                found.append([])
            found[-1].append(label)
        before = label
    return [tokenizer.decode(ids) for ids in found]


def served(tokenizer: Any, messages: Any, family: Family) -> list[int]:
    """Return the prompt's tokens as a runtime makes them: its BOS once, then the text of the template."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if not family.adds_bos:
        return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
    rest = re.sub(rf"\A{re.escape(family.bos)}", "", text)
    ids = tokenizer.backend_tokenizer.encode(rest, add_special_tokens=False).ids
    return [tokenizer.convert_tokens_to_ids(family.bos), *ids]


def hold_against_serving(rows: EncodedRows, tokenizer: Any, family: Family) -> None:
    for encoded in rows.rows:
        counted = 0
        for turn in encoded.turns:
            messages = [message.to_json() for message in encoded.messages[: turn.messages]]
            prompt = served(tokenizer, messages, family)
            assert list(encoded.input_ids[: turn.prompt_tokens]) == prompt
            stop = encoded.input_ids.index(turn.stop_token, turn.prompt_tokens)
            assert list(encoded.labels[turn.prompt_tokens : stop + 1]) == list(
                encoded.input_ids[turn.prompt_tokens : stop + 1]
            )
            counted += stop + 1 - turn.prompt_tokens
        assert counted == encoded.trained_tokens, "nothing but answers has labels"
        assert encoded.labels[-1] == encoded.turns[-1].stop_token


@pytest.mark.parametrize("name", FAMILIES)
def test_every_answer_is_trained_behind_what_is_served(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    tokenizer = make(tmp_path, family)
    rows = encode_rows([row(*TURNS)], tokenizer, 512)
    assert [text for encoded in rows.rows for text in trained(encoded, tokenizer)] == list(family.trained)
    assert (rows.answers, len(rows.rows)) == (2, family.rows)
    hold_against_serving(rows, tokenizer, family)


@pytest.mark.parametrize("name", ["llama 2", "llama 3", "gemma", "zephyr", "mistral"])
def test_a_tokenizer_that_adds_bos_has_it_once_whatever_the_template_writes(
    name: str, tmp_path: Path
) -> None:
    family = FAMILIES[name]
    tokenizer = make(tmp_path, family)
    [encoded] = encode_rows([row(*TURNS[:2])], tokenizer, 512).rows
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 1
    assert encoded.input_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("name", ["zephyr", "llama 2", "mistral", "chatml"])
def test_a_tokenizer_with_a_blank_before_pieces_trains_no_blank(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    tokenizer = make(tmp_path, family, blank_before_pieces=True)
    rows = encode_rows([row(*TURNS)], tokenizer, 512)
    assert rows.answers == 2
    hold_against_serving(rows, tokenizer, family)
    for encoded in rows.rows:
        for turn in encoded.turns:
            answer = tokenizer.decode(encoded.input_ids[: turn.prompt_tokens + 3])
            prompt = tokenizer.decode(encoded.input_ids[: turn.prompt_tokens])
            assert answer.startswith(prompt)
            assert not answer.removeprefix(prompt).startswith("  ")


REASONED = (
    ("user", "one"), ("assistant", "<think>\nno\n</think>\n\nred"),
    ("user", "two"), ("assistant", "<think>\nyes\n</think>\n\nblue"),
)  # fmt: skip


def test_reasoning_that_the_prompt_opens_goes_on_from_there(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, FAMILIES["r1"])
    rows = encode_rows([row(*REASONED)], tokenizer, 512)
    texts = [tokenizer.decode(encoded.input_ids) for encoded in rows.rows]
    assert texts == [
        "<bos><|User|>one<|Assistant|>\n\nred<|end_of_sentence|><|User|>two<|Assistant|><think>\n"
        "yes\n</think>\n\nblue<|end_of_sentence|>",
        "<bos><|User|>one<|Assistant|><think>\nno\n</think>\n\nred<|end_of_sentence|>",
    ]
    assert (rows.answers, rows.answers_rewritten, rows.answers_left_open) == (2, 2, 0)
    hold_against_serving(rows, tokenizer, FAMILIES["r1"])
    assert encode_rows([row(*TURNS)], tokenizer, 512).answers_left_open == 2


def test_reasoning_that_the_template_keeps_in_the_last_answer_alone(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, FAMILIES["qwen 3"])
    rows = encode_rows([row(*REASONED)], tokenizer, 512)
    assert [trained(encoded, tokenizer) for encoded in rows.rows] == [
        ["<think>\nyes\n</think>\n\nblue<|im_end|>"], ["<think>\nno\n</think>\n\nred<|im_end|>"],
    ]  # fmt: skip
    assert rows.answers_rewritten == 0
    hold_against_serving(rows, tokenizer, FAMILIES["qwen 3"])


def test_reasoning_that_the_template_would_drop_is_trained_as_written(tmp_path: Path) -> None:
    template = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
    family = Family(template, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", ())
    tokenizer = make(tmp_path, family)
    rows = encode_rows([row(*REASONED[:2])], tokenizer, 512)
    assert trained(rows.rows[0], tokenizer) == ["<think>\nno\n</think>\n\nred<|im_end|>"]
    assert rows.answers_rewritten == 1
    hold_against_serving(rows, tokenizer, family)


def test_reasoning_where_the_prompt_has_closed_it_is_refused(tmp_path: Path) -> None:
    template = CHATML.replace("assistant\n'", "assistant\n<think>\n\n</think>\n\n'")
    tokenizer = make(tmp_path, Family(template, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", ()))
    plain = encode_rows([row(*TURNS)], tokenizer, 512)
    assert {text for encoded in plain.rows for text in trained(encoded, tokenizer)} == {
        "red<|im_end|>", "blue one<|im_end|>",
    }  # fmt: skip
    with pytest.raises(InvalidInput, match=r"a\.jsonl:1: message 2 begins with <think>, which the base's"):
        encode_rows([row(*REASONED)], tokenizer, 512)


def test_letters_that_merge_across_the_border_are_trained_as_a_model_can_write_them(tmp_path: Path) -> None:
    family = FAMILIES["no token behind an answer"]
    tokenizer = make(tmp_path, family)
    [encoded] = encode_rows([row(*TURNS[:2])], tokenizer, 512).rows
    whole = tokenizer("user: one\nassistant: red\n")["input_ids"]
    [turn] = encoded.turns
    assert list(encoded.input_ids[: turn.prompt_tokens]) != whole[: turn.prompt_tokens], "they do merge"
    hold_against_serving(encode_rows([row(*TURNS)], tokenizer, 512), tokenizer, family)


def test_rows_that_the_template_refuses_are_named_with_its_words_and_a_remedy(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, FAMILIES["gemma"])
    good, bad = row(*TURNS), [row(("system", "yes"), *TURNS, line=line) for line in range(5, 29)]
    with pytest.raises(InvalidInput) as caught:
        encode_rows([good, *bad], tokenizer, 512)
    assert caught.value.message.splitlines() == [
        "a.jsonl:5: the base's chat template refuses it: System role not supported; put the system message's "
        "text at the beginning of the first user message (also line 6, 7, 8 and 20 more)",
        "24 problems in the dataset. Nothing was trained.",
    ]
    assert "another base model" in caught.value.fix


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages[0].content + 3 }}", "can only concatenate str"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{% for m in messages %}{{ m.content }}", "Unexpected end of template"),
        ("{{ 'hi' }}", "does not write the assistant's answers"),
        ("{% for m in messages %}{{ 1 / 0 }}{% endfor %}", "division by zero"),
    ],
)
def test_a_template_that_fails_is_one_line_and_no_defect(template: str, said: str, tmp_path: Path) -> None:
    tokenizer = make(tmp_path, Family(template, ("<eos>",), "<eos>", ()))
    with pytest.raises(InvalidInput, match=said) as caught:
        encode_rows([row(*TURNS, line=line) for line in range(1, 40)], tokenizer, 512)
    told_once = said.startswith("Unexpected")  # of the template as a whole, not of rows
    assert len(caught.value.message.splitlines()) == (1 if told_once else 2)


def test_an_answer_that_holds_its_own_stop_token_is_refused(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, FAMILIES["chatml"])
    with pytest.raises(InvalidInput, match=r"a\.jsonl:1: message 2 holds <\|im_end\|>, at which"):
        encode_rows([row(("user", "one"), ("assistant", "red<|im_end|>blue"))], tokenizer, 512)


@pytest.mark.parametrize(
    ("token", "eos", "generation"),
    [
        ("<|stop|>", "<|im_end|>", True),
        ("<|stop|>", "<|stop|>", False),
    ],
)
def test_an_answer_that_holds_another_token_that_ends_generation_is_refused(
    tmp_path: Path, token: str, eos: str, generation: bool
) -> None:
    tokenizer = make(tmp_path, Family(CHATML, ("<|im_start|>", "<|im_end|>", token), eos, ()))
    if generation:
        ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", token])
        folder = Path(tokenizer.name_or_path)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(InvalidInput, match=rf"a\.jsonl:1: message 2 holds {re.escape(token)}, at which"):
        encode_rows([row(("user", "one"), ("assistant", f"red {token} blue"))], tokenizer, 512)


def test_an_answer_may_hold_a_special_token_that_ends_nothing(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, FAMILIES["chatml"])
    rows = encode_rows([row(("user", "one"), ("assistant", "red<|im_start|>blue"))], tokenizer, 512)
    assert trained(rows.rows[0], tokenizer) == ["red<|im_start|>blue<|im_end|>"]


def test_an_answer_with_a_weight_of_0_has_no_label_and_is_context(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, FAMILIES["chatml"])
    user, red, two, blue = row(*TURNS).messages
    excluded = Row("a.jsonl", 1, "", "", (user, Message("assistant", "red", trained=False), two, blue))
    rows = encode_rows([excluded], tokenizer, 512)
    assert trained(rows.rows[0], tokenizer) == ["blue one<|im_end|>"]
    assert "red" in tokenizer.decode(rows.rows[0].input_ids)
    assert (rows.answers, rows.answers_excluded) == (1, 1)
    hold_against_serving(rows, tokenizer, FAMILIES["chatml"])

    excluded = Row("a.jsonl", 1, "", "", (user, red, two, Message("assistant", "blue", trained=False)))
    rows = encode_rows([excluded], tokenizer, 512)
    assert trained(rows.rows[0], tokenizer) == ["red<|im_end|>"]
    assert "blue" not in tokenizer.decode(rows.rows[0].input_ids), "nothing is learnt from what follows"


def test_answers_that_are_too_long_are_counted_with_their_rows(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, FAMILIES["chatml"])
    long = row(*TURNS, ("user", "one " * 90), ("assistant", "red"))
    rows = encode_rows([row(*TURNS), long], tokenizer, 120)
    assert (rows.answers, rows.rows_too_long, rows.answers_too_long) == (2, 1, 3)


@pytest.mark.parametrize(
    ("post", "config", "expected"),
    [
        ({"type": "ByteLevel"}, {"add_bos_token": True}, False),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, "bos"]}, {}, True),
        ("bos", {"add_bos_token": False}, True),
        (None, {"add_bos_token": True}, True),
        (None, {"add_bos_token": False}, False),
        (None, {}, False),
    ],
)
def test_bos_is_added_where_the_gguf_will_say_so(
    post: Any, config: dict[str, Any], expected: bool, tmp_path: Path
) -> None:
    from web4lora_trainer.encoding import adds_bos

    tokenizer = make(tmp_path, FAMILIES["zephyr"])
    template = {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}],
    }  # fmt: skip
    if isinstance(post, dict) and "processors" in post:
        post["processors"][1] = template
    for name, change in (
        ("tokenizer.json", {"post_processor": template if post == "bos" else post}),
        ("tokenizer_config.json", {"add_bos_token": None, **config}),
    ):
        data = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps({**data, **change}))
    assert adds_bos(tokenizer) is expected


QWEN3_REASONING = QWEN3.replace(
    "{%- set reasoning = '' %}", "{%- set reasoning = m.reasoning_content or '' %}"
)
TOOL = {
    "type": "function",
    "function": {"name": "paint", "description": "", "parameters": {"type": "object", "properties": {}}},
}
PAINTING = (
    Message("user", "red or blue"),
    Message("assistant", "", tool_calls=(ToolCall("paint", {"colour": "red"}, "c1"),)),
    Message("tool", "one two", tool_call_id="c1"),
    Message("assistant", "yes"),
)


def tool_row(*messages: Message) -> Row:
    return Row("a.jsonl", 1, "", "", messages, (TOOL,))


def chatml_base(folder: Path, template: str) -> Any:
    make_tokenizer(folder, template)
    return load_tokenizer(folder)


def test_calls_of_tools_are_trained_as_the_template_writes_them(tmp_path: Path) -> None:
    tokenizer = chatml_base(tmp_path, QWEN_2_5)
    encoded = encode_rows([tool_row(*PAINTING)], tokenizer, 4096)
    trained = [
        tokenizer.decode([label for label in labels if label != IGNORED])
        for labels in (row.labels for row in encoded.rows)
    ]
    call = '<tool_call>\n{"name": "paint", "arguments": {"colour": "red"}}\n</tool_call><|im_end|>'
    # Qwen's own template begins a call with a line break that its prompt has written already.
    assert "".join(trained).replace("<|im_end|>yes", "<|im_end|>|yes").split("|yes")[0] == call
    assert "".join(trained).endswith("yes<|im_end|>")
    for row in encoded.rows:
        text = tokenizer.decode(row.input_ids[: row.turns[0].prompt_tokens])
        assert '<tools>\n{"type": "function", "function": {"name": "paint"' in text
    behind = tokenizer.decode(encoded.rows[-1].input_ids)
    assert "<tool_response>\none two\n</tool_response>" in behind


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (TINY_CHATML, PAINTING, "does not write the row's tools, for example 'paint'"),
        (
            QWEN_2_5.replace("tool_call.arguments | tojson", "''"),
            PAINTING,
            "message 2 calls tools, and the base's chat template does not write 'colour'",
        ),
        (
            QWEN_2_5.replace("{{- message.content }}\n        {{- '\\n</tool", "{{- '</tool"),
            PAINTING,
            "does not write message 3, a tool's result",
        ),
        (
            TINY_CHATML,
            (PAINTING[0], Message("assistant", "yes", reasoning="because")),
            "does not write its reasoning_content",
        ),
    ],
    ids=["no tools", "no arguments", "no results", "no reasoning"],
)  # fmt: skip
def test_what_a_template_leaves_out_of_a_row_is_refused(
    tmp_path: Path, template: str, messages: tuple[Message, ...], said: str
) -> None:
    tools = (TOOL,) if len(messages) > 2 else ()
    with pytest.raises(InvalidInput, match=re.escape(said)):
        encode_rows([Row("a.jsonl", 1, "", "", messages, tools)], chatml_base(tmp_path, template), 4096)


@pytest.mark.parametrize(
    ("template", "trained"),
    [
        (QWEN3_REASONING, "<think>\nbecause\n</think>\n\nyes<|im_end|>"),
        (
            TINY_CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}"),
            "because\n</think>\n\nyes<|im_end|>",
        ),
    ],
    ids=["written by the template", "begun by its prompt"],
)
def test_reasoning_is_trained_in_front_of_its_answer(tmp_path: Path, template: str, trained: str) -> None:
    tokenizer = chatml_base(tmp_path, template)
    row = Row("a.jsonl", 1, "", "", (PAINTING[0], Message("assistant", "yes", reasoning="because")))
    [encoded] = encode_rows([row], tokenizer, 4096).rows
    assert tokenizer.decode([label for label in encoded.labels if label != IGNORED]) == trained
