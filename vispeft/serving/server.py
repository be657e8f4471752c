"""A server in Python: many adapters answer from one backbone."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vispeft.adapters.bank import AdapterBank
from vispeft.errors import BaseMismatchError, ConfigError, UnknownNameError
from vispeft.hosts.running import RunningHost
from vispeft.serving.passes import Answering, Pair, Served

__all__ = ["Server", "name_of", "serve"]

Source = str | Path
Head = Callable[[Any], Tensor]


class Server:
    """Answers images with many adapters of one model, several of them in one pass of the backbone.

    It may be called from several threads, while others add and remove adapters: each answer is that of its adapter
    alone. The model belongs to the server: it stays in evaluation mode, and no gradients are computed.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, Source] | Sequence[Source] = ()) -> None:
        """Load adapters onto a model; see `serve`."""
        self.model = model.eval()
        self._lock = threading.Condition()
        self._change = threading.RLock()
        """Held while an adapter is added or removed."""
        self._compiled = threading.Lock()
        """Held during a pass of a compiled model, whose graphs follow the choice made last in any thread."""
        self._closed = False
        """Whether calls wait, while the model gets or loses its bank with its first or last adapter."""
        self._served: dict[str | None, Served] = {None: Served("probe")}
        self._uses: Counter[str | None] = Counter()
        self._bank = AdapterBank.of(model)
        for name in self._bank.names if self._bank is not None else ():
            self._take(self.bank, name)
        named = adapters.items() if isinstance(adapters, Mapping) else [(None, source) for source in adapters]
        for name, source in named:
            self.add(source, name)

    @property
    def names(self) -> list[str]:
        """Names of the adapters that answer."""
        with self._lock:
            return [name for name in self._served if name is not None]

    @property
    def bank(self) -> AdapterBank:
        """The model's bank.

        Raises:
            ConfigError: If no adapter was added yet.
        """
        if self._bank is None:
            raise ConfigError("This server has no adapter yet. Add one: server.add(DIRECTORY).")
        return self._bank

    def kind(self, name: str) -> str:
        """Return how an adapter takes part in a pass.

        Args:
            name: The adapter.

        Returns:
            ``probe``, ``queries`` or ``side``: it leaves the features alone and shares the frozen pass; ``rows``: it
            changes its rows of a batch that it shares with others; ``alone``: it needs a pass of its own.

        Raises:
            UnknownNameError: If there is no such adapter.
        """
        with self._lock:
            return self._found(name).kind

    # ------------------------------------------------------------------ adapters come and go

    def add(self, source: Source, name: str | None = None, head: Head | None = None, taps: Sequence[int] = ()) -> str:
        """Load an adapter; it answers from the next call on. Passes that run meanwhile end first.

        Args:
            source: Its directory, a run directory, or ``zoo:NAME``.
            name: Its name here; None for that of the directory, or of the run.
            head: What answers in place of its classifier: a function of pooled features (B, width), as the embedding
                head of a retrieval run, or with `taps` of a list of maps (B, C, h, w), such as a decoder.
            taps: The maps that `head` reads, as from ``forward_intermediates(indices=taps, norm=True)``: blocks of a
                plain model, stages of a Swin, from 0.

        Returns:
            The name.

        Raises:
            ConfigError: If the name is taken, the adapter has tasks, or taps are given that do not exist, or without a
                head.
            FileError: If a file is missing or altered.
            BaseMismatchError: If it was trained on another backbone.
        """
        place = _adapter_of(source)
        label = name_of(source) if name is None else name
        with self._change:
            with self._lock:
                if label in self._served:
                    raise ConfigError(
                        f"This server has an adapter {label!r} already (all: {', '.join(map(str, self.names))}). "
                        "Give another name, or remove it first."
                    )
            quiet = self._without_calls() if self._bank is None else nullcontext()
            # The file makes its adapter the model's choice for a moment, which a compiled pass would follow.
            with quiet, AdapterBank.opened(self.model) as bank, self._alone(bank):
                before = bank.chosen()
                try:
                    bank.load(place, label)
                except BaseMismatchError as error:
                    raise BaseMismatchError(f"{source} does not fit the backbone of this server. {error}") from error
                bank.choose_again(before)
                try:
                    self._take(bank, label, head, taps)
                except BaseException:
                    bank.detach(label)
                    raise
        return label

    def _take(self, bank: AdapterBank, name: str, head: Head | None = None, taps: Sequence[int] = ()) -> None:
        """Let an attached adapter answer."""
        if bank.tasks(name):
            raise ConfigError(
                f"Adapter {name!r} has tasks ({', '.join(bank.tasks(name))}), and a server gives one answer to an "
                "image. Use vispeft.forward_tasks, or save each task as an adapter of its own."
            )
        if not isinstance(bank.model, RunningHost):
            raise ConfigError(f"A {type(bank.model).__name__} cannot be served; give the timm model itself.")
        count = len(bank.view.stages) if bank.view.has_stages else len(bank.view.widths)
        if taps and (head is None or not all(tap in range(count) for tap in taps)):
            raise ConfigError(f"taps={list(taps)}: give numbers from 0 to {count - 1}, and a head that reads the maps.")
        served = Served.of(bank, name, head, taps)
        with self._lock:
            self._bank, self._served[name] = bank, served

    def remove(self, name: str) -> None:
        """Remove an adapter, after the calls that use it. Calls that begin meanwhile do not find it.

        Args:
            name: The adapter.

        Raises:
            UnknownNameError: If there is no such adapter.
        """
        with self._change:
            with self._lock:
                self._found(name)
                del self._served[name]
                last = len(self._served) == 1
                while self._uses[name]:
                    self._lock.wait()
                del self._uses[name]
            bank = self.bank
            with self._without_calls() if last else nullcontext(), self._alone(bank):
                bank.detach(name)
                if not bank.names:
                    self._bank = None

    @contextmanager
    def _without_calls(self) -> Iterator[None]:
        """Wait for the calls that run, and let those that begin wait for the end of the block."""
        try:
            with self._lock:
                self._closed = True
                while any(self._uses.values()):
                    self._lock.wait()
            yield
        finally:
            with self._lock:
                self._closed = False
                self._lock.notify_all()

    def _found(self, name: str | None) -> Served:
        if name not in self._served:
            raise UnknownNameError("adapter", str(name), [str(known) for known in self._served if known is not None])
        return self._served[name]

    @contextmanager
    def holding(self, names: Sequence[str | None]) -> Iterator[dict[str | None, Served]]:
        """Keep adapters from being removed in a ``with`` block, whose images `answer_held` answers.

        Args:
            names: The adapters; None for the base.

        Yields:
            How each takes part in a pass.

        Raises:
            UnknownNameError: If there is no such adapter.
        """
        wanted = list(dict.fromkeys(names))  # a Counter takes the values of a mapping for counts
        with self._lock:
            found = {name: self._found(name) for name in wanted}  # what is not there is not waited for
            while self._closed:
                self._lock.wait()
                found = {name: self._found(name) for name in wanted}
            self._uses.update(wanted)
        try:
            yield found
        finally:
            with self._lock:
                self._uses.subtract(wanted)
                self._lock.notify_all()

    # ------------------------------------------------------------------ answers

    def __call__(self, images: Tensor, names: Sequence[str | None]) -> list[Tensor]:
        """Answer each image by one adapter.

        Args:
            images: (B, C, H, W), prepared as the adapter needs it; moved to the model's device.
            names: The adapter of each image; None for the base.

        Returns:
            For each image the scores of its adapter's classifier, (classes,), or what its head gives.

        Raises:
            UnknownNameError: If there is no such adapter.
            ConfigError: If there is not one name for each image.
        """
        if isinstance(names, str) or len(names) != len(images):
            raise ConfigError(
                f"server(images, names): {len(images)} images and the names {names!r} were given. Give one adapter, or "
                "None for the base, for each image."
            )
        return self._answers(images, list(enumerate(names)))

    def each(self, images: Tensor, names: Sequence[str | None] | None = None) -> dict[str | None, Tensor]:
        """Answer all images by each of several adapters.

        Args:
            images: (B, C, H, W), prepared as all of them need it; moved to the model's device.
            names: The adapters; None in it for the base. By default all adapters.

        Returns:
            The answers (B, ...) of each adapter, by name.

        Raises:
            UnknownNameError: If there is no such adapter.
            ConfigError: If a text is given for the names.
        """
        if isinstance(names, str):
            raise ConfigError(f"server.each(images, names): give a list of names, such as [{names!r}].")
        wanted: list[str | None] = [*self.names] if names is None else list(dict.fromkeys(names))
        count = len(images)
        if not count or not wanted:
            return {}
        found = self._answers(images, [(image, name) for name in wanted for image in range(count)])
        return {name: torch.stack(found[i * count : (i + 1) * count]) for i, name in enumerate(wanted)}

    def _answers(self, images: Tensor, pairs: Sequence[Pair]) -> list[Tensor]:
        if not pairs:
            return []
        with self.holding([name for _, name in pairs]) as served:
            return self.answer_held(images, pairs, served)

    @torch.no_grad()
    def answer_held(self, images: Tensor, pairs: Sequence[Pair], served: Mapping[str | None, Served]) -> list[Tensor]:
        """Answer images by adapters that the caller holds, also by those that are to be removed behind it.

        Args:
            images: (B, C, H, W), prepared as the adapters need it.
            pairs: Images of the batch, by number, and the adapter that is to answer each.
            served: What `holding` gave for these adapters.

        Returns:
            The answer to each pair.
        """
        bank = self._bank
        like = next(self.model.parameters())
        images = images.to(like.device, like.dtype)
        if bank is None:  # no adapter comes before this call has ended
            return list(self.model(images)[[image for image, _ in pairs]].unbind())
        with self._alone(bank):
            return Answering(bank)(images, pairs, served)

    def _alone(self, bank: AdapterBank) -> AbstractContextManager[Any]:
        return self._compiled if bank.is_compiled else nullcontext()

    def notes(self, name: str) -> dict[str, Any]:
        """Return what an adapter's file says about its use: class names, preprocessing, output.

        Args:
            name: The adapter.

        Raises:
            UnknownNameError: If there is no such adapter.
        """
        with self.holding([name]):
            return self.bank.notes(name)


def serve(model: nn.Module, adapters: Mapping[str, Source] | Sequence[Source] = ()) -> Server:
    """Let many adapters of one backbone answer images together.

    Adapters that leave the features alone (a linear probe, VQT, LST, a head of your own) share one frozen pass. Those
    that `bank.using` can route row by row share it too, with rows of their own. The others run a pass each.

    Args:
        model: The backbone, a timm model. Adapters that are attached already are served too.
        adapters: Directories of adapters or runs, or ``zoo:NAME``; by name, or in a list, where each is named after its
            directory.

    Returns:
        The server.

    Raises:
        ConfigError: If a name is taken, or an adapter has tasks.
        FileError: If a file is missing or altered.
        BaseMismatchError: If an adapter was trained on another backbone.

    Example:
        >>> server = vispeft.serve(model, {"birds": "runs/birds/1", "cars": "runs/cars/1"})
        >>> scores = server(images, ["birds", "cars", "birds"])
    """
    return Server(model, adapters)


def _adapter_of(source: Source) -> Source:
    """Return the directory of an adapter, given that or its run."""
    inside = Path(source) / "adapter"
    return inside if not str(source).startswith("zoo:") and inside.is_dir() else source


def name_of(source: Source) -> str:
    """Name an adapter after its directory; that of run ``birds/1`` is ``birds_1``.

    Args:
        source: The directory of an adapter or a run, or ``zoo:NAME``.
    """
    if str(source).startswith("zoo:"):
        return str(source).removeprefix("zoo:")
    place = Path(source).resolve()
    place = place.parent if place.name == "adapter" else place
    return f"{place.parent.name}_{place.name}" if place.name.isdecimal() and place.parent.name else place.name
