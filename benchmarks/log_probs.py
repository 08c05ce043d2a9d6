"""Measure chunked log-probabilities against simpler ways, forward and backward.

    python benchmarks/log_probs.py [--device cuda] [--dtypes bfloat16] [--tokens 512]

The package, and the package told the gradient beforehand (as in SFT, and in GRPO with
one update per batch), against one ``torch.utils.checkpoint`` per chunk, PyTorch 2.13's
own fused cross-entropy (no entropy, soft cap, filters or composite heads; bfloat16
results for bfloat16) and the dense form. All take turns in random order; a ratio is the median of
the rounds' ratios to the package. Time on the CPU is of one thread, in CPU seconds.
Memory is the peak beyond the inputs, gradients included, in a process of its own:
resident on the CPU, ``torch.cuda.max_memory_allocated`` on CUDA.
"""

import argparse
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from policyopt.lm.log_probs import chunked_log_probs

SETTINGS = [(4096, 896, 131_072), (4096, 576, 49_152), (2000, 64, 640), (500, 64, 640)]


def dense(head: nn.Linear, h: Tensor, targets: Tensor, size: int = 0) -> Tensor:
    """Score all tokens at once."""
    logits = head(h)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def checkpointed(head: nn.Linear, h: Tensor, targets: Tensor, size: int) -> Tensor:
    """Score ``size`` tokens at once, and again in the backward pass."""
    pieces = zip(h.split(size), targets.split(size), strict=True)
    again = [checkpoint(dense, head, *piece, use_reentrant=False) for piece in pieces]
    return torch.cat(again)


def own(head: nn.Linear, h: Tensor, targets: Tensor, size: int) -> Tensor:
    """Score with PyTorch's linear cross-entropy."""
    how = nn.LinearCrossEntropyOptions(batch_chunk_size=size, chunking_method=None)
    fused = nn.functional.linear_cross_entropy
    return -fused(h, head.weight, targets, reduction="none", options=how)


def package(head: nn.Linear, h: Tensor, targets: Tensor, size: int) -> Tensor:
    """Score with the package."""
    return chunked_log_probs(head, h, targets)[0]


def once(head: nn.Linear, h: Tensor, targets: Tensor, size: int) -> Tensor:
    """Score with the package, which is told the gradient beforehand."""
    known = {"slopes": lambda rows, scores: [torch.ones_like(scores[0])]}
    return chunked_log_probs(head, h, targets, **known)[0]


WAYS = {"package": package, "once": once, "checkpoint": checkpointed, "torch": own, "dense": dense}


def run(way: str, shape: list[int], dtype: str, on: str) -> list[float]:
    """Return seconds, and MiB beyond the inputs if this process has needed fewer."""
    torch.manual_seed(0)
    tokens, width, vocabulary = shape
    head = nn.Linear(width, vocabulary, False, on, getattr(torch, dtype))
    h = torch.randn(tokens, width, dtype=head.weight.dtype, device=on).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=on)
    size = max(128, (2**26 if h.is_cuda else 2**19) // vocabulary)
    clock = time.perf_counter if h.is_cuda else time.process_time
    before, start = peak(on), clock()
    torch.autograd.grad(WAYS[way](head, h, targets, size).sum(), (h, head.weight))
    after = peak(on)  # waits for the GPU
    return [clock() - start, after - before]


def peak(device: str) -> float:
    """Return the most memory that this process has held, in MiB."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 2**10


def main() -> None:
    """Print the table, or the memory of one way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--settings", nargs="+", type=int, default=range(4))
    parser.add_argument("--tokens", type=int, help="instead of the setting's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for setting, dtype in [(s, d) for s in args.settings for d in args.dtypes]:
        tokens, width, vocabulary = SETTINGS[setting]
        problem = [args.tokens or tokens, width, vocabulary], dtype, args.device
        for way in args.ways:
            run(way, [256, 8, 8192], dtype, args.device)  # loads what is loaded once
        if args.memory:
            print(run(args.ways[0], *problem)[1])
            continue
        print("\ntokens, width, vocabulary:", *problem, flush=True)
        times = []
        for _ in range(args.rounds * (20 if vocabulary < 1000 else 1)):
            order = random.sample(args.ways, len(args.ways))
            times.append({way: run(way, *problem)[0] for way in order})
        for way in args.ways:
            ratio = statistics.median(t[way] / t[args.ways[0]] for t in times)
            median = statistics.median(t[way] for t in times)
            same = f"--settings {setting} --dtypes {dtype} --tokens {problem[0][0]}"
            command = f"{__file__} --memory --ways {way} --device {args.device} {same}"
            memory = float(subprocess.check_output([sys.executable, *command.split()]))
            print(f"{way:12}{median:9.4f} s {ratio:6.2f} {memory:8.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
