"""The claims' machinery: keys, runs that are kept, the rule, the tables; fifteen runs in one."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import asd
import reproduce
from claims import edits, pictures, solids, work
from phi import LoRAPhi
from prior import HERE

tiny = pytest.mark.skipif(not (HERE / "tiny/sd/unet").is_dir(), reason="tiny/sd is not here")


@pytest.fixture(scope="module")
def prior():
    return asd.Prior.from_pretrained("tiny-sd", "cpu")


# --------------------------------------------------------------------------------- rule and errors
def test_mean_and_error_by_hand():
    assert work.mean_and_error([1.0, 2, 3, 6]) == pytest.approx((3, (14 / 3) ** 0.5 / 2))
    mean, error = work.mean_and_error([2.0])
    assert mean == 2 and error != error                       # of one alone nothing is known


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=30))
def test_a_test_is_sure_where_its_interval_leaves_0_out(values):
    """… Student's 95 % one, of scipy; by turning the sign round the verdict turns."""
    from scipy.stats import t
    found = work.tested(values)
    mean, error = work.mean_and_error(values)
    low, high = (mean + sign * t.ppf(0.975, len(values) - 1) * error for sign in (-1, 1))
    assert found["sure"] == int(low > 0) - int(high < 0) and found["n"] == len(values)
    assert work.tested([-x for x in values])["sure"] == -found["sure"]


def test_seeds_of_a_prompt_are_averaged_first():
    """Three seeds of two prompts, the prompts fastest: two numbers, not six."""
    found = work.tested([1.0, 10, 2, 20, 3, 30], clusters=2)
    assert (found["mean"], found["n"]) == (11, 2) and found["error"] == pytest.approx(9)
    assert work.tested([5.0])["sure"] == 0                     # of one alone nothing is sure


@pytest.mark.parametrize("sure, said", [
    ({"a": 1, "b": 1}, "holds"), ({"a": 1, "b": 0}, "undecided"), ({"a": 1, "b": -1},
                                                                   "does not hold here"),
    ({"a": -1, "control: c": 1}, "does not hold here"), ({"a": 1, "control: c": 0}, "undecided"),
    ({"a": -1, "control: c": -1}, "undecided"), ({"a": 1, "ours: d": -1}, "holds"),
    ({"a": 0, "ours: d": 1}, "undecided")])
def test_the_rule(sure, said):
    assert work.verdict({name: {"sure": sign} for name, sign in sure.items()}) == said


# ------------------------------------------------------------------------------ jobs that are kept
CALLS = []


def counted(value):
    CALLS.append(value)
    return {"value": torch.tensor([value])}


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "KEPT", tmp_path / "kept")
    CALLS.clear()
    return [work.Job(f"job-{i}", counted, {"value": i}, 1.0) for i in range(4)]


def test_parts_make_all_and_nothing_twice(kept):
    threads = torch.get_num_threads()
    assert not work.make(kept, "1/2") and CALLS == [0, 2]
    assert work.make(kept, "2/2") and CALLS == [0, 2, 1, 3]
    assert work.make(kept) and CALLS == [0, 2, 1, 3] and torch.get_num_threads() == threads
    assert [job.result()["value"].item() for job in kept] == [0, 1, 2, 3]
    kept[1].file.unlink()
    with pytest.raises(work.UserError, match="run the claim first"):
        kept[1].result()


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/2/3", ""])
def test_what_is_no_part(kept, part):
    with pytest.raises(work.UserError, match="is no part"):
        work.make(kept, part)


def test_a_key_holds_weights_arguments_and_code(kept, monkeypatch):
    first, other = kept[0].file, replace(kept[0], arguments={"value": 9}).file
    assert first.name.startswith("job-0-") and first.stem[-8:] != other.stem[-8:]
    monkeypatch.setattr(work, "weights", lambda: "others")
    assert kept[0].file != first


def test_older_runs_stand_where_one_of_their_kind_ends_in_the_same_bits(kept, monkeypatch):
    work.make(kept)
    monkeypatch.setattr(work, "code_of", lambda module, name: "newer")
    assert not any(job.file.exists() for job in kept)
    assert work.vouch(kept) == 4 and CALLS == [0, 1, 2, 3] * 2       # each is a kind of its own
    assert [job.result()["value"].item() for job in kept] == [0, 1, 2, 3]
    monkeypatch.setattr(work, "code_of", lambda module, name: "newest")
    other = [replace(job, function=lambda value: {"value": torch.tensor([value + 1])})
             for job in kept]                                           # it does another thing
    assert work.vouch(other) == 0 and not any(job.file.exists() for job in other)
    monkeypatch.setattr(work, "weights", lambda: "others")
    assert work.vouch(kept) == 0 and CALLS == [0, 1, 2, 3] * 2          # nothing to go by


def fresh(function):
    """The same without what it remembers."""
    function.cache_clear()
    return function


def test_a_key_follows_the_code_it_can_reach(tmp_path, monkeypatch):
    """… over modules and aliases, and neither comments, docstrings nor what it cannot reach."""
    (tmp_path / "claims").mkdir()
    text = {"low.py": 'def deep():\n    """Says."""\n    return 1\ndef aside():\n    return 2\n',
            "claims/high.py": "import low as l\nfrom low import deep as d\n"
                              "def through():\n    return l.deep()\ndef named():\n    return d()\n"
                              "def alone():\n    deep = 3\n    return deep\n"}
    monkeypatch.setattr(work, "HERE", tmp_path)

    def codes(**changed):
        for name, source in (text | {k.replace("_", "/", 1) + ".py": v
                                     for k, v in changed.items()}).items():
            (tmp_path / name).write_text(source)
        fresh(work.definitions)
        return [fresh(work.code_of)("claims.high", name) for name in ("through", "named", "alone")]
    try:
        first = codes()
        assert codes(low=text["low.py"].replace("Says", "Has said") + "# a comment\n") == first
        assert codes(low=text["low.py"].replace("return 2", "return 5")) == first
        through, named, alone = codes(low=text["low.py"].replace("return 1", "return 4"))
        assert through != first[0] and named != first[1] and alone == first[2]
    finally:
        fresh(work.definitions), fresh(work.code_of)


def test_a_run_reaches_the_loop_and_not_the_command_line():
    for module, name in (("claims.pictures", "distilled"), ("claims.solids", "solid"),
                         ("claims.edits", "edited")):
        reached = work.reached_from(module, name)
        assert {("asd", "distill"), ("asd", "generator_grad"), ("phi", "second_view"),
                ("asd", "discriminator_step"), ("prior", "Prior")} <= reached
        assert not {("runs", "main"), ("reproduce", "main"), (module, "CLAIMS")} & reached


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
    x_t, eps = (torch.randn(2, *prior.shape, generator=rng) for _ in range(2))
    t, y = torch.tensor([300, 700]), prior.encode_text(["a fox", "a red apple"])
    found = own(x_t, t, y, eps)
    found.square().sum().backward()
    for i in range(2):
        alone = LoRAPhi(prior, rank=2)
        for name, layer in adapters.items():
            peft = alone.network.get_submodule(name)
            peft.lora_A["default"].weight.data = layer.down.data[i].clone()
            peft.lora_B["default"].weight.data = layer.up.data[i].clone()
        expected = alone(x_t[[i]], t[[i]], y[[i]], eps[[i]])
        torch.testing.assert_close(found[[i]], expected, rtol=1e-3, atol=1e-4)
        expected.square().sum().backward()
        for name, layer in adapters.items():
            peft = alone.network.get_submodule(name)
            torch.testing.assert_close(layer.up.grad[i], peft.lora_B["default"].weight.grad,
                                       rtol=1e-2, atol=1e-2)
    # twice as many samples: x^g, then x^r
    twice = own(*(torch.cat([x, x]) for x in (x_t, t, y, eps)))
    torch.testing.assert_close(twice, torch.cat([found, found]), rtol=1e-3, atol=1e-4)


@tiny
def test_a_run_starts_alike_whatever_the_method_and_leaves_the_prior(prior, monkeypatch):
    monkeypatch.setattr(asd.Prior, "from_pretrained", lambda *_: prior)
    before = {name: p.clone() for name, p in prior.network.state_dict().items()}
    sds, vsd = (pictures.distilled(name, ["a fox"] * 2, steps=10, lr=0.0)["late"]
                for name in ("sds", "vsd"))
    assert sds.shape == (5, 2, 3, 64, 64) and sds.dtype == torch.uint8
    assert torch.equal(sds, vsd) and not torch.equal(sds[:, 0], sds[:, 1])
    assert all(torch.equal(p, before[name]) for name, p in prior.network.state_dict().items())


@tiny
def test_edits_are_kept_apart(prior, monkeypatch):
    """Twenty edits in one run: another picture in one place changes no other place."""
    monkeypatch.setattr(asd.Prior, "from_pretrained", lambda *_: prior)
    import editing
    monkeypatch.setattr(edits, "ddim_samples", lambda _, prompts, noise: noise / 2)
    rows = {name: replace(row, steps=10) for name, row in editing.methods().items()}
    monkeypatch.setattr(editing, "methods", lambda: rows)
    made = []
    for second in ("panda", "owl"):
        monkeypatch.setattr(edits, "CONCEPTS", ["fox", second])
        made.append(edits.edited("simplification", "asd")["late"])
    assert made[0].shape == (5, 2, 3, 64, 64)
    assert (made[0][:, 0].int() - made[1][:, 0].int()).abs().max() <= 1       # the fox: rounding
    assert (made[0][:, 1].int() - made[1][:, 1].int()).abs().max() > 20


# --------------------------------------------------------------------------- signs, on made-up runs
def painted(saturation, noise=0.0, seed=0):
    """uint8 [15, 3, 64, 64]: grey with red in it, and grain."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.full((15, 3, 64, 64), 0.5)
    images[:, 0] += saturation / 2
    return pictures.to_bytes(images + noise * torch.randn(images.shape, generator=rng))


@tiny
def test_the_signs_of_the_claims():
    """Runs that are as the paper says make every test that needs no judge positive."""
    still = lambda images: images[None].repeat(5, 1, 1, 1, 1)
    moving = lambda much: torch.stack([painted(0.3, much, seed) for seed in range(5)])
    r = {"samples": {"samples": torch.stack([painted(0.3, 0.1, i)[:4] for i in range(5)])},
         "sds@1": {"late": still(painted(0.1, 0.01))},
         "sds@7.5": {"late": still(painted(0.2, 0.05))},
         "sds@100": {"late": still(painted(0.9, 0.05))}, "vsd@7.5": {"late": moving(0.1)},
         "asd@7.5": {"late": moving(0.01)}, "vsd@1": {"late": moving(0.2)},
         "asd@1": {"late": moving(0.02)}, "short vsd": {"late": still(painted(0.3, 0.2))},
         "short sds": {"late": still(painted(0.3, 0.01))},
         "short vsd†": {"late": still(painted(0.3, 0.02))}}
    r["sds@10000"] = r["sds@100"]
    for tests, names in ((pictures.tests_1a, "sharpness saturation"), (pictures.tests_1b, "pixels"),
                         (pictures.tests_4, "sharpness pixels")):
        found = {name: values for name, values in tests(r).items()
                 if any(part in name for part in names.split())}
        assert found and all(min(values) > 0 for values in found.values()), found
    for lam in pictures.LADDER:
        r[f"sds@{lam:g}"] = {"late": still(painted(min(1.0, lam / 20)))}
    for gamma, name in pictures.GAMMAS.items():
        r[name] = {"late": still(painted(min(1.0, pictures.lam_eff(gamma) / 20)))}
    r["csd"] = {"late": still(painted(1.0))}
    r["vsd@7.5"] = r["sds@7.5"]
    assert pictures.nearest(r, -0.5) == [4.25] * 15 and pictures.lam_eff(-0.5) == 4.25
    order, classifier, predicted = pictures.tests_gamma(r).values()
    assert min(order) > 0.9 and min(classifier) > 0 and min(predicted) > 0
    for name in pictures.GAMMAS.values():                     # all alike: nothing is ordered
        r[name] = r["sds@30"]
    order, _, predicted = pictures.tests_gamma(r).values()
    assert max(order) == 0 and max(predicted) < 0


@tiny
def test_the_signs_in_3d():
    """Against the true solid's own pictures; a drift, and colours that clip."""
    views = painted(0.2)[:8]
    run = lambda views, much: {"views": views, "scores": torch.tensor([0.9, 17.0]),
                               "snapshots": torch.stack([painted(0.3, much, i)[:4]
                                                         for i in range(5)])}
    results = {(name, "a red mug", 0): run(painted(saturation)[:8], much)
               for name, saturation, much in (("sds", 0.2, 0.0), ("asd", 0.2, 0.01),
                                              ("vsd", 0.2, 0.1), ("csd", 1.0, 0.0))}
    results["asd", "a red mug", 0]["scores"] = torch.tensor([0.95, 18.0])
    found = solids.tests_7(results) | solids.tests_5b(results) | solids.tests_table1(results)
    found = {name: values for name, values in found.items() if "score" not in name}
    assert all(min(values) > 0 for values in found.values()), found
    measured = solids.measured(run(views, 0.1), "a red mug")
    assert measured["IoU"] == pytest.approx(0.9) and measured["drift in pixels"] > 0.01


# -------------------------------------------------------------------------------------- the command
def claim_of(kept):
    """A claim that holds, of the jobs above; its figure is a file."""
    return work.Claim("water is wet", "Fig. 0", dict(enumerate(kept)), lambda r: {
        "it grows": [r[i]["value"].item() + 1 for i in range(4)]},
        lambda path, r: Path(path).write_text("a picture"), lambda r: {"row": {"x": (1.0, 0.5)}},
        "none")


def test_the_command_writes_its_tables_once(kept, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "CLAIMS", {"γ": claim_of(kept)})
    (tmp_path / "README.md").write_text("\n".join(["before", *reproduce.MARKS, "after"]))
    folder = tmp_path / "figures"
    monkeypatch.setattr(reproduce, "FOLDER", folder)
    reproduce.main(["gamma", "--out", str(folder), "--part", "1/2"])
    assert not folder.exists() and "not done yet" in capsys.readouterr().out
    reproduce.main(["all", "--out", str(folder)])
    assert "holds" in capsys.readouterr().out
    record = json.loads((folder / "claims.json").read_text("utf-8"))["claims"]["γ"]
    assert record["tests"]["it grows"] == {"mean": 2.5, "error": pytest.approx(0.6455, abs=1e-4),
                                           "n": 4, "sure": 1} and record["verdict"] == "holds"
    page = (tmp_path / "README.md").read_text("utf-8")
    assert page.startswith("before") and page.endswith("after") and "**holds**" in page
    assert "1.000 ± 0.500" in (folder / "README.md").read_text("utf-8")
    made = {file: file.stat().st_mtime_ns for file in (folder / "gamma.png", *work.KEPT.iterdir())}
    reproduce.main(["all", "--out", str(folder)])                  # a second call makes nothing
    assert {file: file.stat().st_mtime_ns for file in made} == made and len(CALLS) == 4


def test_the_list_runs_nothing(kept, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(reproduce, "CLAIMS", {"0": claim_of(kept)})
    reproduce.main(["--out", str(tmp_path)])
    assert "4 min" in capsys.readouterr().out and CALLS == [] and not list(tmp_path.iterdir())


def test_the_tables_are_the_records():
    """README.md's and figures/README.md's, of this repository, from figures/claims.json."""
    records = reproduce.found(reproduce.FOLDER)
    page = (HERE / "README.md").read_text("utf-8")
    assert set(records) <= set(reproduce.CLAIMS) and reproduce.MARKS[0] in page
    assert page == reproduce.with_table(page, records)
    assert (HERE / "figures/README.md").read_text("utf-8") == reproduce.long_table(records)
    for name, record in records.items():
        assert record["verdict"] == work.verdict(record["tests"])
        assert (HERE / f"figures/{reproduce.file_name(name)}.png").exists()
