"""The steps of benchmarks/gpu.sh; what each measures is said where it is measured and stands in its JSON file."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch


from thinkfast.engine.backends import TorchBackend
from thinkfast.engine.engine import Engine
from thinkfast.engine.gpu import AHEAD, RING, GpuBackend, GpuMemory
from thinkfast.engine.sampling import SamplingParams, sample_key
from thinkfast.engine.sampling import draw as oracle
from thinkfast.engine.slots import SlotTable
from thinkfast.model.config import ATTENTION, DecoderConfig, MambaConfig, RopeScaling
from thinkfast.model.decoder import Decoder
from thinkfast.ops.ssd import ssd_chunked, ssd_naive
from thinkfast.ops.triton.check import check_attention, check_pointwise, check_step, error
from thinkfast.ops.triton.sampling import Streams, draw
from thinkfast.ops.triton.scan import ssd_fused

DRY = "--dry" in sys.argv
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF, SINGLE = torch.bfloat16, torch.float32
UNFINISHED = 75
BUDGET = 60.0 if DRY else 450.0
"""Seconds after which no new row is started; the shell's limit is 530."""
PROMPT, SHARING = (5, 2) if DRY else (512, 64)
"""Tokens of a prompt, and samples of each prompt."""
GENERATED = (8,) if DRY else (1024, 4096, 16384)
BATCHES = (2,) if DRY else (64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096)
STEPS = 2 if DRY else AHEAD
SPARE = 6 * 2**30
"""Bytes of the device that caches leave to activations, graphs and the allocator."""


class Results:
    """Rows of one step, on disk after each of them; a row that is there is not measured again."""

    def __init__(self, folder: Path, step: str, about: str) -> None:
        self.path, self.started = folder / f"{step}.json", time.monotonic()
        old = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.rows: list[dict[str, Any]] = old.get("rows", [])
        command = f"benchmarks/gpu.sh {step}{' --dry' if DRY else ''}"
        self.head = {"command": command, "what": about, "machine": old.get("machine") or machine()}
        self.skipped = False

    def missing(self, **key: object) -> bool:
        """Whether a row is to be measured now."""
        if any(all(row.get(name) == value for name, value in key.items()) for row in self.rows):
            return False
        late = time.monotonic() - self.started > BUDGET
        self.skipped |= late
        return not late

    def add(self, **row: object) -> None:
        self.rows.append({**row, "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime())})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps({**self.head, "rows": self.rows}, indent=1) + "\n")
        beside.replace(self.path)
        print(json.dumps(row), flush=True)


def machine() -> dict[str, object]:
    """Device, versions, and its two ceilings: bytes copied (read plus written) and bfloat16 products a second."""
    found: dict[str, object] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "copy_bytes_per_second": copy_rate(),
        "product_flops_per_second": product_rate(),
    }
    for name in ("triton", "transformers", "fla"):
        try:
            found[name] = str(__import__(name).__version__)
        except ImportError:
            found[name] = "not installed"
    if DEVICE.type == "cuda":
        found["gpu"], found["memory"] = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
        found["cuda"] = torch.version.cuda
    else:
        found["gpu"] = "none: Triton's interpreter on the CPU, no figure means anything"
    return found


def seconds_of(call: Callable[[], object], repeats: int = 9) -> float:
    """The median of `repeats` calls after two that warm up."""
    times = []
    for at in range(repeats + 2):
        synchronise()
        start = time.perf_counter()
        call()
        synchronise()
        if at >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def synchronise() -> None:
    """Waits for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def copy_rate() -> float:
    """Bytes a second of a copy on the device, read plus written."""
    size = 1 << (20 if DRY else 32)
    source = torch.randint(-100, 100, (size,), dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source))


def product_rate() -> float:
    """Operations a second of a bfloat16 matrix product."""
    size = 64 if DRY else 8192
    a, b = (torch.randn(size, size, device=DEVICE, dtype=HALF) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b)


# ---- shapes


def teacher_config(size: str) -> DecoderConfig:
    """Llama-3.2-1B or -3B; with --dry two layers of the same kind."""
    wide = size.endswith("3b")
    hidden, heads, head_dim = (3072, 24, 128) if wide else (2048, 32, 64)
    config = DecoderConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=8192,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=head_dim,
        layer_types=(ATTENTION,) * (28 if wide else 16),
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
        max_position_embeddings=131072,
    )
    small = {"vocab_size": 70, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "num_kv_heads": 1}
    return replace(config, **small, head_dim=8, layer_types=(ATTENTION,) * 2) if DRY else config


def student_config(teacher: DecoderConfig, kept: int) -> DecoderConfig:
    """The teacher with Mamba-2 in all but `kept` evenly spread layers: a head's state is head_dim x head_dim."""
    stride = teacher.num_layers // kept if kept else 0
    kinds = tuple(
        ATTENTION if kept and index % stride == stride // 2 and index // stride < kept else "mamba"
        for index in range(teacher.num_layers)
    )
    mamba = MambaConfig(teacher.num_heads, teacher.head_dim, teacher.head_dim, teacher.num_heads)
    return teacher.with_layers(kinds, mamba)


def random_model(config: DecoderConfig, dtype: torch.dtype = HALF) -> Decoder:
    """A decoder with random weights on the device."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Decoder(config).to(dtype).eval()
    with torch.no_grad():
        model.embed_tokens.weight.mul_(0.05)
    return model


# ---- correctness


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
        leaves = {name: tensor.to(DEVICE, dtype).requires_grad_() for name, tensor in tensors.items()}
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


# ---- decoding


@dataclass(frozen=True, slots=True)
class Cost:
    """What one decoding step of a whole batch must move and compute, at a mean number of own tokens."""

    weights: float
    keys_and_values: float
    states: float
    flops: float


def cost(config: DecoderConfig, batch: int, own: float, state_bytes: int, ring: int) -> Cost:
    """Weights and prompts read once (a prompt once for SHARING samples), own keys and values read, states read and
    written every `ring`-th step with the ring's entries between."""
    parameters = float(config.vocab_size * config.hidden_size)
    kv = states = work = 0.0
    for kind in config.layer_types:
        parameters += 3 * config.hidden_size * config.intermediate_size
        if kind == ATTENTION:
            parameters += 2 * config.hidden_size * config.head_dim * (config.num_heads + config.num_kv_heads)
            kv += 2 * 2 * config.num_kv_heads * config.head_dim * (own + PROMPT / SHARING)
            work += 4 * config.num_heads * config.head_dim * (own + PROMPT)
        elif config.mamba is not None:
            shape = config.mamba
            parameters += config.hidden_size * (shape.in_proj_rows + shape.d_inner)
            entry = shape.n_heads * (shape.head_dim + shape.d_state) * state_bytes if ring > 1 else 0
            states += shape.d_inner * shape.d_state * state_bytes * (1 + 1 / ring) + entry * (1 + (ring - 1) / 2)
            work += shape.d_inner * 5 * shape.d_state
    return Cost(2 * parameters, batch * kv, batch * states, batch * (2 * parameters + work))


def decoding(results: Results, size: str) -> None:
    """Every model at every length and batch, the largest batch first, until the rate has fallen twice."""
    teacher = teacher_config(size)
    kept = 1 if DRY else 6 if size == "3b" else 4
    models = {"teacher": teacher, "hybrid": student_config(teacher, kept), "pure": student_config(teacher, 0)}
    rates = results.head["machine"]
    for name, config in models.items():
        variants = (
            [("bfloat16", RING)] if name == "teacher" else [("bfloat16", RING), ("float32", RING), ("bfloat16", 1)]
        )
        for state_dtype, ring in variants:
            how = {"model": name, "state": state_dtype, "ring": ring}
            if all(done(results, how, generated) for generated in GENERATED):
                continue
            model = random_model(config)
            backend = GpuBackend(model, "auto", state_dtype, ring)
            for generated in GENERATED:
                falling, best = 0, 0.0
                for batch in reversed([b for b in BATCHES if fits(backend, b, generated)]):
                    key = {**how, "generated": generated, "batch": batch}
                    if results.missing(**key):
                        row = measure(backend, batch, generated)
                        bytes_a_second = float(rates["copy_bytes_per_second"])
                        need = cost(config, batch, generated / 2, 2 if state_dtype == "bfloat16" else 4, ring)
                        moved = (need.weights + need.keys_and_values + need.states) / bytes_a_second
                        computed = need.flops / float(rates["product_flops_per_second"])
                        row |= {"hbm_floor_seconds_per_step": moved, "arithmetic_seconds_per_step": computed}
                        row |= {"share_of_hbm_floor": moved / row["seconds_per_step"]}
                        results.add(**key, **row)
                    rate = next((r["tokens_per_second"] for r in results.rows if matches(r, key)), 0.0)
                    falling = 0 if rate > best else falling + 1
                    best = max(best, rate)
                    if falling == 2 or results.skipped:
                        break
                if results.skipped:
                    return
                if not done(results, how, generated):
                    results.add(**how, generated=generated, batch="best", tokens_per_second=best)
            del backend, model


def matches(row: dict[str, Any], key: dict[str, object]) -> bool:
    """Whether a row has these values."""
    return all(row.get(name) == value for name, value in key.items())


def done(results: Results, how: dict[str, object], generated: int) -> bool:
    """Whether the best batch of a model and length is known."""
    return any(matches(row, {**how, "generated": generated, "batch": "best"}) for row in results.rows)


def fits(backend: GpuBackend, batch: int, generated: int) -> bool:
    """Whether so many samples of PROMPT + generated tokens fit beside the weights."""
    if DEVICE.type == "cpu":
        return True
    config, state = backend.model.config, torch.finfo(backend.state_dtype).bits // 8
    attention = config.layer_types.count(ATTENTION)
    each = attention * 4 * config.num_kv_heads * config.head_dim * (generated + AHEAD + PROMPT / SHARING)
    if config.mamba is not None:
        shape = config.mamba
        entries = shape.d_inner * shape.d_state + backend.ring * shape.n_heads * (shape.head_dim + shape.d_state + 2)
        each += (config.num_layers - attention) * (entries * state + 2 * shape.conv_dim * shape.d_conv)
    logits = batch * config.vocab_size * 2 * 2  # once in the graph's memory, once beside it
    torch.cuda.empty_cache()
    return batch * each + logits + SPARE < torch.cuda.mem_get_info()[0]


def measure(backend: GpuBackend, batch: int, generated: int) -> dict[str, float]:
    """Seconds of a step, sampled over the way from PROMPT to PROMPT + generated tokens.

    Four places, at 1/8, 3/8, 5/8 and 7/8 of `generated` own tokens (the mean of these is exact for a cost that grows
    linearly); at each, bursts of STEPS steps as the engine makes them, the host's part included, the median of three.
    Own keys, values and states hold random numbers. Prompts are shared by SHARING samples each.
    """
    vocab = backend.model.config.vocab_size
    memory = GpuMemory(backend, batch, PROMPT + generated + AHEAD, generated + AHEAD)
    prompts = np.random.default_rng(0).integers(0, vocab, (-(-batch // SHARING), PROMPT))
    synchronise()
    start = time.perf_counter()
    first = memory.prefill([prompts[0, :-1].tolist()])[0]
    synchronise()
    cold = time.perf_counter() - start
    start = time.perf_counter()
    kept = [first, *memory.prefill([prompt[:-1].tolist() for prompt in prompts[1:]])]
    synchronise()
    prefill = time.perf_counter() - start if len(prompts) > 1 else cold
    params = SamplingParams(max_tokens=generated, temperature=0.8, ignore_eos=True)
    table = SlotTable(batch, params, vocab, (), room=1)
    rows = np.arange(batch, dtype=np.int32)
    for slot in rows.tolist():
        memory.fork(kept[slot // SHARING], slot)
        table.admit(slot, (0, slot), int(prompts[slot // SHARING, -1]), PROMPT - 1, sample_key(1, slot), 0.0)
    memory.burst(table, rows, 1)
    for keys, values in memory._kv.values():
        keys.normal_(), values.normal_()
    places = []
    for eighth in (1, 3, 5, 7):
        table.position[:] = PROMPT - 1 + generated * eighth // 8
        memory.burst(table, rows, STEPS)
        times = []
        for _ in range(3):
            synchronise()
            start = time.perf_counter()
            memory.burst(table, rows, STEPS)
            times.append((time.perf_counter() - start) / STEPS)
        places.append(statistics.median(times))
    step = statistics.mean(places)
    return {
        "tokens_per_second": batch / step,
        "seconds_per_step": step,
        "seconds_per_step_at_eighths": places,
        "prefill_seconds_per_prompt": prefill / max(len(prompts) - 1, 1),
        "peak_bytes": float(torch.cuda.max_memory_allocated()) if DEVICE.type == "cuda" else 0.0,
    }


# ---- transformers


def stock(results: Results, size: str) -> None:
    """Whole calls of `transformers` generate: PROMPT tokens in, `generated` out, a static cache, compiled on a GPU."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        print("transformers is not installed: nothing measured")
        return
    ours = teacher_config(size)
    config = LlamaConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate_size,
        num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_heads,
        num_key_value_heads=ours.num_kv_heads,
        head_dim=ours.head_dim,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config).to(HALF).eval()
    for generated in GENERATED[:1] if DRY else (1024, 4096):
        for batch in (2,) if DRY else (128, 256, 64) if generated == 1024 else (64,):
            if not results.missing(model="teacher", generated=generated, batch=batch):
                continue
            ids = torch.randint(1, ours.vocab_size, (batch, PROMPT), device=DEVICE)

            def call(count: int, ids: torch.Tensor = ids, generated: int = generated) -> None:
                how = {"cache_implementation": "static", "do_sample": True, "temperature": 0.8, "top_k": 0}
                mask = torch.ones_like(ids)
                # The cache is as long as in the measured call, so that what compiles here is what runs there.
                limit = {
                    "max_new_tokens": generated,
                    "min_new_tokens": generated,
                    "stopping_criteria": stop_after(count),
                }
                model.generate(ids, attention_mask=mask, **how, **limit)

            try:
                call(8)
                synchronise()
                start = time.perf_counter()
                call(generated)
                synchronise()
                seconds = time.perf_counter() - start
            except (RuntimeError, ValueError) as failed:
                words = " ".join(str(failed).split())[:300]
                results.add(model="teacher", generated=generated, batch=batch, failed=words)
                continue
            results.add(
                model="teacher",
                generated=generated,
                batch=batch,
                tokens_per_second=batch * generated / seconds,
                seconds=seconds,
            )


def stop_after(count: int) -> Any:
    """Ends a call of generate after `count` tokens."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class After(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= PROMPT + count, device=input_ids.device)

    return StoppingCriteriaList([After()])


# ---- training


def training(results: Results) -> None:
    """Seconds and peak memory of the scan, forward and backward, in one layer of the shapes of 1B and 3B."""
    for heads, width in [(2, 5)] if DRY else [(32, 64), (24, 128)]:
        batch, length = (1, 19) if DRY else (8, 2048)
        leaves = {
            "x": torch.randn(batch, length, heads, width, device=DEVICE),
            "dt": torch.rand(batch, length, heads, device=DEVICE) * 0.1,
            "A": -torch.rand(heads, device=DEVICE) * 15 - 1,
            "B": torch.randn(batch, length, heads, width, device=DEVICE),
            "C": torch.randn(batch, length, heads, width, device=DEVICE),
            "D": torch.randn(heads, device=DEVICE),
        }
        for name, scan in scans():
            if not results.missing(scan=name, heads=heads, head_dim=width):
                continue
            for tensor in leaves.values():
                tensor.requires_grad_().grad = None

            def forward(scan: Callable[..., Any] = scan, leaves: dict[str, torch.Tensor] = leaves) -> torch.Tensor:
                return scan(**leaves)[0]

            def both(forward: Callable[[], torch.Tensor] = forward) -> None:
                forward().sum().backward()

            if DEVICE.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                row: dict[str, object] = {"forward_backward_seconds": seconds_of(both, 3 if DRY else 9)}
                with torch.no_grad():
                    row["forward_seconds"] = seconds_of(forward, 3 if DRY else 9)
                row["peak_bytes"] = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
            except Exception as failed:  # noqa: BLE001 - one variant that does not compile must not lose the others
                row = {"failed": " ".join(str(failed).split())[:300]}
            results.add(scan=name, heads=heads, head_dim=width, batch=batch, length=length, **row)


def scans() -> Iterator[tuple[str, Callable[..., Any]]]:
    """The scans to compare, by name."""
    yield "torch", ssd_chunked
    for precision in ("tf32", "tf32x3", "ieee"):
        for chunk in (64,) if DRY else (64, 32):
            yield (
                f"fused {precision} {chunk}",
                lambda precision=precision, chunk=chunk, **t: ssd_fused(**t, precision=precision, chunk=chunk),
            )
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except Exception:  # noqa: BLE001 - without a GPU its import fails in many ways
        return

    def fla(**t: torch.Tensor) -> tuple[torch.Tensor, object]:
        x, dt = t["x"], t["dt"]
        q, k, v = (part.to(HALF) for part in (t["C"], t["B"], dt[..., None] * x))
        y, last = chunk_simple_gla(q, k, v, dt * t["A"], scale=1.0, output_final_state=True)
        return y + t["D"][:, None] * x, last

    if DEVICE.type == "cuda":
        yield "fla-core", fla


ABOUT = {
    "correctness": "largest relative error (2-norm) of each kernel against float64; counts of differing samples",
    "decoding": f"decoded tokens/s in thinkfast's engine, bfloat16, {PROMPT}-token prompts shared by {SHARING} samples; "
    "steps timed at four places over the generated range, not every step of it; prefill apart",
    "stock": f"tokens/s of whole `transformers` generate calls, {PROMPT}-token prompts, static cache, compiled",
    "train": "seconds of the state-space scan of one layer, float32 in and out",
}


def main() -> int:
    """Runs one step; 1 where something is wrong, 75 where time ran out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["correctness", "1b", "3b", "hf-1b", "hf-3b", "train"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true", help="tiny shapes")
    given = parser.parse_args()
    if DEVICE.type == "cpu" and not DRY:
        parser.error("there is no GPU; --dry runs tiny shapes without one")
    kind = "decoding" if given.step in ("1b", "3b") else "stock" if given.step.startswith("hf") else given.step
    results = Results(given.out, given.step, ABOUT[kind])
    size = given.step.removeprefix("hf-")
    steps: dict[str, Callable[[], None]] = {
        "correctness": lambda: correctness(results),
        "decoding": lambda: decoding(results, size),
        "stock": lambda: stock(results, size),
        "train": lambda: training(results),
    }
    steps[kind]()
    wrong = [row for row in results.rows if row.get("ok") is False]
    for row in wrong:
        print("WRONG", json.dumps(row))
    print(f"{len(results.rows)} rows in {results.path}{'; call again for the rest' if results.skipped else ''}")
    return 1 if wrong else UNFINISHED if results.skipped else 0


if __name__ == "__main__":
    sys.exit(main())
