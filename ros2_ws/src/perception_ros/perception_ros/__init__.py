"""The ROS 2 skin of `perception`: the only place that imports rclpy."""
