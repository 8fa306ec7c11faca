import math

import pytest
import torch

from thinkfast.bench.decode import decode_speeds
from thinkfast.bench.machine import bytes_per_token, flops_per_token, gemm_rate, read_bandwidth, weight_count
from thinkfast.errors import BadInput
from thinkfast.model.config import DecoderConfig, MambaConfig
from thinkfast.model.decoder import Decoder

TEACHER = DecoderConfig(40, 32, 48, 4, 2, 8, ("attention",) * 2, eos_token_ids=(1,))
PURE = TEACHER.with_layers(("mamba",) * 2, MambaConfig(4, 8, 8, 4))
HYBRID = TEACHER.with_layers(("mamba", "attention"), MambaConfig(4, 8, 8, 4))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_every_model_batch_and_context_has_a_row(backend: str) -> None:
    torch.manual_seed(0)
    models = {"teacher": Decoder(TEACHER).eval(), "pure": Decoder(PURE).eval()}
    measured = decode_speeds(models, (1, 3), (20, 40), steps=2, repeats=3, backend=backend)
    rows = measured["rows"]
    assert [(row["model"], row["batch"], row["context"]) for row in rows] == [
        (model, batch, context) for batch in (1, 3) for context in (20, 40) for model in ("teacher", "pure")
    ]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(1e6 / row["microseconds_per_token"])
        assert 0 < row["fastest_microseconds_per_token"] <= row["microseconds_per_token"]
        assert row["share"] == pytest.approx(row["floor_microseconds_per_token"] / row["microseconds_per_token"])
        assert 0 < row["share"] < 1
    machine = measured["machine"]
    assert machine["backend"] == {"teacher": backend, "pure": backend}
    assert machine["kv_dtype"]["teacher"] == ("bfloat16" if backend == "native" else "float32")
    assert machine["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("config", [TEACHER, PURE, HYBRID])
def test_weights_are_those_of_the_decoder(config: DecoderConfig) -> None:
    matrices = [value for name, value in Decoder(config).named_parameters() if value.ndim == 2]
    assert weight_count(config) == sum(value.numel() for value in matrices), "a tied embedding is the head"


def test_work_of_a_token() -> None:
    """Longhand: context adds scores and values for a teacher, nothing for a pure student."""
    assert flops_per_token(TEACHER, 101) - flops_per_token(TEACHER, 100) == 2 * 2 * (2 * 4 * 8)
    assert flops_per_token(PURE, 1000) == flops_per_token(PURE, 1)
    assert (
        bytes_per_token(TEACHER, 4, 11, "bfloat16") - bytes_per_token(TEACHER, 4, 10, "bfloat16") == 2 * 2 * 2 * 8 * 2
    )
    assert bytes_per_token(PURE, 1, 1, "float32") - 4 * weight_count(PURE) == 2 * (2 * 4 * 32 * 8)
    assert math.isclose(
        bytes_per_token(PURE, 1, 1, "float32") - bytes_per_token(PURE, 2, 1, "float32"), 2 * weight_count(PURE)
    )


def test_the_machine_is_measured() -> None:
    assert 1e8 < gemm_rate(0.02) < 1e14
    assert 1e7 < read_bandwidth(1 << 20, 0.02) < 1e13


def test_a_context_without_room_is_refused() -> None:
    with pytest.raises(BadInput, match="context is 5, expected at least 10 for 16 steps"):
        decode_speeds({"pure": Decoder(PURE).eval()}, (1,), (5,))
    with pytest.raises(BadInput, match="steps is 0 and repeats is 9"):
        decode_speeds({"pure": Decoder(PURE).eval()}, (1,), (50,), steps=0, repeats=9)
