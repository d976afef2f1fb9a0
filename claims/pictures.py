"""pictures.py — the paper's claims about 2D distillation: Figs. 1, 4–8, §5's γ, §7.

Every run makes fifteen pictures at once, five prompts by three seeds, each with noise and a φ of
its own (OwnLoRA), so that they are fifteen runs in all but speed. They begin at the same noise
whatever the method. Settings are asd.py's, but for what a job's arguments name. In the tests and
figures r is what the jobs returned, by key.
"""
import functools
import statistics
from dataclasses import replace

import torch
from torch import nn

import asd
from claims.work import Claim, Job, numbers_of
from cli.pictures import picture_measures, sheet, to_bytes
from phi import second_view
from prior import ddim_samples
from tiny.judge import clip_features
from variants import all_methods

PROMPTS = ["a red apple", "a fox", "a hamburger", "a rocket", "a mushroom"]
SEEDS = 3
TEXTS = PROMPTS * SEEDS                       # of the fifteen pictures
LATE = (0.6, 0.7, 0.8, 0.9, 1.0)              # of the steps: when the pictures are kept
# tiny-sd has never seen the published words ("oversaturated, smooth …"): these are of its own
BRIDGE = {"source_words": "a flat icon of {}", "target_words": "a 3d render of {}",
          "bridge_start": 0.8}


# --------------------------------------------------------------------------------- fifteen at once
class OwnAdapters(nn.Module):
    """A Linear with low-rank adapters for each of N samples: x [kN, L, in] -> [kN, L, out]."""

    def __init__(self, base, samples, rank, rng):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(samples, rank, base.in_features, generator=rng) / rank)
        self.up = nn.Parameter(torch.zeros(samples, base.out_features, rank))

    def forward(self, x):
        k = len(x) // len(self.down)
        down, up = self.down.repeat(k, 1, 1), self.up.repeat(k, 1, 1)
        return self.base(x) + x @ down.mT @ up.mT


class OwnLoRA(nn.Module):
    """φ for N particles that have nothing in common: N LoRAs of phi.LoRAPhi's kind in one network.

    prompts: one for each particle. No parameter serves two particles and AdamW goes by elements, so
    each learns what it would alone.
    """
    whole = True                              # a batch is never cut: sample i is particle i's

    def __init__(self, prior, prompts, rank=4, seed=0):
        super().__init__()
        self.prior, self.network = prior, second_view(prior.network)
        rng = torch.Generator().manual_seed(seed)
        for name, layer in list(self.network.named_modules()):
            if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
                self.network.set_submodule(name, OwnAdapters(layer, len(prompts), rank, rng))
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name.endswith((".down", ".up")))

    def forward(self, x_t, t, cond, eps, camera=None, answers=None):
        return self.prior.eps_of(self.network, x_t, t, cond)


def keep_late(late, steps):
    """A callback of distill() that adds the generator's pictures at LATE of the steps to a list."""
    kept_steps = [round(part * steps) for part in LATE]

    def keep(state, terms):
        if state.step in kept_steps:
            late.append(to_bytes(state.generator.images()))
    return keep


def distilled(method, texts=TEXTS, start=None, words=None, seed=0, **changes):
    """Pictures of the texts, one each. -> {"late": uint8 [5, N, 3, H, W] at LATE of the steps}.

    method: a row of all_methods(), with `changes`; start: pictures to begin with, in place of
    noise; words: of the φ's.
    """
    prior, row = asd.Prior.from_pretrained("tiny-sd"), replace(all_methods()[method], **changes)
    if row.phi is asd.LoRAPhi:
        row = replace(row, phi=OwnLoRA)
    rng, late = torch.Generator().manual_seed(seed), []
    latents = asd.Latents(prior, len(texts), rng, start)
    phi = asd.make_phi(row, prior, list(texts), seed, **words or {})
    state = asd.State(latents, phi, row, rng)
    asd.distill(prior, latents, prior.encode_text(texts), row, state=state,
                callback=keep_late(late, row.steps))
    return {"late": torch.stack(late)}


def job(method, minutes=None, **arguments):
    """The Job of distilled() with a row, named by what is special about it."""
    if minutes is None:
        minutes = 3.5 if all_methods()[method].phi is asd.LoRAPhi else 1.2
    settings = [f"{key}{value:g}" for key, value in arguments.items() if key != "words"]
    name = "-".join(["picture", method, *settings])
    return Job(name, distilled, {"method": method} | arguments, minutes)


# -------------------------------------------------------------------------------------- the jobs
def samples(number=32):
    """The prior's own pictures, 50 DDIM steps at guidance 3. -> uint8 [5, number, 3, H, W]."""
    prior, rng = asd.Prior.from_pretrained("tiny-sd"), torch.Generator().manual_seed(100)
    noise = torch.randn(number, *prior.shape, generator=rng)
    latents = [ddim_samples(prior, [prompt] * number, noise) for prompt in PROMPTS]
    return {"samples": torch.stack([to_bytes(prior.decode(x0)) for x0 in latents])}


def cosines():
    """Of Eq. 7's classifier term alone with SDS's gradient at λ = 10⁴, where SDS begins. -> [15]"""
    prior, rng = asd.Prior.from_pretrained("tiny-sd"), torch.Generator().manual_seed(0)
    x0 = asd.Latents(prior, len(TEXTS), rng)().detach()
    t, eps = asd.draw_noise(rng, x0, 20, 980)
    x_t, y = asd.add_noise(x0, eps, *prior.alpha_sigma(t)), prior.encode_text(TEXTS)
    null = prior.encode_text([""]).expand_as(y)
    answers, = asd.ask(prior, [{"uncond": (x_t, t, null), "y": (x_t, t, y)}])
    eps_uncond, eps_y = answers["uncond"], answers["y"]
    classifier = asd.generator_grad(eps_uncond, eps_y, eps_y, 7.5)
    sds = asd.sds_grad(eps_uncond, eps_y, eps, 1e4)
    return {"cosine": nn.functional.cosine_similarity(classifier.flatten(1), sds.flatten(1))}


def recovered():
    """Fig. 5c: over-saturated pictures (SDS at λ = 10⁴), then SDS, VSD and ASD from there."""
    made = {"start": distilled("sds", lam=1e4)["late"]}
    for name in asd.METHODS:
        made[name] = distilled(name, start=made["start"][-1] / 255)["late"]
    return made


TIMED = {"sds": {}, "vsd": {}, "asd": {}, "shared": {"share_noise": True}, "bridge": {}, "lmc": {}}


def times(rounds=15, steps=8):
    """Milliseconds a step of one picture, in turns. -> float32 [rounds, len(TIMED)]."""
    prior = asd.Prior.from_pretrained("tiny-sd")
    ms = []
    for _ in range(rounds):
        ms.append([time_of_a_step(prior, name, steps) for name in TIMED])
    return {"ms": torch.tensor(ms)}


def time_of_a_step(prior, name, steps):
    """The median milliseconds of a short run by a row of TIMED, but for its first step."""
    row, words, ms = all_methods()["asd" if name == "shared" else name], {}, []
    row, rng = replace(row, steps=steps, **TIMED[name]), torch.Generator()
    if name == "bridge":
        words = BRIDGE | {"bridge_start": 0.0}
    latents = asd.Latents(prior, 1, rng)
    state = asd.State(latents, asd.make_phi(row, prior, PROMPTS[:1], **words), row, rng)
    asd.distill(prior, latents, prior.encode_text(PROMPTS[:1]), row, state=state,
                callback=lambda state, terms: ms.append(1000 * terms["seconds"]))
    return statistics.median(ms[1:])


SIDE = 160                                    # pixels of a picture in a figure
LAMBDAS = (1.0, 3.0, 7.5, 30.0)
GAMMAS = {-1.0: "asd@7.5", -0.5: "asd γ -0.5", 0.0: "vsd@7.5", 1.0: "asd γ 1", 10.0: "asd γ 10",
          1000.0: "asd γ 1000"}                               # of §5, and what was made with each
# λ' of SDS, which is VSD with an exact φ where there is one particle
LADDER = (1.0, 3.0, 4.25, 7.5, 14.0, 30.0, 72.5, 100.0, 300.0, 1e3, 3e3, 1e4)
JOBS = {"samples": Job("samples", samples, {}, 2.5)}
for lam in (7.5, 1.0, 3.0, 30.0):
    JOBS |= {f"{name}@{lam:g}": job(name, lam=lam) for name in asd.METHODS}
JOBS |= {f"sds@{lam:g}": job("sds", lam=lam) for lam in LADDER}
JOBS |= {name: job("asd", gamma=gamma) for gamma, name in GAMMAS.items() if " γ " in name}
JOBS |= {"csd": job("csd"), "shared": job("asd", share_noise=True, minutes=2.5),
         "lmc": job("lmc"), "lmc, fixed ε": job("lmc", fixed_noise=True),
         "sds@2": job("sds", lam=2.0), "ms-sds": job("sds", t_max=0.5),
         "nfsd": job("nfsd", words={"negative": "a flat icon"}),
         "bridge": job("bridge", words=BRIDGE), "cosines": Job("cosines", cosines, {}, 0.1),
         "recovered": Job("recovered", recovered, {}, 9.5), "times": Job("times", times, {}, 1.5)}
# 50 updates of φ a step are dear: a third of the steps, at three times θ's rate, for all three
SHORT = {"steps": 120, "lr": 0.03}
JOBS |= {f"short {name}": job(name, **SHORT) for name in ("sds", "vsd")}
JOBS["short vsd†"] = job("vsd", phi_steps=50, minutes=30, **SHORT)


# ------------------------------------------------------------------------------------ the measures
@functools.lru_cache(maxsize=256)
def cached_features(data, shape):
    images = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(shape) / 255
    return clip_features([images], TEXTS)


def features(images):
    """uint8 [N, 3, H, W] -> unit vectors [N, 128] of tiny-clip's, and those of TEXTS."""
    return cached_features(images.contiguous().numpy().tobytes(), tuple(images.shape))


def measures(images, r):
    """uint8 [15, 3, H, W] -> {measure: [15 numbers]}.

    saturation, sharpness: cli.pictures.picture_measures'. score: tiny-clip's cosine with the
    prompt. distance: 1 − the mean cosine, in its features, with the prior's own samples of that
    prompt.
    """
    rows = [picture_measures(image) for image in (images / 255).split(1)]
    found = {}
    for measure in ("saturation", "sharpness"):
        found[measure] = [row[measure] for row in rows]
    seen, texts = features(images)
    own = torch.stack([features(x)[0].mean(0) for x in r["samples"]["samples"]])
    found["score"] = (seen * texts).sum(1).tolist()
    found["distance"] = (1 - (seen * own.repeat(SEEDS, 1)).sum(1)).tolist()
    return found


def of_samples(r, measure):
    """The mean of a measure over the prior's samples of a prompt, for each of the 15 texts."""
    means = []
    for i, images in enumerate(r["samples"]["samples"]):
        if measure == "score":
            seen, texts = features(images)
            means.append((seen @ texts[i]).mean().item())
        else:
            means.append(picture_measures(images / 255)[measure])
    return means * SEEDS


def late_pictures(r, key):
    """uint8 [5, 15, 3, H, W] of a run; "start", "sds", "vsd" and "asd" are those of Fig. 5c."""
    return r[key]["late"] if key in r else r["recovered"][key]


def last_pictures(r, key):
    """uint8 [15, 3, H, W] of a run."""
    return late_pictures(r, key)[-1]


def measured(r, key, measure):
    """[15] of a run's last pictures; "samples": of the prior's own."""
    if key == "samples":
        return of_samples(r, measure)
    return measures(last_pictures(r, key), r)[measure]


def minus(a, b):
    return [x - y for x, y in zip(a, b, strict=True)]


def gap(r, measure, a, b):
    """A measure of the run a minus that of b, picture by picture."""
    return minus(measured(r, a, measure), measured(r, b, measure))


def apart(a, b):
    """Root mean square between pictures, uint8 [N, 3, H, W] each. -> [N]"""
    return ((a.float() - b.float()) / 255).square().mean((1, 2, 3)).sqrt().tolist()


def nearer(r, key, far, near):
    """How much nearer in pixels a run's last pictures are to those of `near` than to `far`'s."""
    pictures = last_pictures(r, key)
    return minus(apart(pictures, last_pictures(r, far)), apart(pictures, last_pictures(r, near)))


def drift(late):
    """How far pictures go in a tenth of the steps, late: uint8 [5, N, …] -> (pixels, features)."""
    pixels = torch.tensor([apart(a, b) for a, b in zip(late, late[1:])]).mean(0)
    seen = torch.stack([features(x)[0] for x in late])
    turned = (1 - (seen[:-1] * seen[1:]).sum(2)).mean(0)
    return pixels.tolist(), turned.tolist()


# --------------------------------------------------------------------------------------- the tests
def control(r):
    """λ = 10⁴ is garish by all that is known, and to the eye: does the measure see it?"""
    return {"control: saturation, SDS at 10⁴ − samples":
            gap(r, "saturation", "sds@10000", "samples")}


def tests_1a(r):
    return {
        "smooth: sharpness, samples − SDS at 7.5": gap(r, "sharpness", "samples", "sds@7.5"),
        "smoother at 1 than at 7.5: sharpness": gap(r, "sharpness", "sds@7.5", "sds@1"),
        "saturated: saturation, SDS at 100 − samples": gap(r, "saturation", "sds@100", "samples"),
        "farther off: distance, SDS at 100 − at 7.5": gap(r, "distance", "sds@100", "sds@7.5"),
        **control(r)}


def tests_1b(r):
    tests = {}
    for lam in ("7.5", "1"):
        vsd, ours = (drift(late_pictures(r, f"{name}@{lam}")) for name in ("vsd", "asd"))
        tests[f"drift in pixels at λ {lam}, VSD − ASD"] = minus(vsd[0], ours[0])
        tests[f"drift in features at λ {lam}, VSD − ASD"] = minus(vsd[1], ours[1])
    return tests


def tests_4(r):
    return {"smoother: sharpness, VSD − VSD†": gap(r, "sharpness", "short vsd", "short vsd†"),
            "pixels, VSD† to VSD − VSD† to SDS": nearer(r, "short vsd†", "short vsd", "short sds")}


def tests_5a(r):
    return {"cosine of the gradients − 0.99": (r["cosines"]["cosine"] - 0.99).tolist(),
            "saturation, classifier term − samples": gap(r, "saturation", "csd", "samples"),
            "pixels, classifier term to SDS at 7.5 − to SDS at 10⁴":
                nearer(r, "csd", "sds@7.5", "sds@10000"), **control(r)}


def tests_5c(r):
    tests = {}
    for prefix, name in (("", "start"), ("ours: ", "sds"), ("ours: ", "vsd")):
        label = LABELS[name]
        tests[f"{prefix}saturation, {label} − ASD"] = gap(r, "saturation", name, "asd")
        tests[f"{prefix}score, {label} − ASD, less"] = gap(r, "score", "asd", name)
    return tests | control(r)


def tests_6(r):
    tests = {}
    for name in ("sds", "vsd"):
        other = f"{name}@7.5"
        tests[f"score, ASD − {name.upper()}"] = gap(r, "score", "asd@7.5", other)
        tests[f"distance, {name.upper()} − ASD"] = gap(r, "distance", other, "asd@7.5")
    return tests


def ranges(r, name, measure):
    """The range of a measure over LAMBDAS, picture by picture."""
    rows = torch.tensor([measured(r, f"{name}@{lam:g}", measure) for lam in LAMBDAS])
    return (rows.amax(0) - rows.amin(0)).tolist()


def tests_cfg(r):
    tests = {}
    for measure in ("score", "saturation"):
        ours = ranges(r, "asd", measure)
        for name in ("sds", "vsd"):
            test = f"range of {measure}, {name.upper()} − ASD"
            tests[test] = minus(ranges(r, name, measure), ours)
    return tests


def nearest(r, gamma):
    """The λ' of LADDER at which SDS's picture is nearest (pixels) to that of γ. -> [15]"""
    pictures = last_pictures(r, GAMMAS[gamma])
    far = torch.tensor([apart(pictures, last_pictures(r, f"sds@{lam:g}")) for lam in LADDER])
    return [LADDER[i] for i in far.argmin(0)]


def lam_eff(gamma, lam=7.5):
    """Ours: the guidance of VSD that ASD is at Eq. 10's minimiser."""
    return asd.effective_guidance(lam, gamma) if gamma > -1 else 1.0


def tests_gamma(r):
    from torchmetrics.functional import spearman_corrcoef
    found = torch.tensor([nearest(r, gamma) for gamma in GAMMAS])              # [6, 15]
    places = torch.arange(float(len(GAMMAS)))[:, None].expand_as(found)
    order = spearman_corrcoef(found, places).nan_to_num()         # all alike: no correlation
    predicted = torch.tensor([lam_eff(gamma) for gamma in GAMMAS])[:, None]
    off = (found / predicted).log2().abs()[1:5].mean(0)           # γ −½ … 10
    return {"guidance grows with γ: rank correlation with the nearest λ'": order.tolist(),
            "γ ≫ 0 is the classifier: pixels to VSD − to the classifier term":
                nearer(r, "asd γ 1000", "vsd@7.5", "csd"),
            "ours: the nearest λ' is λ_eff but for a factor of 2, log₂": (1 - off).tolist()}


def numbers_gamma(r):
    numbers = {}
    for gamma in GAMMAS:
        median = sorted(nearest(r, gamma))[len(TEXTS) // 2]
        numbers[f"γ {gamma:g}"] = {"λ_eff": lam_eff(gamma), "nearest λ', median": median}
    return numbers


def variety(seen):
    """Unit vectors [N, C] -> the mean of 1 − the cosine of each pair."""
    i, j = torch.triu_indices(len(seen), len(seen), 1)
    return (1 - (seen[i] * seen[j]).sum(1)).mean().item()


def variety_of_seeds(r, key):
    """The variety of a run's three pictures of each prompt, or of the prior's samples. -> [5]"""
    if key == "samples":
        return [variety(features(images)[0]) for images in r["samples"]["samples"]]
    seen = features(last_pictures(r, key))[0]
    return [variety(seen[i::len(PROMPTS)]) for i in range(len(PROMPTS))]


def tests_8(r):
    half = [number / 2 for number in variety_of_seeds(r, "samples")]
    return {"distance between seeds, ASD − half of the samples'":
            minus(variety_of_seeds(r, "asd@7.5"), half)}


def numbers_8(r):
    keys = {"samples": "samples"} | {name: f"{name}@7.5" for name in asd.METHODS}
    return numbers_of({name: {"distance between seeds": variety_of_seeds(r, key)}
                       for name, key in keys.items()})


def ms(r, name):
    """Milliseconds a step of a row of TIMED: a tensor [rounds]."""
    return r["times"]["ms"][:, list(TIMED).index(name)]


def tests_7(r):
    return {"speed-up − 30 %": (ms(r, "asd") / ms(r, "shared") - 1.3).tolist(),
            "score, fresh − shared": gap(r, "score", "asd@7.5", "shared")}


def tests_lmc(r):
    tests = {"at λ 2: score, LMC − SDS": gap(r, "score", "lmc", "sds@2"),
             "score, LMC at 2 − SDS at 7.5": gap(r, "score", "lmc", "sds@7.5"),
             "saturation, SDS at 7.5 − LMC at 2": gap(r, "saturation", "sds@7.5", "lmc")}
    off = {}
    for key in ("sds@7.5", "ms-sds", "lmc", "lmc, fixed ε"):
        off[key] = [abs(x) for x in gap(r, "sharpness", key, "samples")]
    for lmc in ("lmc", "lmc, fixed ε"):
        for key in ("sds@7.5", "ms-sds"):
            test = f"sharpness off the samples', {LABELS[key]} − {LABELS[lmc]}"
            tests[test] = minus(off[key], off[lmc])
    return tests


def tests_bridge(r):
    return {"score, bridge − SDS": gap(r, "score", "bridge", "sds@7.5"),
            "distance, SDS − bridge": gap(r, "distance", "sds@7.5", "bridge"),
            "score, VSD − bridge": gap(r, "score", "vsd@7.5", "bridge"),
            "its cost is SDS's: 1.1 − the ratio":
                (1.1 - ms(r, "bridge") / ms(r, "sds")).tolist()}


# ------------------------------------------------------------------------- the numbers, the figures
def table(*keys, own=True, timed=False):
    """The numbers of some runs' last pictures; own: of the prior's samples; timed: of steps."""
    def numbers(r):
        rows = {}
        if timed:
            rows |= {name: {"ms a step": ms(r, name)} for name in TIMED}
        rows |= {LABELS.get(key, key): measures(last_pictures(r, key), r) for key in keys}
        if own:
            rows[LABELS["samples"]] = {measure: of_samples(r, measure)
                                       for measure in ("saturation", "sharpness", "score")}
        return numbers_of(rows)
    return numbers


def drawn(*keys):
    """A figure of some runs: a row each, the prompts' first seed; under it tiny-clip's score."""
    def figure(path, r):
        rows = []
        for key in keys:
            if key == "samples":
                images = r["samples"]["samples"][:, 0]
            else:
                images = last_pictures(r, key)[:len(PROMPTS)]
            seen, texts = features(images)
            notes = [f"{score:.2f}" for score in (seen * texts[:len(PROMPTS)]).sum(1)]
            rows.append((LABELS.get(key, key), images / 255, notes))
        sheet(path, PROMPTS, rows, SIDE, corner="tiny-clip's score", colors=256)
    return figure


def progress(path, r):
    """Figs. 1b and 7: two prompts late in the run, by VSD and by ASD."""
    rows = []
    for i, lam in ((1, "7.5"), (1, "1"), (3, "7.5")):
        for name in ("vsd", "asd"):
            late = late_pictures(r, f"{name}@{lam}")[:, i]
            rows.append((f"{name.upper()}, guidance {lam}", late / 255))
    sheet(path, [f"{part:.0%} of the steps" for part in LATE], rows, SIDE, colors=256)


def seeds(path, r):
    """Fig. 8: a row for each seed."""
    parts = last_pictures(r, "asd@7.5").split(len(PROMPTS))
    rows = [(f"ASD, seed {i}", images / 255) for i, images in enumerate(parts)]
    sheet(path, PROMPTS, rows, SIDE, colors=256)


LABELS = {"csd": "the classifier term alone", "ms-sds": "SDS, t < T/2",
          "lmc": "LMC-SDS, guidance 2", "lmc, fixed ε": "LMC-SDS, fixed noise",
          "bridge": "SDS-Bridge", "nfsd": "NFSD",
          "shared": "ASD, shared noise", "start": "the start", "samples": "the prior's samples",
          "sds@2": "SDS, guidance 2", "short vsd†": "VSD, 50 updates of phi"}
for name in asd.METHODS:
    LABELS |= {name: name.upper(), f"short {name}": name.upper()}
    LABELS |= {f"{name}@{lam:g}": f"{name.upper()}, guidance {lam:g}" for lam in LADDER}
LABELS |= {name: f"ASD, gamma {gamma:g}" for gamma, name in GAMMAS.items() if " γ " in name}


# -------------------------------------------------------------------------------------- the claims
SMALL = ("64 × 64 pixels; a judge trained on the same pictures as the prior; HSV saturation is a "
         "mean over the picture, which grain and colours that clip to white lower")


def claim(title, says, tests, keys, figure=None, numbers=None, more=(), seen=""):
    """seen: what one sees, and the measures, which were chosen beforehand, do not."""
    jobs = {key: JOBS[key] for key in ("samples", *keys, *more)}
    return Claim(title, says, jobs, tests, figure or drawn("samples", *keys),
                 numbers or table(*keys), SMALL + seen, len(PROMPTS))


THREE = [f"{name}@7.5" for name in asd.METHODS]
SWEEP = [f"{name}@{lam:g}" for name in asd.METHODS for lam in LAMBDAS]
SHARED = ["asd@7.5", "shared"]
BRIDGES = ["sds@7.5", "nfsd", "csd", "bridge", "vsd@7.5"]
RECOVERED = ["start", "sds", "vsd", "asd"]
CLAIMS = {
    "1a": claim("SDS over-smooths at a small λ and over-saturates at a large one", "Fig. 1a, §1",
                tests_1a, ["sds@1", "sds@7.5", "sds@30", "sds@100"], more=["sds@10000"],
                seen="; to the eye it holds from λ 1, pale and smooth, to 100, garish and clipped"),
    "1b": claim("at a small λ VSD drifts; ASD keeps object and structure", "Figs. 1b, 7, §6",
                tests_1b, ["vsd@7.5", "asd@7.5", "vsd@1", "asd@1"], figure=progress),
    "4": claim("VSD with 50 updates of φ a step over-smooths as SDS does", "Fig. 4, §5",
               tests_4, ["short sds", "short vsd", "short vsd†"]),
    "5a": claim("the classifier term alone is SDS at λ = 10 000: over-saturated", "Fig. 5a, §5",
                tests_5a, ["csd", "sds@7.5", "sds@10000"], more=["cosines"],
                seen="; to the eye both are alike, garish and clipped"),
    "5c": claim("thanks to its adversary ASD recovers from an over-saturated start", "Fig. 5c, §5",
                tests_5c, [], more=["recovered", "sds@10000"], figure=drawn(*RECOVERED),
                numbers=table(*RECOVERED, own=False),
                seen="; to the eye the start is garish, and all three recover from it"),
    "6": claim("quality in 2D: ASD is better than SDS and VSD", "Fig. 6a, §6", tests_6, THREE),
    "λ": claim("ASD is insensitive to λ, SDS and VSD are not", "abstract, §8", tests_cfg, SWEEP),
    "γ": claim("from γ = −1 over VSD's 0 the discriminator weakens, to the classifier alone at γ ≫ "
               "0", "§5", tests_gamma,
               [*GAMMAS.values(), "csd"], more=[f"sds@{lam:g}" for lam in LADDER],
               numbers=numbers_gamma, seen="; ours: λ_eff = 1 + (1 + γ)(λ − 1) is an exact φ's. A "
               "LoRA begins at ε_y, on the classifier's side, and lags"),
    "8": claim("another seed, another picture", "Fig. 8, §6", tests_8, THREE, figure=seeds,
               numbers=numbers_8),
    "§7": claim("shared noise makes a step 30–50 % faster, the result a little worse", "§7",
                tests_7, SHARED, more=["times"], numbers=table(*SHARED, timed=True)),
    "LMC": claim("LMC-SDS needs less guidance and is cleaner than SDS", "2401.05293", tests_lmc,
                 ["sds@7.5", "sds@2", "ms-sds", "lmc", "lmc, fixed ε"]),
    "Bridge": claim("SDS-Bridge lies between SDS and VSD in quality, at SDS's cost", "2406.09417",
                    tests_bridge, BRIDGES, more=["times"], numbers=table(*BRIDGES, timed=True)),
}
