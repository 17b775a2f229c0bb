"""Figures of how rows are used, held against plain Python on the codes themselves."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfdist.training.code_census import LOWEST_OCTAVE, NUM_BUCKETS, LayerCounts
from mfdist.training.layer_use import (
    LORENZ_POINTS,
    MAP_COLUMNS,
    MAP_TABLES,
    bit_shares,
    code_entropy,
    detail_of,
    even_code_entropy,
    even_lorenz,
    lorenz,
    score_quantiles,
    use_of,
)
from mfdist.training.row_movement import LayerMovement


def counts_of(codes, bits, scores=None, name="layer"):
    """Return what a census would have counted of codes [N, K]."""
    hits = np.stack([np.bincount(column, minlength=1 << bits) for column in np.asarray(codes).T])
    buckets = np.zeros(NUM_BUCKETS, dtype=np.int64) if scores is None else scores
    return LayerCounts(
        name=name, num_tables=len(hits), bits=bits, tables=tuple(range(len(hits))), hits=hits, scores=buckets
    )


CODES = st.integers(1, 5).flatmap(
    lambda bits: st.tuples(
        st.just(bits),
        st.integers(1, 4).flatmap(
            lambda tables: st.lists(
                st.lists(st.integers(0, (1 << bits) - 1), min_size=tables, max_size=tables), min_size=1, max_size=60
            )
        ),
    )
)


@given(CODES)
def test_figures_are_those_of_the_codes(drawn):
    bits, codes = drawn
    counts = counts_of(codes, bits)
    use = use_of(counts)
    columns = list(zip(*codes, strict=True))
    entropies = [
        -sum(n / len(codes) * math.log2(n / len(codes)) for n in Counter(column).values()) for column in columns
    ]
    assert code_entropy(counts.hits).tolist() == pytest.approx(entropies, abs=1e-9)
    assert use.code_entropy == pytest.approx(sum(entropies) / len(entropies), abs=1e-9)
    assert use.least_code_entropy == pytest.approx(min(entropies), abs=1e-9)
    dead = sum((1 << bits) - len(set(column)) for column in columns)
    assert use.dead_share == pytest.approx(dead / (len(columns) << bits))
    assert use.hottest_share == max(max(Counter(column).values()) for column in columns) / len(codes)
    texts = [[f"{code:0{bits}b}" for code in column] for column in columns]
    shares = [[sum(text[bit] == "1" for text in column) / len(codes) for bit in range(bits)] for column in texts]
    assert bit_shares(counts.hits).tolist() == [pytest.approx(line) for line in shares]
    same = [share in (0, 1) for line in shares for share in line]  # with so few tokens there is nothing between
    assert use.constant_bits == pytest.approx(sum(same) / len(same))


@given(CODES)
def test_a_lorenz_curve_is_convex_from_nothing_to_all(drawn):
    bits, codes = drawn
    curve = lorenz(counts_of(codes, bits).hits)
    assert len(curve) == LORENZ_POINTS and curve[0] == 0 and curve[-1] == 1
    assert (np.diff(curve) >= -1e-12).all() and (np.diff(curve, 2) >= -1e-9).all()


@pytest.mark.parametrize(("num_tokens", "bits"), [(4096, 4), (4096, 8), (300, 8), (100, 12)])
def test_even_figures_are_what_even_codes_give(num_tokens, bits):
    codes = np.random.default_rng(0).integers(0, 1 << bits, size=(num_tokens, 64))
    counts = counts_of(codes, bits)
    use = use_of(counts)
    assert use.even_code_entropy == even_code_entropy(num_tokens, 1 << bits)
    assert use.code_entropy == pytest.approx(use.even_code_entropy, rel=0.01)
    assert use.dead_share == pytest.approx(use.even_dead_share, abs=0.01)
    assert lorenz(counts.hits) == pytest.approx(even_lorenz(num_tokens, 1 << bits), abs=0.02)
    assert not use.has_collapsed and use.evenness == pytest.approx(1, rel=0.01)


def test_one_row_for_all_tokens_is_a_collapse():
    use = use_of(counts_of([[3, 5]] * 500, 4))
    assert (use.code_entropy, use.evenness, use.constant_bits, use.hottest_share) == (0, 0, 1, 1)
    assert use.dead_share == pytest.approx(15 / 16) and use.has_collapsed


def test_quantiles_of_scores_are_within_the_width_of_a_bucket():
    scores = np.exp(np.random.default_rng(0).normal(-3, 1, 100_000))
    buckets = np.bincount(
        np.ceil((np.log2(scores) - LOWEST_OCTAVE) * 16).astype(int) - 1, minlength=NUM_BUCKETS
    )  # as the census does
    expected = np.quantile(scores, [0.05, 0.25, 0.5, 0.75, 0.95])
    assert score_quantiles(buckets) == pytest.approx(expected.tolist(), rel=0.02)


def test_details_of_a_large_layer_are_small_json_and_say_which_rows_are_hot():
    rng = np.random.default_rng(0)
    codes = np.minimum(rng.geometric(0.02, size=(2000, 300)) - 1, 1023)
    codes[:, 7] = 1000
    movement = LayerMovement(row_ids=np.array([3, 1030, 1040]), moved=np.array([0.5, 1.0, 2.0]))
    detail = detail_of(counts_of(codes, 10, scores=np.bincount([400] * 3 + [300], minlength=NUM_BUCKETS)), movement)
    text = json.dumps(detail, allow_nan=False)
    assert len(text) < 150_000
    assert np.shape(detail["hits"]) == (MAP_TABLES, MAP_COLUMNS) and np.shape(detail["bit_shares"]) == (MAP_TABLES, 10)
    assert detail["hot_rows"][0] == {"table": 7, "code": 1000, "share": 1.0}
    assert detail["movement"] == {"tables": [0, 1], "moved": [0.5, 1.5]}
    assert sum(detail["scores"]["shares"]) == pytest.approx(1)
    # The mean over a line is the mean over what it shows: every table's lookups are all there.
    assert np.mean(detail["hits"]) == pytest.approx(1, rel=0.01)


def test_movement_is_summed_up_and_rows_that_did_not_move_are_counted():
    movement = LayerMovement(row_ids=np.arange(4), moved=np.array([0.0, 0.0, 1.0, 3.0]))
    use = use_of(counts_of([[0], [1], [2], [3]], 2), movement)
    assert use.unmoved_share == 0.5 and use.movement is not None and use.movement[2] == 0.5
    assert use_of(counts_of([[0]], 2)).movement is None
