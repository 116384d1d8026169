"""``narsil predict`` against a server: rows out, rows in, scores as they are wanted."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from click.testing import CliRunner

from narsil.backends.fake import FakeBackend
from narsil.cli.predict import command
from narsil.cli.targets import Target
from narsil.engine.served_model import ServedModel
from narsil.errors import ConfigError, ModelNotFound
from tests.conformance.serving import serving
from tests.support import SCHEMA, engine_with, fake_model, grpc_server


def predict(address: str, *arguments: str, text: str | None = None) -> str:
    result = CliRunner().invoke(command, ["--target", address, *arguments], input=text)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_example_that_it_prints_is_taken_and_scores_as_the_rows_it_stands_for():
    with serving("grpcio") as (address, _):
        example = predict(address, "--example", "--rows", "3", "--seed", "7")
        rows = [json.loads(line) for line in example.splitlines()]
        assert [len(row["dense"]) for row in rows] == [SCHEMA.dense_dim] * 3
        assert set(rows[0]["sparse"]) == {feature.name for feature in SCHEMA.features}
        sent = predict(address, "--rows", "3", "--seed", "7", "--lines")
        assert predict(address, "--file", "-", "--lines", text=example) == sent
    scores = [json.loads(line) for line in sent.splitlines()]
    assert len({score["default"] for score in scores}) == 3


def test_a_file_that_is_wrong_is_told_by_its_line_and_standard_input_by_its_name():
    with serving("grpcio") as (address, _), pytest.raises(ConfigError, match="standard input, line 2: "):
        predict(address, "--file", "-", text="\nnonsense\n")
    with serving("grpcio") as (address, _), pytest.raises(ConfigError, match="standard input holds no rows"):
        predict(address, "--file", "-", text="\n")


def weighted() -> ServedModel:
    features = tuple(dataclasses.replace(feature, weighted=True) for feature in SCHEMA.features)
    return ServedModel("fake", "1", [FakeBackend(dataclasses.replace(SCHEMA, features=features))])


def test_rows_may_have_weights():
    row = {"dense": [0, 1, 2], "sparse": {"user": [1, 2], "item": [], "tags": [3], "shop": [0]}}
    with engine_with(model=weighted()) as engine, grpc_server(engine) as address:

        def scored(**more: object) -> float:
            line = predict(address, "--file", "-", "--lines", text=json.dumps({**row, **more}))
            return float(json.loads(line)["default"])

        plain = scored()
        assert scored(weights={"user": [1, 1]}) == plain
        assert scored(weights={"user": [1, 3]}) != plain
        with pytest.raises(ConfigError, match="line 1: feature user: 1 weights for 2 ids"):
            scored(weights={"user": [1]})
        with pytest.raises(ConfigError, match="line 1: unknown feature 'x'"):
            scored(weights={"x": [1]})


def test_a_model_can_be_named():
    with engine_with(model=fake_model(name="ads", version="3")) as engine, grpc_server(engine) as address:
        found = json.loads(predict(address, "--model", "ads", "--version", "3", "--json"))
        assert (found["model"], found["version"]) == ("ads", "3")
        with pytest.raises(ModelNotFound, match="'feed' is not served here"):
            predict(address, "--model", "feed")


def test_two_ways_to_print_are_one_too_many():
    result = CliRunner().invoke(command, ["--json", "--lines"])
    assert result.exit_code == 2
    assert "leave one of them out" in result.output


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("ads.internal", "ads.internal:50051"),
        ("10.0.0.1:7000", "10.0.0.1:7000"),
        ("::1", "[::1]:50051"),
        ("[::1]", "[::1]:50051"),
        ("[::1]:7000", "[::1]:7000"),
        ("unix:/run/narsil", "unix:/run/narsil"),
        ("dns:///ads:7000", "dns:///ads:7000"),
    ],
)
def test_a_host_alone_means_the_usual_port(given, meant):
    assert Target().convert(given, None, None) == meant


def test_dense_values_of_an_example_are_the_same_float32_when_they_are_read():
    with serving("grpcio") as (address, _):
        rows = [json.loads(line) for line in predict(address, "--example", "--rows", "50").splitlines()]
    written = np.array([row["dense"] for row in rows], np.float32)
    np.testing.assert_array_equal(written, np.random.default_rng(0).random((50, SCHEMA.dense_dim), dtype=np.float32))
