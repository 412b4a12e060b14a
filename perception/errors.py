"""The one exception that carries a message for the user: what is wrong, where, and what to do about it."""

from __future__ import annotations


class PerceptionError(ValueError):
    """A fault the user can mend. Core code raises it; only the command line and the ROS node turn it into output.

    Args:
        what: what is wrong, with the offending value, and where (file, topic, config path).
        do: what the user can do about it; printed on the following, indented lines.
    """

    def __init__(self, what: str, do: str) -> None:
        self.what = what
        self.do = do
        super().__init__(f"{what}\n  {do}")

    def __reduce__(self) -> tuple:
        # A DataLoader worker pickles what it raises; the default would call __init__ with one argument.
        return type(self), (self.what, self.do)


class DataError(PerceptionError):
    """A data set's file is missing, truncated, or not what its layout says."""


class ConfigError(PerceptionError):
    """A configuration file or an override does not fit its schema."""
