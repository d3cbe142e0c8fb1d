from __future__ import annotations

import json
from pathlib import Path

import pytest
from web4lora_chassis.dataset import Problem, Row, check_rows, problems_error, read_dataset, repetitions
from web4lora_chassis.errors import InvalidInput, NotFound

USER = {"role": "user", "content": "Stop agent maple."}
ANSWER = {"role": "assistant", "content": '{"tool": "stop_agent"}'}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), "utf-8")
    return path


def chat(*messages: object, **more: object) -> dict[str, object]:
    return {"messages": list(messages), **more}


def test_good_rows_keep_their_lines_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    path = write(
        tmp_path / "a.jsonl", chat(USER, ANSWER, id="x", core="tool"), "", chat(system, USER, ANSWER)
    )
    first, second = check_rows(path, "a.jsonl")
    assert isinstance(first, Row)
    assert isinstance(second, Row)
    assert (first.id, first.core, first.place) == ("x", "tool", "a.jsonl:1")
    assert second.place == "a.jsonl:3"
    assert second.messages[0].to_json() == system


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"messages": x}', "not JSON at column 14"),
        ("[]", "a list, not an object"),
        ("3", "a number, not an object"),
        ('"x"', "text, not an object"),
        ("[" * 100_000, "nested too deeply"),
        ({}, '"messages" is missing'),
        ({"messages": []}, '"messages" is missing, empty or not a list'),
        ({"messages": "hi"}, '"messages" is missing, empty or not a list'),
        ({"conversations": []}, 'rename it to "messages"'),
        ({"prompt": "a", "completion": "b"}, 'there is "prompt"'),
        (chat(USER, ANSWER, id=3), '"id" is a number, not text'),
        (chat(USER, ANSWER, core=None), '"core" is null, not text'),
        (chat("hi", ANSWER), 'message 1 has no "role"'),
        (chat({"role": "bot", "content": "x"}, ANSWER), 'message 1 has the role "bot"'),
        (chat(USER, {"role": "assistant", "content": ""}), 'message 2, from "assistant", has no text'),
        (chat(USER, {"role": "assistant", "content": " \n"}), "has no text"),
        (chat(USER, {"role": "assistant", "content": None}), "has no text"),
        (chat(USER, {"role": "assistant", "tool_calls": [{}]}), '"tool_calls", which are not trained on'),
        (chat(USER, {"role": "assistant", "content": "\ud800"}), "half a character"),
        (chat(USER, {"role": "assistant", "content": "a\x00"}), "holds a NUL"),
        (chat(USER, ANSWER, id="\ud800"), '"id" holds'),
        (chat(USER), 'the last message is from "user"'),
        (chat(ANSWER), "follows no user"),
        (chat(USER, USER, ANSWER), "second user message in a row"),
        (chat(USER, ANSWER, ANSWER), "follows no user"),
        (chat(USER, {"role": "system", "content": "x"}, ANSWER), "put the one system message first"),
    ],
)
def test_a_bad_row_is_one_problem_with_its_line(tmp_path: Path, row: object, said: str) -> None:
    path = write(tmp_path / "a.jsonl", chat(USER, ANSWER), row, chat(USER, ANSWER))
    items = list(check_rows(path))
    assert [type(item) for item in items] == [Row, Problem, Row]
    text = str(items[1])
    assert text.startswith(f"{path}:2: ")
    assert said in text
    assert "\n" not in text
    text.encode("utf-8")  # can be printed


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"messages": "\xff"}\n')
    [problem] = check_rows(path)
    assert "not UTF-8 at byte 15" in str(problem)


def test_a_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(chat(USER, ANSWER)).encode())
    [row] = check_rows(path)
    assert isinstance(row, Row)


def test_a_huge_line_is_skipped_without_losing_count(tmp_path: Path) -> None:
    huge = chat({"role": "user", "content": "x" * (9 << 20)}, ANSWER)
    path = write(tmp_path / "a.jsonl", huge, chat(USER, ANSWER))
    problem, row = check_rows(path)
    assert "longer than 4 MiB" in str(problem)
    assert isinstance(row, Row)
    assert row.line == 2


def test_ids_are_unique_over_all_files(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", chat(USER, ANSWER, id="a"))
    two = write(tmp_path / "two.jsonl", chat(USER, ANSWER, id="a"))
    ids: dict[str, str] = {}
    assert all(isinstance(item, Row) for item in check_rows(one, "one.jsonl", ids))
    [problem] = check_rows(two, "two.jsonl", ids)
    assert 'the id "a" was used at one.jsonl:1' in str(problem)


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"gone\.jsonl can't be read"):
        list(check_rows(tmp_path / "gone.jsonl"))


def test_the_error_shows_twenty_problems_and_counts_the_rest() -> None:
    problems = [Problem("a.jsonl", line, "bad", "fix it") for line in range(1, 31)]
    error = problems_error(problems, "Nothing was trained.")
    lines = error.message.splitlines()
    assert lines[0] == "a.jsonl:1: bad; fix it"
    assert lines[19] == "a.jsonl:20: bad; fix it"
    assert lines[20] == "… and 10 more"
    assert lines[21] == "30 problems in the dataset. Nothing was trained."
    assert error.metadata["problems"] == "30"


def test_reading_a_dataset_stops_at_bad_rows_of_any_file(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", chat(USER, ANSWER))
    bad = write(tmp_path / "bad.jsonl", chat(USER))
    with pytest.raises(InvalidInput, match=r"bad\.jsonl:1"):
        read_dataset([good], [bad])
    with pytest.raises(InvalidInput, match="there is no row to train on"):
        read_dataset([write(tmp_path / "empty.jsonl")])


def test_reading_a_dataset_counts_cores_and_warns_of_leaks(tmp_path: Path) -> None:
    other = {"role": "user", "content": "Start agent maple."}
    train = write(tmp_path / "t.jsonl", chat(USER, ANSWER, core="tool"), chat(other, ANSWER))
    held_out = write(tmp_path / "e.jsonl", chat(USER, ANSWER))
    data = read_dataset([train], [held_out])
    assert (len(data.train), len(data.held_out)) == (2, 1)
    assert data.rows_by_core == {"tool": 1}
    assert data.warnings == (
        "e.jsonl:1: held out, but the same user text is trained on at t.jsonl:1; "
        "a score on it says nothing about new questions",
    )


def test_a_row_may_hold_several_turns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", chat(USER, ANSWER, {"role": "user", "content": "More?"}, ANSWER))
    [row] = check_rows(path)
    assert isinstance(row, Row)
    assert [message.role for message in row.messages] == ["user", "assistant", "user", "assistant"]


def test_repetitions_tell_same_questions_from_same_rows(tmp_path: Path) -> None:
    another = {"role": "assistant", "content": "No."}
    path = write(tmp_path / "a.jsonl", chat(USER, ANSWER), chat(USER, ANSWER), chat(USER, another))
    rows = [item for item in check_rows(path, "a.jsonl") if isinstance(item, Row)]
    same, other = repetitions(rows, [])
    assert same.message == "the same user text and the same answer as a.jsonl:1"
    assert other.message == "the same user text as a.jsonl:1"
