from __future__ import annotations

import random

import pytest
from web4lora_chassis.dataset_row import Message, Row
from web4lora_chassis.dataset_split import held_out_rows, near_duplicates
from web4lora_chassis.errors import InvalidInput

WORDS = [
    "agent", "audit", "build", "cache", "deploy", "engine", "filter", "graph", "index", "job",
    "key", "ledger", "memory", "node", "owner", "policy", "quota", "role", "schedule", "token",
    "user", "vault", "worker", "zone",
]  # fmt: skip


def question(seed: int, length: int = 12) -> str:
    chosen = random.Random(seed)
    return " ".join(chosen.choice(WORDS) for _ in range(length))


def row(text: str, core: str = "") -> Row:
    return Row("a.jsonl", 1, "", core, (Message("user", text), Message("assistant", "yes")))


def test_near_duplicates_are_found_and_others_are_not() -> None:
    texts = [question(seed) for seed in range(300)]
    alike = [texts[7] + "!", texts[7].upper().replace(" ", "  "), texts[9].replace("agent", "agents", 1)]
    groups = near_duplicates([*texts, *alike])
    assert sorted(map(sorted, (group for group in groups if len(group) > 1))) == [[7, 300, 301], [9, 302]]


def test_texts_shorter_than_a_run_are_compared_as_a_whole() -> None:
    assert near_duplicates(["a", "b", "A ", ""]) == [[0, 2], [1], [3]]


def test_near_duplicates_stay_on_one_side() -> None:
    rows = [row(f"{question(seed)}{mark}") for seed in range(200) for mark in ("", "?", "!")]
    chosen = held_out_rows(rows, 0.2)
    assert len(chosen) == 120
    assert all(len({place in chosen for place in (at, at + 1, at + 2)}) == 1 for at in range(0, 600, 3))


def test_each_core_gives_its_share_whatever_the_order() -> None:
    rows = [row(question(seed), "tool" if seed % 4 else "style") for seed in range(400)]
    chosen = {rows[place].question for place in held_out_rows(rows, 0.1)}
    assert sum(each.core == "tool" and each.question in chosen for each in rows) == 30
    assert sum(each.core == "style" and each.question in chosen for each in rows) == 10
    turned = rows[::-1]
    assert {turned[place].question for place in held_out_rows(turned, 0.1)} == chosen


@pytest.mark.parametrize("rows", [[row("the same")] * 50, [row("alone")]], ids=["all alike", "one"])
def test_rows_that_can_not_be_parted_are_refused(rows: list[Row]) -> None:
    with pytest.raises(InvalidInput, match=f"0.1 of {len(rows)} rows can't be held out") as raised:
        held_out_rows(rows, 0.1)
    assert raised.value.metadata["field"] == "dataset.eval_share"
