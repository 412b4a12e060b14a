from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import ValidationError

from perception.config import Config, apply_override, load_config, read_yaml
from perception.errors import ConfigError, DataError, PerceptionError


class Camera(Config):
    topic: str = "/front"
    width_px: int = 1600


class Settings(Config):
    name: Literal["nuscenes"] = "nuscenes"
    root: Path = Path("data")
    score_threshold: float = 0.1
    camera: Camera = Camera()
    spare: Camera | None = None
    roles: tuple[str, ...] = ("front",)


def write(folder: Path, text: str) -> Path:
    path = folder / "vehicle.yaml"
    path.write_text(text)
    return path


def test_a_file_overrides_defaults_and_the_command_line_overrides_the_file(tmp_path):
    path = write(tmp_path, "score_threshold: 0.3\ncamera: {topic: /cam}\n")
    config = load_config(Settings, path, ["camera.width_px=800", "roles=[front, back]"])
    assert config == Settings(
        score_threshold=0.3, camera=Camera(topic="/cam", width_px=800), roles=("front", "back"), root=Path("data")
    )
    assert load_config(Settings) == Settings()
    assert load_config(Settings, write(tmp_path, "")) == Settings()


def test_an_override_reaches_where_the_file_says_nothing():
    assert load_config(Settings, overrides=["spare.topic=/x"]).spare == Camera(topic="/x")
    assert load_config(Settings, overrides=["root=/data/nuscenes=v1"]).root == Path("/data/nuscenes=v1")


def test_configurations_are_frozen_and_round_trip(tmp_path):
    config = load_config(Settings, overrides=["score_threshold=0.25"])
    with pytest.raises(ValidationError, match="frozen"):
        config.score_threshold = 0.5
    assert Settings.model_validate_json(config.model_dump_json()) == config


def test_an_unknown_key_names_the_nearest(tmp_path):
    path = write(tmp_path, "camera: {topc: /cam}\n")
    with pytest.raises(
        ConfigError,
        match=r"vehicle.yaml: unknown key 'camera.topc'\n  did you mean 'topic'\? known keys: topic, width_px",
    ):
        load_config(Settings, path)
    with pytest.raises(ConfigError, match=r"the command line: unknown key 'scores' \(and 1 more\)\n"):
        load_config(Settings, overrides=["scores=1", "x=2"])
    with pytest.raises(ConfigError, match=r"unknown key 'spare.wide'\n  .*known keys: topic, width_px"):
        load_config(Settings, overrides=["spare.wide=1"])


def test_a_wrong_value_names_the_key_and_the_value(tmp_path):
    with pytest.raises(
        ConfigError, match=r"score_threshold: .*valid number.*, got 'high'\n  set score_threshold in .*vehicle.yaml, or"
    ):
        load_config(Settings, write(tmp_path, "score_threshold: high"))
    with pytest.raises(ConfigError, match=r"name: .*'nuscenes', got 'kitti'"):
        load_config(Settings, overrides=["name=kitti"])


def test_a_missing_file_lists_those_beside_it(tmp_path):
    write(tmp_path, "")
    with pytest.raises(ConfigError, match=r"vehicel.yaml: no such configuration file\n  .* holds: vehicle.yaml"):
        read_yaml(tmp_path / "vehicel.yaml")
    with pytest.raises(ConfigError, match=r"holds: no .yaml file"):
        read_yaml(tmp_path / "nowhere" / "a.yaml")


def test_a_directory_is_not_a_file(tmp_path):
    with pytest.raises(ConfigError, match="is a directory\n  name a YAML file you may read"):
        read_yaml(tmp_path)


def test_yaml_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)vehicle.yaml: not YAML: .*line 1"):
        read_yaml(write(tmp_path, "a: [1, 2"))
    with pytest.raises(ConfigError, match=r"expected keys and values, got list"):
        read_yaml(write(tmp_path, "- a\n- b\n"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary.yaml: not YAML"):
        read_yaml(tmp_path / "binary.yaml")


def test_yaml_builds_no_objects(tmp_path):
    with pytest.raises(ConfigError, match="not YAML"):
        read_yaml(write(tmp_path, "a: !!python/object/apply:os.getcwd []"))


@pytest.mark.parametrize("override", ["score_threshold", "=1", "camera..topic=1", ".a=1"])
def test_an_override_has_a_key_and_a_value(override):
    with pytest.raises(ConfigError, match=r"expected KEY=VALUE\n  for example  --set dataset.split=mini_val"):
        apply_override({}, override)


def test_an_override_cannot_enter_a_value_nor_be_bad_yaml():
    with pytest.raises(ConfigError, match="'score' holds a value, not keys"):
        apply_override({"score": 0.3}, "score.threshold=1")
    with pytest.raises(ConfigError, match="the value is not YAML"):
        apply_override({}, "roles=[front")


def test_errors_say_what_and_then_what_to_do():
    error = DataError("a.bin: 7 bytes, expected 8", "fetch it again")
    assert str(error) == "a.bin: 7 bytes, expected 8\n  fetch it again"
    assert isinstance(error, PerceptionError)
