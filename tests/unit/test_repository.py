"""A folder of models: which versions lie in it, which are wanted, what is wrong with the others."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from narsil.catalog.catalog import Routes
from narsil.catalog.repository import ModelFolder, in_order, read_repository
from narsil.errors import ConfigError


def put(root: Path, name: str, *versions: str, config: str = "") -> Path:
    """A model whose versions hold one file each."""
    for version in versions:
        (root / name / version).mkdir(parents=True)
        (root / name / version / "model_default.pt").write_bytes(b"a model")
    (root / name).mkdir(exist_ok=True)
    if config:
        (root / name / "config.toml").write_text(config)
    return root / name


def only(root: Path) -> ModelFolder:
    found = read_repository(root)
    assert not found.problems
    (model,) = found.models.values()
    return model


def wanted(root: Path) -> list[str]:
    return [held.version for held in only(root).wanted()]


def test_versions_are_in_the_order_in_which_people_count(tmp_path):
    put(tmp_path, "ads", "10", "9", "2")
    assert [held.version for held in only(tmp_path).versions] == ["2", "9", "10"]
    assert sorted(["v1.10", "v1.9", "v1.9b", "2026-11-02", "b"], key=in_order) == [
        "2026-11-02",
        "b",
        "v1.9",
        "v1.9b",
        "v1.10",
    ]


@pytest.mark.parametrize(
    ("config", "versions"),
    [
        ("", ["10"]),
        ('versions = "latest"', ["10"]),
        ("versions = { latest = 2 }", ["9", "10"]),
        ("versions = { latest = 9 }", ["2", "9", "10"]),
        ('versions = "all"', ["2", "9", "10"]),
        ('versions = ["9", "2"]', ["9", "2"]),
    ],
)
def test_a_policy_picks_versions(tmp_path, config, versions):
    put(tmp_path, "ads", "10", "9", "2", config=config)
    assert wanted(tmp_path) == versions


def test_a_policy_that_asks_for_what_is_not_there_is_refused(tmp_path):
    put(tmp_path, "ads", "1", config='versions = ["7"]')
    with pytest.raises(
        ConfigError, match=r"ads/config\.toml asks for version '7', which the repository does not have; it"
    ):
        only(tmp_path).wanted()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('versions = "newest"', 'versions: give "latest", "all"'),
        ("versions = { latest = 0 }", 'versions: give "latest", "all"'),
        ("split = { a = 0.0 }", "split: the share of 'a' must be above 0"),
        ("split = { a = inf }", "split: the share of 'a' must be above 0"),
        ('labels = { "a b" = "1" }', "labels: 'a b' is no name"),
        ("share = -1.0", "share: "),
        ("x = ", "is no TOML"),
    ],
)
def test_a_wrong_config_is_told_and_the_other_models_are_there(tmp_path, config, said):
    put(tmp_path, "ads", "1", config=config)
    put(tmp_path, "feed", "1")
    found = read_repository(tmp_path)
    assert list(found.models) == ["feed"]
    assert said in found.problems["ads", ""]


def test_config_holds_routes_a_share_and_settings(tmp_path):
    put(
        tmp_path,
        "ads",
        "1",
        config='backend = "torch"\nshare = 2.0\n[labels]\nstable = "1"\n[split]\nstable = 95\n"2" = 5\n',
    )
    config = only(tmp_path).config
    assert config.routes == Routes({"stable": "1"}, {"stable": 95, "2": 5})
    assert (config.share, config.settings) == (2.0, {"backend": "torch"})


def test_what_is_no_version_is_told(tmp_path):
    put(tmp_path, "ads", "1")
    (tmp_path / "ads" / "2").mkdir()
    two = tmp_path / "ads" / "3"
    two.mkdir()
    for name in ("a.pt", "b.pt"):
        (two / name).touch()
    (tmp_path / "none").mkdir()
    (tmp_path / "a name").mkdir()
    found = read_repository(tmp_path)
    assert [held.version for held in found.models["ads"].versions] == ["1"]
    assert "holds no model: neither manifest.json nor a file" in found.problems["ads", "2"]
    assert "holds a.pt, b.pt: keep one model" in found.problems["ads", "3"]
    assert "holds no version: put the artifact in" in found.problems["none", ""]
    assert "no model's" in found.problems["a name", ""]


def test_a_copy_under_a_dot_and_plain_files_are_passed_over(tmp_path):
    put(tmp_path, "ads", "1", ".2")
    put(tmp_path, ".feed", "1")
    (tmp_path / "README").touch()
    assert wanted(tmp_path) == ["1"]


def test_a_folder_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"the repository .* cannot be read: No such file or directory"):
        read_repository(tmp_path / "missing")


def test_a_version_that_was_written_to_is_another(tmp_path):
    folder = put(tmp_path, "ads", "1")
    before = only(tmp_path)
    assert only(tmp_path) == before
    (folder / "1" / "READY").touch()
    assert only(tmp_path) == before
    replaced = folder / "1" / "other"
    replaced.write_bytes(b"a modem")
    os.replace(replaced, folder / "1" / "model_default.pt")
    assert only(tmp_path) != before


def test_a_bare_file_is_complete_where_it_is_a_whole_archive_or_marked(tmp_path):
    folder = put(tmp_path, "ads", "1")
    (held,) = only(tmp_path).versions
    assert not held.complete()
    with zipfile.ZipFile(held.path, "w") as archive:
        archive.writestr("data", b"0123456789" * 100)
    assert held.complete()
    whole = held.path.read_bytes()
    held.path.write_bytes(whole[:40] + bytes(200) + whole[240:])  # as a copy that was given its size first
    assert not held.complete()
    (folder / "1" / "READY").touch()
    assert held.complete()
