"""A small grid world that only a policy with memory can solve, vectorised in torch.

The agent stands in a walled square room; somewhere in it is a switchboard with four switches. The first observation of
an episode, and no other, shows one of four cues, on the agent's cell and the eight around it. For the first `delay`
steps the agent is held: no action has an effect. Then it may walk. Pressing the switch that belongs to the cue, on the
board or on one of the eight cells around it, gives reward 1 and ends the episode; another switch ends it with reward 0.
A press out of reach does nothing. After `time_limit` steps the episode is truncated.

While the cue is seen, nothing that the agent does has an effect; afterwards an observation depends on the cells of the
agent and of the board alone. What a policy without memory presses is therefore independent of the cue, and its mean
return is at most 1/4. The scripted policy's is 1.

A whole observation is one row of a table computed once (agent's cell x board's cell x cue), so a step costs a handful
of small tensor operations and nothing in it waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metta_fastagent.train.environments import (
    Step,
    check_actions,
    check_device,
    check_int,
    check_seed,
    legal_pairs,
    raise_on_illegal_pair,
)

WINDOW = 11
CENTRE = WINDOW // 2
# With at most five cells a side, the walls opposite the agent are at most five cells away: always in the window.
MAX_ROOM_SIZE = CENTRE
NUM_CUES = 4

NOOP, MOVE, PRESS = 0, 1, 2
# Directions of `move`, as (dx, dy): north, south, west, east.
DIRECTIONS = ((0, -1), (0, 1), (-1, 0), (1, 0))
NORTH, SOUTH, WEST, EAST = 0, 1, 2, 3

WALL, BOARD, FIRST_CUE = 0, 1, 2
# A cue is a feature of its own, not a value: the four are equally far apart for a network.
FEATURE_NAMES = ("wall", "switchboard", "cue_0", "cue_1", "cue_2", "cue_3")
# Board and cue are few cells among some twenty walls: large values keep them visible behind spread-out weights.
WALL_VALUE, SIGNAL_VALUE = 2, 255
EMPTY_TOKEN = (255, 255, 255)
# The middle cell alone would lie in one of the nine places that the reference agent's first layer looks at.
CUE_PLACES = tuple(((CENTRE + x) << 4) + CENTRE + y for y in (-1, 0, 1) for x in (-1, 0, 1))

# A press works from this many cells away, diagonals included.
REACH = 1


class MemoryEnvironment:
    """`num_envs` independent rooms stepped at once on `device`; all randomness comes from one generator there.

    Args:
        num_envs: rows, at least 1.
        device: where every tensor lives.
        seed: 0 to 2**63 - 1; the same seed gives the same run on the same kind of device.
        room_size: free cells along a side, 2 to 5.
        delay: actions in the first `delay` steps of an episode do nothing; at least 1, so that the cue is gone by then.
        time_limit: steps after which an episode is truncated; long enough to cross the room and press.
        validate: on the CPU, check each step that all (type, parameter) pairs are legal. Off, as on other devices but
            CUDA, an illegal pair acts as `noop`; on CUDA it fails as a device-side assertion, because reading it back
            would wait for the device.

    Actions: `noop` (parameter 0), `move` (0 north, 1 south, 2 west, 3 east; walls stop it), `press` (switch 0 to 3).
    """

    name = "memory"
    obs_width = WINDOW
    obs_height = WINDOW

    def __init__(
        self,
        num_envs: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
        *,
        room_size: int = 4,
        delay: int = 1,
        time_limit: int = 16,
        validate: bool = True,
    ) -> None:
        self.num_envs = check_int("num_envs", num_envs, 1)
        self.room_size = check_int("room_size", room_size, 2, MAX_ROOM_SIZE)
        self.delay = check_int("delay", delay, 1)
        # The longest walk crosses the room both ways up to the board's reach; one more step presses.
        self.time_limit = check_int("time_limit", time_limit, delay + 2 * (room_size - 1 - REACH) + 1)
        seed = check_seed(seed)
        self.device = check_device(device)
        self.validate = validate

        self.action_names = ["noop", "move", "press"]
        self.max_action_args = [0, len(DIRECTIONS) - 1, NUM_CUES - 1]
        self.features = {name: {"id": index, "normalization": 1.0} for index, name in enumerate(FEATURE_NAMES)}
        self.feature_normalizations = dict.fromkeys(range(len(FEATURE_NAMES)), 1.0)

        self._num_cells = room_size * room_size
        observations = _observation_table(room_size)
        self.num_tokens = observations.shape[1]
        self._observations = observations.to(self.device)
        self._reach = _reach_table(room_size).to(self.device)
        self._next_cell = _next_cell_table(room_size).to(self.device)
        self._max_action_args = torch.tensor(self.max_action_args, device=self.device)

        self._generator = torch.Generator(self.device)
        self._generator.manual_seed(seed)
        self._agent, self._board, self._cue, self._time = self._first_states()

    def reset(self, seed: int | None = None) -> Tensor:
        """Start an episode in every row: uint8 `[num_envs, M, 3]`. A seed restarts the random stream, None goes on."""
        if seed is not None:
            self._generator.manual_seed(check_seed(seed))
        self._agent, self._board, self._cue, self._time = self._first_states()
        return self._observe()

    def step(self, actions: Tensor) -> Step:
        """Apply (type, parameter) pairs, any integer dtype `[num_envs, 2]`, and start ended rows anew.

        Raises TypeError or ValueError that names `actions`, before anything has changed.
        """
        action_types, action_params = check_actions(actions, self.num_envs, self.device).long().unbind(1)
        legal = legal_pairs(action_types, action_params, self._max_action_args)
        if self.device.type == "cuda":
            torch.ops.aten._assert_async.msg(legal.all(), "actions holds an illegal (type, parameter) pair")
        elif self.device.type == "cpu" and self.validate:
            raise_on_illegal_pair(legal, actions, self.action_names, self.max_action_args)

        acts = legal & (self._time >= self.delay)
        moves = acts & (action_types == MOVE)
        pressed = acts & (action_types == PRESS) & self._reach[self._agent, self._board]
        rewards = (pressed & (action_params == self._cue)).float()

        # The table's last column stays where it is.
        directions = torch.where(moves, action_params, len(DIRECTIONS))
        self._agent = self._next_cell[self._agent, directions]
        self._time = self._time + 1
        truncations = (self._time >= self.time_limit) & ~pressed
        final_observations = self._observe()

        ended = pressed | truncations
        states = (self._agent, self._board, self._cue, self._time)
        # New states are drawn for every row, so that shapes and the random stream do not depend on the data.
        self._agent, self._board, self._cue, self._time = (
            torch.where(ended, first, state) for first, state in zip(self._first_states(), states, strict=True)
        )
        return Step(self._observe(), rewards, pressed, truncations, final_observations)

    def scripted_actions(self) -> Tensor:
        """The expert's actions, int32 `[num_envs, 2]`: wait for the delay, walk into reach, press the right switch.

        It reads the hidden cue. Its return is 1 in every episode.
        """
        dx = self._board % self.room_size - self._agent % self.room_size
        dy = self._board // self.room_size - self._agent // self.room_size
        horizontal = torch.where(dx > 0, EAST, WEST)
        vertical = torch.where(dy > 0, SOUTH, NORTH)
        walk = torch.where(dx.abs() > REACH, horizontal, vertical)
        held = self._time < self.delay
        arrived = self._reach[self._agent, self._board]
        action_types = torch.where(held, NOOP, torch.where(arrived, PRESS, MOVE))
        action_params = torch.where(held, 0, torch.where(arrived, self._cue, walk))
        return torch.stack((action_types, action_params), dim=1).int()

    def state_dict(self) -> dict[str, Any]:
        """The rows' states (int64 `[num_envs]` each), the generator's state and the options they belong to."""
        return {
            "options": self._options(),
            "agent": self._agent.clone(),
            "board": self._board.clone(),
            "cue": self._cue.clone(),
            "time": self._time.clone(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, on the same kind of device with the same options.

        Raises TypeError or ValueError that names the entry, before anything has changed.
        """
        if not isinstance(state, dict):
            raise TypeError(f"state must be a dict, got {type(state).__name__}")
        expected = {"options", "agent", "board", "cue", "time", "generator"}
        if set(state) != expected:
            raise ValueError(f"state must have the keys {sorted(expected)}, got {sorted(map(str, state))}")
        if state["options"] != self._options():
            raise ValueError(f"state['options'] must be {self._options()}, got {state['options']}")
        limits = {"agent": self._num_cells, "board": self._num_cells, "cue": NUM_CUES, "time": self.time_limit}
        rows = {key: self._checked_rows(key, state[key], limit) for key, limit in limits.items()}
        generator = torch.Generator(self.device)
        try:
            generator.set_state(state["generator"].cpu())
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(
                f"state['generator'] must be the state of a torch.Generator on {self.device.type}: {error}"
            ) from error

        self._generator = generator
        self._agent, self._board, self._cue, self._time = rows["agent"], rows["board"], rows["cue"], rows["time"]

    def close(self) -> None:
        """Nothing is held that outlives the object."""

    def _options(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "num_envs": self.num_envs,
            "room_size": self.room_size,
            "delay": self.delay,
            "time_limit": self.time_limit,
        }

    def _checked_rows(self, key: str, value: object, limit: int) -> Tensor:
        if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.shape != (self.num_envs,):
            came = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"state[{key!r}] must be an int64 tensor [{self.num_envs}], got {came}")
        lowest, highest = (int(bound) for bound in value.aminmax())
        if lowest < 0 or highest >= limit:
            raise ValueError(f"state[{key!r}] must lie in 0 to {limit - 1}, got {lowest} to {highest}")
        return value.to(self.device, copy=True)

    def _first_states(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Fresh (agent, board, cue, time) for every row, int64 `[num_envs]` each, from one draw."""
        draws = torch.randint(
            NUM_CUES * self._num_cells * (self._num_cells - 1),
            (self.num_envs,),
            generator=self._generator,
            device=self.device,
        )
        cue = draws % NUM_CUES
        board = draws // NUM_CUES % self._num_cells
        # Counting on from the board by 1 to cells - 1 gives every other cell the same chance.
        distance = draws // (NUM_CUES * self._num_cells) + 1
        agent = (board + distance) % self._num_cells
        return agent, board, cue, torch.zeros_like(cue)

    def _observe(self) -> Tensor:
        """The observations of the present states, uint8 `[num_envs, M, 3]`."""
        shown = torch.where(self._time == 0, self._cue, NUM_CUES)
        rows = (self._agent * self._num_cells + self._board) * (NUM_CUES + 1) + shown
        return self._observations.index_select(0, rows)


def _reach_table(room_size: int) -> Tensor:
    """bool `[cells, cells]`: whether an agent on the first cell can press on a board on the second."""
    cells = torch.arange(room_size * room_size)
    x, y = cells % room_size, cells // room_size
    return ((x[:, None] - x).abs() <= REACH) & ((y[:, None] - y).abs() <= REACH)


def _next_cell_table(room_size: int) -> Tensor:
    """int64 `[cells, directions + 1]`: the cell that a move leads to; walls stop it, the last column does not move."""
    table = [
        [
            min(max(y + dy, 0), room_size - 1) * room_size + min(max(x + dx, 0), room_size - 1)
            for dx, dy in (*DIRECTIONS, (0, 0))
        ]
        for y in range(room_size)
        for x in range(room_size)
    ]
    return torch.tensor(table)


def _observation_table(room_size: int) -> Tensor:
    """uint8 `[cells * cells * (cues + 1), M, 3]`: tokens by agent's cell, board's cell and cue (the last: none shown).

    Cell (x, y) of the room has the index `y * room_size + x`. Tokens are the walls row by row, the board, the cue.
    """
    cells = [(x, y) for y in range(room_size) for x in range(room_size)]
    around = range(-1, room_size + 1)
    walls = [(x, y) for y in around for x in around if (x, y) not in cells]
    table = []
    for agent_x, agent_y in cells:
        # Cell (x, y) lies at window place (x - agent_x + CENTRE, y - agent_y + CENTRE).
        origin = ((CENTRE - agent_x) << 4) + CENTRE - agent_y
        wall_tokens = [(origin + (x << 4) + y, WALL, WALL_VALUE) for x, y in walls]
        for board_x, board_y in cells:
            board_token = (origin + (board_x << 4) + board_y, BOARD, SIGNAL_VALUE)
            for cue in range(NUM_CUES):
                cue_tokens = [(place, FIRST_CUE + cue, SIGNAL_VALUE) for place in CUE_PLACES]
                table.append([*wall_tokens, board_token, *cue_tokens])
            table.append([*wall_tokens, board_token, *[EMPTY_TOKEN] * len(CUE_PLACES)])
    return torch.tensor(table, dtype=torch.uint8)
