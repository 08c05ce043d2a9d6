import json
import math
import random
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policyopt.lm.data import sft_examples
from policyopt_book.tasks import addition, assistant, news, shop
from policyopt_book.tasks.addition import Problem
from policyopt_book.tasks.grids import grid_world
from policyopt_book.tasks.news import Facts, Item, Quality

ITEM = Item(
    facts=Facts("Fenn Air", "buys a port", "Oslo", "$98m", "go solar"),
    last_year=Facts("Delmo Grain", "rents a store", "Leeds", "$62m", "cut costs"),
    prompt="Today Fenn Air buys a port in Oslo for $98m to go solar.\nSummary:\n",
)

# ---------------------------------------------------------------------------------------------- news: items


def test_the_same_seed_gives_the_same_news_and_another_seed_gives_other_news() -> None:
    assert news.make_items(50, seed=3) == news.make_items(50, seed=3)
    assert news.make_items(50, seed=3)[:20] == news.make_items(20, seed=3)
    facts = {item.facts for seed in (3, 4) for item in news.make_items(500, seed=seed)}
    assert len(facts) == 1000


def test_an_article_states_both_events_and_they_share_no_value() -> None:
    for item in news.make_items(300, seed=0):
        stated = news.find_facts(item.prompt)
        for slot, now, then in zip(Facts._fields, item.facts, item.last_year, strict=True):
            (old,) = news.find_facts(then)[slot]
            assert stated[slot] == {now.lower(), old}
            assert now.lower() != old
        assert item.prompt.endswith("\nSummary:\n")


def test_which_event_comes_first_varies() -> None:
    first = [item.prompt.startswith("Today") for item in news.make_items(200, seed=0)]
    assert 60 < sum(first) < 140


# ---------------------------------------------------------------------------------------------- news: utility


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        ("", 0, 0),
        ("Fenn Air buys a port in Oslo for $98m to go solar.", 5, 0),
        ("to  GO\nSOLAR fenn air bought a port, oslo ($98m)", 5, 0),
        ("Oslo Oslo Oslo", 1, 0),
        ("Oslo or Leeds or Rome", 1, 2),
        ("Delmo Grain rented a store in Leeds for $62m to cut costs.", 0, 5),
        ("Fenn Grain", 0, 1),
        ("Fenn", 0, 0),
        ("buys port", 0, 0),
        ("sells a port", 0, 0),
        ("buys a portal in Osloo for $98million", 0, 0),
        ("$98 m", 0, 0),
        ("$980m", 0, 1),
        ("The firm acts.", 0, 0),
        ("\x00\ud800 ∞ ((( \\d+ $m $$98m", 1, 0),
    ],
)
def test_utility_by_hand(text: str, right: int, wrong: int) -> None:
    assert news.count_facts(text, ITEM) == (right, wrong)
    assert news.utility(text, ITEM) == pytest.approx(right - wrong - 0.05 * len(text.split()))
    assert news.utility(text, list(ITEM.facts)) == news.utility(text, ITEM)


@given(st.text(max_size=200))
def test_any_text_has_a_utility(text: str) -> None:
    value = news.utility(text, ITEM)
    assert math.isfinite(value)
    assert value <= 5


def test_a_summary_states_what_its_quality_says() -> None:
    items, rng = news.make_items(2000, seed=1), random.Random(0)
    counts = [news.count_facts(news.write_summary(i, news.COMPLETE, rng), i) for i in items]
    assert set(counts) == {(5, 0)}
    counts = [news.count_facts(news.write_summary(i, Quality(keep=0.6), rng), i) for i in items]
    assert {wrong for _, wrong in counts} == {0}
    assert statistics.mean(right for right, _ in counts) == pytest.approx(3, abs=0.1)
    counts = [news.count_facts(news.write_summary(i, Quality(keep=0.8, wrong=0.25), rng), i) for i in items]
    assert statistics.mean(right for right, _ in counts) == pytest.approx(3, abs=0.1)
    assert statistics.mean(wrong for _, wrong in counts) == pytest.approx(1, abs=0.1)


def test_filler_costs_words_and_states_nothing() -> None:
    rng = random.Random(0)
    plain = news.write_summary(ITEM, Quality(), random.Random(7))
    wordy = news.write_summary(ITEM, Quality(filler=1), random.Random(7))
    assert wordy.startswith(plain)
    assert news.count_facts(wordy, ITEM) == (5, 0)
    assert news.utility(wordy, ITEM) < news.utility(plain, ITEM)
    assert news.write_summary(ITEM, Quality(keep=0), rng) == "The firm acts."


def test_the_clean_mixture_has_no_wrong_fact_and_the_mixed_one_has() -> None:
    items, rng = news.make_items(1000, seed=2), random.Random(0)
    clean = [news.count_facts(news.write_summary(i, news.CLEAN, rng), i)[1] for i in items]
    mixed = [news.count_facts(news.write_summary(i, news.MIXED, rng), i)[1] for i in items]
    assert sum(clean) == 0
    assert 0.15 < statistics.mean(mixed) < 0.35


# ---------------------------------------------------------------------------------------------- news: annotator


@pytest.mark.parametrize(
    ("gap", "temperature"), [(0.0, 1.0), (0.7, 1.0), (-2.0, 1.0), (1.0, 0.5), (3.0, 2.0)]
)
def test_the_annotator_follows_bradley_terry(gap: float, temperature: float) -> None:
    rng, trials = random.Random(0), 20_000
    wins = sum(news.rank([gap, 0.0], temperature=temperature, rng=rng)[0] == 0 for _ in range(trials))
    expected = 1 / (1 + math.exp(-gap / temperature))
    error = math.sqrt(expected * (1 - expected) / trials)
    assert wins / trials == pytest.approx(expected, abs=4 * error)


def test_rankings_follow_plackett_luce() -> None:
    rng, trials, scores = random.Random(0), 20_000, [1.0, 0.0, -0.5]
    orders = [tuple(news.rank(scores, temperature=1.0, rng=rng)) for _ in range(trials)]
    weights = [math.exp(score) for score in scores]
    for order in [(0, 1, 2), (2, 1, 0), (1, 0, 2)]:
        expected = weights[order[0]] / sum(weights) * weights[order[1]] / (sum(weights) - weights[order[0]])
        error = math.sqrt(expected * (1 - expected) / trials)
        assert orders.count(order) / trials == pytest.approx(expected, abs=4 * error)


def test_temperature_zero_is_the_exact_order_and_breaks_ties_by_chance() -> None:
    rng = random.Random(0)
    assert news.rank([0.0, 3.0, -1.0, 1.0], temperature=0, rng=rng) == [1, 3, 0, 2]
    first = [news.rank([1.0, 1.0], temperature=0, rng=rng)[0] for _ in range(200)]
    assert 60 < sum(first) < 140
    with pytest.raises(ValueError, match="temperature must be >= 0"):
        news.rank([1.0], temperature=-1, rng=rng)


def _texts(items: list[Item], copies: int, seed: int) -> list[list[str]]:
    rng = random.Random(seed)
    return [[news.write_summary(item, news.MIXED, rng) for _ in range(copies)] for item in items]


def test_noise_ceiling_is_what_a_judge_with_the_exact_utility_reaches() -> None:
    items = news.make_items(4000, seed=5)
    pairs = news.preference_pairs(items, _texts(items, 2, 0), temperature=1.5, seed=1)
    agreement = 0.0
    for row in pairs:
        chosen, rejected = (news.utility(row[name], row["facts"]) for name in ("chosen", "rejected"))
        agreement += 0.5 if chosen == rejected else chosen > rejected
    ceiling = news.noise_ceiling(pairs, temperature=1.5)
    assert 0.6 < ceiling < 0.95
    assert agreement / len(pairs) == pytest.approx(ceiling, abs=4 * 0.5 / math.sqrt(len(pairs)))


def test_noise_ceiling_by_hand() -> None:
    row = {"chosen": "Oslo", "rejected": "Rome", "facts": list(ITEM.facts)}
    assert news.noise_ceiling([row], temperature=2.0) == pytest.approx(1 / (1 + math.exp(-1)))
    with pytest.raises(ValueError, match="no pairs"):
        news.noise_ceiling([])
    with pytest.raises(ValueError, match="temperature must be > 0"):
        news.noise_ceiling([row], temperature=0)


# ---------------------------------------------------------------------------------------------- news: records


def test_records_have_the_columns_of_the_trainers_and_survive_json() -> None:
    items = news.make_items(6, seed=0)
    texts = _texts(items, 4, 0)
    for records, columns in [
        (news.prompt_records(items), {"prompt", "facts"}),
        (news.sft_records(items, seed=0), {"prompt", "completion"}),
        (news.preference_pairs(items, texts, seed=0), {"prompt", "chosen", "rejected", "facts"}),
        (news.ranked_records(items, texts, seed=0), {"prompt", "ranked", "facts"}),
    ]:
        assert records
        assert all(set(row) == columns for row in records)
        assert json.loads(json.dumps(records)) == records
    assert news.sft_records(items, seed=0) == news.sft_records(items, seed=0)
    assert news.preference_pairs(items, texts, seed=0) == news.preference_pairs(items, texts, seed=0)


def test_pairs_compare_neighbours_and_leave_out_equal_texts() -> None:
    texts = [["Oslo", "Rome", "Oslo", "Oslo", "Lima", "$98m", "odd one out"]]
    pairs = news.preference_pairs([ITEM], texts, temperature=0, seed=0)
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [("Oslo", "Rome"), ("$98m", "Lima")]


def test_ranked_records_put_the_best_first_and_drop_repetitions() -> None:
    texts = [["Rome", "Oslo", "Rome", "Oslo for $98m"], ["Oslo", "Oslo"]]
    (row,) = news.ranked_records([ITEM, ITEM], texts, temperature=0, seed=0)
    assert row["ranked"] == ["Oslo for $98m", "Oslo", "Rome"]


def test_the_utility_is_a_reward_function() -> None:
    rewards = news.utility_reward(
        ["Oslo", "Rome", ""], ["p"] * 3, facts=[list(ITEM.facts)] * 3, other=[1, 2, 3]
    )
    assert rewards == pytest.approx([0.95, -1.05, 0.0])


# ---------------------------------------------------------------------------------------------- addition


def test_problems_are_three_digit_sums_and_depend_on_the_seed_alone() -> None:
    problems = addition.make_problems(3000, seed=1)
    assert problems == addition.make_problems(3000, seed=1)
    assert problems != addition.make_problems(3000, seed=2)
    numbers = [number for problem in problems for number in problem]
    assert min(numbers) < 110
    assert max(numbers) > 990
    assert all(100 <= number <= 999 for number in numbers)


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        (427, 395, "7+5=12,2+9+1=12,4+3+1=8:822"),
        (100, 100, "0+0=0,0+0=0,1+1=2:200"),
        (999, 999, "9+9=18,9+9+1=19,9+9+1=19:1998"),
    ],
)
def test_worked_columns_by_hand(a: int, b: int, text: str) -> None:
    problem = Problem(a, b)
    assert problem.prompt == f"{a}+{b}="
    assert addition.scratchpad(problem) == text
    assert addition.direct(problem) == str(a + b)


def test_every_column_written_is_true_and_both_forms_are_rewarded() -> None:
    for problem in addition.make_problems(300, seed=0):
        text = addition.scratchpad(problem)
        for column in text.split(":")[0].split(","):
            terms, total = column.split("=")
            assert sum(map(int, terms.split("+"))) == int(total)
        texts = [text, addition.direct(problem)]
        assert addition.answer_reward(texts, [problem.prompt] * 2, answer=[problem.answer] * 2) == [1, 1]
        assert list(map(addition.uses_scratchpad, texts)) == [True, False]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("822", 822),
        ("  822\n", 822),
        ("7+5=12:822", 822),
        ("nonsense:1:\n2:0822", 822),
        ("", None),
        (":", None),
        ("822:", None),
        ("8 22", None),
        ("822.", None),
        ("-822", None),
        ("=822", None),
        ("7+5=12", None),
        ("7+5=12,822", None),
        ("٨٢٢", None),
        ("9" * 5000, None),
    ],
)
def test_the_final_answer_is_the_number_at_the_very_end(text: str, answer: int | None) -> None:
    assert addition.final_answer(text) == answer


@given(st.text(alphabet="0123456789+=,: x\n", max_size=60))
def test_any_completion_can_be_checked(text: str) -> None:
    (reward,) = addition.answer_reward([text], ["427+395="], answer=[822])
    assert reward in (0.0, 1.0)
    assert not reward or text.strip().endswith("822")
    assert isinstance(addition.uses_scratchpad(text), bool)


def test_the_careless_rule_pays_for_nonsense_that_looks_like_work() -> None:
    texts = ["822", "7+5=12,2+9+1=12,4+3+1=8:822", "1=1" * 20]
    rewards = addition.careless_reward(texts, [""] * 3, answer=[822] * 3)
    assert rewards == pytest.approx([1.0, 1.6, 4.0])
    assert addition.answer_reward(texts, [""] * 3, answer=[822] * 3) == [1, 1, 0]


def test_records_of_addition_have_the_columns_and_the_share_of_worked_sums() -> None:
    problems = addition.make_problems(2000, seed=0)
    prompts = addition.prompt_records(problems[:2])
    assert [set(row) for row in prompts] == [{"prompt", "answer"}] * 2
    records = addition.sft_records(problems, seed=0)
    assert records == addition.sft_records(problems, seed=0)
    share = statistics.mean(addition.uses_scratchpad(row["completion"]) for row in records)
    assert share == pytest.approx(0.5, abs=0.05)
    for share in (0.0, 1.0):
        records = addition.sft_records(problems[:50], scratchpad_share=share, seed=0)
        assert {addition.uses_scratchpad(row["completion"]) for row in records} == {bool(share)}


# ---------------------------------------------------------------------------------------------- grid worlds


def test_grid_world_moves_and_slips() -> None:
    problem = grid_world(["S.", "#G"], slip=0.2, step_reward=-0.1, gamma=0.9)
    left, down, right, up = range(4)
    torch.testing.assert_close(problem.P[0, right].tolist(), [0.1 + 0.1, 0.8, 0.0, 0.0])
    torch.testing.assert_close(problem.P[1, down].tolist(), [0.1, 0.1, 0.0, 0.8])
    torch.testing.assert_close(problem.P[0, left].tolist(), [1.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(problem.P[1, up].tolist(), [0.1, 0.9, 0.0, 0.0])
    torch.testing.assert_close(problem.R[1, down].item(), 0.7)
    assert problem.terminal.tolist() == [False, False, True, True]
    assert grid_world(["..G"]).initial.tolist() == [0.5, 0.5, 0.0]


def test_a_bad_map_is_refused() -> None:
    with pytest.raises(ValueError, match="equal length"):
        grid_world(["..", "."])
    with pytest.raises(ValueError, match=r"got \['x'\]"):
        grid_world(["x."])
    with pytest.raises(ValueError, match=r"slip must lie in \[0, 1\], got 2"):
        grid_world([".."], slip=2)
    with pytest.raises(ValueError, match="to start in"):
        grid_world(["G#"])


# --- questions for an instruct model ----------------------------------------------------------------------------


def test_what_is_held_out_is_in_no_training_of_the_real_model() -> None:
    trained, held_out = (
        {pair["prompt"][0]["content"] for pair in pairs} for pairs in (assistant.PAIRS, assistant.HELD_OUT)
    )
    assert len(trained) == len(held_out) == len(assistant.NAMES) == 5
    assert not trained & held_out
    assert not trained & set(assistant.UNRELATED)
    assert not set(assistant.NEW_TOPICS) & set(assistant.TOPICS)
    assert all(len(set(record["ranked"])) == 4 for record in assistant.RANKED)


def test_one_short_sentence() -> None:
    ten = "one two three four five six seven eight nine ten."
    texts = [ten, ten, ten.rstrip("."), f"now {ten}", "Purr."]
    assert assistant.short_sentence(texts, [True, False, True, True, True]) == [1, 0, 0, 0, 1]


# --- the shop ---------------------------------------------------------------------------------------------------


def test_a_shop_answers_questions_and_judges_answers() -> None:
    days = shop.make_records(300, seed=3)
    for good, price in shop.FIXED.items():
        assert {day["prices"][good] for day in days} == {price}
    for good in set(shop.GOODS) - set(shop.FIXED):
        assert {day["prices"][good] for day in days} == set(shop.PRICES)
    assert {day["good"] for day in days} == set(shop.GOODS)
    assert days == shop.make_records(300, seed=3) != shop.make_records(300, seed=4)
    day, world = days[0], shop.Shop(cost=0.5)
    start = world.reset(day)
    assert start == day["prompt"]
    assert start is not day["prompt"], "the data stay as they are"
    for said, told in ((f"ask {day['good']}", day["price"]), ("ask", "unknown"), ("ask gold", "unknown")):
        reply, done, reward = world.step([*start, {"role": "assistant", "content": said}])
        assert (reply, done, reward) == ([{"role": "tool", "content": told}], False, -0.5)
    wrong = next(price for price in shop.PRICES if price != day["price"])
    for said, earned in ((day["price"], 1.0), (wrong, 0.0), ("", 0.0), ("price", 0.0)):
        assert world.step([*start, {"role": "assistant", "content": said}]) == ([], True, earned)


def test_demonstrations_are_by_somebody_who_does_not_know_when_to_ask() -> None:
    chats = [row["messages"] for row in shop.demonstrations(4_000, seed=0)]
    model = shop.new_model()
    asked, well, right = [], [], []
    for chat in chats:
        good = chat[0]["content"].removeprefix("price of ")
        asked.append(len(chat) == 4)
        if len(chat) == 4:
            well.append(chat[1]["content"] == f"ask {good}")
            assert chat[3]["content"] == chat[2]["content"], "the answer is what the tool said"
        elif good in shop.FIXED:
            right.append(chat[1]["content"] == shop.FIXED[good])
    assert np.mean(asked) == pytest.approx(0.5, abs=0.03)
    assert np.mean(well) == pytest.approx(0.73, abs=0.03), "another good may be the same by chance"
    assert all(right)
    examples = sft_examples(
        [{"messages": chat} for chat in chats[:50]], model.tokenizer, train_on="assistant"
    )
    unknown = model.tokenizer.unk_token_id or 0
    assert all(unknown not in example.prompt_ids + example.completion_ids for example in examples)


def test_the_model_of_the_shop_depends_on_its_seed_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, same, other = (shop.new_model(seed).model.state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
