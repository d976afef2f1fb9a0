"""The one-step student, and what its claim compares."""
import pytest
import torch

import asd
from claims import student
from claims.student import Student, differences, distilled, kid, pictures
from prior import ddim_samples


@pytest.fixture(scope="module")
def prior():
    return asd.Prior.from_pretrained("tiny-sd")


def made(prior, seed=0):
    return Student(prior, ["a fox", "a rocket"], torch.Generator().manual_seed(seed), batch=2)


def noise_like(prior, n=2):
    return torch.randn(n, *prior.shape, generator=torch.Generator().manual_seed(5))


def test_begins_as_the_priors_one_step(prior):
    """… of DDIM without guidance: the same numbers, not nearly so."""
    noise = noise_like(prior)
    with torch.no_grad():
        x0 = made(prior).x0(noise, prior.encode_text(["a fox"] * 2))
    assert x0.equal(ddim_samples(prior, ["a fox"] * 2, noise, 1, 1.0))


@pytest.mark.parametrize("name", student.ROWS)
def test_the_prior_is_not_what_learns(name, prior):
    before = {key: value.clone() for key, value in prior.network.state_dict().items()}
    theta, row = made(prior), student.replace(student.ROWS[name], steps=2)
    start = [parameter.detach().clone() for parameter in theta.parameters()]
    phi = asd.make_phi(row, prior)
    asd.distill(prior, theta, theta.y, row, state=asd.State(theta, phi, row, theta.rng))
    assert all(value.equal(before[key]) for key, value in prior.network.state_dict().items())
    moved = [not a.equal(b) for a, b in zip(start, theta.parameters(), strict=True)]
    assert sum(moved) > 0.9 * len(moved)               # its attention to one token may stand still


def test_a_run_is_its_seed():
    run = lambda seed: distilled("asd", seed, steps=2, prompts=["a fox"], each=1)["pictures"]
    assert run(0).equal(run(0))


def test_every_step_has_fresh_noise_and_prompts(prior):
    theta = made(prior)
    x0, cond, camera = theta()
    again = theta()[0]
    assert camera is None and x0.shape == again.shape and not x0.equal(again)
    assert all(any(row.equal(y) for y in theta.y) for row in cond)


def test_rows_differ_in_phi_alone():
    """The same rates, steps, guidance and ω: the claim compares nothing else."""
    alike = {(row.lr, row.steps, row.lam, row.omega, row.t_min, row.t_max, row.t_late)
             for row in student.ROWS.values()}
    assert len(alike) == 1 and student.ROWS["vsd"] == student.replace(
        student.ROWS["asd"], gamma=0.0)


def test_held_noise_is_the_same_for_all(prior):
    seen = []
    for _ in range(2):
        pictures(prior, lambda noise, prompt: seen.append(noise) or noise, 3, ["a fox"], 2)
    assert seen[0].equal(seen[1])


def test_kid_is_small_of_the_alike_large_of_others(recwarn):
    """Of one crowd cut in two about 0, without bias; of other colours far more. And it is quiet."""
    rng = torch.Generator().manual_seed(0)
    crowd = lambda red: torch.randint(0, 256, (16, 3, 64, 64), generator=rng).mul(
        torch.tensor([red, 1.0, 1.0])[:, None, None]).byte()
    near, far = kid(crowd(1.0), crowd(1.0)), kid(crowd(1.0), crowd(0.2))
    assert abs(near) < 0.1 * far and not recwarn.list


def test_kid_by_hand():
    """E[k(a, a')] + E[k(b, b')] − 2 E[k(a, b)] over pairs of different pictures."""
    rng = torch.Generator().manual_seed(1)
    a, b = torch.randint(0, 256, (2, 5, 3, 64, 64), generator=rng, dtype=torch.uint8)
    b = b // 2
    f, g = student.Features()(a), student.Features()(b)
    k = lambda x, y: (x @ y.T + 1) ** 3
    other = ~torch.eye(5, dtype=torch.bool)
    by_hand = k(f, f)[other].mean() + k(g, g)[other].mean() - 2 * k(f, g).mean()
    assert kid(a, b) == pytest.approx(by_hand.item(), abs=1e-4)


def test_tests_are_positive_where_the_paper_is_right():
    """KID: the lower the better; score: the higher. In pairs of the same run and prompt."""
    both = lambda distance, score, runs=3: (
        torch.full((runs, 4), distance), torch.full((runs, 4), score))
    right = {"1 step": both(0.9, 0.2, 1), "sds": both(0.5, 0.5), "vsd": both(0.3, 0.6),
             "asd": both(0.1, 0.8)}
    tests = differences(right)
    assert len(tests) == 8 and {len(each) for each in tests.values()} == {12}
    assert all(value > 0 for each in tests.values() for value in each)
    wrong = right | {"asd": both(1.0, 0.1)}
    about_asd = {name for name, each in differences(wrong).items() if max(each) < 0}
    assert about_asd == {name for name in tests if "asd" in name}


def test_measures_and_figure(monkeypatch, tmp_path):
    """Of made-up results: colours stand for pictures. The alike are nearer than the others."""
    monkeypatch.setattr(student, "PROMPTS", ["a fox", "a rocket"])
    rng = torch.Generator().manual_seed(2)
    crowd = lambda most: torch.randint(0, most, (4, 3, 64, 64), generator=rng, dtype=torch.uint8)
    prior = {name: crowd(255) for name in ("50 steps", "reference", "4 steps")}
    results = {"prior": prior | {"1 step": crowd(40)}} | {
        (name, seed): {"pictures": crowd(255)} for name in student.ROWS for seed in student.SEEDS}
    tests = differences(student.measures(results))
    assert all(sum(tests[f"KID: 1 step − {name}"]) > 0 for name in student.ROWS)
    assert student.numbers(results).keys() == student.measures(results).keys()
    student.figure(tmp_path / "student.png", results)
    assert (tmp_path / "student.png").stat().st_size > 1000
