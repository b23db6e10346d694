"""The operations: tensors in, tensors out. They know nothing about agents or TensorDict."""

from metta_fastagent.ops.activations import tanh
from metta_fastagent.ops.categorical.evaluate import evaluate_actions
from metta_fastagent.ops.categorical.sample import sample_actions
from metta_fastagent.ops.conversion import action_to_logit_index, logit_index_to_action
from metta_fastagent.ops.lstm.layer import lstm_layer
from metta_fastagent.ops.lstm.stack import lstm as lstm_with_resets
from metta_fastagent.ops.ppo.advantages import advantages
from metta_fastagent.ops.ppo.loss import ppo_loss, ppo_loss_of_log_prob
from metta_fastagent.ops.products import linear, linear_layer
from metta_fastagent.ops.tensor_lists.clip import clip_weights_
from metta_fastagent.ops.tensor_lists.l2_init import l2_init_loss
from metta_fastagent.ops.tensor_lists.plans import Plan
from metta_fastagent.ops.tokens.conv2d import tokens_conv2d
from metta_fastagent.ops.tokens.grid import tokens_to_grid
from metta_fastagent.runtime.checks import BadRowError
from metta_fastagent.runtime.reports import Report, raise_if_reported

__all__ = [
    "BadRowError",
    "Plan",
    "Report",
    "action_to_logit_index",
    "advantages",
    "clip_weights_",
    "evaluate_actions",
    "l2_init_loss",
    "linear",
    "linear_layer",
    "logit_index_to_action",
    "lstm_layer",
    "lstm_with_resets",
    "ppo_loss",
    "ppo_loss_of_log_prob",
    "raise_if_reported",
    "sample_actions",
    "tanh",
    "tokens_conv2d",
    "tokens_to_grid",
]
