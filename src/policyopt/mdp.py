r"""Finite Markov decision processes, solved exactly.

This module is the referee of the package. Whatever the floors above estimate from
samples (values, advantages, policy gradients), a small MDP gives here by linear
algebra, so an estimator can be checked against the truth.

Conventions, for ``S`` states and ``A`` actions:

* the transition probabilities ``P[s, a, s']``, rewards ``R[s, a]`` and policies
  ``policy[s, a]`` are float64 tensors, all on one device, that of ``P``;
* a policy is a table of probabilities, ``policy[s, a]`` = π(a | s), each row summing
  to 1;
* a state is *terminal* when every action keeps the process in it for ever with reward
  0. Its value is therefore 0, which is all that the end of an episode means;
* everything that is computed from a policy can be differentiated with respect to it by
  autograd.

References: Puterman, *Markov Decision Processes*, 1994; Sutton and Barto,
*Reinforcement Learning: An Introduction*, 2nd ed., 2018, chapters 3 and 4
(http://incompleteideas.net/book/the-book.html).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from policyopt._checks import require

__all__ = [
    "FiniteMDP", "Solution", "Trajectories", "action_values", "advantages",
    "bellman_expectation", "bellman_optimality", "error_bound", "exact_policy_gradient",
    "expected_return", "greedy_policy", "lookahead", "occupancy",
    "performance_difference", "policy_evaluation", "policy_iteration",
    "sample_trajectories", "softmax_policy", "uniform_policy", "value_iteration",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class FiniteMDP:
    """A finite MDP (S, A, P, R, γ) with its initial distribution μ.

    Parameters
    ----------
    P : Tensor
        ``[S, A, S]``, ``P[s, a, s']`` = P(s' | s, a); each ``P[s, a]`` sums to 1 (up to
        float32 rounding).
    R : Tensor
        ``[S, A]``, the expected reward R(s, a) received for action ``a`` in state
        ``s``.
    gamma : float
        Discount γ in [0, 1]. γ = 1 is accepted only if *every* policy ends with
        probability 1 from every state, because otherwise a return need not be
        finite.
    initial : Tensor
        ``[S]``, the distribution μ of the first state; sums to 1.
    allow_undiscounted : bool
        Accept γ = 1 although some policies never end. Evaluating one of those then
        raises; those that end are fine.

    Attributes
    ----------
    terminal : Tensor
        Boolean ``[S]``, derived: the states that no action leaves and in which every
        reward is 0.

    Raises
    ------
    ValueError
        For a wrong shape, probabilities that are negative or do not sum to 1, numbers
        that are not finite, γ outside [0, 1], or γ = 1 with a policy that never ends.

    Examples
    --------
    Two states: the only action leads from state 0, with reward 1, to state 1, which is
    terminal.

    >>> P, R, start = [[[0.0, 1.0]], [[0.0, 1.0]]], [[1.0], [0.0]], [1.0, 0.0]
    >>> mdp = FiniteMDP(P, R, gamma=1.0, initial=start)
    >>> mdp.terminal.tolist(), policy_evaluation(mdp, uniform_policy(mdp)).tolist()
    ([False, True], [1.0, 0.0])
    """

    P: Tensor
    R: Tensor
    gamma: float
    initial: Tensor
    allow_undiscounted: bool = False
    terminal: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("P", "R", "initial"):
            given, device = getattr(self, name), getattr(self.P, "device", None)
            tensor = torch.as_tensor(given, dtype=torch.float64, device=device)
            object.__setattr__(self, name, tensor)
        shape = tuple(self.P.shape)
        square = len(shape) == 3 and shape[0] == shape[2] and 0 not in shape
        require(square, "P must have shape [S, A, S] with S, A >= 1", shape)
        _check_shape("R", self.R, "S, A", shape[:2])
        _check_shape("initial", self.initial, "S", shape[:1])
        for s, a in (~torch.isfinite(self.R)).nonzero()[:1].tolist():
            raise ValueError(f"R[{s}, {a}] must be finite, got {self.R[s, a].item()}")
        for name in ("P", "initial"):
            probabilities = getattr(self, name)
            _check_distributions(name, probabilities)
            # float32 input misses a sum of 1 by its rounding, which would show up in
            # every exact result.
            total = probabilities.sum(dim=-1, keepdim=True)
            object.__setattr__(self, name, probabilities / total)
        require(0 <= self.gamma <= 1, "gamma must lie in [0, 1]", self.gamma)
        stays = torch.diagonal(self.P, dim1=0, dim2=2).T == 1.0  # [S, A]
        object.__setattr__(self, "terminal", (stays & (self.R == 0.0)).all(dim=1))
        if self.gamma == 1.0 and not self.allow_undiscounted:
            endless = _endless_states(self)
            if endless.any():
                raise ValueError(
                    "gamma = 1 needs every policy to end, but one can stay in states "
                    f"{_few(endless)} for ever; use gamma < 1, or "
                    "allow_undiscounted=True to evaluate only policies that do end"
                )

    @property
    def n_states(self) -> int:
        """Number of states S, terminal ones included."""
        return self.P.shape[0]

    @property
    def n_actions(self) -> int:
        """Number of actions A."""
        return self.P.shape[1]


# --- Policies ---


def uniform_policy(mdp: FiniteMDP) -> Tensor:
    """Return the policy ``[S, A]`` that picks every action with probability 1 / A."""
    return torch.full_like(mdp.R, 1.0 / mdp.n_actions)


def softmax_policy(theta: Tensor) -> Tensor:
    """Turn preferences into probabilities, π(a|s) = exp θ(s,a) / Σ_b exp θ(s,b); both
    ``[S, A]``.
    """
    return theta.softmax(dim=-1)


def greedy_policy(q: Tensor) -> Tensor:
    """Pick the first best action of ``q`` in every state; both ``[S, A]``, the result
    with one-hot rows.
    """
    return torch.nn.functional.one_hot(q.argmax(dim=-1), q.shape[-1]).to(q.dtype)


# --- Bellman operators and evaluation ---


def lookahead(mdp: FiniteMDP, values: Tensor) -> Tensor:
    r"""One step into the future: R(s,a) + γ Σ_{s'} P(s'|s,a) V(s').

    Parameters
    ----------
    mdp : FiniteMDP
        The process.
    values : Tensor
        ``[S]``, any guess V of the values. With V = V^π the result is Q^π.

    Returns
    -------
    Tensor
        ``[S, A]``, in units of reward.
    """
    _check_values(mdp, values)
    return mdp.R + mdp.gamma * mdp.P @ values


def bellman_expectation(mdp: FiniteMDP, values: Tensor, policy: Tensor) -> Tensor:
    r"""Apply the Bellman expectation operator, (T^π V)(s) = Σ_a π(a|s) [R(s,a) + γ
    Σ_{s'} P(s'|s,a) V(s')].

    V^π is its only fixed point when γ < 1. Shapes: ``values`` ``[S]``, ``policy`` ``[S,
    A]``, result ``[S]``. Source: Sutton and Barto, 2018, eq. 4.4.
    """
    return (_check_policy(mdp, policy) * lookahead(mdp, values)).sum(dim=-1)


def bellman_optimality(mdp: FiniteMDP, values: Tensor) -> Tensor:
    r"""Apply the Bellman optimality operator, (T* V)(s) = max_a [R(s,a) + γ Σ_{s'}
    P(s'|s,a) V(s')].

    V* is its only fixed point when γ < 1. Shapes: ``values`` ``[S]``, result ``[S]``.
    Source: Sutton and Barto, 2018, eq. 4.10.
    """
    return lookahead(mdp, values).amax(dim=-1)


def policy_evaluation(mdp: FiniteMDP, policy: Tensor) -> Tensor:
    r"""Evaluate a policy exactly: V^π solves the linear system (I − γ P_π) V = R_π.

    Here P_π(s,s') = Σ_a π(a|s) P(s'|s,a) and R_π(s) = Σ_a π(a|s) R(s,a).

    Parameters
    ----------
    mdp : FiniteMDP
        The process.
    policy : Tensor
        ``[S, A]`` probabilities. Autograd goes through the solve.

    Returns
    -------
    Tensor
        V^π, ``[S]``; 0 in terminal states.

    Raises
    ------
    ValueError
        If γ = 1 and the policy may go on for ever.
    """
    policy = _check_policy(mdp, policy)
    rewards = (policy * mdp.R).sum(dim=-1)
    values: Tensor = torch.linalg.solve(_bellman_system(mdp, policy), rewards)
    return values


def action_values(mdp: FiniteMDP, policy: Tensor) -> Tensor:
    """Q^π(s,a), ``[S, A]``: the expected return of action ``a`` in ``s`` if ``policy``
    acts from then on.
    """
    return lookahead(mdp, policy_evaluation(mdp, policy))


def advantages(mdp: FiniteMDP, policy: Tensor) -> Tensor:
    """A^π(s,a) = Q^π(s,a) − V^π(s), ``[S, A]``; its mean under the policy itself is 0
    in every state.
    """
    values = policy_evaluation(mdp, policy)
    return lookahead(mdp, values) - values[:, None]


def occupancy(mdp: FiniteMDP, policy: Tensor) -> Tensor:
    r"""Compute the discounted occupancy d^π(s) = Σ_t γ^t Pr(s_t = s), not normalised.

    It solves d = μ + γ P_πᵀ d.

    Parameters
    ----------
    mdp : FiniteMDP
        The process; ``mdp.initial`` is μ.
    policy : Tensor
        ``[S, A]`` probabilities.

    Returns
    -------
    Tensor
        ``[S]``. For γ < 1 it sums to 1 / (1 − γ). For γ = 1 the time spent in terminal
        states is endless; they get 0, so that the sum is the expected length of an
        episode.

    Raises
    ------
    ValueError
        If γ = 1 and the policy may go on for ever.
    """
    policy = _check_policy(mdp, policy)
    visits: Tensor = torch.linalg.solve(_bellman_system(mdp, policy).T, mdp.initial)
    # The system counts only the arrival in a terminal state; the stay there is a
    # geometric series.
    stay = visits / (1.0 - mdp.gamma) if mdp.gamma < 1.0 else torch.zeros_like(visits)
    return torch.where(mdp.terminal, stay, visits)


def expected_return(mdp: FiniteMDP, policy: Tensor) -> Tensor:
    """J(π) = E[G_0] = Σ_s μ(s) V^π(s), a scalar tensor; autograd can differentiate it
    in ``policy``.
    """
    return mdp.initial @ policy_evaluation(mdp, policy)


def exact_policy_gradient(mdp: FiniteMDP, theta: Tensor) -> Tensor:
    r"""Differentiate J for the tabular softmax policy, by the policy-gradient theorem.

    ∂J / ∂θ(s,a) = d^π(s) π(a|s) A^π(s,a), with the discounted, un-normalised occupancy
    d^π.

    Parameters
    ----------
    mdp : FiniteMDP
        The process.
    theta : Tensor
        ``[S, A]`` preferences.

    Returns
    -------
    Tensor
        ``[S, A]``, the direction in which J *increases*.

    References
    ----------
    Sutton, McAllester, Singh and Mansour, *Policy Gradient Methods for Reinforcement
    Learning with Function Approximation*, NeurIPS 1999, theorem 1; Agarwal et al.,
    2019, arXiv:1908.00261, lemma C.1.
    """
    policy = softmax_policy(theta)
    return occupancy(mdp, policy)[:, None] * policy * advantages(mdp, policy)


def performance_difference(mdp: FiniteMDP, new: Tensor, old: Tensor) -> Tensor:
    r"""J(new) − J(old), from the advantages of the *old* policy in the states that the
    *new* one visits.

    J(π') − J(π) = Σ_s d^{π'}(s) Σ_a π'(a|s) A^π(s,a).

    Parameters
    ----------
    mdp : FiniteMDP
        The process.
    new, old : Tensor
        ``[S, A]`` probabilities, π' and π.

    Returns
    -------
    Tensor
        A scalar, in units of return.

    References
    ----------
    Kakade and Langford, *Approximately Optimal Approximate Reinforcement Learning*,
    ICML 2002, lemma 6.1 (there with a normalised occupancy, hence a factor 1 / (1 −
    γ)).
    """
    gain_per_state = (_check_policy(mdp, new) * advantages(mdp, old)).sum(dim=-1)
    return occupancy(mdp, new) @ gain_per_state


# --- Control ---


@dataclass(frozen=True, eq=False)
class Solution:
    """What an exact solver found.

    Attributes
    ----------
    values : Tensor
        ``[S]``, V* (within the tolerance asked for).
    policy : Tensor
        ``[S, A]``, a deterministic policy as one-hot rows.
    residuals : tuple of float
        One entry per iteration: the largest change of a value (value iteration), or the
        largest gain that a single change of action promised (policy iteration).
    """

    values: Tensor
    policy: Tensor
    residuals: tuple[float, ...]

    @property
    def iterations(self) -> int:
        """How many iterations were made."""
        return len(self.residuals)


def policy_iteration(
    mdp: FiniteMDP, policy: Tensor | None = None, *, max_iterations: int = 1000
) -> Solution:
    """Solve the MDP by evaluating a policy exactly, then making it greedy, until
    nothing improves.

    An action is changed only where that is a strict improvement. This makes the loop
    end, and for γ = 1 it never turns a policy that ends into one that does not, unless
    that would gain reward for ever.

    Parameters
    ----------
    mdp : FiniteMDP
        The process.
    policy : Tensor, optional
        ``[S, A]``, where to start; by default, a policy that reaches a terminal state
        wherever that is possible.
    max_iterations : int
        Bound on the number of improvements, at least 1.

    Returns
    -------
    Solution
        Exact up to rounding.

    Raises
    ------
    ValueError
        For a bad ``policy``, or if γ = 1 and a policy on the way never ends.
    RuntimeError
        If ``max_iterations`` were not enough.

    References
    ----------
    Howard, *Dynamic Programming and Markov Processes*, 1960; for γ = 1, Bertsekas and
    Tsitsiklis, *An Analysis of Stochastic Shortest Path Problems*, 1991.
    """
    policy = _ending_policy(mdp) if policy is None else _check_policy(mdp, policy)
    residuals: list[float] = []
    while len(residuals) < max_iterations:
        values = policy_evaluation(mdp, policy)
        q = lookahead(mdp, values)
        gain = q.amax(dim=-1) - values
        residuals.append(float(gain.max().clamp(min=0.0)))
        rounding = 1e-11 * max(1.0, float(values.abs().max()))  # of the solve
        better = gain > rounding
        if not better.any():
            return Solution(values, policy, tuple(residuals))
        policy = torch.where(better[:, None], greedy_policy(q), policy)
    raise RuntimeError(
        f"policy iteration still improves after max_iterations = {max_iterations}; "
        "raise it"
    )


def value_iteration(
    mdp: FiniteMDP, *, tolerance: float = 1e-8, max_iterations: int = 100_000
) -> Solution:
    """Solve the MDP by applying the Bellman optimality operator from V = 0 until V is
    provably close to V*.

    For γ < 1 the operator is a γ-contraction, so ‖V_k − V*‖∞ ≤ γ / (1 − γ) · ‖V_k −
    V_{k−1}‖∞; the loop stops when the right side, not merely the last change, is below
    ``tolerance``. For γ = 1 the same is done in the weighted norm of
    :func:`error_bound`.

    Parameters
    ----------
    mdp : FiniteMDP
        The process.
    tolerance : float
        Largest error of any returned value, greater than 0.
    max_iterations : int
        Bound on the number of sweeps, at least 1.

    Returns
    -------
    Solution
        Its ``policy`` is greedy for the returned values.

    Raises
    ------
    ValueError
        For ``tolerance <= 0``; or if γ = 1 and some policy never ends, because then no
        bound of this kind holds (use :func:`policy_iteration`).
    RuntimeError
        If ``max_iterations`` sweeps were not enough.

    References
    ----------
    Puterman, 1994, section 6.3; for γ = 1, Bertsekas and Tsitsiklis, 1991.
    """
    require(tolerance > 0, "tolerance must be > 0", tolerance)
    weights, modulus = _contraction(mdp)
    factor = float(weights.max()) * modulus / (1.0 - modulus)
    values = torch.zeros_like(mdp.initial)
    residuals: list[float] = []
    bound = float("inf")
    while len(residuals) < max_iterations:
        updated = bellman_optimality(mdp, values)
        change, values = (updated - values).abs(), updated
        residuals.append(float(change.max()))
        bound = factor * float((change / weights).max())
        if bound <= tolerance:
            greedy = greedy_policy(lookahead(mdp, values))
            return Solution(values, greedy, tuple(residuals))
    raise RuntimeError(
        f"value iteration: after max_iterations = {max_iterations} sweeps the error "
        f"may be {bound:.3g} > tolerance = {tolerance}; raise either"
    )


def error_bound(mdp: FiniteMDP, values: Tensor) -> float:
    r"""How far ``values`` can be from V*, at most: a bound on max_s |V(s) − V*(s)|.

    It is ‖T*V − V‖∞ / (1 − γ) for γ < 1. For γ = 1, T* is a contraction with modulus 1
    − 1 / max_s ξ(s) in the norm max_s |V(s)| / ξ(s), where ξ(s) is the largest expected
    number of steps that any policy takes from ``s``.

    Parameters
    ----------
    mdp : FiniteMDP
        The process.
    values : Tensor
        ``[S]``, any guess of V*.

    Returns
    -------
    float
        The bound, in units of return.

    Raises
    ------
    ValueError
        If γ = 1 and some policy never ends.

    References
    ----------
    Bertsekas and Tsitsiklis, *Neuro-Dynamic Programming*, 1996, proposition 2.2.
    """
    weights, modulus = _contraction(mdp)
    residual = ((bellman_optimality(mdp, values) - values).abs() / weights).max()
    return float(weights.max() * residual) / (1.0 - modulus)


# --- Sampling ---


@dataclass(frozen=True, eq=False)
class Trajectories:
    """``N`` episodes side by side, all tensors ``[T, N]``, as
    :mod:`policyopt.estimators` expects them.

    Attributes
    ----------
    states, actions, next_states : Tensor
        int64 indices.
    rewards : Tensor
        float64; the expected reward R(s_t, a_t), and 0 after the end.
    terminated : Tensor
        Boolean; true at the one step that led into a terminal state.
    truncated : Tensor
        Boolean; true at the last step of an episode that was cut at ``max_steps``
        before it ended.
    valid : Tensor
        Boolean; false for the padding after an episode has ended. Leave padding out of
        every mean.
    """

    states: Tensor
    actions: Tensor
    rewards: Tensor
    next_states: Tensor
    terminated: Tensor
    truncated: Tensor
    valid: Tensor


def sample_trajectories(
    mdp: FiniteMDP,
    policy: Tensor,
    n: int,
    *,
    max_steps: int,
    generator: torch.Generator | None = None,
) -> Trajectories:
    """Sample ``n`` independent episodes, all at once.

    Parameters
    ----------
    mdp : FiniteMDP
        The process; the first states are drawn from ``mdp.initial``.
    policy : Tensor
        ``[S, A]`` probabilities.
    n : int
        Number of episodes, at least 1.
    max_steps : int
        Episodes that have not ended after so many steps are cut and marked
        ``truncated``; at least 1.
    generator : torch.Generator, optional
        Source of randomness; without it PyTorch's global one is used.

    Returns
    -------
    Trajectories
        ``[T, N]`` tensors, with ``T`` the length of the longest episode and ``N = n``.

    Raises
    ------
    ValueError
        For ``n < 1``, ``max_steps < 1`` or a bad policy.
    """
    require(n >= 1, "n must be >= 1", n)
    require(max_steps >= 1, "max_steps must be >= 1", max_steps)
    policy = _check_policy(mdp, policy).detach()

    def draw(probabilities: Tensor) -> Tensor:
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)

    state = draw(mdp.initial.expand(n, -1))
    steps: list[tuple[Tensor, ...]] = []
    for t in range(max_steps):
        valid = ~mdp.terminal[state]
        if t > 0 and not valid.any():
            break
        action = draw(policy[state])
        next_state = draw(mdp.P[state, action])
        ended = mdp.terminal[next_state]
        cut = ~ended & (t == max_steps - 1)
        reward = mdp.R[state, action]
        flags = (valid & ended, valid & cut, valid)
        steps.append((state, action, reward, next_state, *flags))
        state = next_state
    return Trajectories(*(torch.stack(column) for column in zip(*steps, strict=True)))


# --- Checks and graph arguments ---


def _check_distributions(name: str, probabilities: Tensor) -> None:
    """Raise unless the last dimension holds probability distributions; says where the
    first bad one is.
    """
    smallest = probabilities.min().item()  # NaN if there is one
    require(smallest >= 0, f"{name} must hold probabilities >= 0", smallest)
    total = probabilities.sum(dim=-1)
    for index in (~((total - 1.0).abs() <= 1e-6)).nonzero()[:1].tolist():
        got = total[tuple(index)].item()
        raise ValueError(f"{name}{index or ''} must sum to 1, got {got:.10g}")


def _check_policy(mdp: FiniteMDP, policy: Tensor) -> Tensor:
    """Return ``policy`` as float64 after checking it."""
    _check_shape("policy", policy, "S, A", mdp.R.shape)
    _check_distributions("policy", policy.detach())
    return policy.to(torch.float64)


def _check_shape(name: str, tensor: Tensor, axes: str, wanted: tuple[int, ...]) -> None:
    rule = f"{name} must have shape [{axes}] = {tuple(wanted)}"
    require(tensor.shape == wanted, rule, tuple(tensor.shape))


def _check_values(mdp: FiniteMDP, values: Tensor) -> None:
    _check_shape("values", values, "S", mdp.initial.shape)
    require(values.dtype == torch.float64, "values must be float64", values.dtype)


def _few(mask: Tensor, limit: int = 8) -> str:
    indices = mask.nonzero().squeeze(-1).tolist()
    more = f" and {len(indices) - limit} more" if len(indices) > limit else ""
    return f"{indices[:limit]}{more}"


def _bellman_system(mdp: FiniteMDP, policy: Tensor) -> Tensor:
    """Return I − γ P_π, ``[S, S]``, with the rows of terminal states in P_π set to 0,
    so that it is regular for γ = 1.
    """
    transitions = torch.einsum("sa,sat->st", policy, mdp.P)
    if mdp.gamma == 1.0 and mdp.allow_undiscounted:
        # The states from which no way leads to a terminal one.
        edges = transitions.detach() > 0
        endless = ~_fixed_point(lambda s: s | (edges & s).any(dim=-1), mdp.terminal)
        if endless.any():
            raise ValueError(
                "gamma = 1, but this policy may go on for ever from states "
                f"{_few(endless)}; use gamma < 1"
            )
    live = torch.where(mdp.terminal[:, None], 0.0, transitions)
    return torch.eye(len(live), dtype=live.dtype, device=live.device) - mdp.gamma * live


def _fixed_point(change: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    """Change a set of states ``[S]`` until it stays as it is."""
    while not torch.equal(changed := change(states), states):
        states = changed
    return states


def _endless_states(mdp: FiniteMDP) -> Tensor:
    """States ``[S]`` in which some policy can keep the process for ever, out of every
    terminal state.

    They are the largest set C of non-terminal states such that in each an action surely
    stays in C (the union of the end components): start with all of them, and drop
    states without such an action until none is dropped. Every policy ends with
    probability 1 exactly when C is empty, because the states that a policy visits for
    ever form such a set.
    """

    def drop(stay: Tensor) -> Tensor:
        leaves = ((mdp.P > 0) & ~stay).any(dim=-1)  # [S, A]
        return stay & (~leaves).any(dim=-1)

    return _fixed_point(drop, ~mdp.terminal)


def _ending_policy(mdp: FiniteMDP) -> Tensor:
    """Find a deterministic policy ``[S, A]`` that surely ends wherever some policy
    does.

    Built backwards: a state joins with an action that, with positive probability, leads
    to a state that has joined before.
    """
    # An action that may lead to where there is no way out is no use where a sure way
    # out exists.
    usable = torch.ones_like(mdp.terminal)
    while True:
        allowed = ~((mdp.P > 0) & ~usable).any(dim=-1)
        # The first action, until one is found that leads out.
        reached, choice = mdp.terminal, greedy_policy(torch.zeros_like(mdp.R))
        while True:
            closer = allowed & ((mdp.P > 0) & reached).any(dim=-1)
            joining = closer.any(dim=-1) & ~reached
            if not joining.any():
                break
            choice[joining] = greedy_policy(closer[joining].to(torch.float64))
            reached = reached | joining
        if torch.equal(reached, usable):
            return choice
        usable = reached


def _contraction(mdp: FiniteMDP) -> tuple[Tensor, float]:
    """Weights ξ ``[S]`` and α < 1 such that T* is an α-contraction in the norm max_s
    |V(s)| / ξ(s).
    """
    ones = torch.ones_like(mdp.initial)
    if mdp.gamma < 1.0:
        return ones, mdp.gamma
    endless = _endless_states(mdp)
    if endless.any():
        raise ValueError(
            f"gamma = 1 and a policy can stay for ever in states {_few(endless)}: no "
            "error bound holds; use gamma < 1, or policy_iteration"
        )
    clock = replace(mdp, R=(~mdp.terminal).to(torch.float64)[:, None].expand_as(mdp.R))
    longest = torch.maximum(policy_iteration(clock).values, ones)
    return longest, 1.0 - 1.0 / float(longest.max())
