"""Compiling the blocks of a model in place, so that one graph serves all equal blocks."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Literal

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.modules import module as _modules
from torch.utils.checkpoint import CheckpointPolicy

from vispeft.adapters.holder import BankState
from vispeft.core.families import base_class
from vispeft.core.origin import Memory
from vispeft.core.route import Routing
from vispeft.core.units import Unit
from vispeft.errors import ConfigError, UnknownNameError, brief
from vispeft.hosts.base import COMPILED, Host, ensure_host, host_class, host_kind, take_off
from vispeft.hosts.depth import DropPathHost
from vispeft.hosts.functional import leaves_a_graph

__all__ = ["COMPILE", "Compile", "CompilingBank", "cannot_compile"]

logger = logging.getLogger(__name__)

Compile = Literal["off", "blocks", "model"]
GRAPHS = 64
"""Graphs of one kind of block that PyTorch is let make, by default 8: other batch sizes and adapters have their own."""
COMPILE: tuple[Compile, ...] = ("off", "blocks", "model")
"""What is compiled: nothing, each block in place, or the model as a whole."""
_RECOMPUTES = dict.fromkeys(("used_far_apart", "long_fusible_chains", "materialized_backward"), False)
_LEAN: dict[str, Any] = {f"ban_recompute_{reason}": banned for reason, banned in _RECOMPUTES.items()}
PARTITION: dict[Memory, dict[str, Any]] = {
    "plain": {},
    "lean": _LEAN,
    "leaner": {**_LEAN, "activation_memory_budget": 0.6, "is_non_builtin_to_include": True},
}
"""Settings in ``torch._functorch.config`` by what a compiled graph is to keep for its backward pass.

By default the compiler does not repeat operations whose results have to be in memory in the backward pass, such as the
outputs of norms and activations that an adapted layer reads; without these rules it repeats all element-wise operations
that make it keep less. The budget is relative to what is kept then: 6 of 10 values per token and channel of a ViT's
block, if the first layer of the MLP is computed again. The compiler chooses by operations for each byte.
"""


def cannot_compile(device: torch.device, backend: str = "inductor") -> str | None:
    """Return why a model cannot be compiled here; None if it can.

    Args:
        device: The device of the model.
        backend: The compiler.
    """
    if backend != "inductor":
        return None
    if device.type == "mps":
        return "torch.compile does not support Apple's GPUs well enough"
    if device.type == "cpu" and not _finds("CXX", "g++", "clang++", "c++", "cl"):
        return "there is no C++ compiler; install one, such as g++"
    if device.type == "cuda" and sys.platform == "win32":
        return "Triton, which torch.compile needs on a GPU, has no build for Windows"
    if device.type == "cuda" and not _finds("CC", "gcc", "clang", "cc"):
        return "there is no C compiler, which Triton needs; install one, such as gcc"
    return None


def _finds(variable: str, *names: str) -> bool:
    """Return whether there is a compiler, under its usual names or in the variable for it."""
    return any(shutil.which(name) for name in (os.environ.get(variable), *names) if name)


@cache
def _keeping(memory: Memory, name: str) -> Callable[..., Any]:
    """Return a backend of `torch.compile` whose graphs keep as much as asked for; equal ones are one object.

    Args:
        memory: The choice.
        name: The backend.
    """

    def compile_graph(graph: GraphModule, inputs: list[Any], **settings: Any) -> Any:
        from torch._functorch import config

        if name == "inductor":  # as `torch.compile` calls it
            given = {key.replace("-", "_"): value for key, value in settings.get("options", {}).items()}
            on_cpu = all(tensor.device.type == "cpu" for tensor in inputs if isinstance(tensor, Tensor))
            # The generator of inductor takes 20 times as long on a CPU as PyTorch's.
            settings = {"config_patches": {**({"fallback_random": True} if on_cpu else {}), **given}}
        draw_once = partial(_draw_once, config.joint_custom_pass)
        with config.patch({**PARTITION[memory], "joint_custom_pass": draw_once}):
            return torch._dynamo.lookup_backend(name)(graph, inputs, **settings)

    compile_graph.__name__ = name  # by which PyTorch names it in errors
    return compile_graph


def _draw_once(before: Callable[..., Any] | None, graph: GraphModule, inputs: Any) -> GraphModule:
    """Have random numbers kept that a backward pass reads; PyTorch would let some of them be drawn anew.

    Args:
        before: The pass over such graphs that a user has set.
        graph: The graph of both passes.
        inputs: Its inputs.
    """
    graph = before(graph, inputs) if callable(before) else graph
    for node in graph.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and _draws(node):
            node.meta.setdefault("recompute", CheckpointPolicy.MUST_SAVE)
    return graph


def _draws(node: Node) -> bool:
    """Return whether an operation draws random numbers here: attention does with dropout alone."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.name == "dropout_p":
            given = node.args[index] if index < len(node.args) else node.kwargs.get("dropout_p", 0.0)
            return bool(given)
    return True


def _copied(options: dict[str, Any]) -> dict[str, Any]:
    """Copy arguments of `torch.compile`, which takes some settings out of its ``options``."""
    return {**options, "options": dict(options["options"])} if options.get("options") else options


def _prepare_compiler() -> None:
    """Set what PyTorch keeps for the process: room for graphs, and that hooks of later are noticed."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, GRAPHS)
    if hasattr(config, "skip_nnmodule_hook_guards"):
        config.skip_nnmodule_hook_guards = False


class _Compiled:
    """What a call of a compiled block runs."""

    def __init__(self, block: nn.Module, graph: _Graph, routing: Routing) -> None:
        self.block, self.graph, self.routing = block, graph, routing
        self.failed = False
        """Whether this block runs as it is, since hooks inside of it keep it from being compiled."""

    def __call__(self, x: Tensor, *args: Any, **arguments: Any) -> Any:
        block = self.block
        # Graphs follow the choice made last in any thread; those of blocks hold no hooks and cannot be transformed.
        if not self._is_chosen() or leaves_a_graph() or _is_hooked(block) or _every_module_is_hooked():
            return block._call_impl(x, *args, **arguments)
        if not x.requires_grad and torch.is_grad_enabled() and _trains(block):
            # The first block that trains would need a graph of its own, for an input without a gradient.
            x = x.detach().requires_grad_()
        if torch._C._current_graph_task_id() == -1:
            return self._run(x, *args, **arguments)
        # Inside a backward pass: the second forward pass of a checkpoint, whose batch was seen in the first one.
        with _running_restored(block):
            return self._run(x, *args, **arguments)

    def _is_chosen(self) -> bool:
        """Return whether graphs follow the choice of the calling thread."""
        return self.routing.present() is self.routing.traced

    def _run(self, x: Tensor, *args: Any, **arguments: Any) -> Any:
        """Run the graph, or the block as it is where that fails."""
        block, graph = self.block, self.graph
        failure: Exception | None = None
        if not (self.failed or graph.failed):
            with self.routing.gate.graphs:  # the choice of another thread waits until the graph has run
                if self._is_chosen():
                    try:
                        return graph.run(block, x, *args, **arguments)
                    except _errors() as error:  # before the block has run
                        failure = error.with_traceback(None)
        out = block._call_impl(x, *args, **arguments)
        if failure is not None:  # and the call itself was a good one
            self.failed = any(_is_hooked(module) for module in block.modules())
            graph.warn(failure, base_class(block).__name__, self.failed)
        return out


@contextmanager
def _running_restored(block: nn.Module) -> Iterator[None]:
    """Restore on exit what units keep of the batches they see, such as running statistics."""
    kept = [unit.get_buffer(name) for unit in block.modules() if isinstance(unit, Unit) for name in unit.running]
    values = [buffer.clone() for buffer in kept]
    try:
        yield
    finally:
        for buffer, value in zip(kept, values, strict=True):
            buffer.data.copy_(value)  # no change for autograd, which may have saved the buffer


def _trains(block: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in block.parameters())


def _is_hooked(module: nn.Module) -> bool:
    """Return whether a call of a module calls hooks of its own."""
    forward, backward = module._forward_hooks or module._forward_pre_hooks, module._backward_hooks
    return bool(forward or backward or module._backward_pre_hooks)


def _every_module_is_hooked() -> bool:
    """Return whether there are hooks of all modules, such as those of a counter of operations."""
    forward = _modules._global_forward_hooks or _modules._global_forward_pre_hooks
    return bool(forward or _modules._global_backward_hooks or _modules._global_backward_pre_hooks)


class _Graph:
    """The compiled call of one kind of block, with graphs of its own."""

    def __init__(self, number: int, options: dict[str, Any]) -> None:
        def run(block: nn.Module, x: Tensor, *args: Any, **arguments: Any) -> Any:
            return block._call_impl(x, *args, **arguments)

        # Graphs are kept by code object.
        run.__code__ = run.__code__.replace(co_name=f"block_{number}")
        self.run = torch.compile(run, fullgraph=True, dynamic=False, **_copied(options))
        self.failed = self.warned = False

    def warn(self, error: Exception, name: str, hooked: bool) -> None:
        """Say once why a block runs as it is.

        Args:
            error: The error of its compilation.
            name: Its class.
            hooked: Whether it has hooks inside, which equal blocks need not have.
        """
        full = isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit)
        self.failed = self.failed or not (full or hooked)
        if full and not self.warned:
            told = "A %s was compiled for %d sizes and adapters already; with further ones it runs as it is."
            logger.warning(told, name, torch._dynamo.config.recompile_limit)
        elif not (full or (hooked and self.warned)):
            logger.warning("A %s cannot be compiled and runs as it is: %s", name, brief(error))
        self.warned = True


def _errors() -> tuple[type[Exception], ...]:
    """List the errors of a compilation; imported when one is raised, since their module takes seconds."""
    import torch._dynamo.exc as found

    return found.TorchDynamoException, found.FailOnRecompileLimitHit


def _kind(block: nn.Module) -> Hashable:
    """Return what two blocks have in common that share a graph."""
    shapes = tuple(tuple(p.shape) for name, p in block.named_parameters() if "adapters." not in name)
    return base_class(block), shapes, str(getattr(block, "shift_size", None))


class CompilingBank(BankState):
    """The compiled blocks of a model."""

    def __init__(self, outer: nn.Module) -> None:
        """Compile nothing."""
        super().__init__(outer)
        self._compiled: Compile = "off"
        self._options: dict[str, Any] = {}
        self._paths: list[nn.Module] = []
        self._evened: list[nn.Module] = []

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle as the bank of a model that is not compiled."""
        return {**self.__dict__, "_compiled": "off", "_options": {}}

    @property
    def is_compiled(self) -> bool:
        """Whether the model, or its blocks, run compiled."""
        return self._compiled != "off"

    def compile(self, mode: Compile = "blocks", *, device: torch.device | None = None, **options: Any) -> str | None:
        """Compile the model in place, by default block by block: seconds instead of minutes, and equal blocks share.

        State-dict keys stay. Later changes act: other adapters, activation checkpointing; a merged model runs as it is
        until the merge is undone. Copies and unpickled models are not compiled, nor is a model that has lost its last
        adapter. For several processes: attach, compile, wrap.

        Args:
            mode: ``blocks``, ``model`` for the model as a whole, or ``off`` to undo it.
            device: The device it will run on; None for the one it is on.
            **options: Further arguments of `torch.compile`, such as ``backend``; blocks are always compiled with
                ``fullgraph=True`` and ``dynamic=False``.

        Returns:
            Why the model cannot be compiled here and runs as before; None if it is compiled.

        Raises:
            UnknownNameError: If there is no such mode.
            ConfigError: If an option is set already, or the weights are sharded.
            MergeError: If the model is merged.
        """
        if mode not in COMPILE:
            raise UnknownNameError("mode", mode, COMPILE)
        self._check_unmerged("compile it")
        self.check_whole("be compiled")
        fixed = sorted({"fullgraph", "dynamic"} & set(options)) if mode == "blocks" else []
        if fixed:
            raise ConfigError(f"bank.compile({fixed[0]}=...): blocks are compiled with a fixed one. Leave it out.")
        device = next(self._model.parameters()).device if device is None else device
        reason = None if mode == "off" else cannot_compile(device, options.get("backend", "inductor"))
        if mode != "off" and reason is None:
            torch.compile(_keeping, **_copied(options))  # checks the options, and compiles nothing yet
        self._compiled, self._options = ("off" if reason else mode), options
        if self._compiled != "off":
            _prepare_compiler()
        self._remove_compiled()
        self._set_compiled()
        self._place_compiled()
        return reason

    def _set_compiled(self) -> None:
        """Let calls of the model or of its blocks run compiled, in graphs that are made anew."""
        options, backend = self._options, self._options.get("backend", "inductor")
        if isinstance(backend, str):
            options = {**options, "backend": _keeping(self._routing.memory, backend)}
        if self._compiled == "model":
            self._model.compile(**_copied(options))
        graphs: dict[Hashable, _Graph] = {}
        for block in self._blocks() if self._compiled == "blocks" else ():
            kind = _kind(block)
            graph = graphs[kind] = graphs.get(kind) or _Graph(len(graphs), options)
            block._compiled_call_impl = _Compiled(block, graph, self._routing)

    def _blocks(self) -> list[nn.Module]:
        return [self._model.get_submodule(site.path) for site in self.view.at("block")]

    def _remove_compiled(self) -> None:
        """Let the model run as it is, with the classes it had."""
        for module in (self._model, *self._blocks()):
            module._compiled_call_impl = None
        for host in self._routing.compiled:
            host.__dict__.pop(COMPILED, None)
        self._routing.compiled = ()
        self._undo_even()

    def _place_compiled(self) -> None:
        """Tell all hosts inside compiled blocks what acts at them, and make equal blocks equal; after each change."""
        if self._compiled != "blocks" or not self._entries:
            if not self._entries:
                self._remove_compiled()
            return
        for host in self._routing.compiled:
            host.__dict__.pop(COMPILED, None)
        self._even([self._model.get_submodule(path) for paths in self.view.drop_path_paths for path in paths])
        self._routing.compiled = [module for module in self._model.modules() if isinstance(module, Host)]
        self._routing.trace(self._routing.present())

    def _even(self, paths: list[nn.Module]) -> None:
        """Give all blocks a drop path of one class: in the first block, whose rate is zero, timm has an identity."""
        if any(base_class(path) is DropPath for path in paths):
            for path in paths:
                if base_class(path) is nn.Identity:
                    path.__dict__.update(drop_prob=0.0, scale_by_keep=True)
                    _rebase(path, DropPath)
                    self._evened.append(path)
        for path in paths:
            ensure_host(path, DropPathHost, routing=self._routing)
        self._paths = paths

    def _undo_even(self) -> None:
        """Undo `_even`."""
        for path in self._paths:
            if isinstance(path, Host) and not path.adapters:
                take_off(path)
        for path in self._evened:
            _rebase(path, nn.Identity)
            del path.__dict__["drop_prob"], path.__dict__["scale_by_keep"]
        self._paths, self._evened = [], []


def _rebase(module: nn.Module, base: type[nn.Module]) -> None:
    """Change the class of a module, or the one that its host replaces."""
    module.__class__ = host_class(host_kind(module), base, module.computed) if isinstance(module, Host) else base
