"""The option of commands that run a finished model with more or fewer merged tokens than its config says."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from vispeft.cli.common import console
from vispeft.core.token_merging import TokenMerging
from vispeft.tasks.base import AdapterTask
from vispeft.tasks.token_merging import merge_tokens

__all__ = ["add_token_merging", "merge_as_asked", "without_token_merging"]


def add_token_merging(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--token_merging``.

    Args:
        parser: A command's parser.
    """
    told = "tokens that each block merges away, one number or one per block (16,16,8), or off; default: the run's own"
    parser.add_argument("--token_merging", "--token-merging", metavar="R", help=told)


def merge_as_asked(task: AdapterTask, asked: str | TokenMerging | None) -> list[dict[str, Any]]:
    """Let the model of a finished run merge as many tokens as a command was asked for.

    Args:
        task: The task of the run, whose model merges what the run's config says.
        asked: The value of the option, or settings; None leaves the model as it is.

    Returns:
        The settings that act, none if no tokens are merged.

    Raises:
        ConfigError: If the value cannot be read, or the task or the adapter cannot merge tokens.
        BackboneError: If the backbone's family has no token merging.
    """
    if asked is not None:
        merge_tokens(task, TokenMerging.parsed(asked) if isinstance(asked, str) else asked)
    merging = task.bank.token_merging
    return [asdict(merging)] if merging else []


def without_token_merging(task: AdapterTask, done: str) -> None:
    """Switch token merging off for what needs one token per patch, and say so.

    Args:
        task: The task of a finished run.
        done: Participle of what is done, for the message.
    """
    if task.bank.token_merging:
        console.print(
            f"The model is {done} without its token merging. For its figures, see vispeft evaluate RUN --token_merging "
            "off.",
            soft_wrap=True,
        )
        merge_tokens(task, TokenMerging())
