"""How large a request's fields may be, and that an answer is never too large to be sent.

One walk over a message by its descriptors holds for every call of every service: a field that is added to the
contract is bounded from its first day on. What needs more than the default is named here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from web4lora_chassis.errors import InvalidInput, shown
from web4lora_chassis.rpc.handlers import Behavior, Context, wrapped

TEXT_BYTES = 4096
"""Of a text or bytes, a path for one; and of a map's key."""
LIST_ITEMS = 1000
"""Of a list or a map."""
REQUEST_BYTES = 256 << 10
ANSWER_BYTES = 7 << 19
"""Of an answer: below the 4 MiB that gRPC's clients take unless they are told otherwise."""

_TEXTS = {
    # The facts of a run: its pipeline, of at most REQUEST_BYTES, as JSON, and what its stages came to.
    "web4.lora.v1.VerifySpec.run_json": 3 << 20,
    "web4.lora.v1.ModelParameters.system": 128 << 10,
    "web4.lora.v1.ModelParameters.license": 128 << 10,
    "web4.lora.v1.CreateJobRequest.secrets": 64 << 10,
}
_LISTS = {
    "web4.lora.v1.DatasetSpec.train_files": 4096,
    "web4.lora.v1.DatasetSpec.eval_files": 4096,
}
_REQUESTS = {"web4.lora.v1.CreateJobRequest": ANSWER_BYTES}  # with a run's facts
_SHORTENED = "… (shortened)"
_STEPS_BYTES = (256 << 10, 32 << 10, TEXT_BYTES, 256, 32)

M = TypeVar("M", bound=Message)
T = TypeVar("T")


class Bounds(grpc.aio.ServerInterceptor):
    """Refuses requests with a field out of bounds, and shortens answers that could not be sent."""

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        """See gRPC."""
        handler = await continuation(details)
        return None if handler is None else wrapped(handler, _single, _stream)


def _single(behavior: Behavior) -> Behavior:
    async def call(request: Any, context: Context) -> Any:
        check_request(request)
        return within_bounds(await behavior(request, context))

    return call


def _stream(behavior: Behavior) -> Behavior:
    async def call(request: Any, context: Context) -> AsyncIterator[Any]:
        check_request(request)
        async for message in behavior(request, context):
            yield within_bounds(message)

    return call


def check_request(request: object) -> None:
    """Refuse a request with a field out of bounds.

    Args:
        request: The message; a stream of them, which only reflection has, is left alone.

    Raises:
        InvalidInput: Names the field; `pipeline` is left out of it, as in all that is said of a pipeline.
    """
    if not isinstance(request, Message):
        return
    for path, problem, fix in _problems(request, ""):
        name = path.removeprefix("pipeline.")
        raise InvalidInput(f"{name} {problem}.", fix=fix, reason="TOO_LARGE", metadata={"field": name})
    most = _REQUESTS.get(request.DESCRIPTOR.full_name, REQUEST_BYTES)
    if request.ByteSize() > most:
        raise InvalidInput(
            f"The request {request.DESCRIPTOR.name} has {request.ByteSize()} bytes; it may have {most}.",
            fix="Leave out or shorten what it holds.",
            reason="TOO_LARGE",
        )


def within_bounds(answer: T) -> T:
    """Return an answer that can be sent: texts and lists of one that is too large are shortened, and say so.

    What is stored may be larger than what is accepted today, and must not break who asks for it.
    """
    if not isinstance(answer, Message) or answer.ByteSize() <= ANSWER_BYTES:
        return answer
    short = type(answer)()
    short.CopyFrom(answer)
    _shorten(short, ANSWER_BYTES)
    return short


def shortened(data: Any, most_bytes: int = 8 * TEXT_BYTES) -> Any:
    """Return JSON data with texts cut to a size: to read a text of megabytes into a message takes seconds."""
    if isinstance(data, Mapping):
        return {key: shortened(value, most_bytes) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [shortened(value, most_bytes) for value in data]
    return _cut_value(data, most_bytes)


def fitting(messages: Sequence[M], token: str, key: Callable[[M], str]) -> tuple[list[M], str]:
    """Return the messages of a page that one answer can carry, at least one, and the next page's token.

    Args:
        messages: The page.
        token: The token of the page behind it; empty for the last.
        key: The token of the page that begins behind a message.
    """
    room = ANSWER_BYTES - (64 << 10)  # for the token, and the lengths between the messages
    taken: list[M] = []
    for message in messages:
        if message.ByteSize() > room and taken:
            return taken, key(taken[-1])
        if message.ByteSize() > room:
            _shorten(message, room)
        room -= message.ByteSize()
        taken.append(message)
    return taken, token


def _problems(message: Message, path: str) -> Iterator[tuple[str, str, str]]:
    """Yield field, problem and fix of each field that is out of bounds."""
    for field, value in message.ListFields():
        place = f"{path}{field.name}"
        if not field.is_repeated:
            yield from _of_value(field, value, place, _text_limit(field))
            continue
        most = _LISTS.get(field.full_name, LIST_ITEMS)
        if len(value) > most:
            yield place, f"has {len(value)} entries; at most {most} are taken", "Name fewer."
        elif entry := _entry(field):
            keys, values = (entry.fields_by_name[name] for name in ("key", "value"))
            for key in value:
                yield from _of_value(keys, key, f"a key of {place}", TEXT_BYTES)
                yield from _of_value(values, value[key], f"{place}[{shown(key)}]", _text_limit(field))
        else:
            for number, each in enumerate(value):
                yield from _of_value(field, each, f"{place}[{number}]", _text_limit(field))


def _of_value(field: FieldDescriptor, value: Any, place: str, most: int) -> Iterator[tuple[str, str, str]]:
    if field.message_type is not None:
        yield from _problems(value, f"{place}.")
    elif isinstance(value, str | bytes):
        size = len(value.encode()) if isinstance(value, str) else len(value)
        if size > most:
            yield place, f"has {size} bytes; at most {most} are taken", "Shorten it."
        elif isinstance(value, str) and "\0" in value:  # no database, path or program takes it
            yield place, "holds the character NUL", "Take it out."


def _text_limit(field: FieldDescriptor) -> int:
    return _TEXTS.get(field.full_name, TEXT_BYTES)


def _entry(field: FieldDescriptor) -> Descriptor | None:
    """Return the descriptor of a map's entries; None for what is no map."""
    kind = field.message_type
    return kind if kind is not None and kind.GetOptions().map_entry else None


def _shorten(message: Message, limit_bytes: int) -> None:
    """Shorten a message's texts, the longest first, then its lists, until it is within the limit."""
    for most in _STEPS_BYTES:
        _cut(message, most, items=0)
        if message.ByteSize() <= limit_bytes:
            return
    for items in (LIST_ITEMS, 100, 10, 1):
        _cut(message, _STEPS_BYTES[-1], items)
        if message.ByteSize() <= limit_bytes:
            return


def _cut(message: Message, most_bytes: int, items: int) -> None:
    """Cut every text to a size, and, unless `items` is 0, every list to a length."""
    for field, value in message.ListFields():
        if entry := _entry(field):
            for key in [key for number, key in enumerate(value) if items and number >= items]:
                del value[key]
            if entry.fields_by_name["value"].message_type is None:
                for key in value:
                    value[key] = _cut_value(value[key], most_bytes)
            else:
                for key in value:
                    _cut(value[key], most_bytes, items)
        elif field.is_repeated:
            if items:
                del value[items:]
            for number, each in enumerate(value):
                if field.message_type is not None:
                    _cut(each, most_bytes, items)
                else:
                    value[number] = _cut_value(each, most_bytes)
        elif field.message_type is not None:
            _cut(value, most_bytes, items)
        else:
            cut = _cut_value(value, most_bytes)
            if cut is not value:
                setattr(message, field.name, cut)


def _cut_value(value: Any, most_bytes: int) -> Any:
    if (
        isinstance(value, str)
        and 4 * len(value) > most_bytes
        and len(value.encode()) > most_bytes + len(_SHORTENED.encode())
    ):
        return value.encode()[:most_bytes].decode(errors="ignore") + _SHORTENED
    if isinstance(value, bytes) and len(value) > most_bytes:
        return value[:most_bytes]
    return value
