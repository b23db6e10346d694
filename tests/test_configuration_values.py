"""Values from configuration files and simulators: NumPy scalars and arrays, OmegaConf nodes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from metta_fastagent import ActionSpace, Fast, MettaAgent
from metta_fastagent.train.config import TrainConfig

NAMES, LIMITS = ["noop", "move"], [0, 3]


class ReadOnly(dict):
    """A mapping from which nothing can be removed, as an OmegaConf config in struct mode."""

    def pop(self, *args):
        raise RuntimeError("read-only")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Fast(
            None, max_actions=np.int64(50), num_envs=np.int32(4), hidden_size=np.int64(16), clip_range=np.float32(1)
        ),
        lambda: Fast(SimpleNamespace(obs_width=np.int64(11), feature_normalizations={np.int64(2): np.float32(5)})),
        lambda: TrainConfig.for_environment(seed=np.int64(3), lr=np.float32(1e-3)),
        lambda: ActionSpace(np.array(NAMES), np.array(LIMITS)),
        lambda: ActionSpace(iter(NAMES), iter(LIMITS)),
    ],
)
def test_numpy_values_are_taken(make):
    make()


def test_numpy_values_work_as_python_numbers_do():
    agent = Fast(None, num_envs=np.int64(4), clip_range=np.float32(0.5), analyze_weights_interval=np.int64(2))
    host = MettaAgent(None, agent)
    host.initialize_to_environment({"hp": {"id": np.int64(3), "normalization": np.float64(2)}}, np.array(NAMES), LIMITS)
    assert host.get_original_feature_mapping() == {"hp": 3}
    td = TensorDict({"env_obs": torch.zeros(4, 5, 3, dtype=torch.uint8)}, batch_size=[4])
    td.set_non_tensor("training_env_id_start", np.int64(0))
    agent(td)
    agent.reset_env_memory(np.int64(2))
    assert not agent.lstm_h[0][:, 2].any() and agent.lstm_h[0][:, 1].any()
    agent.clip_weights()
    assert agent.maybe_compute_weight_metrics(np.int64(4)) is not None


def test_a_read_only_mapping_is_copied():
    agent, kwargs = Fast(None), ReadOnly(clip_range=0.5, hidden_size=16)
    params = agent.extract_mixin_params(kwargs)
    assert params == {"clip_range": 0.5, "analyze_weights_interval": 300, "extra_kwargs": {"hidden_size": 16}}
    assert kwargs == {"clip_range": 0.5, "hidden_size": 16}


def test_omegaconf_nodes_are_taken():
    omegaconf = pytest.importorskip("omegaconf", reason="omegaconf is not installed")
    config = omegaconf.OmegaConf.create(
        {"clip_range": 0.5, "names": NAMES, "limits": LIMITS, "features": {"hp": {"id": 1}}}
    )
    omegaconf.OmegaConf.set_struct(config, True)
    agent = Fast(None)
    params = agent.extract_mixin_params(config)
    assert params["clip_range"] == 0.5 and "names" in params["extra_kwargs"]
    agent.activate_actions(config.names, config.limits)
    host = MettaAgent(None, agent)
    host.initialize_to_environment(config.features, config.names, config.limits)
    assert host.action_space.full_action_names == ["noop_0", "move_0", "move_1", "move_2", "move_3"]
