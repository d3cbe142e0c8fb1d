"""A tiny model as packaging makes it, and every gate it must pass, each under the name of its stage."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from web4lora_chassis.errors import Web4Error
from web4lora_chassis.model_files.gguf import read_gguf
from web4lora_deployer.prompts.gate import Served, prompts, refusal
from web4lora_deployer.prompts.gate import compare as compare_prompts
from web4lora_deployer.runtimes.tokens import tokenizer_of
from web4lora_llamacpp import LlamaCpp
from web4lora_packager.chat_template import read_tokenizer
from web4lora_packager.check import check_header, check_loads, check_stops
from web4lora_packager.child import ask
from web4lora_packager.convert import convert, prove
from web4lora_packager.layout import Layout, read_layout
from web4lora_packager.merge import Merge
from web4lora_packager.next_tokens import LIMIT, Said, compare, kept_answers
from web4lora_packager.trained import read_kept, trained_stops

from tests import tiny_llama, trained_base


@dataclass
class Trained:
    """A base, an adapter on it and the record of its training.

    Attributes:
        llama: The tools.
        folder: Everything is below it.
        layout: How Transformers reads the base; known when it was written.
    """

    llama: LlamaCpp
    folder: Path
    layout: Layout = field(init=False)

    @property
    def base(self) -> Path:
        """The base's folder."""
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        """The adapter's folder."""
        return self.folder / "adapter"

    def write(self, seed: int = 1) -> Trained:
        """Make base, adapter and record."""
        trained_base.write_sentencepiece_base(self.base)
        tiny_llama.write_adapter(self.adapter, self.base, seed=seed)
        record = json.dumps(trained_base.record_of(self.base))
        (self.adapter / "trained_conversations.json").write_text(record)
        self.layout = read_layout(self.base, self.adapter, self.folder)
        return self

    def merge(self, target: Path, base: Path | None = None, adapter: Path | None = None) -> Path:
        """Merge and convert, and return the GGUF."""
        base, adapter = base or self.base, adapter or self.adapter
        made = Merge(base, adapter, self.layout)
        convert(
            self.llama, base, target,
            gguf_type="F16", name="tiny", merge=made, log=self.folder / "log", report=lambda _: None,
        )  # fmt: skip
        return target

    def stopped_at(self, gguf: Path, base: Path | None = None) -> tuple[str, str]:
        """Hold a GGUF against every gate, in their order.

        Args:
            gguf: The file.
            base: The base whose tokenizer and template it must have.

        Returns:
            The stage that refused it, and why; "" twice when none did.
        """
        tokenizer, kept = read_tokenizer(base or self.base), read_kept(self.adapter)
        loaded: Any = None
        answers = kept_answers(kept)

        def proved() -> None:
            merge = Merge(self.base, self.adapter, self.layout)
            prove(self.llama, merge, gguf, log=self.folder / "log", report=lambda _: None)

        def headed() -> None:
            check_header(read_gguf(gguf), tokenizer, None, gguf.name)

        def ended() -> None:
            nonlocal loaded
            loaded = check_loads(
                self.llama, gguf, log=self.folder / "server.log", timeout_seconds=300, answers=answers
            )
            check_stops(loaded, trained_stops(kept, tokenizer, None), gguf.name)

        def prompted() -> None:
            with tokenizer_of(self.llama, gguf, self.folder / "tokenizer.log") as served:
                wanted = prompts(
                    [self.adapter / "trained_conversations.json"], read_gguf(gguf), served, lambda _: None
                )
                counts = {json.dumps(each.messages): len(each.ids) for each in wanted}
                runtime = Served(
                    lambda messages, _: counts[json.dumps(messages)], served.render, served.ends, 2048
                )
                if finding := compare_prompts(wanted, served, runtime):
                    raise refusal(gguf.name, finding, "Package again.")

        stages = (("merge", proved), ("convert", headed), ("convert", ended), ("deploy", prompted))
        for stage, gate in stages:
            try:
                gate()
            except Web4Error as error:
                return stage, error.message
        # Last here, since it takes the longest; packaging asks before it quantizes.
        told = ask("expect", self.folder, self.base, self.adapter)
        expected = Said(tuple(tuple(dict(place) for place in answer) for answer in told["likely"]), {})
        found = compare("convert", answers, expected, loaded.said, limit=LIMIT)
        return ("", "") if found.passed else ("convert", found.measured)
