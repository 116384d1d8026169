"""What both clients share: the methods, the channel's options, and what a failed call means."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import grpc

from narsil.errors import STATUS, ArtifactError, InvalidRequest, NarsilError

PREDICT = "/narsil.v1.Inference/Predict"
GET_MODEL = "/narsil.v1.Inference/GetModel"
OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))

_ERRORS = {code: error for error, (code, _) in STATUS.items()}

T = TypeVar("T")


class TransportError(NarsilError):
    """The call failed before or beside the server: unreachable, TLS, or an answer that Narsil does not give."""


def error_of(error: grpc.RpcError) -> NarsilError:
    """The RequestError that the server meant, or TransportError; a foreign exception is translated here alone."""
    code = error.code() if hasattr(error, "code") else None
    details = error.details() if hasattr(error, "details") else None
    kind = _ERRORS.get(code.value[0]) if code is not None else None
    if kind is None or code is None or code is grpc.StatusCode.UNAVAILABLE:
        return TransportError(f"{code.name if code else 'call failed'}: {details or error}")
    return kind(details or code.name)


def reading(read: Callable[[bytes], T], answer: bytes) -> T:
    """``read(answer)``, whose faults are the server's and not the request's."""
    try:
        return read(answer)
    except (InvalidRequest, ArtifactError) as error:
        raise TransportError(f"the server's answer cannot be read: {error}") from None
