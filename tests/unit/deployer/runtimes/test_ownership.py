from pathlib import Path

import pytest
from web4lora_chassis.errors import FailedPrecondition, Unavailable
from web4lora_chassis.settings import load
from web4lora_deployer.records.deployments import Deployments
from web4lora_deployer.runtimes.ownership import Ownership, left_over
from web4lora_deployer.settings import DeployerSettings

from tests.unit.deployer.sample_records import record

ID, NAME = "demo:vaaaaaaaa", "demo:latest"


@pytest.fixture
def settings(tmp_path: Path) -> DeployerSettings:
    return load(DeployerSettings, home=tmp_path)


@pytest.fixture
def there() -> dict[str, str]:
    """What has a name in the runtime, by name."""
    return {}


@pytest.fixture
def own(settings: DeployerSettings, there: dict[str, str]) -> Ownership:
    return Ownership(settings, "ollama", "Ollama", "ollama rm {}", lambda model: there.get(model, ""))


def refused(own: Ownership, model: str) -> FailedPrecondition:
    with pytest.raises(FailedPrecondition) as caught:
        own.require_ours(model)
    assert caught.value.reason == "NAME_TAKEN"
    assert f"`ollama rm {model}`" in caught.value.fix
    return caught.value


@pytest.mark.parametrize("model", [ID, NAME, "demo:vaaaaaaaa-new"])
def test_what_we_did_not_make_is_neither_moved_nor_deleted(
    own: Ownership, there: dict[str, str], model: str
) -> None:
    there[model] = "theirs"
    refused(own, model)
    with pytest.raises(FailedPrecondition):
        own.move(model, "ours", lambda: pytest.fail("it was moved"))
    own.release(model, lambda _: pytest.fail("it was deleted"))


def test_a_name_is_ours_as_long_as_it_stands_for_what_we_gave_it(
    own: Ownership, there: dict[str, str]
) -> None:
    assert own.move(NAME, "one", lambda: there.update({NAME: "one"}))
    assert own.require_ours(NAME) == "one"
    assert own.move(NAME, "two", lambda: there.update({NAME: "two"}))
    there[NAME] = "one"  # as if somebody had brought the old one back: it is not what we gave the name to
    refused(own, NAME)
    there[NAME] = "two"
    own.release(NAME, there.pop)
    assert NAME not in there
    there[NAME] = "two"  # and once it is given up, it is anybody's
    refused(own, NAME)


@pytest.mark.parametrize("moved", [True, False])
def test_a_name_whose_move_was_killed_is_ours_before_and_behind_it(
    own: Ownership, there: dict[str, str], moved: bool
) -> None:
    own.move(NAME, "one", lambda: there.update({NAME: "one"}))

    def killed() -> None:
        if moved:
            there[NAME] = "two"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        own.move(NAME, "two", killed)
    assert own.require_ours(NAME) == ("two" if moved else "one")
    assert own.move(NAME, "two", lambda: there.update({NAME: "two"}))


def test_a_working_name_lasts_as_long_as_the_work(
    own: Ownership, there: dict[str, str], settings: DeployerSettings
) -> None:
    with own.working(ID, there.pop) as name:
        there[name] = "unknown before it is made"
        assert own.require_ours(name)
    assert not there

    def fails() -> None:
        with own.working(ID, there.pop) as name:
            there[name] = "x"
            raise Unavailable("it went away")

    with pytest.raises(Unavailable):
        fails()
    assert not there

    def out_of_reach(_: str) -> None:
        raise Unavailable("gone")

    with own.working(ID, out_of_reach) as name:
        there[name] = "x"
    assert left_over(settings, "ollama", "demo", {ID}) == [name]
    own.release(name, there.pop)
    assert not there
    assert left_over(settings, "ollama", "demo", {ID}) == []


def test_only_candidates_without_a_record_are_left_over(
    own: Ownership, there: dict[str, str], settings: DeployerSettings
) -> None:
    for model in (ID, "demo:vbbbbbbbb", NAME, "demo-two:vcccccccc"):
        own.move(model, "one", lambda model=model: there.update({model: "one"}))
    assert left_over(settings, "ollama", "demo", {ID}) == ["demo:vbbbbbbbb"]
    assert left_over(settings, "docker", "demo", set()) == []


def test_what_an_earlier_version_made_is_known_by_its_records(
    own: Ownership, there: dict[str, str], settings: DeployerSettings
) -> None:
    deployments = Deployments(settings.deployer_home)
    there.update({ID: "one", NAME: "one"})
    refused(own, ID)
    deployments.save(record("a", target="ollama"))
    assert own.require_ours(ID) == "one"
    refused(own, NAME)  # nothing was promoted to it
    deployments.promote(record("a", target="ollama"))
    assert own.require_ours(NAME) == "one"
    there[NAME] = "theirs"
    refused(own, NAME)
    deployments.save(record("a", target="ollama", endpoint=""))
    refused(own, ID)


def test_a_note_that_can_not_be_read_gives_no_leave(
    own: Ownership, there: dict[str, str], settings: DeployerSettings
) -> None:
    own.move(NAME, "one", lambda: there.update({NAME: "one"}))
    (note,) = (settings.deployer_home / "made" / "ollama").iterdir()
    note.write_text("{")
    refused(own, NAME)
