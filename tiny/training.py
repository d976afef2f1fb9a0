"""training.py — the trainer of the embedded model's parts: killed at any time, it goes on.

The rate is constant after a warm-up, so nobody has to know the total time beforehand; a last stage
of `decay` minutes lets it fall to zero along a line, and only then are the weights worth keeping
(warm-up–stable–decay, arXiv 2404.06395). What is kept is an exponential moving average.
"""
import os
import time
from contextlib import contextmanager

import psutil
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm


def save_tensors(path, tensors, about=None):
    """A safetensors file, written beside its place and moved there when it is whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)             # of a killed run; a link would lead elsewhere
    try:
        save_file({name: x.contiguous() for name, x in tensors.items()}, temporary, about)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def threads_kept():
    """Whatever happens within to the number of torch's threads."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Trainer:
    """AdamW and EMA of `module`, which keeps the weights it comes with where no checkpoint exists.

    path     of the checkpoint, written every three minutes and at the end.
    lr       of the stable stage, after 200 steps of warm-up.
    minutes  of the stable stage in this call; None: until it is killed.
    decay    minutes of the last stage, which begins where the stable one ends; 0: none. A run that
             is killed in it goes on in it.
    """

    def __init__(self, path, module, lr, minutes=None, decay=0.0, ema_decay=0.999, device="cpu"):
        from diffusers.training_utils import EMAModel
        self.path, self.module, self.lr, self.device = path, module.to(device), lr, device
        self.minutes, self.decay, self.step, self.decayed = minutes, decay, 0, 0.0
        self.parameters = list(module.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr, betas=(0.9, 0.99), fused=True)
        self.ema = EMAModel(self.parameters, decay=ema_decay)
        if path.exists():
            self.load()

    def save(self):
        tensors = {f"parameter.{i}": p.detach() for i, p in enumerate(self.parameters)}
        tensors |= {f"ema.{i}": p for i, p in enumerate(self.ema.shadow_params)}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{key}": value for key, value in state.items()}
        save_tensors(self.path, tensors, {"step": str(self.step), "decayed": str(self.decayed)})

    def load(self):
        with safe_open(self.path, "pt") as file:
            about = file.metadata()
        tensors = load_file(self.path)
        state = self.optimizer.state_dict()
        with torch.no_grad():
            for i, p in enumerate(self.parameters):
                p.copy_(tensors[f"parameter.{i}"])
                self.ema.shadow_params[i].copy_(tensors[f"ema.{i}"])
                if f"adam.{i}.step" in tensors:       # not before the first step
                    state["state"][i] = {key: tensors[f"adam.{i}.{key}"]
                                         for key in ("step", "exp_avg", "exp_avg_sq")}
        self.optimizer.load_state_dict(state)
        self.step, self.decayed = int(about["step"]), float(about["decayed"])
        self.ema.optimization_step = self.step

    @threads_kept()
    def run(self, loss_function):
        """loss_function() -> (loss, {term: value}), again and again. Returns the averaged module.

        Raises FloatingPointError where the loss is not finite, ValueError where a parameter has no
        gradient: it would learn nothing.
        """
        bar = tqdm(desc=self.path.name.split(".")[0], initial=self.step, mininterval=5)
        began = saved = tick = time.monotonic()
        smooth, checked = {}, False
        while True:
            stable = not self.decayed and (self.minutes is None or tick - began < 60 * self.minutes)
            if not stable and self.decayed >= 60 * self.decay:
                break
            rate = min(1, (self.step + 1) / 200) * (
                1 if stable else 1 - self.decayed / (60 * self.decay))
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * rate
            if self.device == "cpu":
                leave_a_core()
            loss, terms = loss_function()
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} at step {self.step}")
            loss.backward()
            if not checked and self.step:         # zero at the first step, where a layer is zero
                still = sum(p.grad is None or not p.grad.any() for p in self.parameters)
                if still:
                    raise ValueError(f"{still} of {len(self.parameters)} parameters learn nothing")
                checked = True
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.step(self.parameters)
            self.step, before, tick = self.step + 1, tick, time.monotonic()
            if not stable:
                self.decayed += tick - before
            smooth = {k: 0.98 * smooth.get(k, float(v)) + 0.02 * float(v) for k, v in terms.items()}
            bar.set_postfix(**{k: f"{v:.4f}" for k, v in smooth.items()}, rate=f"{rate:.2f}",
                            refresh=False)
            bar.update()
            if tick - saved > 180:
                self.save()
                saved = tick
        self.save()
        bar.close()
        self.ema.copy_to(self.parameters)
        return self.module


def leave_a_core():
    """One thread while others use the machine, all cores while it is idle but for niced work."""
    busy = psutil.cpu_times_percent(None)        # since the last call
    cores = psutil.cpu_count()
    torch.set_num_threads(1 if (busy.user + busy.system) * cores > 40 else cores)
