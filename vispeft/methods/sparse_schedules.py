"""Schedules of sparse changes: which entries train may change while they train.

Drop and regrow follows SFT (Ansell et al., arXiv 2401.16405; AlanAnsell/peft at 73b455b): every few steps the entries
with the smallest changes go, and those with the largest gradients come. `Refresh` chooses LIFT's entries again (arXiv
2506.00772; zihanghliu/LIFT at c4a679d). Optimisers know the entries: `SparseAdamW` has
an age for each, `SM3` keeps no moments of entries at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vispeft.errors import ConfigError
from vispeft.methods.sparse_unit import SparseUnit, principal_weights

__all__ = ["SM3", "DropAndRegrow", "Refresh", "SparseAdamW", "check_optimizer", "largest_changes"]


@dataclass(frozen=True)
class Growth:
    """What one reselection replaces."""

    slots: Tensor
    """Indices into the values whose entries go, int64 (n,)."""
    positions: Tensor
    """The entries that come, int64 (n,)."""
    chosen: Tensor
    """Indices of these among the candidates, int64 (n,)."""


class Samples:
    """Sums of the gradients of candidate entries; a sample is the gradient of one step of the optimiser."""

    def __init__(self, count: int) -> None:
        """Start without samples.

        Args:
            count: Number of candidates.
        """
        self.count, self.samples = count, 0
        self.candidates = self.sums = self.squares = torch.empty(0)
        self.whole, self.step = False, torch.empty(0)

    def begin(self, several: bool) -> None:
        """Tell that a backward pass comes.

        Args:
            several: Whether a step has several, so that the whole gradient of the first step is summed before it is
                known which entries of it are the largest.
        """
        self.whole = several and not self.samples

    def add(self, grad: Tensor) -> None:
        """Add to the gradient of the present step.

        Args:
            grad: The gradient of a weight, of any shape.
        """
        flat = grad.detach().flatten()
        if not self.whole:
            if not len(self.candidates):
                self._choose(flat)
            flat = flat[self.candidates]
        # Not in place: autograd may still use what it showed.
        self.step = self.step + flat if len(self.step) else flat.clone()

    def close(self) -> None:
        """End a step: what was added since the last one is a sample."""
        if not len(self.step):
            return
        if not len(self.candidates):
            self._choose(self.step)
            self.step = self.step[self.candidates]
        if not self.samples:
            self.sums, self.squares = torch.zeros_like(self.step), torch.zeros_like(self.step)
        self.sums, self.squares = self.sums + self.step, self.squares + self.step.square()
        self.samples, self.step = self.samples + 1, self.step[:0]

    def _choose(self, flat: Tensor) -> None:
        """Take the largest entries of the first gradient as the candidates."""
        self.candidates = flat.abs().topk(self.count).indices

    def move(self, device: torch.device) -> None:
        """Move to a device: those of a checkpoint are on the CPU.

        Args:
            device: The device of the weight.
        """
        self.candidates, self.sums, self.squares, self.step = (
            tensor.to(device) for tensor in (self.candidates, self.sums, self.squares, self.step)
        )


def replace(positions: Tensor, values: Tensor, candidates: Tensor, scores: Tensor, share: float) -> Growth:
    """Choose the entries that go and come.

    Of the entries with the smallest changes a share goes; of the candidates that do not train then, those with the
    largest scores come, including ones that just went: these stay as they were. If there are fewer, fewer go: as many
    as still leave that number of candidates, so that no entry comes that has stayed.

    Args:
        positions: Entries that train, (count,).
        values: Their changes, (count,).
        candidates: Entries that may come, (m,).
        scores: Their scores, (m,).
        share: Share of the entries to replace.

    Returns:
        What is replaced.
    """
    order = values.abs().argsort()
    idle = torch.isin(candidates, positions, invert=True).sum()
    going = torch.isin(positions[order[: int(len(positions) * share)]], candidates, invert=True)
    number = int((going.cumsum(0) <= idle).sum())  # each of these leaves its place to an idle candidate at most
    slots, staying = order[:number], positions[order[number:]]
    free = torch.isin(candidates, staying, invert=True).nonzero().flatten()
    chosen = free[scores[free].topk(number).indices]
    goes = torch.isin(positions[slots], candidates[chosen], invert=True)
    comes = torch.isin(candidates[chosen], positions[slots], invert=True)
    return Growth(slots[goes], candidates[chosen[comes]].long(), chosen[comes])


def best_inactive(positions: Tensor, values: Tensor, row: Tensor, column: Tensor, share: float) -> Growth:
    """Choose by the accumulators of `SM3`: scores are ``row column^T``, candidates are all entries that do not train.

    Args:
        positions: Entries that train, (count,).
        values: Their changes, (count,).
        row: Accumulator of the rows, (rows,).
        column: Accumulator of the columns, (columns,).
        share: Share of the entries to replace.
    """
    scores = torch.outer(row, column).flatten()
    scores[positions.long()] = -1  # below all others, which are not negative
    idle = (scores >= 0).nonzero().flatten()
    return replace(positions, values, idle, scores[idle], share)


def largest_changes(before: dict[str, Tensor], after: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Find the entries that changed most, over all tensors together (LT-SFT, arXiv 2110.07560).

    Args:
        before: Tensors by name.
        after: The same, after training.
        count: Number of entries.

    Returns:
        Masks, bool, of the shapes of the tensors: changes not below the count-th largest.
    """
    changes = {name: (after[name] - tensor).abs() for name, tensor in before.items()}
    least = torch.cat([change.flatten() for change in changes.values()]).topk(count).values[-1]
    return {name: change >= least for name, change in changes.items()}


class _ByTensor(Optimizer):
    """An optimiser that updates one tensor after the other."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Computes the loss again.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError(f"{type(self).__name__} does not implement _update.")


class SparseAdamW(_ByTensor):
    """AdamW with an age for each entry, so that entries that come later are corrected by their own number of steps.

    ``value -= lr * m / (1 - b1^age) / ((sqrt(v) + eps) / sqrt(1 - b2^age))``, then ``value *= 1 - lr * decay``
    (public code of SFT; ``eps`` stands before the correction, unlike in `torch.optim.AdamW`).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        """Set the defaults of groups.

        Args:
            params: Parameters or groups.
            lr: Learning rate.
            betas: Decay of the moments.
            eps: Added to the root of the second moment.
            weight_decay: Decoupled weight decay.
        """
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (b1, b2) = self.state[parameter], group["betas"]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            # In float32 whatever the values are: a bfloat16 would not count beyond 256.
            state["age"] = torch.ones_like(parameter, dtype=_wide(parameter))
        first, second, age = state["exp_avg"], state["exp_avg_sq"], state["age"]
        first.lerp_(grad, 1 - b1)
        second.mul_(b2).addcmul_(grad, grad, value=1 - b2)
        size = (second.sqrt() + group["eps"]) / (1 - b2**age).sqrt()
        parameter.sub_((group["lr"] * (first / (1 - b1**age)) / size).to(parameter.dtype))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        age.add_(1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state, with ages as wide as they were: PyTorch casts them to the values' dtype.

        Args:
            state_dict: As from `state_dict`.
        """
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, own, strict=True):
            if "age" in self.state.get(parameter, {}):
                age = state_dict["state"][number]["age"]
                self.state[parameter]["age"] = age.to(parameter.device, _wide(parameter), copy=True)

    def regrow(self, parameter: Tensor, slots: Tensor, mean: Tensor, square: Tensor, age: float) -> None:
        """Set the moments of entries that come, so that they are as if they had trained for `age` steps.

        Args:
            parameter: The values.
            slots: Indices of the entries.
            mean: Means of their gradients.
            square: Means of the squares.
            age: Number of steps these are from.
        """
        b1, b2 = next(g["betas"] for g in self.param_groups if any(p is parameter for p in g["params"]))
        state = self.state[parameter]
        state["exp_avg"][slots] = (mean * (1 - b1**age)).to(state["exp_avg"].dtype)
        state["exp_avg_sq"][slots] = (square * (1 - b2**age)).to(state["exp_avg_sq"].dtype)
        state["age"][slots] = age


def _wide(parameter: Tensor) -> torch.dtype:
    """Return the dtype of ages."""
    return torch.promote_types(parameter.dtype, torch.float32)


class SM3(_ByTensor):
    """SM3 (Anil et al., NeurIPS 2019, arXiv 1901.11150): one accumulator per row and per column, and no moments.

    ``nu = min(row, column) + g^2``, the accumulators are the running maxima of nu,
    ``value -= lr * g / sqrt(nu + eps)``, then ``value *= 1 - lr * decay``. The values of a sparse change take those of
    their weight's rows and columns, after `bind`; other matrices take their own, vectors have one of their own shape.
    """

    def __init__(self, params: Any, lr: float = 1e-3, eps: float = 1e-8, weight_decay: float = 0.0) -> None:
        """Set the defaults of groups.

        Args:
            params: Parameters or groups.
            lr: Learning rate.
            eps: Added to the accumulator.
            weight_decay: Decoupled weight decay.
        """
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0):
            raise ValueError(f"lr={lr}, eps={eps}, weight_decay={weight_decay}")
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})
        self._places: dict[int, tuple[Tensor, int]] = {}

    def bind(self, parameter: Tensor, positions: Tensor, rows: int, columns: int) -> None:
        """Tell that a parameter is the values of entries of a matrix.

        Args:
            parameter: The values, (count,).
            positions: The entries, (count,); read in every step.
            rows: Rows of the matrix.
            columns: Columns of the matrix.
        """
        self._places[id(parameter)] = positions, columns
        state = self.state[parameter]
        if not state:
            state["row"], state["column"] = parameter.new_zeros(rows), parameter.new_zeros(columns)

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        size = self._accumulated(parameter, grad).add(group["eps"]).sqrt_()
        parameter.sub_(group["lr"] * grad / size)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])

    def _accumulated(self, parameter: Tensor, grad: Tensor) -> Tensor:
        """Update the accumulators, and return nu of each entry."""
        state = self.state[parameter]
        if id(parameter) in self._places:
            positions, columns = self._places[id(parameter)]
            row, column = positions.long() // columns, positions.long() % columns
            sums = torch.minimum(state["row"][row], state["column"][column]) + grad.square()
            state["row"].scatter_reduce_(0, row, sums, "amax")
            state["column"].scatter_reduce_(0, column, sums, "amax")
            return sums
        if parameter.ndim < 2:
            state.setdefault("sum", torch.zeros_like(parameter)).add_(grad.square())
            return state["sum"].clone()
        flat = grad.flatten(1)
        if not state:
            state["row"], state["column"] = flat.new_zeros(len(flat)), flat.new_zeros(flat.shape[1])
        nu = torch.minimum(state["row"][:, None], state["column"]) + flat.square()
        state["row"], state["column"] = nu.amax(1), nu.amax(0)
        return nu.view(grad.shape)


class DropAndRegrow:
    """Drop and regrow, called around the steps of a training.

    Every `interval` steps, after the optimiser's step, entries are replaced; in the `accumulate` steps before, the
    gradients of candidates are summed.
    """

    def __init__(self, interval: int, accumulate: int, rate: float, policy: Literal["linear", "cosine"]) -> None:
        """Store the settings.

        Args:
            interval: Steps between reselections.
            accumulate: Steps whose gradients choose.
            rate: Share that is replaced at first; the very first reselection replaces all that it can.
            policy: How the share falls to zero.
        """
        self.interval, self.accumulate, self.rate, self.policy = interval, accumulate, rate, policy
        self.steps, self.rounds = 0, 0
        self.samples: list[Samples] = []

    def share(self, total: int) -> float:
        """Return the share to replace now.

        Args:
            total: Steps of the whole training.
        """
        if not self.rounds:
            return 1.0
        done = min(self.steps / max(total, 1), 1.0)
        return self.rate * (1 - done if self.policy == "linear" else (1 + math.cos(math.pi * done)) / 2)

    def before_step(self, units: list[Any], micro_batches: int = 1) -> None:
        """Watch the gradients of whole weights, where the next step is one whose gradients choose.

        Args:
            units: The units whose entries change.
            micro_batches: Backward passes of one step, whose gradients are summed.
        """
        left = self.interval - self.steps % self.interval
        watching = left <= self.accumulate
        if watching and not self.samples:
            self.samples = [Samples(len(unit.values)) for unit in units]
        for unit, samples in zip(units, self.samples, strict=False):
            samples.move(unit.values.device)
            samples.begin(micro_batches > 1)
            unit.observer = samples.add if watching else None

    def after_step(self, units: list[Any], optimizer: Any, total: int) -> None:
        """Count a step of the optimiser, and replace entries where it is time to.

        Args:
            units: The units whose entries change.
            optimizer: The optimiser.
            total: Steps of the whole training.
        """
        self.steps += 1
        for samples in self.samples:
            samples.close()
        if self.steps % self.interval:
            return
        for unit, samples in zip(units, self.samples, strict=True):
            unit.observer = None
            if samples.samples:
                self._reselect(unit, samples, optimizer, self.share(total))
        self.samples, self.rounds = [], self.rounds + 1

    @torch.no_grad()
    def _reselect(self, unit: Any, samples: Samples, optimizer: Any, share: float) -> None:
        values, positions = unit.values, unit.positions
        if isinstance(optimizer, SM3):
            state = optimizer.state[values]
            growth = best_inactive(positions, values, state["row"], state["column"], share)
        else:
            growth = replace(positions, values, samples.candidates, samples.sums.abs(), share)
        positions[growth.slots] = growth.positions.to(positions.dtype)
        values[growth.slots] = 0
        if isinstance(optimizer, SM3):
            return
        mean = samples.sums[growth.chosen] / samples.samples
        square = samples.squares[growth.chosen] / samples.samples
        regrow = getattr(optimizer, "regrow", None) or _regrow_adam(optimizer)
        regrow(values, growth.slots, mean, square, samples.samples)

    def state(self) -> dict[str, Any]:
        """Return what a resumed training needs."""
        samples = [(s.count, s.samples, s.candidates, s.sums, s.squares) for s in self.samples]
        return {"steps": self.steps, "rounds": self.rounds, "samples": samples}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Args:
            state: As from `state`.
        """
        self.steps, self.rounds, self.samples = state["steps"], state["rounds"], []
        for count, seen, candidates, sums, squares in state["samples"]:
            samples = Samples(count)
            samples.samples, samples.candidates, samples.sums, samples.squares = seen, candidates, sums, squares
            self.samples.append(samples)


class Refresh:
    """LIFT's choice of the principal weights, made again every few steps from the present weights.

    Entries that stay keep their moments, those that come start with none; an entry that goes keeps its change, and goes
    on from it if it comes back. With `SparseAdamW` the age of an entry begins when it comes. PyTorch's optimisers have
    one step counter, as the public code has, so that their correction is off for new entries.
    """

    def __init__(self, interval: int, rank: int) -> None:
        """Store the settings.

        Args:
            interval: Steps between choices T; the first one follows step T - 1 (public code).
            rank: Rank of the approximation.
        """
        self.interval, self.rank, self.steps = interval, rank, 0

    def after_step(self, units: list[SparseUnit], weights: list[Tensor], optimizer: Any) -> None:
        """Count a step of the optimiser, and choose again where it is time to.

        Args:
            units: The units.
            weights: The frozen weights of their layers, (out, ...), in the same order.
            optimizer: The optimiser.
        """
        self.steps += 1
        if (self.steps + 1) % self.interval == 0:
            for unit, weight in zip(units, weights, strict=True):
                self._choose(unit, weight, optimizer)

    @torch.no_grad()
    def _choose(self, unit: SparseUnit, weight: Tensor, optimizer: Any) -> None:
        present = unit.fold_weight(weight)[unit.start : unit.stop]
        wanted = unit.chosen(principal_weights(present, self.rank, unit.site.key)).to(unit.positions)
        stays = torch.isin(unit.positions, wanted)
        comes = wanted[torch.isin(wanted, unit.positions, invert=True)]
        slots = (~stays).nonzero().flatten()
        old = torch.cat([unit.left_positions, unit.positions[slots]])
        changes = torch.cat([unit.left_values, unit.values[slots].to(unit.left_values)])
        before = unit.values.new_zeros(unit.size).index_copy_(0, old.long(), changes.to(unit.values))
        unit.positions[slots], unit.values[slots] = comes, before[comes.long()]
        rest = torch.isin(old, comes, invert=True) & (changes != 0)
        unit.left_positions, unit.left_values = old[rest], changes[rest]
        for name, start in (("exp_avg", 0), ("exp_avg_sq", 0), ("age", 1)):
            if name in optimizer.state[unit.values]:
                optimizer.state[unit.values][name][slots] = start

    def state(self) -> dict[str, Any]:
        """Return what a resumed training needs."""
        return {"steps": self.steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Args:
            state: As from `state`.
        """
        self.steps = state["steps"]


def _regrow_adam(optimizer: Any) -> Callable[..., None]:
    """Return what sets the moments of entries of PyTorch's Adam: corrected by its one counter, they are the means."""

    def regrow(parameter: nn.Parameter, slots: Tensor, mean: Tensor, square: Tensor, age: float) -> None:
        state = optimizer.state[parameter]
        b1, b2 = next(g["betas"] for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        step = float(state["step"])
        state["exp_avg"][slots] = mean.to(state["exp_avg"].dtype) * (1 - b1**step)
        state["exp_avg_sq"][slots] = square.to(state["exp_avg_sq"].dtype) * (1 - b2**step)

    return regrow


def check_optimizer(optimizer: Any, schedule: str) -> None:
    """Refuse optimisers whose state of an entry is not known.

    Args:
        optimizer: The optimiser.
        schedule: The schedule that changes entries.

    Raises:
        ConfigError: If it is another one.
    """
    known = (torch.optim.Adam, torch.optim.AdamW, SparseAdamW, SM3)
    if not isinstance(optimizer, known) or any(group.get("amsgrad") for group in optimizer.param_groups):
        raise ConfigError(
            f"Sparse(schedule={schedule!r}) gives entries that come their moments, and cannot in "
            f"{type(optimizer).__name__}. Use Adam, AdamW (without amsgrad), SparseAdamW or SM3, or schedule='fixed'."
        )
