"""ActionSpace: the tables behind (action type, parameter) pairs and logit indices."""

from collections.abc import Iterable, Mapping, Sequence

import torch

from metta_fastagent.runtime.checks import require_integer


class ActionSpace:
    """Named action types, each with parameters 0 to its `max_params`, laid out as one list of logits.

    Attributes:
        action_names: name of each type.
        action_max_params: largest legal parameter of each type.
        num_actions: A, the sum of `max_param + 1` over the types.
        full_action_names: A names "<type>_<parameter>", in logit order.
        cum_action_max_params: int64 tensor [types + 1], `cumsum([0] + max_params)`.
        action_index_tensor: int32 tensor [A, 2], row i the (type, parameter) pair of logit i.

    Args:
        action_names: distinct, non-empty names, one for each type.
        action_max_params: integers >= 0, one for each type.
        device: device of the tables.

    Raises:
        TypeError, ValueError: an argument is empty, or has the wrong length or a wrong element.

    Example:
        >>> space = ActionSpace(["noop", "move"], [0, 1])
        >>> space.num_actions, space.full_action_names
        (3, ['noop_0', 'move_0', 'move_1'])
        >>> space.action_index_tensor.tolist()
        [[0, 0], [1, 0], [1, 1]]
    """

    def __init__(
        self,
        action_names: Sequence[str],
        action_max_params: Sequence[int],
        device: torch.device | str | None = None,
    ) -> None:
        self.action_names = _checked_names(action_names)
        self.action_max_params = checked_max_params("action_max_params", action_max_params, len(self.action_names))
        typed = list(zip(self.action_names, self.action_max_params, strict=True))
        self.full_action_names = [f"{name}_{param}" for name, limit in typed for param in range(limit + 1)]
        self.num_actions = len(self.full_action_names)
        self.cum_action_max_params = torch.tensor(
            [0, *self.action_max_params], dtype=torch.int64, device=device
        ).cumsum(0)
        pairs = [(kind, param) for kind, limit in enumerate(self.action_max_params) for param in range(limit + 1)]
        self.action_index_tensor = torch.tensor(pairs, dtype=torch.int32, device=device)

    def __repr__(self) -> str:
        types = ", ".join(
            f"{n}: 0..{limit}" for n, limit in zip(self.action_names, self.action_max_params, strict=True)
        )
        return f"ActionSpace({types}; {self.num_actions} actions)"


def _checked_names(action_names: Iterable[str]) -> list[str]:
    if isinstance(action_names, (str, bytes, Mapping)) or not isinstance(action_names, Iterable):
        raise TypeError(f"action_names: got {action_names!r}, expected a list of names")
    names = list(action_names)
    if not names:
        raise ValueError("action_names: got no name, expected at least one action type")
    for position, name in enumerate(names):
        if not isinstance(name, str) or not name:
            raise TypeError(f"action_names[{position}]: got {name!r}, expected a non-empty string")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"action_names: got {', '.join(repeated)} more than once, expected distinct names")
    return [str(name) for name in names]


def checked_max_params(argument: str, max_params: Iterable[int], num_types: int | None = None) -> list[int]:
    """The values as a list, after checking that they are integers >= 0 (`num_types` many); errors name `argument`."""
    if isinstance(max_params, (str, bytes)) or not isinstance(max_params, Iterable):
        raise TypeError(f"{argument}: got {max_params!r}, expected a list of integers")
    values = list(max_params)
    if num_types is not None and len(values) != num_types:
        raise ValueError(f"{argument}: got {len(values)} values, expected {num_types}, one for each action name")
    return [
        require_integer(f"{argument}[{position}]", value, "an integer >= 0", minimum=0)
        for position, value in enumerate(values)
    ]
