"""The glossary: short entries in order, each with a chapter that speaks of the term."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

import notebooks
from repository import ROOT

PAGE = (ROOT / "book" / "glossary.md").read_text(encoding="utf-8")
# Said on the page: the chapters do without the word.
UNUSED = {"alignment tax"}
# How a chapter may put it, where it does not use the term itself.
ALIASES = {
    "truncation": "truncat",
    "TD error": r"\\delta_t",
    "Fisher information matrix": "fisher",
    "importance ratio": "ratio",
    "on-policy": "off policy",
    "Bradley–Terry model": "bradley",
    "nucleus sampling": "top_p|filter",
    "confidence band": "bootstrap_band",
    "preference pair": "preference|comparison",
    "reference policy": "reference",
}
WANTED = """
    advantage, baseline, bootstrapping, discount, episode, truncation, termination, on-policy, importance ratio,
    surrogate, trust region, natural gradient, GAE, critic, KL divergence, entropy, reward model, preference pair,
    reference policy, over-optimisation, alignment tax, completion, group, noise ceiling, clip, margin, score,
    REINFORCE, actor-critic, TRPO, PPO, RLHF, DPO, GRPO, MDP, logit, nat, token, epoch, minibatch, scratchpad, adapter
"""


@dataclass(frozen=True)
class Entry:
    terms: tuple[str, ...]
    text: str

    @property
    def chapters(self) -> list[str]:
        return re.findall(r"\]\(([\w-]+)\.ipynb\)", self.text)


def glossaries() -> list[list[Entry]]:
    found = []
    for body in re.findall(r"(?ms)^:::\{glossary\}\n(.*?)^:::$", PAGE):
        blocks = [block.splitlines() for block in body.strip().split("\n\n")]
        found.append(
            [
                Entry(
                    tuple(line for line in lines if not line.startswith(" ")),
                    " ".join(line.strip() for line in lines if line.startswith(" ")),
                )
                for lines in blocks
            ]
        )
    return found


ENTRIES = {entry.terms[0]: entry for glossary in glossaries() for entry in glossary}


def test_terms_are_there_once_and_in_order() -> None:
    for glossary in glossaries():
        first = [entry.terms[0].lower() for entry in glossary]
        assert first == sorted(first)
    terms = [term for entry in ENTRIES.values() for term in entry.terms]
    assert len(terms) == len(set(terms))
    assert sum(map(len, glossaries())) == len(ENTRIES)
    assert {term.strip() for term in WANTED.split(",")} <= set(terms)


@pytest.mark.parametrize("term", ENTRIES)
def test_an_entry_is_short_and_its_chapters_speak_of_it(term: str) -> None:
    entry = ENTRIES[term]
    sentences = re.split(r"(?<=[.!?)])\s+(?=[A-Z(])", re.sub(r"See \[.*$", "", entry.text).strip())
    assert 1 <= len([s for s in sentences if s]) <= 5
    assert len(entry.text) < 650
    assert set(entry.chapters) <= set(notebooks.chapters())
    if term in UNUSED or not entry.chapters:
        return
    for chapter in entry.chapters:
        cells = notebooks.read(notebooks.notebook_path(chapter)).cells
        text = re.sub(r"[\s–-]+", " ", "\n".join(c.source for c in cells).lower())
        words = [re.sub(r"[\s–-]+", " ", t.lower()) for t in entry.terms]
        pattern = "|".join([*map(re.escape, words), *([ALIASES[term]] if term in ALIASES else [])])
        assert re.search(pattern, text), f"{chapter} does not speak of {entry.terms}"
