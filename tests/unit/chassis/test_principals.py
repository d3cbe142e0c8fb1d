from __future__ import annotations

import hashlib
import json
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from web4.lora.v1 import scopes_pb2
from web4lora_chassis.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidInput,
    NotFound,
    Unauthenticated,
)
from web4lora_chassis.principals import PRINCIPALS_FILE, Principals, Scope


def test_the_scopes_are_the_contracts() -> None:
    theirs = {name.removeprefix("SCOPE_"): number for name, number in scopes_pb2.Scope.items() if number}
    assert {scope.name: scope.value for scope in Scope} == theirs


def test_a_token_is_its_principals_and_kept_as_a_hash_alone(tmp_path: Path) -> None:
    people = Principals(tmp_path)
    alice, token = people.add("alice", Scope.RUN)
    _, other = people.add("bob", Scope.READ)
    assert token.startswith(f"w4_{alice.id}_")
    assert len(token.split("_", 2)[2]) == 43  # 256 bits
    assert people.check(token) == alice
    assert people.check(other).name == "bob"
    text = (tmp_path / PRINCIPALS_FILE).read_text()
    assert token not in text
    assert token.split("_", 2)[2] not in text
    assert hashlib.sha256(token.encode()).hexdigest() in text
    assert stat.S_IMODE((tmp_path / PRINCIPALS_FILE).stat().st_mode) == 0o600


def test_what_is_nobodys_token(tmp_path: Path) -> None:
    people = Principals(tmp_path)
    alice, token = people.add("alice", Scope.RUN)
    _, bobs = people.add("bob", Scope.RUN)
    mixed = f"w4_{alice.id}_{bobs.split('_', 2)[2]}"
    for wrong in (
        "",
        "x",
        token[:-1],
        token + "x",
        token.upper(),
        mixed,
        f"w4_{'0' * 12}_{'x' * 43}",
        "w4_é",
    ):
        with pytest.raises(Unauthenticated) as caught:
            people.check(wrong)
        assert caught.value.reason == "TOKEN_UNKNOWN"


def test_expiry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    people = Principals(tmp_path)
    now = time.time()
    _, token = people.add("alice", Scope.RUN, now + 60)
    assert people.check(token).name == "alice"
    monkeypatch.setattr(time, "time", lambda: now + 61)
    with pytest.raises(Unauthenticated, match="alice expired at 20") as caught:
        people.check(token)
    assert caught.value.reason == "TOKEN_EXPIRED"
    _, again = people.rotate("alice", now + 120)
    assert people.check(again).name == "alice"
    with pytest.raises(InvalidInput, match="is past"):
        people.add("bob", Scope.READ, now)


def test_rotation_and_revocation(tmp_path: Path) -> None:
    people = Principals(tmp_path)
    alice, first = people.add("alice", Scope.RUN)
    rotated, second = people.rotate("alice")
    assert (rotated.id, rotated.scope) == (alice.id, Scope.RUN)
    with pytest.raises(Unauthenticated, match="nobody"):
        people.check(first)
    with pytest.raises(Unauthenticated):
        people.require_valid(alice)  # one whose watch began with the first token
    assert people.check(second) == rotated
    gone = people.revoke("alice")
    assert people.revoke("alice") == gone
    with pytest.raises(Unauthenticated) as caught:
        people.check(second)
    assert caught.value.reason == "TOKEN_REVOKED"
    with pytest.raises(FailedPrecondition, match="revoked"):
        people.rotate("alice")
    with pytest.raises(AlreadyExists):
        people.add("alice", Scope.READ)  # else it would own what the first one made
    for change in (people.rotate, people.revoke):
        with pytest.raises(NotFound):
            change("carol")


def test_another_process_sees_a_change_at_once(tmp_path: Path) -> None:
    mine, theirs = Principals(tmp_path), Principals(tmp_path)
    assert theirs.all() == []
    _, token = mine.add("alice", Scope.READ)
    assert theirs.check(token).name == "alice"
    theirs.revoke("alice")
    with pytest.raises(Unauthenticated, match="revoked"):
        mine.check(token)


ADD = """
import sys
from pathlib import Path
from web4lora_chassis.principals import Principals, Scope
for number in range(10):
    Principals(Path(sys.argv[1])).add(f"{sys.argv[2]}{number}", Scope.READ)
"""


def test_two_at_once_lose_nothing(tmp_path: Path) -> None:
    workers = [subprocess.Popen([sys.executable, "-c", ADD, tmp_path, name]) for name in "ab"]
    assert [worker.wait() for worker in workers] == [0, 0]
    assert len(Principals(tmp_path).all()) == 20


@pytest.mark.parametrize(
    "name",
    ["", "A", "1a", "-a", "a-", "a--b", "a b", "a/b", "é", "a" * 64, "admin", "gateway", "local"],
)
def test_what_is_no_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput):
        Principals(tmp_path).add(name, Scope.READ)
    assert not (tmp_path / PRINCIPALS_FILE).exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"form": 2, "principals": []}',
        '{"form": 1, "principals": [{}]}',
        '{"form": 1, "principals": [{"name": "a", "scope": 9}]}',
    ],
)
def test_a_damaged_file_opens_nothing_and_is_not_written_over(tmp_path: Path, text: str) -> None:
    people = Principals(tmp_path)
    _, token = people.add("alice", Scope.ADMIN)
    (tmp_path / PRINCIPALS_FILE).write_text(text)
    for use in (lambda: people.check(token), people.all, lambda: people.add("bob", Scope.READ)):
        with pytest.raises(FailedPrecondition) as caught:
            use()
        assert caught.value.reason == "PRINCIPALS_UNREADABLE"
        assert PRINCIPALS_FILE in caught.value.message
    assert (tmp_path / PRINCIPALS_FILE).read_text() == text


def test_the_file_is_json_that_people_can_read(tmp_path: Path) -> None:
    Principals(tmp_path).add("alice", Scope.RUN)
    data = json.loads((tmp_path / PRINCIPALS_FILE).read_text())
    assert [(each["name"], each["scope"]) for each in data["principals"]] == [("alice", 2)]
