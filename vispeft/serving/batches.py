"""Batches of requests: a thread collects images for a stated delay and answers them together."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vispeft.errors import ConfigError, VispeftError
from vispeft.serving.passes import Served
from vispeft.serving.server import Server

__all__ = ["Batches", "BusyError"]

logger = logging.getLogger(__name__)


class BusyError(VispeftError):
    """More images wait than the server takes, or it stops."""


@dataclass(frozen=True)
class _Waiting:
    """An image that waits for its answer."""

    image: Tensor
    name: str
    served: Served
    """How the adapter takes part in a pass, also when it is to be removed behind this image."""
    held: ExitStack
    """Keeps the adapter until the image is answered."""
    answer: Future[Tensor] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class Batches:
    """Answers single images in batches: a batch begins when it is full, or its first image has waited long enough."""

    def __init__(self, server: Server, size: int = 8, delay: float = 0.005, most: int = 256) -> None:
        """Start the thread.

        Args:
            server: Answers the batches.
            size: Images of a full batch.
            delay: Seconds that an image waits for others.
            most: Largest number of images that wait.

        Raises:
            ConfigError: If a number is out of range.
        """
        if size < 1 or delay < 0 or most < size:
            raise ConfigError(f"Batches(size={size}, delay={delay}, most={most}): size >= 1, delay >= 0, most >= size.")
        self.server, self.size, self.delay, self.most = server, size, delay, most
        self.on_batch: Callable[[int, float], None] = lambda images, seconds: None
        """Called behind each batch with its images and its seconds."""
        self._lock = threading.Condition()
        self._waiting: deque[_Waiting] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="vispeft-batches", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of images that wait."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether the thread runs and takes images."""
        return self._thread.is_alive() and not self._stopping

    def ask(self, image: Tensor, name: str) -> Future[Tensor]:
        """Put an image into the queue. Its adapter is not removed before it is answered.

        Args:
            image: (C, H, W), prepared for the adapter.
            name: The adapter.

        Returns:
            The answer to come; if it is cancelled, the image waits no longer.

        Raises:
            UnknownNameError: If there is no such adapter.
            BusyError: If too many wait, or the server stops.
        """
        held = ExitStack()
        served = held.enter_context(self.server.holding([name]))[name]
        waiting = _Waiting(image, name, served, held)
        with self._lock:
            if self._stopping or len(self._waiting) >= self.most:
                held.close()
                reason = "the server stops" if self._stopping else f"{self.most} images wait already"
                raise BusyError(f"The image was not taken: {reason}. Try again later.")
            self._waiting.append(waiting)
            self._lock.notify_all()
        waiting.answer.add_done_callback(lambda answer: self._forget(waiting) if answer.cancelled() else None)
        return waiting.answer

    def _forget(self, waiting: _Waiting) -> None:
        """Take an image out of the queue, if it is still there."""
        with self._lock:
            there = any(other is waiting for other in self._waiting)
            self._waiting = deque(other for other in self._waiting if other is not waiting)
        if there:
            waiting.held.close()

    def stop(self) -> None:
        """Answer what waits, and end the thread."""
        with self._lock:
            self._stopping = True
            self._lock.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            batch = self._collect()
            if not batch:
                return
            start = time.monotonic()
            try:
                self._answer(batch)
            finally:
                for waiting in batch:
                    waiting.held.close()
            self.on_batch(len(batch), time.monotonic() - start)

    def _collect(self) -> list[_Waiting]:
        """Wait for images, and take those of the shape of the first one; none when the server has stopped."""
        with self._lock:
            while not self._waiting and not self._stopping:
                self._lock.wait()
            while self._waiting and not self._stopping and len(self._waiting) < self.size:
                left = self._waiting[0].since + self.delay - time.monotonic()
                if left <= 0:
                    break
                self._lock.wait(left)
            taken: list[_Waiting] = []
            kept: deque[_Waiting] = deque()
            while self._waiting and len(taken) < self.size:
                waiting = self._waiting.popleft()
                alike = not taken or waiting.image.shape == taken[0].image.shape
                (taken if alike else kept).append(waiting)
            self._waiting.extendleft(reversed(kept))
            return taken

    def _answer(self, batch: list[_Waiting]) -> None:
        asked = [waiting for waiting in batch if waiting.answer.set_running_or_notify_cancel()]
        if not asked:
            return
        try:
            found = self._answers(asked)
        except Exception as error:
            if len(asked) == 1:
                logger.exception("An image could not be answered by %s.", asked[0].name)
                asked[0].answer.set_exception(error)
                return
            # One of them may be at fault: the others get their answers.
            for waiting in asked:
                try:
                    waiting.answer.set_result(self._answers([waiting])[0])
                except Exception as own:
                    logger.exception("An image could not be answered by %s.", waiting.name)
                    waiting.answer.set_exception(own)
            return
        for waiting, own in zip(asked, found, strict=True):
            waiting.answer.set_result(own)

    def _answers(self, asked: list[_Waiting]) -> list[Tensor]:
        served: dict[str | None, Served] = {waiting.name: waiting.served for waiting in asked}
        images = torch.stack([waiting.image for waiting in asked])
        return self.server.answer_held(images, [(place, waiting.name) for place, waiting in enumerate(asked)], served)
