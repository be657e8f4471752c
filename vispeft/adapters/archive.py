"""The files of a bank: adapter tensors by their names in files, saving, loading, and loading of base weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vispeft.adapters.entry import Entry
from vispeft.adapters.fitting import CutModel, check_planned, method_of, tasks_of, warn_of_channels
from vispeft.adapters.heads import LowBitHead, own_head
from vispeft.adapters.holder import BankState
from vispeft.core.arguments import check_arguments
from vispeft.core.method import Method
from vispeft.core.unit_shapes import other_shapes, resize_units
from vispeft.core.units import Unit
from vispeft.errors import BaseMismatchError, ConfigError, FileError, UnknownNameError
from vispeft.storage.codecs import RAW, decode_tensors, find_codec
from vispeft.storage.files import DECODER, HEAD, check_tensors, check_values, read_encoded, write_adapter
from vispeft.storage.fingerprint import check_fingerprint, pool_of
from vispeft.storage.form import FormError, check_notes
from vispeft.storage.header import adapter_part, backbone_part, plain_values, preprocessing_part, tensor_part
from vispeft.zoo.adapters import PREFIX, find_adapter, zoo_hint

__all__ = ["FileBank"]

logger = logging.getLogger(__name__)

_NOTES = ("class_names", "preprocessing", "metrics", "output")
"""Notes in a file; files of earlier versions lack the last one."""
_ORIGIN = ("made_of",)
"""Notes that only some files have: what a composed or ported adapter was made of."""


class FileBank(BankState):
    """The tensors and files of a bank."""

    def adding(
        self, method: Method, name: str, tasks: Sequence[str] | None, seed: int | None
    ) -> AbstractContextManager[Entry]:
        """Place the units of a new adapter, and roll back on an error."""
        raise NotImplementedError

    def declare(self, name: str) -> None:
        """Make a new adapter trainable and the only one that acts."""
        raise NotImplementedError

    def put_head(self, name: str, head: nn.Module | None) -> None:
        """Replace an adapter's classifier."""
        raise NotImplementedError

    # ------------------------------------------------------------------ tensors

    def state_dict(self, name: str | None = None) -> dict[str, Tensor]:
        """Return an adapter's tensors by their names in files, those of its classifier under ``head/``.

        Args:
            name: The adapter; may be left out where only one acts.
        """
        label = self._label(name)
        return {**self._entries[label].state(), **self._head_state(label)}

    def stored_tensors(self, name: str | None = None) -> dict[str, Tensor]:
        """Return the tensors of an adapter's units by their names in files, in the form of `Method.file_method`.

        Args:
            name: The adapter; may be left out where only one acts.
        """
        return self._entry(name).file_tensors()

    def stored_bytes(self, name: str | None = None) -> int:
        """Return the size of an adapter's tensors in a file, its classifier's included, without headers, in bytes.

        Args:
            name: The adapter; may be left out where only one acts.
        """
        label = self._label(name)
        return self._bytes(label, self._entries[label].file_tensors()) + self.stored_bytes_head(label)

    def stored_bytes_head(self, name: str | None = None) -> int:
        """Return the part of `stored_bytes` that is the classifier's.

        Args:
            name: The adapter; may be left out where only one acts.
        """
        label = self._label(name)
        return self._bytes(label, self._head_state(label))

    def _bytes(self, label: str, values: Mapping[str, Tensor]) -> int:
        codecs = {key: codec for key, _, _, codec in self._coded(label)}
        return sum(find_codec(codecs.get(key, RAW)).size(tensor) for key, tensor in values.items())

    def load_state_dict(self, tensors: Mapping[str, Tensor], name: str | None = None) -> None:
        """Copy tensors into an adapter.

        Args:
            tensors: All tensors of the adapter, by the names of `state_dict`; the classifier may be missing, and one
                with another number of classes replaces the current one.
            name: The adapter; may be left out where only one acts.

        Raises:
            FileError: If a tensor is missing, unknown, of another shape, or not finite; then nothing is copied.
        """
        self._check_unmerged("load an adapter's tensors")
        label = self._label(name)
        units = {key: tensor for key, tensor in tensors.items() if not key.startswith(HEAD)}
        held = {f"{key}.": unit for key, unit in self._entries[label].units.items()}
        own = self._entries[label].state()
        other = {key: own[key].new_empty(shape, device="meta") for key, shape in other_shapes(held, units).items()}
        check_tensors({**own, **other}, units)
        resize_units(held, units)
        own = self._entries[label].state()
        head = {key.removeprefix(HEAD): tensor for key, tensor in tensors.items() if key.startswith(HEAD)}
        with self.changing("load an adapter's tensors"), torch.no_grad():
            if head and self.view.head_path is not None:
                self._load_head(label, head)
            for key, tensor in units.items():
                own[key].copy_(tensor)

    def _head_state(self, label: str) -> dict[str, Tensor]:
        head = self._heads.get(label)
        return {} if head is None else {f"{HEAD}{key}": tensor.detach() for key, tensor in head.state_dict().items()}

    def _load_head(self, label: str, tensors: dict[str, Tensor]) -> None:
        """Copy a classifier's tensors, into a new classifier if the shape differs."""
        entry, present = self._entries[label], self._heads.get(label)
        width = entry.method.head_width(self.view) or cast(int, self._model.num_features)
        for key, tensor in tensors.items():
            check_values(f"head/{key}", tensor, torch.float32)
            if key == "weight" and (tensor.ndim != 2 or tensor.shape[1] != width):
                raise FileError(f"head/weight has shape {tuple(tensor.shape)}; (classes, {width}) is needed.")
        shapes = {key: tensor.shape for key, tensor in ({} if present is None else present.state_dict()).items()}
        if shapes != {key: tensor.shape for key, tensor in tensors.items()}:
            if set(tensors) - {"weight", "bias"} or "weight" not in tensors:
                raise FileError(f"The head in the file has tensors {sorted(tensors)}, which is no linear classifier.")
            classes, width = tensors["weight"].shape
            if "bias" in tensors and tensors["bias"].shape != (classes,):
                raise FileError(f"head/bias has shape {tuple(tensors['bias'].shape)}; ({classes},) is needed.")
            present = own_head(entry.method, self.view, self._model, entry.seed, classes)
            if present is None:
                like = next(self._model.parameters())
                present = nn.Linear(width, classes, "bias" in tensors, device=like.device, dtype=like.dtype)
            if set(present.state_dict()) != set(tensors):
                raise FileError(
                    f"The head in the file has tensors {sorted(tensors)}; the classifier of {entry.method.name} has "
                    f"{sorted(present.state_dict())}."
                )
            self.put_head(label, present)
        cast(nn.Module, self._heads.get(label)).load_state_dict(tensors)

    def keep_encoded(self, encoded: Mapping[str, Tensor], name: str | None = None) -> None:
        """Keep the encoded bytes of tensors that were just loaded; until trained they are saved byte for byte.

        Args:
            encoded: Bytes (uint8) by the tensor's name in files; the tensors already hold the decoded values.
            name: The adapter; may be left out where only one acts.

        Raises:
            UnknownNameError: If there is no such tensor, or it is saved unencoded.
        """
        coded = {key: (module, tensor) for key, module, tensor, _ in self._coded(self._label(name))}
        for key, content in encoded.items():
            if key not in coded:
                raise UnknownNameError("encoded tensor", key, coded)
            module, tensor = coded[key]
            module.keep_encoded(tensor, content)

    def _coded(self, label: str) -> Iterator[tuple[str, Unit | LowBitHead, str, str]]:
        """Iterate over the tensors that are saved encoded: name in files, module, name in the module, codec."""
        head = self._heads.get(label)
        modules: dict[str, Any] = {f"{key}.": unit for key, unit in self._entries[label].units.items()}
        if isinstance(head, LowBitHead):
            modules[HEAD] = head
        for place, module in modules.items():
            yield from ((f"{place}{name}", module, name, codec) for name, codec in module.codecs().items())

    def _encoded(self, label: str, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Encode an adapter's tensors for a file; also return the codecs of the encoded ones."""
        stored, codecs = dict(values), {}
        for key, module, name, codec in self._coded(label):
            kept = module.encoded(name)
            stored[key] = find_codec(codec).encode(values[key]) if kept is None else kept
            codecs[key] = codec
        return stored, codecs

    def load_base(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load a plain timm state dict into the base, without changing adapters.

        Args:
            state_dict: Tensors under timm's names; a classifier of the same shape is loaded into the base's own.

        Raises:
            FileError: If a tensor is missing, unknown or of another shape; then nothing is copied.
        """
        self._check_unmerged("load base weights")
        own, head = dict(self.base_tensors()), self._heads.base
        place = f"{self.view.head_path}."
        given = {key: tensor for key, tensor in state_dict.items() if head is None or not key.startswith(place)}
        check_tensors(own, given)
        classifier = {key.removeprefix(place): t for key, t in state_dict.items() if key.startswith(place)}
        with self.changing("load base weights"), torch.no_grad():
            for key, tensor in given.items():
                own[key].copy_(tensor)
            if head is None:
                return
            if {k: t.shape for k, t in classifier.items()} == {k: t.shape for k, t in head.state_dict().items()}:
                head.load_state_dict(classifier)
            else:
                logger.info("The classifier in the state dict has another shape than the base's, which is kept.")

    # ------------------------------------------------------------------ notes

    def annotate(
        self,
        name: str | None = None,
        *,
        class_names: Sequence[str] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        output: Mapping[str, Any] | None = None,
    ) -> None:
        """Set notes for the users of the file, written by `save`.

        Args:
            name: The adapter; may be left out where only one acts.
            class_names: Names of the classes, in the order of the classifier.
            preprocessing: Mean, standard deviation, size and interpolation.
            metrics: Scores of the adapter.
            output: Interpretation of the model's outputs: kind of target, temperature, unit.

        Raises:
            ConfigError: If a note cannot be written to a file, or class names and outputs are not of one number.
        """
        check_arguments(FileBank.annotate, {"class_names": class_names, "metrics": metrics, "output": output})
        label = self._label(name)
        given: dict[str, Any] = {"class_names": None if class_names is None else list(class_names)}
        for key, value in (("preprocessing", preprocessing), ("metrics", metrics), ("output", output)):
            given[key] = None if value is None else dict(value)
        notes = {key: plain_values(value, key) for key, value in given.items() if value is not None}
        self._check_notes(label, notes)
        self._entries[label].notes |= notes

    def _check_notes(self, label: str, notes: Mapping[str, Any]) -> None:
        """Refuse notes that no file may hold, and class names that are not those of the classifier."""
        try:
            check_notes(notes)
        except FormError as error:
            raise ConfigError(f"The notes of adapter {label!r} cannot be written to a file: {error}") from error
        names, head = notes.get("class_names"), self._heads.get(label)
        outputs = getattr(head, "out_features", None)
        if names is not None and outputs is not None and len(names) != outputs:
            raise ConfigError(
                f"Adapter {label!r} has {len(names)} class names, and its classifier has {outputs} outputs. Give "
                "annotate(class_names=...) one name for each output, in their order."
            )

    def notes(self, name: str | None = None) -> dict[str, Any]:
        """Return the notes set by `annotate` or read from the adapter's file.

        Args:
            name: The adapter; may be left out where only one acts.
        """
        return dict(self._entry(name).notes)

    # ------------------------------------------------------------------ files

    def save(self, path: str | Path, name: str | None = None, *, decoder: Mapping[str, Tensor] | None = None) -> None:
        """Save an adapter: ``adapter.json``, ``adapter.safetensors`` and ``head.safetensors``, nothing of the base.

        Args:
            path: The directory; created if missing.
            name: The adapter; may be left out where only one acts.
            decoder: Tensors of the task's decoder; read them with `files.read_decoder`.

        Raises:
            FileError: If it cannot be written; then the earlier files are unchanged.
            ConfigError: If the classifier was replaced by hand, or has another number of outputs than class names.
        """
        check_arguments(FileBank.save, {"path": path, "name": name})
        self._heads.check_place()
        label = self._label(name)
        entry = self._entries[label]
        self._check_notes(label, entry.notes)
        units, head = entry.file_tensors(), self._head_state(label)
        beside = {f"{DECODER}{key}": tensor for key, tensor in (decoder or {}).items()}
        for key, tensor in {**units, **head, **beside}.items():
            if not torch.isfinite(tensor).all():
                raise FileError(f"{key} of adapter {label!r} is not finite; it was not saved.")
        stored, codecs = self._encoded(label, {**units, **head})
        header = {
            **adapter_part(entry.method.file_method()),
            "backbone": {**backbone_part(self._model, self._outer), "fingerprint": self.fingerprint()},
            "tasks": None if entry.tasks is None else list(entry.tasks),
            "per_task": entry.per_task,
            "seed": entry.seed,
            "head": self._head_part(label, head),
            "preprocessing": entry.notes.get("preprocessing") or preprocessing_part(self._model),
            "class_names": entry.notes.get("class_names"),
            "metrics": entry.notes.get("metrics"),
            "output": entry.notes.get("output"),
            "tensors": {**tensor_part(units, codecs), **tensor_part({k: head[k] for k in head if k in codecs}, codecs)},
            "merge_error": entry.merge_error,
            **{key: entry.notes[key] for key in _ORIGIN if key in entry.notes},
        }
        units, head = {key: stored[key] for key in units}, {key: stored[key] for key in head}
        write_adapter(Path(path), header, units, {**head, **beside})

    def _head_part(self, label: str, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Describe the classifier by its shapes: empty for an identity, None if the adapter has no classifier."""
        if self._heads.get(label) is None:
            return None
        return {key.removeprefix(HEAD): list(tensor.shape) for key, tensor in tensors.items()}

    def load(self, path: str | Path, name: str | None = None, allow_base_mismatch: bool = False) -> None:
        """Attach an adapter from a file and make it the only one that acts.

        Args:
            path: The adapter's directory, or ``zoo:NAME``.
            name: Its name on this model; by default ``default``, or the directory's name if that is taken.
            allow_base_mismatch: Also load it on a base with other weights.

        Raises:
            FileError: If a file is missing, truncated or altered.
            UnknownNameError: If the zoo has no such adapter.
            BaseMismatchError: If it was trained on another backbone.
        """
        self.check_ready("load an adapter")
        folder = find_adapter(path) if isinstance(path, str) and path.startswith(PREFIX) else Path(path)
        if isinstance(path, str) and not folder.is_dir() and (hint := zoo_hint(path)):
            raise FileError(f"There is no folder {path!r}.{hint}")
        label = name or ("default" if "default" not in self._entries else folder.resolve().name)
        header, *encoded = read_encoded(folder, lambda found: self._check_fits(found, allow_base_mismatch))
        units, head = (decode_tensors(tensors, header["tensors"]) for tensors in encoded)
        method = method_of(header)
        tasks = tasks_of(header, method)
        # Modules draw random values when created, which the file's values then replace.
        with torch.random.fork_rng(devices=[]), self.adding(method, label, tasks, None) as entry:
            self._heads.put(label, self._head_for(header, entry))
            if header["head"] is None:
                self._heads.drop(label)
            self.declare(label)
            cut = CutModel(self, header)
            kept = {key: cut.fit(key, tensor, entry.units) for key, tensor in units.items() if cut.keeps(key, entry)}
            found = {**kept, **{key: tensor for key, tensor in head.items() if not key.startswith(DECODER)}}
            self.load_state_dict(found, label)
            # A tensor sliced for a truncated model no longer matches the bytes of the file.
            whole = {key for key, tensor in found.items() if tensor is (units | head)[key]}
            coded = {key for key, described in header["tensors"].items() if described["codec"] != RAW}
            self.keep_encoded({key: (encoded[0] | encoded[1])[key] for key in whole & coded}, label)
            entry.seed, entry.merge_error = header["seed"], header["merge_error"]
            self.annotate(label, **{key: header.get(key) for key in _NOTES})
            entry.notes |= {key: header[key] for key in _ORIGIN if header.get(key) is not None}
        warn_of_channels(self, header)
        if len(kept) < len(units):
            lacking = len(units) - len(kept)
            logger.warning("This model is truncated: %d tensors of the adapter belong to parts it lacks.", lacking)

    def _check_fits(self, header: Mapping[str, Any], allow_base_mismatch: bool) -> None:
        """Compare a file with this model before any tensor is read."""
        if not allow_base_mismatch:
            check_fingerprint(header["backbone"]["fingerprint"], self._model, self.view)
            self._check_pooling(header)
        check_planned(self, header)

    def _head_for(self, header: Mapping[str, Any], entry: Entry) -> nn.Module | None:
        """Create a loaded adapter's classifier; None means a copy of the base's, whose tensors are then replaced."""
        if header["head"] == {}:
            return nn.Identity()
        return own_head(entry.method, self.view, self._model, header["seed"])

    def _check_pooling(self, header: Mapping[str, Any]) -> None:
        saved, found = header["backbone"]["fingerprint"]["function"]["pool"], pool_of(self._model)
        if header["head"] and self.view.head_path is not None and found and saved != found:
            raise BaseMismatchError(
                f"The adapter's classifier was trained with pooling {saved!r}; this model has {found!r}. Create "
                f"it with global_pool={saved!r}."
            )
