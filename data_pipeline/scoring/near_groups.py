"""Groups of near duplicates: the connected components of near pairs."""

import numpy as np
from jaxtyping import Bool, Int64


def group_near(
    content: Int64[np.ndarray, " n"],
    trusted: Bool[np.ndarray, " n"],
    left: Int64[np.ndarray, " p"],
    right: Int64[np.ndarray, " p"],
) -> Int64[np.ndarray, " n"]:
    """The group number of every record; near duplicates are in one group.

    Args:
      content: number of each record's fingerprints; equal fingerprints have equal numbers.
      trusted: whether each record may be near to another.
      left, right: contents of near pairs. Contents without a trusted record are ignored.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    group = np.arange(len(content))
    if not trusted.any():
        return group
    present, position = np.unique(content[trusted], return_inverse=True)
    ends = []
    for side in (left, right):
        ends.append(np.minimum(np.searchsorted(present, side), len(present) - 1))
    both = (present[ends[0]] == left) & (present[ends[1]] == right)
    rows, columns = ends[0][both], ends[1][both]
    graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(len(present), len(present)))
    _, component = connected_components(graph, directed=False)
    group[trusted] = len(content) + component[position]
    return group
