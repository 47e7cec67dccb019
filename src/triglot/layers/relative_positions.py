"""Positions as distances between query and key (Raffel et al. 2020)."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class RelativePositions(nn.Module):
    """A learned number for each head and each range of distances, added to scores (Raffel et al. 2020, §2.1).

    Half of the buckets are one distance each, the others grow by a constant factor up to `max_distance`, from where on
    all is one; if `both_ways`, half of all buckets are for keys that come after the query.
    """

    buckets: Tensor
    """Of every distance from −max_distance to max_distance."""

    def __init__(self, num_buckets: int, max_distance: int, num_heads: int, *, both_ways: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(num_buckets, num_heads)
        self.max_distance = max_distance
        back = distance_buckets(num_buckets // 2 if both_ways else num_buckets, max_distance)
        ahead = back[1:] + num_buckets // 2 if both_ways else back[:1].expand(max_distance)
        self.register_buffer("buckets", torch.cat([back.flip(0), ahead]), persistent=False)

    def forward(
        self, query: Int[Tensor, "#batch length"], key: Int[Tensor, "#batch keys"]
    ) -> Float[Tensor, "#batch heads length keys"]:
        """What is added to the score of a query and a key at these positions."""
        distance = (key[:, None] - query[:, :, None]).clamp(-self.max_distance, self.max_distance)
        return self.table(self.buckets[distance + self.max_distance]).permute(0, 3, 1, 2)


def distance_buckets(num_buckets: int, max_distance: int) -> Int[Tensor, " distances"]:
    """The bucket of every distance from 0 to `max_distance`."""
    exact, distance = num_buckets // 2, torch.arange(max_distance + 1)
    ranges = torch.log(distance / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    far = (exact + ranges.clamp(min=0).long()).clamp(max=num_buckets - 1)
    return torch.where(distance < exact, distance, far)
