from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from web4lora_chassis.dataset import (
    Message,
    Problem,
    Row,
    check_rows,
    problem_lines,
    problems_error,
    read_dataset,
    repetitions,
    source_formats,
)
from web4lora_chassis.errors import InvalidInput, NotFound

USER = {"role": "user", "content": "Stop agent maple."}
ANSWER = {"role": "assistant", "content": '{"tool": "stop_agent"}'}
TOOL = {"type": "function", "function": {"name": "stop_agent", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "stop_agent", "arguments": '{"agent": "maple"}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "stopped"}


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
    "text", ['{"tool": ""}', '{"tool": "", "args": {}, "x": 1}', '{"tool": "" }, so', '["tool"]']
)
def test_an_answer_that_is_no_tool_call_may_say_what_it_likes(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "a.jsonl", chat(USER, {**ANSWER, "content": text}))
    assert all(isinstance(row, Row) for row in check_rows(path))


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
        ({"conversations": []}, '"messages" is missing, empty or not a list'),
        ({"prompt": "a"}, 'there is "prompt" where "messages" is needed; give the "completion" beside it'),
        ({"prompt": "a", "completion": 3}, '"completion" is a number, not text'),
        ({"prompt": "a", "completion": "b", "rejected": "c"}, 'the row has "rejected"'),
        ({"instruction": "a"}, 'there is "instruction" where "messages" is needed'),
        ({"instruction": "a", "output": ""}, 'message 2, from "assistant", has no text'),
        ({"instruction": "a", "output": "b", "history": [["q"]]}, 'entry 1 of "history" is no question'),
        ({"conversations": [{"value": "x"}]}, 'entry 1 of "conversations" has no "from"'),
        ({"conversations": [{"from": "bing", "value": "x"}]}, 'entry 1 of "conversations" is from "bing"'),
        (
            {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "f()"}]},
            'entry 2 of "conversations" holds no call as JSON',
        ),
        (chat(USER, {**ANSWER, "content": ' {"tool": "", "args": {}}'}), "message 2 calls a tool without a"),
        (chat(USER, {**ANSWER, "content": '{"args": {}, "tool": " "}'}), "message 2 calls a tool without a"),
        (chat(USER, ANSWER, id=3), '"id" is a number, not text'),
        (chat(USER, ANSWER, core=None), '"core" is null, not text'),
        (chat("hi", ANSWER), 'message 1 has no "role"'),
        (chat({"role": "bot", "content": "x"}, ANSWER), 'message 1 has the role "bot"'),
        (chat(USER, {"role": "assistant", "content": ""}), 'message 2, from "assistant", has no text'),
        (chat(USER, {"role": "assistant", "content": " \n"}), "has no text"),
        (chat(USER, {"role": "assistant", "content": None}), "has no text"),
        (
            chat(USER, {"role": "assistant", "tool_calls": [CALL]}),
            'message 2 calls a tool, and the row has no "tools"',
        ),
        (
            chat(USER, {"role": "assistant", "tool_calls": [{}]}, tools=[TOOL]),
            "call 1 of message 2 has no name",
        ),
        (chat(USER, {"role": "assistant", "tool_calls": "f"}, tools=[TOOL]), 'text as its "tool_calls"'),
        (
            chat(USER, {"role": "assistant", "tool_calls": [{"name": "start_agent"}]}, tools=[TOOL]),
            'is of "start_agent", which is none of the row\'s tools; use one of stop_agent',
        ),
        (
            chat(
                USER,
                {"role": "assistant", "tool_calls": [{"name": "stop_agent", "arguments": "x"}]},
                tools=[TOOL],
            ),
            "the arguments of call 1 of message 2 are text that is not JSON",
        ),
        (
            chat(
                USER,
                {"role": "assistant", "tool_calls": [{"name": "stop_agent", "arguments": []}]},
                tools=[TOOL],
            ),
            "call 1 of message 2 has a list as its arguments",
        ),
        (chat({**USER, "tool_calls": [CALL]}, ANSWER, tools=[TOOL]), "only the assistant calls tools"),
        (chat(USER, RESULT, ANSWER, tools=[TOOL]), "message 2, from a tool, follows no call"),
        (
            chat(USER, CALLING, USER, ANSWER, tools=[TOOL]),
            "message 3 comes where the result of a tool call is due",
        ),
        (chat(USER, CALLING, ANSWER, tools=[TOOL]), 'message 3, from "assistant", follows no user'),
        (chat(USER, CALLING, RESULT, USER, ANSWER, tools=[TOOL]), "from the user behind a tool's result"),
        (
            chat(USER, CALLING, {**RESULT, "tool_call_id": "c2"}, ANSWER, tools=[TOOL]),
            'message 3 answers the call "c2", which was not made',
        ),
        (chat(USER, CALLING, RESULT, tools=[TOOL]), 'the last message is from "tool"'),
        (
            chat(USER, CALLING, {**RESULT, "content": ""}, ANSWER, tools=[TOOL]),
            'message 3, from "tool", has no text',
        ),
        (chat(USER, ANSWER, tools={"a": 1}), '"tools" is an object, not a list'),
        (chat(USER, ANSWER, tools="["), '"tools" are text that is not JSON'),
        (chat(USER, ANSWER, tools=[TOOL, TOOL]), "tool 2 has the name of another one"),
        (chat(USER, ANSWER, tools=[{"type": "function"}]), "tool 1 has no name"),
        (chat(USER, ANSWER, tools=[{"name": "f", "parameters": [1]}]), "no schema as parameters"),
        (chat(USER, ANSWER, tools=[{"name": "f", "description": "a\x00"}]), "a tool or a call holds a NUL"),
        (chat(USER, {"role": "assistant", "content": "\ud800"}), "half a character"),
        (chat(USER, {"role": "assistant", "content": "a\x00"}), "holds a NUL"),
        (chat(USER, ANSWER, id="\ud800"), '"id" holds'),
        (chat(USER), 'the last message is from "user"'),
        (chat(ANSWER), "follows no user"),
        (chat(USER, USER, ANSWER), "second user message in a row"),
        (chat(USER, ANSWER, ANSWER), "follows no user"),
        (chat(USER, {"role": "system", "content": "x"}, ANSWER), "put the one system message first"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"messages": [], "meta": ' + "9" * 5_000 + "}", "a number has thousands of digits"),
        ('{"messages": [], "meta": NaN}', "NaN is not JSON"),
        ('{"messages": [], "meta": [-Infinity]}', "-Infinity is not JSON"),
        ('{"messages": [], "messages": []}', 'the key "messages" is there twice'),
        (chat(USER, ANSWER, functions=[{"name": "f"}]), 'write the functions as "tools"'),
        (
            chat(USER, ANSWER, weight=0),
            'the row has "weight", which is not trained on; give each "assistant"',
        ),
        (chat(USER, ANSWER, train=False), 'the row has "train"'),
        (chat(USER, ANSWER, chat_template_kwargs={"enable_thinking": True}), '"chat_template_kwargs"'),
        (
            chat(USER, ANSWER, rejected="no"),
            'the row has "rejected", which is not trained on; put it into "meta"',
        ),
        (chat(USER, ANSWER, **{"\ud800" * 99: 1}), "the row has "),
        (chat(USER, {**ANSWER, "weight": 2}), 'message 2 has the "weight" 2; use 0'),
        (chat(USER, {**ANSWER, "weight": 0.5}), 'message 2 has the "weight" 0.5'),
        (chat(USER, {**ANSWER, "weight": True}), 'message 2 has the "weight" true'),
        (chat(USER, {**ANSWER, "weight": "0"}), 'message 2 has the "weight" "0"'),
        (
            chat(USER, {**ANSWER, "weight": 0}),
            "no answer in it is trained on: every weight is 0; drop the row",
        ),
        (chat(USER, {**ANSWER, "train": 0}), 'a number as its "train"; use true or false'),
        (chat(USER, {**ANSWER, "weight": 1, "train": False}), "contradict each other"),
        (chat({**USER, "weight": 1}, ANSWER), 'message 1, from "user", asks to be trained on'),
        (chat({**USER, "reasoning_content": "hm"}, ANSWER), "only the assistant reasons"),
        (
            chat(USER, {**ANSWER, "reasoning_content": ["hm"]}),
            'message 2 has a list as its "reasoning_content"',
        ),
        (chat(USER, {**ANSWER, "reasoning": "hm", "thinking": "so"}), 'has "reasoning" and "thinking"'),
        (chat({**USER, "name": "ann"}, ANSWER), 'message 1 has "name", which is not trained on'),
        (chat(USER, {**ANSWER, "function_call": {"name": "f"}}), 'write it as "tool_calls"'),
        (chat({**USER, "tool_call_id": "x"}, ANSWER), 'message 1 has "tool_call_id"'),
        (chat({**USER, "images": ["a.png"]}, ANSWER), 'message 1 has "images", which are not trained on'),
        (chat({"role": "x" * 999, "content": "x"}, ANSWER), "message 1 has the role"),
        (
            chat({"role": "user", "content": {"text": "x"}}, ANSWER),
            'message 1 has an object as its "content"',
        ),
        (chat({"role": "user", "content": []}, ANSWER), 'message 1, from "user", has no text'),
        (
            chat({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER),
            'message 1, part 1 of its content, is of the type "image_url"; only text is trained on',
        ),
        (chat({"role": "user", "content": ["x"]}, ANSWER), "part 1 of its content, is no part"),
        (
            chat({"role": "user", "content": [{"type": "text", "text": "x", "image_url": "y"}]}, ANSWER),
            'has "image_url", which is not trained on',
        ),
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
    problems = [Problem("a.jsonl", line, f"bad {line}", "fix it") for line in range(1, 31)]
    error = problems_error(problems, "Nothing was trained.")
    lines = error.message.splitlines()
    assert lines[0] == "a.jsonl:1: bad 1; fix it"
    assert lines[19] == "a.jsonl:20: bad 20; fix it"
    assert lines[20] == "… and 10 more"
    assert lines[21] == "30 problems in the dataset. Nothing was trained."
    assert error.metadata["problems"] == "30"


def test_reading_a_dataset_stops_at_bad_rows_of_any_file(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", chat(USER, ANSWER))
    bad = write(tmp_path / "bad.jsonl", chat(USER))
    with pytest.raises(InvalidInput, match=r"bad\.jsonl:1"):
        read_dataset([good], [bad])
    with pytest.raises(InvalidInput, match="there is no row to train on"):
        read_dataset([])


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
    same, other = repetitions(rows)
    assert same.message == "the same user text and the same answer as a.jsonl:1"
    assert other.message == "the same user text as a.jsonl:1"


def test_keys_that_describe_a_row_or_are_empty_say_nothing(tmp_path: Path) -> None:
    described = chat(
        {**USER, "weight": 0, "name": None}, {**ANSWER, "weight": 1.0, "tool_calls": [], "timestamp": 3},
        meta={"any": "thing"}, source="forum", tags=["a"], prompt_id="7", check={"tool": "x"}, tools=[],
    )  # fmt: skip
    [row] = check_rows(write(tmp_path / "a.jsonl", described))
    assert isinstance(row, Row)
    assert row.messages == (Message("user", USER["content"], trained=False), Message(**ANSWER))


def test_an_answer_with_a_weight_of_0_is_not_trained_on(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        chat(USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}),
        chat(USER, {**ANSWER, "train": False}, USER, ANSWER),
    )
    for row in check_rows(path):
        assert isinstance(row, Row)
        assert [message.trained for message in row.messages] == [True, False, True, True]


def test_content_in_parts_is_joined_as_llama_server_joins_it(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "One."}, {"type": "text", "text": "Two.", "image_url": None}]
    [row] = check_rows(write(tmp_path / "a.jsonl", chat({"role": "user", "content": parts}, ANSWER)))
    assert isinstance(row, Row)
    assert row.messages[0].content == "One.\nTwo."


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "there is no row in it, it is empty"),
        (b"\xef\xbb\xbf", "there is no row in it, it has blank lines only"),
        (b"\n  \r\n\t\n", "there is no row in it, it has blank lines only"),
        (json.dumps([chat(USER, ANSWER)] * 24, indent=1).encode(), "it is one JSON array of 24 rows"),
        (json.dumps([chat(USER, ANSWER)] * 24).encode(), "it is one JSON array of 24 rows"),
        (b"\xef\xbb\xbf\n" + json.dumps([chat(USER, ANSWER)]).encode(), "it is one JSON array of 1 rows"),
        (b'[\n{"messages": []},\n{"messages"', "it is one JSON array, not one row on each line"),
        (b"[" * 5_000_000, "it is one JSON array"),
        (json.dumps(chat(USER, ANSWER), indent=2).encode(), "its rows go over several lines"),
        (
            b"\n".join([json.dumps(chat(USER, ANSWER), indent=2).encode()] * 9),
            "its rows go over several lines",
        ),
        (json.dumps(chat(USER, ANSWER)).encode("utf-16"), "it is UTF-16, not UTF-8"),
        (b"PAR1\x15\x04\x00\x00" * 99 + b"\n" * 99, "it is no text file"),
    ],
)
def test_a_file_without_rows_is_one_problem(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(data)
    [problem] = check_rows(path)
    assert isinstance(problem, Problem)
    assert str(problem).startswith(f"{path}: {said}")
    assert "\n" not in str(problem)
    with pytest.raises(InvalidInput, match=said):
        read_dataset([path])


def test_an_array_becomes_lines_as_the_problem_says(tmp_path: Path) -> None:
    path = tmp_path / "my rows.json"
    path.write_text("\ufeff" + json.dumps([chat(USER, ANSWER), chat(USER, ANSWER)], indent=2), "utf-8")
    [problem] = check_rows(path)
    assert isinstance(problem, Problem)
    command = problem.fix.removeprefix("make lines of it: ").replace("python3", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)  # noqa: S602 - as a user would paste it
    assert len(read_dataset([tmp_path / "rows.jsonl"]).train) == 2


def test_what_is_wrong_with_many_rows_is_one_line() -> None:
    problems = [Problem("a.jsonl", line, "has a key", "leave it out") for line in (3, 5, 7, 9, 11, 13)]
    assert problem_lines([*problems, Problem("b.jsonl", 1, "has a key", "leave it out")]) == [
        "a.jsonl:3: has a key; leave it out (also line 5, 7, 9 and 2 more)",
        "b.jsonl:1: has a key; leave it out",
    ]


PLAIN = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("row", "name", "messages"),
    [
        (chat(*PLAIN), "messages", PLAIN),
        ({"prompt": "a", "completion": "b"}, "prompt and completion", PLAIN),
        ({"prompt": PLAIN[:1], "completion": PLAIN[1:]}, "prompt and completion", PLAIN),
        ({"instruction": "a", "output": "b"}, "Alpaca", PLAIN),
        ({"instruction": "a", "input": "", "output": "b"}, "Alpaca", PLAIN),
        (
            {"instruction": "a", "input": "c", "output": "b", "system": "s", "history": [["q", "r"]]},
            "Alpaca",
            [
                {"role": "system", "content": "s"}, {"role": "user", "content": "q"},
                {"role": "assistant", "content": "r"}, {"role": "user", "content": "a\n\nc"}, PLAIN[1],
            ],
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "id": "x"},
            "ShareGPT",
            PLAIN,
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "function_call", "value": '{"name": "stop_agent", "arguments": {"agent": "x"}}'},
                    {"from": "observation", "value": "done"},
                    {"from": "gpt", "value": "b"},
                ],
                "tools": json.dumps([TOOL["function"]]),
            },
            "ShareGPT",
            [
                PLAIN[0],
                {
                    "role": "assistant", "content": "",
                    "tool_calls": [
                        {"type": "function", "function": {"name": "stop_agent", "arguments": {"agent": "x"}}}
                    ],
                },
                {"role": "tool", "content": "done"},
                PLAIN[1],
            ],
        ),
    ],
)  # fmt: skip
def test_each_form_is_recognised_and_read_as_messages(
    tmp_path: Path, row: dict[str, object], name: str, messages: list[dict[str, object]]
) -> None:
    [read] = check_rows(write(tmp_path / "a.jsonl", row))
    assert isinstance(read, Row)
    assert read.source_format == name
    assert [message.to_json() for message in read.messages] == messages


def test_only_the_completion_is_trained_on(tmp_path: Path) -> None:
    row = {"prompt": [*PLAIN, PLAIN[0]], "completion": PLAIN[1:]}
    [read] = check_rows(write(tmp_path / "a.jsonl", row))
    assert isinstance(read, Row)
    assert [message.trained for message in read.messages] == [True, False, True, True]


def test_tools_calls_and_results_are_read_as_templates_take_them(tmp_path: Path) -> None:
    bare = {"name": "stop_agent", "strict": True, "parameters": {"type": "object"}}
    [row] = check_rows(write(tmp_path / "a.jsonl", chat(USER, CALLING, RESULT, ANSWER, tools=[bare])))
    assert isinstance(row, Row)
    assert row.tools == (
        {
            "type": "function",
            "function": {"name": "stop_agent", "description": "", "parameters": {"type": "object"}},
        },
    )
    called = {**CALL, "function": {"name": "stop_agent", "arguments": {"agent": "maple"}}}
    assert [message.to_json() for message in row.messages[1:3]] == [
        {"role": "assistant", "content": "", "tool_calls": [called]}, RESULT,
    ]  # fmt: skip


def test_reasoning_is_kept_under_its_usual_name(tmp_path: Path) -> None:
    [row] = check_rows(write(tmp_path / "a.jsonl", chat(USER, {**ANSWER, "thinking": "hm"})))
    assert isinstance(row, Row)
    assert row.messages[1].to_json() == {**ANSWER, "reasoning_content": "hm"}


def test_another_form_is_said_for_each_file(tmp_path: Path) -> None:
    alpaca = {"instruction": "a", "output": "b"}
    rows = list(check_rows(write(tmp_path / "a.jsonl", alpaca, chat(USER, ANSWER), alpaca), "a.jsonl"))
    rows += check_rows(write(tmp_path / "b.jsonl", {"prompt": "a", "completion": "b"}), "b.jsonl")
    assert list(source_formats(row for row in rows if isinstance(row, Row))) == [
        "a.jsonl: 2 rows are in the form of Alpaca, read as messages",
        "b.jsonl: 1 row is in the form of prompt and completion, read as messages",
    ]
