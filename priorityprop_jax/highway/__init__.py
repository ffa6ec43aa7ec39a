"""Highway-BP over depth, and how good an approximate gradient is."""

from priorityprop_jax.highway.quality import (
    format_quality,
    gradient_quality,
    gradient_quality_table,
)
from priorityprop_jax.highway.scan import highway_nnx, highway_report, highway_scan
from priorityprop_jax.rnn.rounds import HighwayReport

__all__ = [
    "HighwayReport",
    "format_quality",
    "gradient_quality",
    "gradient_quality_table",
    "highway_nnx",
    "highway_report",
    "highway_scan",
]
