"""Models whose ids are weighed by their place in the bag, as TorchRec's feature processors do: each is served, its ids
bounded by its tables, and scored by the torch backend as a direct call scores it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.torchrec_models import (
    DENSE,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    Flat,
    direct,
    inputs_of,
    package,
    torch,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchrec.modules.feature_processor import PositionWeightedProcessor
    from torchrec.modules.feature_processor_ import PositionWeightedModule, PositionWeightedModuleCollection
    from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection

from narsil.artifacts.artifact import open_artifact
from narsil.backends.registry import load_backend
from tests.fixtures_models import batch_of, rows_of

pytestmark = pytest.mark.filterwarnings("ignore")

KEYS, ROWS, LONGEST = ["c", "a", "b"], [30, 40, 50], 7


class Weighed(torch.nn.Module):
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
    module = Flat(Weighed(form), KEYS)
    package(module, inputs_of(batch_of(ROWS, DENSE, 2)), path, quantized=quantized, sharded=False)
    artifact = open_artifact(path)
    assert [(feature.name, feature.rows) for feature in artifact.schema.features] == list(zip(KEYS, ROWS, strict=True))
    backend = load_backend(artifact, "torch", tune_kernels=False)
    for longest in (None, LONGEST):
        batch = batch_of(ROWS, DENSE, 9, longest=longest, seed=2)
        expected = direct(path, batch)
        np.testing.assert_array_equal(backend.run(batch)["default"], expected)
        for rows in ([0], [4], [*range(9), 0, 0, 0]):
            found = backend.run(rows_of(batch, len(KEYS), rows))["default"]
            np.testing.assert_allclose(found[:9], expected[rows[:9]], atol=1e-6)
