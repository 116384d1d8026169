"""Operations that are read as several steps: the program gives what torch gives, in the reference and in the fused
engine, for usual numbers and for large ones."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    import torch.nn.functional as F

from narsil.artifacts.compiled_info import processor_flags
from narsil.artifacts.packed import kinds_here
from narsil.artifacts.schema import Feature, ModelSchema
from narsil.backends.fused import ForwardLibrary
from narsil.compile.forms import PlanForm
from narsil.compile.lowering import lowered
from narsil.compile.toolchain import STRICT, build_forward
from narsil.dataflow import Batch
from narsil.program.steps import Program
from tests.integration.test_program_readers import readings_of

pytestmark = pytest.mark.filterwarnings("ignore")

WIDTH = 24
ROW = torch.randn(WIDTH, generator=torch.Generator().manual_seed(7))
MASK = ROW > 0.3


def fields(x: Any) -> Any:
    return x.view(-1, 6, 4)


COMPOSED: dict[str, Callable[[Any], Any]] = {
    "softplus": F.softplus,
    "softplus 2 1": lambda x: F.softplus(x, 2.0, 1.0),
    "mish": F.mish,
    "logsigmoid": F.logsigmoid,
    "hardswish": F.hardswish,
    "hardswish_": lambda x: F.hardswish(x * 2, inplace=True),
    "hardsigmoid": F.hardsigmoid,
    "elu": F.elu,
    "elu 0.5": lambda x: F.elu(x, 0.5),
    "elu_": lambda x: F.elu(x * 2, inplace=True),
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 0.7),
    "prelu": lambda x: F.prelu(x, torch.tensor([0.2])),
    "prelu of channels": lambda x: F.prelu(x, ROW.abs()),
    "prelu of fields": lambda x: F.prelu(fields(x), ROW[:6].abs()),
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 0.1),
    "square": torch.square,
    "logit": lambda x: torch.logit(torch.sigmoid(x.clamp(-5, 5))),
    "logit with an end": lambda x: torch.logit(x, eps=0.1),
    "addcmul": lambda x: torch.addcmul(x, x, ROW, value=0.5),
    "addcdiv": lambda x: torch.addcdiv(x, ROW, x.abs() + 1, value=-0.5),
    "lerp": lambda x: torch.lerp(x, ROW, 0.3),
    "lerp by values": lambda x: torch.lerp(x, x * 2, torch.sigmoid(x)),
    "masked_fill": lambda x: x.masked_fill(x > 1, 0.25),
    "masked_fill by a constant": lambda x: x.masked_fill(MASK, -3.0),
    "masked_fill_": lambda x: (x * 2).masked_fill_(x > 1, torch.tensor(2.0)),
    "norm": lambda x: x.norm(dim=1),
    "norm 1": lambda x: x.norm(p=1, dim=1, keepdim=True),
    "norm of fields": lambda x: torch.linalg.norm(fields(x), dim=(1, 2)),
    "normalize": lambda x: F.normalize(fields(x), dim=-1),
    "cosine similarity": lambda x: F.cosine_similarity(x[:, :12], x[:, 12:]),
    "pairwise distance": lambda x: F.pairwise_distance(x[:, :12], x[:, 12:]),
    "rms norm": lambda x: F.rms_norm(x, (WIDTH,), ROW),
    "max along": lambda x: fields(x).max(dim=1).values,
    "min along": lambda x: x.min(1, keepdim=True)[0],
    "max of two": lambda x: torch.max(x, ROW),
    "log softmax": lambda x: F.log_softmax(fields(x), 1),
    "variance": lambda x: x.var(1),
    "variance of all": lambda x: fields(x).var((1, 2), unbiased=False, keepdim=True),
    "deviation": lambda x: fields(x).std(dim=2),
    "standardised": lambda x: (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6),
    "flip": lambda x: fields(x).flip(1, 2),
    "roll": lambda x: fields(x).roll((1, 2), (1, 2)),
    "repeat": lambda x: fields(x).repeat(1, 2, 3),
    "diagonal": lambda x: torch.bmm(fields(x), fields(x).transpose(1, 2)).diagonal(dim1=1, dim2=2),
    "mv": lambda x: x @ ROW,
    "in place": lambda x: (x.abs() + 1).log_().neg_().exp_().sqrt_().reciprocal_().abs_(),
    "clamps in place": lambda x: (x * 2).clamp_min_(-0.5).clamp_max_(0.75),
    "sgn": torch.sgn,
    "eye": lambda x: F.linear(x, torch.eye(WIDTH) * ROW),
    "block diag": lambda x: F.linear(x[:, :18], torch.block_diag(ROW[:12].view(1, -1), ROW[12:].view(2, -1))),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ForwardLibrary | None:
    if not kinds_here(processor_flags()) or shutil.which("g++") is None:
        return None
    path = tmp_path_factory.mktemp("library") / "forward.so"
    build_forward(path, STRICT)
    return ForwardLibrary(path)


def in_the_engine(library: ForwardLibrary, program: Program, rows: Any, shape: tuple[int, ...]) -> Any:
    made = lowered(program, ("default",), "model")
    schema = ModelSchema(WIDTH, (Feature("f", "t", 9, 1),), ("default",), (int(np.prod(shape[1:])),))
    form = PlanForm(library, schema, made, np.zeros(64, np.uint8))
    ones = np.ones(len(rows), np.int32)
    batch = Batch(len(rows), rows.numpy(), ones, ones * 0, True)
    return form.backend(("fp32",) * len(form.linears)).run(batch)["default"].reshape(shape)


@pytest.mark.parametrize("name", COMPOSED)
def test_operations_of_several_steps(name: str, library: ForwardLibrary | None) -> None:
    forward = COMPOSED[name]
    readings = readings_of(forward, WIDTH)
    assert readings.program is not None, readings.problem
    for scale in (0.01, 1.5, 40.0):
        rows = torch.randn(33, WIDTH, generator=torch.Generator().manual_seed(5)) * scale
        with torch.no_grad():
            expected = forward(rows.clone()).double().numpy()
        found = readings.program.reference({"x": rows.numpy()}, {})["default"]
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6 * max(scale, 1))
        if library is not None:
            ran = in_the_engine(library, readings.program, rows, expected.shape)
            np.testing.assert_allclose(ran, expected, rtol=2e-5, atol=2e-6 * max(scale, 1))


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (lambda x: x.max(0)[0] + x, "aten.max: it goes over the rows"),
        (lambda x: x.flip(0), "aten.flip: it moves rows"),
        (lambda x: x.roll(1, 0), "aten.roll: it moves rows"),
        (lambda x: x.roll(1), "aten.roll: it moves rows"),
        (lambda x: x.roll(70, 0), "aten.roll: it moves rows"),  # which changes nothing of 5, 7 or 2 rows
        (lambda x: x / x.norm(), "aten.linalg_vector_norm: it goes over the rows"),
        (lambda x: (x - x.mean(1, keepdim=True)) / x.std(), "aten.std: it goes over the rows"),
        (lambda x: F.log_softmax(x, 0), "aten._log_softmax: it goes over the rows"),
        (lambda x: x + x.diagonal(dim1=0, dim2=1)[0], "aten.diagonal: it moves rows"),
        (lambda x: x.max(1)[1].float(), "aten.max: no step for which one it is"),
    ],
)
def test_what_looks_at_other_rows_or_is_another_function_is_refused(forward: Callable[[Any], Any], why: str) -> None:
    readings = readings_of(forward, WIDTH)
    assert readings.program is None
    assert why in readings.problem, readings.problem
