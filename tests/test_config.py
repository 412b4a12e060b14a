from __future__ import annotations

import pickle
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, ValidationError, model_validator
from torch.utils.data import DataLoader

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


class Sensors(Config):
    split: Literal["train", "val"] | tuple[str, ...] = "val"
    spare: Camera | str | None = None
    sensors: dict[str, Camera] = Field(default_factory=dict)
    order: tuple[Camera, ...] = ()

    @model_validator(mode="after")
    def _front_is_there(self):
        if self.sensors and "front" not in self.sensors:
            raise ValueError(f"sensors {list(self.sensors)} without 'front'")
        return self


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # pydantic's location is ("split", "literal['train','val']"), and a second error for the other branch.
        ("split=vall", r"split: .*'train' or 'val', or: .*valid tuple, got 'vall'\n  --set split=\.\.\."),
        ("split=[00, 03]", r"split: .*valid string, got \[0, 3\]\n .*in quotes what YAML would read as a number"),
        ("spare={topc: /x}", r"unknown key 'spare.topc'.*\n  did you mean 'topic'\?"),
        ("sensors.front.topc=/x", r"unknown key 'sensors.front.topc'\n  did you mean 'topic'\?"),
        ("sensors.front.width_px=wide", r"sensors.front.width_px: .*, got 'wide'"),
        ("order=[{topc: /x}]", r"unknown key 'order.0.topc'\n  did you mean 'topic'\?"),
        ("sensors.back.topic=/x", r"^the command line: sensors \['back'\] without 'front'\n"),
    ],
)
def test_a_key_is_named_as_the_user_wrote_it(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(Sensors, overrides=[override])


def test_a_missing_key_is_said_to_be_missing():
    class Needs(Config):
        root: Path

    with pytest.raises(ConfigError, match=r"root is missing\n  --set root="):
        load_config(Needs)


def test_an_override_fills_a_section_that_the_file_leaves_empty(tmp_path):
    assert load_config(Settings, write(tmp_path, "spare:\n"), ["spare.topic=/x"]).spare == Camera(topic="/x")


def test_a_path_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/kim")
    assert load_config(Settings, overrides=["root=~/data"]).root == Path("/home/kim/data")


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
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.what, again.do) == (DataError, error.what, error.do)


class _Broken:
    def __len__(self):
        return 1

    def __getitem__(self, i):
        raise DataError("a.bin: 7 bytes, expected 8", "fetch it again")


def test_a_data_loaders_worker_raises_the_error_of_the_data_set():
    with pytest.raises(DataError, match=r"(?s)worker process 0.*a.bin: 7 bytes, expected 8\n  fetch it again"):
        next(iter(DataLoader(_Broken(), num_workers=1)))
