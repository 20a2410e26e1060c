"""Failures that the user can cure; the command line prints their message without traceback."""

from warpo.engine.redact import redact


def one_line(error: object) -> str:
    """Return the message of a library's error in one line of at most 300 characters."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


class WarpoError(Exception):
    """The message names the value, the place and the cure, and no credentials of URLs."""

    def __init__(self, message: str = "") -> None:
        super().__init__(redact(message))


class ConfigError(WarpoError, ValueError):
    """A setting is unknown, malformed or cannot run."""


class DataError(WarpoError, ValueError):
    """A dataset cannot be used; the message names file and line."""


class RewardError(WarpoError, RuntimeError):
    """A reward function cannot be loaded, failed, or ran past its deadline."""


class CheckpointError(WarpoError, RuntimeError):
    """A checkpoint is missing, incomplete or belongs to another model or data set."""


class TrainingError(WarpoError, RuntimeError):
    """A step produced something that cannot be trained on."""


class WeightMismatch(WarpoError, RuntimeError):
    """The sampler does not hold the learner's weights."""


class SamplerError(WarpoError, RuntimeError):
    """The sampler cannot be built, or cannot hold the learner's weights."""


class RankError(WarpoError, RuntimeError):
    """Another rank has failed, has ended or did not come in time."""
