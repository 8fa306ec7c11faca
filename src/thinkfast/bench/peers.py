"""Other programs that decode the same model, measured as ours are: seconds for a few tokens behind a context."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from thinkfast.errors import BadInput
from thinkfast.model.checkpoint import save_model
from thinkfast.model.decoder import Decoder

PEERS = ("transformers", "llama.cpp")


class TransformersPeer:
    """`generate` of transformers with its own cache, sampling at the same temperature; prompts are fed untimed.

    Raises BadInput where transformers is not installed or has no such model.
    """

    def __init__(self, model: Decoder, temperature: float) -> None:
        try:
            from transformers import AutoModelForCausalLM
        except ImportError:
            raise BadInput("backend 'transformers' is not installed: pip install 'thinkfast[export]'") from None
        with tempfile.TemporaryDirectory() as folder:
            save_model(model, Path(folder) / "model")
            dtype = model.embed_tokens.weight.dtype
            loaded: Any = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=dtype)
        self.model = loaded.eval()
        self.weights = str(dtype).removeprefix("torch.")
        self.kv_dtype = self.weights
        self.temperature, self.vocab = temperature, model.config.vocab_size
        self._ids, self._cache = torch.zeros(0, 0, dtype=torch.int64), None

    @torch.inference_mode()
    def start(self, batch: int, context: int, steps: int) -> None:
        """Feeds `batch` rows so that a step sees `context` tokens at the middle of a turn."""
        first = context - steps // 2 - 1
        row = torch.randint(0, self.vocab, (1, first), generator=torch.Generator().manual_seed(context))
        self._ids = row.expand(batch, first)
        cache = self.model(row[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(batch)
        self._cache = cache

    @torch.inference_mode()
    def turn(self, steps: int) -> float:
        """Seconds of one `generate` of `steps` tokens."""
        cache: Any = self._cache
        held = self._ids.shape[1] - 1
        start = time.perf_counter()
        self.model.generate(
            self._ids,
            attention_mask=torch.ones_like(self._ids),
            past_key_values=cache,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=True,
            temperature=self.temperature,
            top_k=0,
            pad_token_id=0,
        )
        taken = time.perf_counter() - start
        cache.crop(held - cache.get_seq_length())  # negative: so many tokens less
        return taken


class LlamaPeer:
    """llama.cpp on an export of the model, one sequence, no sampling: its forward pass alone.

    Raises BadInput where llama-cpp-python is not installed or llama.cpp cannot express the model.
    """

    def __init__(self, model: Decoder, temperature: float, dtype: str = "bfloat16") -> None:
        try:
            from llama_cpp import Llama
        except ImportError:
            raise BadInput("backend 'llama.cpp' is not installed: pip install 'thinkfast[llama]'") from None
        from thinkfast.export.gguf import export_gguf

        limit, threads = model.config.max_position_embeddings, torch.get_num_threads()
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        save_model(model, folder / "model")
        export_gguf(folder / "model", folder / "model.gguf", dtype)
        self.llama: Any = Llama(
            str(folder / "model.gguf"), n_ctx=limit, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self.weights, self.kv_dtype, self.vocab = dtype, "float16", model.config.vocab_size
        self._prompt: list[int] = []

    def start(self, batch: int, context: int, steps: int) -> None:
        """Chooses the prompt of a turn; its first tokens are fed untimed in every turn."""
        if batch != 1:
            raise BadInput(f"backend 'llama.cpp' is measured with one sequence, not {batch}")
        generator = torch.Generator().manual_seed(context)
        self._prompt = torch.randint(0, self.vocab, (context - steps // 2 - 1,), generator=generator).tolist()

    def turn(self, steps: int) -> float:
        """Seconds of `steps` single tokens."""
        self.llama.reset()
        self.llama.eval(self._prompt)
        start = time.perf_counter()
        for token in self._prompt[:1] * steps:
            self.llama.eval([token])
        return time.perf_counter() - start


def open_peer(name: str, model: Decoder, temperature: float) -> TransformersPeer | LlamaPeer:
    """Raises BadInput as the peers do."""
    return TransformersPeer(model, temperature) if name == "transformers" else LlamaPeer(model, temperature)
