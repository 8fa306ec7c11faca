import random

import pytest
import torch

from thinkfast.data.corpus import write_corpus
from thinkfast.model.config import ATTENTION, DecoderConfig
from thinkfast.model.decoder import Decoder
from thinkfast.student.convert import convert
from thinkfast.student.plan import LayerPlan


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(24, 16, 24, 2, 1, 8, (ATTENTION,) * 3))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def student(teacher):
    """Layers 0 and 2 are Mamba, layer 1 stays attention."""
    return convert(teacher, LayerPlan((1,)), torch.arange(96).view(4, 24) % 24)


@pytest.fixture
def corpus(tmp_path):
    rng = random.Random(0)

    def ids(shortest, longest):
        return [rng.randrange(24) for _ in range(rng.randint(shortest, longest))]

    return write_corpus(tmp_path / "corpus", [(ids(2, 6), ids(4, 30)) for _ in range(80)], "f", 24)
