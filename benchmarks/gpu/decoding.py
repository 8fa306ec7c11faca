"""Decoding speed of teacher and students in thinkfast's engine, best batch each, beside what memory allows."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import (
    BATCHES,
    DEVICE,
    DRY,
    GENERATED,
    PROMPT,
    SHARING,
    SPARE,
    STEPS,
    Results,
    random_model,
    student_config,
    synchronise,
    teacher_config,
)

from thinkfast.engine.gpu import AHEAD, RING, GpuBackend, GpuMemory
from thinkfast.engine.sampling import SamplingParams, sample_key
from thinkfast.engine.slots import SlotTable
from thinkfast.model.config import ATTENTION, DecoderConfig


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
