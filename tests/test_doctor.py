"""The report on a machine: each problem with its fix. Machines are made up by what the checks ask of the system."""

from __future__ import annotations

import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from perception import doctor
from perception.doctor import Finding, examine

CONFIGS = Path(__file__).parents[1] / "configs"


def named(findings, name) -> Finding:
    return next(f for f in findings if f.name == name)


def test_this_machine_has_nothing_that_fails():
    findings = examine()
    assert not [f for f in findings if f.status == "fail"]
    assert {"Python", "libraries", "spconv", "ROS 2", "shared memory", "nuscenes-devkit", "open3d", "cache"} <= {
        f.name for f in findings
    }


def test_every_problem_comes_with_a_fix(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    monkeypatch.setenv("ROS_DISTRO", "humble")
    assert all(f.fix for f in examine() if f.status in ("warn", "fail"))


def test_an_interpreter_outside_the_range_fails(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    found = named(doctor._python(), "Python")
    assert found.status == "fail" and "3.10, 3.11 or 3.12" in found.fix


def test_a_missing_library_is_named(monkeypatch):
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "safetensors" else version(name))
    assert named(doctor._libraries(), "libraries").detail == "missing: safetensors"


def test_two_builds_of_spconv_overwrite_each_other(monkeypatch):
    monkeypatch.setattr(doctor, "_distributions", lambda: ["spconv-cu120", "spconv-cu126"])
    found = named(doctor._spconv(), "spconv")
    assert found.status == "fail" and "overwrite each other" in found.detail and "uninstall" in found.fix


def test_a_broken_spconv_is_a_failure_with_the_reinstall_command(monkeypatch):
    monkeypatch.setattr(doctor, "_distributions", lambda: ["spconv-cu120"])
    monkeypatch.setitem(sys.modules, "spconv.pytorch", None)
    found = named(doctor._spconv(), "spconv")
    assert found.status == "fail" and "force-reinstall" in found.fix


@pytest.mark.parametrize(("distro", "python"), [("humble", "3.10"), ("jazzy", "3.12")])
def test_a_distribution_of_another_python_names_the_right_one(monkeypatch, distro, python):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "version_info", (3, 11, 7))
    monkeypatch.setenv("ROS_DISTRO", distro)
    found = named(doctor._ros(), "ROS 2")
    assert (
        found.status == "warn"
        and f"built for Python {python}" in found.detail
        and f"python{python} -m venv" in found.fix
    )


@pytest.fixture
def docker_shm(monkeypatch):
    """Docker's 64 MiB."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(64 * 2**20, 0, 64 * 2**20))
    monkeypatch.delenv("FASTDDS_DEFAULT_PROFILES_FILE", raising=False)
    monkeypatch.delenv("FASTRTPS_DEFAULT_PROFILES_FILE", raising=False)


def test_small_shared_memory_warns_with_the_docker_flag(docker_shm):
    found = named(doctor._shared_memory(), "shared memory")
    assert found.status == "warn" and "--shm-size=1g" in found.fix


def test_what_a_fast_dds_profile_needs_is_told_from_its_segments(docker_shm, monkeypatch):
    small, raw = (CONFIGS / name for name in ("fastdds_shm.xml", "fastdds_shm_raw.xml"))
    assert doctor.shared_memory(small).status == "ok"  # the one for JPEG and LiDAR fits a container
    found = doctor.shared_memory(raw)
    assert found.status == "warn" and "3 segments of 256 MiB (fastdds_shm_raw.xml) need 768" in found.detail
    monkeypatch.setenv("FASTRTPS_DEFAULT_PROFILES_FILE", str(raw))
    assert named(doctor._shared_memory(), "shared memory") == found
    monkeypatch.setenv("FASTDDS_DEFAULT_PROFILES_FILE", str(small))
    assert named(doctor._shared_memory(), "shared memory").status == "ok"


def test_a_profile_that_is_not_there_and_segments_left_behind_are_told(docker_shm, tmp_path):
    found = doctor.shared_memory(tmp_path / "none.xml")
    assert found.status == "warn" and "none.xml" in found.detail and "configs/fastdds_shm.xml" in found.fix
    (tmp_path / "fastdds_0123").write_bytes(bytes(2**21))
    found = doctor.shared_memory(CONFIGS / "fastdds_shm_raw.xml", tmp_path)
    assert "leftovers (2 MiB now) with: fastdds shm clean" in found.fix
    assert "absent" in doctor.shared_memory(None, tmp_path / "no").detail


def test_open3d_without_libusb_names_the_package(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: object())

    def missing(name):
        raise ImportError("libusb-1.0.so.0: cannot open shared object file")

    monkeypatch.setattr(doctor.importlib, "import_module", missing)
    assert named(doctor._open3d(), "open3d").fix == "apt-get install libusb-1.0-0"


def test_a_check_that_breaks_is_reported_and_the_others_go_on(monkeypatch):
    def broken():
        raise RuntimeError("boom")

    broken.__name__ = "_gpu"
    monkeypatch.setattr(doctor, "_gpu", broken)
    findings = examine()
    assert named(findings, "gpu").status == "fail" and "RuntimeError: boom" in named(findings, "gpu").detail
    assert named(findings, "cache").status == "ok"
