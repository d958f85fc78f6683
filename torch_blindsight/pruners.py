"""Two published pruners: one by the images alone, before the language model; one by attention, between layers.

Both keep all text and delimiters. Written from the papers' formulas, as examples of `Pruner`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared_profiles.layout import concatenated_ranges
from torch_blindsight.pruning import Seen


@dataclass(frozen=True)
class DivPrune:
    """Keeps the most diverse tokens of every image, before the language model and whatever the question.

    Alvar et al., DivPrune (CVPR 2025, arXiv 2503.02175): greedy max-min diversity. The first token is the one whose
    nearest neighbour is farthest; each next one is farthest from its nearest among those chosen. Distance is one minus
    the cosine of the image features. The paper has one image; here every image keeps the same share.

    Args:
        share: of each image's tokens, in (0, 1]; at least one is kept.

    Raises:
        ValueError: no such share.
    """

    share: float
    layer = 0

    def __post_init__(self) -> None:
        _check_share(self.share)

    def __call__(self, seen: Seen) -> np.ndarray:
        """See `Pruner`."""
        images = [
            first + _most_diverse(seen.hidden[first:last], _how_many(self.share, last - first))
            for _, first, last, _ in seen.layout.images.tolist()
        ]
        return np.unique(np.concatenate([_all_but_images(seen), *images]))


@dataclass(frozen=True)
class FastV:
    """Keeps the image tokens that the last token looks at most, from some layer on.

    Chen et al., FastV (ECCV 2024, arXiv 2403.06764): all tokens pass layers before `layer`; then image tokens are
    ranked by the attention that the prompt's last token paid them in the layer before, averaged over heads.

    Args:
        share: of all image tokens of the prompt, in (0, 1]; at least one is kept.
        layer: first layer that sees fewer tokens, at least 1 (the paper's K; 2 there).

    Raises:
        ValueError: no such share, or no such layer: before layer 0 there is no attention.
    """

    share: float
    layer: int = 2

    def __post_init__(self) -> None:
        _check_share(self.share)
        if not isinstance(self.layer, int | np.integer) or self.layer < 1:
            raise ValueError(
                f"layer must be an integer of at least 1: the layer before is looked at. Got {self.layer}."
            )

    def __call__(self, seen: Seen) -> np.ndarray:
        """See `Pruner`."""
        assert seen.before is not None
        received = seen.before.of_last_token().mean(0)  # [N]
        tokens = concatenated_ranges(seen.layout.images[:, 1], seen.layout.images[:, 2])
        ranked = received.cpu().numpy()[tokens].argsort(kind="stable")
        return np.unique(np.concatenate([_all_but_images(seen), tokens[ranked[-_how_many(self.share, len(tokens)) :]]]))


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1]. Got {share}.")


def _how_many(share: float, n: int) -> int:
    return max(1, round(share * n))


def _all_but_images(seen: Seen) -> np.ndarray:
    """Positions of text, delimiters and the last token, whatever it is."""
    return np.union1d(seen.layout.textual_rows, seen.layout.n_tokens - 1)


def _most_diverse(features: Tensor, n: int) -> np.ndarray:
    """Greedy max-min diversity: n of the rows of `[M, E]`."""
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    distance = (1 - unit @ unit.T).cpu().numpy()  # [M, M], of one image
    np.fill_diagonal(distance, np.inf)
    chosen = [int(distance.min(1).argmax())]
    nearest = distance[chosen[0]].copy()
    nearest[chosen] = -np.inf
    while len(chosen) < n:
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, distance[chosen[-1]])
        nearest[chosen] = -np.inf
    return np.array(chosen)
