"""Whatever a forward gives its scores as is served as float32, laid out by rows, or refused in a sentence."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    pytest.importorskip("fbgemm_gpu")

from narsil.artifacts.artifact import Artifact, open_artifact
from narsil.artifacts.schema import Feature, ModelSchema
from narsil.backends.outputs import scores_of
from narsil.backends.registry import load_backend
from narsil.backends.torchscript import TorchScriptBackend
from narsil.catalog.loading import load_model
from narsil.compile.compiler import compile_artifact
from narsil.config import ServeSettings
from narsil.dataflow import Batch, Features, OneHot, Scores
from narsil.engine.collate import Collator
from narsil.engine.runner import Runner
from narsil.errors import ArtifactError, ConfigError, ForwardFailed
from tests.fixtures_compiled import needs_compiler, needs_fused
from tests.fixtures_models import batch_of

pytestmark = pytest.mark.filterwarnings("ignore")

FEATURES = (Feature("a", "t", 100, 4), Feature("b", "t", 9, 4))
DENSE = 3

# Bodies of forwards. ``x`` is (B,): the sum of a row's dense columns; ``ids`` is (B,): its id of the feature a.
FORMS: dict[str, tuple[str, dict[str, int]]] = {
    "B1": ("{'default': x.unsqueeze(1)}", {"default": 1}),
    "B11": ("{'default': x.view(-1, 1, 1)}", {"default": 1}),
    "squeezed": ("{'default': x.unsqueeze(1).squeeze()}", {"default": 1}),
    "Bk": ("{'default': torch.stack([x, x * 2, x - 1], 1)}", {"default": 3}),
    "Bk squeezed": ("{'default': torch.stack([x, x * 2, x - 1], 1).squeeze()}", {"default": 3}),
    "B23": ("{'default': torch.stack([x, x * 2, x, x, x - 1, x], 1).view(-1, 2, 3)}", {"default": 6}),
    "turned": ("{'default': torch.stack([x, x * 2, x - 1]).t()}", {"default": 3}),
    "strided": ("{'default': torch.stack([x, x * 2], 1)[:, 1]}", {"default": 1}),
    "expanded": ("{'default': x.unsqueeze(1).expand(-1, 4)}", {"default": 4}),
    "double": ("{'default': x.double() / 3}", {"default": 1}),
    "half": ("{'default': x.half()}", {"default": 1}),
    "bfloat16": ("{'default': torch.stack([x, x], 1).to(torch.bfloat16)}", {"default": 2}),
    "logits": ("{'default': x * 1e4 - 5e3}", {"default": 1}),
    "int64 extra": ("{'default': x, 'id': ids.long()}", {"default": 1, "id": 1}),
    "bool extra": ("{'default': x, 'hot': ids > 50}", {"default": 1, "hot": 1}),
    "columns handed on": ("{'default': batch['float_features']}", {"default": DENSE}),
    "a column handed on": ("{'default': batch['float_features'][:, 2]}", {"default": 1}),
    "names of any text": ("{'点击率 (7d)': x, '': x * 2, 'p\\tq': -x}", {"点击率 (7d)": 1}),
    "a tensor": ("x", {"default": 1}),
    "a tuple": ("(x, torch.stack([x, -x], 1))", {"0": 1, "1": 2}),
    "a list": ("[x, -x]", {"0": 1, "1": 1}),
}


def module_of(returned: str) -> Any:
    """A scripted module whose forward returns this expression."""
    result = torch.jit.CompilationUnit(
        f"""
def forward(batch: Dict[str, Tensor]):
    x = batch["float_features"].sum(1)
    ids = batch["id_list_features.values"][:x.numel()]
    return {returned}
"""
    )
    return result.forward


def backend_of(returned: str, outputs: dict[str, int]) -> TorchScriptBackend:
    schema = ModelSchema(DENSE, FEATURES, tuple(outputs), tuple(outputs.values()))
    return TorchScriptBackend(module_of(returned), schema, "cpu")


def rows(count: int, seed: int = 0) -> Features:
    random = np.random.default_rng(seed)
    return Features(
        count, random.random((count, DENSE), np.float32), OneHot(random.integers(0, 9, (2, count), np.int32))
    )


def direct(returned: str, outputs: dict[str, int], features: Features) -> Scores:
    """What the module gives when it is called directly, by plain torch."""
    dense = torch.tensor(features.dense)
    ids = torch.tensor(np.ascontiguousarray(features.sparse.ids)).ravel()  # type: ignore[union-attr]
    result = module_of(returned)({"float_features": dense, "id_list_features.values": ids})
    named = result if isinstance(result, dict) else {"default": result}
    if isinstance(result, tuple | list):
        named = {str(number): one for number, one in enumerate(result)}
    return {
        task: np.array(named[task].double().tolist(), np.float32).reshape(
            (features.rows, width) if width > 1 else features.rows
        )
        for task, width in outputs.items()
    }


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_scored_as_a_direct_call_scores_it_alone_and_fused(form: str) -> None:
    returned, outputs = FORMS[form]
    runner = Runner("m", backend_of(returned, outputs))
    parts = [rows(count, count) for count in (1, 2, 3, 6, 1, 40)]
    kept = []
    for part in parts:
        scores, *_ = runner.run([part])
        kept.append((scores, part))
    fused, *_ = runner.run(parts)
    start = 0
    # Only now, when the lane has written other batches to its buffers.
    for scores, part in kept:
        expected = direct(returned, outputs, part)
        assert list(scores) == list(outputs)
        for task, width in outputs.items():
            shape = (part.rows,) if width == 1 else (part.rows, width)
            assert scores[task].dtype == np.dtype("float32")
            assert scores[task].shape == shape
            assert scores[task].flags.c_contiguous
            np.testing.assert_allclose(scores[task], expected[task], rtol=1e-6)
            np.testing.assert_allclose(fused[task][start : start + part.rows], expected[task], rtol=1e-6)
        start += part.rows


def test_a_plain_score_is_not_copied() -> None:
    scores = torch.rand(5)
    found = scores_of({"default": scores}, {"default": 1}, batch_of((100, 9), DENSE, 5))
    assert found["default"].__array_interface__["data"][0] == scores.data_ptr()


@pytest.mark.parametrize(
    ("returned", "outputs", "message"),
    [
        ("{'default': x}", {"click": 1}, "the model returned no scores named click"),
        ("{'default': x}", {"default": 2}, r"default in the shape \(6,\) for 6 rows; it must have 2 numbers for each"),
        ("{'default': x.sum()}", {"default": 1}, r"the shape \(\) for 6 rows; it must have one number for each row"),
        ("{'default': torch.stack([x, x])}", {"default": 2}, r"the shape \(2, 6\) for 6 rows"),
        ("{'default': torch.stack([x, x], 1)}", {"default": 1}, r"the shape \(6, 2\) for 6 rows"),
        ("{'default': x[1:]}", {"default": 1}, r"the shape \(5,\) for 6 rows"),
        ("{'default': x.view(2, 3)}", {"default": 1}, r"the shape \(2, 3\) for 6 rows; .*, rows first"),
        ("{'default': torch.complex(x, x)}", {"default": 1}, "default as torch.complex64"),
        ("{'default': x.to_sparse()}", {"default": 1}, "default as torch.float32, torch.sparse_coo"),
        ("'text'", {"default": 1}, "forward returns a str"),
        ("(x, 'text')", {"0": 1}, "forward returns a dict whose '1' is a str"),
        ("{'default': [x]}", {"default": 1}, "the model returned no scores named default"),
    ],
)
def test_what_is_not_laid_out_by_rows_is_refused_in_a_sentence(
    returned: str, outputs: dict[str, int], message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        backend_of(returned, outputs).run(Collator(ModelSchema(DENSE, FEATURES)).collate([rows(6)]))


@pytest.mark.parametrize("shape", [(3, 1), (2,), (4,), (2, 1), (1, 2)])
def test_of_one_row_only_the_rows_axis_may_be_left_out(shape: tuple[int, ...]) -> None:
    batch = Batch(1, np.zeros((1, DENSE), np.float32), np.ones(2, np.int32), np.zeros(2, np.int32), one_hot=True)
    with pytest.raises(ArtifactError, match="for 1 rows; it must have 3 numbers for each row, rows first"):
        scores_of({"default": torch.zeros(shape)}, {"default": 3}, batch)


def test_a_double_beyond_float32_is_no_answer() -> None:
    runner = Runner("m", backend_of("{'default': x.double() * 0 + 1e39}", {"default": 1}))
    with pytest.raises(ForwardFailed, match="scored row 0 as inf"):
        runner.run([rows(3)])


class Several(torch.nn.Module):  # type: ignore[name-defined]
    """A packaged model with outputs of other forms beside its own."""

    def __init__(self, inner: Any, keys: list[str]) -> None:
        super().__init__()
        self.inner = inner
        self.id_list_features_keys = keys

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:  # type: ignore[name-defined]
        lengths, values = batch["id_list_features.lengths"], batch["id_list_features.values"]
        score = self.inner(
            {
                "float_features": batch["float_features"],
                "id_list_features.lengths": lengths,
                "id_list_features.values": values,
            }
        )["default"]
        return {
            "p(click) | 点击": score.unsqueeze(1),
            "unbounded": (score.double() * 8 - 4).view(-1, 1, 1),
            "which": torch.stack([score, score * score, score * 0.5], 1),
        }


@pytest.fixture
def several(small_artifact: Artifact, tmp_path: Path) -> Artifact:
    inner = torch.jit.load(str(small_artifact.torchscript))
    keys = [feature.name for feature in small_artifact.schema.features]
    torch.jit.script(Several(inner, keys)).save(str(tmp_path / "model_default.pt"))
    return open_artifact(tmp_path / "model_default.pt")


def test_names_and_widths_are_read_from_an_artifact_and_served(several: Artifact, small_artifact: Artifact) -> None:
    assert several.schema.outputs == {"p(click) | 点击": 1, "unbounded": 1, "which": 3}
    batch = batch_of(several.schema.rows.tolist(), several.schema.dense_dim, 33, longest=3)
    score = load_backend(small_artifact, "torch", tune_kernels=False).run(batch)["default"]
    found = load_backend(several, "torch", tune_kernels=False).run(batch)
    np.testing.assert_array_equal(found["p(click) | 点击"], score)
    np.testing.assert_allclose(found["unbounded"], score.astype(np.float64) * 8 - 4, rtol=1e-6)
    np.testing.assert_allclose(found["which"], np.stack([score, score * score, score * np.float32(0.5)], 1), rtol=1e-6)


def served(model: Path, **settings: Any) -> tuple[ModelSchema, list[Scores]]:
    """The schema that clients are told, and what each of two lanes scores."""
    model_, _ = load_model(ServeSettings.model_validate({"model": model, "lanes": 2, **settings}))
    batch = batch_of(model_.schema.rows.tolist(), model_.schema.dense_dim, 9, longest=2)
    return model_.schema, [backend.run(batch) for backend in model_.backends]


def test_tasks_are_picked_for_every_lane_in_the_order_given(several: Artifact) -> None:
    _, (every, _) = served(several.path)
    schema, lanes = served(several.path, tasks="which,p(click) | 点击")
    assert schema.outputs == {"which": 3, "p(click) | 点击": 1}
    for scores in lanes:
        assert list(scores) == list(schema.tasks)
        for task in schema.tasks:
            np.testing.assert_array_equal(scores[task], every[task])


def test_a_task_that_the_model_has_not_is_refused_with_those_that_it_has(several: Artifact) -> None:
    with pytest.raises(ConfigError, match=r"no task 'sell'; it has p\(click\) \| 点击, unbounded, which"):
        served(several.path, tasks="which,sell")


@needs_fused
@needs_compiler
def test_several_numbers_for_a_row_are_compiled(several: Artifact, tmp_path: Path) -> None:
    compiled, _ = compile_artifact(several, tmp_path / "compiled", precision="fp32")
    assert compiled.schema == several.schema
    batch = batch_of(several.schema.rows.tolist(), several.schema.dense_dim, 33, longest=3)
    expected = load_backend(several, "torch", tune_kernels=False).run(batch)
    found = load_backend(compiled, "compiled").run(batch)
    assert list(found) == list(expected)
    for task in expected:
        assert found[task].shape == expected[task].shape
        np.testing.assert_allclose(found[task], expected[task], rtol=1e-5, atol=1e-6)
    _, (every, _) = served(compiled.path, backend="compiled")
    schema, lanes = served(compiled.path, backend="compiled", tasks="which,unbounded")
    assert schema.outputs == {"which": 3, "unbounded": 1}
    for scores in lanes:
        assert list(scores) == ["which", "unbounded"]
        for task in scores:
            np.testing.assert_array_equal(scores[task], every[task])
