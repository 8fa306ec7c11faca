"""Every kernel, the scan's gradients, the sampler and the whole back end, on the device at hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from common import DEVICE, DRY, HALF, SINGLE, Results, random_model, student_config, teacher_config

from thinkfast.engine.backends import TorchBackend
from thinkfast.engine.engine import Engine
from thinkfast.engine.gpu import RING, GpuBackend
from thinkfast.engine.sampling import SamplingParams
from thinkfast.engine.sampling import draw as oracle
from thinkfast.model.config import ATTENTION
from thinkfast.ops.ssd import ssd_naive
from thinkfast.ops.triton.check import check_attention, check_pointwise, check_step, error
from thinkfast.ops.triton.sampling import Streams, draw
from thinkfast.ops.triton.scan import ssd_fused


def correctness(results: Results) -> None:
    """Relative errors of every kernel against float64, at the shapes of 1B and 3B; then the whole back end."""
    limit = {SINGLE: 5e-6, HALF: 2e-2}
    many = (3, 2) if DRY else (37, 300)
    shapes = [(2, 1, 8)] if DRY else [(32, 8, 64), (24, 8, 128), (12, 2, 128), (9, 3, 64)]
    for dtype in (SINGLE, HALF):
        name = str(dtype).removeprefix("torch.")
        for heads, kv_heads, width in shapes:
            sizes = {"dtype": name, "heads": heads, "head_dim": width}
            if results.missing(check="pointwise", **sizes):
                errors = check_pointwise(many[0], heads * width, heads, DEVICE, dtype)
                report(results, errors, limit[dtype], check="pointwise", **sizes)
            for groups in sorted({heads, kv_heads, 1}):
                for ring in (1, RING):
                    if results.missing(check="step", groups=groups, ring=ring, **sizes):
                        steps = 2 if DRY else 2 * RING
                        wrong = check_step(many[0], heads, groups, width, width, 4, ring, steps, DEVICE, dtype, dtype)
                        report(results, {"step": wrong}, limit[dtype], check="step", groups=groups, ring=ring, **sizes)
            for splits in (1, 4):
                if results.missing(check="attention", splits=splits, **sizes):
                    lengths = [5, 0, 3] if DRY else [512, 0, 1, 700]
                    prefixes = [at % len(lengths) for at in range(many[1])]
                    own = [at * 7 % 300 for at in range(many[1])]
                    wrong = check_attention(
                        lengths, prefixes, own, heads, kv_heads, width, splits, DEVICE, dtype, dtype
                    )
                    report(results, {"attention": wrong}, limit[dtype], check="attention", splits=splits, **sizes)
    for heads, groups, width in [(2, 1, 5)] if DRY else [(4, 4, 64), (4, 2, 128), (3, 1, 100)]:
        for precision, bound in (("ieee", 2e-5), ("tf32x3", 5e-5), ("tf32", 5e-3)):
            if results.missing(check="scan", heads=heads, head_dim=width, precision=precision):
                errors = scan_errors(heads, groups, width, precision)
                report(results, errors, bound, check="scan", heads=heads, head_dim=width, precision=precision)
    for cut in (False, True):
        if results.missing(check="sampler", cut=cut):
            report(results, {"other tokens": sampler_differs(cut)}, 0.0, check="sampler", cut=cut)
    for kept in (0, 1, 2):
        if results.missing(check="back end", attention_layers=kept):
            report(results, backend_differs(kept), 0.0, check="back end", attention_layers=kept)


def report(results: Results, errors: dict[str, float], limit: float, **key: object) -> None:
    """Adds a row of errors, marked wrong where one is above the limit."""
    good = all(value <= limit for value in errors.values())
    results.add(**key, errors=errors, limit=limit, ok=good)


def scan_errors(heads: int, groups: int, width: int, precision: str) -> dict[str, float]:
    """Outputs and gradients of the fused scan against the naive one in float64."""
    length, batch = (19, 1) if DRY else (333, 2)
    generator = torch.Generator().manual_seed(heads)
    shapes = {
        "x": (batch, length, heads, width),
        "dt": (batch, length, heads),
        "A": (heads,),
        "B": (batch, length, groups, width),
        "C": (batch, length, groups, width),
        "D": (heads,),
        "state": (batch, heads, width, width),
    }
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    tensors["dt"], tensors["A"] = torch.nn.functional.softplus(tensors["dt"]), -torch.exp(tensors["A"])
    weights = [torch.randn(shapes[name], generator=generator, dtype=torch.float64) for name in ("x", "state")]
    outputs = []
    for scan, dtype in ((ssd_naive, torch.float64), (ssd_fused, SINGLE)):
        leaves = {name: t.detach().to(DEVICE, dtype, copy=True).requires_grad_() for name, t in tensors.items()}
        how = {} if scan is ssd_naive else {"precision": precision}
        y, last = scan(**leaves, **how)
        sum((out * weight.to(DEVICE, dtype)).sum() for out, weight in zip((y, last), weights, strict=True)).backward()
        outputs.append({"y": y, "last": last} | {f"d{name}": leaf.grad for name, leaf in leaves.items()})
    return {name: error(outputs[1][name].detach(), want.detach()) for name, want in outputs[0].items()}


def sampler_differs(cut: bool) -> float:
    """The share of tokens that differ from the sampler in numpy, over vocabularies of the real size."""
    rows, vocab = (4, 70) if DRY else (64, 128256)
    rng = np.random.default_rng(1)
    logits = (rng.normal(size=(rows, vocab)) * 3).astype(np.float32)
    keys, counts = rng.integers(0, 2**64, rows, dtype=np.uint64), rng.integers(0, 9999, rows)
    params = SamplingParams(temperature=0.8, top_k=50 if cut else 0, top_p=0.9 if cut else 1.0)
    full = {"dtype": torch.float64, "device": DEVICE}
    streams = Streams(
        torch.from_numpy(keys.view(np.int64)).to(DEVICE),
        torch.from_numpy(counts).to(DEVICE),
        torch.full((rows,), params.temperature, **full),
        torch.full((rows,), params.top_k, device=DEVICE),
        torch.full((rows,), params.top_p, **full),
    )
    tokens, _ = draw(torch.from_numpy(logits).to(DEVICE), streams, cut)
    want, _ = oracle(logits, keys, counts, params)
    return float((tokens.cpu().numpy() != want).mean())


def backend_differs(kept: int) -> dict[str, float]:
    """Samples, greedy and drawn, that differ between the GPU back end and the decoder in torch, both in float32."""
    small = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 192, "num_heads": 4, "num_kv_heads": 2}
    config = replace(teacher_config("1b"), **({} if DRY else small), head_dim=8 if DRY else 32)
    config = replace(config, layer_types=(ATTENTION,) * 2)
    model = random_model(config if kept == 2 else student_config(config, kept), SINGLE)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(10)
    prompts = [[1, 5, 9, 4], [7]] if DRY else [list(range(1, 40)), [7], [3, 5, 200, 8]]
    torch.backends.cuda.matmul.allow_tf32 = False
    found = {}
    for name, how in (("greedy", {"temperature": 0.0}), ("drawn", {"temperature": 0.9, "top_p": 0.95})):
        params = SamplingParams(max_tokens=3 if DRY else 100, ignore_eos=True, **how)
        both = []
        for backend in (TorchBackend(model, "auto"), GpuBackend(model)):
            engine = Engine(model, 2 if DRY else 7, "torch")
            engine._backend = backend
            both.append(engine.sample(prompts, 1 if DRY else 9, params))
        pairs = [(a, b) for rows in zip(*both, strict=True) for a, b in zip(*rows, strict=True)]
        found[name] = float(sum(a.token_ids != b.token_ids for a, b in pairs))
    return found
