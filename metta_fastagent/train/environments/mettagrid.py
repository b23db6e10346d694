# pyright: reportPrivateImportUsage=false
"""The MettaGrid simulator (the package `mettagrid`, an extra) as a trainer environment.

Each simulator has `num_agents` agents in a walled square map with `num_mines` mines. An agent that walks into a mine
takes its ore, and the mine disappears. **Reward: 1 for each mine that the agent itself collects, else 0**; an episode's
return is the number of mines that one agent collects in `max_steps` steps. The simulator's configuration expresses this
as an inventory reward: a mine holds 255 ore, so that its token has the maximum value, and each ore is worth 1/255.
Agents compete for the same mines. The time limit truncates every episode: there are no terminals.

Observations are the simulator's unchanged bytes. The coordinate byte has the row in the high four bits and the column
in the low four, so the protocol's x is the row; 254 marks tokens without a position. The view is a disc: the window's
corners are always empty. Features, their ids and normalizations are the simulator's.
"""

from __future__ import annotations

import logging
import random
from typing import Any

import torch
from torch import Tensor

from metta_fastagent.runtime.install import missing
from metta_fastagent.train.config import require_device
from metta_fastagent.train.environments import Step, check_int, check_seed
from metta_fastagent.train.environments.memory import CENTRE, EAST, MOVE, NOOP, NORTH, SOUTH, WEST, WINDOW

_level, _handlers = logging.root.level, logging.root.handlers[:]
try:
    from mettagrid.builder import building
    from mettagrid.config import handler_config, mettagrid_config, reward_config
    from mettagrid.map_builder.random_map import RandomMapBuilder
    from mettagrid.simulator import Simulation
    from mettagrid.simulator.simulator import Buffers
except ImportError as error:
    raise missing("mettagrid", error) from None
finally:
    # Importing mettagrid makes the root logger print everything at level INFO.
    logging.root.setLevel(_level)
    logging.root.handlers[:] = _handlers

# Well above two tokens for each mine and wall in view; beyond the limit the simulator drops the farthest tokens.
DEFAULT_NUM_TOKENS = 128
# The maximum value of an inventory token.
ORE_PER_MINE = 255
NO_PLACE = 254

ACTION_NAMES: tuple[str, ...] = ("noop", "move")
# the simulator's action names, by type and parameter
SIMULATOR_ACTIONS = (("noop",), ("move_north", "move_south", "move_west", "move_east"))

# Simulators take seeds as C++ ints, maps as numpy ints; 31 bits fit in both.
SEED_BITS = 31


class MettagridEnvironment:
    """`num_envs` rows, each one agent: row `s * num_agents + a` is agent `a` of simulator `s`.

    Args:
        num_envs: rows, a multiple of `num_agents`.
        device: device of the returned tensors; the simulator runs on the CPU.
        seed: 0 to 2**63 - 1; determines all maps and simulators: runs with the same seed and actions are identical.
        num_agents: agents per simulator.
        map_size: cells per side, walls included, at least 5.
        num_mines: mines per map at the start of an episode.
        max_steps: steps per episode.
        num_tokens: M, tokens per observation.
    """

    name = "mettagrid"
    obs_width = obs_height = WINDOW

    def __init__(
        self,
        num_envs: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
        *,
        num_agents: int = 4,
        map_size: int = 17,
        num_mines: int = 90,
        max_steps: int = 64,
        num_tokens: int = DEFAULT_NUM_TOKENS,
    ) -> None:
        check_int("num_agents", num_agents, 1)
        self.num_envs = check_int("num_envs", num_envs, 1)
        if num_envs % num_agents:
            raise ValueError(f"num_envs: got {num_envs}, expected a multiple of num_agents ({num_agents})")
        check_int("map_size", map_size, 5)
        # The simulator silently halves the number of objects if they do not fit on the map.
        check_int("num_mines", num_mines, 1, (map_size - 2) ** 2 - num_agents)
        check_int("max_steps", max_steps, 1)
        self.num_tokens = check_int("num_tokens", num_tokens, 1)
        seed = check_seed(seed)
        self.device = require_device("device", device)

        self._config = _game_config(num_agents, map_size, num_mines, max_steps, num_tokens)
        specs = self._config.game.id_map().features()
        self.features = {spec.name: {"id": spec.id, "normalization": float(spec.normalization)} for spec in specs}
        self.feature_normalizations = {spec.id: float(spec.normalization) for spec in specs}
        self.action_names = list(ACTION_NAMES)
        self.max_action_args = [len(names) - 1 for names in SIMULATOR_ACTIONS]
        self._ore_feature = self.features["inv:ore"]["id"]

        # The simulators read and write slices of these tensors through NumPy views.
        self._observations = torch.zeros(num_envs, num_tokens, 3, dtype=torch.uint8)
        self._rewards = torch.zeros(num_envs)
        self._terminals = torch.zeros(num_envs, dtype=torch.bool)
        self._truncations = torch.zeros(num_envs, dtype=torch.bool)
        self._simulator_actions = torch.zeros(num_envs, dtype=torch.int32)
        firsts = range(0, num_envs, num_agents)
        self._buffers = [self._buffers_of(slice(first, first + num_agents)) for first in firsts]

        self._seeds = random.Random(seed)
        self._simulations = [self._new_simulation(buffers) for buffers in self._buffers]
        self._action_ids = _action_table(self._simulations[0].action_ids)

    def reset(self, seed: int | None = None) -> Tensor:
        """Start a new episode in every row; returns uint8 `[num_envs, M, 3]`. None continues the random stream."""
        if seed is not None:
            self._seeds = random.Random(check_seed(seed))
        self._check_open()
        for simulation in self._simulations:
            simulation.close()
        self._simulations = [self._new_simulation(buffers) for buffers in self._buffers]
        return self._copy(self._observations)

    def step(self, actions: Tensor) -> Step:
        """Apply (type, parameter) pairs, any integer dtype `[num_envs, 2]`, and replace simulators that have ended."""
        self._check_open()
        action_types, action_params = actions.cpu().long().unbind(1)
        self._simulator_actions.copy_(self._action_ids[action_types, action_params])
        for simulation in self._simulations:
            simulation.step()
        truncations = self._truncations & ~self._terminals
        rewards, terminals, truncated = map(self._copy, (self._rewards, self._terminals, truncations))
        # Without final observations the trainer skips a forward pass.
        final_observations = self._copy(self._observations) if truncations.any() else None
        for index, simulation in enumerate(self._simulations):
            if simulation.is_done():
                simulation.close()
                self._simulations[index] = self._new_simulation(self._buffers[index])
        return Step(self._copy(self._observations), rewards, terminals, truncated, final_observations)

    def scripted_actions(self) -> Tensor:
        """Walk towards the nearest mine in view, or stay if there is none: int32 `[num_envs, 2]`.

        A good policy, not an optimal one: it does not walk around other agents.
        """
        coordinates, feature_ids, _ = self._observations.long().unbind(2)
        row = (coordinates >> 4) - CENTRE
        column = (coordinates & 15) - CENTRE
        # The agent's own ore is a token at distance 0.
        distances = row.abs() + column.abs()
        is_mine = (feature_ids == self._ore_feature) & (coordinates < NO_PLACE) & (distances > 0)
        nearest = torch.where(is_mine, distances, 255).argmin(dim=1, keepdim=True)
        row, column = row.gather(1, nearest).squeeze(1), column.gather(1, nearest).squeeze(1)
        vertical = torch.where(row > 0, SOUTH, NORTH)
        horizontal = torch.where(column > 0, EAST, WEST)
        action_params = torch.where(row.abs() >= column.abs(), vertical, horizontal)
        seen = is_mine.any(dim=1)
        action_types = torch.where(seen, MOVE, NOOP)
        return torch.stack((action_types, torch.where(seen, action_params, 0)), dim=1).int().to(self.device)

    def close(self) -> None:
        """Close all simulators. Later calls to `step` and `reset` raise RuntimeError."""
        for simulation in self._simulations:
            simulation.close()
        self._simulations = []

    def _check_open(self) -> None:
        if not self._simulations:
            raise RuntimeError("the environment is closed")

    def _copy(self, buffer: Tensor) -> Tensor:
        return buffer.to(self.device, copy=True)

    def _buffers_of(self, rows: slice) -> Any:
        size = rows.stop - rows.start
        return Buffers(
            observations=self._observations[rows].numpy(),
            terminals=self._terminals[rows].numpy(),
            truncations=self._truncations[rows].numpy(),
            rewards=self._rewards[rows].numpy(),
            masks=torch.ones(size, dtype=torch.bool).numpy(),
            actions=self._simulator_actions[rows].numpy(),
            teacher_actions=torch.zeros(size, dtype=torch.int32).numpy(),
        )

    def _new_simulation(self, buffers: Any) -> Any:
        self._config.game.map_builder.seed = self._seeds.getrandbits(SEED_BITS)
        return Simulation(self._config, seed=self._seeds.getrandbits(SEED_BITS), buffers=buffers)


def _game_config(num_agents: int, map_size: int, num_mines: int, max_steps: int, num_tokens: int) -> Any:
    """The simulator's MettaGridConfig for the game described at the top."""
    take_all = handler_config.Handler(
        mutations=[handler_config.withdraw({"ore": ORE_PER_MINE}, remove_when_empty=True)]
    )
    mine = mettagrid_config.GridObjectConfig(
        name="mine", inventory=mettagrid_config.InventoryConfig(initial={"ore": ORE_PER_MINE}), on_use_handler=take_all
    )
    game = mettagrid_config.GameConfig(
        num_agents=num_agents,
        max_steps=max_steps,
        episode_truncates=True,
        resource_names=["ore"],
        objects={"wall": building.wall, "mine": mine},
        obs=mettagrid_config.ObsConfig(width=WINDOW, height=WINDOW, num_tokens=num_tokens),
        actions=mettagrid_config.ActionsConfig(change_vibe=mettagrid_config.ChangeVibeActionConfig(enabled=False)),
        agent=mettagrid_config.AgentConfig(
            rewards={"ore": reward_config.inventoryReward("ore", weight=1 / ORE_PER_MINE)}
        ),
        protocol_details_obs=False,
        map_builder=RandomMapBuilder.Config(
            agents=num_agents, width=map_size, height=map_size, border_width=1, objects={"mine": num_mines}, seed=0
        ),
    )
    return mettagrid_config.MettaGridConfig(game=game)


def _action_table(action_ids: dict[str, int]) -> Tensor:
    """int64 `[types, largest parameter + 1]`: the simulator's action id for each legal pair, noop's for others."""
    table = torch.full((len(SIMULATOR_ACTIONS), max(map(len, SIMULATOR_ACTIONS))), action_ids["noop"])
    for action_type, names in enumerate(SIMULATOR_ACTIONS):
        table[action_type, : len(names)] = torch.tensor([action_ids[name] for name in names])
    return table
