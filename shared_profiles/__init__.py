"""What both frameworks share: prompt layouts, head categories, plans and calibrated profiles. Needs numpy only."""

from shared_profiles.accounting import PairCounts, count_layer_pairs, count_model_pairs, count_pairs
from shared_profiles.categories import SPARSE, Category
from shared_profiles.families import FAMILIES, Family, SpecialTokens, family_of
from shared_profiles.layout import Layout
from shared_profiles.masks import category_mask
from shared_profiles.plan import Plan, Tiles, build_plan, image_tiles, packed_positions
from shared_profiles.template import SinkTemplate

__all__ = [
    "FAMILIES",
    "SPARSE",
    "Category",
    "Family",
    "Layout",
    "PairCounts",
    "Plan",
    "SinkTemplate",
    "SpecialTokens",
    "Tiles",
    "build_plan",
    "category_mask",
    "count_layer_pairs",
    "count_model_pairs",
    "count_pairs",
    "family_of",
    "image_tiles",
    "packed_positions",
]
