"""The claims' machinery: keys, runs that are kept, the rule, the tables; fifteen runs in one."""
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

import asd
import claims.__main__ as command
import editing
from claims import edits, pictures, solids, work
from cli.pictures import to_bytes
from phi import LoRAPhi
from prior import HERE

tiny = pytest.mark.skipif(not (HERE / "tiny/sd/unet").is_dir(), reason="tiny/sd is not here")


@pytest.fixture(scope="module")
def prior():
    return asd.Prior.from_pretrained("tiny-sd", "cpu")


# --------------------------------------------------------------------------------- rule and errors
def test_mean_and_error_by_hand():
    assert work.mean_and_error([1.0, 2, 3, 6]) == pytest.approx((3, (14 / 3) ** 0.5 / 2))
    assert work.mean_and_error([2.0]) == pytest.approx((2, float("nan")), nan_ok=True)


@given(st.lists(st.integers(-99, 99), min_size=2, max_size=30, unique=True))
def test_a_test_is_sure_where_its_interval_leaves_0_out(values):
    """… Student's 95 % one, of scipy; by turning the sign round the verdict turns."""
    result = work.tested(values)
    interval = ttest_1samp(values, 0).confidence_interval(0.95)
    assert result["sure"] == int(interval.low > 0) - int(interval.high < 0)
    assert work.tested([-x for x in values])["sure"] == -result["sure"]


def test_seeds_of_a_prompt_are_averaged_first():
    """Three seeds of two prompts, the prompts fastest: two numbers, not six."""
    result = work.tested([1.0, 10, 2, 20, 3, 30], clusters=2)
    assert (result["mean"], result["n"]) == (11, 2) and result["error"] == pytest.approx(9)
    assert work.tested([5.0])["sure"] == 0                     # of one alone nothing is sure


@pytest.mark.parametrize("sure, expected", [
    ({"a": 1, "b": 1}, "holds"), ({"a": 1, "b": 0}, "undecided"),
    ({"a": 1, "b": -1}, "does not hold here"), ({"a": -1, "control: c": 1}, "does not hold here"),
    ({"a": 1, "control: c": 0}, "undecided"), ({"a": -1, "control: c": -1}, "undecided"),
    ({"a": 1, "ours: d": -1}, "holds"), ({"a": 0, "ours: d": 1}, "undecided")])
def test_the_rule(sure, expected):
    assert work.verdict({name: {"sure": sign} for name, sign in sure.items()}) == expected


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


def test_a_key_follows_arguments_code_and_weights(jobs, monkeypatch):
    files = {jobs[0].file, replace(jobs[0], arguments={"value": 9}).file}
    for digest in ("module_digest", "shared_digest"):
        with monkeypatch.context() as patch:
            patch.setattr(work, digest, lambda *_: "another")
            files.add(jobs[0].file)
    assert len(files) == 4 and all(file.name.startswith("job-0-") for file in files)


def test_comments_and_layout_are_no_code(tmp_path):
    digests = []
    for text in ("x = 1\n", "# a comment\nx  =  1   # another\n\n", "x = 2\n"):
        (tmp_path / "a.py").write_text(text)
        digests.append(work.source_digest(tmp_path / "a.py"))
    assert digests[0] == digests[1] != digests[2]


# ------------------------------------------------------------------------------ fifteen runs in one
@tiny
def test_each_particle_has_a_lora_of_its_own(prior):
    """OwnLoRA at sample i is a LoRAPhi with its values, and so is its gradient."""
    own = pictures.OwnLoRA(prior, ["a", "b"], rank=2, seed=1)
    rng = torch.Generator().manual_seed(0)
    adapters = {name: layer for name, layer in own.network.named_modules()
                if isinstance(layer, pictures.OwnAdapters)}
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
    # twice as many samples: x^g, then x^r
    twice = own(x_t.repeat(2, 1, 1, 1), t.repeat(2), y.repeat(2, 1, 1), eps.repeat(2, 1, 1, 1))
    torch.testing.assert_close(twice, prediction.repeat(2, 1, 1, 1), rtol=1e-3, atol=1e-4)


@tiny
def test_a_run_starts_alike_whatever_the_method_and_leaves_the_prior(prior, monkeypatch):
    monkeypatch.setattr(asd.Prior, "from_pretrained", lambda *_: prior)
    before = {name: p.clone() for name, p in prior.network.state_dict().items()}
    sds, vsd = (pictures.distilled(name, ["a fox"] * 2, steps=2, lr=0.0)["late"]
                for name in ("sds", "vsd"))
    assert sds.shape[1:] == (2, 3, 64, 64) and sds.dtype == torch.uint8
    assert torch.equal(sds, vsd) and not torch.equal(sds[:, 0], sds[:, 1])
    assert all(torch.equal(p, before[name]) for name, p in prior.network.state_dict().items())


@tiny
def test_edits_are_kept_apart(prior, monkeypatch):
    """Several edits in one run: another picture in one place changes no other place."""
    monkeypatch.setattr(asd.Prior, "from_pretrained", lambda *_: prior)
    monkeypatch.setattr(edits, "ddim_samples", lambda _, prompts, noise: noise / 2)
    row = replace(editing.methods()["asd"], steps=2, lr=0.1)
    monkeypatch.setattr(editing, "methods", lambda: {"asd": row})
    late = []
    for concept in ("panda", "owl"):
        monkeypatch.setattr(edits, "CONCEPTS", ["fox", concept])
        late.append(edits.edited("simplification", "asd")["late"][-1].int())
    change = (late[0] - late[1]).abs().amax((1, 2, 3))
    assert change[0] <= 1 and change[1] > 20                          # the fox: rounding


# --------------------------------------------------------------------------- signs, on made-up runs
def painted(saturation, noise=0.0, seed=0):
    """uint8 [15, 3, 64, 64]: grey with red in it, and grain."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.full((15, 3, 64, 64), 0.5)
    images[:, 0] += saturation / 2
    return to_bytes(images + noise * torch.randn(images.shape, generator=rng))


def still(saturation, noise=0.0):
    return {"late": painted(saturation, noise)[None]}


def moving(noise):
    return {"late": torch.stack([painted(0.3, noise, seed) for seed in range(5)])}


@tiny
def test_the_signs_of_the_claims():
    """Runs that are as the paper says make every test that needs no judge positive."""
    r = {"samples": {"samples": torch.stack([painted(0.3, 0.1, i)[:4] for i in range(5)])},
         "sds@1": still(0.1, 0.01), "sds@7.5": still(0.2, 0.05), "sds@100": still(0.9, 0.05),
         "sds@10000": still(0.9, 0.05), "vsd@7.5": moving(0.1), "asd@7.5": moving(0.01),
         "vsd@1": moving(0.2), "asd@1": moving(0.02), "short vsd": still(0.3, 0.2),
         "short sds": still(0.3, 0.01), "short vsd†": still(0.3, 0.02)}
    tests = pictures.tests_1a(r) | pictures.tests_1b(r) | pictures.tests_4(r)
    for name, values in tests.items():
        assert "features" in name or "distance" in name or min(values) > 0, name


@tiny
def test_the_signs_of_gamma():
    r = {f"sds@{lam:g}": still(min(1.0, lam / 20)) for lam in pictures.LADDER}
    for gamma, name in pictures.GAMMAS.items():
        r[name] = still(min(1.0, pictures.lam_eff(gamma) / 20))
    r |= {"csd": still(1.0), "vsd@7.5": r["sds@7.5"]}
    assert pictures.nearest(r, -0.5) == [4.25] * 15 and pictures.lam_eff(-0.5) == 4.25
    order, classifier, predicted = pictures.tests_gamma(r).values()
    assert min(order) > 0.9 and min(classifier) > 0 and min(predicted) > 0
    r |= dict.fromkeys(pictures.GAMMAS.values(), r["sds@30"])       # all alike: nothing is ordered
    order, _, predicted = pictures.tests_gamma(r).values()
    assert max(order) == 0 and max(predicted) < 0


@tiny
def test_the_signs_in_3d():
    """Against the true solid's own pictures; a drift, and colours that clip."""
    results = {}
    for method, saturation, noise, iou in (("sds", 0.2, 0.0, 0.9), ("asd", 0.2, 0.01, 0.95),
                                           ("vsd", 0.2, 0.1, 0.9), ("csd", 1.0, 0.0, 0.9)):
        results[method, "a red mug", 0] = {
            "views": painted(saturation)[:8], "scores": torch.tensor([iou, 20 * iou]),
            "snapshots": moving(noise)["late"][:, :4]}
    tests = solids.tests_7(results) | solids.tests_5b(results) | solids.tests_table1(results)
    for name, values in tests.items():
        assert "score" in name or min(values) > 0, name
    assert solids.by_method(results)["vsd"]["drift in pixels"][0] > 0.01


# -------------------------------------------------------------------------------------- the command
@pytest.fixture
def folder(jobs, tmp_path, monkeypatch):
    """A repository with one claim, γ, of the jobs above, which holds; its figure is a text."""
    claim = work.Claim(
        "water is wet", "Fig. 0", dict(enumerate(jobs)),
        lambda results: {"it grows": [results[i]["value"].item() + 1 for i in range(4)]},
        lambda path, results: Path(path).write_text("a picture"),
        lambda results: {"row": {"x": (1.0, 0.5)}}, "none")
    monkeypatch.setattr(command, "CLAIMS", {"γ": claim})
    monkeypatch.setattr(command, "FOLDER", tmp_path / "figures")
    (tmp_path / "README.md").write_text("\n".join(["before", *command.MARKS, "after"]))
    return tmp_path / "figures"


def test_the_command_writes_its_tables_once(folder, capsys, monkeypatch):
    argv = ["--out", str(folder)]
    assert command.main(["gamma", "--part", "1/2", *argv]) == 0
    assert not folder.exists() and "not done yet" in capsys.readouterr().out
    assert command.main(["all", *argv]) == 0 and "holds" in capsys.readouterr().out
    record = command.read_records(folder)["γ"]
    assert record["verdict"] == "holds" and record["tests"]["it grows"] == {
        "mean": 2.5, "error": pytest.approx(0.6455, abs=1e-4), "n": 4, "sure": 1}
    page = (folder.parent / "README.md").read_text("utf-8")
    assert page.startswith("before") and page.endswith("after") and "**holds**" in page
    assert "1.000 ± 0.500" in (folder / "README.md").read_text("utf-8")
    files = [folder / "gamma.png", *work.KEPT.iterdir()]
    times = [file.stat().st_mtime_ns for file in files]
    assert command.main(["all", *argv]) == 0                       # a second call makes nothing
    assert [file.stat().st_mtime_ns for file in files] == times and len(CALLS) == 4
    assert "older code" not in capsys.readouterr().out
    monkeypatch.setattr(work, "module_digest", lambda name: "another")
    assert command.main(argv) == 0 and "holds (older code)" in capsys.readouterr().out


def test_the_list_runs_nothing(folder, capsys):
    assert command.main(["--out", str(folder)]) == 0
    assert "4 min" in capsys.readouterr().out and CALLS == [] and not folder.exists()


def test_the_tables_are_the_records():
    """README.md's and figures/README.md's, of this repository, from figures/claims.json."""
    records = command.read_records(command.FOLDER)
    page = (HERE / "README.md").read_text("utf-8")
    assert set(records) <= set(command.CLAIMS) and command.MARKS[0] in page
    assert page == command.with_table(page, records)
    assert (HERE / "figures/README.md").read_text("utf-8") == command.long_table(records)
    for name, record in records.items():
        assert record["verdict"] == work.verdict(record["tests"])
        assert (HERE / f"figures/{command.file_name(name)}.png").exists()
