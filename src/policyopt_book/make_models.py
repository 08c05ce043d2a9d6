"""Make the tiny language models again: ``make models``, or ``python -m
policyopt_book.make_models --out FOLDER``.

Each is a small standard Llama with a byte-level tokenizer, trained on an endless stream
of generated text. The same seed, versions and thread count give the same weights, bit
for bit. What made a model, and how good it is, is written beside it in ``made.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from policyopt_book.tasks import addition, news

__all__ = ["RECIPES", "Recipe", "evaluate", "make", "sample_texts"]

MODELS = Path(__file__).parent / "models"
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"

Records = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one model is made."""

    task: str
    """``"news"`` or ``"addition"``."""
    start: str | None = None
    """Model to go on from; None starts from random weights."""
    steps: int
    """Optimiser steps."""
    batch: int = 64
    """Examples a step, each seen once."""
    learning_rate: float
    """AdamW's peak step size; it rises over the first 5 % of the steps and then falls
    to 0 along a cosine.
    """
    seed: int
    """Of the weights and of the text."""
    layers: int = 3
    vocabulary: int = 640
    """Most tokens, the 256 bytes and 3 special ones included; fewer when the text has
    no more words to merge.
    """


RECIPES = {
    "news-base": Recipe(task="news", steps=2000, learning_rate=3e-3, seed=1),
    "news-sft": Recipe(
        task="news", start="news-base", steps=300, learning_rate=1e-3, seed=2
    ),
    "addition-base": Recipe(
        task="addition",
        steps=1500,
        learning_rate=3e-3,
        seed=3,
        layers=2,
        vocabulary=259,
    ),
}
"""The tiny models, in the order in which they are made."""


def _examples(name: str, count: int, seed: int) -> Records:
    """``count`` records with the columns prompt and completion, as the model ``name``
    is trained on.
    """
    if RECIPES[name].task == "addition":
        return addition.sft_records(addition.make_problems(count, seed=seed), seed=seed)
    quality = news.MIXED if name == "news-sft" else news.CLEAN
    return news.sft_records(news.make_items(count, seed=seed), quality, seed=seed)


def _make_tokenizer(recipe: Recipe, texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be encoded and comes back unchanged. Digits always
    stand alone.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=recipe.vocabulary,
            special_tokens=[PAD, BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=256,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id")
        for name in ("bos", "eos", "pad")
    }
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=recipe.layers,
            num_attention_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.05,
            dtype="float32",
            **ids,
        )
    )
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **ids
    )
    return model


def _loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: Records
) -> Tensor:
    """Mean cross-entropy of the completions' tokens, EOS included, in nats.

    Padding stands on the right, where causal attention keeps it out of sight of every
    token that counts.
    """
    prompts = tokenizer([row["prompt"] for row in records]).input_ids
    answers = tokenizer(
        [row["completion"] for row in records], add_special_tokens=False
    ).input_ids
    rows = [
        p + a + [tokenizer.eos_token_id] for p, a in zip(prompts, answers, strict=True)
    ]
    width = max(map(len, rows))
    ids = torch.tensor(
        [row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows]
    )
    position = torch.arange(width)
    starts, ends = torch.tensor(
        [[len(p), len(row)] for p, row in zip(prompts, rows, strict=True)]
    ).T
    target = (position >= starts[:, None]) & (position < ends[:, None])
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][target[:, 1:]])
    return torch.nn.functional.cross_entropy(logits, ids[target])


def _train(
    name: str,
    recipe: Recipe,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    progress: bool,
) -> float:
    """Train in place; return the mean loss of the last tenth of the steps, in nats per
    token.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.01,
    )
    warmup = max(1, recipe.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        ),
    )
    rng = random.Random(recipe.seed)
    losses = []
    for _ in (bar := tqdm(range(recipe.steps), desc=name, disable=not progress)):
        loss = _loss(
            model, tokenizer, _examples(name, recipe.batch, rng.getrandbits(48))
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            bar.set_postfix(loss=f"{sum(losses[-50:]) / 50:.3f}")
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


@torch.no_grad()
def sample_texts(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    greedy: bool = False,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> list[str]:
    """Continue each prompt once, at temperature 1 or greedily; the texts hold no
    special tokens.
    """
    batch = tokenizer(
        list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False
    )
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    config = GenerationConfig.from_dict(
        {
            **model.generation_config.to_dict(),
            "do_sample": not greedy,
            "max_new_tokens": max_new_tokens,
        }
    )
    if greedy:
        config.temperature = config.top_k = config.top_p = None
    ids = model.generate(**batch, generation_config=config)
    torch.set_rng_state(generator_state)
    return tokenizer.batch_decode(
        ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True
    )


def evaluate(
    name: str,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    samples: int = 512,
    seed: int = 10**6,
) -> dict[str, float]:
    """Measure a model on problems it has not seen, one completion each.

    Returns
    -------
    dict
        For news the mean ``utility``, sampled and greedy, and the mean number of right
        and wrong facts; for addition the ``accuracy``, sampled and greedy, and the
        share of samples that use the scratchpad. For both, mean lengths in tokens
        (prompts with BOS, completions with EOS).
    """
    figures: dict[str, float] = {}
    if RECIPES[name].task == "news":
        items = news.make_items(samples, seed=seed)
        prompts = [item.prompt for item in items]
    else:
        problems = addition.make_problems(samples, seed=seed)
        prompts = [problem.prompt for problem in problems]
    for mode in ("sampled", "greedy"):
        texts = sample_texts(
            model, tokenizer, prompts, greedy=mode == "greedy", seed=seed
        )
        lengths = [
            len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False).input_ids
        ]
        if RECIPES[name].task == "news":
            figures[f"utility_{mode}"] = _mean(map(news.utility, texts, items))
            right, wrong = zip(*map(news.count_facts, texts, items), strict=True)
            figures[f"facts_right_{mode}"] = _mean(right)
            figures[f"facts_wrong_{mode}"] = _mean(wrong)
        else:
            answers = [problem.answer for problem in problems]
            figures[f"accuracy_{mode}"] = _mean(
                addition.answer_reward(texts, prompts, answer=answers)
            )
            figures[f"scratchpad_{mode}"] = _mean(map(addition.uses_scratchpad, texts))
        figures[f"completion_tokens_{mode}"] = _mean(lengths)
    figures["prompt_tokens"] = _mean(map(len, tokenizer(prompts).input_ids))
    return figures


def _mean(values: Any) -> float:
    numbers = list(values)
    return round(float(sum(numbers)) / len(numbers), 4)


def make(
    name: str,
    out: Path = MODELS,
    *,
    recipe: Recipe | None = None,
    progress: bool = False,
) -> Path:
    """Make one model and save it to ``out/name``.

    Parameters
    ----------
    name : str
        A key of :data:`RECIPES`.
    out : Path
        Folder of the models. A recipe with a ``start`` finds its model there.
    recipe : Recipe, optional
        Instead of ``RECIPES[name]``.
    progress : bool
        Show a bar.

    Returns
    -------
    Path
        The folder written.
    """
    recipe = recipe or RECIPES[name]
    begin = time.perf_counter()
    if recipe.start:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(out / recipe.start)
        model = LlamaForCausalLM.from_pretrained(out / recipe.start)
    else:
        texts = [
            text for row in _examples(name, 4000, recipe.seed) for text in row.values()
        ]
        tokenizer = _make_tokenizer(recipe, texts)
        model = _make_model(recipe, tokenizer)
    loss = _train(name, recipe, model, tokenizer, progress)
    model.eval()  # type: ignore[no-untyped-call]
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written for the owner alone
    made = {
        "recipe": dataclasses.asdict(recipe),
        "parameters": model.num_parameters(),
        "loss": round(loss, 4),
        "measured": evaluate(name, model, tokenizer),
        "seconds": round(time.perf_counter() - begin, 1),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "tokenizers": tokenizers.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (folder / "made.json").write_text(
        json.dumps(made, indent=2) + "\n", encoding="utf-8"
    )
    return folder


def main() -> None:
    """Parse the command line and make the models."""
    parser = argparse.ArgumentParser(description="Make the tiny language models again.")
    parser.add_argument("names", nargs="*", default=list(RECIPES), help="default: all")
    parser.add_argument("--out", type=Path, default=MODELS, help="folder of the models")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="results differ in the last bits between counts",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.names:
        folder = make(name, arguments.out, progress=True)
        about = json.loads((folder / "made.json").read_text(encoding="utf-8"))
        print(f"{folder}: {about['measured']}")


if __name__ == "__main__":
    main()
