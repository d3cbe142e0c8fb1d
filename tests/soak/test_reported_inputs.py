"""Inputs that users of other tools reported as wrong, through the whole stack.

Each either is refused before training, in one line that names what is wrong and where, or is served as it was
trained: which tokens were trained is read from the record, decoded by the tokenizers library alone.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer
from web4lora_llamacpp import LlamaCpp

from tests import trained_base
from tests.servers.native import Machine
from tests.soak import odd_bases

pytestmark = pytest.mark.timeout(1200)

TOWNS = ("Oslo", "Lima", "Cairo", "Perth", "Quito", "Hanoi")
MATRIX = {"importance_matrix": True, "importance_matrix_chunks": 4}


def question(number: int) -> dict[str, Any]:
    return {"role": "user", "content": f"Note {number}: which town has the code {number % 6}?"}


def answer(number: int) -> dict[str, Any]:
    return {"role": "assistant", "content": f"The town is {TOWNS[number % 6]}, see note {number}."}


def single(number: int) -> dict[str, Any]:
    return {"messages": [question(number), answer(number)]}


def three(number: int) -> dict[str, Any]:
    turns = [turn for each in (number, number + 1, number + 2) for turn in (question(each), answer(each))]
    return {"messages": turns}


def with_system(number: int) -> dict[str, Any]:
    row = single(number)
    if number % 6 == 0:
        row["messages"].insert(0, {"role": "system", "content": "Be short."})
    return row


def thinking(number: int) -> dict[str, Any]:
    said = f"<think>\nAdd {number} to 1.\n</think>\n\nIt is {number + 1}."
    asked = {"role": "user", "content": f"What is {number} plus 1?"}
    return {"messages": [asked, {"role": "assistant", "content": said}]}


def excluded(number: int) -> dict[str, Any]:
    rude = {"role": "assistant", "content": "No idea, go away.", "weight": 0}
    again = {"role": "user", "content": "Look again, please."}
    return {"messages": [question(number), rude, again, {**answer(number), "weight": 1}]}


def cut_short(number: int) -> dict[str, Any]:
    row = single(number)
    row["messages"][1]["content"] += "<|endoftext|> And more." * (number == 3)
    return row


def in_parts(number: int) -> dict[str, Any]:
    row = single(number)
    for message in row["messages"]:
        message["content"] = [{"type": "text", "text": message["content"]}]
    return row


def lines(rows: Sequence[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@dataclass(frozen=True)
class Case:
    """An input, and what it must come to.

    Attributes:
        row: Makes a row of the dataset.
        base: Makes the base.
        refused: What a refusal must say; empty: the run must succeed.
        says: What must be said of it all the same.
        end: What ends an answer in training.
        prompt_has: What answers begin with and the prompt has already.
        package: More keys of `package`.
        pipeline: Name of the pipeline.
        count: Number of rows.
        data: Turns the rows into a file.
    """

    row: Callable[[int], dict[str, Any]] = single
    base: Callable[[Path], Any] = trained_base.write_base
    refused: Sequence[str] = ()
    says: Sequence[str] = ()
    end: str = "<|im_end|>"
    prompt_has: str = ""
    package: dict[str, Any] = field(default_factory=dict)
    pipeline: str = "reported"
    count: int = 24
    data: Callable[[Sequence[Any]], bytes] = lines


def templated(template: str) -> Callable[[Path], Any]:
    return lambda folder: trained_base.write_base(folder, template)


def eat_blanks(folder: Path) -> None:
    trained_base.eat_blanks(trained_base.write_base(folder))


CASES = {
    # hiyouga/LlamaFactory#8217
    "template refuses system": Case(
        row=with_system, base=templated(odd_bases.NO_SYSTEM),
        refused=["rows.jsonl:1", "no system message here"],
    ),
    # hiyouga/LlamaFactory#9189, open-r1#603, trl#4922
    "end of turn is not eos": Case(row=three, base=odd_bases.end_of_turn_is_not_eos),
    # hiyouga/LlamaFactory#6987
    "template opens the thinking": Case(
        row=thinking, base=templated(odd_bases.THINKS), prompt_has="<think>\n", says=["rewrites 24"],
    ),
    "thinking opened and never closed": Case(base=templated(odd_bases.THINKS), says=["<think>"]),
    # NVIDIA-NeMo/RL#2844, and the BOS of ggml-org/llama.cpp#6947
    "blank before each piece": Case(row=three, base=trained_base.write_sentencepiece_base, end="</s>"),
    # abetlen/llama-cpp-python#2225
    "generation tag": Case(base=templated(odd_bases.GENERATION)),
    # ggml-org/llama.cpp#8649
    "unknown pre-tokenizer": Case(base=odd_bases.unknown_pre_tokenizer, refused=["pre-tokenizer"]),
    # huggingface/datasets#8241
    "byte order mark and a matrix": Case(
        count=120, data=lambda rows: b"\xef\xbb\xbf" + lines(rows), package=MATRIX,
    ),
    # unslothai/unsloth#3007
    "name of a type": Case(package={"quantizations": ["Q4_K"]}, refused=["pipeline.yaml:", "Q4_K_M"]),
    "token at which llama.cpp ends": Case(row=cut_short, refused=["rows.jsonl:4", "<|endoftext|>"]),
    # axolotl-ai-cloud/axolotl#1702
    "weight of a turn": Case(row=excluded),
    # oobabooga/textgen#2500
    "an array in place of lines": Case(
        data=lambda rows: json.dumps(rows, indent=1).encode(), refused=["rows.jsonl", "array"],
    ),
    # ollama/ollama#6783
    "name with capitals": Case(pipeline="My_Model", refused=["pipeline.yaml:1", "my-model"]),
    # sgl-project/sglang#32279
    "shard missing": Case(base=odd_bases.shard_missing, refused=["model-00002-of-00002.safetensors"]),
    # Blaizzy/mlx-vlm#245
    "content in parts": Case(row=in_parts),
    # ggml-org/llama.cpp#274
    "context beyond the model": Case(package={"context_tokens": 8192}, refused=["8192", "2048"]),
    # huggingface/transformers#32136
    "special tokens eat blanks": Case(base=eat_blanks, refused=["rows.jsonl:1", "rstrip"]),
    # ggml-org/llama.cpp#11134
    "name that llama.cpp knows": Case(pipeline="phi3-helper"),
}  # fmt: skip


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, llama_cpp: LlamaCpp) -> Iterator[Machine]:
    made = Machine(tmp_path_factory.mktemp("reported"))
    made.run("up")
    yield made
    subprocess.run(made.command("down"), env=made.env, cwd=made.root, capture_output=True, check=False)
    assert made.left_over() == []


@pytest.mark.parametrize("name", CASES)
def test_is_refused_in_words_or_served_as_trained(machine: Machine, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    case.base(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_bytes(case.data([case.row(number) for number in range(case.count)]))
    wanted = {
        "name": case.pipeline,
        "dataset": {"train_files": ["rows.jsonl"]},
        "base": {"model": "./base"},
        "train": {"max_steps": 2, "learning_rate": 1e-3},
        "package": {"quantizations": ["Q8_0"], "context_tokens": 512, **case.package},
        "deploy": {"target": "llama-server", "context_tokens": 512, "parallel": 1},
    }
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(wanted, sort_keys=False))
    done = subprocess.run(
        machine.command("run", "pipeline.yaml"), cwd=tmp_path, env=machine.env, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900, check=False,
    )  # fmt: skip
    (tmp_path / "screen.txt").write_text(done.stdout)
    assert "Traceback" not in done.stdout
    assert "defect" not in done.stdout
    assert (done.returncode != 0) == bool(case.refused)
    flat = " ".join(done.stdout.split())
    assert [words for words in (*case.refused, *case.says) if words not in flat] == []
    if case.refused:
        assert not list(machine.home.glob("trainer/trainings/*/checkpoints/checkpoint-*"))
    else:
        record = json.loads((machine.root / "outputs/latest/trained_conversations.json").read_text())
        tokenizer = Tokenizer.from_file(str(tmp_path / "base" / "tokenizer.json"))
        assert record["conversations"]
        for row in record["conversations"]:
            assert trained_texts(row, tokenizer) == answers(case, row["line"] - 1)


def answers(case: Case, number: int) -> list[str]:
    """Return the answers of a row that count, each as it is to be learnt."""
    messages = case.row(number)["messages"]
    said = [each["content"] for each in messages if each["role"] == "assistant" and each.get("weight", 1)]
    texts = [content if isinstance(content, str) else content[0]["text"] for content in said]
    return [text.removeprefix(case.prompt_has) + case.end for text in texts]


def trained_texts(row: dict[str, Any], tokenizer: Tokenizer) -> list[str]:
    """Return what a conversation's labels say, run by run."""
    runs: list[list[int]] = []
    before = False
    for label in row["labels"]:
        if label != -100:
            if not before:
                runs.append([])
            runs[-1].append(label)
        before = label != -100
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]
