"""Token merging of a task's model."""

from __future__ import annotations

from vispeft.core.token_merging import TokenMerging
from vispeft.errors import ConfigError
from vispeft.tasks.base import AdapterTask
from vispeft.tasks.dense import DenseTask

__all__ = ["merge_tokens"]


def merge_tokens(task: AdapterTask, merging: TokenMerging) -> None:
    """Let the model of a task merge tokens, as `AdapterBank.merge_tokens` does.

    Args:
        task: The task, with the adapter that is trained or measured.
        merging: The settings.

    Raises:
        ConfigError: If the task predicts pixels, or its adapter reads tokens by their places.
        BackboneError: If the backbone's family has no token merging.
    """
    if merging and isinstance(task, DenseTask):
        raise ConfigError(
            f"Token merging was asked for, and {type(task).__name__} predicts pixels: patches that share a token would "
            "get one value. Leave it out, or set its r to 0."
        )
    task.bank.merge_tokens(merging)
