"""exact.py — the exact prior: a Gaussian mixture, its log-densities and noise predictions known.

Every class y owns some of the components, so p(x_t), p(x_t|y), p(y|x_t) and

    ε(x_t; y) = E[ε | x_t, y] = −σ_t ∇ log p(x_t|y)

are closed-form in float64, and what the paper says about a trained diffusion model can be checked
to machine precision. Shapes: x is [..., D]; α_t, σ_t are floats or broadcast against x.
"""
import math

import torch


class GaussianMixture:
    """Σ_k w_k N(μ_k, diag s_k²), component k in class `labels[k]`.  y=None is the unconditional ∅.

    means [K, D], stds [K] or [K, D] (0 makes a component a point), weights [K], labels [K].
    """

    def __init__(self, means, stds, weights=None, labels=None):
        self.means = torch.as_tensor(means, dtype=torch.float64)
        K = len(self.means)
        stds = torch.as_tensor(stds, dtype=torch.float64)
        self.stds = (stds if stds.ndim == 2 else stds[:, None]).expand(K, -1)   # [K, D] or [K, 1]
        weights = torch.as_tensor([1.0] * K if weights is None else weights, dtype=torch.float64)
        self.log_w = torch.log(weights / weights.sum())
        self.labels = torch.zeros(K).long() if labels is None else torch.as_tensor(labels)

    def _log_joint(self, x_t, alpha_t, sigma_t, y):
        """log [w_k N(x_t; α μ_k, α² s_k² + σ²)] for each component of class y: [..., K]."""
        alpha_t, sigma_t = (torch.as_tensor(c, dtype=torch.float64) for c in (alpha_t, sigma_t))
        alpha_t, sigma_t = (c[..., None, :] if c.ndim else c for c in (alpha_t, sigma_t))
        delta = x_t[..., None, :] - alpha_t * self.means                        # [..., K, D]
        var = (alpha_t * self.stds) ** 2 + sigma_t ** 2                         # [..., K, D or 1]
        log_n = -0.5 * (delta ** 2 / var + torch.log(2 * math.pi * var)).sum(-1)
        outside = torch.zeros_like(self.log_w)
        if y is not None:
            outside[self.labels != y] = -math.inf
        return self.log_w + outside + log_n, delta / var

    def log_prior(self, y):
        """log p(y)."""
        return torch.logsumexp(self.log_w[self.labels == y], 0)

    def log_p(self, x_t, alpha_t=1.0, sigma_t=0.0, y=None):
        """log p(x_t), or log p(x_t|y): [...]."""
        log_joint = torch.logsumexp(self._log_joint(x_t, alpha_t, sigma_t, y)[0], -1)
        return log_joint if y is None else log_joint - self.log_prior(y)

    def log_posterior(self, y, x_t, alpha_t=1.0, sigma_t=0.0):
        """log p(y|x_t) = log p(x_t|y) + log p(y) − log p(x_t) ≤ 0: [...]."""
        joint = self.log_p(x_t, alpha_t, sigma_t, y) + self.log_prior(y)
        return joint - self.log_p(x_t, alpha_t, sigma_t)

    def eps(self, x_t, alpha_t, sigma_t, y=None):
        """ε(x_t; y) = σ_t Σ_k p(k|x_t, y) (x_t − α_t μ_k) / (α_t² s_k² + σ_t²): like x_t."""
        log_joint, scaled = self._log_joint(x_t, alpha_t, sigma_t, y)
        return sigma_t * (torch.softmax(log_joint, -1)[..., None] * scaled).sum(-2)

    def sample(self, n, y=None, generator=None):
        """n draws of x_0, or of x_0 given y: [n, D]."""
        w = self.log_w.exp() * (1.0 if y is None else (self.labels == y))
        k = torch.multinomial(w, n, replacement=True, generator=generator)
        return self.means[k] + self.stds[k] * randn(n, self.means.shape[1], generator=generator)


def randn(*shape, generator=None):
    """Standard normal noise in float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def particle_eps(x_t, particles, alpha_t, sigma_t, bandwidth=0.0):
    """ε_g = E[ε | x_t] when x_0 is one of `particles` [N, D], blurred by `bandwidth`: like x_t."""
    var = alpha_t ** 2 * bandwidth ** 2 + sigma_t ** 2
    logits = alpha_t * x_t @ particles.T - 0.5 * alpha_t ** 2 * (particles ** 2).sum(-1)
    return sigma_t * (x_t - alpha_t * torch.softmax(logits / var, -1) @ particles) / var


# -------------------------------------- two in the plane, of the tests and of figures/explorer.html
def two_rings():
    """Class 0 (y): 8 modes on a ring of radius 2.  Class 1: 8 modes between them, at radius 1.

    Nothing bounds here how far guidance can push, as both have the same spread; a cloud does.
    """
    angle = torch.arange(16, dtype=torch.float64) * math.pi / 8
    radius = 2.0 - torch.arange(16) % 2
    means = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return GaussianMixture(means, [0.2] * 16, labels=torch.arange(16) % 2)


def ring_in_a_cloud():
    """The same class 0.  Class 1, as likely as it: one Gaussian of std 2 about the origin."""
    ring = two_rings().means[::2]
    return GaussianMixture(torch.cat([ring, torch.zeros(1, 2)]), [0.2] * 8 + [2.0], [1.0] * 8 + [8],
                           labels=[0] * 8 + [1])


MIXTURES = {"two rings": two_rings, "a ring in a cloud": ring_in_a_cloud}
