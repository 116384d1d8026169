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
def test_every_request_error_has_its_own_grpc_and_http_status(kind):
    code, http = errors.status_of(kind("why"))
    assert code in {status.value[0] for status in grpc.StatusCode} - {0}
    assert 400 <= http < 600
    assert kind in errors.STATUS


def test_no_two_errors_share_a_grpc_code_so_that_clients_can_tell_them_apart():
    codes = [code for code, _ in errors.STATUS.values()]
    assert len(set(codes)) == len(codes)


def test_an_error_of_a_later_subclass_has_its_parent_s_status():
    class Special(errors.QueueFull):
        pass

    assert errors.status_of(Special("x")) == errors.STATUS[errors.QueueFull]


def test_every_public_name_can_be_had_and_no_other():
    for name in narsil.__all__:
        assert getattr(narsil, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = narsil.nothing


def test_importing_narsil_loads_neither_torch_nor_grpc():
    program = "import sys, narsil; print({'torch', 'grpc', 'onnxruntime', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
