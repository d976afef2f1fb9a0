"""The one-step student, and what its claim compares."""
import pytest
import torch

import asd
from claims import student
from claims.student import Student, differences, distilled, kid
from prior import ddim_samples


@pytest.fixture(scope="module")
def prior():
    return asd.Prior.from_pretrained("tiny-sd")


def make_student(prior):
    return Student(prior, ["a fox", "a rocket"], torch.Generator().manual_seed(0), batch=2)


def test_begins_as_the_priors_one_step(prior):
    """… of DDIM without guidance: the same numbers, not nearly so."""
    noise = torch.randn(2, *prior.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        x0 = make_student(prior).x0(noise, prior.encode_text(["a fox"] * 2))
    assert x0.equal(ddim_samples(prior, ["a fox"] * 2, noise, 1, 1.0))


@pytest.mark.parametrize("name", ["sds", "asd"])
def test_the_prior_is_not_what_learns(name, prior):
    before = {key: value.clone() for key, value in prior.network.state_dict().items()}
    theta, row = make_student(prior), student.replace(student.ROWS[name], steps=1)
    start = [parameter.detach().clone() for parameter in theta.parameters()]
    asd.distill(prior, theta, theta.y, row)
    assert all(value.equal(before[key]) for key, value in prior.network.state_dict().items())
    moved = [not a.equal(b) for a, b in zip(start, theta.parameters(), strict=True)]
    assert sum(moved) > 0.9 * len(moved)               # its attention to one token may stand still


def test_a_run_is_its_seed(prior, monkeypatch):
    monkeypatch.setattr(asd.Prior, "from_pretrained", lambda *_: prior)
    monkeypatch.setattr(student, "BATCH", 2)
    runs = [distilled("asd", 0, 1, ["a fox"], 1)["pictures"] for _ in range(2)]
    assert runs[0].equal(runs[1])


def test_every_step_has_fresh_noise_and_prompts(prior):
    theta = make_student(prior)
    samples, others = theta(), theta()
    assert samples.x0.shape == others.x0.shape and not samples.x0.equal(others.x0)
    assert all(any(cond.equal(y) for y in theta.y) for cond in samples.cond)


def test_rows_differ_in_phi_alone():
    """The same rates, steps, guidance and ω: the claim compares nothing else."""
    settings = [vars(row) | {"phi": None, "gamma": None} for row in student.ROWS.values()]
    assert settings[0] == settings[1] == settings[2]
    assert student.ROWS["vsd"].phi == student.ROWS["asd"].phi


def test_kid_by_hand(recwarn):
    """E[k(a, a')] + E[k(b, b')] − 2 E[k(a, b)] over pairs of different pictures; it is quiet."""
    rng = torch.Generator().manual_seed(1)
    a, b = torch.randint(0, 256, (2, 5, 3, 64, 64), generator=rng, dtype=torch.uint8)
    b = b // 2
    f, g = student.Features()(a), student.Features()(b)
    k = lambda x, y: (x @ y.T + 1) ** 3
    different = ~torch.eye(5, dtype=torch.bool)
    by_hand = k(f, f)[different].mean() + k(g, g)[different].mean() - 2 * k(f, g).mean()
    assert kid(a, b) == pytest.approx(by_hand.item(), abs=1e-4) and not recwarn.list


def test_tests_are_positive_where_the_paper_is_right():
    """KID: the lower the better; score: the higher. In pairs of the same run and prompt."""
    both = lambda distance, score, runs=3: (
        torch.full((runs, 4), distance), torch.full((runs, 4), score))
    right = {"1 step": both(0.9, 0.2, 1), "sds": both(0.5, 0.5), "vsd": both(0.3, 0.6),
             "asd": both(0.1, 0.8)}
    tests = differences(right)
    assert len(tests) == 8 and all(len(values) == 12 for values in tests.values())
    assert all(min(values) > 0 for values in tests.values())
    wrong = differences(right | {"asd": both(1.0, 0.1)})
    assert {name for name in wrong if max(wrong[name]) < 0} == {
        name for name in tests if "asd" in name}


def test_measures_and_figure(monkeypatch, tmp_path):
    """Of made-up results: colours stand for pictures. The alike are nearer than the others."""
    monkeypatch.setattr(student, "PROMPTS", ["a fox", "a rocket"])
    rng = torch.Generator().manual_seed(2)
    crowd = lambda most: torch.randint(0, most, (4, 3, 64, 64), generator=rng, dtype=torch.uint8)
    results = {"prior": {"1 step": crowd(40)}}
    results["prior"] |= {name: crowd(255) for name in ("50 steps", "reference", "4 steps")}
    for key in student.JOBS.keys() - {"prior"}:
        results[key] = {"pictures": crowd(255)}
    tests = differences(student.measures(results))
    assert all(sum(tests[f"KID: 1 step − {name}"]) > 0 for name in student.ROWS)
    assert student.numbers(results).keys() == {*student.SAMPLERS, *student.ROWS}
    student.figure(tmp_path / "student.png", results)
    assert (tmp_path / "student.png").stat().st_size > 1000
