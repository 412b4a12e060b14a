"""The one exception that carries a message for the user: what is wrong, where, and what to do about it."""

from __future__ import annotations


class PerceptionError(ValueError):
    """A fault the user can mend. Core code raises it; only the command line and the ROS node turn it into output.

    Args:
        what: what is wrong, with the offending value, and where (file, topic, config path).
        do: what the user can do about it; printed on the following, indented lines. Empty only where torch makes the
            error anew: what a DataLoader worker raises comes out as `type(error)(text)`, the text holding both and the
            worker's traceback, and as a bare RuntimeError if that call fails.
    """

    def __init__(self, what: str, do: str = "") -> None:
        self.what = what
        self.do = do
        super().__init__(f"{what}\n  {do}" if do else what)

    def __reduce__(self) -> tuple:
        # The default would give __init__ the whole text as `what`.
        return type(self), (self.what, self.do)


class DataError(PerceptionError):
    """A data set's file is missing, truncated, or not what its layout says."""


class ConfigError(PerceptionError):
    """A configuration file or an override does not fit its schema."""
