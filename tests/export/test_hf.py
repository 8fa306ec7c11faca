"""What an exported directory holds, that it is refused where it must be, and that nothing half written stays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from thinkfast.errors import BadInput
from thinkfast.export import hf
from thinkfast.export.hf import export_hf
from thinkfast.export.parity import Differs
from thinkfast.model.checkpoint import load_model
from thinkfast.records import Failed

transformers = pytest.importorskip(
    "transformers",
    minversion="5.23.0",
    reason="older transformers norm over all groups; `make test` installs a newer one",
)
Make = Callable[..., Path]


@pytest.mark.parametrize(
    "name", ["llama3", "qwen3", "hybrid", "hybrid-bias", "hybrid-no-positions", "groups-wide", "pure-groups"]
)
def test_an_export_is_the_model(make_model: Make, tmp_path: Path, name: str) -> None:
    source = make_model(name)
    document = export_hf(source, tmp_path / "new" / "out")
    parity = document["parity"]
    assert parity["transformers"] == transformers.__version__
    assert parity["generated"] > 0
    assert max(parity[key] for key in ("logits", "cached", "padded", "reloaded")) < 1e-4 * parity["scale"]
    assert (document["warnings"] != []) == ("groups" in name)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "new" / "out")(ids), load_model(source)(ids))
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["out"]


def test_what_readers_of_every_age_need_is_there(make_model: Make, tmp_path: Path) -> None:
    export_hf(make_model("pure-groups"), tmp_path / "out", "bfloat16")
    out = tmp_path / "out"
    names = {entry.name for entry in out.iterdir()}
    files = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert names == files | {"tokenizer.json", "tokenizer_config.json"}
    assert {(out / name).stat().st_mode for name in files} == {(out / "config.json").stat().st_mode}
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    turns = [{"role": "user", "content": "Ann has 3 apples ."}]
    assert "Ann" in tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert generation.eos_token_id == tokenizer.eos_token_id
    assert generation.pad_token_id == tokenizer.pad_token_id


VLLM = {
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "model_type": "granitemoehybrid",
    "hidden_size": 64,
    "vocab_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "shared_intermediate_size": 96,
    "intermediate_size": 96,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "position_embedding_type": "rope",
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "layer_types": ["mamba", "attention", "mamba"],
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 1,
    "mamba_chunk_size": 16,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "use_cache": True,
}
"""What vLLM 0.33 and SGLang 0.5 read, with what it must be for the model `hybrid`."""


def test_every_field_that_vllm_and_sglang_read(make_model: Make, tmp_path: Path) -> None:
    export_hf(make_model("hybrid-untied-scaled", tie_word_embeddings=True), tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: raw.get(name) for name in VLLM} == VLLM
    assert raw["mamba_n_heads"] * raw["mamba_d_head"] == raw["mamba_expand"] * raw["hidden_size"]
    assert raw["hidden_size"] // raw["num_attention_heads"] == raw["head_dim"]
    # vLLM reads the new field, SGLang and transformers 4 the two old ones.
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 500.0
    assert raw["rope_scaling"]["rope_type"] == raw["rope_parameters"]["rope_type"] == "llama3"
    assert {**raw["rope_scaling"], "rope_theta": 500.0} == raw["rope_parameters"]
    assert raw["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    assert "time_step_limit" not in raw
    assert "Infinity" not in (tmp_path / "out" / "config.json").read_text()
    assert raw["dtype"] == raw["torch_dtype"] == "float32"


def test_how_to_sample_comes_from_the_source_and_its_run(make_model: Make, tmp_path: Path) -> None:
    model = tmp_path / "run" / "models" / "one"
    shutil.copytree(make_model("pure"), model)
    assert hf._sampled(model) == {}
    sampled = tmp_path / "run" / "samples" / "one" / "run.json"
    sampled.parent.mkdir(parents=True)
    sampled.write_text(json.dumps({"settings": {"temperature": 0.8, "top_p": 0.9}}))
    export_hf(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (written["do_sample"], written["temperature"], written["top_p"]) == (True, 0.8, 0.9)
    assert "eos_token_id" in written


def complaint(source: Path, out: Path, *arguments: object) -> str:
    with pytest.raises(BadInput) as caught:
        export_hf(source, out, *arguments)
    assert "\n" not in str(caught.value)
    assert list(out.parent.glob(".*")) == []
    return str(caught.value)


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(make_model: Make, tmp_path: Path) -> None:
    source, out = make_model("groups"), tmp_path / "out"
    assert "dtype is 'int8', expected one of float32, float16, bfloat16 for the format hf" in complaint(
        source, out, "int8"
    )
    message = complaint(source, out, None, True)
    assert "4 groups, which transformers before 5.23 norm as one" in message
    assert "one group" in message
    assert not out.exists()
    out.mkdir()
    assert f"{out} exists, expected a new directory" in complaint(source, out)
    large = make_model("pure", rms_norm_eps=2e-5)
    model = load_model(large)
    with torch.no_grad():
        model.layers[0].mixer.in_proj.weight[0, 0] = 1e6
    with pytest.raises(
        BadInput, match=r"layers\.0\.mixer\.in_proj\.weight holds values that are not finite in float16"
    ):
        hf.to_dtype(model, torch.float16)


def test_rounding_is_told(make_model: Make, tmp_path: Path) -> None:
    source = make_model("pure")
    (told,) = export_hf(source, tmp_path / "half", "bfloat16")["warnings"]
    assert told == "rounded from float32 to bfloat16; what was measured was before that"
    assert f"- {told}\n" in (tmp_path / "half" / "README.md").read_text()
    assert export_hf(tmp_path / "half", tmp_path / "again", "float32")["warnings"] == []


def test_one_group_is_compatible(make_model: Make, tmp_path: Path) -> None:
    assert export_hf(make_model("pure"), tmp_path / "out", None, True)["warnings"] == []


def test_an_export_that_differs_gets_no_name(make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(path: Path) -> None:
        raise Differs(f"{path}: the logits are off")

    monkeypatch.setattr(hf, "check", differs)
    with pytest.raises(Failed, match=f"{tmp_path}/out: the logits are off"):
        export_hf(make_model("pure"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_is_in_nobodys_way(make_model: Make, tmp_path: Path) -> None:
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "model.safetensors").write_text("half")
    export_hf(make_model("llama"), tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
