from __future__ import annotations

from pathlib import Path

import pytest
from web4lora.pipeline_file import PipelineFile, read_pipeline
from web4lora_chassis.errors import InvalidInput, NotFound

GOOD = """\
name: web4-demo
dataset:
  train_files: [train.jsonl]
base:
  model: smollm2-135m-instruct
"""


@pytest.fixture(autouse=True)
def _in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "eval.jsonl", "suite.yaml"):
        (tmp_path / name).touch()


def read(text: str, *overrides: str) -> PipelineFile:
    Path("demo.yaml").write_text(text, "utf-8")
    return read_pipeline(Path("demo.yaml"), overrides)


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        read(text, *overrides)
    return caught.value.message.splitlines()


def test_a_good_file_becomes_a_message(tmp_path: Path) -> None:
    file = read(
        GOOD
        + """\
train:
  learning_rate: 2e-3          # YAML 1.1 would call this text
  gradient_checkpointing: on   # and this true
  lora: {rank: 8, target_modules: [q_proj, v_proj]}
  loss_band: {low: 0.1}
  write_bin: false
  max_steps: 0
verify:
  suite_file: suite.yaml
  budgets:
    max_memory_bytes: 26 GB
    min_score_percent: {tool_call.valid: 95}
"""
    )
    train = file.pipeline.train
    assert train.learning_rate == 0.002
    assert train.gradient_checkpointing == "on"
    assert list(train.lora.target_modules) == ["q_proj", "v_proj"]
    assert train.HasField("write_bin")
    assert not train.write_bin
    assert train.HasField("max_steps")
    assert not train.HasField("epochs")
    assert not train.loss_band.HasField("high")
    assert file.pipeline.verify.budgets.max_memory_bytes == 26_000_000_000
    assert file.pipeline.verify.budgets.min_score_percent["tool_call.valid"] == 95
    assert file.train_files == (tmp_path / "train.jsonl",)
    assert file.suite_file == tmp_path / "suite.yaml"


def test_an_unknown_key_is_named_with_its_line_and_what_may_be_meant() -> None:
    assert problems(GOOD + "train:\n  learnig_rate: 1e-3\n") == [
        "demo.yaml:7: train.learnig_rate is not a key here; did you mean learning_rate?"
    ]
    assert problems(GOOD + "rank: 8\n") == ["demo.yaml:6: rank is not a key here; it belongs to train.lora."]
    [text] = problems(GOOD + "qqq: 8\n")
    keys = "name, dataset, base, train, package, deploy, verify"
    assert text == f"demo.yaml:6: qqq is not a key here; the keys are {keys}."


def test_references_that_the_client_sets_are_no_keys() -> None:
    [text] = problems(GOOD + "verify:\n  suite: {name: x}\n")
    assert text.startswith("demo.yaml:7: verify.suite is not a key here")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {epochs: many}", "train.epochs needs a number, this is 'many'."),
        ("train: {epochs: .nan}", "train.epochs needs a number, this is '.nan'."),
        ("train: {max_steps: 1.5}", "train.max_steps needs a whole number, this is '1.5'."),
        ("train: {max_steps: 3000000000}", "train.max_steps needs a whole number"),
        ("train: {write_bin: 1}", "train.write_bin needs true or false, this is '1'."),
        ("train: {lora: 16}", "train.lora needs a mapping with the keys rank, alpha"),
        ("train: [1]", "train needs a mapping"),
        ("package: {quantizations: Q4_K_M}", "package.quantizations needs a list: [Q4_K_M]."),
        ("package: {quantizations: [[a]]}", "package.quantizations[0] needs text, this is a list."),
        ("verify: {budgets: {max_memory_bytes: 26 apples}}", "or a size like 26 GB"),
        ("verify: {budgets: {min_score_percent: {a: b}}}", "min_score_percent.a needs a number"),
        ("? [a]\n: b", "a key must be a word, this is a list."),
        ("name: other", "name is given twice, first on line 1."),
    ],
)
def test_a_wrong_value_is_named_with_its_line(text: str, said: str) -> None:
    [found] = problems(GOOD + text + "\n")
    assert found.startswith("demo.yaml:6: ")
    assert said in found


def test_all_problems_are_listed_the_first_twenty_in_full() -> None:
    found = problems(GOOD + "".join(f"zz{number}: 1\n" for number in range(30)))
    assert len(found) == 21
    assert found[0].startswith("demo.yaml:6: zz0 ")
    assert found[20] == "… and 10 more, 30 in all"


def test_what_is_not_a_pipeline_is_said_in_one_line() -> None:
    assert problems("") == ["demo.yaml is empty."]
    assert problems("a: [") == ["demo.yaml:1: not YAML: expected the node content, but found '<stream end>'."]
    assert problems("a: *b") == ["demo.yaml:1: not YAML: found undefined alias 'b'."]
    assert "needs a mapping" in problems("- a")[0]
    with pytest.raises(NotFound, match=r"gone\.yaml can't be read"):
        read_pipeline(Path("gone.yaml"))


def test_what_every_pipeline_needs_is_asked_for() -> None:
    assert problems("train: {epochs: 1}") == [
        "demo.yaml: name is missing; add `name: web4-demo`.",
        "demo.yaml: dataset.train_files is missing; add `train_files: [train.jsonl]`.",
        "demo.yaml: base.model is missing; add `model: smollm2-135m-instruct`.",
    ]


def test_missing_files_are_named_with_their_own_lines() -> None:
    text = GOOD.replace("[train.jsonl]", "\n    - train.jsonl\n    - gone.jsonl")
    assert problems(text + "verify: {suite_file: no.yaml}\n") == [
        "demo.yaml:5: dataset.train_files: gone.jsonl is not there.",
        "demo.yaml:8: verify.suite_file: no.yaml is not there.",
    ]


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "deep" / "model").mkdir(parents=True)
    (tmp_path / "deep" / "p.yaml").write_text(
        GOOD.replace("train.jsonl", "../train.jsonl").replace("smollm2-135m-instruct", "./model"), "utf-8"
    )
    file = read_pipeline(Path("deep/p.yaml"))
    assert file.train_files[0].samefile(tmp_path / "train.jsonl")
    assert file.pipeline.base.model == str(tmp_path / "deep" / "model")


def test_a_base_model_is_a_path_only_when_it_looks_like_one() -> None:
    def model(text: str) -> str:
        return read(GOOD.replace("smollm2-135m-instruct", text)).pipeline.base.model

    assert model("Qwen/Qwen2.5-Coder-7B-Instruct") == "Qwen/Qwen2.5-Coder-7B-Instruct"
    assert model("/models/on/the/trainer") == "/models/on/the/trainer"
    assert problems(GOOD.replace("smollm2-135m-instruct", "./gone.gguf")) == [
        "demo.yaml:5: base.model: ./gone.gguf is not there."
    ]


def test_overrides_win_and_are_checked_the_same_way() -> None:
    file = read(
        GOOD + "train:\n  epochs: 1\n  lora: {target_modules: [q_proj, k_proj]}\n",
        "train.epochs=2",
        "train.lora.target_modules=[v_proj]",
        "verify.suite_file=suite.yaml",
        "verify.budgets.min_score_percent.tool_call.valid=90",
        "name=other",
    )
    assert file.pipeline.train.epochs == 2
    assert list(file.pipeline.train.lora.target_modules) == ["v_proj"]
    assert file.pipeline.verify.budgets.min_score_percent["tool_call.valid"] == 90
    assert file.pipeline.name == "other"
    assert problems(GOOD, "train.epoch=1", "nothing", "train.epochs=x", "train.epochs.a=1") == [
        "--set train.epoch=1: train.epoch is not a key here; did you mean epochs?",
        "--set nothing: write key=value, for example --set train.epochs=2",
        "--set train.epochs=x: train.epochs needs a number, this is 'x'.",
        "--set train.epochs.a=1: train.epochs.a is not a key here: train.epochs has no keys below it.",
    ]


def test_a_service_error_is_traced_to_the_line_it_speaks_of() -> None:
    file = read(GOOD + "train:\n  epochs: 1\n", "train.seed=3")
    error = InvalidInput("needs 1 or more.", fix="Choose more.", metadata={"field": "train.epochs"})
    located = file.located(error)
    assert (located.message, located.fix) == ("demo.yaml:7: needs 1 or more.", "Choose more.")
    assert file.place("pipeline.train.epochs") == "demo.yaml:7"
    assert file.place("train.lora.rank") == "demo.yaml:6"
    assert file.place("train.seed") == "--set train.seed=3"
    assert file.place("deploy.target") == "demo.yaml"
    plain = InvalidInput("no field")
    assert file.located(plain) is plain


DEEP = "[" * 2000
NO_HOME = "base.model: ~nobody-here/x begins with the home folder of someone unknown here"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('train: {dtype: "\\ud800"}', "train.dtype holds U+D800, which no text may hold."),
        ('verify: {suite_file: "\\0"}', "verify.suite_file holds U+0000, which no text may hold."),
        ('"\\ud800": 1', "a key holds U+D800"),
        ('verify: {budgets: {min_score_percent: {"\\ud800": 1}}}', "a key holds U+D800"),
        ("train: {seed: " + "9" * 5000 + "}", "train.seed needs a whole number"),
        ("verify: {suite_file: " + "a/" * 3000 + "}", "is not there."),
        ("verify: {suite_file: " + "a" * 5000 + "}", "is not there."),
        ("verify: {suite_file: ~nobody-here/x}", "begins with the home folder of someone unknown here"),
        ("a: " + DEEP, "not YAML"),
    ],
)
def test_no_odd_text_ends_as_a_foreign_error(text: str, said: str) -> None:
    assert any(said in line for line in problems(GOOD + text + "\n"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train=", "train needs a mapping"),
        ("base=", "base needs a mapping"),
        (f"train={DEEP}", "is not a YAML value"),
        ("base.model=~nobody-here/x", NO_HOME),
        ("train={lora: {rank: 0}}", "--set train={lora: {rank: 0}}: train.lora.rank: 0 must be at least 1"),
        ("name=My-Model", "--set name=My-Model: name: 'My-Model' is not a pipeline name"),
    ],
)
def test_no_odd_override_ends_as_a_foreign_error(override: str, said: str) -> None:
    found = problems(GOOD + "train: {lora: {rank: 1}}\n", override)
    assert any(said in line for line in found), found


def test_rules_come_with_lines_and_all_problems_in_the_order_of_the_file() -> None:
    text = GOOD.replace("web4-demo", "My-Model").replace("[train.jsonl]", "[gone.jsonl]")
    found = problems(text + "package:\n  quantizations:\n  - Q8_0\n  - Q4_K\nzz: 1\n")
    assert [line.partition(": ")[0] for line in found] == [f"demo.yaml:{n}" for n in (1, 3, 9, 10)]
    assert "my-model would be one" in found[0]
    assert "did you mean Q4_K_M?" in found[2]


def test_errors_about_the_suite_speak_of_the_files_here() -> None:
    file = read(GOOD + "verify: {suite_file: suite.yaml}\n")
    for stored, said in (("suite.yaml:3: x.", "suite.yaml:3: x."), ("a/p.jsonl:1: y.", "a/p.jsonl:1: y.")):
        assert file.located(InvalidInput(stored, reason="BAD_SUITE")).message == said


def test_lines_about_the_suite_follow_those_about_the_pipeline() -> None:
    file = read(GOOD + "train:\n  epochs: 1\nverify: {suite_file: suite.yaml}\n")
    error = InvalidInput(
        "a.\nsuite.yaml:3: x.\n… and 1 more", reason="BAD_SUITE", metadata={"field": "train.epochs"}
    )
    assert file.located(error).message == "demo.yaml:7: a.\nsuite.yaml:3: x.\n… and 1 more"


def test_several_lines_of_a_service_are_traced() -> None:
    file = read(GOOD + "train:\n  epochs: 1\n  seed: 2\n")
    error = InvalidInput("a.\nb.\n… and 1 more", metadata={"field": "train.epochs\ntrain.seed"})
    assert file.located(error).message == "demo.yaml:7: a.\ndemo.yaml:8: b.\n… and 1 more"


@pytest.mark.parametrize("named", ["run_2026-05-04_1", "latest", "0123456789ab", "a" * 64, "123456789012"])
def test_what_to_go_on_from_is_a_run_or_a_digest(named: str) -> None:
    train = read(GOOD + f"train: {{from: {named}}}\n").pipeline.train
    assert getattr(train, "from") == named


@pytest.mark.parametrize("named", ["web4-demo", "0123", "A" * 64, "../x"])
def test_anything_else_to_go_on_from_is_refused_with_its_line(named: str) -> None:
    (line,) = problems(GOOD + f"train:\n  from: {named}\n")
    assert line.startswith("demo.yaml:7: train.from: ")
    assert "is not the id of a run or the digest of an adapter" in line
