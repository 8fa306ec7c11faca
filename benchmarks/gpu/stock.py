"""The same teacher in `transformers` generate."""

from __future__ import annotations

import time
from typing import Any

import torch
from common import DEVICE, DRY, GENERATED, HALF, PROMPT, Results, synchronise, teacher_config


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
