"""The command and the client against a gateway that speaks the contract over a real socket."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from web4.lora.v1 import gateway_pb2
from web4lora import Client
from web4lora.client import ended
from web4lora.main import main
from web4lora_chassis.artifacts import ArtifactRef
from web4lora_chassis.errors import InvalidInput, NotFound, Unavailable
from web4lora_chassis.settings import Settings

from tests.integration import scripted_gateway as scripted
from tests.integration.scripted_gateway import RUN_ID, ScriptedGateway

ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
PIPELINE = """\
name: web4-demo
dataset:
  train_files: [train.jsonl]
base: {model: smollm2-135m-instruct}
train:
  epochs: 1
"""


@dataclass(frozen=True)
class Done:
    """What a command printed."""

    stdout: str
    stderr: str


class Desk:
    """A working folder, a scripted gateway, and the command between them."""

    def __init__(self, root: Path, gateway: ScriptedGateway, port: int) -> None:
        self.root = root
        self.gateway = gateway
        self.settings = Settings(home=root / "home", gateway_address=f"127.0.0.1:{port}")
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("WEB4LORA_")}
        self.env |= {
            "WEB4LORA_HOME": str(root / "home"),
            "WEB4LORA_GATEWAY_ADDRESS": f"127.0.0.1:{port}",
        }
        (root / "train.jsonl").write_text(json.dumps(ROW) + "\n", "utf-8")
        (root / "demo.yaml").write_text(PIPELINE, "utf-8")

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "web4lora"]

    def run(self, *words: str, code: int = 0, stdin: str = "") -> Done:
        """Run the command in this process, which is much faster than in one of its own."""
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.root)
            patch.setattr(sys, "argv", ["web4lora", *words])
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            for name in [name for name in os.environ if name.startswith("WEB4LORA_")]:
                patch.delenv(name)
            for name, value in self.env.items():
                patch.setenv(name, value)
            out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            try:
                main()
                status = 0
            except SystemExit as end:
                status = int(end.code or 0)
        texts = []
        for stream in (out, err):
            stream.flush()
            texts.append(stream.buffer.getvalue().decode("utf-8"))  # type: ignore[attr-defined]
        assert status == code, "".join(texts)
        return Done(*texts)

    def spawn(self, *words: str, code: int = 0) -> Done:
        """Run the command as people do."""
        done = subprocess.run(
            [*self.command, *words], cwd=self.root, env=self.env, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return Done(done.stdout, done.stderr)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    server, port, gateway = scripted.play(tmp_path / "home")
    gateway.output_dir = str(tmp_path / "outputs" / RUN_ID)
    yield Desk(tmp_path, gateway, port)
    server.stop(0)


def test_a_run_on_a_pipe_is_told_line_by_line(desk: Desk) -> None:
    done = desk.spawn("run", "demo.yaml", "--set", "train.epochs=2")
    assert "\x1b" not in done.stdout
    rows = done.stdout.splitlines()
    assert rows[0] == f"{RUN_ID} · web4-demo from smollm2-135m-instruct"
    assert "  train      starts" in rows
    assert any(row.startswith("  train      226 steps · loss 0.30") and "✓ 3 min 41 s" in row for row in rows)
    assert "  verdict    ✗ failed: 1 of 2 limits missed, 1 kept" in rows
    assert f"  All files          outputs/{RUN_ID}/     log: outputs/{RUN_ID}/logs/run.log" in rows
    assert any("chat web4-demo 'Create an agent named atlas'" in row for row in rows)
    [request] = desk.gateway.created
    assert request.pipeline.train.epochs == 2
    assert request.pipeline.dataset.artifact.name == "web4-demo"
    desk.run("run", "demo.yaml", "--strict", code=1)


def test_a_failing_stage_says_why_what_to_do_and_where_the_log_is(desk: Desk) -> None:
    desk.gateway.fail_in = "TRAIN"
    done = desk.spawn("run", "demo.yaml", code=1)
    assert "Training needs about 21 GB, this machine has 16 GB free.   ✗" in done.stdout
    assert "`tokens_per_batch: 512` needs 17 GB." in done.stdout
    assert "log: /var/log/job.txt" in done.stdout
    assert f"runs retry {RUN_ID}" in done.stdout
    assert done.stderr.splitlines() == [f"✗ {RUN_ID} failed in train."]


def test_a_gateways_refusal_is_traced_to_the_line(desk: Desk) -> None:
    desk.gateway.refuse_field = "train.epochs"
    done = desk.run("run", "demo.yaml", code=2)
    assert done.stderr.splitlines() == ["✗ demo.yaml:6: needs 1 to 512.", "  Choose less."]


def test_bad_files_stop_before_the_gateway_hears_of_them(desk: Desk) -> None:
    (desk.root / "train.jsonl").write_text("{}\n", "utf-8")
    done = desk.run("run", "demo.yaml", code=2)
    assert 'train.jsonl:1: "messages" is missing' in done.stderr
    (desk.root / "demo.yaml").write_text(PIPELINE + "  learnig_rate: 1\n", "utf-8")
    done = desk.run("run", "demo.yaml", code=2)
    assert "demo.yaml:7: train.learnig_rate is not a key here; did you mean learning_rate?" in done.stderr
    assert desk.gateway.created == []


def test_detached_runs_are_left_to_themselves(desk: Desk) -> None:
    desk.gateway.hold_in = "TRAIN"
    done = desk.run("run", "demo.yaml", "--detach")
    assert f"runs watch {RUN_ID}" in done.stdout
    created = json.loads(desk.run("run", "demo.yaml", "--detach", "--json").stdout)
    assert (created["id"], created["state"]) == (RUN_ID, "RUN_STATE_RUNNING")
    assert not desk.gateway.cancelled.is_set()


def test_json_is_the_contracts_own(desk: Desk) -> None:
    run = json.loads(desk.run("run", "demo.yaml", "--json").stdout)
    assert run["state"] == "RUN_STATE_SUCCEEDED"
    assert run["stages"][1]["train_result"]["final_loss"] == 0.3
    [listed] = json.loads(desk.run("runs", "list", "--json").stdout)
    assert listed["id"] == RUN_ID
    snapshots = [json.loads(row) for row in desk.run("runs", "watch", "--json").stdout.splitlines()]
    assert snapshots[-1]["run"]["state"] == "RUN_STATE_SUCCEEDED"
    assert len(snapshots) > 5
    [deployed] = json.loads(desk.run("deployments", "list", "--json").stdout)
    assert deployed["state"] == "DEPLOYMENT_STATE_SERVING"


def test_what_is_not_promoted_says_so_and_is_asked_by_its_own_id(desk: Desk) -> None:
    desk.gateway.not_promoted = True
    rows = desk.run("run", "demo.yaml").stdout.splitlines()
    (row,) = [row for row in rows if row.startswith("  promote    web4-demo")]
    assert row.startswith("  promote    web4-demo:v1a2b3c4d is not promoted: 1 of 2 limits were missed.   !")
    assert any("chat web4-demo:v1a2b3c4d 'Create an agent" in row for row in rows)


def test_deployments_are_promoted_rolled_back_and_deleted(desk: Desk) -> None:
    the_id = "web4-demo:v1a2b3c4d"
    assert "✓" in desk.run("deployments", "list").stdout.splitlines()[1]
    says = f"✓ web4-demo stands for {the_id} now: llama-server, http://127.0.0.1:9/v1"
    assert desk.run("deployments", "promote", the_id).stdout.strip() == says
    assert desk.run("deployments", "rollback", "web4-demo").stdout.strip() == says
    assert desk.gateway.called[-1].from_id == the_id  # so that the call can be repeated
    told = json.loads(desk.run("deployments", "promote", the_id, "--json").stdout)
    assert told["promoted"] is True

    done = desk.run("deployments", "delete", the_id, code=1)
    assert done.stderr.startswith(f"✗ web4-demo stands for {the_id}: without it nothing serves")
    before = len(desk.gateway.called)
    assert "is gone from llama-server" in desk.run("deployments", "delete", the_id, "--force").stdout
    assert desk.gateway.called[before].id == the_id
    gone = desk.run("deployments", "delete", "web4-demo:v00000000").stdout
    assert gone.strip() == "There was no deployment web4-demo:v00000000."

    done = desk.run("deployments", "promote", "web4-demo", code=2)
    assert "web4-demo is not the id of a deployment." in done.stderr
    done = desk.run("deployments", "rollback", the_id, code=2)
    assert "`web4lora deployments rollback web4-demo`" in done.stderr
    done = desk.run("deployments", "rollback", "other", code=1)
    assert "Nothing serves under the name 'other'" in done.stderr


def test_a_narrow_terminal_cuts_no_name_that_other_commands_take(desk: Desk) -> None:
    desk.run("run", "demo.yaml", "--detach")
    desk.env["COLUMNS"] = "50"
    listed = desk.spawn("runs", "list").stdout.splitlines()
    assert listed[1].split()[:2] == [RUN_ID, "web4-demo"]


def test_runs_are_listed_shown_and_repeated(desk: Desk) -> None:
    assert "There are no runs yet" in desk.run("runs", "list").stdout
    desk.run("run", "demo.yaml", "--detach")
    listed = desk.run("runs", "list").stdout.splitlines()
    assert listed[1].split()[:3] == [RUN_ID, "web4-demo", "succeeded"]
    assert "limits missed" in listed[1]
    shown = desk.run("runs", "show").stdout
    assert "226 steps · loss 0.30" in shown
    assert "  verdict    ✗" in shown
    assert "Create an agent" not in shown
    desk.run("runs", "retry", "latest", "--from", "package", "--detach")
    assert desk.gateway.retried[0].from_stage == gateway_pb2.STAGE_NAME_PACKAGE
    done = desk.run("runs", "retry", "--from", "packing", code=2)
    assert "The stages are prepare, train, package, deploy, verify, promote." in done.stderr
    done = desk.run("runs", "show", "run_1", code=1)
    assert done.stderr.splitlines() == ["✗ There is no run run_1.", "  `web4lora runs list` shows them."]
    assert "had ended already: succeeded" in desk.run("runs", "cancel").stdout


def test_an_interrupt_on_a_pipe_leaves_the_run_alone(desk: Desk) -> None:
    desk.gateway.hold_in = "TRAIN"
    child = subprocess.Popen(
        [*desk.command, "run", "demo.yaml"], cwd=desk.root, env=desk.env, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None
    while "train      starts" not in child.stdout.readline():
        assert child.poll() is None
    child.send_signal(signal.SIGINT)
    rest, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert f"{RUN_ID} goes on by itself." in rest
    assert "Traceback" not in errors
    assert not desk.gateway.cancelled.is_set()


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, desk: Desk, *words: str) -> None:
        self.text = ""
        self._leader, follower = pty.openpty()
        self.child = subprocess.Popen(
            [*desk.command, *words], cwd=desk.root, env={**desk.env, "TERM": "xterm", "COLUMNS": "100"},
            stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
            preexec_fn=_own_terminal,
        )  # fmt: skip
        os.close(follower)

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 60
        while text not in self.text and time.monotonic() < deadline and self._read():
            pass
        assert text in self.text, self.text

    def type(self, text: str) -> None:
        self.text = ""
        os.write(self._leader, text.encode())

    def end(self) -> int:
        while self._read():
            pass
        os.close(self._leader)
        return self.child.wait(30)

    def _read(self) -> bool:
        if not select.select([self._leader], [], [], 30)[0]:
            return False
        try:
            data = os.read(self._leader, 65536)
        except OSError:  # Linux says so when the other side has closed
            return False
        self.text += data.decode("utf-8", errors="replace")
        return bool(data)


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_ctrl_c_asks_and_cancel_cancels(desk: Desk) -> None:
    desk.gateway.hold_in = "TRAIN"
    terminal = Terminal(desk, "run", "demo.yaml")
    terminal.wait_for("0/226 steps")
    terminal.type("\x03")
    terminal.wait_for("d: detach · c: cancel the run · Enter: go on")
    terminal.type("\n")
    terminal.wait_for("0/226 steps")
    terminal.type("\x03")
    terminal.wait_for("Enter: go on")
    assert not desk.gateway.cancelled.is_set()
    terminal.type("c\n")
    assert terminal.end() == 1
    assert desk.gateway.cancelled.is_set()
    assert "was cancelled" in terminal.text
    assert "Traceback" not in terminal.text


def test_a_training_is_ended_early_and_the_run_goes_on(desk: Desk) -> None:
    desk.gateway.hold_in = "TRAIN"
    terminal = Terminal(desk, "run", "demo.yaml")
    terminal.wait_for("0/226 steps")
    while ended(desk.gateway.snapshots[-1]):  # the script's end has not come yet
        desk.gateway.snapshots.pop()
    told = desk.run("runs", "cancel", "--keep").stdout
    assert f"{RUN_ID} ends its training after this step and goes on with packaging." in told
    assert desk.gateway.kept == [RUN_ID]
    assert not desk.gateway.cancelled.is_set()
    terminal.type("\x03")
    terminal.wait_for("Enter: go on")
    terminal.type("d\n")
    assert terminal.end() == 0


def test_a_second_ctrl_c_detaches(desk: Desk) -> None:
    desk.gateway.hold_in = "TRAIN"
    terminal = Terminal(desk, "run", "demo.yaml")
    terminal.wait_for("0/226 steps")
    terminal.type("\x03")
    terminal.wait_for("Enter: go on")
    terminal.type("\x03")
    assert terminal.end() == 0
    assert f"{RUN_ID} goes on by itself." in terminal.text
    assert not desk.gateway.cancelled.is_set()


def test_a_gateway_that_is_away_is_one_clear_error(desk: Desk) -> None:
    desk.env["WEB4LORA_GATEWAY_ADDRESS"] = "127.0.0.1:1"
    done = desk.run("runs", "list", code=1)
    assert done.stderr.splitlines() == [
        "✗ The gateway at 127.0.0.1:1 is out of reach.",
        "  `web4lora up` starts it here; `web4lora status` tells more.",
    ]


def test_watching_goes_on_when_the_gateway_comes_back(tmp_path: Path) -> None:
    server, port, gateway = scripted.play(tmp_path / "home")
    gateway.plan(gateway_pb2.Pipeline(name="web4-demo"))
    gateway.hold_in = "TRAIN"
    seen: list[int] = []
    with Client(Settings(home=tmp_path / "home", gateway_address=f"127.0.0.1:{port}")) as client:
        snapshots = client.watch()
        while not seen or seen[-1] < 4:
            seen.append(next(snapshots).revision)
        server.stop(0).wait()
        gateway.hold_in = ""
        again, same_port = scripted.serve(gateway, f"127.0.0.1:{port}")
        assert same_port == port
        seen += [run.revision for run in snapshots]
        again.stop(0)
    assert seen == sorted(set(seen)), "a snapshot came twice or out of order"
    assert seen[-1] == gateway.snapshots[-1].revision


@pytest.fixture
def stored(desk: Desk) -> ArtifactRef:
    source = desk.root / "model.Q4_K_M.gguf"
    source.write_bytes(b"GGUF" + bytes(1000))
    with Client(desk.settings) as client:
        return client.store.put("gguf", "web4-demo", {source.name: source}, link=False, created_by="packager")


def test_artifacts_are_listed_fetched_and_verified(desk: Desk, stored: ArtifactRef) -> None:
    listed = desk.run("artifacts", "list").stdout.splitlines()
    assert listed[1].split()[:4] == [str(stored), "1.0", "kB", "1"]
    assert json.loads(desk.run("artifacts", "list", "--kind", "adapter", "--json").stdout) == []
    assert "is not an artifact kind" in desk.run("artifacts", "list", "--kind", "x", code=2).stderr
    for name in ("gguf/web4-demo", str(stored), stored.digest[:8]):
        target = desk.root / f"got-{len(name)}"
        desk.run("artifacts", "get", name, str(target))
        assert (target / "model.Q4_K_M.gguf").read_bytes()[:4] == b"GGUF"
    assert "✓ gguf/web4-demo" in desk.run("artifacts", "verify").stdout
    assert "There is no artifact" in desk.run("artifacts", "get", "gguf/other", "x", code=1).stderr


def test_verify_finds_a_changed_byte(desk: Desk, stored: ArtifactRef) -> None:
    [file] = (desk.root / "home" / "store").rglob("*.gguf")
    file.chmod(0o644)
    with file.open("r+b") as stream:
        stream.seek(500)
        stream.write(b"x")
    done = desk.run("artifacts", "verify", code=1)
    assert f"✗ {stored}" in done.stdout
    assert "model.Q4_K_M.gguf: " in done.stdout
    [report] = json.loads(desk.run("artifacts", "verify", "--json", code=1).stdout)
    assert report["ok"] is False
    assert list((desk.root / "home").glob("verify-*")) == []


def test_export_makes_copies_of_its_own(desk: Desk, stored: ArtifactRef) -> None:
    desk.run("run", "demo.yaml", "--detach")
    with Client(desk.settings) as client:
        run = client.get_run()
        for stage in run.stages:
            if stage.WhichOneof("result") == "package_result":
                stage.package_result.quantized[0].artifact.digest = stored.digest
                del stage.package_result.quantized[1:]
        from web4lora.export import export_run

        # The script's adapter and files are not in the store, so only what is there is exported.
        for stage in run.stages:
            if stage.WhichOneof("result") == "train_result":
                stage.ClearField("train_result")
            if stage.WhichOneof("result") == "package_result":
                stage.package_result.reference.artifact.CopyFrom(stage.package_result.quantized[0].artifact)
                stage.package_result.files.CopyFrom(stage.package_result.quantized[0].artifact)
        target = desk.root / "mine"
        export_run(run, client.store, target)
        with pytest.raises(InvalidInput, match="holds something already"):
            export_run(run, client.store, target)
    copy = target / "model.Q4_K_M.gguf"
    assert copy.stat().st_nlink == 1
    copy.write_bytes(b"mine now")
    assert "✓" in desk.run("artifacts", "verify").stdout
    assert not list(desk.root.glob(".export-*"))


def test_the_client_raises_our_errors(desk: Desk) -> None:
    with Client(desk.settings) as client:
        with pytest.raises(NotFound, match="no run nope"):
            client.get_run("nope")
        with pytest.raises(NotFound, match="No model called 'x' is deployed"):
            client.deployment("x")
        with pytest.raises(InvalidInput, match="is not a stage"):
            client.run(desk.root / "demo.yaml", from_stage="x")
        run = client.run(desk.root / "demo.yaml", request_id="mine")
        assert desk.gateway.created[-1].request_id == "mine"
        assert client.wait(run.id).state == gateway_pb2.RUN_STATE_SUCCEEDED
        assert [run.id for run in client.list_runs()] == [RUN_ID]
        assert client.info().version == "0.1.0"
    with Client(Settings(gateway_address="127.0.0.1:1")) as client, pytest.raises(Unavailable):
        next(client.watch())


class _Model(BaseHTTPRequestHandler):
    """Answers like llama-server: tokens as server-sent events, then figures."""

    asked: list[dict[str, Any]] = []  # noqa: RUF012 - one server a test, emptied by its fixture
    refuse = False

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append(body)
        if self.refuse:
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b'{"error": {"message": "the request exceeds the context"}}')
            return
        self.send_response(200)
        self.end_headers()
        for piece in ("Hello", " wörld"):
            self._event({"choices": [{"delta": {"content": piece}}]})
        self._event(
            {
                "choices": [{"delta": {}, "finish_reason": "stop"}],
                "usage": {"completion_tokens": 2},
                "timings": {"predicted_per_second": 130.04},
            }
        )
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, data: object) -> None:
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def model(desk: Desk) -> Iterator[type[_Model]]:
    _Model.asked, _Model.refuse = [], False
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Model)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    desk.gateway.endpoint = f"http://127.0.0.1:{server.server_port}/v1"
    yield _Model
    server.shutdown()
    server.server_close()


def test_chat_prints_the_answer_alone(desk: Desk, model: type[_Model]) -> None:
    assert desk.run("chat", "web4-demo", "Hi", "--system", "Be brief.").stdout == "Hello wörld\n"
    asked = model.asked[-1]
    assert asked["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]
    assert (asked["temperature"], asked["model"]) == (0.0, "web4-demo:v1a2b3c4d")
    answer = json.loads(desk.run("chat", "web4-demo", "--json", stdin="From a pipe\n").stdout)
    assert model.asked[-1]["messages"][-1]["content"] == "From a pipe"
    assert answer["answer"] == "Hello wörld"
    assert answer["tokens_per_second"] == 130.0


def test_chat_takes_the_system_message_of_a_row(desk: Desk, model: type[_Model]) -> None:
    system = {"role": "system", "content": "You are Tool-Core."}
    row = {"messages": [system, *ROW["messages"]]}
    (desk.root / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n{json.dumps(row)}\n", "utf-8")
    for place in ("rows.jsonl", "rows.jsonl:2"):
        desk.run("chat", "web4-demo", "Hi", "--system-from", place)
        assert model.asked[-1]["messages"][0] == system
    done = desk.run("chat", "web4-demo", "Hi", "--system-from", "rows.jsonl:1", code=2)
    assert "Line 1 of rows.jsonl has no system message." in done.stderr


def test_chat_says_why_a_model_does_not_answer(desk: Desk, model: type[_Model]) -> None:
    model.refuse = True
    done = desk.run("chat", "web4-demo", "Hi", code=1)
    assert "refused: the request exceeds the context (HTTP 400)" in done.stderr
    desk.gateway.endpoint = "http://127.0.0.1:9/v1"
    assert "is out of reach" in desk.run("chat", "web4-demo", "Hi", code=1).stderr
    assert "These are: web4-demo." in desk.run("chat", "nobody", "Hi", code=1).stderr
    assert "There is no question." in desk.run("chat", "web4-demo", code=2).stderr


def test_a_conversation_remembers(desk: Desk, model: type[_Model]) -> None:
    terminal = Terminal(desk, "chat", "web4-demo")
    terminal.wait_for("Ctrl-D ends")
    say: Callable[[str], None] = lambda text: (terminal.type(text + "\n"), terminal.wait_for("tokens/s"))[0]  # noqa: E731
    say("One")
    say("Two")
    assert [turn["content"] for turn in model.asked[-1]["messages"]] == ["One", "Hello wörld", "Two"]
    terminal.type("/system Be brief.\n")
    say("Three")
    assert [turn["content"] for turn in model.asked[-1]["messages"]] == ["Be brief.", "Three"]
    terminal.type("/new\n")
    say("Four")
    assert [turn["content"] for turn in model.asked[-1]["messages"]] == ["Be brief.", "Four"]
    terminal.type("\x04")
    assert terminal.end() == 0


def test_datasets_are_checked_and_good_rows_kept(desk: Desk) -> None:
    bad = desk.root / "bad.jsonl"
    bad.write_text(f"{json.dumps(ROW)}\n{{}}\n{json.dumps(ROW)}\n", "utf-8")
    done = desk.run("dataset", "check", "bad.jsonl", code=1)
    assert 'bad.jsonl:2: "messages" is missing' in done.stdout
    assert "bad.jsonl:3: the same user text and the same answer as bad.jsonl:1" in done.stdout
    data = json.loads(desk.run("dataset", "check", "bad.jsonl", "--json", code=1).stdout)
    assert (data["train_rows"], data["problems"][0]["line"]) == (2, 2)
    desk.run("dataset", "check", "bad.jsonl", "--drop", "good.jsonl")
    assert (desk.root / "good.jsonl").read_text("utf-8") == f"{json.dumps(ROW)}\n" * 2
    assert (
        "is there already" in desk.run("dataset", "check", "bad.jsonl", "--drop", "good.jsonl", code=2).stderr
    )
    assert "✓ 2 good rows" in desk.run("dataset", "check", "good.jsonl").stdout
    (desk.root / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode())
    desk.run("dataset", "check", "good.jsonl", "bom.jsonl", "--drop", "both.jsonl")
    assert (desk.root / "both.jsonl").read_bytes().count(b"\xef\xbb\xbf") == 0
    (desk.root / "empty.jsonl").write_text("\n\n", "utf-8")
    done = desk.run("dataset", "check", "empty.jsonl", "--drop", "none.jsonl", code=2)
    assert "there is no row in it" in done.stdout
    assert not (desk.root / "none.jsonl").exists()
    (desk.root / "array.json").write_text(json.dumps([ROW] * 24, indent=1), "utf-8")
    done = desk.run("dataset", "check", "array.json", code=1)
    assert done.stdout.count("array.json") == 2, "the file and the command, once"
    assert "gone.jsonl can't be read" in desk.run("dataset", "check", "gone.jsonl", code=1).stderr


def test_usage_errors_and_versions(desk: Desk) -> None:
    assert desk.spawn("--version").stdout == "web4lora 0.1.0\n"
    desk.spawn("nonsense", code=2)
    desk.run("run", code=2)
    assert "web4lora run examples/web4/demo.yaml" in desk.run("run", "--help").stdout
