"""The old import path of :mod:`kvcompose_local.composing.selection`."""

from kvcompose_local.composing.selection import *  # noqa: F403
