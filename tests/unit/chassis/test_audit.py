from __future__ import annotations

import json
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from web4lora_chassis.audit import AuditLog

CALL = {
    "principal": "alice", "on_behalf_of": "", "call": "web4.lora.v1.GatewayService/CreateRun",
    "resource": "run_1", "result": "OK", "peer": "ipv4:127.0.0.1:1", "request_id": "é", "skipped": 0,
}  # fmt: skip


def fill(folder: Path, lines: int, **how: int) -> AuditLog:
    log = AuditLog(folder, "gateway", **how)
    for number in range(lines):
        log.append(**{**CALL, "resource": f"run_{number + 1}"})
    return log


def test_lines_are_numbered_chained_and_private(tmp_path: Path) -> None:
    log = fill(tmp_path / "audit", 3)
    entries = list(log.entries())
    assert [entry.number for entry in entries] == [3, 2, 1]
    assert entries[0].resource == "run_3"
    assert entries[0].request_id == "é"
    found = log.verify()
    assert (found.entries, found.first_number, found.problems) == (3, 1, ())
    for path in (tmp_path / "audit").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_empty_log_is_whole(tmp_path: Path) -> None:
    found = AuditLog(tmp_path, "gateway").verify()
    assert (found.entries, found.problems) == (0, ())


def test_another_process_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    fill(tmp_path, 2)
    assert AuditLog(tmp_path, "gateway").verify().problems == ()
    assert [entry.number for entry in AuditLog(tmp_path, "gateway").entries()] == [4, 3, 2, 1]


APPEND = """
import json, sys
from pathlib import Path
from web4lora_chassis.audit import AuditLog
for _ in range(50):
    AuditLog(Path(sys.argv[1]), "gateway").append(**json.loads(sys.argv[2]))
"""


def test_two_at_once_break_no_chain(tmp_path: Path) -> None:
    command = [sys.executable, "-c", APPEND, str(tmp_path), json.dumps(CALL)]
    workers = [subprocess.Popen(command) for _ in range(2)]
    assert [worker.wait() for worker in workers] == [0, 0]
    found = AuditLog(tmp_path, "gateway").verify()
    assert (found.entries, found.problems) == (100, ())


def _without(*numbers: int) -> Callable[[list[str]], list[str]]:
    return lambda lines: [line for index, line in enumerate(lines, 1) if index not in numbers]


def _renamed(lines: list[str]) -> list[str]:
    return [line.replace("alice", "bobby") if index == 2 else line for index, line in enumerate(lines)]


def _swapped(lines: list[str]) -> list[str]:
    return [lines[1], lines[0], *lines[2:]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_without(3), "line 3 is missing"),
        (_without(2, 3), "lines 2 to 3 are missing"),
        (_without(1), "line 1 is missing at the beginning"),
        (_without(5), "line 5 is missing at the end"),
        (_without(1, 2, 3, 4, 5), "lines 1 to 5 are missing at the end"),
        (_renamed, "gateway.jsonl:3: line 3 was changed"),
        (_swapped, "the numbers go back"),
        (lambda lines: [*lines[:2], "rubbish", *lines[2:]], "gateway.jsonl:3: this is no line"),
    ],
)
def test_what_was_changed_or_removed_is_seen(
    tmp_path: Path, change: Callable[[list[str]], list[str]], said: str
) -> None:
    log = fill(tmp_path, 5)
    path = tmp_path / "gateway.jsonl"
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))
    assert any(said in problem for problem in log.verify().problems), log.verify()


def test_a_line_forged_with_its_own_hash_does_not_follow(tmp_path: Path) -> None:
    log = fill(tmp_path / "a", 3)
    other = fill(tmp_path / "b", 3)  # the same calls at another time
    lines = (tmp_path / "a" / "gateway.jsonl").read_text().splitlines()
    lines[1] = (tmp_path / "b" / "gateway.jsonl").read_text().splitlines()[1]
    assert other.verify().problems == ()
    (tmp_path / "a" / "gateway.jsonl").write_text("\n".join(lines) + "\n")
    assert any("does not follow" in problem for problem in log.verify().problems)


def test_full_files_are_kept_in_turn_and_the_chain_goes_on(tmp_path: Path) -> None:
    log = fill(tmp_path, 40, file_bytes=1500, files_kept=3)
    names = sorted(path.name for path in tmp_path.glob("*.jsonl"))
    assert names == ["gateway.1.jsonl", "gateway.2.jsonl", "gateway.3.jsonl", "gateway.jsonl"]
    found = log.verify()
    assert found.problems == ()
    assert found.first_number == 40 - found.entries + 1 > 1
    assert [entry.number for entry in log.entries()] == list(range(40, found.first_number - 1, -1))
    (tmp_path / "gateway.2.jsonl").unlink()
    assert any("missing" in problem for problem in log.verify().problems)


def test_a_process_killed_between_line_and_head_loses_nothing(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    head = (tmp_path / "gateway.head.json").read_text()
    fill(tmp_path, 1)
    (tmp_path / "gateway.head.json").write_text(head)
    assert AuditLog(tmp_path, "gateway").verify().problems == ()
    log = fill(tmp_path, 1)
    assert (log.verify().entries, log.verify().problems) == (4, ())


def test_after_a_line_that_was_cut_off_the_log_goes_on_and_says_so(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    with (tmp_path / "gateway.jsonl").open("a") as file:
        file.write('{"number": 3, "tim')
    log = fill(tmp_path, 1)
    assert [entry.number for entry in log.entries()] == [3, 2, 1]
    assert log.verify().problems == ("gateway.jsonl:3: this is no line of an audit log",)


def test_lines_are_json_for_other_programs(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    line = json.loads((tmp_path / "gateway.jsonl").read_text())
    assert line.keys() == {*CALL, "number", "time", "previous", "hash"}
