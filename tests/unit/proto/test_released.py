"""The contract keeps what the last release promised: rules of buf.yaml, against proto/released.binpb."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROTO = Path(__file__).parents[3] / "proto"
BUF = Path(sys.executable).with_name("buf")


def buf(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BUF, *words], cwd=folder, capture_output=True, text=True, timeout=60)


def breaks(folder: Path, against: Path) -> str:
    """Return what buf says of a contract; empty when it keeps the other one."""
    done = buf(folder, "breaking", "--against", str(against))
    assert done.returncode == (100 if done.stdout else 0), done.stderr
    return done.stdout


@pytest.fixture
def changed(tmp_path: Path):
    """Record the contract as it is, change a copy, and return what the copy breaks."""

    def change(file: str, *replacements: tuple[str, str]) -> str:
        shutil.copytree(PROTO, tmp_path / "proto")
        recorded = tmp_path / "recorded.binpb"
        built = buf(PROTO, "build", "--exclude-source-info", "--as-file-descriptor-set", "-o", str(recorded))
        assert built.returncode == 0, built.stderr
        place = tmp_path / "proto" / "web4" / "lora" / "v1" / file
        text = place.read_text("utf-8")
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new, 1)
        place.write_text(text, "utf-8")
        return breaks(tmp_path / "proto", recorded)

    return change


def test_the_contract_keeps_the_last_release_s_promises() -> None:
    assert breaks(PROTO, PROTO / "released.binpb") == ""


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("artifacts.proto", "  int64 size_bytes = 4;\n", "", "without reserving the number"),
        ("artifacts.proto", "int64 size_bytes = 4;", "int64 size_bytes = 5;", "without reserving"),
        ("artifacts.proto", "int64 size_bytes = 4;", "int32 size_bytes = 4;", "changed type"),
        ("artifacts.proto", "int64 size_bytes = 4;", "int64 bytes = 4;", "changed name"),
        ("artifacts.proto", "int64 size_bytes = 4;", "repeated int64 size_bytes = 4;", "changed cardinality"),
        ("artifacts.proto", "ARTIFACT_KIND_SUITE = 7;", "ARTIFACT_KIND_SUITE = 8;", "without reserving"),
        (
            "gateway.proto",
            "  rpc WatchRun(WatchRunRequest) returns (stream WatchRunResponse) {\n"
            "    option (scope) = SCOPE_READ;\n  }\n",
            "",
            "deleted",
        ),
        ("gateway.proto", "(stream WatchRunResponse)", "(WatchRunResponse)", "streaming"),
    ],
)
def test_what_breaks_clients_is_found(changed, file: str, old: str, new: str, says: str) -> None:
    assert says in changed(file, (old, new))


def test_a_field_that_is_reserved_may_go(changed) -> None:
    reserved = '  reserved 4;\n  reserved "size_bytes";\n'
    assert changed("artifacts.proto", ("  int64 size_bytes = 4;\n", reserved)) == ""


def test_what_is_new_breaks_nothing(changed) -> None:
    new = "int64 size_bytes = 4;\n  // New.\n  string new = 5;"
    assert changed("artifacts.proto", ("int64 size_bytes = 4;", new)) == ""
