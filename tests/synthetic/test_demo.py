"""The demo is made once, by one of those that want it, and is whole where it is there."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from perception.synthetic import demo


def test_of_several_that_want_it_one_makes_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made, begun, go_on = [], threading.Event(), threading.Event()

    def export(config: object, root: Path, progress: object) -> None:
        begun.set()
        assert go_on.wait(10)
        (root / "val_000").mkdir(parents=True)
        made.append(root)

    monkeypatch.setattr(demo, "export", export)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(demo.demo_bag())) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(10)
    assert not found  # nobody is given what is not whole
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert len(made) == 1 and len(set(found)) == 1 and len(found) == 3 and found[0].is_dir()


def test_what_fails_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def export(config: object, root: Path, progress: object) -> None:
        (root / "half").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "export", export)
    with pytest.raises(KeyboardInterrupt):
        demo.demo_city()
    assert not list((tmp_path / "perception").glob("demo-city-*/"))


def test_progress_is_told(capsys):
    demo._say("scene 1", 2, 4)
    assert capsys.readouterr().err == "making a small city, once: 2 of 4, scene 1\n"
