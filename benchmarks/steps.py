"""steps.py — what a step costs, beside the published codes' schedules over the same networks.

    python benchmarks/steps.py                          # tiny-sd; two minutes, on an idle machine
    python benchmarks/steps.py --shapes sd21 sdxl sd3 flux2 --device cuda --dtype bfloat16

Everything is timed in turns in one process: rounds of a few steps of each row. A shape other than
tiny-sd is the network of its public configuration with random values (time does not depend on
them). Evaluations are rows that go through a network forwards, and backwards; peak: of the largest
matrix product measured here in the same dtype. Writes benchmarks/steps-DEVICE.json, of other shapes
steps-DEVICE-SHAPES.json.
"""
import argparse
import json
import platform
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import memory  # noqa: E402

import asd  # noqa: E402
from phi import EmbeddingPhi, LoRAPhi  # noqa: E402


class Shape:
    """A prior without a model behind it: a network of random values, and α, σ of a line."""

    def __init__(self, name, device, dtype):
        with torch.device("meta"):
            network, args, self.inputs = getattr(memory, name)()
        self.network = network.to(dtype).to_empty(device=device).requires_grad_(False)
        with torch.no_grad():
            for p in self.network.parameters():
                nn.init.normal_(p, std=0.02)
            for buffer in self.network.buffers():
                buffer.zero_()
        self.name, self.device, self.dtype, self.steps = name, torch.device(device), dtype, 1000
        self.unet = hasattr(network, "down_blocks")
        self.family = SimpleNamespace(network="unet" if self.unet else "transformer")
        if self.unet:
            example, _, cond = args
        else:
            example, cond = self.inputs["hidden_states"], self.inputs["encoder_hidden_states"]
        self.example = example.shape[1:]
        self.shape = (1,) * (3 - len(self.example)) + tuple(self.example)        # [C, H, W]
        self.cond = torch.zeros(cond.shape, device=device)

    def encode_text(self, prompts):
        return self.cond.repeat(len(prompts), 1, 1)

    def alpha_sigma(self, t):
        sigma = ((t + 1) / (self.steps + 1)).view(-1, 1, 1, 1)
        return 1 - sigma, sigma

    def eps(self, x_t, t, cond):
        return self.eps_of(self.network, x_t, t, cond)

    def eps_of(self, network, x_t, t, cond):
        cast = lambda x: x.to(self.device, self.dtype)
        zeros = lambda x: torch.zeros(len(x_t), *x.shape[1:], device=self.device, dtype=self.dtype)
        if self.unet:
            extra = {}
            for name, inputs in self.inputs.items():
                extra[name] = {key: zeros(x) for key, x in inputs.items()}
            return network(cast(x_t), t, cast(cond), **extra).sample.float()
        inputs = {name: zeros(x) for name, x in self.inputs.items()}
        inputs |= {"hidden_states": cast(x_t).view(-1, *self.example),
                   "encoder_hidden_states": cast(cond),
                   "timestep": cast(t) / (1 if self.name == "sd3" else 1000)}
        return network(**inputs).sample.float().view(x_t.shape)


# ----------------------------------------------------------------------------------- the schedules
def ours(prior, phi, row, batch):
    """One step of asd.distill() at a time."""
    rng = torch.Generator().manual_seed(0)
    generator = asd.Latents(prior, batch, rng)
    state, y = asd.State(generator, phi, row, rng), prior.encode_text(["a fox"])

    def step():
        asd.distill(prior, generator, y, replace(row, steps=state.step + 1), state=state)
    return step


def published(prior, phi, row, batch, calls_of_phi, penalty):
    """The step of a published code: a call for every question, φ asked as often as it asks.

    calls_of_phi: how many rows a particle φ is asked at θ's noise, the guided one thrown away, in
    so many calls; penalty: whether ε_y is asked at φ's own noise, in a call of its own.
    """
    rng = torch.Generator().manual_seed(0)
    theta = next(asd.Latents(prior, batch, rng).parameters())
    opt_theta = torch.optim.Adam([theta], row.lr)
    opt_phi = torch.optim.AdamW([p for p in phi.parameters() if p.requires_grad], row.phi_lr)
    y, null = (prior.encode_text([text] * batch) for text in ("a fox", ""))

    def step():
        x0 = theta.detach()
        with torch.no_grad():
            t, eps = asd.draw(rng, x0, 20, 980)
            x_t = asd.add_noise(x0, eps, *prior.alpha_sigma(t))
            uncond, cond = prior.eps(torch.cat([x_t] * 2), torch.cat([t] * 2),
                                     torch.cat([null, y])).chunk(2)
            for rows in calls_of_phi:
                answers = phi(torch.cat([x_t] * rows), torch.cat([t] * rows),
                              torch.cat([y, null][:rows]), eps).chunk(rows)
        opt_theta.zero_grad()
        theta.grad = asd.generator_grad(uncond, cond, answers[0], row.lam)
        opt_theta.step()
        t, eps = asd.draw(rng, x0, 0, 999)
        x_t = asd.add_noise(x0, eps, *prior.alpha_sigma(t))
        fake_y = prior.eps(x_t, t, y) if penalty else torch.zeros_like(x_t)
        opt_phi.zero_grad()
        asd.discriminator_loss_text(eps, phi(x_t, t, y, eps), fake_y, row.gamma).backward()
        opt_phi.step()
    return step


ROWS = {  # name: (schedule, method, changes, φ, evaluations forwards + backwards)
    "SDS": (ours, "sds", {}, asd.NoisePhi, "2"),
    "VSD": (ours, "vsd", {}, LoRAPhi, "4 + 1"),
    "ASD": (ours, "asd", {}, LoRAPhi, "5 + 1"),
    "ASD, shared noise": (ours, "asd", {"share_noise": True}, LoRAPhi, "3 + 1"),
    "ASD, embedding": (ours, "asd", {}, EmbeddingPhi, "5 + 1"),
    "prolific_dreamer2d's VSD": ([1], "vsd", {}, LoRAPhi, "4 + 1"),
    "threestudio's VSD": ([2], "vsd", {}, LoRAPhi, "5 + 1"),
    "the released ASD": ([1, 1], "asd", {}, LoRAPhi, "6 + 1"),
}


def steps_of(prior, batch, names):
    """{row: a function that makes one step}"""
    made = {}
    for name in names:
        schedule, method, changes, phi, _ = ROWS[name]
        if phi is EmbeddingPhi and isinstance(prior, Shape):
            continue                                          # it needs text encoders
        row = replace(asd.METHODS[method], steps=10 ** 6, **changes)
        if schedule is ours:
            made[name] = ours(prior, phi(prior, "a fox"), row, batch)
        else:
            made[name] = published(prior, phi(prior, "a fox"), row, batch, schedule, row.gamma != 0)
    return made


def synchronised(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak(device, dtype, size):
    """FLOP/s of the largest matrix product: the best of twenty."""
    a, best = torch.randn(size, size, device=device, dtype=dtype), 0.0
    for _ in range(20):
        began = synchronised(device)
        a @ a
        best = max(best, 2 * size ** 3 / (synchronised(device) - began))
    return best


def measure(prior, batch, names, rounds, steps):
    """-> {row: {"ms", "tflop", "gib"}}: medians over rounds, in turns."""
    made = steps_of(prior, batch, names)
    cuda = prior.device.type == "cuda"
    times, rows = {name: [] for name in made}, {}
    for name, step in made.items():
        step()                                                # what is done once
        if cuda:
            torch.cuda.reset_peak_memory_stats(prior.device)
        with FlopCounterMode(display=False) as counter:
            step()
        rows[name] = {"tflop": counter.get_total_flops() / 1e12}
        if cuda:
            rows[name]["gib"] = torch.cuda.max_memory_allocated(prior.device) / 2 ** 30
    for _ in range(rounds):
        for name, step in made.items():
            for _ in range(steps):
                began = synchronised(prior.device)
                step()
                times[name].append(1000 * (synchronised(prior.device) - began))
    for name, ms in times.items():
        rows[name] = {"ms": sorted(ms)[len(ms) // 2]} | rows[name]
    return rows


def machine(device):
    """The name of the processor, or of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        for line in cpu.read_text().split("\n"):
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["tiny-sd"],
                        choices=["tiny-sd", "sd21", "sdxl", "sd3", "flux2"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="of a row, in a round")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--out", default=HERE, type=Path, help="the folder (default: benchmarks/)")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    best = peak(device, dtype, 2048 if device.type == "cpu" else 8192)
    rows = []
    for shape in arguments.shapes:
        if shape == "tiny-sd":
            prior = asd.Prior.from_pretrained(shape, device, dtype)
        else:
            prior = Shape(shape, device, dtype)
        for batch in arguments.batches:
            measured = measure(prior, batch, arguments.rows, arguments.rounds, arguments.steps)
            for name, numbers in measured.items():
                numbers["share"] = numbers["tflop"] * 1e12 / (numbers["ms"] / 1000) / best
                evaluations = ROWS[name][-1]
                rows.append({"shape": shape, "batch": batch, "row": name,
                             "evaluations": evaluations} | numbers)
                print(f"{shape:8} batch {batch}  {name:26} {evaluations:6} {numbers['ms']:9.1f} ms"
                      f"  {numbers['share']:5.1%} of the peak", flush=True)
    others = [shape for shape in arguments.shapes if shape != "tiny-sd"]
    file = arguments.out / f"steps-{'-'.join([device.type, *others])}.json"
    file.write_text(json.dumps({
        "machine": machine(device), "threads": torch.get_num_threads(), "dtype": arguments.dtype,
        "torch": torch.__version__, "date": str(date.today()), "peak TFLOP/s": best / 1e12,
        "command": "python benchmarks/steps.py " + " ".join(sys.argv[1:]), "rows": rows},
        indent=1) + "\n")
    print(file)


if __name__ == "__main__":
    main()
