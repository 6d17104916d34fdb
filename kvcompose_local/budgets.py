"""The old import path of :mod:`kvcompose_local.composing.budgets`."""

from kvcompose_local.composing.budgets import *  # noqa: F403
