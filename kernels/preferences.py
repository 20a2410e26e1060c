"""Published losses of preference pairs as data: one row for each paper.

x     = sum over the tokens of log pi - log ref     (the mean with length_normalise; log pi alone
        without a reference; the log odds of the mean with odds)
d     = x_chosen - x_rejected
loss  = link(d) + nll_coef * mean over the tokens of -log pi(chosen)
"""

from dataclasses import dataclass, replace
from typing import Any

LINKS = ("logistic", "hinge", "square")


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """A loss of pairs of completions.

    Attributes:
        link: "logistic": -log sigmoid(beta d - margin). "hinge": max(0, margin - beta d).
            "square": (d - 1 / (2 beta))^2.
        beta: see link; the reward of a completion is beta x. With odds it is the weight of the
        loss,
            -beta log sigmoid(d - margin).
        reference: whether log probabilities are relative to those of a reference policy.
        length_normalise: whether x is a mean over tokens.
        odds: whether d is the difference of log odds, log(p / (1 - p)) with p the geometric mean of
            the probabilities of the tokens (held below 1 by 2^-24). Needs length_normalise and no
            reference.
        label_smoothing: probability that a pair is the wrong way round: mixes in the logistic loss
            of -d with this weight.
        robust: with label_smoothing e, (1 - e) loss(d) - e loss(-d), over 1 - 2 e, instead: the
            expectation over such pairs is then the loss without noise.
        margin: see link; 0 with "square".
        nll_coef: weight of the negative log-likelihood of the chosen completion.
    """

    link: str = "logistic"
    beta: float = 0.1
    reference: bool = True
    length_normalise: bool = False
    odds: bool = False
    label_smoothing: float = 0.0
    robust: bool = False
    margin: float = 0.0
    nll_coef: float = 0.0

    def __post_init__(self) -> None:
        if self.link not in LINKS:
            raise ValueError(f"link must be one of {', '.join(LINKS)}; got {self.link!r}")
        if not self.beta > 0:
            raise ValueError(f"beta must be > 0, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if not self.nll_coef >= 0:
            raise ValueError(f"nll_coef must be >= 0, got {self.nll_coef}")
        if self.link != "logistic" and (self.label_smoothing or self.robust or self.odds):
            raise ValueError(
                f"label_smoothing, robust and odds go with link 'logistic', got {self.link!r}"
            )
        if self.link == "square" and self.margin:
            raise ValueError(
                f"link 'square' has the margin 1 / (2 beta): set margin to 0, got {self.margin}"
            )
        if self.odds and (self.reference or not self.length_normalise):
            raise ValueError("odds needs reference=False and length_normalise=True")

    def replace(self, **changes: Any) -> "Preference":
        """The same loss with some fields changed."""
        return replace(self, **changes)


PREFERENCES: dict[str, Preference] = {
    # https://arxiv.org/abs/2305.18290 eq. 7
    "dpo": Preference(),
    # https://ericmitchell.ai/cdpo.pdf: the labels are noisy
    "conservative_dpo": Preference(label_smoothing=0.1),
    # rDPO, https://arxiv.org/abs/2403.00409
    "robust_dpo": Preference(label_smoothing=0.1, robust=True),
    # https://arxiv.org/abs/2310.12036 eq. 17; replace(length_normalise=True) for means over tokens
    "ipo": Preference(link="square"),
    # the hinge loss of RSO, on likelihoods normalised by the reference,
    # https://arxiv.org/abs/2309.06657
    "hinge": Preference(link="hinge", margin=1.0),
    # rank calibration of SLiC-HF, https://arxiv.org/abs/2305.10425
    "slic": Preference(link="hinge", margin=1.0, beta=1.0, reference=False),
    # https://arxiv.org/abs/2405.14734 eq. 6
    "simpo": Preference(beta=2.0, margin=1.0, reference=False, length_normalise=True),
    # https://arxiv.org/abs/2403.07691 eq. 6 and 7, beta being its lambda
    "orpo": Preference(odds=True, reference=False, length_normalise=True, nll_coef=1.0),
    # https://arxiv.org/abs/2404.19733 eq. 1
    "dpo_nll": Preference(nll_coef=1.0),
}


def get_preference(loss: "str | Preference") -> Preference:
    """The row of that name, or the loss itself.

    Raises:
        ValueError: no row has that name; the message lists those that exist.
    """
    if isinstance(loss, Preference):
        return loss
    if loss not in PREFERENCES:
        raise ValueError(f"loss must be one of {', '.join(PREFERENCES)}; got {loss!r}")
    return PREFERENCES[loss]
