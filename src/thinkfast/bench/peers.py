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
    """llama.cpp on an export of the model, without sampling: the batched forward pass of its C interface alone.

    Raises BadInput where llama-cpp-python is not installed or llama.cpp cannot express the model.
    """

    def __init__(self, model: Decoder, temperature: float, dtype: str = "bfloat16") -> None:
        try:
            import llama_cpp
        except ImportError:
            raise BadInput("backend 'llama.cpp' is not installed: pip install 'thinkfast[llama]'") from None
        from thinkfast.export.gguf import export_gguf

        self._llama: Any = llama_cpp
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        save_model(model, folder / "model")
        export_gguf(folder / "model", folder / "model.gguf", dtype)
        self._silence = llama_cpp.llama_log_callback(lambda *_: None)  # must outlive the calls
        llama_cpp.llama_log_set(self._silence, None)
        how = llama_cpp.llama_model_default_params()
        self._model: Any = llama_cpp.llama_model_load_from_file(str(folder / "model.gguf").encode(), how)
        self.weights, self.kv_dtype, self.vocab = dtype, "float16", model.config.vocab_size
        self._context: Any = None

    def start(self, batch: int, context: int, steps: int) -> None:
        """Makes `batch` sequences with a cache each. Raises BadInput for more than llama.cpp takes."""
        most = self._llama.llama_max_parallel_sequences()
        if batch > most:
            raise BadInput(f"backend 'llama.cpp' takes at most {most} sequences, not {batch}")
        if self._context is not None:
            self._llama.llama_free(self._context)
        how = self._llama.llama_context_default_params()
        how.n_ctx, how.n_seq_max = batch * (-(-(context + steps) // 256) * 256), batch
        how.n_batch = how.n_ubatch = max(batch, 512)
        how.n_threads = how.n_threads_batch = torch.get_num_threads()
        self._context = self._llama.llama_init_from_model(self._model, how)
        if not self._context:
            raise BadInput(f"backend 'llama.cpp' has no room for {batch} sequences of {context + steps} tokens")
        generator = torch.Generator().manual_seed(context)
        self._prompt = torch.randint(0, self.vocab, (context - steps // 2 - 1,), generator=generator).tolist()
        self._batch = batch

    def turn(self, steps: int) -> float:
        """Seconds of `steps` tokens of every sequence, behind the prompt and an untimed one."""
        memory = self._llama.llama_get_memory(self._context)
        self._llama.llama_memory_clear(memory, True)
        for start in range(0, len(self._prompt), 512):
            piece = self._prompt[start : start + 512]
            self._decode([(token, start + at, 0) for at, token in enumerate(piece)])
        for sequence in range(1, self._batch):
            self._llama.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
        begun = 0.0
        for step in range(steps + 1):
            place = len(self._prompt) + step
            self._decode([(self._prompt[0], place, sequence) for sequence in range(self._batch)])
            begun = begun or time.perf_counter()
        return time.perf_counter() - begun

    def _decode(self, tokens: list[tuple[int, int, int]]) -> None:
        """Feeds (token, position, sequence); logits of the last token of every sequence are computed."""
        batch = self._llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        lone = len({sequence for _, _, sequence in tokens}) == 1
        for at, (token, position, sequence) in enumerate(tokens):
            batch.token[at], batch.pos[at] = token, position
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
            batch.logits[at] = not lone or at + 1 == len(tokens)
        failed = self._llama.llama_decode(self._context, batch)
        self._llama.llama_synchronize(self._context)
        self._llama.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama.cpp could not decode {len(tokens)} tokens ({failed})")


def open_peer(name: str, model: Decoder, temperature: float) -> TransformersPeer | LlamaPeer:
    """Raises BadInput as the peers do."""
    return TransformersPeer(model, temperature) if name == "transformers" else LlamaPeer(model, temperature)
