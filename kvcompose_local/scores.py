"""The old import path of :mod:`kvcompose_local.composing.scores`."""

from kvcompose_local.composing.scores import *  # noqa: F403
