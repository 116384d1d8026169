"""One exception tree, one table of codes, one public API."""

from __future__ import annotations

import subprocess
import sys

import grpc
import pytest

import narsil
from narsil import errors


def request_errors() -> list[type[errors.RequestError]]:
    return errors.RequestError.__subclasses__()


@pytest.mark.parametrize("kind", request_errors())
def test_every_request_error_has_its_grpc_status(kind):
    code = errors.status_of(kind("why"))
    assert code in {status.value[0] for status in grpc.StatusCode} - {0}
    assert kind in errors.STATUS


@pytest.mark.parametrize("kind", request_errors())
def test_every_request_error_has_its_http_status(kind):
    code = errors.http_status_of(kind("why"))
    server_s_fault = code >= 500
    assert 400 <= code < 600
    assert server_s_fault == issubclass(kind, errors.Unavailable | errors.ForwardFailed | errors.DeadlineExceeded)


# A message that is too large has the code of a full queue, by gRPC's own choice, and a text of its own.
TEXTS = {errors.MessageTooLarge: ("SERVER: Received message larger than max (96 vs. 16)", "the message has 96 bytes;")}


@pytest.mark.parametrize("kind", request_errors())
def test_clients_can_tell_every_error_from_the_others(kind):
    said, read = TEXTS.get(kind, ("why", "why"))
    code = errors.status_of(kind(said))
    meant = errors.meant_by(code, said)
    assert type(meant) is kind
    assert str(meant).startswith(read)


def test_a_message_that_is_too_large_tells_what_would_be_taken():
    meant = errors.meant_by(8, "received message larger than max (96000024 vs. 16777216): send fewer rows")
    assert isinstance(meant, errors.MessageTooLarge)
    assert meant.limit == 16777216
    assert str(meant).endswith("takes 16777216 (--max-message-bytes). Send fewer rows")


def test_a_code_or_a_text_that_no_error_has_means_none_or_the_code_s_own():
    assert errors.meant_by(12, "Method not found!") is None
    assert type(errors.meant_by(3, "received message larger than max (2 vs. 1)")) is errors.InvalidRequest
    assert type(errors.meant_by(8, "more than 256 health watchers")) is errors.QueueFull


def test_an_error_of_a_later_subclass_has_its_parent_s_status():
    class Special(errors.QueueFull):
        pass

    assert (errors.status_of(Special("x")), errors.http_status_of(Special("x"))) == errors.STATUS[errors.QueueFull]


def test_every_public_name_can_be_had_and_no_other():
    for name in narsil.__all__:
        assert getattr(narsil, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = narsil.nothing


def test_the_errors_that_callers_tell_apart_are_public():
    for name in ("DeadlineExceeded", "InvalidRequest", "MessageTooLarge", "ModelNotFound", "QueueFull"):
        assert name in narsil.__all__
        assert getattr(narsil, name) is getattr(errors, name)


def test_importing_narsil_loads_neither_torch_nor_grpc():
    program = "import sys, narsil; print({'torch', 'grpc', 'onnxruntime', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("one\ntwo", "one", "two"),
        ("  \n", "ValueError", "ValueError"),
        ("name \x1b[2J\x07 \ud800", "name ?[2J? ?", "name ?[2J? ?"),
        ("x" * 10_000, "x" * 500, "x" * 500),
    ],
)
def test_what_is_quoted_of_a_foreign_error_is_one_printable_line(text: str, first: str, last: str) -> None:
    assert errors.first_line(ValueError(text)) == first
    assert errors.last_line(ValueError(text)) == last
