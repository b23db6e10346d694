"""Draws from categorical logits, with their log-probability and entropy."""

import pytest
import torch
from references import DTYPES, LAYOUTS, PAIRS, check_categorical, refuses

from metta_fastagent.ops import sample_actions

SHAPES = [(0, 9), (1, 1), (7, 1), (1, 5), (3, 2), (33, 9), (129, 9), (13, 21), (5, 32), (9, 33), (2, 5000)]
SUBSETS = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]


def generators(device, seed=5):
    """The default generator, seeded, and an explicit one."""
    torch.manual_seed(seed)
    return {"manual_seed": None, "generator": torch.Generator(device).manual_seed(seed)}


explicitly = pytest.mark.parametrize("source", ["manual_seed", "generator"])


def default_state(device):
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, device):
    index, _ = check_categorical(sample_actions, torch.randn(shape).to(device, dtype))
    assert (index.shape, index.dtype, index.requires_grad) == (shape[:1], torch.int64, False)
    assert ((index >= 0) & (index < shape[1])).all()


@pytest.mark.parametrize("subset", SUBSETS, ids=str)
def test_gradients_of_some_outputs(subset, device):
    check_categorical(sample_actions, torch.randn(13, 9, device=device), subset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e4, 1e-30])
def test_extreme_logits(scale, dtype, device):
    check_categorical(sample_actions, torch.randn(33, 9).to(device, dtype) * scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_largest_finite_logits(dtype, device):
    logits = torch.full((64, 9), -torch.finfo(dtype).max, dtype=dtype, device=device)
    logits[:, 3] = torch.finfo(dtype).max
    index, log_prob, entropy, _ = sample_actions(logits)
    assert (index == 3).all()
    assert (log_prob == 0).all()
    assert (entropy == 0).all()


@explicitly
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("actions", [1, 5, 33, 300])
def test_draws_belong_to_the_random_numbers(actions, dtype, source, backend, device):
    logits = (3 * torch.randn(100, actions)).to(device, dtype)
    compute = torch.promote_types(dtype, torch.float32)
    generator = generators(device)[source]
    drawn = [sample_actions(logits, generator=generator)[0].cpu() for _ in range(2)]
    state = default_state(device)
    generator = generators(device)[source]
    for index in drawn:
        if backend == "eager":
            probs = torch.log_softmax(logits.to(compute), dim=-1).exp()
            assert torch.equal(index, torch.multinomial(probs, 1, generator=generator).view(-1))
            continue
        # The inverse of the cumulative distribution, up to rounding.
        uniform = torch.rand(100, dtype=compute, device=device, generator=generator).cpu()
        ends = torch.cat([torch.zeros(100, 1), logits.cpu().double().softmax(-1).cumsum(-1)], dim=-1)
        row, slack = torch.arange(100), 1e-14 if dtype == torch.float64 else 1e-6
        assert (ends[row, index] <= uniform + slack).all()
        assert (uniform <= ends[row, index + 1] + slack).all()
    assert torch.equal(default_state(device), state)


@explicitly
def test_seeds_reproduce_and_differ(source, device):
    logits = torch.zeros(200, 9, device=device)
    first, again, other = (sample_actions(logits, generator=generators(device, seed)[source])[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_generator_leaves_the_default_one_alone(device):
    before = default_state(device)
    sample_actions(torch.zeros(20, 9, device=device), generator=torch.Generator(device).manual_seed(0))
    assert torch.equal(before, default_state(device))


# Actions that may be drawn: all but the first, the last or both; one; every second.
@pytest.mark.parametrize("allowed", [slice(1, None), slice(-1), slice(1, -1), slice(1), slice(-1, None), slice(1, 2),
                                     slice(0, None, 2)], ids=str)  # fmt: skip
@pytest.mark.parametrize("actions", [3, 9, 32, 100])
def test_never_a_forbidden_action(actions, allowed, device, monkeypatch):
    rows = 130 if actions < 33 else 16
    logits = torch.full((rows, actions), -torch.inf)
    logits[:, allowed] = 20 * torch.randn_like(logits[:, allowed])
    logits = logits.to(device)
    check_categorical(sample_actions, logits)
    # The smallest and the largest uniform number, and one that vanishes.
    for number in (0.0, 1e-38, 1 - 2**-24):
        monkeypatch.setattr(
            torch, "rand", lambda n, number=number, **options: torch.full((n,), number, **keep(options))
        )
        index = sample_actions(logits)[0]
        assert logits.gather(1, index.unsqueeze(1)).isfinite().all()


def keep(options):
    return {key: value for key, value in options.items() if key != "generator"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_allowed_action_is_drawn_and_none_of_probability_zero(dtype, device):
    logits = torch.tensor([-200.0, 0.0, -torch.inf, 0.0, -200.0], dtype=dtype, device=device).expand(2048, 5)
    assert sample_actions(logits)[0].unique().tolist() == [1, 3]


# Values of chi-squared that a right sampler exceeds with probability 1e-4, by degrees of freedom.
@pytest.mark.parametrize(("degrees", "limit", "rows"), [(4, 23.51, 20_000), (8, 31.83, 20_000), (32, 70.57, 3_000)])
@explicitly
def test_chi_squared(degrees, limit, rows, source, device):
    logits = torch.linspace(-1.5, 1.5, degrees + 1)
    index = sample_actions(logits.to(device).expand(rows, -1), generator=generators(device)[source])[0]
    expected = rows * logits.double().softmax(-1)
    counts = torch.bincount(index.cpu(), minlength=degrees + 1)
    assert ((counts - expected) ** 2 / expected).sum() < limit


def test_rows_are_drawn_independently(device):
    index = sample_actions(torch.zeros(20_000, 2, device=device))[0]
    # Neighbouring rows agree in half of the pairs; five standard deviations are 0.0177.
    assert abs((index[1:] == index[:-1]).double().mean() - 0.5) < 0.0177


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_pairs(layout, dtype, device):
    for rows in (50, 0):
        table = LAYOUTS[layout](PAIRS.to(device, dtype))
        index, *_, pair = sample_actions(torch.randn(rows, 6, device=device, requires_grad=True), table)
        assert (pair.dtype, pair.shape, pair.requires_grad) == (torch.int32, (rows, 2), False)
        assert torch.equal(pair, PAIRS.to(device)[index])
    assert len(sample_actions(torch.randn(50, 5, device=device))) == 4


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout, device):
    check_categorical(sample_actions, layout(torch.randn(13, 9, device=device)))


@explicitly
@pytest.mark.parametrize("actions", [3, 33])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_row_without_a_distribution_is_refused(bad, actions, source, backend, device):
    logits = torch.zeros(4, actions, device=device)
    logits[2, slice(None) if bad == -torch.inf else 1] = bad
    generator = generators(device)[source]
    before = default_state(device)
    with refuses(r"logits\[2\]: holds NaN or \+inf, or is -inf throughout; expected finite values or some -inf"):
        index, log_prob, entropy, _ = sample_actions(logits, generator=generator)
        # A kernel does not stop.
        assert index[2] == 0
        assert log_prob.isnan().tolist() == entropy.isnan().tolist() == [False, False, True, False]
    # Refused logits draw nothing.
    assert backend == "triton" or torch.equal(before, default_state(device))
    assert (
        backend == "triton"
        or generator is None
        or torch.equal(generator.get_state(), generators(device)["generator"].get_state())
    )
