"""Gradients, optimizer state and forward passes of what is trained, only."""

from priorityprop_jax.partial.choose import choose_active
from priorityprop_jax.partial.costs import StepCosts, measure_costs
from priorityprop_jax.partial.engine import step
from priorityprop_jax.partial.freeze import freeze
from priorityprop_jax.partial.grad import value_and_grad
from priorityprop_jax.partial.offload import ActiveState
from priorityprop_jax.partial.plan import Plan, plan
from priorityprop_jax.partial.policies import Situation, make_policy
from priorityprop_jax.partial.prefix_cache import PrefixCache
from priorityprop_jax.partial.stack import Stack, stack
from priorityprop_jax.partial.stages import (
    Stages,
    chain,
    function_stage,
    nnx_stages,
)
from priorityprop_jax.partial.update import ActiveUpdatesState, update_active

__all__ = [
    "ActiveState",
    "ActiveUpdatesState",
    "Plan",
    "PrefixCache",
    "Situation",
    "Stack",
    "Stages",
    "StepCosts",
    "chain",
    "choose_active",
    "freeze",
    "function_stage",
    "make_policy",
    "measure_costs",
    "nnx_stages",
    "plan",
    "stack",
    "step",
    "update_active",
    "value_and_grad",
]
