"""A small grid world that requires memory, vectorized in torch.

The agent is in a walled square room with a switchboard of four switches. Only the first observation of an episode shows
one of four cues, on the agent's cell and the eight around it. Actions have no effect in the first `delay` steps. After
that the agent can walk, and press a switch when it is on the switchboard's cell or one of the eight around it. The
cue's switch gives reward 1 and ends the episode; any other switch ends it with reward 0. A press out of reach does
nothing. After `time_limit` steps the episode is truncated.

No action has an effect while the cue is visible, and later observations depend only on the cells of the agent and the
board. The switch that a policy without memory presses is therefore independent of the cue, and its mean return is at
most 1/4. The scripted policy's is 1.

Observations are rows of a precomputed table (agent's cell x board's cell x cue), so a step takes a few small tensor
operations. On CUDA none of them causes a host sync.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metta_fastagent.train.config import require_device
from metta_fastagent.train.environments import Step, check_int, check_seed

WINDOW = 11
CENTRE = WINDOW // 2
# In a room of at most five cells per side, all walls are within five cells of the agent: always in the window.
MAX_ROOM_SIZE = CENTRE
NUM_CUES = 4

NOOP, MOVE, PRESS = 0, 1, 2
# Directions of `move`, as (dx, dy): north, south, west, east.
DIRECTIONS = ((0, -1), (0, 1), (-1, 0), (1, 0))
NORTH, SOUTH, WEST, EAST = 0, 1, 2, 3

WALL, BOARD, FIRST_CUE = 0, 1, 2
# Cues are separate features, not values of one feature, so all four are equally far apart for a network.
FEATURE_NAMES = ("wall", "switchboard", "cue_0", "cue_1", "cue_2", "cue_3")
# Board and cue are a few tokens among about twenty wall tokens; large values make them stand out.
WALL_VALUE, SIGNAL_VALUE = 2, 255
EMPTY_TOKEN = (255, 255, 255)
# Nine cells: of the nine positions of Fast's first convolution, only one would see a cue on the middle cell alone.
CUE_PLACES = tuple(((CENTRE + x) << 4) + CENTRE + y for y in (-1, 0, 1) for x in (-1, 0, 1))

# the per-row state
ROW_STATE = ("agent", "board", "cue", "time")
# A press works from this many cells away, diagonals included.
REACH = 1


class MemoryEnvironment:
    """`num_envs` independent rooms, stepped together on `device`, with one random generator.

    Args:
        num_envs: rows, at least 1.
        device: device of all tensors and of the generator.
        seed: 0 to 2**63 - 1; runs with the same seed and actions are identical on the same kind of device.
        room_size: free cells along a side, 2 to 5.
        delay: steps at the start of an episode in which actions have no effect; at least 1.
        time_limit: steps after which an episode is truncated; must allow crossing the room and pressing.

    Actions: `noop` (parameter 0), `move` (0 north, 1 south, 2 west, 3 east; walls stop it), `press` (switch 0 to 3).
    """

    name = "memory"
    obs_width = obs_height = WINDOW

    def __init__(
        self,
        num_envs: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
        *,
        room_size: int = 4,
        delay: int = 1,
        time_limit: int = 16,
    ) -> None:
        self.num_envs = check_int("num_envs", num_envs, 1)
        self.room_size = check_int("room_size", room_size, 2, MAX_ROOM_SIZE)
        self.delay = check_int("delay", delay, 1)
        # The longest walk crosses the room along both axes until the board is in reach; one more step presses.
        self.time_limit = check_int("time_limit", time_limit, delay + 2 * (room_size - 1 - REACH) + 1)
        self.device = require_device("device", device)

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

        self._generator = torch.Generator(self.device)
        self.reset(seed)

    def reset(self, seed: int | None = None) -> Tensor:
        """Start a new episode in every row; returns uint8 `[num_envs, M, 3]`. None continues the random stream."""
        if seed is not None:
            self._generator.manual_seed(check_seed(seed))
        self._agent, self._board, self._cue, self._time = self._first_states()
        return self._observe()

    def step(self, actions: Tensor) -> Step:
        """Apply (type, parameter) pairs, any integer dtype `[num_envs, 2]`, and restart ended rows."""
        action_types, action_params = actions.long().unbind(1)
        acts = self._time >= self.delay
        moves = acts & (action_types == MOVE)
        pressed = acts & (action_types == PRESS) & self._reach[self._agent, self._board]
        rewards = (pressed & (action_params == self._cue)).float()

        # The table's last column leaves the agent in place.
        directions = torch.where(moves, action_params, len(DIRECTIONS))
        self._agent = self._next_cell[self._agent, directions]
        self._time = self._time + 1
        truncations = (self._time >= self.time_limit) & ~pressed
        final_observations = self._observe()

        ended = pressed | truncations
        states = (self._agent, self._board, self._cue, self._time)
        # States are drawn for every row, so that neither shapes nor the random stream depend on the data.
        self._agent, self._board, self._cue, self._time = (
            torch.where(ended, first, state) for first, state in zip(self._first_states(), states, strict=True)
        )
        return Step(self._observe(), rewards, pressed, truncations, final_observations)

    def scripted_actions(self) -> Tensor:
        """Wait out the delay, walk into reach, press the right switch: int32 `[num_envs, 2]`.

        Reads the hidden cue; its return is 1 in every episode.
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
        """The state of the rows (int64 `[num_envs]` each) and of the generator, and the environment's options."""
        rows = {name: getattr(self, f"_{name}").clone() for name in ROW_STATE}
        return {"options": self._options(), **rows, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of an environment with the same options on the same kind of device."""
        if state["options"] != self._options():
            raise ValueError(f"state['options']: got {state['options']}, expected {self._options()}")
        self._agent, self._board, self._cue, self._time = (state[name].to(self.device, copy=True) for name in ROW_STATE)
        self._generator.set_state(state["generator"].cpu())

    def _options(self) -> dict[str, Any]:
        return {option: getattr(self, option) for option in ("name", "num_envs", "room_size", "delay", "time_limit")}

    def _first_states(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Random initial (agent, board, cue, time) of every row, int64 `[num_envs]` each, from one draw."""
        states = NUM_CUES * self._num_cells * (self._num_cells - 1)
        draws = torch.randint(states, (self.num_envs,), generator=self._generator, device=self.device)
        cue = draws % NUM_CUES
        board = draws // NUM_CUES % self._num_cells
        # Offset from the board of 1 to cells - 1: every other cell is equally likely.
        distance = draws // (NUM_CUES * self._num_cells) + 1
        agent = (board + distance) % self._num_cells
        return agent, board, cue, torch.zeros_like(cue)

    def _observe(self) -> Tensor:
        """Observations of the current states, uint8 `[num_envs, M, 3]`."""
        shown = torch.where(self._time == 0, self._cue, NUM_CUES)
        rows = (self._agent * self._num_cells + self._board) * (NUM_CUES + 1) + shown
        return self._observations.index_select(0, rows)


def _reach_table(room_size: int) -> Tensor:
    """bool `[cells, cells]`: whether an agent on the first cell can reach a board on the second cell."""
    cells = torch.arange(room_size * room_size)
    x, y = cells % room_size, cells // room_size
    return ((x[:, None] - x).abs() <= REACH) & ((y[:, None] - y).abs() <= REACH)


def _next_cell_table(room_size: int) -> Tensor:
    """int64 `[cells, directions + 1]`: the cell after a move; walls block it, the last column stays in place."""
    cells, last = torch.arange(room_size * room_size).unsqueeze(1), room_size - 1
    dx, dy = torch.tensor((*DIRECTIONS, (0, 0))).unbind(1)
    return (cells // room_size + dy).clamp(0, last) * room_size + (cells % room_size + dx).clamp(0, last)


def _observation_table(room_size: int) -> Tensor:
    """uint8 `[cells * cells * (cues + 1), M, 3]`: tokens by agent cell, board cell and cue (last: no cue).

    Cell (x, y) has index `y * room_size + x`. Tokens are the walls row by row, then the board, then the cue.
    """
    cells = [(x, y) for y in range(room_size) for x in range(room_size)]
    around = range(-1, room_size + 1)
    walls = [(x, y) for y in around for x in around if (x, y) not in cells]
    cues = [[(place, FIRST_CUE + cue, SIGNAL_VALUE) for place in CUE_PLACES] for cue in range(NUM_CUES)]
    table = []
    for agent_x, agent_y in cells:
        # Cell (x, y) is at (x - agent_x + CENTRE, y - agent_y + CENTRE) in the window.
        origin = ((CENTRE - agent_x) << 4) + CENTRE - agent_y
        wall_tokens = [(origin + (x << 4) + y, WALL, WALL_VALUE) for x, y in walls]
        for board_x, board_y in cells:
            board_token = (origin + (board_x << 4) + board_y, BOARD, SIGNAL_VALUE)
            table += [[*wall_tokens, board_token, *cue] for cue in (*cues, [EMPTY_TOKEN] * len(CUE_PLACES))]
    return torch.tensor(table, dtype=torch.uint8)
