from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from web4.lora.v1 import deployer_pb2, gateway_pb2, jobs_pb2, packager_pb2, trainer_pb2
from web4lora.commands.follow_run import exit_code, question
from web4lora.commands.runs import _state
from web4lora.views.run_progress import LineFollower, finished, overview
from web4lora.views.stages import failure_lines, progress_text, result_lines, verified
from web4lora.views.verdict import score_table, show_samples, show_scores

_STATES = gateway_pb2.StageState


def stage(name: str, state: str, **fields: Any) -> gateway_pb2.Stage:
    made = gateway_pb2.Stage(
        name=gateway_pb2.StageName.Value(f"STAGE_NAME_{name}"),
        state=_STATES.Value(f"STAGE_STATE_{state}"),
        **fields,
    )
    made.start_time.FromSeconds(1000)
    if state != "RUNNING":
        made.end_time.FromSeconds(1024)
    return made


def rendered(thing: Any, width: int = 100) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(thing)
    return "\n".join(row.rstrip() for row in capture.get().splitlines())


def verify_result(**fields: Any) -> deployer_pb2.VerifyResult:
    return deployer_pb2.VerifyResult(
        scores=[
            deployer_pb2.Score(
                name="style.all_rules", title="house style", prompts=20, reference_percent=74,
                deployed_percent=71, drop_points=3, drop_low_points=-1, drop_high_points=7,
            )
        ],
        gates=[
            deployer_pb2.Gate(
                name="score drop: style.all_rules", limit="at most 2 points", measured="3.0 points",
            ),
            deployer_pb2.Gate(
                name="score: style.all_rules", limit="at least 60 %", measured="71 %", passed=True
            ),
            deployer_pb2.Gate(name="memory", limit="at most 2 GB", measured="0.3 GB", passed=True),
        ],
        verdict="failed: 1 of 3 limits missed",
        **fields,
    )  # fmt: skip


def test_progress_has_numbers_and_time_left() -> None:
    progress = jobs_pb2.Progress(
        phase="train", done=120, total=226, unit="steps", seconds_left=101,
        figures={"tokens_per_second": 602.3, "loss": 0.3, "grad_norm": 1.25}, message="not shown",
    )  # fmt: skip
    expected = "120/226 steps · loss 0.30 · 602 tokens/s · grad norm 1.25 · about 2 min left"
    assert progress_text(progress) == expected


def test_progress_in_bytes_is_for_people() -> None:
    assert (
        progress_text(jobs_pb2.Progress(done=12_000_000, total=271_000_000, unit="bytes"))
        == "12 MB of 271 MB"
    )
    assert progress_text(jobs_pb2.Progress(done=12_000_000, unit="bytes")) == "12 MB"


def test_progress_without_numbers_is_its_message() -> None:
    assert progress_text(jobs_pb2.Progress(phase="load", message="reads the model")) == "reads the model"
    assert progress_text(jobs_pb2.Progress()) == ""


def test_results_in_words() -> None:
    prepared = trainer_pb2.PrepareResult(
        dataset=trainer_pb2.DatasetReport(
            train_rows=840, eval_rows=100, rows_by_core={"tool": 420, "style": 420},
            tokens=107_648, trained_tokens=34_610, warnings=[f"a.jsonl:{n}: twice" for n in range(5)],
        ),
        estimate=trainer_pb2.TrainEstimate(peak_memory_bytes=1_900_000_000, seconds=240, rehearsed=True),
        device="cpu, 2 threads, fp32",
    )  # fmt: skip
    lines = result_lines(stage("PREPARE", "SUCCEEDED", prepare_result=prepared))
    assert lines[0] == (
        "840 rows in 2 cores · 100 held out · 107,648 tokens, 34,610 trained · 0 too long · "
        "needs about 1.9 GB of memory, measured · about 4 min to train · cpu, 2 threads, fp32"
    )
    assert lines[1] == "! a.jsonl:0: twice"
    assert lines[4] == "! … and 2 more warnings: `web4lora dataset check`"

    packaged = packager_pb2.PackageResult(
        reference=packager_pb2.GgufFile(type="F16", size_bytes=271_000_000, loads=True),
        quantized=[
            packager_pb2.GgufFile(type="Q4_K_M", size_bytes=105_000_000, size_reduction=0.61, loads=True)
        ],
    )
    assert result_lines(stage("PACKAGE", "SUCCEEDED", package_result=packaged)) == [
        "merge ✓  F16 271 MB ✓  Q4_K_M 105 MB (−61 %) ✓  loads ✓  checksums ✓"
    ]
    packaged.quantized[0].contents = "58 % Q5_0, 10 % Q4_K, because rows of 576 are no multiples of 256"
    assert result_lines(stage("PACKAGE", "SUCCEEDED", package_result=packaged))[1] == (
        "Q4_K_M: 58 % Q5_0, 10 % Q4_K, because rows of 576 are no multiples of 256"
    )
    gates = [
        packager_pb2.StageGate(
            stage="merge", name="base plus adapter", measured="off by 0.0002", passed=True
        ),
        packager_pb2.StageGate(stage="convert", measured="0 of 8 answers change", passed=True, answers=8),
        packager_pb2.StageGate(stage="quantize Q4_K_M", measured="1 of 8", passed=True, answers=8),
    ]
    packaged.merge.CopyFrom(packager_pb2.MergeReport(gates=gates, changed_at="changed at: quantize Q4_K_M"))
    assert result_lines(stage("PACKAGE", "SUCCEEDED", package_result=packaged))[2:] == [
        "changed at: quantize Q4_K_M",
        "  convert          0 of 8 answers change",
        "  quantize Q4_K_M  1 of 8",
    ]
    why = "not compared: training kept no answers"
    packaged.merge.CopyFrom(packager_pb2.MergeReport(gates=[{"stage": "convert", "measured": why}]))
    assert result_lines(stage("PACKAGE", "SUCCEEDED", package_result=packaged))[2:] == [f"! convert: {why}"]
    packaged.quantized[0].loads = False
    assert "loads ✗" in result_lines(stage("PACKAGE", "SUCCEEDED", package_result=packaged))[0]


def test_a_training_without_held_out_data_says_nothing_of_it() -> None:
    result = trainer_pb2.TrainResult(
        steps=226, final_loss=0.3, tokens_per_second=602, verdict="settled at 0.30"
    )
    lines = result_lines(stage("TRAIN", "SUCCEEDED", train_result=result))
    assert lines == ["226 steps · loss 0.30 · 602 tokens/s", "settled at 0.30"]


def test_what_happened_to_a_training_is_told_below_it() -> None:
    result = trainer_pb2.TrainResult(steps=2, verdict="settled", events=["memory ran out", "less of it"])
    lines = result_lines(stage("TRAIN", "SUCCEEDED", train_result=result))
    assert lines[1:] == ["settled", "! memory ran out", "! less of it"]


def test_a_failure_names_its_log_once(tmp_path: Path) -> None:
    log = tmp_path / "job.txt"
    error = jobs_pb2.JobError(message="It broke.\nBadly.", fix="Mend it.", metadata={"log": str(log)})
    assert failure_lines(error) == ["It broke.", "Badly.", "Mend it.", f"log: {log}"]
    error.fix = f"Its log may say why: {log}"
    assert failure_lines(error) == ["It broke.", "Badly.", f"Its log may say why: {log}"]
    assert failure_lines(jobs_pb2.JobError(reason="INTERNAL")) == ["INTERNAL"]


def test_on_a_pipe_a_stage_is_a_line_at_its_start_and_one_at_its_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    follower = LineFollower()
    run = gateway_pb2.Run(stages=[stage("TRAIN", "RUNNING")])
    for done in (0, 1, 2):
        run.stages[0].progress.CopyFrom(jobs_pb2.Progress(phase="train", done=done, total=2, unit="steps"))
        follower.update(run)
    result = trainer_pb2.TrainResult(steps=2, final_loss=0.3, tokens_per_second=602, verdict="settled " * 30)
    run.stages[0].CopyFrom(stage("TRAIN", "SUCCEEDED", train_result=result))
    follower.update(run)
    follower.update(run)
    follower.close()
    text = capsys.readouterr().out
    assert "\x1b" not in text
    first, last, verdict = text.splitlines()
    assert first == "  train      starts"
    assert last == "  train      2 steps · loss 0.30 · 602 tokens/s   ✓ 24 s"
    assert len(verdict) > 200, "a long line was cut or wrapped"


def test_a_long_wait_on_a_pipe_is_broken_by_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("web4lora.views.run_progress._HEARTBEAT_SECONDS", 0)
    follower = LineFollower()
    run = gateway_pb2.Run(stages=[stage("PACKAGE", "RUNNING")])
    follower.update(run)
    run.stages[0].progress.CopyFrom(jobs_pb2.Progress(phase="quantize", done=1, total=4, unit="tensors"))
    follower.update(run)
    assert capsys.readouterr().out.splitlines()[1] == "  package    quantize · 1/4 tensors"


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_finished_stage_fits_the_terminal(width: int) -> None:
    result = trainer_pb2.TrainResult(
        steps=226, final_loss=0.3, tokens_per_second=602, verdict="settled " * 12
    )
    text = rendered(finished(stage("TRAIN", "SUCCEEDED", train_result=result)), width)
    assert max(map(len, text.splitlines())) < width
    assert "✓ 24 s" in text.splitlines()[0]


def test_a_stage_that_was_taken_over_says_from_where() -> None:
    reused = stage(
        "TRAIN", "REUSED", reused_from_run="run_2026-11-22_1", train_result=trainer_pb2.TrainResult()
    )
    assert "✓ taken over from run_2026-11-22_1" in rendered(finished(reused), 120)
    reused.work_seconds = 481
    assert "✓ taken over from run_2026-11-22_1, 8 min 1 s there" in rendered(finished(reused), 120)


def test_an_overview_shows_every_stage_as_it_is() -> None:
    run = gateway_pb2.Run(
        stages=[
            stage("PREPARE", "SUCCEEDED", prepare_result=trainer_pb2.PrepareResult()),
            stage("TRAIN", "RUNNING", progress=jobs_pb2.Progress(phase="load", message="reads the model")),
            gateway_pb2.Stage(name=gateway_pb2.STAGE_NAME_PACKAGE, state=gateway_pb2.STAGE_STATE_PENDING),
        ]
    )
    rows = rendered(overview(run), 120).splitlines()
    assert "load · reads the model" in rows[1]
    assert rows[2].split() == ["package", "not", "yet"]
    run.end_time.FromSeconds(2000)
    assert rendered(overview(run), 120).splitlines()[2].split() == ["package", "not", "run"]


def test_the_score_table_has_a_base_column_only_when_it_was_measured() -> None:
    result = verify_result()
    without = rendered(score_table(result, "Q4_K_M"), 80)
    assert without.splitlines() == [
        "  test         16 bit  Q4_K_M  drop, 95 % interval  limit",
        "  house style    74 %    71 %  3.0  (−1.0 to 7.0)   ≤ 2 ✗  ≥ 60 % ✓",
    ]
    result.scores[0].base_percent = 0
    assert "base" in rendered(score_table(result, "Q4_K_M"))
    assert "   0 %" in rendered(score_table(result, "Q4_K_M"))


def test_without_a_reference_no_drop_is_shown() -> None:
    result = deployer_pb2.VerifyResult(scores=[deployer_pb2.Score(name="a.b", deployed_percent=50)])
    assert rendered(score_table(result, "Q8_0")).splitlines() == ["  test  Q8_0  limit", "  a.b   50 %"]


def test_an_undecided_result_says_what_is_good_what_is_open_and_what_to_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = verify_result(state=deployer_pb2.TEST_STATE_UNDECIDED, advice=["Add prompts.", "Move on."])
    for gate in result.gates:
        gate.state = deployer_pb2.TEST_STATE_PASSED if gate.passed else deployer_pb2.TEST_STATE_UNDECIDED
    result.verdict = "undecided: no limit missed, 2 of 3 kept, 1 undecided"
    assert "≤ 2 ?  ≥ 60 % ✓" in rendered(score_table(result, "Q4_K_M"), 80)
    run = gateway_pb2.Run(
        state=gateway_pb2.RUN_STATE_SUCCEEDED, stages=[stage("VERIFY", "SUCCEEDED", verify_result=result)]
    )
    show_scores(run)
    assert capsys.readouterr().out.splitlines()[-5:] == [
        "  verdict    ? undecided: no limit missed, 2 of 3 kept, 1 undecided",
        "  good       house style 71 %; memory 0.3 GB",
        "  undecided  house style (drop) 3.0 points",
        "  to do      Add prompts.",
        "             Move on.",
    ]
    assert exit_code(run, strict=True) == 0
    result.state = deployer_pb2.TEST_STATE_FAILED
    run.stages[0].verify_result.CopyFrom(result)
    assert exit_code(run, strict=True) == 1


def test_missed_limits_and_the_verdict_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    show_scores(gateway_pb2.Run(stages=[stage("VERIFY", "SUCCEEDED", verify_result=verify_result())]))
    rows = capsys.readouterr().out.splitlines()
    assert rows[-3:] == [
        "  verdict    ✗ failed: 1 of 3 limits missed",
        "  good       house style 71 %; memory 0.3 GB",
        "  not good   house style (drop) 3.0 points, the limit is at most 2 points",
    ]
    show_scores(gateway_pb2.Run())
    assert capsys.readouterr().out == ""


def test_long_answers_are_shortened(capsys: pytest.CaptureFixture[str]) -> None:
    sample = deployer_pb2.Sample(core="style", prompt="Write [a] class", answer="row\n" * 40, passed=False)
    show_samples([sample])
    rows = capsys.readouterr().out.splitlines()
    assert rows[1] == "  style      Write [a] class"
    assert rows[-2].strip() == "… 26 more lines"
    assert rows[-1].strip() == "✗ fails its test"


def test_exit_codes() -> None:
    done = gateway_pb2.Run(
        state=gateway_pb2.RUN_STATE_SUCCEEDED,
        stages=[stage("VERIFY", "SUCCEEDED", verify_result=verify_result())],
    )
    assert exit_code(done, strict=False) == 0
    assert exit_code(done, strict=True) == 1
    done.stages[0].verify_result.passed = True
    assert exit_code(done, strict=True) == 0
    assert exit_code(gateway_pb2.Run(state=gateway_pb2.RUN_STATE_FAILED), strict=False) == 1


def test_the_suggested_question_survives_a_shell() -> None:
    result = verify_result(samples=[deployer_pb2.Sample(core="tool", prompt='Don\'t "stop" $HOME')])
    run = gateway_pb2.Run(stages=[stage("VERIFY", "SUCCEEDED", verify_result=result)])
    assert question(run) == """ 'Don'"'"'t "stop" $HOME'"""


def test_the_line_of_a_test_counts_prompts_and_names_what_it_was_compared_with() -> None:
    result = verify_result(prompts=100)
    assert verified(result).startswith("100 prompts before and after quantization")
    assert verified(result, "another").startswith("100 prompts against another")
    result.prompts = 0  # as runs from before prompts were counted have it
    assert verified(result).startswith(f"{len(result.scores)} score")


def test_a_queued_stage_says_what_it_waits_for(capsys: pytest.CaptureFixture[str]) -> None:
    run = gateway_pb2.Run(state="RUN_STATE_QUEUED")
    queued = run.stages.add(name="STAGE_NAME_TRAIN", state="STAGE_STATE_QUEUED")
    queued.progress.phase, queued.progress.seconds_left = "wait", 840.0
    queued.progress.message = "waiting for the trainer, 2 runs ahead, about 14 min"
    shown = LineFollower()
    shown.update(run)
    shown.update(run)  # the same again is no news
    queued.state = gateway_pb2.STAGE_STATE_RUNNING
    shown.update(run)
    said = capsys.readouterr().out.splitlines()
    assert said[0].split("train", 1)[1].strip() == queued.progress.message
    assert said[1].split() == ["train", "starts"]
    assert _state(gateway_pb2.Run(state="RUN_STATE_QUEUED")) == "queued"
    queued.state = gateway_pb2.STAGE_STATE_QUEUED
    assert _state(run) == "queued: train, waiting for the trainer, 2 runs ahead, about 14 min"
    assert queued.progress.message in rendered(overview(run))
