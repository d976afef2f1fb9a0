"""The Trainer: warm-up, a constant rate, a decay; what is killed goes on."""
import pytest
import torch
from torch import nn

from tiny import training
from tiny.training import Trainer


@pytest.fixture
def clock(monkeypatch):
    """A minute passes at each look at the clock but the first."""
    now = iter(range(0, 10 ** 6, 60))
    monkeypatch.setattr(training.time, "monotonic", lambda: float(next(now)))


def line(path, **settings):
    torch.manual_seed(0)
    return Trainer(path, nn.Linear(3, 1), 1e-2, **settings)


def lessons(trainer, rates=None, most=10 ** 6):
    """A loss that falls, noting each step's rate; KeyboardInterrupt after `most` steps."""
    def loss_function():
        if trainer.step >= most:
            raise KeyboardInterrupt
        if rates is not None:
            rates.append(trainer.optimizer.param_groups[0]["lr"] / trainer.lr)
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(trainer.step))
        loss = (trainer.module(x) - x.sum(1, keepdim=True)).square().mean()
        return loss, {"loss": loss.detach()}
    return loss_function


def test_rates(tmp_path, clock):
    """Up over 200 steps, then constant for the minutes asked for, then down along a line."""
    rates, trainer = [], line(tmp_path / "a.safetensors", minutes=250, decay=10)
    assert trainer.run(lessons(trainer, rates)) is trainer.module
    assert rates[0] == pytest.approx(1 / 200) and rates[150] == pytest.approx(151 / 200)
    assert rates[220] == 1 and len(rates) == 250 + 10
    assert rates[-10:] == pytest.approx([1 - i / 10 for i in range(10)])


def test_a_stopped_run_goes_on(tmp_path, clock):
    """With the weights, Adam's and the average's; in the decay it goes on decaying."""
    whole = line(tmp_path / "whole.safetensors", minutes=20, decay=6)
    whole.run(lessons(whole))
    path = tmp_path / "cut.safetensors"
    cut = line(path, minutes=20, decay=6)
    with pytest.raises(KeyboardInterrupt):
        cut.run(lessons(cut, most=24))
    again = line(path, minutes=20, decay=6)
    assert 0 < again.step <= 24 and again.decayed > 0
    again.run(lessons(again))
    assert again.step == whole.step
    for a, b in zip(again.module.parameters(), whole.module.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    finished = line(path, minutes=20, decay=6)
    finished.run(lessons(finished))
    assert finished.step == whole.step and not list(tmp_path.glob("*.tmp"))


def test_threads_are_given_back(tmp_path, clock, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(training, "leave_a_core", lambda: torch.set_num_threads(before + 1))
    trainer = line(tmp_path / "a.safetensors", minutes=2)
    trainer.run(lessons(trainer))
    assert trainer.step > 0 and torch.get_num_threads() == before


def test_what_cannot_learn_is_an_error(tmp_path, clock):
    trainer = line(tmp_path / "a.safetensors", minutes=9)
    with pytest.raises(FloatingPointError, match="at step 0"):
        trainer.run(lambda: (trainer.module.weight.sum() * torch.inf, {}))
    with pytest.raises(ValueError, match="1 of 2 parameters"):
        trainer.run(lambda: (trainer.module.weight.sum(), {}))
