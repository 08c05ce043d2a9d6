"""The smallest REINFORCE loop on CartPole, and what makes it fall from the top.

Returns-to-go with discount 0.99, one hidden layer of 128 units with ReLU, 500 updates of one episode. What varies is
the step size, what is done to the returns (normalised, centred only, or raw), the optimiser, an entropy bonus, and the
number of episodes per update; two slow settings get 1,500 updates. The loss is the mean over the steps of the update.

About 65 CPU seconds a seed.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import nn

from policyopt.control.environments import environment_seed
from policyopt.losses import policy_gradient_loss
from policyopt_book.studies import Study

GAMMA, LIMIT = 0.99, 500


Layers = tuple[np.ndarray, ...]


def act(layers: Layers, states: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sample actions with NumPy: for one state that is ten times as fast as PyTorch."""
    w1, b1, w, b = layers
    difference = np.maximum(states @ w1 + b1, 0.0) @ w + b
    right = 1.0 / (1.0 + np.exp(-difference))
    return np.asarray(rng.random(right.shape) < right, dtype=np.int64)


def layers_of(policy: nn.Sequential) -> Layers:
    """Copy the policy's numbers as they are now; of two logits only the difference counts."""
    w1, b1, w2, b2 = (p.detach().numpy() for p in policy.parameters())
    return w1.T.copy(), b1.copy(), w2[1] - w2[0], b2[1] - b2[0]


def episode(env: gym.Env, layers: Layers, rng: np.random.Generator) -> tuple[list[Any], list[Any]]:
    """Run one episode: its states and actions."""
    states, actions, done = [env.reset()[0]], [], False
    while not done:
        actions.append(int(act(layers, states[-1], rng)))
        state, _, terminated, truncated, _ = env.step(actions[-1])
        done = terminated or truncated
        states.append(state)
    return states[:-1], actions


def side_by_side(env: Any, layers: Layers, rng: np.random.Generator) -> list[tuple[Any, Any]]:
    """Run one episode in each copy of a vector environment."""
    state, running = env.reset()[0], np.ones(env.num_envs, bool)
    states, actions, valid = [], [], []
    while running.any():
        states.append(state)
        actions.append(act(layers, state, rng))
        valid.append(running)
        state, _, terminated, truncated, _ = env.step(actions[-1])
        running = running & ~(terminated | truncated)
    lengths = np.sum(valid, 0)
    columns = np.stack(states), np.stack(actions)
    return [(columns[0][:n, i], columns[1][:n, i]) for i, n in enumerate(lengths)]


def run(
    *,
    seed: int,
    optimizer: str,
    rate: float,
    weights: str,
    episodes: int = 1,
    updates: int = 500,
    entropy: float = 0.0,
) -> dict[str, Any]:
    """Train once."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    policy = nn.Sequential(nn.Linear(4, 128), nn.ReLU(), nn.Linear(128, 2))
    make = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]
    descent = make(policy.parameters(), lr=rate)
    vector = {"num_envs": episodes, "vectorization_mode": "vector_entry_point"}
    env: Any = gym.make("CartPole-v1") if episodes == 1 else gym.make_vec("CartPole-v1", **vector)
    env.reset(seed=environment_seed(seed))
    # Every step pays 1, so that the return-to-go depends on the steps left alone.
    to_go = torch.tensor((1 - GAMMA ** np.arange(1, LIMIT + 1)) / (1 - GAMMA), dtype=torch.float32)
    lengths, last = [], 0.0
    for _ in range(updates):
        layers = layers_of(policy)
        batch = [episode(env, layers, rng)] if episodes == 1 else side_by_side(env, layers, rng)
        states = torch.tensor(np.concatenate([s for s, _ in batch]), dtype=torch.float32)
        actions = torch.tensor(np.concatenate([a for _, a in batch]))
        w = torch.cat([to_go[: len(a)].flip(0) for _, a in batch])
        if weights != "raw":
            w = w - w.mean()
        if weights == "normalised":
            w = w / (w.std() + 1e-9)
        log_pi = policy(states).log_softmax(-1)
        log_prob = log_pi.gather(-1, actions[:, None])[:, 0]
        bits = -(log_pi.exp() * log_pi).sum(-1).mean()
        loss = policy_gradient_loss(log_prob, w).mean() - entropy * bits
        descent.zero_grad()
        loss.backward()
        descent.step()
        lengths.append([len(a) for _, a in batch])
        last = bits.item()
    each = np.array(lengths, float).ravel()
    smooth = np.convolve(each, np.ones(20) / 20, "valid")
    peak = np.maximum.accumulate(smooth)
    return {
        "touched": int(each.max() >= LIMIT),
        "peak": smooth.max(),
        # From a mean of 20 episodes of 150 or more down to less than a third.
        "collapsed": int(bool(((peak >= 150) & (smooth < peak / 3)).any())),
        "last": each[-50:].mean(),
        # The update at which that mean first reaches 300.
        "arrived": (np.argmax(smooth >= 300) + 20) / episodes if smooth.max() >= 300 else None,
        "final_length": each[-1],
        "entropy": last,
        "curve": np.array(lengths, float).reshape(25, -1).mean(1),
    }


ARTICLE = {"optimizer": "adam", "rate": 0.01, "weights": "normalised"}
SETTINGS: list[dict[str, Any]] = [
    *({**ARTICLE, "rate": rate} for rate in (0.01, 0.003, 0.001)),
    {**ARTICLE, "weights": "centred"},
    {**ARTICLE, "weights": "raw"},
    *({**ARTICLE, "optimizer": "sgd", "rate": rate} for rate in (0.3, 0.1)),
    {**ARTICLE, "entropy": 0.01},
    {**ARTICLE, "episodes": 16},
    # Slow climbers, with time to fall from the top.
    {**ARTICLE, "rate": 0.001, "updates": 1500},
    {**ARTICLE, "optimizer": "sgd", "rate": 0.1, "updates": 1500},
]
STUDY = Study("reinforce_collapse", run, SETTINGS, seeds=10, sample=SETTINGS[4])

if __name__ == "__main__":
    STUDY.main()
