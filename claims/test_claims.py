"""The claims' machinery: the rule, runs that are kept, measures, signs, the tables; many in one."""
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

import asd
import claims.__main__ as command
import editing
import text_to_3d
from claims import (
    edits,
    law,
    measures,
    pictures,
    runs,
    solids,
    student,
    tuning,
    work,
)
from phi import LoRAPhi
from prior import HERE

tiny = pytest.mark.skipif(not (HERE / "tiny/sd/unet").is_dir(), reason="tiny/sd is not here")
numbers = st.lists(st.floats(-9, 9, width=16), min_size=3, max_size=30, unique=True)


@pytest.fixture(scope="module")
def prior():
    return asd.Prior.from_pretrained("tiny-sd", "cpu")


# --------------------------------------------------------------------------------------- the rule
@given(numbers, st.floats(0.01, 5))
def test_the_verdict_is_read_off_the_interval(values, delta):
    interval = ttest_1samp(values, 0).confidence_interval(0.95)
    expected = "undecided"
    if interval.low > 0:
        expected = "holds"
    elif interval.high < 0:
        expected = "the other way round"
    elif max(-interval.low, interval.high) < delta:
        expected = "no difference"
    assert work.verdict(values, delta) == expected


@pytest.mark.parametrize("values, delta, expected", [
    ([1.0, 1.2, 0.9], 0.1, "holds"), ([-1.0, -1.2, -0.9], 9, "the other way round"),
    ([0.01, -0.01, 0.0], 0.1, "no difference"), ([1.0, -1.0, 0.0], 0.1, "undecided"),
    ([0.0, 0.0, 0.0], 0.1, "no difference"), ([0.2, 0.2, 0.2], 0.1, "holds")])
def test_the_rule_by_hand(values, delta, expected):
    assert work.verdict(values, delta) == expected


@pytest.mark.parametrize("values, expected", [
    ([0.2, 0.21, 0.2], "the other way round"), ([-0.2, -0.21, -0.2], "the other way round"),
    ([0.01, 0.02, 0.01], "holds"), ([-0.01, 0.01, 0.0], "holds"), ([0.1, 0.12, 0.08], "undecided")])
def test_the_rule_of_two_things_that_are_equal(values, expected):
    assert work.verdict(values, 0.1, equality=True) == expected


# ------------------------------------------------------------------------------ jobs that are kept
CALLS = []


def counted(value):
    CALLS.append(value)
    return {"value": torch.tensor([value])}


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "KEPT", tmp_path / "kept")
    CALLS.clear()
    return [work.Job(f"job-{i}", counted, {"value": i}, 1.0) for i in range(4)]


def test_parts_make_all_and_nothing_twice(jobs):
    threads = torch.get_num_threads()
    assert not work.make(jobs, "1/2") and CALLS == [0, 2]
    assert work.make(jobs, "2/2") and CALLS == [0, 2, 1, 3]
    assert work.make(jobs) and CALLS == [0, 2, 1, 3] and torch.get_num_threads() == threads
    assert [job.result()["value"].item() for job in jobs] == [0, 1, 2, 3]
    jobs[1].file.unlink()
    with pytest.raises(work.UserError, match="run the claim first"):
        jobs[1].result()


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/2/3", ""])
def test_what_is_no_part(jobs, part):
    with pytest.raises(work.UserError, match="is no part"):
        work.make(jobs, part)


def test_a_key_follows_arguments_and_the_contents_of_files(jobs, tmp_path, monkeypatch):
    files = {jobs[0].file, replace(jobs[0], arguments={"value": 9}).file}
    monkeypatch.setattr(work, "HERE", tmp_path)
    for text in ("x = 1", "x = 2"):
        (tmp_path / "asd.py").write_text(text)
        work.code_key.cache_clear()
        files.add(jobs[0].file)
    work.code_key.cache_clear()
    assert len(files) == 4 and all(file.name.startswith("job-0-") for file in files)


def test_every_source_of_a_job_is_a_file():
    """A pattern that names nothing would let the code change unnoticed."""
    for claim in command.CLAIMS.values():
        for job in claim.jobs.values():
            for pattern in job.sources:
                assert any(HERE.glob(pattern)), pattern


# ------------------------------------------------------------------------------ prompts, measures
def test_prompts_are_drawn_once_and_apart():
    prompts = measures.PROMPTS
    assert prompts == measures.drawn_prompts()
    assert {use: len(some) for use, some in prompts.items()} == {
        "test": 40, "tuning": 10, "control": 10, "solids": 20}
    things = [prompt for use in ("test", "tuning", "control") for prompt in prompts[use]]
    assert len(set(things)) == 60 and len(set(prompts["solids"])) == 20
    for thing in measures.SEEN:
        assert not any(prompt.split(",")[0].endswith(f" a {thing}") for prompt in things)


@tiny
def test_every_prompt_is_of_words_the_model_knows(prior):
    for prompts in measures.PROMPTS.values():
        assert not any(prior.unknown_words(prompt) for prompt in prompts)


def test_measures_of_plain_pictures():
    """A grey square has none of them; too bright by 0.2 is over-saturated by 0.2."""
    grey = torch.full((1, 3, 64, 64), 0.5)
    assert max(value.item() for value in measures.measure(grey).values()) < 0.01
    bright = measures.measure(grey + 0.7)
    assert bright["over-saturation"].item() == pytest.approx(0.2, abs=1e-6)
    rng = torch.Generator().manual_seed(0)
    edge = grey.clone()
    edge[..., 32:] = 0.9
    noisy = edge + 0.05 * torch.randn(edge.shape, generator=rng)
    plain, blurred, grainy = (measures.measure(x) for x in (edge, measures.blurred(edge, 2), noisy))
    assert plain["acutance"] > blurred["acutance"] and grainy["grain"] > plain["grain"] + 0.5


@given(st.integers(0, 2 ** 31))
def test_energy_distance_by_hand(seed):
    rng = torch.Generator().manual_seed(seed)
    seen, reference = torch.randn(2, 3, generator=rng), torch.randn(2, 5, 3, generator=rng)
    for i, found in enumerate(measures.energy_distance(seen, reference)):
        near = sum((seen[i] - s).norm() for s in reference[i]) / 5
        pairs = sum((a - b).norm() for a in reference[i] for b in reference[i]) / 20
        assert found.item() == pytest.approx((2 * near - pairs).item(), abs=1e-4)


@pytest.mark.parametrize("name", measures.MUST_MOVE)
def test_each_measure_moves_as_it_must_on_its_controls(name):
    """Those that are kept: no measure is blind, nor moved by what it is not about."""
    found = measures.control_differences(measures.CONTROLS.result(), name)
    for control, differences in found.items():
        assert work.interval(differences)[1] > 0, control


def test_the_controls_of_all_claims_moved_as_they_must():
    """What is written in figures/claims.json: no claim stands on a measure that is blind."""
    for record in command.read_records(command.FOLDER).values():
        for name, (_, low, _) in record["controls"].items():
            assert low > 0 or name.startswith("score, truth"), name


# --------------------------------------------------------------------------------- many runs in one
@tiny
def test_each_particle_has_a_lora_of_its_own(prior):
    """OwnLoRA at sample i is a LoRAPhi with its values, and so is its gradient."""
    own = runs.OwnLoRA(prior, ["a", "b"], rank=2, seed=1)
    rng = torch.Generator().manual_seed(0)
    adapters = {name: layer for name, layer in own.network.named_modules()
                if isinstance(layer, runs.OwnAdapters)}
    for layer in adapters.values():
        layer.up.data = torch.randn(layer.up.shape, generator=rng) / 10
    assert own.network is not prior.network and len(adapters) > 8
    x_t, eps = torch.randn(2, 2, *prior.shape, generator=rng)
    t, y = torch.tensor([300, 700]), prior.encode_text(["a fox", "a red apple"])
    prediction = own(x_t, t, y, eps)
    prediction.square().sum().backward()
    for i in range(2):
        alone = LoRAPhi(prior, rank=2)
        for name, layer in adapters.items():
            peft = alone.network.get_submodule(name)
            peft.lora_A["default"].weight.data = layer.down.data[i].clone()
            peft.lora_B["default"].weight.data = layer.up.data[i].clone()
        expected = alone(x_t[[i]], t[[i]], y[[i]], eps[[i]])
        torch.testing.assert_close(prediction[[i]], expected, rtol=1e-3, atol=1e-4)
        expected.square().sum().backward()
        for name, layer in adapters.items():
            weight = alone.network.get_submodule(name).lora_B["default"].weight
            torch.testing.assert_close(layer.up.grad[i], weight.grad, rtol=1e-2, atol=1e-2)


@tiny
def test_runs_start_alike_and_log_the_share_of_each_prompt(prior, monkeypatch):
    """… whatever the method; φ at its start is ε_y: κ is 0, of each picture."""
    monkeypatch.setattr(asd.Prior, "from_pretrained", lambda *_: prior)
    settings = {"prompts": ["a fox", "an owl"], "steps": 2, "lr": 0.0, "late": (0.5, 1.0)}
    sds, vsd = (runs.distilled(name, phi_lr=0.0, **settings) for name in ("sds", "vsd"))
    assert torch.equal(sds["x0"], vsd["x0"]) and sds["late"].shape == (2, 2, 4, 16, 16)
    assert "kappa" not in sds and vsd["kappa"].shape == (2,) and vsd["kappa"].abs().max() < 1e-4
    learnt = runs.distilled("vsd", phi_lr=1e-2, **settings | {"steps": 8})
    assert learnt["kappa"].min() > 0.01


@tiny
def test_edits_are_kept_apart(prior, monkeypatch):
    """Several edits in one run: another target in one place changes no other place."""
    monkeypatch.setattr(asd.Prior, "from_pretrained", lambda *_: prior)
    monkeypatch.setattr(runs, "ddim_samples", lambda _, prompts, noise: noise / 2)
    row = replace(editing.methods()["asd"], steps=2, lr=0.1)
    monkeypatch.setattr(editing, "methods", lambda: {"asd": row})
    a, b = (runs.edited("asd", ["a fox"] * 2, ["a flat icon of a fox", target])["after"]
            for target in ("a panda", "an owl"))
    change = (a - b).abs().amax((1, 2, 3))
    assert change[0] < 1e-3 and change[1] > 0.05


@tiny
def test_a_student_begins_as_the_priors_one_step(prior, monkeypatch):
    """x̂0 of its ε, told STUDENT_T; what learns is a copy."""
    monkeypatch.setattr(asd.Prior, "from_pretrained", lambda *_: prior)
    before = {key: value.clone() for key, value in prior.network.state_dict().items()}
    start = runs.student(None, ["a fox"], 1)["x0"][0]
    noise = torch.randn(1, *prior.shape, generator=torch.Generator().manual_seed(1000))
    t = torch.tensor([runs.STUDENT_T])
    alpha_t, sigma_t = prior.alpha_sigma(t)
    expected = (noise - sigma_t * prior.eps(noise, t, prior.encode_text(["a fox"]))) / alpha_t
    torch.testing.assert_close(start, expected)
    learnt = runs.student("asd", ["a fox"], 1, batch=2, steps=1, lr=1e-3)["x0"][0]
    assert not torch.equal(learnt, start)
    assert all(torch.equal(x, before[key]) for key, x in prior.network.state_dict().items())


# ------------------------------------------------------------------------ signs, on made-up results
def looks_like(guidance):
    """What is measured in SDS's pictures at a guidance [N], made up."""
    return {"grain": guidance ** 0.4, "distance": 0.05 * guidance ** 0.3}


def runs_for_the_law(power=1):
    """Results of three prompts whose runs look exactly like SDS at λ' of their κ, or a power of it.
    """
    r, kappa = {}, torch.tensor([0.4, 0.5, 0.6])
    for lam in law.LADDER:
        r["ladder", lam] = looks_like(torch.full((3,), lam).double())
    for gamma, lam in law.GRID:
        guidance = 1 + (1 + gamma) * (lam - 1) / kappa.double()
        r["law", gamma, lam] = looks_like(guidance ** power) | {"kappa": kappa}
    return r


def test_the_law_finds_the_guidance_it_is_given():
    """Runs that look exactly like SDS at λ' of their κ have slope 1; at λ'², slope 2."""
    assert law.slopes(runs_for_the_law()) == pytest.approx([0.0] * 3, abs=0.02)
    r = runs_for_the_law(power=2)
    assert min(law.slopes(r)) > 0.3                            # the ladder ends at 10⁴
    assert law.numbers(r)["γ 0, λ 4"]["κ"].tolist() == pytest.approx([0.4, 0.5, 0.6])


def test_the_laws_table_has_the_slopes_of_some_runs_and_what_gamma_does():
    r = runs_for_the_law()
    for lam in (7.5, 15.0):                                    # none of the parts has these two
        r["law", 10.0, lam] |= looks_like(torch.ones(3).double())
    found = law.numbers(r)
    parts = [row["slope − 1"] for row in found.values() if "slope − 1" in row]
    assert parts == [pytest.approx([0.0] * 3, abs=0.02)] * 5
    ranges = [math.log((1 + (1 + gamma) * 14 / 0.5) / (1 + (1 + gamma) / 0.5))
              for gamma in (0, -0.5)]                          # κ of the second prompt: 0.5
    differences = found["γ 0 minus γ -0.5"]["log-range of the distance over λ"]
    assert differences[1].item() == pytest.approx(0.3 * (ranges[0] - ranges[1]))
    assert found["γ 0 minus γ -0.5"]["distance at λ 7.5"].min() > 0


@tiny
def test_of_a_run_for_the_law_three_numbers_are_kept(prior, monkeypatch):
    monkeypatch.setattr(asd.Prior, "from_pretrained", lambda *_: prior)
    reference = {name: x[:2] for name, x in measures.SAMPLE_JOBS["test"].result().items()}
    monkeypatch.setitem(measures.PROMPTS, "test", ["a fox", "an owl"])
    monkeypatch.setattr(work.Job, "result", lambda job: reference)
    found = runs.looks("vsd", steps=2, gamma=0.0)
    x0 = runs.distilled("vsd", ["a fox", "an owl"], steps=2, gamma=0.0)["x0"]
    assert {name: x.shape for name, x in found.items()} == dict.fromkeys(
        ("grain", "distance", "kappa"), (2,))
    assert torch.equal(found["distance"], measures.measured(x0, reference)["distance"])


def test_of_a_solid_its_scores_and_the_second_view_are_kept(monkeypatch):
    views = torch.arange(8.0).reshape(8, 1, 1, 1).expand(8, 3, 2, 2) / 10
    monkeypatch.setattr(runs, "solid", lambda method, prompt, **changes: {
        "views": views, "psnr": torch.tensor(20.0 + changes["perp_neg"])})
    found = runs.side("asd", "a red mug", perp_neg=True)
    assert found.keys() == {"view", "psnr"} and found["psnr"] == 21
    assert found["view"].dtype == torch.uint8 and found["view"].unique().tolist() == [26]


@tiny
def test_sides_are_told_right_where_the_solid_is_true_and_not_where_it_has_two_fronts(monkeypatch):
    true = text_to_3d.eight_views("a gray duck").over(1.0).movedim(-1, 1)
    two_faced = true.clone()
    two_faced[4] = true[0]
    sideways = true[[2, 3, 4, 5, 6, 7, 0, 1]]
    for views, expected in ((true, [1, 1, 1, 1]), (two_faced, [1, 1, 0, 1]), (sideways, [0] * 4)):
        monkeypatch.setattr(runs, "solid", lambda *_, views=views: {"views": views})
        assert runs.named("asd", "a gray duck")["right"].tolist() == expected


@tiny
def test_who_wanders_and_who_goes_straight(prior):
    straight = torch.linspace(0, 1, 15)[:, None, None, None, None] * torch.ones(15, 1, 4, 16, 16)
    rng = torch.Generator().manual_seed(0)
    astray = straight + 0.5 * torch.randn(straight.shape, generator=rng)
    r = {("path", "asd"): {"late": straight}, ("path", "vsd"): {"late": astray}}
    found = pictures.CLAIMS["1b"].values(r).item()
    parts = {name: x.item() for name, x in pictures.path_numbers(r)["VSD − ASD"].items()}
    assert found > 0.5 and parts["log path"] > 0.5
    assert found == pytest.approx(parts["log path"] - parts["log net change"])


def test_psnr_at_equal_score_by_hand(monkeypatch):
    """ASD reaches score 0.6 at 30 dB, DDS at 25; DDS alone goes further."""
    scores = {"asd": [0.2, 0.4, 0.6, 0.5, 0.6], "dds": [0.2, 0.4, 0.8, 0.9, 0.9]}
    kept = {"asd": [40.0, 35, 30, 28, 20], "dds": [40.0, 30, 20, 10, 5]}
    monkeypatch.setattr(edits, "curves", lambda r, method: (
        torch.tensor([scores[method]]), torch.tensor([kept[method]])))
    assert edits.at_equal_score({}, "asd", "dds") == pytest.approx([5.0])


def test_signs_of_the_other_outcomes(monkeypatch):
    """Better by 1 in the paper's direction is +1."""
    monkeypatch.setattr(pictures, "measured", lambda x0, _: {
        name: x0 for name in ("distance", "over-saturation", "acutance")})
    r = {key: {"x0": torch.tensor([2.0, 3.0])} for key in pictures.JOBS}
    r["asd", 7.5] = {"x0": torch.tensor([1.0, 2.0])}
    r["samples"] = {"over-saturation": torch.tensor([2.0, 3.0]) / torch.e}
    for name in ("6, SDS", "6, VSD", "5a", "§7"):
        assert pictures.CLAIMS[name].values(r).tolist() == pytest.approx([1.0, 1.0]), name
    monkeypatch.setattr(student, "kids", lambda r, name: torch.tensor(0.1 if name == "asd" else 1))
    assert all(claim.values({}).item() == pytest.approx(0.9) for claim in student.CLAIMS.values())
    monkeypatch.setattr(solids, "SOLIDS", ["a red mug"])
    r = {(method, "a red mug"): {"psnr": torch.tensor(20.0 + (method == "asd"))}
         for method in solids.METHODS}
    signs = {name: claim.values(r).item() for name, claim in solids.CLAIMS.items()}
    assert signs == {"T1, SDS": 1.0, "T1, VSD": 1.0, "5b": 1.0, "Perp-Neg": -1.0}


def test_kid_by_hand():
    """E[k(a, a')] + E[k(b, b')] − 2 E[k(a, b)] over pairs of different pictures."""
    rng = torch.Generator().manual_seed(1)
    a, b = torch.nn.functional.normalize(torch.randn(2, 5, 8, generator=rng), dim=2)
    k = lambda x, y: (x @ y.T + 1) ** 3
    different = ~torch.eye(5, dtype=torch.bool)
    by_hand = k(a, a)[different].mean() + k(b, b)[different].mean() - 2 * k(a, b).mean()
    assert student.kid(a, b) == pytest.approx(by_hand.item(), abs=1e-4)


def test_nine_settings_pair_all_values():
    rows = [tuple(row.values()) for row in tuning.settings("asd")]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert len({(row[i], row[j]) for row in rows}) == 9


def test_tuning_takes_the_nearest_setting_the_fewest_steps_and_the_nearest_guidance(
        tmp_path, monkeypatch):
    """And a second call, as after a kill, runs only what tuned.json does not have yet."""
    made = []

    def pictures(method, prompts, steps, lr, lr_end, lam=7.5):
        made.append((steps, lr, lr_end, lam))
        far = abs(lr - 0.02) * 50 + abs(lr_end - 0.3) + abs(lam - 15) / 100
        return {"x0": torch.tensor([far + {350: 0, 250: 0.01, 175: 0.04, 120: 0.06}.get(steps, 1)])}
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps({"sds": {"tried": {}}, "vsd": "kept"}))
    monkeypatch.setattr(tuning, "FILE", file)
    monkeypatch.setattr(tuning, "SAMPLE_JOBS", {"tuning": SimpleNamespace(
        result=lambda: {"features": None})})
    monkeypatch.setattr(runs, "distilled", pictures)
    monkeypatch.setattr(asd.Prior, "from_pretrained", lambda name: None)
    for name, function in (("decoded", lambda prior, x0: x0), ("features", lambda x0: x0),
                           ("energy_distance", lambda x0, reference: x0)):
        monkeypatch.setattr(tuning, name, function)
    tuning.tune_method("sds")
    table = json.loads(file.read_text())
    assert table["sds"]["settings"] == {"lr": 0.02, "lr_end": 0.3, "steps": 175}
    assert table["sds"]["lam"] == 15 and table["sds"]["done"] and table["vsd"] == "kept"
    assert len(made) == len(table["sds"]["tried"]) == 9 + 5 + 5
    del table["sds"]["tried"]["lr 0.01, lr_end 1, steps 350"]
    file.write_text(json.dumps(table))
    tuning.tune_method("sds")
    assert json.loads(file.read_text())["sds"]["lam"] == 15 and len(made) == 20


# -------------------------------------------------------------------------------------- the command
@pytest.fixture
def folder(jobs, tmp_path, monkeypatch):
    """A repository with one claim, λ, of the jobs above, which holds; its figure is a text."""
    claim = work.Claim(
        "water is wet", "Fig. 0", dict(enumerate(jobs)), "wetness", "drops", 0.5,
        lambda results: [results[i]["value"].item() + 1 for i in range(4)],
        lambda path, results: Path(path).write_text("a picture"),
        controls=lambda results: {"dry": torch.tensor([1.0, 1.5])},
        numbers=lambda results: {"row": {"x": 1.0}})
    monkeypatch.setattr(command, "CLAIMS", {"λ": claim})
    monkeypatch.setattr(command, "FOLDER", tmp_path / "figures")
    (tmp_path / "README.md").write_text("\n".join(["before", *command.MARKS, "after"]))
    return tmp_path / "figures"


def test_the_command_writes_its_tables_once(folder, capsys, monkeypatch):
    argv = ["--out", str(folder)]
    assert command.main(["lambda", "--part", "1/2", *argv]) == 0
    assert not folder.exists() and "not done yet" in capsys.readouterr().out
    assert command.main(["all", *argv]) == 0 and "holds" in capsys.readouterr().out
    record = command.read_records(folder)["λ"]
    assert record["verdict"] == "holds" and record["primary"] == {
        "name": "wetness", "unit": "drops", "delta": 0.5, "values": [1, 2, 3, 4]}
    page = (folder.parent / "README.md").read_text("utf-8")
    assert page.startswith("before") and page.endswith("after") and "**holds**" in page
    assert "+2.5 [+0.446, +4.55] drops" in page
    assert (folder / "lambda.png").exists() and "dry" in (folder / "README.md").read_text("utf-8")
    assert command.main(["all", *argv]) == 0 and len(CALLS) == 4   # a second call runs nothing
    assert "older code" not in capsys.readouterr().out
    monkeypatch.setattr(work, "code_key", lambda *_: "another")
    assert command.main(argv) == 0 and "holds (older code)" in capsys.readouterr().out


@pytest.mark.parametrize("values, delta, expected", [
    ([0.2, 0.21, 0.2], 0.1, "**holds**"),
    ([0.2, 0.21, 0.2], 0.3, "**holds**, perhaps by less than δ"),
    ([-0.2, -0.21, -0.2], 0.3, "**the other way round**, perhaps by less than δ"),
    ([-0.1, 0.1, 0.0], 9, "**no difference**")])
def test_a_verdict_says_where_the_difference_may_not_matter(values, delta, expected):
    record = {"verdict": work.verdict(values, delta), "equality": False,
              "primary": {"values": values, "delta": delta}}
    assert command.verdict_of(record) == expected


def test_the_list_runs_nothing(folder, capsys):
    assert command.main(["--out", str(folder)]) == 0
    assert "4 min" in capsys.readouterr().out and CALLS == [] and not folder.exists()


@pytest.mark.parametrize("content", [
    b"", b"{}", b"[]", b"\xff", b'{"claims": []}', b'{"claims": {"\xce\xbb": {}}}',
    b'{"claims": {"\xce\xbb": 3}}', 9999 * b"["], ids=lambda content: ascii(content)[:20])
def test_damaged_records_are_one_line(folder, capsys, content):
    folder.mkdir()
    (folder / "claims.json").write_bytes(content)
    assert command.main(["--out", str(folder)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "claims.json is not" in err


def test_the_tables_are_the_records():
    """README.md's and figures/README.md's, of this repository, from figures/claims.json."""
    records = command.read_records(command.FOLDER)
    page = (HERE / "README.md").read_text("utf-8")
    assert set(records) <= set(command.CLAIMS) and command.MARKS[0] in page
    assert page == command.with_table(page, records)
    assert (HERE / "figures/README.md").read_text("utf-8") == command.long_table(records)
    text = json.loads((HERE / "figures/claims.json").read_text("utf-8"))
    assert text["rule"] == work.RULE
    for record in records.values():
        primary = record["primary"]
        assert record["verdict"] == work.verdict(primary["values"], primary["delta"],
                                                 record["equality"])
