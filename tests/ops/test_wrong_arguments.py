"""Wrong types, dtypes, shapes and devices: each error names the argument, then what came, then what was expected."""

import re

import pytest
import torch
from references import CUM_MAX_PARAMS, PAIRS
from torch.utils._pytree import tree_map_only

from metta_fastagent import ops

T, V = TypeError, ValueError
LOGITS, INDEX, MASK = torch.zeros(3, 6), torch.tensor([0, 1, 2]), torch.ones(3, 6, dtype=torch.bool)
PAIR, TABLE = PAIRS[:3], CUM_MAX_PARAMS
ONES = torch.ones(2)
# Of a rollout.
STEPS, FLAGS = torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.bool)
# lstm_layer's
P, W, S, R = torch.zeros(3, 2, 8), torch.zeros(8, 2), torch.zeros(2, 2), torch.zeros(3, 2, dtype=torch.bool)
# Those of tokens_to_grid and tokens_conv2d.
TOKENS, SCALE = torch.zeros(3, 20, 3, dtype=torch.uint8), torch.ones(5)
WEIGHT, BIAS = torch.zeros(6, 5, 3, 4), torch.zeros(6)


def meta(tensor):
    return tensor.to("meta")


def evaluate(logits=LOGITS, actions=PAIR, table=TABLE, mask=None, temperature=1.0):
    return ops.evaluate_actions(logits, actions, table, mask, temperature, strict=True)


def sample(logits=LOGITS, table=PAIRS, generator=None, mask=None, temperature=1.0):
    return ops.sample_actions(logits, table, generator, mask, temperature)


def gae(
    rewards=STEPS, values=STEPS, ends=FLAGS, next_value=STEPS[:, 0], bootstrap_values=STEPS, gamma=0.9, lam=0.8,
    valid=None, ratios=None, rho_clip=1.0, c_clip=1.0,
):  # fmt: skip
    rollout = rewards, values, ends, next_value, bootstrap_values
    return ops.advantages(*rollout, gamma, lam, valid=valid, ratios=ratios, rho_clip=rho_clip, c_clip=c_clip)


def ppo(
    logits=LOGITS, actions=PAIR, value=STEPS[:, 0], old_log_prob=STEPS[:, 0], old_value=STEPS[:, 0],
    advantages=STEPS[:, 0], returns=STEPS[:, 0], table=TABLE, valid=None, count=None, mask=None, temperature=1.0,
    clip_coef=0.2, vf_clip_coef=0.0, vf_coef=0.5, ent_coef=0.01,
):  # fmt: skip
    return ops.ppo_loss(
        logits, actions, value, old_log_prob, old_value, advantages, returns, table, valid=valid, count=count,
        mask=mask, temperature=temperature, clip_coef=clip_coef, vf_clip_coef=vf_clip_coef, vf_coef=vf_coef,
        ent_coef=ent_coef,
    )  # fmt: skip


def layer(projected=P, weight_hh=W, h=S, c=S, resets=R):
    return ops.lstm_layer(projected, weight_hh, h, c, resets)


def grid(tokens=TOKENS, num_features=5, width=11, height=11, scale=SCALE, dtype=torch.float32, coordinates="xy"):
    return ops.tokens_to_grid(tokens, num_features, width, height, scale, dtype, coordinates)


def conv(
    tokens=TOKENS, weight=WEIGHT, bias=BIAS, scale=SCALE, width=11, height=11, stride=1, relu=False, coordinates="xy"
):
    return ops.tokens_conv2d(tokens, weight, bias, scale, width, height, stride, relu, coordinates)


def to_index(actions=PAIR, table=TABLE):
    return ops.action_to_logit_index(actions, table)


def to_pair(index=INDEX, table=PAIRS):
    return ops.logit_index_to_action(index, table)


def l2(params=(ONES,), initial=(ONES,), scale=1.0):
    return ops.l2_init_loss(params, initial, scale)


def clip(tensors=(ONES, ONES), bounds=(1.0, 1.0)):
    return ops.clip_weights_(tensors, bounds)


# (operation, wrong arguments, error, argument, what came, what was expected)
MASKS_AND_TEMPERATURES = [
    ({"mask": MASK.int()}, T, "mask", "an int32 tensor of shape [3, 6]", "a bool tensor of shape [3, 6] on {device}"),
    ({"mask": MASK[:, :5]}, V, "mask", "shape [3, 5]", "a bool tensor of shape [3, 6]"),
    ({"mask": MASK[:1]}, V, "mask", "shape [1, 6]", "a bool tensor of shape [3, 6]"),
    ({"mask": meta(MASK)}, V, "mask", "on meta", "on {device}"),
    ({"mask": [MASK, MASK]}, T, "mask", "a list of length 2", "a bool tensor or a pair of them"),
    ({"mask": (MASK, MASK, MASK)}, T, "mask", "a tuple of length 3", "a bool tensor or a pair of them"),
    ({"mask": (MASK[:, :3].int(), MASK)}, T, "mask[0]", "an int32 tensor", "a bool tensor"),
    ({"mask": (MASK[:, :2], MASK)}, V, "mask[0]", "shape [3, 2]", ""),
    ({"mask": (MASK[:, :3], MASK[:, :2])}, V, "mask[1]", "shape [3, 2]", "at least 3 columns"),
    ({"temperature": 0}, V, "temperature", "0", "a finite number > 0"),
    ({"temperature": -0.5}, V, "temperature", "-0.5", "a finite number > 0"),
    ({"temperature": torch.inf}, V, "temperature", "inf", "a finite number > 0"),
    ({"temperature": torch.nan}, V, "temperature", "nan", "a finite number > 0"),
    ({"temperature": "hot"}, T, "temperature", "'hot' (str)", "a finite number > 0"),
    ({"temperature": True}, T, "temperature", "True (bool)", "a finite number > 0"),
    ({"temperature": ONES}, V, "temperature", "a float32 tensor of shape [2]", "one such number"),
    ({"temperature": ONES[0].long()}, T, "temperature", "an int64 tensor", "one such number"),
    (
        {"temperature": torch.ones((), requires_grad=True)},
        V,
        "temperature",
        "that requires a gradient",
        "without a grad",
    ),
    ({"temperature": meta(ONES[0])}, V, "temperature", "on meta", "on {device}"),
]
ROWS = [
    (evaluate, {"logits": [[0.0]]}, T, "logits", "list", "floating-point tensor"),
    (evaluate, {"logits": LOGITS.numpy()}, T, "logits", "a NumPy array of float32 and shape [3, 6]", "floating-point"),
    (evaluate, {"logits": LOGITS.long()}, T, "logits", "int64", "floating-point tensor"),
    (evaluate, {"logits": LOGITS.cfloat()}, T, "logits", "complex64", "floating-point tensor"),
    (evaluate, {"logits": LOGITS[0]}, V, "logits", "shape [6]", "[N, A]"),
    (evaluate, {"logits": LOGITS[None]}, V, "logits", "shape [1, 3, 6]", "[N, A]"),
    (evaluate, {"logits": LOGITS[:, :0]}, V, "logits", "shape [3, 0]", "A >= 1"),
    (evaluate, {"actions": 1, "table": None}, T, "actions", "1 (int)", "[3]"),
    (evaluate, {"actions": INDEX.float(), "table": None}, T, "actions", "float32", "integer tensor of shape [3]"),
    (evaluate, {"actions": INDEX.bool(), "table": None}, T, "actions", "bool", "integer tensor of shape [3]"),
    (evaluate, {"actions": INDEX[:2], "table": None}, V, "actions", "shape [2]", "[3]"),
    (evaluate, {"actions": PAIR, "table": None}, V, "actions", "shape [3, 2]", "[3]"),
    (evaluate, {"actions": meta(INDEX), "table": None}, V, "actions", "on meta", "logits ({device})"),
    (evaluate, {"logits": meta(LOGITS)}, V, "actions", "on {device}", "logits (meta)"),
    (evaluate, {"actions": INDEX}, V, "actions", "shape [3]", "[..., 2]"),
    (evaluate, {"actions": PAIR[:2]}, V, "actions", "shape [2, 2]", "[3, 2]"),
    (evaluate, {"actions": PAIR[None]}, V, "actions", "shape [1, 3, 2]", "[3, 2]"),
    (evaluate, {"table": TABLE.int()}, T, "cum_action_max_params", "int32", "int64 tensor"),
    (
        evaluate,
        {"actions": INDEX, "table": None, "mask": (MASK, MASK)},
        V,
        "mask",
        "a pair of masks without an action",
        "",
    ),
    (sample, {"table": None, "mask": (MASK, MASK)}, V, "mask", "a pair of masks without an action table", ""),
    (sample, {"logits": None}, T, "logits", "None", "floating-point tensor"),
    (sample, {"logits": LOGITS.int()}, T, "logits", "int32", "floating-point tensor"),
    (sample, {"logits": LOGITS[0]}, V, "logits", "shape [6]", "[N, A]"),
    (sample, {"logits": LOGITS[:, :5]}, V, "logits", "shape [3, 5]", "6 columns"),
    (sample, {"table": PAIRS[:4]}, V, "logits", "shape [3, 6]", "4 columns"),
    (sample, {"logits": meta(LOGITS)}, V, "logits", "on meta", "action_index_tensor ({device})"),
    (sample, {"table": PAIRS.tolist()}, T, "action_index_tensor", "list", "[num_actions, 2]"),
    (sample, {"table": PAIRS.float()}, T, "action_index_tensor", "float32", "int32"),
    (sample, {"table": PAIRS.T}, V, "action_index_tensor", "shape [2, 6]", "[num_actions, 2]"),
    (sample, {"generator": 3}, T, "generator", "3 (int)", "torch.Generator"),
    *((operation, *row) for operation in (evaluate, sample, ppo) for row in MASKS_AND_TEMPERATURES),
    (to_index, {"actions": [[0, 0]]}, T, "actions", "list", "integer tensor"),
    (to_index, {"actions": PAIR.float()}, T, "actions", "float32", "integer tensor"),
    (to_index, {"actions": PAIR.bool()}, T, "actions", "bool", "integer tensor"),
    (to_index, {"actions": PAIRS[:, 0]}, V, "actions", "shape [6]", "[..., 2]"),
    (to_index, {"actions": PAIRS[0, 0]}, V, "actions", "shape []", "[..., 2]"),
    (to_index, {"actions": meta(PAIR)}, V, "actions", "on meta", "cum_action_max_params ({device})"),
    (to_index, {"table": [0, 1, 1, 3]}, T, "cum_action_max_params", "list", "int64 tensor"),
    (to_index, {"table": TABLE.int()}, T, "cum_action_max_params", "int32", "int64 tensor"),
    (to_index, {"table": TABLE[:1]}, V, "cum_action_max_params", "shape [1]", "[action types + 1]"),
    (to_index, {"table": TABLE[None]}, V, "cum_action_max_params", "shape [1, 4]", "[action types + 1]"),
    (to_pair, {"index": 3}, T, "index", "3 (int)", "integer tensor"),
    (to_pair, {"index": ONES}, T, "index", "float32", "integer tensor"),
    (to_pair, {"index": ONES.bool()}, T, "index", "bool", "integer tensor"),
    (to_pair, {"index": meta(INDEX)}, V, "index", "on meta", "({device})"),
    (to_pair, {"table": None}, T, "action_index_tensor", "None", "[num_actions, 2]"),
    (to_pair, {"table": PAIRS.float()}, T, "action_index_tensor", "float32", "int32"),
    (to_pair, {"table": PAIRS[0]}, V, "action_index_tensor", "shape [2]", "[num_actions, 2]"),
    (to_pair, {"table": PAIRS.T}, V, "action_index_tensor", "shape [2, 6]", "[num_actions, 2]"),
    (to_pair, {"table": PAIRS[:0]}, V, "action_index_tensor", "shape [0, 2]", "[num_actions, 2]"),
    (clip, {"tensors": ONES}, T, "tensors", "a float32 tensor of shape [2]", "a list of tensors"),
    (clip, {"tensors": iter([ONES])}, T, "tensors", "(list_iterator)", "a list of tensors"),
    (clip, {"bounds": 1.0}, T, "bounds", "1.0 (float)", "a list of numbers, one for each tensor"),
    (l2, {"params": ONES}, T, "params", "a float32 tensor of shape [2]", "a list of tensors"),
    (l2, {"initial": ONES}, T, "initial", "a float32 tensor of shape [2]", "a list of tensors, one for each of params"),
    (clip, {"bounds": [1.0]}, V, "bounds", "1 values", "2"),
    (clip, {"bounds": [1.0] * 3}, V, "bounds", "3 values", "2"),
    (clip, {"tensors": [], "bounds": [1.0]}, V, "bounds", "1 values", "0"),
    (clip, {"bounds": [1.0, -0.5]}, V, "bounds[1]", "-0.5", ">= 0"),
    (clip, {"bounds": [1.0, torch.nan]}, V, "bounds[1]", "nan", ">= 0"),
    (clip, {"bounds": [1.0, -torch.inf]}, V, "bounds[1]", "-inf", ">= 0"),
    (clip, {"bounds": [1.0, "x"]}, T, "bounds[1]", "'x'", ">= 0"),
    (clip, {"bounds": [1.0, True]}, T, "bounds[1]", "True", ">= 0"),
    (clip, {"bounds": [1.0, None]}, T, "bounds[1]", "None", ">= 0"),
    (clip, {"tensors": [ONES, ONES.int()]}, T, "tensors[1]", "int32", "floating-point"),
    (clip, {"tensors": [ONES, ONES.cfloat()]}, T, "tensors[1]", "complex64", "floating-point"),
    (clip, {"tensors": [ONES, [1.0, 2.0]]}, T, "tensors[1]", "list", "floating-point"),
    (clip, {"tensors": [ONES, None]}, T, "tensors[1]", "None", "floating-point"),
    (l2, {"initial": []}, V, "initial", "0 tensors", "1"),
    (l2, {"params": []}, V, "initial", "1 tensors", "0"),
    (l2, {"params": [ONES, ONES], "initial": [ONES, ONES[:1]]}, V, "initial[1]", "shape [1]", "same shape"),
    (l2, {"initial": [ONES[:, None]]}, V, "initial[0]", "shape [2, 1]", "same shape"),
    (l2, {"initial": [meta(ONES)]}, V, "initial[0]", "on meta", "on {device}"),
    (l2, {"params": [ONES, meta(ONES)], "initial": [ONES, meta(ONES)]}, V, "initial[1]", "on meta", "on {device}"),
    (l2, {"params": [ONES, ONES.int()], "initial": [ONES, ONES]}, T, "params[1]", "int32", "floating-point"),
    (l2, {"params": [ONES.cfloat()]}, T, "params[0]", "complex64", "floating-point"),
    (l2, {"params": [1.0]}, T, "params[0]", "1.0 (float)", "tensor"),
    (l2, {"initial": [None]}, T, "initial[0]", "None", "tensor"),
    (l2, {"scale": "x"}, T, "scale", "'x'", "number"),
    (l2, {"scale": None}, T, "scale", "None", "number"),
    (gae, {"values": None}, T, "values", "None", "[B, T]"),
    (gae, {"values": STEPS.int()}, T, "values", "int32", "floating-point"),
    (gae, {"values": STEPS[0]}, V, "values", "shape [4]", "[B, T]"),
    (gae, {"values": STEPS[:, :0]}, V, "values", "shape [3, 0]", "T >= 1"),
    (gae, {"rewards": [1.0]}, T, "rewards", "list", "a float32 tensor of shape [3, 4]"),
    (gae, {"rewards": STEPS.double()}, T, "rewards", "float64", "a float32 tensor"),
    (gae, {"rewards": STEPS.t()}, V, "rewards", "shape [4, 3]", "shape [3, 4]"),
    (gae, {"rewards": meta(STEPS)}, V, "rewards", "on meta", "on {device}"),
    (gae, {"ends": STEPS}, T, "ends", "float32", "a bool tensor of shape [3, 4]"),
    (gae, {"ends": FLAGS[:2]}, V, "ends", "shape [2, 4]", "shape [3, 4]"),
    (gae, {"next_value": STEPS[:, :1]}, V, "next_value", "shape [3, 1]", "shape [3]"),
    (gae, {"next_value": 0.0}, T, "next_value", "0.0 (float)", "a float32 tensor"),
    (gae, {"bootstrap_values": None}, T, "bootstrap_values", "None", "a float32 tensor"),
    (gae, {"bootstrap_values": STEPS[:, :3]}, V, "bootstrap_values", "shape [3, 3]", "shape [3, 4]"),
    (gae, {"valid": STEPS}, T, "valid", "float32", "a bool tensor"),
    (gae, {"valid": FLAGS[:, 0]}, V, "valid", "shape [3]", "shape [3, 4]"),
    (gae, {"ratios": FLAGS}, T, "ratios", "bool", "a float32 tensor"),
    (gae, {"ratios": meta(STEPS)}, V, "ratios", "on meta", "on {device}"),
    (gae, {"gamma": 1.01}, V, "gamma", "1.01", "a number from 0 to 1"),
    (gae, {"gamma": torch.nan}, V, "gamma", "nan", "a number from 0 to 1"),
    (gae, {"gamma": ONES[0]}, T, "gamma", "a float32 tensor", "a number from 0 to 1"),
    (gae, {"lam": -0.1}, V, "lam", "-0.1", "a number from 0 to 1"),
    (gae, {"lam": "x"}, T, "lam", "'x'", "a number from 0 to 1"),
    (gae, {"rho_clip": -1}, V, "rho_clip", "-1", "a number >= 0"),
    (gae, {"c_clip": None}, T, "c_clip", "None", "a number >= 0"),
    (ppo, {"logits": None}, T, "logits", "None", "[N, A]"),
    (ppo, {"logits": LOGITS.long()}, T, "logits", "int64", "floating-point tensor"),
    (ppo, {"logits": LOGITS[0]}, V, "logits", "shape [6]", "[N, A]"),
    (ppo, {"actions": PAIR.float()}, T, "actions", "float32", "integer"),
    (ppo, {"actions": PAIR[:2]}, V, "actions", "shape [2, 2]", "a pair for each of 3 rows"),
    (ppo, {"actions": INDEX}, V, "actions", "shape [3]", "[..., 2]"),
    (ppo, {"actions": PAIR, "table": None}, V, "actions", "shape [3, 2]", "an integer for each of 3 rows"),
    (ppo, {"actions": INDEX.bool(), "table": None}, T, "actions", "bool", "an integer for each of 3 rows"),
    (ppo, {"actions": meta(INDEX), "table": None}, V, "actions", "on meta", "logits ({device})"),
    (ppo, {"table": TABLE.int()}, T, "cum_action_max_params", "int32", "int64 tensor"),
    *(
        row
        for name in ("value", "old_log_prob", "old_value", "advantages", "returns")
        for row in (
            (ppo, {name: None}, T, name, "None", "a floating-point tensor with 3 elements, one for each row"),
            (ppo, {name: INDEX}, T, name, "int64", "a floating-point tensor with 3 elements"),
            (ppo, {name: STEPS}, V, name, "shape [3, 4]", "3 elements"),
            (ppo, {name: meta(STEPS[:, 0])}, V, name, "on meta", "logits ({device})"),
        )
    ),
    (ppo, {"valid": INDEX}, T, "valid", "int64", "a bool tensor with 3 elements"),
    (ppo, {"valid": FLAGS}, V, "valid", "shape [3, 4]", "3 elements"),
    (ppo, {"valid": meta(FLAGS[:, 0])}, V, "valid", "on meta", "logits ({device})"),
    (ppo, {"count": 3}, T, "count", "3 (int)", "a floating-point tensor with one element"),
    (ppo, {"count": INDEX[0]}, T, "count", "int64", "a floating-point tensor with one element"),
    (ppo, {"count": ONES}, V, "count", "shape [2]", "one element"),
    (ppo, {"count": meta(ONES[0])}, V, "count", "on meta", "logits ({device})"),
    (ppo, {"clip_coef": -0.1}, V, "clip_coef", "-0.1", "a number >= 0"),
    (ppo, {"clip_coef": torch.nan}, V, "clip_coef", "nan", "a number >= 0"),
    (ppo, {"vf_clip_coef": None}, T, "vf_clip_coef", "None", "a number >= 0"),
    (ppo, {"vf_coef": "x"}, T, "vf_coef", "'x'", "a number"),
    (ppo, {"ent_coef": ONES[0]}, T, "ent_coef", "a float32 tensor", "a number"),
    (layer, {"projected": None}, T, "projected", "None", "[T, B, 4H]"),
    (layer, {"projected": P.int()}, T, "projected", "int32", "[T, B, 4H]"),
    (layer, {"projected": P.to(torch.float8_e5m2)}, T, "projected", "float8_e5m2", "float32, float64"),
    (layer, {"projected": P[0]}, V, "projected", "shape [2, 8]", "[T, B, 4H]"),
    (layer, {"projected": P[:0]}, V, "projected", "shape [0, 2, 8]", "T >= 1"),
    (layer, {"projected": P[..., :6]}, V, "projected", "shape [3, 2, 6]", "4H"),
    (layer, {"projected": P[..., :0]}, V, "projected", "shape [3, 2, 0]", "H >= 1"),
    (layer, {"weight_hh": [1.0]}, T, "weight_hh", "a list", "shape [8, 2]"),
    (layer, {"weight_hh": W.double()}, T, "weight_hh", "float64", "float32"),
    (layer, {"weight_hh": W.t()}, V, "weight_hh", "shape [2, 8]", "shape [8, 2]"),
    (layer, {"weight_hh": meta(W)}, V, "weight_hh", "on meta", "{device}"),
    (layer, {"h": None}, T, "h", "None", "shape [2, 2]"),
    (layer, {"h": S.half()}, T, "h", "float16", "float32"),
    (layer, {"h": S.unsqueeze(0)}, V, "h", "shape [1, 2, 2]", "shape [2, 2]"),
    (layer, {"h": meta(S)}, V, "h", "on meta", "{device}"),
    (layer, {"c": 0.0}, T, "c", "0.0", "shape [2, 2]"),
    (layer, {"c": S.long()}, T, "c", "int64", "float32"),
    (layer, {"c": S[:1]}, V, "c", "shape [1, 2]", "shape [2, 2]"),
    (layer, {"c": meta(S)}, V, "c", "on meta", "{device}"),
    (layer, {"resets": True}, T, "resets", "True", "bool tensor of shape [3, 2]"),
    (layer, {"resets": R.float()}, T, "resets", "float32", "bool tensor of shape [3, 2]"),
    (layer, {"resets": R.t()}, V, "resets", "shape [2, 3]", "shape [3, 2]"),
    (layer, {"resets": meta(R)}, V, "resets", "on meta", "{device}"),
    (grid, {"tokens": TOKENS.tolist()}, T, "tokens", "list", "uint8"),
    (grid, {"tokens": TOKENS.int()}, T, "tokens", "int32", "uint8"),
    (grid, {"tokens": TOKENS[0]}, V, "tokens", "shape [20, 3]", "[N, M, 3]"),
    (grid, {"tokens": TOKENS[..., :2]}, V, "tokens", "shape [3, 20, 2]", "[N, M, 3]"),
    (grid, {"tokens": TOKENS[None]}, V, "tokens", "shape [1, 3, 20, 3]", "[N, M, 3]"),
    (grid, {"num_features": 0}, V, "num_features", "0", "1 to 256"),
    (grid, {"num_features": 257}, V, "num_features", "257", "1 to 256"),
    (grid, {"num_features": 5.0}, T, "num_features", "5.0", "1 to 256"),
    (grid, {"num_features": "5"}, T, "num_features", "'5'", "1 to 256"),
    (grid, {"num_features": True, "scale": SCALE[:1]}, T, "num_features", "True", "1 to 256"),
    (grid, {"width": 0}, V, "width", "0", "1 to 16"),
    (grid, {"width": 17}, V, "width", "17", "1 to 16"),
    (grid, {"width": 1.5}, T, "width", "1.5", "1 to 16"),
    (grid, {"height": -1}, V, "height", "-1", "1 to 16"),
    (grid, {"height": None}, T, "height", "None", "1 to 16"),
    (grid, {"scale": None}, T, "scale", "None", "[5]"),
    (grid, {"scale": SCALE.int()}, V, "scale", "int32", "floating-point"),
    (grid, {"scale": SCALE[:4]}, V, "scale", "shape [4]", "[5]"),
    (grid, {"scale": SCALE[:, None]}, V, "scale", "shape [5, 1]", "[5]"),
    (grid, {"scale": meta(SCALE)}, V, "scale", "on meta", "tokens ({device})"),
    (grid, {"dtype": torch.uint8}, T, "dtype", "torch.uint8", "floating-point"),
    (grid, {"dtype": "float32"}, T, "dtype", "'float32'", "floating-point"),
    (grid, {"dtype": None}, T, "dtype", "None", "floating-point"),
    (grid, {"coordinates": "YX"}, V, "coordinates", "'YX'", "'xy' or 'yx'"),
    (grid, {"coordinates": None}, T, "coordinates", "None", "'xy' or 'yx'"),
    (conv, {"coordinates": "zx"}, V, "coordinates", "'zx'", "'xy' or 'yx'"),
    (conv, {"tokens": TOKENS.int()}, T, "tokens", "int32", "uint8"),
    (conv, {"tokens": TOKENS[0]}, V, "tokens", "shape [20, 3]", "[N, M, 3]"),
    (conv, {"weight": None}, T, "weight", "None", "floating-point"),
    (conv, {"weight": WEIGHT.int()}, T, "weight", "int32", "floating-point"),
    (conv, {"weight": WEIGHT[0]}, V, "weight", "shape [5, 3, 4]", "[O, L, kernel_x, kernel_y]"),
    (conv, {"weight": WEIGHT[:0]}, V, "weight", "shape [0, 5, 3, 4]", "[O, L, kernel_x, kernel_y]"),
    (conv, {"weight": torch.ones(1, 257, 1, 1)}, V, "weight", "shape [1, 257, 1, 1]", "at most 256"),
    (conv, {"weight": meta(WEIGHT)}, V, "weight", "on meta", "tokens ({device})"),
    (conv, {"bias": 1.0}, T, "bias", "1.0", "floating-point"),
    (conv, {"bias": BIAS[:5]}, V, "bias", "shape [5]", "a float32 tensor of shape [6]"),
    (conv, {"bias": BIAS.double()}, V, "bias", "float64", "a float32 tensor of shape [6]"),
    (conv, {"bias": meta(BIAS)}, V, "bias", "on meta", "tokens ({device})"),
    (conv, {"scale": None}, T, "scale", "None", "[5]"),
    (conv, {"scale": SCALE.int()}, V, "scale", "int32", "floating-point"),
    (conv, {"scale": SCALE[:4]}, V, "scale", "shape [4]", "[5]"),
    (conv, {"scale": meta(SCALE)}, V, "scale", "on meta", "tokens ({device})"),
    (conv, {"width": 2}, V, "width", "2", "3 to 16"),
    (conv, {"width": 17}, V, "width", "17", "3 to 16"),
    (conv, {"width": 11.0}, T, "width", "11.0", "3 to 16"),
    (conv, {"height": 3}, V, "height", "3", "4 to 16"),
    (conv, {"height": None}, T, "height", "None", "4 to 16"),
    (conv, {"stride": 0}, V, "stride", "0", "1 to"),
    (conv, {"stride": (1, 1)}, T, "stride", "tuple", "integer"),
    (conv, {"stride": True}, T, "stride", "True", "integer"),
    (conv, {"relu": 1}, T, "relu", "1 (int)", "True or False"),
    (ops.tanh, {"x": [1.0]}, T, "x", "list", "floating-point"),
    (ops.tanh, {"x": ONES.int()}, T, "x", "int32", "floating-point"),
    (ops.tanh, {"x": None}, T, "x", "None", "floating-point"),
]


def name_of(row):
    operation, _, _, argument, came, _ = row
    return f"{operation.__name__}-{argument}-{came}"


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_wrong_arguments(row, device):
    operation, wrong, error, argument, came, expected = row
    arguments = dict(zip(operation.__code__.co_varnames, operation.__defaults__ or (), strict=False)) | wrong
    arguments = tree_map_only(torch.Tensor, lambda x: x if x.device.type == "meta" else x.to(device), arguments)
    place = str(torch.empty(0, device=device).device)
    came, expected = (re.escape(text.replace("{device}", place)) for text in (came, expected))
    with pytest.raises(error, match=rf"^{re.escape(argument)}: .*{came}.*expected.*{expected}"):
        operation(**arguments)
