"""``optimizer.state`` of a boosted optimizer: plain PyTorch's mapping of parameters to their states, shown lazily.

Nothing is read until somebody asks for a value, so the mapping costs nothing beside what is held of it. Both levels are
dicts to ``isinstance``, as code that walks through optimizer states expects, but all that a dict has in itself stays
empty. Both are live: they show what the optimizer has now.

One object stands for the state of a parameter as long as somebody has it, as in plain PyTorch, where it is a dict of
its own: code that takes a state out, or puts another in its place, may put the first one back later. So what is
replaced while it is held is copied to RAM before it goes. What is assigned is copied as well, into the chunks:
changing it afterwards does not change the state.
"""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, MutableMapping, ValuesView
from typing import Any

from torch import Tensor

from .kept_states import KeptStates


class _Shown(dict[Any, Any]):
    """A dict whose entries are elsewhere: what a dict does, by five methods of its subclasses.

    Made of a mapping, as code does that keeps the type of what it copies, it is a plain dict.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if args and not isinstance(args[0], KeptStates):
            return dict(*args, **kwargs)
        return super().__new__(cls)

    def keys(self) -> Any:
        return KeysView(self)

    def values(self) -> Any:
        return ValuesView(self)

    def items(self) -> Any:
        return ItemsView(self)

    def __contains__(self, key: object) -> bool:
        return key in list(self)

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def pop(self, key: Any, *default: Any) -> Any:
        if key not in self:
            if default:
                return default[0]
            raise KeyError(key)
        value = self[key]
        del self[key]
        return value

    def popitem(self) -> tuple[Any, Any]:
        if not self:
            raise KeyError("popitem(): it is empty")
        *_, key = self
        return key, self.pop(key)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def copy(self) -> Any:
        """A plain dict with the entries, which go on showing what the optimizer has."""
        return dict(self)

    def __copy__(self) -> Any:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return {key: copy.deepcopy(value, memo) for key, value in self.items()}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OrderedDict, (), None, None, iter(list(self.items()))  # which torch.load takes with weights_only

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Mapping) and dict(self.items()) == dict(other.items()))

    __hash__ = None

    def __or__(self, other: Any) -> Any:
        return dict(self) | dict(other)

    def __ror__(self, other: Any) -> Any:
        return dict(other) | dict(self)

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

    def __reversed__(self) -> Iterator[Any]:
        return iter([*self][::-1])

    def __repr__(self) -> str:
        return repr(dict(self.items()))


class ParameterState(_Shown):
    """The state of one parameter in a chunk: ``optimizer.state[p]``."""

    def __init__(self, kept: KeptStates, parameter: Tensor) -> None:
        self._kept = kept
        self._parameter = parameter
        self._left: dict[Any, Any] | None = None

    def let_go(self) -> None:
        """Keep the entries, which are about to be replaced."""
        if self._left is None:
            self._left = dict(self.items())

    def __getitem__(self, name: Any) -> Any:
        return self._kept.get(self._parameter, name) if self._left is None else self._left[name]

    def __setitem__(self, name: Any, value: Any) -> None:
        if self._left is None:
            self._kept.set(self._parameter, name, value)
        else:
            self._left[name] = value

    def __delitem__(self, name: Any) -> None:
        if self._left is None:
            self._kept.unset(self._parameter, name)
        else:
            del self._left[name]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._kept.names(self._parameter) if self._left is None else list(self._left))

    def __len__(self) -> int:
        return len(self._kept.names(self._parameter) if self._left is None else self._left)

    def clear(self) -> None:
        """Make the state what it is before the parameter's first step."""
        if self._left is None:
            self._kept.refuse_changes()
            self._kept.forget(self._parameter)
        else:
            self._left.clear()


class OptimizerStates(_Shown):
    """The states of all parameters of an optimizer.

    Parameters
    ----------
    kept
        Has those of parameters in chunks.
    groups
        Asks for the optimizer's groups now.
    outside
        Has those of all others, and whatever else somebody has put there.
    """

    default_factory = dict

    def __init__(
        self, kept: KeptStates, groups: Callable[[], list[dict[str, Any]]], outside: MutableMapping[Any, Any]
    ) -> None:
        self._kept = kept
        self._groups = groups
        self._outside = outside
        self._left: dict[Any, Any] | None = None

    def let_go(self) -> None:
        """Keep the states, which are about to be replaced."""
        if self._left is None:
            self._left = defaultdict(dict, self.items())

    def __getitem__(self, key: Any) -> Any:
        if self._left is not None:
            return self._left[key]
        if not self._keeps(key):
            return self._outside[key]
        shown = self._kept.shown.holder(key)
        if shown is None:
            shown = ParameterState(self._kept, key)
            self._kept.shown.hold(key, shown)
        return shown

    def __setitem__(self, key: Any, value: Any) -> None:
        if self._left is not None:
            self._left[key] = value
        elif not self._keeps(key):
            self._outside[key] = value
        elif value is not self._kept.shown.holder(key):
            self._check(key, value)
            self._kept.refuse_changes()
            self._kept.replace(key, value)

    def __delitem__(self, key: Any) -> None:
        if self._left is not None:
            del self._left[key]
        elif not self._keeps(key):
            del self._outside[key]
        else:
            if not self._kept.has(key):
                raise KeyError(key)
            self._kept.refuse_changes()
            self._kept.drop(key)

    def __contains__(self, key: object) -> bool:
        if self._left is not None:
            return key in self._left
        return self._kept.has(key) if self._keeps(key) else key in self._outside  # type: ignore[arg-type]

    def clear(self) -> None:
        """Make every state what it is before the first step."""
        for key in list(self):
            del self[key]

    def copy(self) -> Any:
        return defaultdict(dict, self.items())

    def __iter__(self) -> Iterator[Any]:
        if self._left is not None:
            return iter(list(self._left))
        parameters = [parameter for group in self._groups() for parameter in group["params"]]
        known = {id(parameter) for parameter in parameters}
        others = [key for key in self._outside if id(key) not in known]
        return iter([*(parameter for parameter in parameters if parameter in self), *others])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def replace(self, states: Mapping[Any, Any]) -> None:
        """Have these states and no others. All or nothing."""
        given = dict(states.items())
        for key, value in given.items():
            if self._keeps(key):
                self._check(key, value)
        self._kept.refuse_changes()
        self.let_go()
        shown = OptimizerStates(self._kept, self._groups, self._outside)
        for key in [key for key in shown if key not in given]:
            del shown[key]
        for key, value in given.items():
            shown[key] = value

    def _keeps(self, key: Any) -> bool:
        return isinstance(key, Tensor) and self._kept.keeps(key)

    def _check(self, key: Any, value: Any) -> None:
        if not isinstance(value, Mapping):
            raise TypeError(f"the state of a parameter is a mapping of names to values, got {type(value).__name__}")
        self._kept.check(key, value)
