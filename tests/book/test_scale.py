"""What processes send and hold: the formulas of the page, beside what sockets and tensors say (CPU, gloo)."""

from __future__ import annotations

import multiprocessing as mp
import os
import re
import socket
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from joint_runs import FSDP2, environments
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config

from policyopt.lm import GRPOConfig, SamplingConfig, SFTConfig, TransformersSampler, train_grpo, train_sft
from policyopt.lm.models import LanguageModel
from policyopt_book import load_model
from policyopt_book.scale import Strategy, model_of_shape, process_share, update_traffic

PAGE = Path(__file__).parents[2] / "book" / "beyond-one-machine.md"
NEW_TOKENS = 6
MEASURED = [
    (2, "ddp", "sft"), (2, "fsdp2", "sft"), (2, "fsdp2", "grpo"), (2, "fsdp2", "grpo, synchronized"),
    (3, "fsdp2", "grpo"),
]  # fmt: skip


def small() -> Any:
    config = LlamaConfig(
        hidden_size=96, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4, vocab_size=259,
        max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def sent() -> int:
    """Bytes that this process's connections have sent, as the kernel counts them (Linux)."""
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            if str(link.readlink()).startswith("socket:"):
                with socket.socket(fileno=os.dup(int(link.name))) as connection:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)  # type: ignore[attr-defined]
                    total += struct.unpack_from("Q", info, 120)[0]  # tcpi_bytes_acked
        except OSError:  # closed since, or not TCP
            continue
    return total


def work(environment: dict[str, str], count: int, trainer: str, answers: Any) -> None:
    """One process: train for three updates, and tell what it sent in the last and held."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    model = LanguageModel(small(), load_model("addition-base", device="cpu").tokenizer)
    seen, held = list[int](), dict[str, int]()

    def local(tensor: Any) -> int:
        part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        return int(part.numel() * part.element_size())

    class Noted(torch.optim.AdamW):
        def step(self, *args: Any, **options: Any) -> Any:
            done = super().step(*args, **options)
            parameters = [p for group in self.param_groups for p in group["params"]]
            held["weights"] = sum(map(local, parameters))
            held["gradients"] = sum(local(p.grad) for p in parameters)
            moments = (s[name] for s in self.state.values() for name in ("exp_avg", "exp_avg_sq"))
            held["optimizer"] = sum(map(local, moments))
            return done

    torch.optim.AdamW = Noted  # type: ignore[misc]

    def note(row: Any) -> None:
        torch.distributed.barrier()
        seen.append(sent())

    options: dict[str, Any] = {"callback": note, "progress": False}
    if trainer == "sft":
        data = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "1+3=", "completion": "4"}] * count
        train_sft(model, data, SFTConfig(updates=3, batch_size=2 * count), **options)
    else:
        if trainer == "grpo, synchronized":
            options["sampler"] = TransformersSampler(model, synchronize=True)
        config = GRPOConfig(
            updates=3, batch_size=count, group_size=4, sampling=SamplingConfig(max_new_tokens=NEW_TOKENS)
        )

        def reward(completions: list[str]) -> list[float]:
            return [float(i) for i, _ in enumerate(completions)]

        train_grpo(model, [{"prompt": "1+1="}] * count, reward, config, **options)
    answers.put((int(environment["RANK"]), seen[-1] - seen[-2], held))


@pytest.mark.sweep
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and Linux's TCP_INFO")
@pytest.mark.parametrize(("count", "strategy", "trainer"), MEASURED)
def test_traffic_and_shares_are_what_processes_send_and_hold(
    count: int, strategy: Strategy, trainer: str
) -> None:
    context = mp.get_context("spawn")
    answers = context.Queue()
    told = environments(count, **(FSDP2 if strategy == "fsdp2" else {}))
    processes = [
        context.Process(target=work, args=(one, count, trainer, answers), daemon=True) for one in told
    ]
    for process in processes:
        process.start()
    try:
        said = {rank: (moved, held) for rank, moved, held in (answers.get(timeout=120) for _ in processes)}
    finally:
        for process in processes:
            process.join(timeout=20)
            process.kill()
    synchronize = "synchronized" in trainer
    grpo = trainer != "sft"
    expected = update_traffic(
        small(), processes=count, strategy=strategy, passes=2 if grpo else 1,
        new_tokens=NEW_TOKENS if grpo else 0, synchronize=synchronize, gloo=True,
    )  # fmt: skip
    for moved, _ in said.values():
        assert moved == pytest.approx(sum(expected), rel=0.02)
    share = process_share(small(), processes=count, strategy=strategy)
    assert said[0][1] == {name: getattr(share, name) for name in ("weights", "gradients", "optimizer")}


# --- The page's tables ---

SHAPES = {
    "0.5 B": Qwen2Config(
        hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        intermediate_size=4864, vocab_size=151936, tie_word_embeddings=True,
    ),
    "7 B": Qwen2Config(
        hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        intermediate_size=18944, vocab_size=152064, tie_word_embeddings=False,
    ),
    "70 B": LlamaConfig(
        hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        intermediate_size=28672, vocab_size=128256, tie_word_embeddings=False,
    ),
}  # fmt: skip
PARAMETERS = {"0.5 B": 494_032_768, "7 B": 7_615_616_512, "70 B": 70_553_706_496}  # of the published models


def test_the_tables_are_what_the_formulas_say() -> None:
    models = {name: model_of_shape(config, torch.float32) for name, config in SHAPES.items()}
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert counts == PARAMETERS
    rows = re.findall(r"^\| ([\d.]+ B) \| (.+?) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    assert len(rows) == 14
    for name, how, numbers in rows:
        said = [0.0 if n == "–" else float(n) for n in numbers.split(" | ")]
        count = int(how.split(",")[0])
        strategy: Strategy = "fsdp2" if "FSDP2" in how else "ddp"
        options: Any = {"processes": count, "strategy": strategy, "synchronize": "layer by layer" in how}
        share = process_share(models[name], **options)
        traffic = update_traffic(models[name], pieces=8, passes=2, new_tokens=512, **options)
        kinds = [
            [sum(share[:3]), share.sampling, share.training, share.total],
            [traffic.sampling, traffic.forward + traffic.backward, traffic.gradients, sum(traffic)],
        ]
        assert said in [[round(n / 1e9, 1) for n in kind] for kind in kinds], (name, how)


def test_what_shares_and_traffic_depend_on() -> None:
    model = small()
    size = sum(4 * p.numel() for p in model.parameters())
    one = process_share(model, processes=1, strategy="fsdp2", samples=False)
    assert one[:3] == (size, size, 2 * size)
    assert sum(update_traffic(model, processes=1, strategy="fsdp2", new_tokens=9)) == 0
    assert update_traffic(model, processes=4, strategy="ddp").gradients == size * 3 // 2
    offline = update_traffic(model, processes=4, strategy="fsdp2")
    assert offline.sampling == 0
    assert offline.gradients == pytest.approx(size * 3 / 4, rel=0.01)  # 259 rows are not a multiple of 4
    assert update_traffic(model, processes=4, strategy="fsdp2", pieces=3) == tuple(3 * n for n in offline)
    with pytest.raises(ValueError, match="processes must be >= 1"):
        process_share(model, processes=0, strategy="ddp")
