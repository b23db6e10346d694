"""The operations: tensors in, tensors out. They know nothing of agents or TensorDict."""

from metta_fastagent.ops._action_index import action_to_logit_index, logit_index_to_action
from metta_fastagent.ops._bad_action import raise_if_reported
from metta_fastagent.ops._checks import BadRowError
from metta_fastagent.ops._clip_weights import clip_weights_
from metta_fastagent.ops._evaluate_actions import evaluate_actions
from metta_fastagent.ops._l2_init_loss import l2_init_loss
from metta_fastagent.ops._lstm_layer import lstm_layer
from metta_fastagent.ops._sample_actions import sample_actions
from metta_fastagent.ops._tanh import tanh
from metta_fastagent.ops._tokens_conv2d import tokens_conv2d
from metta_fastagent.ops._tokens_to_grid import tokens_to_grid

__all__ = [
    "BadRowError",
    "action_to_logit_index",
    "clip_weights_",
    "evaluate_actions",
    "l2_init_loss",
    "logit_index_to_action",
    "lstm_layer",
    "raise_if_reported",
    "sample_actions",
    "tanh",
    "tokens_conv2d",
    "tokens_to_grid",
]
