import multiprocessing
import os
import signal

import pytest
import torch
from torch import nn

from thinkfast.data.corpus import Cursor
from thinkfast.distill import state
from thinkfast.distill.state import Counters, load_state, save_state
from thinkfast.errors import BadInput

IDENTITY = {"lr": 0.1, "corpus": "abc"}
COUNTERS = Counters(Cursor(3, 1, 4), step=9, tokens=1000, seconds=2.5, first_loss=1.0, loss=0.5)


def trained(seed=0, width=3):
    torch.manual_seed(seed)
    model = nn.Linear(width, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, width)).pow(2).sum().backward()
        optimizer.step()
    return model, optimizer


def test_everything_comes_back(tmp_path):
    model, optimizer = trained()
    save_state(tmp_path / "s", IDENTITY, COUNTERS, model, optimizer)
    drawn = torch.rand(3)
    other, other_optimizer = trained(seed=1)
    assert load_state(tmp_path / "s", IDENTITY, other, other_optimizer) == COUNTERS
    assert torch.equal(torch.rand(3), drawn)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    mine, theirs = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert mine.keys() == theirs.keys()
    for index in mine:
        for key, value in mine[index].items():
            assert torch.equal(theirs[index][key], value)


def test_nothing_saved_is_none(tmp_path):
    assert load_state(tmp_path / "s", IDENTITY, *trained()) is None


def test_another_identity_is_refused_and_named(tmp_path):
    model, optimizer = trained()
    save_state(tmp_path / "s", IDENTITY, COUNTERS, model, optimizer)
    with pytest.raises(BadInput, match=r"s: was made with lr = 0\.1, not 0\.2"):
        load_state(tmp_path / "s", IDENTITY | {"lr": 0.2}, model, optimizer)
    with pytest.raises(BadInput, match="was made with beta = None, not 1"):
        load_state(tmp_path / "s", IDENTITY | {"beta": 1}, model, optimizer)


def test_another_model_is_refused(tmp_path):
    save_state(tmp_path / "s", IDENTITY, COUNTERS, *trained())
    with pytest.raises(BadInput, match="belongs to another model") as caught:
        load_state(tmp_path / "s", IDENTITY, *trained(width=5))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 10, 500])
def test_a_damaged_file_is_refused(tmp_path, keep):
    path = tmp_path / "s"
    save_state(path, IDENTITY, COUNTERS, *trained())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BadInput, match=f"{path}: not a training state") as caught:
        load_state(path, IDENTITY, *trained())
    assert "\n" not in str(caught.value)


def die(descriptor):
    os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(path, model, optimizer):
    state.os.fsync = die
    save_state(path, IDENTITY, Counters(Cursor(5)), model, optimizer)


def test_kill_during_a_save_leaves_the_previous_state(tmp_path):
    path = tmp_path / "s"
    model, optimizer = trained()
    save_state(path, IDENTITY, COUNTERS, model, optimizer)
    process = multiprocessing.get_context("fork").Process(target=save_and_die, args=(path, model, optimizer))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2, "the child did not get as far as writing"
    assert load_state(path, IDENTITY, model, optimizer) == COUNTERS
