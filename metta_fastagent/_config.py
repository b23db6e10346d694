"""The mixin's parameters: each defined once, with its default, its check and its place in the log line."""

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from metta_fastagent.runtime.checks import describe, require_integer, require_number


def _one_of(*values: str) -> Any:
    """A parameter with these allowed values; the first is the default."""
    return dataclasses.field(default=values[0], metadata={"values": values})


@dataclass(frozen=True)
class MixinConfig:
    """The mixin's parameters; see `PyTorchAgentMixin.init_mixin`.

    Raises:
        TypeError, ValueError: a parameter has a wrong value.
    """

    clip_range: float = 0
    analyze_weights_interval: int = 300
    clip_mode: str = _one_of("absolute", "init_scaled")
    validate: str = _one_of("deferred", "sync", "off")
    action_format: str = _one_of("pair", "index", "index32")
    on_nonfinite_logits: str = _one_of("raise", "count")
    training_values: bool = False
    check_first_update: bool = False
    # None: the value that the agent has set, otherwise 1.
    l2_init_scale: float | None = None
    clip_scale: float | None = None
    temperature: float | Tensor | None = None

    def __post_init__(self) -> None:
        require_number("clip_range", self.clip_range, "a number >= 0", minimum=0)
        interval = self.analyze_weights_interval
        require_integer("analyze_weights_interval", interval, "an integer >= 0 (epochs)", minimum=0)
        for name in ("training_values", "check_first_update"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: got {describe(getattr(self, name))}, expected True or False")
        for name, expected, minimum in (("l2_init_scale", "a number", None), ("clip_scale", "a number >= 0", 0)):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), expected, minimum)
        if self.temperature is not None:
            _require_temperature(self.temperature)
        for field in dataclasses.fields(self):
            values, value = field.metadata.get("values"), getattr(self, field.name)
            if values and value not in values:
                raise ValueError(f"{field.name}: got {value!r}, expected one of {', '.join(values)}")

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in vars(self).items() if value is not None)


PARAMETERS = tuple(field.name for field in dataclasses.fields(MixinConfig))
# The class that the mixin replaces has these parameters; `extract_mixin_params` always returns them.
ORIGINAL_PARAMETERS = PARAMETERS[:2]


def _require_temperature(temperature: object) -> None:
    expected = "a finite number > 0, or a tensor that holds one"
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1 or not temperature.is_floating_point():
            raise ValueError(f"temperature: got {describe(temperature)}, expected {expected}")
    elif not 0 < require_number("temperature", temperature, expected) < math.inf:
        raise ValueError(f"temperature: got {temperature!r}, expected {expected}")


def with_suggestion(name: str) -> str:
    """An unknown parameter's name, and the known one with a similar spelling."""
    close = difflib.get_close_matches(str(name), PARAMETERS, n=1)
    return f"{name} (did you mean {close[0]}?)" if close else str(name)
