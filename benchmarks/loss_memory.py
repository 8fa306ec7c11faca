"""Peak memory and seconds of the chunked loss against the naive one, each in a process of its own.

    python benchmarks/loss_memory.py --out benchmarks/results/loss-memory.json

Naive: both logit tensors, two log-softmaxes, autograd. Chunked: `thinkfast.distill.losses.chunked_loss`. Both compute
the forward KL from the same hidden states and output projections and its gradient in the student's. Memory is the
peak resident size of the process over what it held before the first product (the inputs).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from thinkfast import runtime
from thinkfast.distill.losses import Loss, chunked_loss

PATHS = ("naive", "chunked")


def naive(s: Tensor, s_head: Tensor, t: Tensor, t_head: Tensor) -> Tensor:
    """KL(teacher || student), a mean over positions, as most code has it."""
    log_q = torch.log_softmax(s @ s_head.T, -1)
    log_p = torch.log_softmax(t @ t_head.T, -1)
    return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum") / len(s)


def measure(path: str, tokens: int, vocab: int, hidden: int, repeats: int) -> dict[str, float]:
    """Runs one path `repeats` times in this process."""
    torch.manual_seed(0)
    states = [torch.randn(1, tokens, hidden) for _ in range(2)]
    heads = [torch.randn(vocab, hidden) * hidden**-0.5 for _ in range(2)]
    ids, mask = torch.zeros(1, tokens, dtype=torch.long), torch.ones(1, tokens, dtype=torch.bool)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, norms = [], []
    for _ in range(repeats):
        s, s_head = states[0].clone().requires_grad_(), heads[0].requires_grad_()
        s_head.grad = None
        start = time.perf_counter()
        if path == "naive":
            loss = naive(s[0], s_head, states[1][0], heads[1])
        else:
            loss = chunked_loss(Loss(), s, s_head, states[1], heads[1], ids, mask)
        loss.backward()
        seconds.append(time.perf_counter() - start)
        norms = [float(grad.double().norm()) for grad in (s.grad, s_head.grad) if grad is not None]
        value = float(loss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": min(seconds), "peak_mb": (peak - before) / 1024, "loss": value, "gradients": norms}


def main() -> None:
    """Measure every arm in a process of its own; print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--path", choices=PATHS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    sizes = {name: getattr(given, name) for name in ("tokens", "vocab", "hidden", "repeats")}
    if given.path:
        print(json.dumps(measure(given.path, **sizes)))
        return
    found = {}
    for path in PATHS:
        command = [sys.executable, __file__, "--path", path]
        for name, value in sizes.items():
            command += [f"--{name}", str(value)]
        found[path] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(path, found[path], flush=True)
    document = {
        "command": runtime.command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": runtime.machine(),
        "threads": torch.get_num_threads(),
        "sizes": sizes,
        **found,
        "memory_share": found["chunked"]["peak_mb"] / found["naive"]["peak_mb"],
        "time_share": found["chunked"]["seconds"] / found["naive"]["seconds"],
    }
    print(f"memory {document['memory_share']:.3f}, time {document['time_share']:.3f} of the naive path")
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
