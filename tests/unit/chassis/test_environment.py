"""What children get of our environment, told by the children themselves."""

from __future__ import annotations

import ast
import asyncio
import json
import sys
from pathlib import Path

import pytest
from web4lora.stack import SERVICES, Stack
from web4lora_chassis import process
from web4lora_chassis.environment import STORE_KEY, environment, is_secret
from web4lora_chassis.jobs import JobRunner
from web4lora_chassis.settings import Settings

ROOT = Path(__file__).parents[3]
PRINT = "import json, os; print(json.dumps(dict(os.environ)))"
SECRETS = {
    "WEB4LORA_TOKEN", "WEB4LORA_TOKEN_FILE", "WEB4LORA_TRAINER_TOKEN", "WEB4LORA_PACKAGER_TOKEN_FILE",
    "WEB4LORA_DEPLOYER_TOKEN", "WEB4LORA_DATABASE", "WEB4LORA_DATABASE_FILE", "WEB4LORA_S3_ROOT_USER",
    "WEB4LORA_S3_ROOT_PASSWORD", "WEB4LORA_ENV_FILE", "WEB4LORA_SECRETS", "AWS_SECRET_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID", "OPENAI_API_KEY", "GITHUB_TOKEN", "PGPASSWORD", "NPM_TOKEN",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "SSH_PASSPHRASE",
}  # fmt: skip
KEYS = {"WEB4LORA_S3_ACCESS_KEY", "WEB4LORA_S3_SECRET_KEY_FILE"}
HUB = {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"}
PLAIN = {
    "PATH", "HOME", "CUDA_VISIBLE_DEVICES", "TOKENIZERS_PARALLELISM", "PIP_INDEX_URL", "SSH_AUTH_SOCK",
    "LC_ALL", "PYTHONPATH", "HTTPS_PROXY", "KEYMAP",
}  # fmt: skip
SETTINGS = {"WEB4LORA_CACHE", "WEB4LORA_INSECURE", "WEB4LORA_STORE"}


@pytest.fixture(autouse=True)
def full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment with everything."""
    for name in (SECRETS | KEYS | HUB | SETTINGS | PLAIN) - {"PATH", "HOME", "PYTHONPATH", "LC_ALL"}:
        monkeypatch.setenv(name, "set")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    monkeypatch.setenv("WEB4LORA_INSECURE", "true")
    key = tmp_path / "key"  # the job itself reads its settings
    key.write_text("s3cret")
    monkeypatch.setenv("WEB4LORA_S3_SECRET_KEY_FILE", str(key))


def test_a_program_gets_no_secret_and_no_setting() -> None:
    seen = set(json.loads(process.run([sys.executable, "-c", PRINT]).splitlines()[-1]))
    assert seen >= PLAIN
    assert not seen & (SECRETS | KEYS | HUB | SETTINGS)
    assert not [name for name in seen if name.startswith("WEB4LORA_")]


def test_a_job_gets_settings_the_stores_key_and_what_it_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "printing_child.py").write_text(
        "import os, sys\n"
        "from web4lora_chassis.jobs import worker_main\n"
        "sys.exit(worker_main({'print': lambda context: {'names': sorted(os.environ)}}))\n"
    )

    async def names(secrets: tuple[str, ...], held: dict[str, str]) -> set[str]:
        runner = JobRunner(
            tmp_path / "jobs", "printing_child", env={"PYTHONPATH": str(tmp_path)}, secrets=secrets
        )
        await runner.start()
        try:
            created = await runner.create("print", f"key-{secrets}", {}, held)
            async for record in runner.watch(created.id):
                ended = record
        finally:
            await runner.stop()
        assert ended.result is not None, ended.error
        return set(ended.result["names"])

    seen = asyncio.run(names((), {"login": "s3cret"}))
    assert seen >= PLAIN | SETTINGS | KEYS
    assert not seen & (SECRETS | HUB)
    seen = asyncio.run(names(("HF_TOKEN",), {}))
    assert seen & (SECRETS | HUB) == {"HF_TOKEN"}


def test_each_service_gets_its_own_secrets(tmp_path: Path) -> None:
    stack = Stack(Settings(home=tmp_path), tmp_path)
    given = {name: set(stack._environment(name)) for name in SERVICES}
    for_all = {"WEB4LORA_TOKEN", "WEB4LORA_TOKEN_FILE", "WEB4LORA_ENV_FILE"}
    own = {
        "trainer": {"WEB4LORA_TRAINER_TOKEN"},
        "packager": {"WEB4LORA_PACKAGER_TOKEN_FILE"},
        "deployer": {"WEB4LORA_DEPLOYER_TOKEN"},
    }
    database = {"WEB4LORA_DATABASE", "WEB4LORA_DATABASE_FILE"}
    own["gateway"] = set.union(*own.values()) | database
    for name, seen in given.items():
        assert seen & SECRETS == for_all | own[name], name
        assert seen >= PLAIN | SETTINGS | KEYS
        assert seen & HUB == (HUB if name == "trainer" else set())


def test_what_is_named_is_kept() -> None:
    assert set(environment(*STORE_KEY)) >= KEYS
    assert not SETTINGS & set(environment(*STORE_KEY))
    assert set(environment(ours=True)) >= SETTINGS
    assert set(environment("GITHUB_*")) & SECRETS == {"GITHUB_TOKEN"}


@pytest.mark.parametrize("name", sorted(SECRETS | KEYS | HUB))
def test_what_a_secret_is_called(name: str) -> None:
    assert is_secret(name)


def _starts(file: Path) -> list[str]:
    """Return the calls of a file that start a program."""
    tree = ast.parse(file.read_text("utf-8"))
    words = {
        "subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_call",
        "subprocess.check_output", "os.system", "os.popen", "os.execv", "os.execve", "os.execvp",
        "os.execvpe", "os.posix_spawn", "os.fork",
        "asyncio.create_subprocess_exec", "asyncio.create_subprocess_shell", "multiprocessing.Process",
    }  # fmt: skip
    return [
        f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node.func)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in words
    ]


def test_no_other_place_starts_programs() -> None:
    """`process` and the runner of jobs choose an environment; llama-server's guard hands its own on."""
    files = [file for place in ("libs", "services", "cli") for file in (ROOT / place).rglob("src/**/*.py")]
    assert len(files) > 100
    found = [each for file in files for each in _starts(file)]
    assert [each.split(":")[0].rpartition("/")[2] for each in sorted(found)] == [
        "runner.py", "process.py", "guard.py", "guard.py",
    ], found  # fmt: skip
