"""variants.py — the neighbours of ASD: Eq. 7 with another ε_φ, each a row of METHODS or a --phi.

    python variants.py --method csd --negative "blurry" --prompt "a fox"
    python variants.py --method nfsd --prompt "a fox"
    python variants.py --method bridge --source-words "a drawing of {}" \\
                       --target-words "a 3d render of {}" --init drawing.png --prompt "a fox"
    python variants.py --method lmc --prompt "a fox"
    python variants.py --method asd --gamma -0.5 --phi exact --particles 16 --prompt "a fox"
    python variants.py --method vsd --generator network --prompt "a fox" --particles 4
    python variants.py train-corrective --model tiny-sd --minutes 20      # for --method lmc

| φ          | ε_φ that Eq. 7 subtracts                           | UNet evaluations | arXiv      |
|------------|----------------------------------------------------|------------------|------------|
| CSD        | ε_y; later a negative prompt comes in              | 2, or 3          | 2310.19415 |
| NFSD       | 0 for t < 200, ε_neg above                         | 3                | 2310.17590 |
| Bridge     | ε; then the source's ε, which also stands in for ∅ | 2, or 2N         | 2406.09417 |
| Corrective | (x_t − α b_k(x0, t)) / σ                           | 2, and b_k       | 2401.05293 |
| Exact      | (E[ε | x_t] + γ ε_y) / (1 + γ) over the particles  | 2                | ours       |

Evaluations are per particle and step. None of these φ is trained in the loop. Notation and shapes:
asd.py. A φ with `asks` says what the prior is asked at x_t, in the loop's one call. The rows of
asd.py are offered, too: for --phi exact and --generator network.
"""
import sys
from pathlib import Path

import torch
from torch import nn

import asd
import files
import runs
from asd import Method, NoisePhi, cfg_noise, optimal_eps_phi
from phi import as_list, untrained
from prior import Prior, UserError, ddim_samples, ode_end, one_step_x0

# the published prompts: NFSD's as in SDS-Bridge's repository, SDS-Bridge's own
NFSD_NEGATIVE = ("unrealistic, blurry, low quality, out of focus, ugly, low contrast, dull, dark, "
                 "low-resolution, gloomy")
BRIDGE_SOURCE = ("oversaturated, smooth, pixelated, cartoon, foggy, hazy, blurry, bad structure, "
                 "noisy, malformed")
BRIDGE_TARGET = "detailed high resolution, high quality, sharp"
# CSD's schedules: (cond, neg, null, noise) first, last, and the share of the steps between them
CSD_SCHEDULES = {
    "classifier": ((1, 0, -1, 0), (1, 0, -1, 0), 1.0),
    "coarse": ((1, 0, -1, 0), (1, -1, 0, 0), 0.5),           # its csd-if.yaml
    "refine": ((1, -1, 0, 0), (1, -0.5, -0.5, 0), 1.0),      # its csd-sd-refine.yaml
}


# --------------------------------------------------------------------------------- the equations
def row_eps_phi(row, eps_y, eps_neg, eps_uncond, eps, lam):
    """CSD (repository, configs): any linear row as a choice of ε_φ. All [B, C, H, W]; λ ≠ 1.

    row = (cond, neg, null, noise). Eq. 7's bracket becomes λ − 1 times that row, so that
    (1, 0, −1, 0), the classifier score alone, is ε_φ = ε_y.
    """
    cond, neg, null, noise = row
    # ε_φ = ε_∅ + λ(ε_y − ε_∅) − (λ − 1) (cond ε_y + neg ε_neg + null ε_∅ + noise ε)
    bracket = cond * eps_y + neg * eps_neg + null * eps_uncond + noise * eps
    return cfg_noise(eps_uncond, eps_y, lam) - (lam - 1) * bracket


def bridge_eps_phi(eps_source, eps_target, x0_source, x0_target, alpha_t, sigma_t, lam):
    """SDS-Bridge: the ε_φ that makes Eq. 7's bracket λ times the bridge between two ends of x_t.

    The ends are where the ODEs under the source's and the target's prompt arrive; ε_source and
    ε_target are the predictions at x_t. Ends reached in one step make ε_φ = ε_source, the paper's
    own method; with more steps, its reference solution as we understand it.
    """
    # the bridge in units of ε:  ε_tgt − ε_src  ->  (α / σ) (x0_src − x0_tgt)
    bridge = alpha_t / sigma_t * (x0_source - x0_target)
    # ε_φ = ε_src + λ(ε_tgt − ε_src) − λ · bridge
    return cfg_noise(eps_source, eps_target, lam) - lam * bridge


def corrective_eps_phi(x0, b, eps, alpha_t, sigma_t):
    """LMC-SDS: (x_t − α b_k)/σ, written with x_t = α x0 + σ ε; where b_k = x0 it is SDS's ε."""
    # ε_φ = ε + (α / σ) (x0 − b_k)
    return eps + alpha_t / sigma_t * (x0 - b)


def mean_noise(x_t, particles, alpha_t, sigma_t, alike=None, bandwidth=0.0):
    """ε_g = E[ε | x_t] where x0 is one of N particles, each blurred to a Gaussian of std h.

    x_t [B, C, H, W], particles [N, C, H, W], α_t and σ_t [B, 1, 1, 1]; alike [B, N]: which of them
    x_t may come from (None: all). -> like x_t.
    """
    variance = (alpha_t * bandwidth) ** 2 + sigma_t ** 2
    # p(j | x_t) ∝ exp( −‖x_t − α x0_j‖² / 2(α²h² + σ²) )
    distance = (x_t[:, None] - alpha_t[:, None] * particles).square().flatten(2).sum(2)    # [B, N]
    logits = -0.5 * distance / variance.flatten(1)
    if alike is not None:
        logits = logits.masked_fill(~alike, -torch.inf)
    centre = (logits.softmax(1) @ particles.flatten(1)).view_as(x_t)
    # ε_g = σ (x_t − α Σ_j p(j | x_t) x0_j) / (α²h² + σ²)
    return sigma_t * (x_t - alpha_t * centre) / variance


# ----------------------------------------------------------------------------------- φ by method
class CSD(NoisePhi):
    """Classifier score distillation (arXiv 2310.19415): ε_φ = ε_y, ASD's optimum as γ → ∞.

    schedule: a name of CSD_SCHEDULES or such a triple; default "classifier", with a negative prompt
    "coarse". Their uniform ω, gradient normalisation and Perp-Neg are left out. ValueError at
    λ = 1, where the gradient (λ − 1)(ε_y − ε_∅) is zero.
    """

    def __init__(self, prior, prompts, lam, steps, negative=None, schedule=None):
        super().__init__()
        if lam == 1:
            raise ValueError("CSD has no gradient at --lam 1: it is (λ − 1)(ε_y − ε_∅)")
        schedule = schedule or ("coarse" if negative else "classifier")
        self.first, self.last, share = CSD_SCHEDULES.get(schedule, schedule)
        self.prior, self.lam, self.span, self.step = prior, lam, max(1, share * steps), 0
        self.texts = [negative] if negative else []
        self.negative = prior.encode_text([negative or ""])

    def asks(self, step, x_t, t, y, null, lam):
        self.step = step
        negative = (x_t, t, self.negative.expand_as(y)) if self.row()[1] else None
        return [*asd.guidance(step, x_t, t, y, null, lam), negative]

    def row(self):
        """(cond, neg, null, noise) at this step, linear between the schedule's two."""
        k = min(1.0, self.step / self.span)
        return [(1 - k) * a + k * b for a, b in zip(self.first, self.last)]

    def forward(self, x_t, t, cond, eps, camera=None, eps_uncond=None, eps_y=None, eps_neg=None):
        eps_neg = 0.0 if eps_neg is None else eps_neg
        return row_eps_phi(self.row(), eps_y, eps_neg, eps_uncond, eps, self.lam)


class NFSD(NoisePhi):
    """Noise-free score distillation (arXiv 2310.17590), as SDS-Bridge's repository has it.

    Eq. 7's bracket is λ(ε_y − ε_∅) + δ_D with δ_D = ε_∅ for t < 200 of 1000, ε_∅ − ε_neg above.
    """

    def __init__(self, prior, prompts, negative=NFSD_NEGATIVE):
        super().__init__()
        self.prior, self.texts = prior, [negative]
        self.negative = prior.encode_text([negative])

    def asks(self, step, x_t, t, y, null, lam):
        return [*asd.guidance(step, x_t, t, y, null, lam), (x_t, t, self.negative.expand_as(y))]

    def forward(self, x_t, t, cond, eps, camera=None, eps_uncond=None, eps_y=None, eps_neg=None):
        # ε_φ = 0 for t < 200, ε_neg above
        noisy = (5 * t >= self.prior.steps).view(-1, *[1] * (eps.dim() - 1))
        return torch.where(noisy, eps_neg, 0.0)


class Bridge(NoisePhi):
    """SDS-Bridge (arXiv 2406.09417): SDS first; then from what the pictures are to what is wanted.

    Its own view is optimal transport: SDS approximates a dual bridge from the distribution of the
    pictures to the prompt's, with two errors. 1, one linear step stands for the bridge:
    bridge_steps solves it. 2, ε_∅ stands for the source: words describe the source instead.
    From `bridge_start` (a fraction of the steps) on, the gradient is ω λ (ε_{y+target words} −
    ε_{y+source words}). Words with a {} are a phrase that the prompt is put into, others follow it.
    Start: half-way; at once where source words say what the pictures are (from a painting:
    "painting"). bridge_steps > 1 solves both ODEs instead of taking one step.
    prompts: every prompt the run can ask, at least one (ValueError); a prompt is recognised by its
    embedding.
    """

    def __init__(self, prior, prompts, lam, steps, source_words=None, target_words=None,
                 bridge_steps=1, bridge_start=None):
        super().__init__()
        if not as_list(prompts):
            raise ValueError("SDS-Bridge's φ is made for its prompts: Bridge(prior, prompts, …)")
        start = bridge_start if bridge_start is not None else 0.5 if source_words is None else 0.0
        words = [BRIDGE_SOURCE if source_words is None else source_words,
                 BRIDGE_TARGET if target_words is None else target_words]
        self.prior, self.lam, self.ode_steps = prior, lam, bridge_steps
        self.first, self.bridging, self.texts = round(start * steps), False, words
        self.plain = prior.encode_text(as_list(prompts))
        self.source, self.target = (
            prior.encode_text([with_words(prompt, extra) for prompt in as_list(prompts)])
            for extra in words)

    def asks(self, step, x_t, t, y, null, lam):
        self.bridging = step >= self.first
        if not self.bridging:
            return asd.guidance(step, x_t, t, y, null, lam)
        rows = rows_of(y, self.plain)
        return [(x_t, t, words[rows]) for words in (self.source, self.target)]

    def forward(self, x_t, t, cond, eps, camera=None, eps_uncond=None, eps_y=None):
        if not self.bridging:
            return eps
        if self.ode_steps == 1:
            return eps_uncond
        source = self.source[rows_of(cond, self.target)]
        ends = [ode_end(lambda x, t, told=told: self.prior.eps(x, t, told), x_t, t,
                        self.ode_steps, self.prior.alpha_sigma, at_x_t)
                for told, at_x_t in ((source, eps_uncond), (cond, eps_y))]
        return bridge_eps_phi(eps_uncond, eps_y, *ends, *self.prior.alpha_sigma(t), self.lam)


def with_words(prompt, words):
    """The prompt in a phrase ("a drawing of {}"), or followed by words; "" adds nothing."""
    if "{}" in words:
        return words.replace("{}", prompt)
    return f"{prompt}, {words}" if words else prompt


def rows_of(cond, table):
    """Which row of table [P, L, C] each of cond [B, L, C] is: [B]. ValueError where it is none."""
    distance, rows = (cond[:, None] - table).abs().flatten(2).amax(2).min(1)
    if (distance > 0.05 * table.abs().amax()).any():       # batches of other sizes round otherwise
        raise ValueError("SDS-Bridge is asked for a prompt that it was not made with")
    return rows


class Corrective(NoisePhi):
    """LMC-SDS (arXiv 2401.05293), as we understand it: SDS's projection term without its blur.

    SDS is λ(ε_y − ε_∅) plus ε_∅ − ε = (α/σ)(x0 − x̂0), which moves x0 towards the prior's one-step
    estimate x̂0: a blurred x0, even for a perfect picture. b_k(x0, t) ≈ E[x̂0 | x0, t] is blurred in
    the same way, so (α/σ)(b_k − x̂0) is zero on average at pictures the prior knows, and λ may be
    small. From the paper's abstract: a shallow network with weights k, trained beforehand, that
    imitates the prior's bias at each t. Ours: the network, its data, its loss's weight (all in
    tiny/corrective.py), that no gradient goes through it, λ = 2. The paper fixes ε as well
    (--fixed-noise): on tiny-sd that left speckles alone (tiny-clip 0.14, else 0.76), so it is off.
    """

    def __init__(self, prior, prompts, corrective=None):
        super().__init__()
        from tiny.corrective import load_bias
        self.prior = prior
        self.b_k = load_bias(prior, corrective).to(prior.device).requires_grad_(False).eval()

    def forward(self, x_t, t, cond, eps, camera=None, eps_uncond=None, eps_y=None):
        levels = self.prior.alpha_sigma(t)
        x0 = one_step_x0(x_t, eps, *levels)
        return corrective_eps_phi(x0, self.b_k(x0, t), eps, *levels)


class Exact(NoisePhi):
    """φ at the minimiser of Eq. 10 (asd.optimal_eps_phi) without network or training. γ > −1.

    The fake distribution is N known particles; those of one prompt belong together. VSD (γ = 0) or
    ASD at its optimum, SDS's cost. One particle at h = 0 knows its ε: ε_g = ε, so that the bracket
    is SDS's at λ_eff = 1 + (1 + γ)(λ − 1), times 1/(1 + γ). In many dimensions particles are so far
    apart that each only sees itself unless t or h is large.
    """
    whole = True                          # the loop gives it all particles at once

    def __init__(self, prior, prompts, gamma, bandwidth=0.0):
        super().__init__()
        if gamma <= -1:
            raise ValueError(f"an exact φ is the minimiser of Eq. 10, which has none at --gamma "
                             f"{gamma:g}: give one above -1, such as --gamma -0.5")
        self.prior, self.gamma, self.bandwidth = prior, gamma, bandwidth

    def forward(self, x_t, t, cond, eps, camera=None, eps_uncond=None, eps_y=None):
        levels = self.prior.alpha_sigma(t)
        x0 = one_step_x0(x_t, eps, *levels)
        prompt = torch.unique(cond.flatten(1).float(), dim=0, return_inverse=True)[1]
        eps_g = mean_noise(x_t, x0, *levels, prompt[:, None] == prompt, self.bandwidth)
        return optimal_eps_phi(eps_g, eps_y, self.gamma)


PHIS = {"csd": CSD, "nfsd": NFSD, "bridge": Bridge, "lmc": Corrective, "exact": Exact}
METHODS = {
    "csd": Method(phi=CSD),                            # λ is only a factor, which Adam divides out
    "nfsd": Method(phi=NFSD),
    "bridge": Method(phi=Bridge),                      # its repository: λ = 40 in both stages
    "lmc": Method(phi=Corrective, lam=2.0),
}


# --------------------------------------------------------------------------- the one-step generator
class Network(nn.Module):
    """A small U-Net from noise and a prompt to latents in one step: Diff-Instruct (2305.18455).

    cond [B, L, C]: the prompt of each picture of a batch, whose noise is fresh at every step. The
    network's learning rate is a thirtieth of the latents': weights, not pictures.
    """

    def __init__(self, prior, cond, rng, widths=(32, 64)):
        super().__init__()
        from diffusers import UNet2DConditionModel
        self.prior, self.cond, self.rng = prior, cond.float(), rng
        self.unet = untrained(lambda: UNet2DConditionModel(
            sample_size=prior.shape[1:], in_channels=prior.shape[0], out_channels=prior.shape[0],
            block_out_channels=widths, layers_per_block=1, cross_attention_dim=cond.shape[-1],
            attention_head_dim=4, norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")), rng).to(prior.device)
        self.register_buffer("shown", self.noise())    # what images() shows; in the checkpoint

    def noise(self):
        # drawn on the CPU whatever the device, from the run's one source of randomness
        shape = (len(self.cond), *self.prior.shape)
        return torch.randn(shape, generator=self.rng).to(self.prior.device)

    def parameter_groups(self, lr):
        return [{"params": list(self.parameters()), "lr": lr / 30}]

    def forward(self):
        return self.unet(self.noise(), 0, self.cond).sample, self.cond, None

    @torch.no_grad()
    def images(self):
        """-> RGB [B, 3, H, W] in [0, 1], always of the same noise."""
        return self.prior.decode(self.unet(self.shown, 0, self.cond).sample)


# ----------------------------------------------------------------------------------- command line
def all_methods():
    """The paper's rows and these."""
    return asd.METHODS | METHODS


ALL_PHIS = asd.PHIS | PHIS
OPTIONS = ("negative", "source_words", "target_words", "bridge_steps", "bridge_start", "bandwidth",
           "corrective")                       # what only some φ are told


def add_options(add):
    add("--negative", metavar="TEXT", help="csd, nfsd: the negative prompt")
    add("--source-words", metavar="TEXT", help="bridge: what the pictures are; {} is the prompt")
    add("--target-words", metavar="TEXT", help="bridge: what is wanted of them; {} is the prompt")
    add("--bridge-steps", type=runs.number(int, 1, 1000),
        help="bridge: steps of its ODEs (default 1)")
    add("--bridge-start", type=runs.number(float, 0, 1), help="bridge: where it begins, a fraction "
        "of the steps (default 0.5; with --source-words 0)")
    add("--bandwidth", type=runs.number(float, 0), help="--phi exact: each particle's blur h")
    add("--corrective", type=runs.place, metavar="FILE",
        help="lmc: its network (default: the embedded model's)")


def add_flags(add):
    runs.picture_flags(add)
    add_options(add)
    add("--generator", choices=["latents", "network"], help="network: learn to make all at once")


def check(settings):
    """What can be said before anything is loaded."""
    if settings["generator"] == "network" and any(map(settings.get, ("init", "pixels", "real"))):
        raise UserError("--generator network makes latents of noise: drop --init, --pixels, --real")


def build(settings, prior, method, rng, folder, anew):
    """As asd.py does, or the network that makes all pictures. -> (State, y)"""
    if settings["generator"] == "latents":
        return asd.build(settings, prior, method, rng, folder, anew)
    y = prior.encode_text(settings["prompt"]).repeat_interleave(settings["particles"], 0)
    phi = method.phi(prior, settings["prompt"], **runs.told(settings, method.phi))
    return asd.State(Network(prior, y, rng), phi, method, rng), y


def train_corrective(args):
    """Sample (or read) pictures, train b_k on them, write it. Resumes; see tiny/training.py."""
    from tiny import corrective
    from tiny.data import DATA
    torch.manual_seed(args.seed)
    name = Path(args.model).name
    if not args.out and name != "tiny-sd":
        raise UserError(f"--model {args.model} needs an --out FILE of its own: "
                        f"{corrective.OWN.name} is tiny-sd's")
    out = Path(args.out or corrective.OWN)
    if args.out and out.exists() and not (out.is_file() and corrective.is_bias(out)):
        raise UserError(f"--out {out} is there already and no corrective: name another file")
    out.parent.mkdir(parents=True, exist_ok=True)
    prior = Prior.from_pretrained(args.model, runs.usable(args.device))
    # what was made with other weights, words or settings is never taken for this
    unet = corrective.fingerprint(*prior.network.parameters())
    prompts = files.read_lines(args.prompts) if args.prompts else []
    DATA.mkdir(exist_ok=True)

    def sample(made, n):
        asked = [prompts[(made + i) % len(prompts)] for i in range(n)] if prompts else [""] * n
        noise = torch.Generator().manual_seed(args.seed + made)
        x_T = torch.randn(n, *prior.shape, generator=noise)
        return ddim_samples(prior, asked, x_T, args.ddim, 3.0 if prompts else 1.0)
    if args.images:
        pictures = files.encode_folder(prior, args.images).cpu()
    else:
        made_by = corrective.fingerprint(unet, prompts, args.ddim, args.seed, args.batch)
        kept = DATA / f"corrective-{name}-{made_by}.samples.safetensors"
        pictures = corrective.kept_samples(still_ours(kept, {"x0": prior.shape}), args.samples,
                                           args.batch, sample, torch.empty(0, *prior.shape))
    null = prior.encode_text([""]).expand(args.batch, -1, -1)

    def draws(step):
        """b_k's lessons from this step on: (x0, t, x̂0, α_t, σ_t), x̂0 the prior's without prompt."""
        rng = torch.Generator().manual_seed(args.seed + step)

        def draw():
            x0 = pictures[torch.randint(len(pictures), (args.batch,), generator=rng)]
            x0 = x0.to(prior.device)
            t, eps = asd.draw(rng, x0, 0, prior.steps - 1)
            return x0, t, *estimate(prior, x0, t, eps, null)
        return draw
    run = corrective.fingerprint(unet, pictures, args.lr, args.seed, args.batch)
    weights = enumerate(corrective.Bias(prior.shape[0]).parameters())
    kept = still_ours(DATA / f"corrective-{name}-{run}.checkpoint.safetensors", {
        f"{of}.{i}": weight.shape for i, weight in weights for of in ("parameter", "ema")})
    network = corrective.train(kept, prior.shape[0], draws, args.lr, args.minutes,
                               str(prior.device))
    corrective.save_bias(network, out, model=name, unet=unet)
    print(out)


@torch.no_grad()
def estimate(prior, x0, t, eps, null):
    """-> (x̂0 of the noised x0 without prompt, α_t, σ_t)."""
    levels = prior.alpha_sigma(t)
    x_t = asd.add_noise(x0, eps, *levels)
    return one_step_x0(x_t, prior.eps(x_t, t, null), *levels), *levels


def still_ours(path, shapes):
    """path, where an earlier call may have kept {name: last dimensions}; else UserError."""
    from safetensors import SafetensorError, safe_open
    try:
        if path.exists():
            with safe_open(files.regular(path), "pt") as file:
                if any(file.get_slice(name).get_shape()[-len(shape):] != list(shape)
                       for name, shape in shapes.items()):
                    raise ValueError("other shapes")
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is not what was kept there: move it away ({error})") from error
    return path


def corrective_main(argv):
    """`python variants.py train-corrective …`. -> exit status."""
    parser = runs.Parser(prog="variants.py", description="Train LMC-SDS's corrective b_k(x0, t).")
    parser.add_argument("task", choices=["train-corrective"])
    add, number = parser.add_argument, runs.number
    add("--model", default="tiny-sd", help='"tiny-sd", a diffusers folder or a hub name')
    add("--minutes", type=number(float, 1e-3), default=20.0, help="of training (default 20)")
    add("--images", metavar="DIR", help="pictures to learn from (default: the prior's samples)")
    add("--prompts", metavar="FILE", help="a prompt per line for the samples (default: none)")
    add("--samples", type=number(int, 1), default=512, help="how many to make (default 512)")
    add("--ddim", type=number(int, 1), default=25, help="steps to a sample (default 25)")
    add("--batch", type=number(int, 1), default=16, help="pictures per step (default 16)")
    add("--lr", type=number(float, 0, 1), default=2e-3, help="AdamW's (default 2e-3)")
    add("--seed", type=number(int, 0, 2 ** 62), default=0, help="of all randomness (default 0)")
    add("--device", default="auto", help="default auto: cuda where there is one")
    add("--out", metavar="FILE", help="where to (default, of tiny-sd: in tiny/)")
    return runs.guarded("variants.py", lambda: train_corrective(parser.parse_args(argv)),
                        "a smaller --batch", lambda: "; the same command goes on")


def main(argv=None):
    """`python variants.py --method …`, and train-corrective. -> exit status."""
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["train-corrective"]:
        return corrective_main(given)
    return runs.main(runs.Command(
        "variants.py", "Make pictures of prompts by the neighbours of Adversarial Score "
        "Distillation. To train what LMC-SDS needs: train-corrective --help.",
        METHODS | asd.METHODS, ALL_PHIS, asd.CHOICES, build, asd.distill, default=None,
        add_flags=add_flags, options=OPTIONS, check=check, defaults={
            "prompt": None, "particles": 1, "init": None, "pixels": False, "real": None,
            "generator": "latents"}, paper=asd.PAPER), given)


if __name__ == "__main__":
    sys.exit(main())
