import pytest
import torch

from thinkfast.errors import BadInput
from thinkfast.model.config import ATTENTION, DecoderConfig
from thinkfast.model.decoder import Decoder
from thinkfast.model.mixers import MIXERS
from thinkfast.student.assemble import assemble
from thinkfast.student.convert import convert
from thinkfast.student.plan import LayerPlan, ranked_layers, uniform

CONFIG = DecoderConfig(50, 32, 48, 4, 2, 8, (ATTENTION,) * 3)


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return Decoder(CONFIG).eval()


def trained(teacher, kind="mamba2"):
    """A base whose mixers are unlike those of any conversion."""
    base = convert(teacher, LayerPlan(mixer=kind))
    for layer in base.layers:
        for parameter in layer.mixer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return base


@pytest.mark.parametrize("kind", list(MIXERS))
@pytest.mark.parametrize("attention", [(), (1,), (2, 0), (0, 1, 2)])
def test_every_layer_is_the_teachers_or_the_bases(teacher, kind, attention):
    base = trained(teacher, kind)
    student = assemble(teacher, base, attention)
    x = torch.randn(2, 9, 32)
    with torch.no_grad():
        for index in range(3):
            source = teacher if index in attention else base
            assert torch.equal(student.layers[index](x), source.layers[index](x))
        if len(attention) == 3:
            ids = torch.arange(20).view(2, 10)
            assert torch.equal(student(ids), teacher(ids))


def test_it_is_what_conversion_with_that_plan_makes(teacher):
    base = convert(teacher, LayerPlan())
    direct, assembled = convert(teacher, LayerPlan((1,))), assemble(teacher, base, (1,))
    # Gates start at random without calibration: compare all else.
    for index in (0, 2):
        for name in ("A_log", "conv1d.weight", "out_proj.weight", "norm.weight"):
            mixers = (model.layers[index].mixer.get_parameter(name) for model in (direct, assembled))
            assert torch.equal(*mixers), name
    assert direct.config == assembled.config


def test_a_base_of_another_teacher_is_refused(teacher):
    torch.manual_seed(1)
    with pytest.raises(BadInput, match=r"another teacher or trained end to end: embed_tokens\.weight differs"):
        assemble(Decoder(CONFIG), trained(teacher), (1,))


def test_a_base_without_the_mixer_is_refused(teacher):
    with pytest.raises(BadInput, match="has no mixer for layer 2"):
        assemble(teacher, convert(teacher, LayerPlan((2,))), (1,))
    with pytest.raises(BadInput, match="only attention layers"):
        assemble(teacher, teacher, ())
    with pytest.raises(BadInput, match="1 is named twice"):
        assemble(teacher, trained(teacher), (1, 1))


@pytest.mark.parametrize(
    ("layers", "keep", "expected"),
    [(4, 1, (2,)), (4, 2, (1, 3)), (4, 4, (0, 1, 2, 3)), (28, 7, (2, 6, 10, 14, 18, 22, 26)), (4, 0, ())],
)
def test_uniform_layers(layers, keep, expected):
    assert uniform(layers, keep) == expected


def test_a_ranking_is_read_or_refused():
    document = {"choices": {"1": [2], "2": [2, 0]}}
    assert ranked_layers(document, 2, "r.json") == (0, 2)
    with pytest.raises(BadInput, match=r"r\.json: choices has no 3 layers, expected keep among 1, 2"):
        ranked_layers(document, 3, "r.json")
    for broken in ([], {}, {"choices": []}):
        with pytest.raises(BadInput, match=r"r\.json: choices is missing"):
            ranked_layers(broken, 1, "r.json")
