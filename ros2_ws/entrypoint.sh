#!/bin/bash
# Run a command with ROS and this workspace set up.
set -e
# shellcheck disable=SC1090,SC1091
. "/opt/ros/${ROS_DISTRO}/setup.bash"
# shellcheck disable=SC1091
. "$(dirname "$0")/install/local_setup.bash"
exec "$@"
