"""What artifacts are kept for, and that whoever takes one over and whoever deletes it see each other."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from web4lora_chassis.artifacts import ArtifactRef
from web4lora_chassis.artifacts.backend import Stored
from web4lora_chassis.artifacts.index import Indexed
from web4lora_gateway.database import DOOMED, RUNS, open_database
from web4lora_gateway.holds import Holds
from web4lora_gateway.needs import Needs

OLD = 1000.0


def artifact(name: str, *inputs: Indexed, kind: str = "gguf", stored_at: float = OLD) -> Indexed:
    digest = (name.encode().hex() * 64)[:64]
    stored = Stored(f"artifacts/{kind}/{name}/{digest[:12]}/manifest.json", 1, stored_at)
    return Indexed(stored, ArtifactRef(kind, name, digest, 1), OLD, tuple(each.ref for each in inputs))


def kept(needs: Needs, *rows: Indexed, new_hours: float = 24) -> dict[str, list[str]]:
    found = needs.kept_for(rows, new_hours)
    return {row.ref.name: found[row.ref.digest] for row in rows if row.ref.digest in found}


def test_what_a_needed_artifact_was_made_from_is_kept_for_the_same() -> None:
    base = artifact("base", kind="base_model")
    adapter = artifact("adapter", base)
    other = artifact("other", base)
    needs = Needs()
    needs.add([adapter.ref.digest], "run_1")
    assert kept(needs, base, adapter, other) == {"base": ["run_1"], "adapter": ["run_1"]}
    needs.add([other.ref.digest], "the deployment demo")
    assert kept(needs, base, adapter, other)["base"] == ["run_1", "the deployment demo"]
    assert kept(Needs(), base, adapter, other) == {}
    needs.add(["f" * 64], "run_2")  # gone: no error
    assert set(kept(needs, base, adapter, other)) == {"base", "adapter", "other"}


def test_what_is_new_stays_and_what_it_was_made_from() -> None:
    base = artifact("base", kind="base_model")
    new = artifact("new", base, stored_at=time.time() - 3600)
    why = ["new: stored 1 h ago, and left alone for 24 h"]
    assert kept(Needs(), base, new) == {"base": why, "new": why}
    assert kept(Needs(), base, new, new_hours=0.5) == {}


def test_what_work_in_progress_may_be_making_stays() -> None:
    base = artifact("base", kind="base_model")
    data = artifact("data", kind="dataset")
    needs = Needs()
    needs.add_work([data.ref.digest], "demo", "run_1, at work")
    needs.bases.append("run_1, at work, whose base model is not known yet")
    made = artifact("made", data)
    named, part, foreign = artifact("demo"), artifact("demo-q4_k_m"), artifact("demonstration")
    found = kept(needs, base, data, made, named, part, foreign)
    assert set(found) == {"base", "data", "made", "demo", "demo-q4_k_m"}
    assert found["made"] == ["made from what run_1, at work uses"]


@pytest.fixture
def engine(tmp_path: Path) -> sa.Engine:
    return open_database(f"sqlite:///{tmp_path / 'gateway.sqlite'}")


def run_row(run_id: str, *, ended: bool) -> dict[str, Any]:
    return {"id": run_id, "request_id": run_id, "created_at": 1.0, "ended": ended, "document": {}}


def test_who_takes_over_sees_who_deletes_and_the_other_way_round(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.execute(
            sa.insert(RUNS).values([run_row("at_work", ended=False), run_row("ended", ended=True)])
        )
    holds = Holds(engine)

    async def main() -> None:
        assert await holds.hold("at_work", ["a" * 64])
        assert await holds.hold("at_work", ["a" * 64]), "a step that is taken again holds the same"
        assert await holds.hold("ended", ["b" * 64])
        assert await holds.held() == {"a" * 64: ["at_work"]}
        await holds.doom(["c" * 64])
        assert not await holds.hold("at_work", ["a" * 64, "c" * 64])
        await holds.spare(["c" * 64])
        assert await holds.hold("at_work", ["c" * 64])

    asyncio.run(main())


def test_a_job_waits_until_what_is_being_deleted_is_gone_but_not_for_what_a_crash_left(
    engine: sa.Engine,
) -> None:
    holds = Holds(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(DOOMED).values(digest="d" * 64, until=time.time() - 1))

    async def main() -> None:
        await asyncio.wait_for(holds.settled(), 10)
        assert await holds.hold("run", ["d" * 64])
        await holds.doom(["e" * 64])
        waiting = asyncio.create_task(holds.settled())
        await asyncio.sleep(0.3)
        assert not waiting.done()
        await holds.doom(["f" * 64])  # begun after it asked: that sweep looks for it
        await holds.spare(["e" * 64])
        await asyncio.wait_for(waiting, 10)

    asyncio.run(main())
