"""The C++ operators on the CPU against eager PyTorch, on one thread.

    python -m metta_fastagent build
    python -m benchmarks.bench_native [--rounds 200] [--only evaluate] [--json native.json]

Each case first compares the results, then times all providers in turn within each round. Ratios are medians over the
rounds of another provider's time over native's, on the clock and in this thread's processor time, which other programs
disturb less. "eager" is this package's eager twin; "formula" is the same result from log_softmax, gather and autograd.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metta_fastagent import _native, ops, use_backend

WARM_UP_ROUNDS = 5
# A case stops after this long, at the latest.
SECONDS_PER_CASE = 20.0
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}

Call = Callable[[], Any]


class Provider(NamedTuple):
    call: Call
    # What `use_backend` is given around the timed call.
    backend: str = "eager"

    def __call__(self) -> Any:
        with use_backend(self.backend):
            return self.call()


class Case(NamedTuple):
    name: str
    native: Provider
    # Name to what native is compared with.
    others: dict[str, Provider]
    # Raises where a provider's results differ from native's.
    check: Call


def both(function: Call) -> tuple[Provider, Provider]:
    """The function on the native operators and on the eager twins."""
    return Provider(function, "auto"), Provider(function, "eager")


def evaluate_case(rows: int, actions: int) -> Case:
    logits = torch.randn(rows, actions).requires_grad_()
    index = torch.randint(actions, (rows,))
    pairs, table = torch.stack([torch.zeros_like(index), index], dim=1), torch.tensor([0, actions - 1])
    upstream = torch.randn(rows), torch.randn(rows)

    def step() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        outputs = ops.evaluate_actions(logits, pairs, table)
        return *outputs, *torch.autograd.grad(outputs[:2], logits, upstream)

    def formula() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        chosen = pairs[:, 0] + table[pairs[:, 0]] + pairs[:, 1]
        full = torch.log_softmax(logits, dim=-1)
        log_prob = full.gather(1, chosen.unsqueeze(1)).squeeze(1)
        entropy = -(full.exp() * full).sum(-1)
        return log_prob, entropy, full, *torch.autograd.grad((log_prob, entropy), logits, upstream)

    native, eager = both(step)

    def check() -> None:
        torch.testing.assert_close(native(), eager(), **TOLERANCE)
        torch.testing.assert_close(native(), formula(), **TOLERANCE)

    return Case(f"evaluate fwd+bwd [{rows}, {actions}]", native, {"eager": eager, "formula": Provider(formula)}, check)


def sample_case(rows: int, actions: int) -> Case:
    logits = torch.randn(rows, actions)
    table = torch.stack([torch.zeros(actions), torch.arange(actions)], dim=1).int()

    def draw() -> tuple[Tensor, ...]:
        return ops.sample_actions(logits, table)

    native, eager = both(draw)

    def check() -> None:
        # The draws differ, what they say of the same logits does not.
        for index, log_prob, entropy, full, pair in (native(), eager()):
            torch.testing.assert_close(full, torch.log_softmax(logits, -1), **TOLERANCE)
            torch.testing.assert_close(log_prob, full.gather(1, index[:, None])[:, 0], **TOLERANCE)
            torch.testing.assert_close(entropy, -(full.exp() * full).sum(-1), **TOLERANCE)
            assert torch.equal(pair, table[index])

    return Case(f"sample [{rows}, {actions}]", native, {"eager": eager}, check)


def clip_case(count: int, elements: int) -> Case:
    bound = 0.02
    net = nn.Sequential(*[nn.Linear(1, elements, bias=False) for _ in range(count)])
    with torch.no_grad():
        for weight in net.parameters():
            weight.uniform_(-bound, bound)
    weights, bounds = list(net.parameters()), [bound] * count

    def walk() -> None:
        for module in net.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                module.weight.data.clamp_(-bound, bound)
                if module.bias is not None:
                    module.bias.data.clamp_(-bound, bound)

    def foreach() -> None:
        with torch.no_grad():
            torch._foreach_clamp_min_(weights, -bound)
            torch._foreach_clamp_max_(weights, bound)

    def clip() -> None:
        ops.clip_weights_(weights, bounds)

    native, eager = both(clip)
    others = {"eager": eager, "module walk": Provider(walk), "foreach": Provider(foreach)}

    def check() -> None:
        start = [torch.randn_like(weight) for weight in weights]
        expected = [values.clamp(-bound, bound) for values in start]
        for call in (native, *others.values()):
            with torch.no_grad():
                for weight, values in zip(weights, start, strict=True):
                    weight.copy_(values)
            call()
            assert all(torch.equal(weight, wanted) for weight, wanted in zip(weights, expected, strict=True))

    return Case(f"clip {count} x {elements}", native, others, check)


def l2_case(count: int, elements: int) -> Case:
    params = [torch.randn(elements).requires_grad_() for _ in range(count)]
    initial = [torch.randn(elements) for _ in range(count)]

    def step() -> tuple[Tensor, ...]:
        loss = ops.l2_init_loss(params, initial, 0.5)
        return loss, *torch.autograd.grad(loss, params)

    native, eager = both(step)

    def check() -> None:
        torch.testing.assert_close(native(), eager(), **TOLERANCE)

    return Case(f"l2 fwd+bwd {count} x {elements}", native, {"eager": eager}, check)


def tokens_case(rows: int, tokens: int, features: int) -> Case:
    observations = torch.randint(11, (rows, tokens, 3), dtype=torch.uint8)
    observations[..., 0] = observations[..., 0] * 16 + torch.randint(11, (rows, tokens))
    observations[..., 1] = torch.randint(features, (rows, tokens))
    # The second half of a row is padding, as in an environment's observations.
    observations[:, tokens // 2 :] = 255
    scale = torch.rand(features) + 0.5

    def scatter() -> Tensor:
        return ops.tokens_to_grid(observations, features, 11, 11, scale)

    native, eager = both(scatter)

    def check() -> None:
        assert torch.equal(native(), eager())

    return Case(f"tokens [{rows}, {tokens}], {features} features", native, {"eager": eager}, check)


def conversion_cases(rows: int) -> Iterator[Case]:
    table = torch.tensor([0, 3, 3, 10])
    counts = (table[1:] - table[:-1] + 1).tolist()
    pairs = torch.tensor([[kind, param] for kind, count in enumerate(counts) for param in range(count)]).int()
    index = torch.randint(len(pairs), (rows,))
    actions = pairs[index]
    for name, function in (
        ("pairs to indices", lambda: ops.action_to_logit_index(actions, table)),
        ("indices to pairs", lambda: ops.logit_index_to_action(index, pairs)),
    ):
        native, eager = both(function)

        def check(native: Call = native, eager: Call = eager) -> None:
            assert torch.equal(native(), eager())

        yield Case(f"{name} [{rows}]", native, {"eager": eager}, check)


def cases() -> Iterator[Case]:
    for shape in ((1, 5), (64, 21), (4096, 5), (4096, 21), (16384, 128), (1024, 1024)):
        yield evaluate_case(*shape)
    for shape in ((1, 5), (64, 21), (4096, 5), (4096, 21), (16384, 128), (1024, 1024)):
        yield sample_case(*shape)
    for shape in ((1, 64), (14, 4096), (200, 64), (200, 16384), (14, 1_000_000)):
        yield clip_case(*shape)
    for shape in ((1, 64), (14, 4096), (200, 64), (14, 1_000_000)):
        yield l2_case(*shape)
    for shape in ((1, 200, 25), (64, 200, 25), (1024, 200, 25), (1024, 500, 70)):
        yield tokens_case(*shape)
    for rows in (1, 64, 4096, 262144):
        yield from conversion_cases(rows)


def timed(case: Case, rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Provider to its seconds in each round: on the clock, and of this thread's processor time."""
    providers = {"native": case.native, **case.others}
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in providers}
    for call in [*providers.values()] * WARM_UP_ROUNDS:
        call()
    until = time.perf_counter() + SECONDS_PER_CASE
    for _ in range(rounds):
        for name, provider in providers.items():
            call = provider.call
            with use_backend(provider.backend):
                wall, cpu = time.perf_counter(), time.thread_time()
                call()
                cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
            times[name][0].append(wall)
            times[name][1].append(cpu)
        if time.perf_counter() > until:
            break
    return times


def report(case: Case, rounds: int) -> dict[str, Any]:
    """Times in microseconds and ratios to native: medians over the rounds."""
    case.check()
    times = timed(case, rounds)
    wall, cpu = times["native"]
    row: dict[str, Any] = {"case": case.name, "rounds": len(wall), "native_us": statistics.median(wall) * 1e6}
    for name in case.others:
        other_wall, other_cpu = times[name]
        row[f"{name}_us"] = statistics.median(other_wall) * 1e6
        row[f"{name}_ratio"] = statistics.median(a / b for a, b in zip(other_wall, wall, strict=True))
        row[f"{name}_cpu_ratio"] = statistics.median(a / b for a, b in zip(other_cpu, cpu, strict=True))
    return row


def line(row: dict[str, Any]) -> str:
    names = [key.removesuffix("_cpu_ratio") for key in row if key.endswith("_cpu_ratio")]
    parts = [
        f"{name} {row[f'{name}_us']:.1f} us = {row[f'{name}_ratio']:.2f}x (cpu {row[f'{name}_cpu_ratio']:.2f}x)"
        for name in names
    ]
    return f"{row['case']:<36} native {row['native_us']:>9.1f} us   {'   '.join(parts)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="at most; a case also stops after 20 seconds")
    parser.add_argument("--only", default="", help="only the cases whose name holds this")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not _native.load():
        print(f"no native operators to measure: {_native.reason()}", file=sys.stderr)
        return 1
    machine = {"torch": torch.__version__, "processor": platform.processor() or platform.machine(), "threads": 1}
    print(", ".join(f"{key} {value}" for key, value in machine.items()), "-", _native.reason())
    rows = []
    for case in cases():
        if options.only in case.name:
            rows.append(report(case, options.rounds))
            print(line(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
