import pytest
from web4lora_chassis.errors import InvalidInput
from web4lora_deployer.registry import Reference, parse_reference


@pytest.mark.parametrize(
    ("text", "place", "address"),
    [
        (
            "localhost:5000/web4/demo:v1",
            Reference("localhost:5000", "web4/demo", "v1"),
            "http://localhost:5000",
        ),
        ("localhost/demo", Reference("localhost", "demo"), "http://localhost"),
        ("127.0.0.1:5000/demo", Reference("127.0.0.1:5000", "demo"), "http://127.0.0.1:5000"),
        ("[::1]:5000/demo", Reference("[::1]:5000", "demo"), "http://[::1]:5000"),
        ("ghcr.io/me/a__b-c.d:V_1.0", Reference("ghcr.io", "me/a__b-c.d", "V_1.0"), "https://ghcr.io"),
        ("docker.io/me/demo", Reference("docker.io", "me/demo"), "https://registry-1.docker.io"),
        ("10.0.0.7:5000/demo", Reference("10.0.0.7:5000", "demo"), "https://10.0.0.7:5000"),
    ],
)
def test_a_reference_names_registry_repository_and_tag(text: str, place: Reference, address: str) -> None:
    assert parse_reference(text) == place
    assert str(place) == text
    assert place.address(plain_http=False) == address


def test_beyond_this_machine_there_is_tls_unless_it_is_waived() -> None:
    place = parse_reference("10.0.0.7:5000/demo")
    assert place.address(plain_http=True) == "http://10.0.0.7:5000"
    assert not place.loopback


@pytest.mark.parametrize(
    "text",
    [
        "", "demo", "web4/demo:v1", "ghcr.io", "ghcr.io/", "ghcr.io/Me/demo", "ghcr.io/me//demo",
        "ghcr.io/me/demo:", "ghcr.io/me/demo:a b", "ghcr.io/../demo", "user@ghcr.io/demo",
        "https://ghcr.io/me/demo", "ghcr.io/me/demo@sha256:00", f"ghcr.io/{'a' * 256}",
    ],
)  # fmt: skip
def test_what_names_no_place_in_a_registry_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="does not name a place"):
        parse_reference(text)
