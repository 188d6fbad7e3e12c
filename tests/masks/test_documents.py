"""Where the documents of packed rows begin."""

import jax.numpy as jnp
from numpy.testing import assert_array_equal

from attnjax.documents import document_starts


def test_runs_of_equal_ids_are_documents():
    """An id that comes again is another document; ids need not be sorted."""
    ids = jnp.array([[3, 3, 0, 0, 0, 3], [-1, 2, 2, 2, 5, 5]])
    want = [[0, 0, 2, 2, 2, 5], [0, 1, 1, 1, 4, 4]]
    got = document_starts(ids)
    assert_array_equal(got, want)
    assert got.dtype == jnp.int32
