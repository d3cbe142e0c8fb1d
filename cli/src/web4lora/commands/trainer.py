"""`web4lora trainer`: the native trainer of a stack whose other services run in containers."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import psutil
import typer
from web4lora_chassis.errors import InvalidInput, NotFound
from web4lora_chassis.settings import ENV_FILE, PREFIX, Settings

from web4lora.commands.options import examples
from web4lora.commands.stack import local_stack, show_step
from web4lora.home import load_settings, short
from web4lora.views.console import line, out

app = typer.Typer(
    help="The trainer on this machine for a stack in containers, for the sake of Metal or CUDA.",
    no_args_is_help=True,
)
_ADDRESS = f"{PREFIX}TRAINER_ADDRESS"
_PORT = 8462
_BRIDGE = "docker0"


@app.command(
    "start", epilog=examples("web4lora trainer start", "web4lora --env-file ../web4/.env trainer start")
)
def start() -> None:
    """Start the trainer where the stack's gateway finds it; jobs that were cut off go on."""
    settings = _settings()
    with out.status("starting …"):
        local_stack(settings).up(show_step, ("trainer",))
    line(f"  listens    {settings.trainer_address}, with the stack's token")
    line(f"  log        {short(settings.home / 'logs' / 'trainer.log')}", style="dim")


@app.command("stop", epilog=examples("web4lora trainer stop"))
def stop() -> None:
    """Stop the trainer; a job at work goes on from its last checkpoint at the next start."""
    local_stack(_settings()).down(show_step, ("trainer",))


@app.command(
    "unit",
    epilog=examples(
        "web4lora trainer unit > ~/.config/systemd/user/web4lora-trainer.service",
        "web4lora trainer unit > ~/Library/LaunchAgents/web4lora.trainer.plist",
    ),
)
def unit() -> None:
    """Print what starts the trainer at log-in: a systemd user unit, on macOS a launchd agent."""
    settings = _settings()
    env = {ENV_FILE: os.environ[ENV_FILE], _ADDRESS: settings.trainer_address}
    log = settings.home / "logs" / "trainer.log"
    text = (
        launchd_agent(sys.executable, env, log)
        if sys.platform == "darwin"
        else systemd_unit(sys.executable, env)
    )
    sys.stdout.write(text)


def systemd_unit(python: str, env: dict[str, str]) -> str:
    """Return a systemd user unit."""
    lines = [f'Environment="{name}={value}"' for name, value in env.items()]
    return f"""\
# systemctl --user daemon-reload && systemctl --user enable --now web4lora-trainer
# To have it without anyone logged in: loginctl enable-linger
[Unit]
Description=Web4 LoRA Core: trainer

[Service]
ExecStart="{python}" -m web4lora_trainer
{chr(10).join(lines)}
Restart=on-failure
RestartSec=5
TimeoutStopSec=30

[Install]
WantedBy=default.target
"""


def launchd_agent(python: str, env: dict[str, str], log: Path) -> str:
    """Return a launchd agent."""
    from xml.sax.saxutils import escape

    variables = "\n".join(
        f"    <key>{escape(name)}</key><string>{escape(value)}</string>" for name, value in env.items()
    )
    return f"""\
<?xml version="1.0" encoding="UTF-8"?>
<!-- launchctl bootstrap gui/$(id -u) ~/Library/LaunchAgents/web4lora.trainer.plist -->
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0">
<dict>
  <key>Label</key><string>web4lora.trainer</string>
  <key>ProgramArguments</key>
  <array>
    <string>{escape(python)}</string><string>-m</string><string>web4lora_trainer</string>
  </array>
  <key>EnvironmentVariables</key>
  <dict>
{variables}
  </dict>
  <key>RunAtLoad</key><true/>
  <key>KeepAlive</key><dict><key>SuccessfulExit</key><false/></dict>
  <key>StandardOutPath</key><string>{escape(str(log))}</string>
  <key>StandardErrorPath</key><string>{escape(str(log))}</string>
</dict>
</plist>
"""


def _settings() -> Settings:
    """Read the stack's settings, and put the trainer where its gateway looks for it.

    Raises:
        NotFound: There is no such file.
        InvalidInput: The file names no store that containers reach too.
    """
    path = Path(os.environ.get(ENV_FILE) or ".env")
    if not path.is_file():
        raise NotFound(
            f"There is no {path}, the settings of the stack in containers.",
            fix="Go to the folder whose `docker compose` runs it, or name it: web4lora --env-file FILE …",
        )
    os.environ[ENV_FILE] = str(path.absolute())
    settings = load_settings()
    if settings.store.startswith("file:"):
        raise InvalidInput(
            f"{path} names no WEB4LORA_STORE, so trainer and containers would not share a store.",
            fix="docker/make-env writes a complete one.",
        )
    if not os.environ.get(_ADDRESS):
        os.environ[_ADDRESS] = f"{reachable_host()}:{_PORT}"
        settings = load_settings()
    return settings


def reachable_host() -> str:
    """Return the address of this machine that containers reach, and as few others as possible.

    Docker Desktop leads host.docker.internal to the loopback; Docker Engine on Linux to its bridge's address.
    """
    for address in psutil.net_if_addrs().get(_BRIDGE, ()):
        if sys.platform == "linux" and address.family == socket.AF_INET:
            return str(address.address)
    return "127.0.0.1"
