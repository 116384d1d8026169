"""Models whose ids are weighed by their place in the bag, as TorchRec's feature processors do: each is served, its ids
bounded by its tables, and scored by the torch backend as a direct call scores it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchrec")
    from torchrec.fx.tracer import Tracer
    from torchrec.inference.modules import PredictModule, quantize_inference_model
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.modules.embedding_modules import EmbeddingBagCollection
    from torchrec.modules.feature_processor import PositionWeightedProcessor
    from torchrec.modules.feature_processor_ import PositionWeightedModule, PositionWeightedModuleCollection
    from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from narsil.artifacts.artifact import open_artifact
from narsil.backends.registry import load_backend
from tests.fixtures_models import batch_of, rows_of

pytestmark = pytest.mark.filterwarnings("ignore")

DENSE, KEYS, ROWS, LONGEST = 5, ["c", "a", "b"], [30, 40, 50], 7


class Weighed(torch.nn.Module):  # type: ignore[name-defined]
    """``form``: of TorchRec's, what weighs the ids."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        bags: Any = EmbeddingBagCollection(
            device=torch.device("cpu"),
            is_weighted=True,
            tables=[
                EmbeddingBagConfig(name=f"t_{key}", num_embeddings=rows, embedding_dim=8, feature_names=[key])
                for key, rows in zip(KEYS, ROWS, strict=True)
            ],
        )
        lengths = {key: LONGEST + number for number, key in enumerate(KEYS)}
        self.processor: Any = None
        if form == "processor":
            self.processor = processor = PositionWeightedProcessor(lengths)
        elif form == "modules":
            processor = torch.nn.ModuleDict({key: PositionWeightedModule(length) for key, length in lengths.items()})
            bags = FeatureProcessedEmbeddingBagCollection(bags, dict(processor.items()))
        else:
            some = {key: length for key, length in lengths.items() if form == "collection" or key != "a"}
            processor = PositionWeightedModuleCollection(some)
            bags = FeatureProcessedEmbeddingBagCollection(bags, processor)
        for weight in processor.parameters():
            torch.nn.init.uniform_(weight, 0.0, 2.0)
        for weight in bags.parameters():
            if weight.dim() == 2:
                torch.nn.init.uniform_(weight, -1.0, 1.0)
        self.bags = bags
        self.over = torch.nn.Linear(8 * len(KEYS) + DENSE, 1)

    def forward(self, dense: Any, sparse: Any) -> Any:
        if self.processor is not None:
            sparse = self.processor(sparse)
        return self.over(torch.cat([dense, self.bags(sparse).values()], 1))


class Predict(PredictModule):
    def predict_forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        sparse = KeyedJaggedTensor(
            keys=KEYS, lengths=batch["id_list_features.lengths"], values=batch["id_list_features.values"]
        )
        return {"default": self.predict_module(batch["float_features"], sparse).sigmoid().reshape(-1)}


def inputs_of(batch: Any) -> dict[str, Any]:
    return {
        "float_features": torch.from_numpy(batch.dense),
        "id_list_features.lengths": torch.from_numpy(batch.lengths),
        "id_list_features.values": torch.from_numpy(batch.values),
    }


def packaged(form: str, quantized: bool, path: Path) -> None:
    module: Any = Predict(Weighed(form), torch.device("cpu"))
    if quantized:
        module = quantize_inference_model(module)
    module(inputs_of(batch_of(ROWS, DENSE, 2)))
    graph = Tracer(leaf_modules=["IntNBitTableBatchedEmbeddingBagsCodegen"]).trace(module.eval())
    torch.jit.script(torch.fx.GraphModule(module, graph)).save(str(path))


# Quantized modules cannot be packaged: torch.fx cannot trace TorchRec's dict of them.
FORMS = [
    ("processor", True),
    ("processor", False),
    ("collection", True),
    ("collection", False),
    ("some", True),
    ("modules", False),
]


@pytest.mark.parametrize(("form", "quantized"), FORMS)
def test_it_is_scored_as_a_direct_call_scores_it(form: str, quantized: bool, tmp_path: Path) -> None:
    path = tmp_path / "model_default.pt"
    packaged(form, quantized, path)
    artifact = open_artifact(path)
    assert [(feature.name, feature.rows) for feature in artifact.schema.features] == list(zip(KEYS, ROWS, strict=True))
    backend, module = load_backend(artifact, "torch", tune_kernels=False), torch.jit.load(str(path))
    for longest in (None, LONGEST):
        batch = batch_of(ROWS, DENSE, 9, longest=longest, seed=2)
        with torch.inference_mode():
            expected = module(inputs_of(batch))["default"].numpy()
        np.testing.assert_array_equal(backend.run(batch)["default"], expected)
        for rows in ([0], [4], [*range(9), 0, 0, 0]):
            found = backend.run(rows_of(batch, len(KEYS), rows))["default"]
            np.testing.assert_allclose(found[:9], expected[rows[:9]], atol=1e-6)
