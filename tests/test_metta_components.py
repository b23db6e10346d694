"""The adapter of examples/metta_components.py in stand-ins with the names and signatures of Metta's components."""

import copy
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from references import assert_close, random_tokens, token_grid
from tensordict import TensorDict
from torch import nn
from torch.distributions import Categorical
from torch.nn import functional as F

EXAMPLE = Path(__file__).parent.parent / "examples" / "metta_components.py"
FEATURES, WINDOW, HIDDEN, ACTIONS = 6, (11, 11), 16, 5


@pytest.fixture(scope="module")
def adapter():
    spec = importlib.util.spec_from_file_location("metta_components", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refuse(*args, **kwargs):
    raise AssertionError("the adapter should have replaced this function")


class Shim(nn.Module):
    """Tokens to a grid."""

    forward = refuse

    def __init__(self):
        super().__init__()
        self.in_key, self.out_key = "env_obs", "obs_normalizer"
        self.token_to_box_shim = SimpleNamespace(out_width=WINDOW[0], out_height=WINDOW[1], num_layers=FEATURES)
        self.observation_normalizer = nn.Module()
        self.observation_normalizer.register_buffer("obs_norm", torch.rand(1, FEATURES, 1, 1) * 9 + 1)


class Encoder(nn.Module):
    """A grid to features."""

    forward = refuse

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(in_key="obs_normalizer", out_key="encoded_obs")
        self.cnn1, self.cnn2 = nn.Conv2d(FEATURES, 8, 5, 3), nn.Conv2d(8, 8, 3)
        self.fc1, self.encoded_obs = nn.Linear(8, HIDDEN), nn.Linear(HIDDEN, HIDDEN)


class Policy(nn.Module):
    """The order of a FastPolicy's components, whose functions are looked up in the modules `actor` and `cells`."""

    def __init__(self, actor, cells):
        super().__init__()
        self.obs_shim, self.cnn_encoder = Shim(), Encoder()
        self.lstm = nn.LSTM(HIDDEN, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, ACTIONS)
        self.modules_of_components = [actor, cells]

    def forward(self, td, h, c, B, TT, action=None, resets=None):
        actor, cells = self.modules_of_components
        self.cnn_encoder(self.obs_shim(td))
        x_seq = td["encoded_obs"].view(B, TT, HIDDEN)
        output, h, c = cells.lstm_sequence_pytorch(lstm=self.lstm, x_seq=x_seq, h0_bf=h, c0_bf=c, resets=resets)
        logits = 5 * self.head(output.reshape(B * TT, HIDDEN))
        results = actor.sample_actions(logits) if action is None else actor.evaluate_actions(logits, action)
        return logits, results, (h, c)


@pytest.fixture
def policy(adapter):
    torch.manual_seed(3)
    actor = SimpleNamespace(sample_actions=refuse, evaluate_actions=refuse)
    cells = SimpleNamespace(lstm_sequence_pytorch=refuse)
    policy = Policy(actor, cells)
    adapter.install(policy, actor, cells)
    return policy


def by_hand(policy, tokens, h, c, resets):
    """Logits [B * TT, ACTIONS] in float64: the grid token by token, and one LSTM step after the other."""
    policy, (B, TT) = copy.deepcopy(policy).double(), resets.shape
    encoder, scale = policy.cnn_encoder, policy.obs_shim.observation_normalizer.obs_norm.flatten()
    x = F.relu(encoder.cnn1(token_grid(tokens, scale, *WINDOW, "yx")))
    x = F.relu(encoder.encoded_obs(F.relu(encoder.fc1(F.relu(encoder.cnn2(x)).flatten(1))))).view(B, TT, HIDDEN)
    state, outputs = (h.double().transpose(0, 1), c.double().transpose(0, 1)), []
    for t in range(TT):
        state = tuple(torch.where(resets[:, t].bool().view(1, B, 1), 0.0, part) for part in state)
        output, state = policy.lstm(x[:, t : t + 1], tuple(part.contiguous() for part in state))
        outputs.append(output[:, 0])
    return 5 * policy.head(torch.stack(outputs, 1).flatten(0, 1))


def inputs_of(B, TT):
    tokens, (h, c) = random_tokens(B * TT, 60, FEATURES, *WINDOW, "yx"), torch.randn(2, B, 1, HIDDEN)
    return tokens, h, c, torch.rand(B, TT) < 0.3


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_training(policy, dtype):
    tokens, h, c, resets = inputs_of(4, 6)
    expected = by_hand(policy, tokens, h, c, resets)
    action = torch.randint(ACTIONS, (24,))
    td = TensorDict({"env_obs": tokens}, batch_size=[24])
    logits, (log_prob, entropy, full), _ = policy(td, h, c, 4, 6, action, resets.to(dtype))
    distribution = Categorical(logits=expected)
    for got, want in (
        (logits, expected),
        (log_prob, distribution.log_prob(action)),
        (entropy, distribution.entropy()),
        (full, expected.log_softmax(-1)),
    ):
        assert_close(got, want, torch.float32, of_sums=True)
    (log_prob.exp().mean() + entropy.mean()).backward()
    assert all(param.grad is not None and param.grad.any() for param in policy.parameters())


def test_a_rollout_step_draws_actions_of_its_distribution(policy):
    tokens, h, c, resets = inputs_of(500, 1)
    tokens, h, c = (tensor[:1].expand_as(tensor).contiguous() for tensor in (tokens, h, c))
    td = TensorDict({"env_obs": tokens}, batch_size=[500])
    with torch.no_grad():
        logits, (action, log_prob, entropy, full), _ = policy(td, h, c, 500, 1, None, torch.zeros_like(resets))
        distribution = Categorical(logits=logits.double())
    assert (action.dtype, action.shape) == (torch.int64, (500,))
    torch.testing.assert_close(log_prob.double(), distribution.log_prob(action), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), distribution.entropy(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(full.double(), distribution.logits, rtol=1e-5, atol=1e-5)
    # Five standard deviations of each count.
    probs = distribution.probs[0]
    counts = torch.bincount(action, minlength=ACTIONS).double()
    assert ((counts - 500 * probs).abs() <= 5 * (500 * probs * (1 - probs)).sqrt() + 1e-6).all()


def test_a_copy_of_the_adapted_policy_has_weights_of_its_own(policy):
    td = TensorDict({"env_obs": inputs_of(2, 3)[0]}, batch_size=[6])
    other = copy.deepcopy(policy)
    with torch.no_grad():
        policy.cnn_encoder.cnn1.bias.add_(1)
        changed, kept = (each.cnn_encoder(each.obs_shim(td.copy()))["encoded_obs"] for each in (policy, other))
    assert not torch.equal(changed, kept)


def test_resets_in_training_make_the_ratio_one(adapter):
    without, with_resets = adapter.importance_ratios()
    assert without.max() > 1.5 and without.min() < 0.6
    torch.testing.assert_close(with_resets, torch.ones_like(with_resets), rtol=0, atol=1e-12)


def test_the_adapter_takes_forty_lines_at_most():
    code = EXAMPLE.read_text().split('"""', 2)[2]
    adapter = code[: code.index("def importance_ratios")]
    assert len([line for line in adapter.splitlines() if line.strip()]) <= 40
