# syntax=docker/dockerfile:1
# ROS 2 from apt, CUDA, and the whole project, built by colcon; see compose.yaml for how to run it.
#   Humble (Python 3.10):  docker build -t perception .
#   Jazzy (Python 3.12):   docker build -t perception:jazzy \
#                            --build-arg ROS_DISTRO=jazzy --build-arg UBUNTU=24.04 --build-arg SPCONV=cu126 .
ARG CUDA=12.6.3
ARG UBUNTU=22.04
FROM nvidia/cuda:${CUDA}-runtime-ubuntu${UBUNTU}

ARG ROS_DISTRO=humble
# spconv's build: cu120 has no wheel for Python 3.12.
ARG SPCONV=cu120
# Built for CUDA 12.6, runs from driver 525 on; newer GPUs (Blackwell) want a newer one.
ARG TORCH=torch==2.7.1

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV DEBIAN_FRONTEND=noninteractive LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 \
    ROS_DISTRO=${ROS_DISTRO} OMP_WAIT_POLICY=PASSIVE

ADD --chmod=644 https://raw.githubusercontent.com/ros/rosdistro/master/ros.key /usr/share/keyrings/ros.gpg
# The distribution's repository decides the versions; it keeps only the newest of each.
# hadolint ignore=DL3008
RUN . /etc/os-release \
    && echo "deb [arch=$(dpkg --print-architecture) signed-by=/usr/share/keyrings/ros.gpg]" \
            "http://packages.ros.org/ros2/ubuntu ${UBUNTU_CODENAME} main" > /etc/apt/sources.list.d/ros2.list \
    && apt-get update \
    && apt-get install -y --no-install-recommends \
        build-essential cmake python3-dev python3-venv \
        libgl1 libglib2.0-0 \
        "ros-${ROS_DISTRO}-ros-base" \
        "ros-${ROS_DISTRO}-rmw-fastrtps-cpp" \
        "ros-${ROS_DISTRO}-rosbag2-storage-mcap" \
        "ros-${ROS_DISTRO}-rviz2" \
        "ros-${ROS_DISTRO}-vision-msgs" \
    && rm -rf /var/lib/apt/lists/*

# One interpreter, ROS' own; the environment sees rclpy in the distribution's packages.
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:${PATH}
WORKDIR /opt/perception
# Dependencies in a layer of their own: a change of the code does not download PyTorch anew.
COPY pyproject.toml README.md ./
COPY perception/__init__.py perception/
# numpy 1: apt's messages are compiled against it. setuptools before 80: colcon uses what 80 took away. colcon itself
# in the environment, so that the node's program starts with this Python and finds torch. Bounds are in pyproject.toml.
# hadolint ignore=DL3013
RUN python3 -m venv --system-site-packages "${VIRTUAL_ENV}" \
    && pip install --upgrade 'pip>=24' 'setuptools>=68,<80' colcon-common-extensions \
    && pip install "${TORCH}" 'numpy<2' -e ".[bag,${SPCONV}]"

COPY . .
RUN set +u && . "/opt/ros/${ROS_DISTRO}/setup.sh" && set -u \
    && python ros2_ws/build.py \
    && rm -rf ros2_ws/build ros2_ws/log

# Not root. Shared memory works between processes of one uid: give the host's, --build-arg UID=$(id -u).
ARG UID=1000
RUN useradd --create-home --no-log-init --non-unique --uid "${UID}" perception \
    && install -d -o perception /home/perception/.cache
# hadolint ignore=DL3066
USER perception
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,graphics,utility \
    FASTDDS_DEFAULT_PROFILES_FILE=/opt/perception/configs/fastdds_shm.xml \
    FASTRTPS_DEFAULT_PROFILES_FILE=/opt/perception/configs/fastdds_shm.xml

# Large messages travel in /dev/shm, and Docker's 64 MiB hold little: run with --ipc=host (or --shm-size=1g).
ENTRYPOINT ["/opt/perception/ros2_ws/entrypoint.sh"]
CMD ["perception", "up", "rviz:=false"]
