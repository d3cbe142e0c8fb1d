"""Gateways with homes of their own on one PostgreSQL: whom one knows, all know."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from web4lora_chassis.errors import AlreadyExists, Unauthenticated
from web4lora_chassis.principals import Principals, Scope
from web4lora_gateway.database import open_database
from web4lora_gateway.people import People


def homes(tmp_path: Path) -> list[Principals]:
    for name in "ab":
        (tmp_path / name).mkdir()
    return [Principals(tmp_path / name) for name in "ab"]


def test_who_is_added_rotated_or_revoked_at_one_gateway_is_so_at_all(postgresql: str, tmp_path: Path) -> None:
    async def main() -> None:
        here, there = homes(tmp_path)
        _, before = here.add("ann", Scope.RUN)  # while there was one gateway
        people = [People(open_database(postgresql), each) for each in (here, there)]
        for each in people:
            await each.join()
        await people[1].look()
        assert there.check(before).name == "ann"
        _, token = there.rotate("ann")
        bob, _ = there.add("bob", Scope.READ)
        with pytest.raises(AlreadyExists):  # here it is not known yet
            here.add("bob", Scope.READ)
        await people[0].look()
        assert here.check(token).name == "ann"
        with pytest.raises(Unauthenticated):
            here.check(before)
        assert bob in here.all()
        here.revoke("ann")
        await people[1].look()
        with pytest.raises(Unauthenticated, match="revoked"):
            there.check(token)

    asyncio.run(main())


def test_two_of_one_name_stay_two_and_are_revoked_one_after_the_other(
    postgresql: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        here, there = homes(tmp_path)
        tokens = [each.add("ann", Scope.RUN)[1] for each in (here, there)]
        people = [People(open_database(postgresql), each) for each in (here, there)]
        for each in [*people, *people]:
            await each.join()
            await each.look()
        assert caplog.text.count("two principals are called ann") == 1
        assert [each.check(token).name for each in (here, there) for token in tokens] == ["ann"] * 4
        assert {each.id for each in here.all()} == {each.id for each in there.all()}
        for _ in tokens:
            there.revoke("ann")
        await people[0].look()
        for token in tokens:
            with pytest.raises(Unauthenticated, match="revoked"):
                here.check(token)

    asyncio.run(main())
