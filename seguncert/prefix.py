"""Of many stochastic passes, what does not depend on the masks is computed once. For any module, and exactly.

A *trace* of one pass over a small picture of noise follows the masks through every operator: a module call whose result
no mask has touched is *settled*. In a `Session` the first pass keeps the results of the outermost settled calls, and
the passes after it return them without computing; everything else runs as written. Nets need not be cut by hand:
encoders, skip connections and branches beside the dropout are found alike.

A result that somebody later writes into is handed out as a copy. Replayed passes must equal full passes bit for bit on
the trace's picture, three times; where they do not, every pass is a full one and `Plan.note` says so.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from seguncert.dropout import RANDOM, Masks, probe_input
from seguncert.model import FORWARDS, Model, ModelError, evaluating, net_logits

Call = tuple[str, int]  # a module's name, and which of its calls in a pass


@dataclass(frozen=True)
class Operator:
    """One operator of the part that masks touch: the trace keeps them, so that `tail.py` can recognise a linear one."""

    function: Any
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Plan:
    """What a trace found.

    `settled` are the outermost calls that no mask touches, with the calls made inside each of them, and whether their
    result must be copied before it is handed out; `draws` the stochastic calls in order,
    `stochastic` all modules that may make one; `unplaced` as in `Masks`.
    """

    settled: dict[Call, Counter[str]] = field(default_factory=dict)
    copied: frozenset[Call] = frozenset()
    draws: tuple[Call, ...] = ()
    stochastic: frozenset[str] = frozenset()
    operators: tuple[Operator, ...] = field(default=(), repr=False)
    unplaced: bool = False
    note: str = ""

    @property
    def names(self) -> set[str]:
        """Modules whose calls a session must see."""
        return {name for name, _ in self.settled} | self.stochastic


class Reached(Exception):
    """Ends a pass at the first stochastic call, with the value that was given to it."""

    def __init__(self, value: Tensor):
        self.value = value


class Session:
    """Passes of one net over one picture, sharing what is settled. One thread at a time."""

    def __init__(self, plan: Plan, masks: Masks | None = None):
        self.plan, self.masks = plan, masks
        self.kept: dict[Call, Any] = {}
        self.calls: Counter[str] = Counter()
        self.full = False
        self.stop = False
        self.drawn: list[Call] = []

    def begin(self, masks: Masks | None, full: bool = False, stop: bool = False) -> None:
        """Before each pass: its masks; `full` computes everything; `stop` raises `Reached` at the first draw."""
        self.masks, self.full, self.stop = masks, full, stop
        self.calls, self.drawn = Counter(), []

    def as_planned(self) -> bool:
        """Whether the pass drew the masks that the plan foresaw; else what is settled is not known for this picture."""
        return tuple(self.drawn) == self.plan.draws

    def run(self, name: str, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of a module that is settled somewhere or stochastic."""
        call = name, self.calls[name]
        if call in self.kept and not self.full:
            self.calls.update(self.plan.settled[call])
            self.calls[name] += 1
            return _copy(self.kept[call]) if call in self.plan.copied else self.kept[call]
        self.calls[name] += 1
        if name in self.plan.stochastic and self.stop:
            raise Reached(args[0])
        value = forward(*args, **kwargs)
        if name in self.plan.stochastic and self.masks is not None:
            self.drawn.append(call)
            return self.masks.apply(module, value, *args)
        if call in self.plan.settled and not self.full:
            self.kept[call] = _copy(value) if call in self.plan.copied else value
        return value


def _copy(value: Any) -> Any:
    return tree_map_only(Tensor, torch.clone, value)


_current = threading.local()
_installed: Counter[int] = Counter()  # how many contexts hold the wrapper of a module, by its id


@contextmanager
def intercepting(net: nn.Module, names: set[str]) -> Iterator[None]:
    """Within, calls of the named submodules go to the session of the calling thread, if it has one. Nests and threads."""
    modules = {name: module for name, module in net.named_modules() if name in names}
    done: list[nn.Module] = []
    try:
        for name, module in modules.items():
            _wrap(name, module)
            done.append(module)
        yield
    finally:
        for module in done:
            _unwrap(module)


def _wrap(name: str, module: nn.Module) -> None:
    with FORWARDS:
        _installed[id(module)] += 1
        if _installed[id(module)] > 1:
            return
        own = "forward" in vars(module)
        forward = module.forward

        def intercepted(*args: Any, **kwargs: Any) -> Any:
            session = getattr(_current, "session", None)
            return forward(*args, **kwargs) if session is None else session.run(name, module, forward, args, kwargs)

        intercepted.original = forward if own else None  # type: ignore[attr-defined]
        module.forward = intercepted


def _unwrap(module: nn.Module) -> None:
    with FORWARDS:
        _installed[id(module)] -= 1
        if _installed[id(module)] == 0:
            del _installed[id(module)]
            original = module.forward.original  # type: ignore[attr-defined]
            del module.forward
            if original is not None:
                module.forward = original


@contextmanager
def in_session(session: Any) -> Iterator[None]:
    """Within, this thread's calls of intercepted modules go to `session`."""
    before = getattr(_current, "session", None)
    _current.session = session
    try:
        yield
    finally:
        _current.session = before


@dataclass(frozen=True)
class _Ended:
    """A module call that has ended: whether no mask touches its result, the calls around it, when, where, calls inside."""

    clean: bool
    around: tuple[Call, ...]
    time: int
    storages: set[int]
    inside: Counter[str]


class _Tracer(TorchDispatchMode):
    """Follows masks through operators, by the storage that each tensor is in; also a session for module calls."""

    def __init__(self, stochastic: set[str], masks: Masks):
        super().__init__()
        self.stochastic, self.masks = stochastic, masks
        self.alive: list[Any] = []  # so that no storage is used twice
        self.touched: set[int] = set()
        self.operators: list[Operator] = []
        self.writes: list[tuple[int, int]] = []  # when, and into which storage
        self.time = 0
        self.stack: list[Call] = []
        self.calls: Counter[str] = Counter()
        self.results: dict[Call, _Ended] = {}
        self.draws: list[Call] = []
        self.foreign: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        self.time += 1
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        made = [value for value in tree_leaves(output) if isinstance(value, Tensor)]
        self.alive += [given, made]
        if any(word in function.overloadpacket.__name__ for word in RANDOM):
            self.foreign.append(self.stack[-1][0] if self.stack else "")
        touched = any(_storage(value) in self.touched for value in given)
        if function._schema.is_mutable:
            for argument, value in zip(function._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                    self.writes.append((self.time, _storage(value)))
                    made.append(value)
        if touched:
            self.touched.update(_storage(value) for value in made)
            self.operators.append(Operator(function, args))
        return output

    def run(self, name: str, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of any module."""
        call = name, self.calls[name]
        self.calls[name] += 1
        before, draws = self.calls.copy(), len(self.draws)
        self.stack.append(call)
        try:
            value = forward(*args, **kwargs)
        finally:
            self.stack.pop()
        if name in self.stochastic:
            with torch.utils._python_dispatch._disable_current_modes():
                value = self.masks.apply(module, value, *args)
            self.alive.append(value)
            self.touched.add(_storage(value))
            self.draws.append(call)
        leaves = tree_leaves(value)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        storages = {_storage(tensor) for tensor in tensors}
        clean = len(self.draws) == draws and len(tensors) == len(leaves) > 0 and not storages & self.touched
        self.results[call] = _Ended(clean, tuple(self.stack), self.time, storages, self.calls - before)
        return value


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def make_plan(model: Model, stochastic: set[str]) -> Plan:
    """Trace one pass over noise and prove the plan on it; see the module's text."""
    with torch.inference_mode(False), torch.no_grad():  # inference mode hides what operators are made of
        return _make_plan(model, stochastic)


def _make_plan(model: Model, stochastic: set[str]) -> Plan:
    net, probe = model.module, probe_input(model)
    everything = {name for name, _ in net.named_modules()}
    with evaluating(net), intercepting(net, everything):
        tracer = _Tracer(stochastic, Masks(0, [0], (model.divisor, model.divisor), (probe.shape[2], probe.shape[3])))
        with in_session(tracer), tracer:
            logits = net_logits(model, probe)
    if _storage(logits) not in tracer.touched:
        raise ModelError(
            f"{model.name}: its stochastic modules ({', '.join(sorted(stochastic)[:3])}) are not on the way to its logits"
        )
    if tracer.foreign:
        raise ModelError(
            f"{model.name}: {tracer.foreign[0] or 'the net'} draws random numbers even in eval mode; samples could not be repeated"
        )
    settled = {
        call: ended.inside
        for call, ended in tracer.results.items()
        if ended.clean and not any(tracer.results[outer].clean for outer in ended.around)
    }
    copied = {
        call
        for call in settled
        for ended in [tracer.results[call]]
        if any(time > ended.time and storage in ended.storages for time, storage in tracer.writes)
    }
    plan = Plan(
        settled,
        frozenset(copied),
        tuple(tracer.draws),
        frozenset(stochastic),
        tuple(tracer.operators),
        tracer.masks.unplaced,
    )
    with evaluating(net), intercepting(net, plan.names):
        session = Session(plan)
        for sample in (0, 1, 2):
            passes = []
            for full in (True, False):
                session.begin(Masks(0, [sample]), full)
                with in_session(session):
                    passes.append(net_logits(model, probe))
            if not torch.equal(*passes):
                return replace(plan, settled={}, note="each sample is a full pass: to keep what comes before the masks gave other numbers")  # fmt: skip
    return plan
