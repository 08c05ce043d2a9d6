r"""News briefs: generated company news, summaries of every quality, and a utility that
is known exactly.

An :class:`Item` says who does what, where, for how much and why, and mentions what a
rival did last year. A summary is worth +1 for each of the five facts it gets right, −1
for each wrong value it states, and −0.05 for each word. Facts are read back from free
text by rule, so any text has a utility. A simulated annotator compares summaries with
Bradley–Terry noise over that utility.

>>> item = make_items(1, seed=0)[0]
>>> print(item.prompt.replace(". ", ".\n"))
Today Gavo Steel opens a plant in Riga for $72m to save water.
Last year rival Elka Toys built a depot in Kyoto for $74m to go solar.
Summary:
<BLANKLINE>
>>> utility("Gavo Steel opens a plant.", item)
1.75
>>> utility("Gavo Steel opens a plant in Kyoto.", item)
0.65
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = [
    "CLEAN",
    "COMPLETE",
    "MIXED",
    "Facts",
    "Item",
    "Mixture",
    "Quality",
    "count_facts",
    "find_facts",
    "make_items",
    "noise_ceiling",
    "preference_pairs",
    "prompt_records",
    "rank",
    "ranked_records",
    "sft_records",
    "utility",
    "utility_reward",
    "write_summary",
]

_NAMES = (
    "Alvo", "Brix", "Corda", "Delmo", "Elka", "Fenn", "Gavo", "Hexa", "Juno", "Kira",
)  # fmt: skip
_SECTORS = ("Air", "Bank", "Foods", "Grain", "Media", "Motors", "Steel", "Toys")
_VERBS = {"opens": "opened", "buys": "bought", "builds": "built", "rents": "rented"}
_OBJECTS = (
    "farm", "hotel", "lab", "mine", "plant", "port", "school", "store", "tower",
    "depot",
)  # fmt: skip
_CITIES = (
    "Accra", "Basel", "Cairo", "Dakar", "Delhi", "Hanoi", "Kyoto", "Leeds", "Lima",
    "Lyon", "Malmo", "Oslo", "Paris", "Perth", "Porto", "Quito", "Riga", "Rome",
    "Turin", "Zurich",
)  # fmt: skip
_REASONS = (
    "cut costs", "end delays", "go solar", "grow faster", "hire locally", "meet demand",
    "save water", "ship faster", "store grain", "test drones", "train staff",
    "win clients",
)  # fmt: skip
_FILLERS = (
    "The news came as a surprise to many.",
    "More details will follow soon.",
    "Some people like the plan, others do not.",
    "A year is a long time in this sector.",
)


class Facts(NamedTuple):
    """The five facts of one event, as they are written in a summary."""

    who: str
    """Company, such as ``"Fenn Air"``."""
    what: str
    """Verb and object, such as ``"buys a port"``."""
    where: str
    """City."""
    how_much: str
    """Price, such as ``"$98m"``."""
    why: str
    """Reason, such as ``"cut costs"``."""


@dataclass(frozen=True)
class Item:
    """One piece of news."""

    facts: Facts
    """This year's event: what a summary should say."""
    last_year: Facts
    """A rival's event of last year: what a summary should leave out. It shares no value
    with ``facts``.
    """
    prompt: str
    """The article and the request for a summary."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How a simulated writer errs. Facts are treated independently."""

    keep: float = 1.0
    """Probability that a fact is mentioned at all."""
    wrong: float = 0.0
    """Probability that a mentioned fact is wrong: last year's value two times in three,
    else an invented one.
    """
    filler: float = 0.0
    """Probability that an empty sentence follows."""


Mixture = Sequence[tuple[float, Quality]]
"""Weights and qualities of the writers that a summary's author is drawn from."""

COMPLETE = Quality()
"""All five facts, no more."""
CLEAN: Mixture = ((0.5, COMPLETE), (0.5, Quality(keep=0.6, filler=0.5)))
"""Half complete, half of varied quality, no wrong fact: what ``news-base`` was trained
on.
"""
MIXED: Mixture = (
    (0.1, COMPLETE),
    (0.4, Quality(keep=0.2, filler=0.8)),
    (0.5, Quality(keep=0.6, wrong=0.15, filler=0.7)),
)
"""Complete, nearly empty, and half full with some wrong facts: what ``news-sft`` was
tuned on.
"""


def _draw_fact(slot: str, rng: random.Random) -> str:
    if slot == "who":
        return f"{rng.choice(_NAMES)} {rng.choice(_SECTORS)}"
    if slot == "what":
        return f"{rng.choice(tuple(_VERBS))} a {rng.choice(_OBJECTS)}"
    if slot == "where":
        return rng.choice(_CITIES)
    if slot == "how_much":
        return f"${rng.randint(10, 99)}m"
    return rng.choice(_REASONS)


def _draw_other(slot: str, value: str, rng: random.Random) -> str:
    """Draw a value that differs from ``value``."""
    while (other := _draw_fact(slot, rng)) == value:
        pass
    return other


def _clauses(
    subject: str,
    action: str,
    where: str | None,
    how_much: str | None,
    why: str | None,
    rng: random.Random,
) -> str:
    """Put facts into one sentence, in one of three orders."""
    place, price, reason = (
        where and f"in {where}",
        how_much and f"for {how_much}",
        why and f"to {why}",
    )
    order = rng.randrange(4)
    if order == 1 and place:
        parts = [f"{place},", subject, action, price, reason]
    elif order == 2 and reason:
        parts = [f"{reason},", subject, action, place, price]
    else:
        parts = [subject, action, place, price, reason]
    sentence = " ".join(part for part in parts if part)
    return sentence[0].upper() + sentence[1:] + "."


def make_items(count: int, *, seed: int) -> list[Item]:
    """Generate ``count`` pieces of news; the same seed gives the same news.

    There are about 10⁹ different events, so items of different seeds practically never
    coincide.
    """
    rng = random.Random(seed)
    return [_make_item(rng) for _ in range(count)]


def _make_item(rng: random.Random) -> Item:
    facts = Facts(*(_draw_fact(slot, rng) for slot in Facts._fields))
    last_year = Facts(
        *(
            _draw_other(slot, value, rng)
            for slot, value in zip(Facts._fields, facts, strict=True)
        )
    )
    verb, rest = last_year.what.split(" ", 1)
    old = last_year._replace(what=f"{_VERBS[verb]} {rest}")
    news = _clauses(f"today {facts.who}", *facts[1:], random.Random(0))
    history = _clauses(f"last year rival {old.who}", *old[1:], random.Random(0))
    article = f"{news} {history}" if rng.random() < 0.5 else f"{history} {news}"
    return Item(facts, last_year, f"{article}\nSummary:\n")


def write_summary(item: Item, quality: Quality | Mixture, rng: random.Random) -> str:
    """Write a summary of the given quality, or of one drawn from a mixture.

    Examples
    --------
    >>> rng, item = random.Random(1), make_items(1, seed=0)[0]
    >>> write_summary(item, COMPLETE, rng)
    'Gavo Steel opens a plant in Riga for $72m to save water.'
    """
    if not isinstance(quality, Quality):
        (quality,) = rng.choices(
            [q for _, q in quality], [weight for weight, _ in quality]
        )
    stated: list[str | None] = []
    for slot, right, old in zip(Facts._fields, item.facts, item.last_year, strict=True):
        value: str | None = right
        if rng.random() >= quality.keep:
            value = None
        elif rng.random() < quality.wrong:
            value = old if rng.random() < 2 / 3 else _draw_other(slot, right, rng)
        stated.append(value)
    who, what, where, how_much, why = stated
    text = _clauses(who or "the firm", what or "acts", where, how_much, why, rng)
    if rng.random() < quality.filler:
        text += " " + rng.choice(_FILLERS)
    return text


def _alternatives(words: Sequence[str]) -> str:
    return "(?:" + "|".join(map(re.escape, words)) + ")"


_PRESENT = {past: present for present, past in _VERBS.items()}
_PATTERNS = {
    slot: re.compile(rf"(?<!\w){pattern}(?!\w)", re.IGNORECASE)
    for slot, pattern in {
        "who": rf"{_alternatives(_NAMES)}\s+{_alternatives(_SECTORS)}",
        "what": _alternatives([*_VERBS, *_PRESENT])
        + rf"\s+a\s+{_alternatives(_OBJECTS)}",
        "where": _alternatives(_CITIES),
        "how_much": r"\$\d+m",
        "why": _alternatives([reason.replace(" ", "~") for reason in _REASONS]).replace(
            "\\~", r"\s+"
        ),
    }.items()
}


def find_facts(text: str) -> dict[str, set[str]]:
    """Read back which values a text states for each slot of :class:`Facts`; any text
    will do.

    Case and spacing do not matter, nor does the tense of the verb. Values are returned
    in lower case.

    Examples
    --------
    >>> text = "In OSLO  Fenn Air bought a port, and Oslo is glad. $9m? $ 9 m?"
    >>> for slot, values in find_facts(text).items():
    ...     print(slot, sorted(values))
    who ['fenn air']
    what ['buys a port']
    where ['oslo']
    how_much ['$9m']
    why []
    """
    found = {}
    for slot, pattern in _PATTERNS.items():
        values = {" ".join(match.lower().split()) for match in pattern.findall(text)}
        if slot == "what":
            values = {
                " ".join([_PRESENT.get(verb := v.split()[0], verb), *v.split()[1:]])
                for v in values
            }
        found[slot] = values
    return found


def count_facts(summary: str, item: Item | Sequence[str]) -> tuple[int, int]:
    """Count the facts that a summary gets right (at most 5) and the wrong values it
    states.

    Parameters as in :func:`utility`.
    """
    facts = item.facts if isinstance(item, Item) else Facts(*item)
    stated = find_facts(summary)
    right = sum(
        fact.lower() in stated[slot]
        for slot, fact in zip(Facts._fields, facts, strict=True)
    )
    return right, sum(map(len, stated.values())) - right


def utility(summary: str, item: Item | Sequence[str]) -> float:
    """Score a summary exactly: facts right − wrong values − 0.05 · words.

    A value counts once, however often it is repeated; words are what spaces separate.

    Parameters
    ----------
    summary : str
        Any text.
    item : Item or sequence of str
        The item, or its five facts in the order of :class:`Facts`.

    Returns
    -------
    float
        At most 5; not bounded below. 0 for the empty text.

    Examples
    --------
    >>> item = make_items(1, seed=0)[0]
    >>> utility("Gavo Steel opens a plant in Riga for $72m to save water.", item)
    4.4
    """
    right, wrong = count_facts(summary, item)
    return right - wrong - 0.05 * len(summary.split())


def utility_reward(
    completions: Sequence[str],
    prompts: Sequence[Any],
    *,
    facts: Sequence[Sequence[str]],
    **columns: object,
) -> list[float]:
    """Reward function for the trainers: :func:`utility` of each completion, given the
    column ``facts``.
    """
    return [
        utility(completion, row)
        for completion, row in zip(completions, facts, strict=True)
    ]


def prompt_records(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Make records with the columns ``prompt`` and ``facts`` (the five facts, which
    :func:`utility_reward` needs).
    """
    return [{"prompt": item.prompt, "facts": list(item.facts)} for item in items]


def sft_records(
    items: Sequence[Item], quality: Quality | Mixture = MIXED, *, seed: int
) -> list[dict[str, Any]]:
    """Make records with the columns ``prompt`` and ``completion``, one summary an
    item.
    """
    rng = random.Random(seed)
    return [
        {"prompt": item.prompt, "completion": write_summary(item, quality, rng)}
        for item in items
    ]


def rank(
    utilities: Sequence[float], *, temperature: float, rng: random.Random
) -> list[int]:
    """Order summaries as a noisy annotator does: positions, best first.

    The annotator draws from the Plackett–Luce model with scores utility / temperature
    (by adding Gumbel noise), so of two summaries a is put before b with the
    Bradley–Terry probability σ((u_a − u_b)/temperature). Temperature 0 is the exact
    order, with ties broken by chance.

    Raises
    ------
    ValueError
        If the temperature is negative.

    References
    ----------
    Bradley & Terry (1952), doi:10.2307/2334029; Plackett (1975), doi:10.2307/2346567.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be >= 0, got {temperature!r}")
    keys = []
    for value in utilities:
        gumbel = -math.log(-math.log(1.0 - rng.random() or 0.5**53) or 0.5**53)
        keys.append((value + temperature * gumbel, gumbel))
    return sorted(range(len(keys)), key=keys.__getitem__, reverse=True)


def ranked_records(
    items: Sequence[Item],
    texts: Sequence[Sequence[str]],
    *,
    temperature: float = 1.0,
    seed: int,
) -> list[dict[str, Any]]:
    """Let the annotator rank each item's summaries: columns ``prompt``, ``ranked``
    (best first) and ``facts``.

    Equal texts count as one; an item with fewer than two different texts is left out.

    Parameters
    ----------
    items : sequence of Item
    texts : sequence of sequence of str
        The summaries of each item.
    temperature : float
        Of the annotator's noise, in units of utility; see :func:`rank`.
    seed : int
    """
    rng = random.Random(seed)
    records = []
    for item, summaries in zip(items, texts, strict=True):
        different = list(dict.fromkeys(summaries))
        if len(different) < 2:
            continue
        order = rank(
            [utility(text, item) for text in different],
            temperature=temperature,
            rng=rng,
        )
        records.append(
            {
                "prompt": item.prompt,
                "ranked": [different[i] for i in order],
                "facts": list(item.facts),
            }
        )
    return records


def preference_pairs(
    items: Sequence[Item],
    texts: Sequence[Sequence[str]],
    *,
    temperature: float = 1.0,
    seed: int,
) -> list[dict[str, Any]]:
    """Let the annotator compare summaries two by two: columns ``prompt``, ``chosen``,
    ``rejected``, ``facts``.

    Parameters as in :func:`ranked_records`. Each text is compared once, with its
    neighbour in the list, so ``2n`` texts give ``n`` independent pairs; pairs of equal
    texts are left out.

    Examples
    --------
    >>> item = make_items(1, seed=0)[0]
    >>> texts = ["Gavo Steel opens a plant.", "Kira Bank opens a plant."]
    >>> pairs = preference_pairs([item], [texts], temperature=0, seed=0)
    >>> pairs[0]["rejected"]
    'Kira Bank opens a plant.'
    """
    couples = [
        (item, couple)
        for item, summaries in zip(items, texts, strict=True)
        for couple in zip(summaries[::2], summaries[1::2], strict=False)
    ]
    ranked = ranked_records(
        [item for item, _ in couples],
        [couple for _, couple in couples],
        temperature=temperature,
        seed=seed,
    )
    return [
        {
            "prompt": row["prompt"],
            "chosen": row["ranked"][0],
            "rejected": row["ranked"][1],
            "facts": row["facts"],
        }
        for row in ranked
    ]


def noise_ceiling(
    pairs: Sequence[Mapping[str, Any]], *, temperature: float = 1.0
) -> float:
    """Agreement with the annotator that a judge who knows the exact utility can expect:
    the mean of σ(|Δu|/τ).

    Parameters
    ----------
    pairs : sequence of mapping
        As :func:`preference_pairs` makes them.
    temperature : float
        τ, the annotator's, > 0.

    Raises
    ------
    ValueError
        If there are no pairs, or the temperature is not positive.
    """
    if not pairs:
        raise ValueError("there are no pairs to compute the noise ceiling from")
    if temperature <= 0:
        raise ValueError(
            f"temperature must be > 0, got {temperature!r}; without noise the ceiling "
            "is 1"
        )
    gaps = [
        abs(
            utility(row["chosen"], row["facts"])
            - utility(row["rejected"], row["facts"])
        )
        for row in pairs
    ]
    return sum(1 / (1 + math.exp(-gap / temperature)) for gap in gaps) / len(gaps)
