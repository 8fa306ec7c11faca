"""Decoders from and to stock Hugging Face directories: config.json, safetensors, tokenizer files."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from thinkfast.errors import BadInput
from thinkfast.model.config import ATTENTION, MAMBA2, DecoderConfig
from thinkfast.model.decoder import Decoder
from thinkfast.model.foreign import absent, adapt, parse
from thinkfast.model.layout import dump_config
from thinkfast.model.own import dump_own
from thinkfast.model.tensors import (
    from_stock,
    inert_layer,
    layout_of,
    output_biases,
    stock_name,
    stock_shapes,
    to_stock,
    without_last_layer,
    writers_of_only_attention,
)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def read_config(path: str | Path) -> DecoderConfig:
    """The shape of the decoder that `load_model` would return, without reading its weights.

    Raises BadInput naming the file and the field.
    """
    path = Path(path)
    _, config = parse(_read_json(path, CONFIG), str(path / CONFIG))
    writers = writers_of_only_attention(config)
    if writers and _all_zero(_read_tensors(path, writers), writers):
        return config.with_layers(config.layer_types[:-1], config.mamba)
    return config


def load_model(path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Decoder:
    """A decoder in eval mode from a stock directory: Llama, Mistral, Qwen2, Qwen3, dense GraniteMoeHybrid, Bamba,
    Mamba-2 or Llamba.

    The weights are in one file or in shards. The inert attention layer of a pure student is dropped. Raises BadInput
    naming the file and the field, or every tensor that is missing, unexpected or of the wrong shape.
    """
    path = Path(path)
    raw = _read_json(path, CONFIG)
    layout, config = parse(raw, str(path / CONFIG))
    stock = _read_tensors(path)
    if config.tie_word_embeddings:
        # Some tied checkpoints store the shared matrix twice.
        head = stock.get("lm_head.weight")
        embedding = stock.get(stock_name("embed_tokens.weight", config, layout)[0])
        if head is not None and embedding is not None and torch.equal(head, embedding):
            del stock["lm_head.weight"]
    model = _skeleton(config)
    state = {name: tensor for name, tensor in model.state_dict().items() if absent(name, raw, layout) is None}
    _check(path, stock, stock_shapes(state, config, layout))
    for name in output_biases(config, layout):
        if stock[name].any():
            raise BadInput(f"{path}: {name} is not zero; a bias behind o_proj is not supported")
    writers = writers_of_only_attention(config)
    if writers and _all_zero(stock, writers):
        stock, config = without_last_layer(stock, config)
        model = _skeleton(config)
    gaps = {name: absent(name, raw, layout) for name in model.state_dict()}
    state = from_stock(stock, [name for name, value in gaps.items() if value is None], config, layout)
    state = adapt(state, raw, layout, config)
    for name, tensor in model.state_dict().items():
        if (value := gaps[name]) is not None:
            state[name] = torch.full_like(tensor, value)
    state = {name: tensor.to(device=device, dtype=dtype, copy=True) for name, tensor in state.items()}
    model.load_state_dict(state, assign=True)
    return model.to(device).eval()


def save_model(model: Decoder, path: str | Path, tokenizer_from: str | Path | None = None) -> None:
    """Writes a stock directory in the model's dtype: its family's if all layers are attention, else GraniteMoeHybrid.

    A pure student gets an inert attention layer, see `inert_layer`. Tokenizer files are copied from the directory
    `tokenizer_from`. Everything is written beside `path` and renamed; other files already in `path` stay.
    Raises BadInput when `path` is a file or the stock class refuses the shape.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise BadInput(f"{path} is a file, expected a model directory")
    if tokenizer_from is not None and not Path(tokenizer_from).is_dir():
        raise BadInput(f"{tokenizer_from}: no such directory, expected one with tokenizer files")
    config, layout, dtype = model.config, layout_of(model.config), model.embed_tokens.weight.dtype
    stock = to_stock(model.state_dict(), config, layout)
    if ATTENTION not in config.layer_types:
        stock |= inert_layer(config, dtype)
        config = config.with_layers((*config.layer_types, ATTENTION), config.mamba)
    write_directory(path, dump_config(config, layout, dtype), stock, tokenizer_from)


def save_own(model: Decoder, path: str | Path, tokenizer_from: str | Path | None = None) -> None:
    """`save_model`, but a decoder that no stock layout expresses (Discrete Mamba-2, Mamba-1) is written in thinkfast's
    own, `model_type` "thinkfast": the decoder's shape and its tensors by the decoder's names. Only `load_model` reads
    it."""
    mamba = model.config.mamba
    if mamba is None or mamba.kind == MAMBA2:
        save_model(model, path, tokenizer_from)
    else:
        raw = dump_own(model.config, model.embed_tokens.weight.dtype)
        write_directory(Path(path).resolve(), raw, dict(model.state_dict()), tokenizer_from)


def write_directory(
    path: Path, raw: dict[str, Any], stock: dict[str, Tensor], tokenizer_from: str | Path | None
) -> None:
    """Writes config, weights and tokenizer files beside `path`, an absolute one, and renames."""
    staging, replaced = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    if replaced.exists() and not path.exists():
        replaced.rename(path)
    for leftover in (staging, replaced):
        if leftover.exists():
            shutil.rmtree(leftover)
    staging.mkdir(parents=True)
    try:
        _write_json(staging / CONFIG, raw)
        tokens = {name: raw[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(staging / GENERATION, {"_from_model_config": True} | tokens)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in stock.items()}
        save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
        (staging / WEIGHTS).chmod((staging / CONFIG).stat().st_mode)  # safetensors lets nobody else read it
        if tokenizer_from is not None:
            for name in TOKENIZER_FILES:
                if (source := Path(tokenizer_from) / name).exists():
                    shutil.copyfile(source, staging / name)
        for file in staging.iterdir():
            _sync(file)
        if path.exists():
            _keep_others(path, staging)
        _sync(staging)
        _swap(staging, path, replaced)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


class without_initialisation(TorchFunctionMode):  # noqa: N801 - used like a function
    """Leaves new parameters as they are. Memory nobody touches costs nothing, and unlike the meta device, whose
    arithmetic imports the compiler for seconds, this starts at once.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init" and "tensor" in kwargs:
            return kwargs["tensor"]
        return func(*args, **kwargs)


def _skeleton(config: DecoderConfig) -> Decoder:
    """A decoder whose matrices hold nothing yet."""
    with without_initialisation():
        return Decoder(config)


def _swap(staging: Path, path: Path, replaced: Path) -> None:
    """Puts `staging` in the place of `path`; the old directory stays whole under `replaced` until that is done."""
    if path.exists():
        path.rename(replaced)
    try:
        staging.rename(path)
    except OSError:
        if replaced.exists():
            replaced.rename(path)
        raise
    _sync(path.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _keep_others(path: Path, staging: Path) -> None:
    """Links what else lies in `path` into `staging`, so that a log that is open for writing goes on."""
    for entry in path.iterdir():
        stale = entry.name == INDEX or entry.suffix == ".safetensors"
        target = staging / entry.name
        if stale or target.exists():
            continue
        if entry.is_dir():
            shutil.copytree(entry, target, copy_function=_link)
        else:
            _link(entry, target)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # Some file systems have no hard links.
        shutil.copy2(source, target)


def _read_json(path: Path, name: str) -> dict[str, Any]:
    if not path.is_dir():
        raise BadInput(f"{path}: no such directory, expected a model directory with {CONFIG}")
    file = path / name
    if not file.is_file():
        raise BadInput(f"{file}: no such file, expected a stock Hugging Face model directory")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{file}: not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise BadInput(f"{file}: holds {type(raw).__name__}, expected a JSON object")
    return raw


def _weight_files(path: Path) -> list[Path]:
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if not (path / INDEX).is_file():
        if (path / PICKLED).is_file():
            return [path / PICKLED]
        raise BadInput(f"{path}: neither {WEIGHTS} nor {INDEX}, expected weights in safetensors")
    weight_map = _read_json(path, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise BadInput(f"{path / INDEX}: weight_map is not an object of file names")
    shards = [path / name for name in sorted(set(weight_map.values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise BadInput(f"{path / INDEX}: weight_map names missing files: {', '.join(missing)}")
    return shards


def _read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """All tensors of a directory, or those of `names` that it has."""
    wanted = None if names is None else set(names)
    tensors = {}
    for file in _weight_files(path):
        if file.name == PICKLED:
            return _read_pickled(file)
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                    unused = name.endswith("rotary_emb.inv_freq")
                    if not unused and (wanted is None or name in wanted):
                        tensors[name] = shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{file}: not a complete safetensors file ({error})") from error
    return tensors


def _read_pickled(file: Path) -> dict[str, Tensor]:
    """Tensors of a file older than safetensors; nothing but tensors is unpickled."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise BadInput(f"{file}: not a file of tensors ({str(error).splitlines()[0]})") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise BadInput(f"{file}: holds something else than named tensors")
    return tensors


def _check(path: Path, found: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    faults = []
    if missing := sorted(expected.keys() - found.keys()):
        faults.append(f"missing tensors: {', '.join(missing)}")
    if unexpected := sorted(found.keys() - expected.keys()):
        faults.append(f"unexpected tensors: {', '.join(unexpected)}")
    for name in sorted(found.keys() & expected.keys()):
        have, want = tuple(found[name].shape), expected[name]
        if have != want:
            faults.append(f"{name} has shape {have}, expected {want}")
        elif not found[name].is_floating_point():
            faults.append(f"{name} holds {found[name].dtype}, expected floating point")
    if faults:
        raise BadInput(f"{path}: {'; '.join(faults)}")


def _all_zero(tensors: dict[str, Tensor], names: Iterable[str]) -> bool:
    return all(name in tensors and not tensors[name].any() for name in names)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    """Flushes a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
