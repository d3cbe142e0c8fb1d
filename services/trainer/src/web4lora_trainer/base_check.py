"""Checks a base model against itself before anything is stored or trained.

What is compared: the weights with the architecture that config.json names, by letting transformers itself
take them without reading them; head and embedding with the vocabulary; the tokenizer's ids with the rows
of the embedding; and the values. What transformers would fill with random numbers, or leave out, is refused
here by name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from web4lora_chassis.errors import InvalidInput, shown
from web4lora_chassis.model_files.model_folder import named, read_json
from web4lora_chassis.model_files.safetensors import Tensor

from web4lora_trainer.base_values import check_values, same_values, untrained_rows
from web4lora_trainer.broken_base import broken, first_line, of_the_base
from web4lora_trainer.decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in)\.weight$")
_HEAD = re.compile(r"(^|\.)lm_head\.weight$")
_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


@of_the_base()
def check_base(decoder: Decoder, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Check a base model against itself.

    Args:
        decoder: The folder; headers, index and sizes are checked already.
        tokenizer: Its tokenizer.

    Returns:
        What deserves a look but stops nothing.

    Raises:
        InvalidInput: It contradicts itself; the message names the file or tensor and what to do.
    """
    _check_vocabulary(decoder)
    model = _check_architecture(decoder)
    _check_ids(decoder)
    embedding = _embedding(decoder)
    _check_head(decoder, model)
    _check_tokens(decoder, tokenizer, embedding)
    notes = check_values(decoder.tensors.values())
    notes += [
        f"the chat template writes {text}, as if never trained; its instruct version may fit better"
        for text in untrained_rows(embedding, _template_tokens(tokenizer, embedding.shape[0]))
    ]
    return notes


def own_head(decoder: Decoder) -> Tensor | None:
    """Return the output head where it is other weights than the embedding."""
    head = next((tensor for name, tensor in decoder.tensors.items() if _HEAD.search(name)), None)
    return None if head is None or same_values(head, _embedding(decoder)) else head


def context_tokens(folder: Path) -> int:
    """Return how many tokens the model was made for; 0 when its configuration does not say.

    Raises:
        InvalidInput: transformers does not know the architecture.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise _unusable(folder, error) from error
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else 0


def _unusable(folder: Path, error: Exception) -> InvalidInput:
    return broken(
        f"transformers can't make a model of {folder / 'config.json'}: {first_line(error)}",
        "Correct config.json, or choose a decoder model that transformers knows.",
        "ARCHITECTURE_UNUSABLE",
    )


def _check_vocabulary(decoder: Decoder) -> None:
    """Compare vocab_size with the embedding, in words of its own: the commonest contradiction."""
    vocabulary = decoder.text_config.get("vocab_size")
    if vocabulary is None:
        return  # the architecture's own; transformers knows it
    embedding = _embedding(decoder)
    if embedding.shape[0] != vocabulary:
        raise broken(
            f"config.json says vocab_size {vocabulary}, {embedding.name} in {embedding.path.name} has "
            f"{embedding.shape[0]} rows.",
            "Put the number of rows into config.json, if tokens were added, or fetch the config.json that "
            "belongs to the weights.",
        )


def _check_architecture(decoder: Decoder) -> PreTrainedModel:
    """Let transformers take the weights without reading them; return the empty model.

    Raises:
        InvalidInput: It does not know the architecture, or weights are missing, left over or of other shapes.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as reports

    before = reports.get_verbosity()
    reports.set_verbosity(logging.ERROR)  # else its report comes, a page of advice on training
    reports.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            decoder.folder,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        model, found = loaded
    except Exception as error:
        raise _unusable(decoder.folder, error) from error
    finally:
        reports.set_verbosity(before)
    _check_class(decoder, type(model).__name__)
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        raise broken(
            f"{_place(decoder, name)} has the shape {list(stored)}; config.json asks for {list(wanted)}.",
            "Fetch the config.json that belongs to the weights.",
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise broken(
            f"The base model's weights lack {named(missing)}, which config.json asks for.",
            _remedy_for_missing(missing),
        )
    if found["unexpected_keys"]:
        raise broken(
            f"The base model's weights hold {named(found['unexpected_keys'])}, for which config.json has no "
            "place: it would be left out.",
            "Fetch the config.json that belongs to the weights.",
        )
    return model  # type: ignore[no-any-return]


def _check_class(decoder: Decoder, made: str) -> None:
    """Compare `architectures`, by which llama.cpp converts, with what transformers trains."""
    architectures = decoder.config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise broken("config.json names no `architectures`.", f'Add "architectures": ["{made}"].')
    if architectures[0] != made and not decoder.config.get("text_config"):
        raise broken(
            f"config.json names the architecture {architectures[0]}, and its model_type "
            f"{decoder.config.get('model_type')!r} is that of {made}.",
            "Fetch the config.json that belongs to the weights; a model with another head than a language "
            "model's can't be trained here.",
        )


def _remedy_for_missing(missing: list[str]) -> str:
    if missing == ["lm_head.weight"]:
        return (
            "Fetch the rest of the model; or, if its head is its embedding, set tie_word_embeddings to true "
            "in config.json."
        )
    return "Fetch the rest of the model."


def _place(decoder: Decoder, name: str) -> str:
    tensor = decoder.tensors.get(name)
    return f"{tensor.path.name}: {name}" if tensor else name


def _embedding(decoder: Decoder) -> Tensor:
    found = [tensor for name, tensor in sorted(decoder.tensors.items()) if _EMBEDDING.search(name)]
    found = [tensor for tensor in found if len(tensor.shape) == 2]
    if not found:
        raise broken("The base model's weights lack the embedding of tokens.", "Fetch the rest of the model.")
    return found[0]


def _check_head(decoder: Decoder, model: PreTrainedModel) -> None:
    """Compare a head that is stored beside the embedding that transformers' own class ties it to."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    for name, tensor in decoder.tensors.items():
        source = decoder.tensors.get(str(tied.get(name, "")))
        if source is not None and not same_values(tensor, source):
            raise broken(
                f"{tensor.path.name}: {name} has other values than {source.name}, to which "
                f"{type(model).__name__} ties it.",
                "Set tie_word_embeddings to false in config.json if the model has a head of its own, or take "
                f"{name} out.",
            )


def _check_ids(decoder: Decoder) -> None:
    """Check the ids of special tokens in config.json and generation_config.json."""
    generation = decoder.folder / "generation_config.json"
    given: list[tuple[str, Mapping[str, Any]]] = [("config.json", decoder.text_config)]
    if generation.is_file():
        given.append((generation.name, read_json(generation)))
    rows = _embedding(decoder).shape[0]
    for file, config in given:
        for key in _ID_KEYS:
            value = config.get(key)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if key == "pad_token_id" and ids == [-1]:
                continue  # some write it for "none"
            for number in ids:
                if type(number) is not int or not 0 <= number < rows:
                    raise broken(
                        f"{file} says {key} {shown(number)}; the model has the tokens 0 to {rows - 1}.",
                        f"Correct {key} in {file}.",
                    )


def _check_tokens(decoder: Decoder, tokenizer: PreTrainedTokenizerBase, embedding: Tensor) -> None:
    """Check that every token of the tokenizer has an embedding, and special tokens are tokens."""
    rows = embedding.shape[0]
    vocabulary = tokenizer.get_vocab()
    beyond = sorted((number, token) for token, number in vocabulary.items() if number >= rows)
    if beyond:
        number, token = beyond[0]
        raise broken(
            f"The tokenizer's {shown(token)} has the id {number}, and {embedding.name} has {rows} rows"
            + (f"; so have {len(beyond) - 1} more." if len(beyond) > 1 else "."),
            "Fetch the tokenizer that belongs to the weights, or take the added tokens out of it.",
        )
    stored = _stored_tokens(decoder.folder)
    for role in ("eos_token", "bos_token", "pad_token"):
        token = getattr(tokenizer, role)
        if token is not None and str(token) not in stored:
            raise broken(
                f"The tokenizer's settings name the {role} {shown(str(token))}, which tokenizer.json lacks.",
                f"Correct {role} in tokenizer_config.json.",
            )


def _stored_tokens(folder: Path) -> set[str]:
    """Return the tokens that the tokenizer's files hold, before transformers adds any of its own."""
    data = read_json(folder / "tokenizer.json")
    added = {str(entry.get("content")) for entry in data.get("added_tokens") or ()}
    config = (
        read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    )
    added |= {str(entry.get("content")) for entry in (config.get("added_tokens_decoder") or {}).values()}
    if (folder / "added_tokens.json").is_file():
        added |= set(read_json(folder / "added_tokens.json"))
    vocabulary = (data.get("model") or {}).get("vocab") or {}
    return added | {str(entry if isinstance(entry, str) else entry[0]) for entry in vocabulary}


def _template_tokens(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[int, str]:
    """Return the special tokens that the chat template writes, by id."""
    template = str(tokenizer.chat_template)
    written = {
        str(token): number for token, number in tokenizer.get_added_vocab().items() if token in template
    }
    if tokenizer.eos_token and "eos_token" in template:
        written[str(tokenizer.eos_token)] = int(tokenizer.eos_token_id)
    return {number: token for token, number in written.items() if number < rows}
