"""Every error that Narsil raises on purpose, and the one table that maps them to the wires' codes.

    NarsilError
    ├── ConfigError            a setting is wrong or unknown                 at start
    ├── ArtifactError          a model file is missing, foreign or damaged   at start
    ├── DeviceUnavailable      the asked-for device is not on this machine   at start
    └── RequestError           one request ends with this, and only that one
        ├── InvalidRequest     the payload breaks the model's schema
        ├── ModelNotFound      names a model or version that is not served
        ├── Refused            an admin's call that this server, as it stands, does not carry out
        ├── QueueFull          admitted work is at its limit: try again, elsewhere or later
        ├── MessageTooLarge    more bytes than one message may have: send fewer rows, never the same again
        ├── DeadlineExceeded   its deadline passed while it waited; it never ran
        ├── Cancelled          the client went away while it waited; it never ran
        ├── Unavailable        not this server, not now: try another one, or later
        │   ├── Draining       it is shutting down
        │   └── NoModel        it serves no model
        └── ForwardFailed      the model's forward raised on this request alone

A message names the feature, the row and the limit, so that the caller can mend the request without reading code.
"""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = [
    "STATUS",
    "ArtifactError",
    "Cancelled",
    "Codes",
    "ConfigError",
    "DeadlineExceeded",
    "DeviceUnavailable",
    "Draining",
    "ForwardFailed",
    "InvalidRequest",
    "MessageTooLarge",
    "ModelNotFound",
    "NarsilError",
    "NoModel",
    "QueueFull",
    "Refused",
    "RequestError",
    "Unavailable",
    "first_line",
    "http_status_of",
    "last_line",
    "meant_by",
    "status_of",
]


class NarsilError(Exception):
    """Base of every error raised on purpose."""


class ConfigError(NarsilError):
    """A setting is wrong, unknown or contradicts another."""


class ArtifactError(NarsilError):
    """A model file is missing, damaged or of a kind Narsil does not understand."""


class DeviceUnavailable(NarsilError):
    """The asked-for device is not on this machine."""


class RequestError(NarsilError):
    """Ends exactly one request; the text goes to the client as it is."""


class InvalidRequest(RequestError):
    """The payload breaks the model's schema."""


class ModelNotFound(RequestError):
    """The request names a model or a version that is not served."""


class Refused(RequestError):
    """What an admin asks for is not done here, or not as the repository stands; the old state goes on."""


class QueueFull(RequestError):
    """Admitted work is at its limit."""


class MessageTooLarge(RequestError):
    """The message has more bytes than the server, or a proxy before it, takes; the same one will never be taken."""

    def __init__(self, message: str, limit: int | None = None) -> None:
        super().__init__(message)
        self.limit = limit  # bytes, where known


class DeadlineExceeded(RequestError):
    """The deadline passed before the request ran."""


class Cancelled(RequestError):
    """The client cancelled before the request ran."""


class Unavailable(RequestError):
    """Nothing is wrong with the request: another server may answer it, or this one later."""


class Draining(Unavailable):
    """The server is shutting down and admits nothing more."""


class NoModel(Unavailable):
    """The server serves no model at present."""


class ForwardFailed(RequestError):
    """The model's forward raised on this request."""


_MOST_QUOTED = 500  # characters of a foreign error


class Codes(NamedTuple):
    """What an error is on the wires."""

    grpc: int  # as in google.rpc.Code
    http: int  # as in RFC 9110


# The only such table. A class that is not in it has its base's codes.
STATUS: dict[type[RequestError], Codes] = {
    InvalidRequest: Codes(3, 400),
    ModelNotFound: Codes(5, 404),
    Refused: Codes(9, 400),
    QueueFull: Codes(8, 429),
    MessageTooLarge: Codes(8, 413),  # gRPC's own choice; told from QueueFull by its text, see meant_by
    DeadlineExceeded: Codes(4, 504),
    Cancelled: Codes(1, 499),  # nobody hears it: the client has gone. As nginx has it in logs
    Unavailable: Codes(14, 503),
    ForwardFailed: Codes(13, 500),
}


# What every gRPC server of the C++ core says of a message that is too large, before any of our code sees it, and what
# the native data plane says alike.
_TOO_LARGE = re.compile(r"received message larger than max \((\d+) vs\. (\d+)\)", re.IGNORECASE)


def meant_by(code: int, text: str) -> RequestError | None:
    """The error that a gRPC status means, with its text: the inverse of STATUS. None for a code that is not in it."""
    sizes = _TOO_LARGE.search(text)
    if code == STATUS[MessageTooLarge].grpc and sizes is not None:
        size, limit = map(int, sizes.groups())
        return MessageTooLarge(
            f"the message has {size} bytes; the server, or a proxy before it, takes {limit} (--max-message-bytes). "
            "Send fewer rows",
            limit,
        )
    return next((kind(text) for kind, known in STATUS.items() if known.grpc == code), None)


def first_line(error: BaseException) -> str:
    """A foreign error's text cut to its first line, for an error of Narsil's that quotes it: it may quote a file."""
    return _quoted(error, 0)


def last_line(error: BaseException) -> str:
    """As first_line, the last one: where torch quotes the model's own code first, and then says what is wrong."""
    return _quoted(error, -1)


def _quoted(error: BaseException, position: int) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[position]
    return "".join(character if character.isprintable() else "?" for character in line[:_MOST_QUOTED])


def status_of(error: RequestError) -> int:
    """The gRPC status code of an error: its class's, or its nearest base class's, in STATUS."""
    return _codes_of(error).grpc


def http_status_of(error: RequestError) -> int:
    """The HTTP status code of an error, likewise."""
    return _codes_of(error).http


def _codes_of(error: RequestError) -> Codes:
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), Codes(2, 500))  # UNKNOWN
