"""Saving and loading give the same decoder back, and everything that cannot be loaded is named in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from thinkfast.errors import BadInput
from thinkfast.model import checkpoint
from thinkfast.model.checkpoint import load_model, read_config, save_model
from thinkfast.model.decoder import Decoder

NAMES = ("llama", "llama3", "hybrid", "pure")
WEIGHTS = "model.safetensors"


def edit_json(file: Path, **changes: object) -> None:
    raw = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in raw.items() if value != "absent"}))


def edit_tensors(path: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(path / WEIGHTS) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path / WEIGHTS)


def complaint(path: Path, loader=load_model) -> str:
    with pytest.raises(BadInput) as caught:
        loader(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def assert_same_model(got: Decoder, want: Decoder) -> None:
    assert got.config == want.config
    mine, theirs = got.state_dict(), want.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_ids": (), "pad_token_id": None},
        {"eos_token_ids": (2, 9), "max_position_embeddings": 77},
    ],
)
@torch.no_grad()
def test_load_of_save_is_the_same_model(tiny, tmp_path: Path, name: str, changes: dict) -> None:
    model = tiny.random_decoder(replace(tiny.configs[name], **changes))
    save_model(model, tmp_path / "new" / "model")
    loaded = load_model(tmp_path / "new" / "model")
    assert_same_model(loaded, model)
    assert read_config(tmp_path / "new" / "model") == model.config
    assert not loaded.training
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids), model(ids))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["model"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_keep_their_dtype_on_disk(tiny, tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny.random_decoder(tiny.configs["pure"]).to(dtype)
    save_model(model, tmp_path / "model")
    assert {tensor.dtype for tensor in load_file(tmp_path / "model" / WEIGHTS).values()} == {dtype}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    with safe_open(tmp_path / "model" / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert_same_model(load_model(tmp_path / "model", dtype=dtype), model)
    assert load_model(tmp_path / "model").embed_tokens.weight.dtype == torch.float32


def test_a_loaded_model_does_not_depend_on_its_file(tiny, tmp_path: Path) -> None:
    model = tiny.random_decoder(tiny.configs["hybrid"])
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    (tmp_path / "model" / WEIGHTS).write_bytes(b"gone")
    assert_same_model(loaded, model)


def test_only_an_exactly_inert_only_attention_layer_is_dropped(tiny, tmp_path: Path) -> None:
    model = tiny.random_decoder(tiny.configs["pure"])
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["layer_types"] == ["mamba", "mamba", "attention"]
    output = "model.layers.2.self_attn.o_proj.weight"
    touched = load_file(tmp_path / WEIGHTS)[output]
    assert not touched.any()
    touched[3, 4] = 1e-30
    edit_tensors(tmp_path, **{output: touched})
    assert load_model(tmp_path).config.layer_types == ("mamba", "mamba", "attention")
    assert read_config(tmp_path).layer_types == ("mamba", "mamba", "attention")

    zeroed = tiny.random_decoder(replace(tiny.configs["hybrid"], layer_types=("attention", "mamba", "attention")))
    with torch.no_grad():
        zeroed.layers[2].mixer.o_proj.weight.zero_()
        zeroed.layers[2].mlp.down_proj.weight.zero_()
    save_model(zeroed, tmp_path / "two")
    assert_same_model(load_model(tmp_path / "two"), zeroed)


def test_a_second_save_replaces_the_model_and_keeps_other_files(tiny, tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_model(tiny.random_decoder(tiny.configs["hybrid"], seed=1), path)
    (path / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    (path / "model.safetensors.index.json").write_text("{}")
    (path / "state").mkdir()
    (path / "state" / "step.json").write_text("7")
    with (path / "metrics.jsonl").open("a") as log:
        log.write("one\n")
        log.flush()
        model = tiny.random_decoder(tiny.configs["pure"], seed=2)
        save_model(model, path)
        log.write("two\n")
    assert_same_model(load_model(path), model)
    assert (path / "metrics.jsonl").read_text() == "one\ntwo\n"
    names = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    kept = {"config.json", "generation_config.json", WEIGHTS, "metrics.jsonl", "state/step.json"}
    assert names == {f"model/{name}" for name in kept}


def test_a_save_that_fails_leaves_the_old_model(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    old = tiny.random_decoder(tiny.configs["llama"], seed=1)
    save_model(old, path)

    def full_disk(*_: object, **__: object) -> None:
        raise OSError("no space left")

    for step in ("save_file", "_sync", "_keep_others"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, step, full_disk)
            with pytest.raises(OSError, match="no space left"):
                save_model(tiny.random_decoder(tiny.configs["llama"], seed=2), path)
        assert_same_model(load_model(path), old)
        assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_save_recovers_what_a_killed_one_left(tiny, tmp_path: Path) -> None:
    path, model = tmp_path / "model", tiny.random_decoder(tiny.configs["llama"])
    save_model(model, path)
    (path / "metrics.jsonl").write_text("one\n")
    path.rename(tmp_path / ".model.old")
    (tmp_path / ".model.new").mkdir()
    save_model(model, path)
    assert (path / "metrics.jsonl").read_text() == "one\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_tokenizer_files_are_copied(tiny, tmp_path: Path) -> None:
    source = tmp_path / "teacher"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "README"):
        (source / name).write_text(name)
    model = tiny.random_decoder(tiny.configs["llama"])
    save_model(model, tmp_path / "student", tokenizer_from=source)
    save_model(model, tmp_path / "student", tokenizer_from=tmp_path / "student")
    got = {file.name: file.read_text() for file in (tmp_path / "student").glob("*e*") if file.suffix != ".safetensors"}
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        assert got[name] == name
    assert "README" not in got
    with pytest.raises(BadInput, match="nowhere: no such directory"):
        save_model(model, tmp_path / "other", tokenizer_from=tmp_path / "nowhere")


def test_shapes_the_stock_class_refuses_are_refused(tiny, tmp_path: Path) -> None:
    config = tiny.configs["hybrid"]
    odd = replace(config, mamba=replace(config.mamba, head_dim=6))
    with pytest.raises(BadInput, match=r"= 24 is not a multiple of hidden_size 32"):
        save_model(Decoder(odd), tmp_path / "model")
    with pytest.raises(BadInput, match="hidden_size 32 is not a multiple of num_heads 3"):
        save_model(Decoder(replace(tiny.configs["llama"], num_heads=3, num_kv_heads=3)), tmp_path / "model")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="is a file"):
        save_model(Decoder(config), tmp_path / "file")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BAD_FIELDS = [
    (
        "llama",
        {"model_type": "mixtral"},
        "model_type is 'mixtral', supported are 'llama', 'mistral', 'qwen2', 'qwen3', 'granitemoehybrid', ",
    ),
    ("llama", {"attention_bias": True}, "attention_bias is True"),
    ("llama", {"mlp_bias": True}, "mlp_bias is True"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
    ("llama", {"vocab_size": "53"}, "vocab_size is '53', expected a positive integer"),
    ("llama", {"num_hidden_layers": "absent"}, "num_hidden_layers is None"),
    ("llama", {"num_hidden_layers": True}, "num_hidden_layers is True"),
    ("llama", {"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
    ("llama", {"head_dim": 7}, "head_dim is 7, expected an even number"),
    ("llama", {"rms_norm_eps": 0}, "rms_norm_eps is 0, expected a positive number"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ("llama", {"eos_token_id": [2, "x"]}, "eos_token_id is [2, 'x']"),
    ("llama", {"bos_token_id": -1}, "bos_token_id is -1"),
    ("llama", {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: rope_type is 'yarn'"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling: rope_type is 'linear'"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters: rope_type is 'dynamic'"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ("llama", {"rope_parameters": [1]}, "rope_parameters is [1], expected an object"),
    ("llama", {"rope_scaling": LLAMA3}, "original_max_position_embeddings is None"),
    ("llama", {"rope_parameters": LLAMA3 | {"factor": "x"}}, "rope_parameters: "),
    ("hybrid", {"num_local_experts": 8}, "num_local_experts is 8"),
    ("hybrid", {"num_local_experts": "absent"}, "num_local_experts is 8"),
    ("hybrid", {"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'"),
    ("hybrid", {"mamba_proj_bias": True}, "mamba_proj_bias is True"),
    ("hybrid", {"mamba_conv_bias": "yes"}, "mamba_conv_bias is 'yes'"),
    ("hybrid", {"embedding_multiplier": "12"}, "embedding_multiplier is '12'"),
    ("hybrid", {"residual_multiplier": 0}, "residual_multiplier is 0"),
    ("hybrid", {"logits_scaling": -8}, "logits_scaling is -8"),
    ("hybrid", {"attention_multiplier": None}, "attention_multiplier is None"),
    ("hybrid", {"time_step_limit": [0.0, 0.5]}, "time_step_limit is [0.0, 0.5]"),
    ("hybrid", {"layer_types": ["mamba", "attention"]}, "layer_types is ['mamba', 'attention']"),
    ("hybrid", {"layer_types": ["mamba", "conv", "mamba"]}, "layer_types[1] is 'conv'"),
    ("hybrid", {"mamba_d_head": 8}, "mamba_d_head is 8"),
    ("hybrid", {"mamba_n_groups": 3}, "n_heads 4 is not a multiple of n_groups 3"),
]


@pytest.mark.parametrize(("name", "changes", "expected"), BAD_FIELDS)
def test_unusable_fields_are_named(tiny, tmp_path: Path, name: str, changes: dict, expected: str) -> None:
    save_model(tiny.random_decoder(tiny.configs[name]), tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    message = complaint(tmp_path)
    assert "config.json" in message
    assert expected in message
    assert complaint(tmp_path, read_config) == message


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"eos_token_id": [3, 4]}, "eos_token_ids", (3, 4)),
        ({"eos_token_id": "absent"}, "eos_token_ids", (2,)),
        ({"num_key_value_heads": "absent"}, "num_kv_heads", 4),
        ({"head_dim": None}, "head_dim", 8),
        ({"rms_norm_eps": "absent"}, "rms_norm_eps", 1e-6),
        ({"tie_word_embeddings": "absent"}, "tie_word_embeddings", False),
        ({"rope_parameters": "absent", "rope_theta": 7.0}, "rope_theta", 7.0),
        ({"rope_parameters": "absent", "rope_theta": "absent"}, "rope_theta", 10000.0),
        ({"rope_parameters": {"rope_theta": 9.0}, "rope_theta": 7.0}, "rope_theta", 9.0),
    ],
)
def test_absent_and_alternative_fields(tiny, tmp_path: Path, changes: dict, field: str, value: object) -> None:
    save_model(tiny.random_decoder(tiny.configs["llama"]), tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    assert getattr(read_config(tmp_path), field) == value


def test_files_that_are_missing_or_broken(tiny, tmp_path: Path) -> None:
    path = tmp_path / "model"
    assert "no such directory" in complaint(path)
    assert "no such directory" in complaint(path, read_config)
    save_model(tiny.random_decoder(tiny.configs["llama"]), path)
    config, weights = (path / "config.json").read_text(), (path / WEIGHTS).read_bytes()

    (path / "config.json").write_text(config[:90])
    assert "config.json: not valid JSON" in complaint(path)
    (path / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "config.json: not valid JSON" in complaint(path)
    (path / "config.json").write_text("[1]")
    assert "config.json: holds list" in complaint(path)
    (path / "config.json").unlink()
    assert "config.json: no such file" in complaint(path)
    (path / "config.json").write_text(config)

    for cut in (len(weights) - 8, 40, 3, 0):
        (path / WEIGHTS).write_bytes(weights[:cut])
        assert f"{WEIGHTS}: not a complete safetensors file" in complaint(path)
    (path / WEIGHTS).unlink()
    assert "expected weights in safetensors" in complaint(path)


def test_shards(tiny, tmp_path: Path) -> None:
    model = tiny.random_decoder(tiny.configs["llama"])
    save_model(model, tmp_path)
    tensors = sorted(load_file(tmp_path / WEIGHTS).items())
    (tmp_path / WEIGHTS).unlink()
    files = {"model-00001-of-00002.safetensors": tensors[::2], "model-00002-of-00002.safetensors": tensors[1::2]}
    for file, part in files.items():
        save_file(dict(part), tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in files.items() for name, _ in part}}))
    assert_same_model(load_model(tmp_path), model)

    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "index.json: weight_map names missing files: model-00002-of-00002.safetensors" in complaint(tmp_path)
    index.write_text(json.dumps({"weight_map": ["x"]}))
    assert "weight_map is not an object of file names" in complaint(tmp_path)


def test_every_missing_unexpected_and_misshapen_tensor_is_named(tiny, tmp_path: Path) -> None:
    save_model(tiny.random_decoder(tiny.configs["hybrid"]), tmp_path)
    edit_tensors(
        tmp_path,
        model__layers__0__mamba__D=None,
        model__layers__1__self_attn__k_proj__weight=None,
        model__layers__0__mamba__in_proj__bias=torch.zeros(3),
        lm_head__weight=torch.zeros(53, 32),
        model__norm__weight=torch.zeros(31),
        model__layers__2__mamba__A_log=torch.zeros(4, dtype=torch.int8),
    )
    message = complaint(tmp_path)
    assert "missing tensors: model.layers.0.mamba.D, model.layers.1.self_attn.k_proj.weight;" in message
    assert "unexpected tensors: lm_head.weight, model.layers.0.mamba.in_proj.bias;" in message
    assert "model.norm.weight has shape (31,), expected (32,)" in message
    assert "model.layers.2.mamba.A_log holds torch.int8" in message


def test_harmless_leftovers_of_old_checkpoints_are_ignored(tiny, tmp_path: Path) -> None:
    model = tiny.random_decoder(tiny.configs["llama"])
    save_model(model, tmp_path)
    edit_tensors(
        tmp_path,
        lm_head__weight=model.embed_tokens.weight.detach().clone(),
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4),
    )
    assert_same_model(load_model(tmp_path), model)
