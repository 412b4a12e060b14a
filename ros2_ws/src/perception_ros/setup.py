"""Installs the ROS package; launch files, configurations and the RViz view come from the project's top level."""

import os
from pathlib import Path

from setuptools import setup

NAME = "perception_ros"
os.chdir(Path(__file__).resolve().parent)  # setuptools wants relative paths


def files(folder: str) -> list[str]:
    return sorted(str(path) for path in Path("../../..", folder).glob("*.*"))


setup(
    name=NAME,
    version="0.1.0",
    packages=[NAME],
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        (f"share/{NAME}/launch", files("launch")),
        (f"share/{NAME}/configs", files("configs")),
    ],
    install_requires=["setuptools"],
    zip_safe=False,
    maintainer="perception",
    maintainer_email="perception@example.org",
    description="The ROS 2 skin of perception: sensors' topics in, boxes, occupancy and pose out",
    license="Apache-2.0",
    extras_require={"test": ["pytest"]},
    entry_points={
        "console_scripts": [
            "perception_node = perception_ros.node:main",
            "perception_play = perception_ros.play:main",
        ]
    },
)
