"""Tensors in shared memory: what clients register is theirs to shrink, to change and to name wrongly."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from narsil.dataflow import RequestLimits
from narsil.errors import InvalidRequest
from narsil.transports import shared_memory
from narsil.transports.codec import oip
from narsil.transports.shared_memory import FOLDER, Region, SharedMemory
from narsil.wire import put_len, put_text, put_uint
from tests.messages import inference_pb2 as pb
from tests.support import SCHEMA

LIMITS = RequestLimits()
DENSE = np.arange(6, dtype="<f4").reshape(2, 3)
IDS = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], "<i8") % 7
CONTENT = DENSE.tobytes() + IDS.tobytes()


@pytest.fixture
def path() -> Iterator[Path]:
    """An object with the tensors above."""
    made = Path(FOLDER, f"narsil-test-{secrets.token_hex(8)}")
    made.write_bytes(CONTENT)
    yield made
    if made.is_dir() and not made.is_symlink():
        made.rmdir()
    else:
        made.unlink(missing_ok=True)


def request(**outputs: tuple[int, int]) -> pb.ModelInferRequest:
    """Asks for the tensors of the region `in`, and for outputs in `out`: (offset, bytes) of each."""
    out = pb.ModelInferRequest()
    at = 0
    for name, kind, values in (("dense", "FP32", DENSE), ("ids", "INT64", IDS)):
        place(out.inputs.add(name=name, datatype=kind, shape=values.shape), "in", at, values.nbytes)
        at += values.nbytes
    for name, (offset, size) in outputs.items():
        place(out.outputs.add(name=name), "out", offset, size)
    return out


def place(tensor, region: str, offset: int, size: int) -> None:
    tensor.parameters["shared_memory_region"].string_param = region
    tensor.parameters["shared_memory_offset"].int64_param = offset
    tensor.parameters["shared_memory_byte_size"].int64_param = size


def features(message, memory, limits=LIMITS):
    return oip.read(message.SerializeToString(), shared=True).features(SCHEMA, limits, memory)


@pytest.fixture
def memory(path) -> SharedMemory:
    made = SharedMemory()
    made.register("in", f"/{path.name}", 0, len(CONTENT))
    return made


def test_tensors_are_copied_before_they_are_checked(memory, path):
    found = features(request(), memory)
    path.write_bytes(b"\xff" * len(CONTENT))
    assert found.dense.tolist() == DENSE.tolist()
    assert found.sparse.ids.T.tolist() == IDS.tolist()


def test_some_tensors_may_stand_in_the_message(memory):
    message = request()
    message.inputs[0].ClearField("parameters")
    message.raw_input_contents.append((DENSE + 1).tobytes())
    assert features(message, memory).dense.tolist() == (DENSE + 1).tolist()
    message.raw_input_contents.append(b"")
    with pytest.raises(InvalidRequest, match="raw_input_contents has 2 entries for 1 inputs"):
        features(message, memory)


def test_memory_that_has_shrunk_is_an_error_of_the_request_alone(memory, path):
    os.truncate(path, len(CONTENT) - 1)
    with pytest.raises(InvalidRequest, match="'in' is smaller than when it was registered"):
        features(request(), memory)
    path.write_bytes(CONTENT)
    assert features(request(), memory).rows == 2


def test_scores_are_put_where_the_request_says_and_nothing_grows(memory, path):
    memory.register("out", path.name, 8, len(CONTENT) - 8)
    read = oip.read(request(default=(4, 8)).SerializeToString(), shared=True)
    slots = read.slots(SCHEMA, 2, memory)
    scores = {"default": np.array([0.25, 0.5], np.float32)}
    reply = pb.ModelInferResponse.FromString(oip.encode("m", "1", "", scores, ["default"], slots))
    assert [list(each.shape) for each in reply.outputs] == [[2]]
    assert list(reply.raw_output_contents) == [b""]
    assert path.read_bytes() == CONTENT[:12] + scores["default"].tobytes() + CONTENT[20:]
    os.truncate(path, 19)
    with pytest.raises(InvalidRequest, match="'out' is smaller"):
        oip.encode("m", "1", "", scores, ["default"], slots)
    assert path.stat().st_size == 19


def test_an_output_without_room_is_refused_before_it_is_scored(memory, path):
    memory.register("out", path.name, 0, 12)
    with pytest.raises(InvalidRequest, match=r"output 'default' has 8 bytes; shared_memory_byte_size is 7"):
        oip.read(request(default=(0, 7)).SerializeToString(), shared=True).slots(SCHEMA, 2, memory)
    with pytest.raises(InvalidRequest, match=r"'out' has 12 bytes, not 8 from 5 on"):
        oip.read(request(default=(5, 8)).SerializeToString(), shared=True).slots(SCHEMA, 2, memory)
    with pytest.raises(InvalidRequest, match="'other' is asked for"):
        features(request(other=(0, 8)), memory)


def set_to(number, **value):
    def change(message):
        parameters = message.inputs[0].parameters
        name = f"shared_memory_{number}"
        parameters[name].Clear()
        for kind, each in value.items():
            setattr(parameters[name], kind, each)

    return change


WRONG = [
    (set_to("region", string_param="else"), "region 'else' is not registered"),
    (set_to("region", int64_param=3), "shared_memory_region must be a text"),
    (set_to("offset", int64_param=-1), "neither may be negative"),
    (set_to("byte_size", int64_param=-1), "neither may be negative"),
    (set_to("byte_size", string_param="24"), "whole numbers"),
    (set_to("offset", int64_param=len(CONTENT) - 23), f"not 24 from {len(CONTENT) - 23}"),
    (set_to("offset", int64_param=2**63 - 1), f"'in' has {len(CONTENT)} bytes, not 24 from {2**63 - 1} on"),
    (set_to("byte_size", int64_param=28), r"dense: 7 FP32 are given for the shape \[2, 3\]"),
    (set_to("byte_size", int64_param=23), r"dense: 23 bytes are no whole number of float32"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "text"), WRONG)
def test_wrong_parameters_are_refused_by_name(memory, change, text):
    message = request()
    change(message)
    with pytest.raises(InvalidRequest, match=text):
        features(message, memory)


def test_what_lies_in_shared_memory_counts_as_the_message_does(memory):
    assert features(request(), memory, RequestLimits(max_bytes=len(CONTENT))).rows == 2
    with pytest.raises(InvalidRequest, match=rf"have {len(CONTENT)} bytes in all; the limit is {len(CONTENT) - 1}"):
        features(request(), memory, RequestLimits(max_bytes=len(CONTENT) - 1))


def test_without_it_the_parameter_is_refused_wherever_it_stands(memory):
    for message in (request(), request(default=(0, 8))):
        with pytest.raises(InvalidRequest, match="shared memory is not served here"):
            oip.read(message.SerializeToString())
    message = pb.ModelInferRequest()
    message.parameters["shared_memory_region"].string_param = "in"
    with pytest.raises(InvalidRequest, match="the request has the parameter shared_memory_region"):
        oip.read(message.SerializeToString(), shared=True)


@pytest.mark.parametrize("key", ["", "/", "//x", "/a/b", "..", "/..", ".", "/\0", "x" * 256])
def test_keys_that_are_none_are_refused(key):
    with pytest.raises(InvalidRequest, match="shared memory key"):
        SharedMemory().register("a", key, 0, 1)


def test_only_shared_memory_objects_are_opened(path):
    memory = SharedMemory()
    for make, why in (
        (lambda: path.symlink_to("/etc/hostname"), "cannot be opened"),
        (path.mkdir, "cannot be opened"),
        (lambda: os.mkfifo(path), "is no shared memory object"),
    ):
        path.unlink() if not path.is_dir() else path.rmdir()
        make()
        with pytest.raises(InvalidRequest, match=why):
            memory.register("a", path.name, 0, 1)
    assert not memory.regions()


def test_no_key_leads_out_of_the_folder(tmp_path):
    outside = tmp_path / "file"
    outside.write_bytes(b"12345678")
    for key in (f"../..{outside}", f"/../..{outside}", f"/{outside}"):
        with pytest.raises(InvalidRequest, match="is none: send a slash and a name without one"):
            SharedMemory().register("a", key, 0, 1)


@pytest.mark.parametrize(
    ("offset", "size"), [(0, len(CONTENT) + 1), (1, len(CONTENT)), (len(CONTENT), 1), (2**64 - 1, 1), (1, 2**64 - 1)]
)
def test_a_region_that_reaches_beyond_its_object_is_refused(path, offset, size):
    with pytest.raises(InvalidRequest, match=f"has {len(CONTENT)} bytes, not {size} from {offset} on"):
        SharedMemory().register("a", path.name, offset, size)


def test_names_are_registered_once_within_bounds_and_can_be_taken_back(path, monkeypatch):
    monkeypatch.setattr(shared_memory, "MAX_REGIONS", 2)
    memory = SharedMemory()
    for name, size, why in (
        ("", 1, "1 to 256 characters"),
        ("n" * 257, 1, "1 to 256 characters"),
        ("a", 0, "no bytes"),
    ):
        with pytest.raises(InvalidRequest, match=why):
            memory.register(name, path.name, 0, size)
    memory.register("a", path.name, 0, 4)
    with pytest.raises(InvalidRequest, match="'a' is registered already"):
        memory.register("a", path.name, 0, 4)
    memory.register("b", path.name, 4, 4)
    with pytest.raises(InvalidRequest, match="2 shared memory regions are registered"):
        memory.register("c", path.name, 0, 4)
    assert [each.name for each in memory.regions()] == ["a", "b"]
    memory.unregister("a")
    memory.unregister("a")  # as Triton has it
    with pytest.raises(InvalidRequest, match="'a' is not registered"):
        memory.regions("a")
    memory.register("c", path.name, 0, 4)
    memory.unregister("")
    assert memory.regions() == ()


def test_a_region_s_descriptor_is_closed_with_it_and_not_before(path):
    before = len(os.listdir("/proc/self/fd"))
    memory = SharedMemory()
    memory.register("a", path.name, 0, 4)
    slot = memory.slot("a", 0, 4)
    memory.unregister("a")
    assert slot.read() == CONTENT[:4]
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del slot
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(InvalidRequest):
        Region("a", path.name, 0, 1 << 40)
    assert len(os.listdir("/proc/self/fd")) == before


def test_messages_are_those_of_the_protocol(path):
    asked = pb.SystemSharedMemoryRegisterRequest(name="a", key=path.name, offset=3, byte_size=2**63)
    assert oip.read_region(asked.SerializeToString()) == ("a", path.name, 3, 2**63)
    assert oip.read_region(b"") == ("", "", 0, 0)
    with pytest.raises(InvalidRequest, match="offset has protobuf wire type 2"):
        oip.read_region(put_text(1, "a") + put_len(3, b"") + put_uint(4, 1))
    regions = [Region("a", path.name, 0, 4), Region("b", f"/{path.name}", 4, 8)]
    found = pb.SystemSharedMemoryStatusResponse.FromString(oip.encode_regions(regions)).regions
    assert {name: (r.name, r.key, r.offset, r.byte_size) for name, r in found.items()} == {
        "a": ("a", path.name, 0, 4),
        "b": ("b", f"/{path.name}", 4, 8),
    }
