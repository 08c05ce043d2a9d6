"""Every trainer of both halves on a GPU, beside the same run on the CPU.

Each body takes the device as a parameter. On the CPU it compares a run with its own repetition, which says little but
keeps the body in working order where there is no GPU. The tolerances come from runs on the CPU whose linear layers had
relative noise: all tests pass with 1e-6, a few times what another order of summation does to float32, most with 1e-5,
and with 5e-4, the rounding of TensorFloat-32, nearly all of those that compare with the CPU fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_runs import COMMON, SHORT, TRAINERS, count_ones, records, tiny_model, weights
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from policyopt.control import (
    PPOConfig,
    ReinforceConfig,
    TrainResult,
    TRPOConfig,
    train_ppo,
    train_reinforce,
    train_trpo,
)
from policyopt.distributions import Categorical, DiagonalGaussian
from policyopt.lm import (
    LMResult,
    LoRA,
    OnlineRankingConfig,
    SamplingConfig,
    TransformersSampler,
    add_lora,
    completion_log_probs,
    train_ranking,
)


def run_online_ranking(model: Any, **options: Any) -> LMResult[Any, Any]:
    changes = {"group_size": 4, "sampling": SHORT, "kl_coef": 0.1}
    config = OnlineRankingConfig(**{**COMMON, **changes, **options.pop("changes", {})})
    prompts = [{"prompt": record["prompt"]} for record in records()]
    return train_ranking(model, prompts, config, reward_functions=count_ones, progress=False, **options)


LM_TRAINERS = {**TRAINERS, "ranking-online": run_online_ranking}
SAMPLING = ("ranking-online", "grpo", "ppo")
PROMPTS = [[1, 3, 4, 5], [6], [1, 7, 8]]
every_lm_trainer = pytest.mark.parametrize("name", LM_TRAINERS)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A device that computes float32 in full."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield request.param
    torch.set_float32_matmul_precision(before)


def train(name: str, device: str, *, lora: bool = False, **options: Any) -> LMResult[Any, Any]:
    """Two updates of a tiny model on a device."""
    model = tiny_model().to(device)
    model = add_lora(model, LoRA(rank=2)) if lora else model
    changes = {"updates": 2, **options.pop("changes", {})}
    return LM_TRAINERS[name](model, changes=changes, **options)


def networks(result: LMResult[Any, Any] | TrainResult[Any, Any]) -> list[nn.Module]:
    """All that a result holds."""
    if isinstance(result, TrainResult):
        return [n for n in (result.policy, result.critic) if n is not None]
    network = None if result.reward_model is None else result.reward_model.network
    return [n for n in (result.language_model.model, network, result.actor_critic) if n is not None]


def where(result: LMResult[Any, Any] | TrainResult[Any, Any]) -> set[str]:
    """The devices of parameters and buffers."""
    tensors = [t for n in networks(result) for t in (*n.parameters(), *n.buffers())]
    return {t.device.type for t in tensors}


def assert_same_row(one: Any, other: Any, *, rel: float, abs: float, but: tuple[str, ...] = ()) -> None:
    for name, value in vars(one).items():
        if name not in ("seconds", *but):
            plain = isinstance(value, str)
            close = value if plain else pytest.approx(value, rel=rel, abs=abs, nan_ok=True)
            assert getattr(other, name) == close, name


def assert_near(one: dict[str, Tensor], other: dict[str, Tensor], *, mean: float, most: float) -> None:
    """Bound the mean distance, and that of 99 % of the numbers.

    Not of all: where a gradient is 0 but for rounding, Adam makes a whole step of the rounding.
    """
    assert one.keys() == other.keys()
    apart = torch.cat([(one[name].cpu() - other[name].cpu()).abs().flatten() for name in one])
    assert apart.mean() < mean
    assert apart.quantile(0.99) < most


# --- language models ------------------------------------------------------------------------------------------


@every_lm_trainer
def test_two_updates_are_those_of_the_cpu(name: str, device: str) -> None:
    wanted, result = train(name, "cpu"), train(name, device)
    # At the first update of these all margins or rewards are 0, up to rounding, so the accuracy is anything.
    but = ("accuracy",) if name in ("dpo", "kto") else ()
    assert_same_row(result.history[0], wanted.history[0], rel=1e-4, abs=2e-5, but=but)
    assert_same_row(result.history[1], wanted.history[1], rel=1e-3, abs=2e-4)
    assert_near(weights(result), weights(wanted), mean=2e-6, most=2e-5)
    assert where(result) == {device}
    result.cpu()
    assert where(result) == {"cpu"}
    assert result.language_model.device.type == "cpu"


@every_lm_trainer
def test_bfloat16_changes_the_loss_a_little_and_no_type(name: str, device: str) -> None:
    # Both learn from what the same sampler drew: the trainer's own draws in bfloat16, too.
    plain = tiny_model().to(device)
    given = {"sampler": TransformersSampler(plain)} if name in SAMPLING else {}
    exact, half = (train(name, device, changes=c, **given) for c in ({}, {"autocast": "bfloat16"}))
    for loss in ("policy_loss", "value_loss") if name == "ppo" else ("loss",):
        first = getattr(exact.history[0], loss)
        assert getattr(half.history[0], loss) == pytest.approx(first, rel=0.05, abs=0.02)
    # Of GRPO on a CPU it is 1.03 to 1.17 times the exact one, by the seed, whichever attention computes it.
    assert half.history[0].gradient_norm == pytest.approx(exact.history[0].gradient_norm, rel=0.2)
    assert half.history[0].gradient_norm != exact.history[0].gradient_norm
    assert {p.dtype for n in networks(half) for p in n.parameters()} == {torch.float32}


@every_lm_trainer
def test_lora_trains_the_adapters_alone(name: str, device: str) -> None:
    pytest.importorskip("peft")
    start = dict(add_lora(tiny_model(), LoRA(rank=2)).model.named_parameters())
    result, wanted = train(name, device, lora=True), train(name, "cpu", lora=True)
    trained = result.reward_model.network.model if result.reward_model else result.language_model.model
    changed = {n for n, p in trained.named_parameters() if not torch.equal(p.cpu(), start[n])}
    assert changed == {n for n in start if "lora_" in n}
    assert where(result) == {device}
    assert_near(weights(result), weights(wanted), mean=2e-6, most=2e-5)


@every_lm_trainer
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_gives_the_same_weights(name: str, device: str) -> None:
    plain = train(name, device)
    recomputed = train(name, device, changes={"gradient_checkpointing": True})
    assert_near(weights(recomputed), weights(plain), mean=2e-6, most=2e-5)


@pytest.mark.parametrize("name", ["sft", "reward", "grpo", "ppo"])
@pytest.mark.parametrize("way", ["there", "back"])
def test_a_checkpoint_moves_between_devices(name: str, way: str, device: str, tmp_path: Path) -> None:
    first, second = (device, "cpu") if way == "there" else ("cpu", device)
    changes = {"updates": 3, "checkpoint_every": 1}
    stopped = train(
        name, first, changes=changes, checkpoint_dir=tmp_path, callback=lambda row: row.update == 1
    )
    assert (stopped.stop_reason, stopped.updates) == ("callback", 1)
    resumed = train(name, second, changes=changes, checkpoint_dir=tmp_path)
    whole = train(name, second, changes=changes)
    assert len(resumed.history) == 3
    assert_same_row(resumed.history[2], whole.history[2], rel=1e-3, abs=2e-4)
    assert_near(weights(resumed), weights(whole), mean=2e-6, most=2e-5)
    assert where(resumed) == {second}


class Doubles(TorchDispatchMode):
    """Notes which operators return a matrix in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float64 and tensor.ndim > 1:
                self.seen.add(str(func.overloadpacket))
        return out


@every_lm_trainer
def test_only_the_sampler_computes_matrices_in_float64(name: str, device: str) -> None:
    """Most GPUs are 30 to 60 times slower in it. The sampler sums probabilities in it."""
    with Doubles() as doubles:
        train(name, device)
    ops = ("lift_fresh", "_to_copy", "cumsum", "gather", "mul", "sub", "slice", "unsqueeze", "index")
    sums = {f"aten.{op}" for op in ops}
    assert doubles.seen <= (sums if name in SAMPLING else set())


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9}]
)
def test_the_sampler_draws_what_it_draws_on_the_cpu_and_scores_as_the_scorer(
    settings: dict[str, Any], device: str
) -> None:
    config = SamplingConfig(max_new_tokens=12, **settings)
    on_cpu = TransformersSampler(tiny_model()).sample(PROMPTS, 4, config, seed=0)
    model = tiny_model().to(device)
    samples = TransformersSampler(model).sample(PROMPTS, 4, config, seed=0)
    assert samples.log_probs.device.type == samples.sequences.completion_ids.device.type == device
    assert samples.sequences.completion_ids.tolist() == on_cpu.sequences.completion_ids.tolist()
    assert samples.finished.tolist() == on_cpu.finished.tolist()
    if config.temperature == 0:
        return
    scoring = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    scored = completion_log_probs(model.model, samples.sequences, **scoring).log_probs
    torch.testing.assert_close(scored, samples.log_probs, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(samples.log_probs.cpu(), on_cpu.log_probs, atol=2e-5, rtol=1e-5)


def test_the_sampler_scores_as_the_scorer_in_bfloat16(device: str) -> None:
    model = tiny_model().to(device)
    model.model.bfloat16()
    samples = TransformersSampler(model).sample(PROMPTS, 4, SamplingConfig(max_new_tokens=12), seed=0)
    scored = completion_log_probs(model.model, samples.sequences).log_probs.detach()
    assert samples.log_probs.dtype == scored.dtype == torch.float32
    assert float((samples.log_probs - scored).abs().mean()) < 0.05


# --- control --------------------------------------------------------------------------------------------------

# One minibatch holds the batch: its order, which a generator of the device draws, then does not matter.
BATCH: dict[str, Any] = {"num_envs": 4, "rollout_steps": 64, "total_steps": 512}
CONTROL: dict[str, tuple[Callable[..., TrainResult[Any, Any]], Any]] = {
    "reinforce": (train_reinforce, partial(ReinforceConfig, num_envs=4, total_steps=150, baseline="learned")),
    "trpo": (train_trpo, partial(TRPOConfig, **BATCH)),
    "ppo": (train_ppo, partial(PPOConfig, **BATCH)),
}
every_control_trainer = pytest.mark.parametrize("name", CONTROL)


@pytest.fixture
def same_actions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let actions be drawn on the CPU: a CUDA generator draws others from the same seed."""
    streams: dict[torch.Generator, torch.Generator] = {}

    def patch(kind: type, *fields: str) -> None:
        original = kind.sample

        def sample(self: Any, generator: torch.Generator) -> Tensor:
            stream = streams.setdefault(generator, torch.Generator().manual_seed(generator.initial_seed()))
            values = [getattr(self, field) for field in fields]
            return original(kind(*(value.cpu() for value in values)), stream).to(values[0].device)

        monkeypatch.setattr(kind, "sample", sample)

    patch(Categorical, "log_probs")
    patch(DiagonalGaussian, "mean", "log_std")


def control(name: str, device: str, env: str = "CartPole-v1", **changes: Any) -> TrainResult[Any, Any]:
    trainer, config = CONTROL[name]
    return trainer(env, config(device=device, **changes), seed=0, progress=False)


def state(result: TrainResult[Any, Any]) -> dict[str, Tensor]:
    named = [(f"{i}.{key}", t) for i, n in enumerate(networks(result)) for key, t in n.state_dict().items()]
    return {key: t.detach().double() for key, t in named}


def assert_same_control(result: TrainResult[Any, Any], wanted: TrainResult[Any, Any]) -> None:
    # What conjugate gradient leaves of a residual is rounding.
    assert_same_row(result.history[0], wanted.history[0], rel=1e-4, abs=1e-5, but=("cg_residual",))
    for one, other in zip(result.history[1:], wanted.history[1:], strict=True):
        assert_same_row(one, other, rel=1e-3, abs=1e-4, but=("cg_residual",))
    assert_near(state(result), state(wanted), mean=5e-6, most=5e-5)


@every_control_trainer
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.usefixtures("same_actions")
def test_control_is_that_of_the_cpu(name: str, env: str, device: str, tmp_path: Path) -> None:
    wanted, result = control(name, "cpu", env), control(name, device, env)
    assert_same_control(result, wanted)
    assert where(result) == {device}
    saved = TrainResult.load(result.save(tmp_path))
    for key, value in state(saved).items():
        assert torch.equal(value, state(result)[key].cpu())
    result.cpu()
    assert where(result) == {"cpu"}


@pytest.mark.cuda
def test_compiled_networks_train_as_plain_ones() -> None:
    """On the GPU alone: a compiler of C++, and most of a minute, is what the CPU would need."""
    plain, compiled = control("ppo", "cuda"), control("ppo", "cuda", compile=True)
    assert_same_row(compiled.history[0], plain.history[0], rel=1e-3, abs=1e-4)
    mine, theirs = ({k.replace("_orig_mod.", ""): v for k, v in state(r).items()} for r in (compiled, plain))
    assert_near(mine, theirs, mean=1e-4, most=1e-3)
    assert where(compiled) == {"cuda"}
    assert all(math.isfinite(row.policy_loss) for row in compiled.history)
    np.testing.assert_array_equal(compiled.episodes.returns[:4], plain.episodes.returns[:4])


@pytest.mark.parametrize("name", ["reinforce", "ppo"])
@pytest.mark.usefixtures("same_actions")
def test_tensorfloat_32_would_be_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = control(name, "cpu", "Pendulum-v1")
    linear, generator = nn.functional.linear, torch.Generator().manual_seed(0)

    def noisy(*args: Tensor) -> Tensor:
        exact = linear(*args)
        return exact * (1 + 5e-4 * torch.randn(exact.shape, generator=generator))

    monkeypatch.setattr(nn.functional, "linear", noisy)
    result = control(name, "cpu", "Pendulum-v1")
    with pytest.raises(AssertionError):
        assert_same_control(result, wanted)
