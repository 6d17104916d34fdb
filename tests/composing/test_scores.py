import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kvcompose_local.composing.scores import as_layers, best_first_keys, key_indices, token_scores
from kvcompose_local.errors import InvalidInput

FINITE = st.floats(-1e6, 1e6, width=32)


def test_hand_worked():
    attention = np.array([[[0.2, 0.8], [0.4, 0.0], [0.5, 0.1], [0.1, 0.3]]], np.float32)  # L=1, Q=4, T=2
    scores = token_scores(attention, 2, add_mean_across_heads=False)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [[[0.3, 0.4], [0.3, 0.2]]], atol=1e-7)
    np.testing.assert_allclose(token_scores(attention, 2), [[[0.6, 0.7], [0.6, 0.5]]], atol=1e-7)


@given(st.data(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 5), st.booleans())
def test_equals_the_naive_loops(data, n_layers, n_heads, n_group, n_tokens, add_mean):
    shape = (n_layers, n_heads * n_group, n_tokens)
    attention = data.draw(arrays(np.float32, shape, elements=st.floats(0, 1, width=32)))
    expected = np.zeros((n_layers, n_heads, n_tokens))
    for layer in range(n_layers):
        for token in range(n_tokens):
            for query_head in range(n_heads * n_group):
                expected[layer, query_head // n_group, token] += attention[layer, query_head, token] / n_group
            if add_mean:
                expected[layer, :, token] += sum(expected[layer, :, token]) / n_heads
    scores = token_scores(attention, n_heads, add_mean_across_heads=add_mean)
    assert scores.shape == expected.shape
    np.testing.assert_allclose(scores, expected, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_non_finite_attention(bad):
    attention = np.ones((2, 4, 3), np.float32)
    attention[1, 2, 0] = bad
    attention[1, 3, 0] = -bad
    with pytest.raises(InvalidInput, match="NaN or infinite"):
        token_scores(attention, 2)


@pytest.mark.parametrize(
    ("attention", "n_kv_heads"),
    [
        (np.ones((4, 3), np.float32), 2),
        (np.ones((1, 4, 3), np.int32), 2),
        (np.ones((1, 4, 3), np.float32), 3),
        (np.ones((1, 4, 3), np.float32), 0),
        (np.ones((1, 4, 3), np.float32), 8),
        (np.ones((1, 0, 3), np.float32), 1),
    ],
)
def test_refuses_wrong_shapes(attention, n_kv_heads):
    with pytest.raises(InvalidInput):
        token_scores(attention, n_kv_heads)


def test_layers_may_differ():
    layers = as_layers([np.ones((2, 3)), np.ones((1, 0), np.float16), np.ones((4, 5), np.float32)])
    assert [layer.shape for layer in layers] == [(2, 3), (1, 0), (4, 5)]
    assert {layer.dtype for layer in layers} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    "scores",
    [
        np.ones((2, 3), np.float32),
        np.ones((0, 2, 3), np.float32),
        [],
        [np.ones(3)],
        [np.ones((2, 3), int)],
        [np.ones((0, 3))],
        [[[1.0, 2.0], [1.0]]],
        [np.full((1, 1), np.nan)],
        [np.full((1, 1), np.inf)],
        [np.ones((1, 1)), np.full((1, 1), 1e300)],
    ],
)
def test_refuses_what_are_not_scores(scores):
    with pytest.raises(InvalidInput):
        as_layers(scores)


@given(arrays(np.float32, st.integers(0, 20), elements=st.one_of(FINITE, st.sampled_from([0.0, -0.0, 1.0]))))
def test_keys_order_by_score_then_index(scores):
    order = key_indices(np.sort(best_first_keys(scores, np.arange(scores.size))))
    assert order.tolist() == sorted(range(scores.size), key=lambda index: (-scores[index], index))
