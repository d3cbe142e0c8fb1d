"""Prepare: the core's first verb. All that can be known before training starts is found out here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from web4lora_chassis.dataset import Dataset
from web4lora_chassis.errors import InvalidInput
from web4lora_chassis.model_files.modelfile import LICENCE, SYSTEM, licence_of, quoted
from web4lora_chassis.pipeline.package import context_problems
from web4lora_chassis.pipeline.rules import Problem, error_of
from web4lora_chassis.pipeline.train import TrainSettings

from web4lora_trainer.answers import ChatTemplate, renderer
from web4lora_trainer.base_check import check_base, context_tokens, own_head
from web4lora_trainer.base_model import load_tokenizer
from web4lora_trainer.decoder import Decoder, read_decoder
from web4lora_trainer.device import Device, choose_device, require_one_process
from web4lora_trainer.encoding import Encoded, EncodedRows, refused_error
from web4lora_trainer.plan import make_plan
from web4lora_trainer.preflight import Estimate, estimate, measured, require_memory
from web4lora_trainer.rehearsal import Rehearser
from web4lora_trainer.rows import encode_dataset, sampled
from web4lora_trainer.token_check import (
    TrainedText,
    compare_tokens,
    cut_answers,
    llama_ends,
    llama_tokenize,
)
from web4lora_trainer.vocabulary import kept_vocabulary, require_place_for_head

if TYPE_CHECKING:
    import psutil

_COMPARED_ROWS = 12


@dataclass(frozen=True)
class Preparation:
    """What preparing found out.

    Attributes:
        device: Where training will run, and in which number format.
        train: The rows to train on.
        held_out: The held-out rows, all of them.
        estimate: What training will need.
        context_tokens: How many tokens the base was made for; 0 when it does not say.
        notes: What deserves a look in the base.
        compared: What was compared with llama.cpp and found equal; empty where nothing was.
    """

    device: Device
    train: EncodedRows
    held_out: EncodedRows
    estimate: Estimate
    context_tokens: int = 0
    notes: tuple[str, ...] = ()
    compared: str = ""

    @property
    def warnings(self) -> list[str]:
        """What deserves a look but stops nothing."""
        found = list(self.notes)
        for name, rows in (("training", self.train), ("held-out", self.held_out)):
            if rows.rows_too_long:
                found.append(
                    f"{rows.rows_too_long} {name} rows with {rows.answers_too_long} answers are longer than "
                    "max_length_tokens and left out"
                )
            if rows.answers_excluded:
                found.append(f"{rows.answers_excluded} {name} answers have a weight of 0: not trained on")
            if rows.stop_tokens_added:
                found.append(
                    f"the chat template writes no end-of-turn token behind {rows.stop_tokens_added} {name} "
                    "answers; the tokenizer's end-of-sequence token was added"
                )
            if rows.answers_rewritten:
                found.append(
                    f"the chat template rewrites {rows.answers_rewritten} {name} answers (as it does with "
                    "reasoning); each is trained as it stands in the data, behind its own prompt"
                )
            if rows.answers_left_open:
                found.append(
                    "the chat template's prompt opens a block, for example <think>, that "
                    f"{rows.answers_left_open} {name} answers do not close; a runtime may take them for "
                    "reasoning"
                )
        return found


@dataclass(frozen=True)
class Converter:
    """llama.cpp, for what it will make of the base later.

    Attributes:
        source: Its source, which holds the converter.
        tokenizer: The program llama-tokenize; None where llama.cpp is not compiled.
        kept: Folder for the vocabularies that it made.
    """

    source: Path
    tokenizer: Path | None
    kept: Path


@dataclass(frozen=True)
class Checked:
    """A base and the settings that fit it, by its headers and its configuration alone.

    Attributes:
        decoder: The base.
        settings: The training to come, its longest row filled in.
        context_tokens: How many tokens the base was made for; 0 when it does not say.
    """

    decoder: Decoder
    settings: TrainSettings
    context_tokens: int


def check_settings(
    settings: TrainSettings, base_folder: Path, contexts: Mapping[str, int] | None = None
) -> Checked:
    """Refuse settings that ask for more than a base has. Takes no time, so it comes before all that does.

    Args:
        settings: The training to come.
        base_folder: The base model's folder.
        contexts: The contexts that later stages ask for, by setting.

    Raises:
        InvalidInput: The base's files contradict each other, or settings don't fit it: all of them are named.
    """
    decoder = read_decoder(base_folder)
    most = context_tokens(base_folder)
    problems = []
    fitting = settings
    try:
        fitting = settings.for_model(most)
    except InvalidInput as error:
        problems.append(_problem(error))
    try:
        decoder.adapted(settings.lora)
    except InvalidInput as error:
        problems.append(_problem(error))
    problems += context_problems(contexts or {}, most)
    if problems:
        raise error_of(problems)
    return Checked(decoder, fitting, most)


def _problem(error: InvalidInput) -> Problem:
    """Return an error about one setting as a problem."""
    return Problem(error.metadata["field"], error.message.partition(": ")[2], error.fix)


def prepare(
    settings: TrainSettings,
    dataset: Dataset,
    base_folder: Path,
    converter: Converter | None = None,
    base_name: str = "base",
    work_dir: Path | None = None,
    licence: str = "",
    other_jobs: Callable[[], Sequence[psutil.Process]] = tuple,
    rehearser: Rehearser | None = None,
    rates: Path | None = None,
) -> Preparation:
    """Check the base against itself and llama.cpp, count tokens, estimate memory, disk and time.

    What takes long comes last: headers, the weights' values and the rows, memory, llama.cpp, a rehearsal.

    Args:
        settings: The training to come.
        dataset: Checked rows.
        base_folder: The base model's folder.
        converter: llama.cpp; None where it is out of reach.
        base_name: The base model's name.
        work_dir: Where the converter writes; needed with a converter.
        licence: The name of the base's licence, for a base without a licence file.
        other_jobs: Returns the processes of the jobs beside this one; the training comes after them.
        rehearser: Makes a few of the planned steps; None leaves memory and time computed.
        rates: Where measured speeds are kept; see `choose_device`.

    Raises:
        InvalidInput: The base contradicts itself or lacks a target module, its chat template refuses rows,
            a setting asks for more than it has, or a Modelfile can't hold its licence or system message.
        FailedPrecondition: Its tokenizer is unusable or unknown to llama.cpp, llama.cpp has no place for its
            output head, every row is too long, or a launcher started several processes.
        ResourceExhausted: Memory is too small.
    """
    require_one_process(os.environ)
    checked = check_settings(settings, base_folder)
    decoder, settings = checked.decoder, checked.settings
    tokenizer = load_tokenizer(base_folder)
    now = datetime.now()
    _check_modelfile(decoder, renderer(tokenizer).default_system(now), licence)
    notes = check_base(decoder, tokenizer)
    compared = ""
    with ThreadPoolExecutor(1) as pool:
        writing = None
        if converter is not None and work_dir is not None:  # a program of its own: it needs no thread of ours
            writing = pool.submit(
                kept_vocabulary, converter.source, decoder, base_name, work_dir, converter.kept
            )
        train, held_out = encode_dataset(settings, dataset, tokenizer, now)
        others = other_jobs()
        device = choose_device(decoder.layer_shapes, settings.dtype, rates=rates)
        sample = sampled(train, held_out, settings, device)
        ending = [*others, *(rehearser.processes if rehearser is not None else ())]
        needed = estimate(decoder, train, sample, settings, device, ending)
        require_memory(needed, settings, device)
        vocabulary = writing.result() if writing is not None else None
    if converter is not None and vocabulary is not None:
        if head := own_head(decoder):
            require_place_for_head(vocabulary, head.name)
        if converter.tokenizer is not None:
            texts = list(trained_texts(train.rows, ChatTemplate(tokenizer, now)))
            compared = compare_tokens(texts, llama_tokenize(converter.tokenizer, vocabulary), tokenizer)
            ends = llama_ends(converter.tokenizer, vocabulary)
            if problems := list(cut_answers(train.rows, ends, tokenizer)):
                raise refused_error(problems)
    if rehearser is not None and others:  # there is memory for one training, and it is at work
        notes.append("memory and time are computed, not measured: another job of this trainer is at work")
    elif rehearser is not None:  # nothing else of this prepare is at work, so that it has the processor
        plan = make_plan("", settings, decoder, train, sample, device)
        rehearsal = rehearser(plan, settings, decoder, train.rows, sample.rows)
        if rehearsal is None:
            notes.append(
                "the rehearsal of the largest step ended before it could tell what it took, as when memory "
                "runs out: memory and time are computed, not measured"
            )
        else:
            needed = measured(needed, rehearsal, decoder, train, sample, settings, device)
            require_memory(needed, settings, device, "A rehearsal of the largest step was measured")
    if converter is None or converter.tokenizer is None:
        notes.append(
            "llama.cpp is not compiled here, so the tokens were not compared with those served; the "
            "deployer's gate does that before anything is promoted"
        )
    return Preparation(device, train, held_out, needed, checked.context_tokens, tuple(notes), compared)


def _check_modelfile(decoder: Decoder, system: str, licence: str) -> None:
    """Refuse a base with texts that the packager can't write beside the model in the end."""
    text, source = licence_of(decoder.files().values(), licence)
    quoted(text, f"{LICENCE}, in {source},")
    quoted(system, SYSTEM)


def trained_texts(rows: Sequence[Encoded], template: ChatTemplate) -> Iterator[TrainedText]:
    """Yield the prompts of a sample of rows, and the tokens that training uses for them.

    Args:
        rows: The rows to train on.
        template: The base model's, with the date that the rows were rendered at.
    """
    for encoded in _sample(rows):
        assert encoded.row is not None
        messages = [message.to_json() for message in encoded.row.messages]
        for turn in encoded.turns:
            prompt = template.render(messages[: turn.messages], encoded.row.tools, answer_next=True)
            yield TrainedText(encoded.row.place, prompt, encoded.input_ids[: turn.prompt_tokens])


def _sample(rows: Sequence[Encoded]) -> list[Encoded]:
    """Return a few rows: with and without a system message, of one turn and of more, and from all over."""
    known = [row for row in rows if row.row is not None]
    kinds: dict[tuple[bool, bool], Encoded] = {}
    for row in sorted(known, key=len):
        kinds.setdefault((row.messages[0].role == "system", len(row.turns) > 1), row)
    spread = known[:: -(-len(known) // _COMPARED_ROWS)] if known else ()
    chosen = {id(row): row for row in (*kinds.values(), *spread)}
    return list(chosen.values())[:_COMPARED_ROWS]
