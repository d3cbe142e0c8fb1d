"""Chat templates: programs that come with a model, as every part that renders one runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

from tests.corpus.case import Case, Change, Kind, having, holds, no_json
from tests.tiny_base import CHATML, make_base

FILE, CONFIG, OLD = "chat_template.jinja", "tokenizer_config.json", "chat_template.json"
ASK = {"role": "user", "content": "a"}


def bounded(read: Callable[[Path], object]) -> Callable[[Path, Path], object]:
    """Give a template less time and memory than in use, so that its many cases end soon."""

    def call(folder: Path, _: Path) -> None:
        from web4lora_chassis.model_files import chat_template

        small = partial(chat_template.Bounds, cpu_seconds=1, memory_bytes=256 << 20, output_bytes=1 << 20)
        with patch.object(chat_template, "Bounds", small):
            read(folder)

    return call


def text_of(folder: Path) -> str:
    from web4lora_chassis.model_files.chat_template import template_in

    return template_in(folder, json.loads((folder / CONFIG).read_text()))


def chassis(folder: Path) -> None:
    from web4lora_chassis.model_files.chat_template import ChatTemplate

    ChatTemplate(text_of(folder), {"eos_token": "</s>"}).render([ASK])


def deployer(folder: Path) -> None:
    from web4lora_chassis.model_files.gguf import GgufHeader
    from web4lora_deployer.prompts.gate import own_prompts

    own_prompts(GgufHeader({"tokenizer.chat_template": text_of(folder)}))


def packager(folder: Path) -> None:
    from web4lora_packager.chat_template import read_tokenizer

    read_tokenizer(folder).render([ASK], answer_next=True)


def trainer(folder: Path) -> None:
    from web4lora_chassis.dataset import read_dataset
    from web4lora_chassis.pipeline.train import TrainSettings
    from web4lora_trainer.prepare import prepare

    prepare(TrainSettings(), read_dataset([folder / "rows.jsonl"]), folder)


def whole(folder: Path) -> None:
    make_base(folder)
    row = {"messages": [ASK, {"role": "assistant", "content": "b"}]}
    (folder / "rows.jsonl").write_text(json.dumps(row))


BROKEN = {
    "not closed": "{% for m in messages %}",
    "no expression": "{{ 1 + }}",
    "an unknown tag": "{% import_all %}x",
    "an unknown filter": "{{ messages | steal }}",
    "a range of 10^10": "{% for a in range(10**10) %}{% endfor %}",
    "ranges within ranges": "{% for a in range(9**5) %}{% for b in range(9**5) %}{% for c in range(9**5) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "a list that grows": "{% set ns = namespace(a=[1]) %}{% for m in range(99) %}{% set ns.a = ns.a + ns.a %}"
    "{% endfor %}",
    "a text that doubles": "{% set ns = namespace(a='x') %}{% for m in range(60) %}"
    "{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a }}",
    "a text of 10^10": "{{ 'x' * 10**10 }}",
    "a text of 2 MB": "{{ 'x' * 2 * 10**6 }}",
    "a power without end": "{{ 9 ** (9 ** 9) }}",
    "a macro that calls itself": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "two macros that call each other": "{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}"
    "{% endmacro %}{{ a() }}",
    "nested 5,000 deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "lists 1,000 deep": "{{ " + "[" * 1000 + "]" * 1000 + " }}",
    "ifs 1,000 deep": "{% if 1 %}" * 1000 + "{% endif %}" * 1000,
    "a sum of 100,000": "{{ " + "1+" * 100_000 + "1 }}",
    "a number of 5,000 digits": "{{ " + "9" * 5000 + " }}",
    "padding of 10^10": "{{ '%10000000000d' | format(1) }}",
    "a center of 10^10": "{{ 'x' | center(10**10) }}",
    "words joined without end": "{{ (['x' * 10**5] * 10**5) | join }}",
    "into the classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "into the classes by format": "{{ '{0.__class__.__mro__}'.format('') }}{{ undefined_thing.x }}",
    "into the globals": "{{ raise_exception.__globals__ }}{{ namespace.__init__.__globals__ }}",
    "into a generator's frame": "{{ (messages | map('upper')).gi_frame.f_globals }}",
    "a file": "{% include '/etc/passwd' %}",
    "a module": "{% import 'os' as os %}{{ os.system('true') }}",
    "a parent": "{% extends '/etc/passwd' %}",
    "a change of the messages": "{{ messages.append(1) }}",
    "a change of a message": "{{ messages[0].update(role='x') }}",
    "a refusal": "{{ raise_exception('no') }}",
    "a refusal of many lines": "{{ raise_exception('a\\nb\\x1b[31m' * 999) }}",
    "a refusal of half a character": "{{ raise_exception('\\ud800') }}",
    "a refusal of no text": "{{ raise_exception(7) }}",
    "a division by 0": "{{ 1 / 0 }}",
    "a key that is not there": "{{ messages[9].content.x }}",
    "a time of no form": "{{ strftime_now(7) }}",
}
"""Texts that no conversation can be rendered by."""

ALL = ("chassis", "deployer", "trainer")
EVERYWHERE = (
    "not closed", "ranges within ranges", "a list that grows", "a text of 10^10", "a power without end",
    "a macro that calls itself", "into the classes", "a refusal of half a character", "a division by 0",
)  # fmt: skip
"""Those that the gate and a whole preparation meet too, which takes them seconds each."""

FILES: dict[str, Change] = {
    "not UTF-8": holds(FILE, b"\xff\xfe{{ x }}"),
    "UTF-16": holds(FILE, CHATML.encode("utf-16")),
}
SETTINGS: dict[str, object] = {
    "a number": 7,
    "a list of numbers": [1, 2],
    "a list of no default": [{"name": "tools", "template": "x"}],
    "a list of odd templates": [{"name": "default", "template": ["x"]}],
    "an object of numbers": {"default": 7},
    "empty": "",
}


def only(name: str, value: object) -> Change:
    """Have the template in the tokenizer's settings alone."""

    def apply(folder: Path) -> None:
        (folder / FILE).unlink()
        having(name, chat_template=value)(folder)

    return apply


def old(content: bytes) -> Change:
    def apply(folder: Path) -> None:
        (folder / FILE).unlink()
        (folder / OLD).write_bytes(content)

    return apply


KIND = Kind(
    name="chat template",
    whole=whole,
    readers={
        "chassis": bounded(chassis),
        "deployer": bounded(deployer),
        "packager": bounded(packager),
        "trainer": bounded(trainer),
    },
    cases=(
        *(Case(name, holds(FILE, text), readers=ALL if name in EVERYWHERE else ("chassis",))
          for name, text in BROKEN.items()),
        *(Case(f"file: {name}", change, readers=("chassis", "packager")) for name, change in FILES.items()),
        *(Case(f"{OLD}: {case.name}", lambda folder, case=case: (old(b"")(folder), case.damage(folder)),
               readers=("chassis", "packager")) for case in no_json(OLD)
          if case.name.partition(": ")[2] not in ("a list", "a number", "null")),
        *(Case(f"setting: {name}", only(CONFIG, value), readers=("trainer", "deployer"))
          for name, value in SETTINGS.items()),
    ),
    names="chat template|tokenizer",
    lines=2,  # of rows, the problem and the count
    modules=("transformers", "torch"),
)  # fmt: skip
