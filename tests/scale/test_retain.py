import math

import pytest
import torch

from thinkfast.model.config import ATTENTION, DecoderConfig
from thinkfast.model.decoder import Decoder
from thinkfast.scale.retain import divergence, loops, repetition


def test_repetition_is_the_share_of_windows_seen_before():
    assert repetition([1, 2, 3, 4], span=2) == 0
    assert repetition([1, 2, 1, 2, 1], span=2) == 0.5  # 12 21 12 21
    assert repetition([7] * 20, span=16) == 0.8
    assert repetition([1, 2], span=16) == 0


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        ([5] * 30, True),
        ([5] * 29, False),
        ([*range(50), *[1, 2, 3] * 10], True),
        ([*range(50), *[1, 2, 3] * 10, 4], False),
        (list(range(20)) * 3, True),
        (list(range(20)) * 2, False),
        ([], False),
    ],
)
def test_a_loop_is_three_copies_at_the_end(ids, found):
    assert loops(ids) is found


def model(seed: int) -> Decoder:
    config = DecoderConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        layer_types=(ATTENTION,),
        max_position_embeddings=64,
        eos_token_ids=(1,),
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return Decoder(config).eval()


def test_divergence_is_the_sum_over_the_answer_in_float64():
    first, second = model(1), model(2)
    prompt, answer = [3, 4, 5], [6, 7, 8, 9]
    (found,) = divergence(first, second, [prompt], [answer])
    kl, agreed = 0.0, 0
    for length in range(3, 7):
        ids = torch.tensor([[*prompt, *answer][:length]])
        p, q = (one(ids)[0, -1].double().softmax(-1).tolist() for one in (first, second))
        kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        agreed += p.index(max(p)) == q.index(max(q))
    assert found.tokens == 4
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert found.agreed == agreed
    (same,) = divergence(first, first, [prompt], [answer])
    assert (same.kl, same.agreed) == (pytest.approx(0, abs=1e-6), 4)
