"""What the tests share: one thread, hypothesis's profile, processes, mixtures of tiny/exact.py."""
import gc
import math
import multiprocessing
import os

os.environ["OMP_NUM_THREADS"] = "1"       # pytest-xdist starts a process for each core

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tiny.exact import GaussianMixture, particle_eps, randn  # noqa: F401

torch.set_num_threads(1)
gc.set_threshold(50_000)        # of the time that diffusers' imports take, a quarter is for garbage
settings.register_profile("asd", max_examples=25, deadline=None, derandomize=True, database=None,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("asd")


def pytest_collection_modifyitems(config, items):
    """Tests of processes come first: they last longest, and one worker then starts their server.

    Timings run with --benchmark-only -n 0 alone: beside other tests they would measure those.
    """
    items.sort(key=lambda item: "fork" not in item.fixturenames)
    if config.getoption("benchmark_only", False):
        return
    for item in items:
        if "benchmark" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason="a timing: --benchmark-only"))


@pytest.fixture(scope="session")
def fork():
    """fork(function, *arguments) -> a process, forked from a fresh Python that has the imports.

    That one has computed no gradient yet. The process ends with this one at last.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([
        "torch._dynamo",                       # which the first optimiser imports
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "peft", "test_runs"])

    def start(function, *arguments):
        process = server.Process(target=function, args=arguments, daemon=True)
        process.start()
        return process
    return start


def cosine(t):
    """The variance-preserving level t in (0, 1): α_t, σ_t with α² + σ² = 1."""
    return math.cos(0.5 * math.pi * t), math.sin(0.5 * math.pi * t)


@st.composite
def mixtures(draw, max_dim=4, max_components=7):
    """A random mixture with the three classes 0 (y), 1 (φ) and 2 (anything else)."""
    D, K = draw(st.integers(1, max_dim)), draw(st.integers(3, max_components))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2 ** 31)))
    stds = 0.3 + torch.rand(K, D, generator=g)
    weights = 0.2 + torch.rand(K, generator=g)
    return GaussianMixture(2 * randn(K, D, generator=g), stds, weights, torch.arange(K) % 3)


def fixed_mixture():
    """One mixture in 3 dimensions with the same three classes, two modes each."""
    g = torch.Generator().manual_seed(0)
    return GaussianMixture(2 * randn(6, 3, generator=g), 0.3 + torch.rand(6, 3, generator=g),
                           0.2 + torch.rand(6, generator=g), torch.arange(6) % 3)


@pytest.fixture
def exact():
    return fixed_mixture()
